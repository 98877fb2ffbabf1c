"""Settings of a phantom data set. NumPy is not imported, so that the command line can take its options from here."""

from dataclasses import dataclass, field

from gbci_fast.errors import GBCIError
from gbci_fast.options import option


@dataclass(frozen=True, kw_only=True)
class Population:
    """The population that patients are drawn from. Which findings are malignant follows the hazard.

    Attributes:
        prevalence: expected number of primary findings per breast, 0 to 1.
        balance: whether every finding category is equally frequent.

    Raises:
        GBCIError: a prevalence outside [0, 1].
    """

    prevalence: float = option(0.5, "primary findings per breast (default: %(default)s)", metavar="P")
    balance: bool = option(False, "every category equally often (default: VinDr-Mammo's rates)")

    def __post_init__(self):
        if not 0 <= self.prevalence <= 1:
            raise GBCIError(f"prevalence is {self.prevalence}; expected findings per breast from 0 to 1")


@dataclass(frozen=True, kw_only=True)
class PhantomJob:
    """Settings of `generate_phantom`.

    Attributes:
        seed: a study depends only on the seed and the study's index.
        size: height (and width) in pixels; see `study.render_study`.
        population: the population that patients are drawn from.
        timepoints: studies per patient, 1 to 100; see `study.growth_series`.
        interval: days between the studies of a patient, 1 to 3650.
        twins: whether each image with a finding is also written without its findings.
        truth: whether masks of breast and pectoral muscle are written.
        ultrasound: whether findings that have a body get a B-mode slice; with ``twins`` also the breast without them.

    Raises:
        GBCIError: timepoints or interval out of range.
    """

    seed: int = option(0, "decides everything (default: %(default)s)", metavar="S")
    size: int | tuple[int, int] = option(
        512,
        "pixels, from 128 to 4096; the height spans 240 mm (default: %(default)s)",
        metavar="HEIGHT[xWIDTH]",
    )
    population: Population = field(default_factory=Population)
    timepoints: int = option(
        1, "studies per patient, of growing lesions (default: %(default)s)", flag="--growth", metavar="N"
    )
    interval: int = option(365, "between the studies of a patient (default: %(default)s)", metavar="DAYS")
    twins: bool = option(False, "also write each breast without its findings: twins/")
    truth: bool = option(False, "also write masks of breast and pectoral muscle: truth/")
    ultrasound: bool = option(False, "also write a B-mode slice of each lesion: ultrasound/")

    def __post_init__(self):
        if not 1 <= self.timepoints <= 100:
            raise GBCIError(f"number of timepoints is {self.timepoints}; expected 1 to 100")
        if not 1 <= self.interval <= 3650:
            raise GBCIError(f"interval between timepoints is {self.interval}; expected 1 to 3650 days")
