"""What a phantom data set can be told. Without numpy, so that the command line takes its options from here."""

from dataclasses import dataclass, field

from gbci_fast.errors import GBCIError
from gbci_fast.options import option


@dataclass(frozen=True, kw_only=True)
class Population:
    """What a data set is drawn from; which of the findings are malignant follows the hazard.

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
    """What `generate_phantom` writes.

    Args:
        seed: a study depends on it and on its index alone.
        size: height (and width) in pixels; see `study.render_study`.
        population: what patients are drawn from.
        timepoints: see `study.growth_series`.
        twins: of every image with a finding.
        ultrasound: of findings that have a body; with ``twins`` also of the breast without them.

    Raises:
        GBCIError: an impossible number of timepoints or interval.
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
