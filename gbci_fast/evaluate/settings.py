"""Settings of the evaluations. Torch is not imported, so that the command line can take its options from here."""

from dataclasses import dataclass, field
from typing import Any

from gbci_fast.choices import GUIDANCE_SCALE, JUDGED, RUNTIME, RUNTIMES, STEPS, TIER, TIERS
from gbci_fast.data.folds import check_folds
from gbci_fast.errors import GBCIError
from gbci_fast.options import check_least, like, option

SPLIT_HELP = (
    "the lesions to judge: those of fold C of the training split, where all choices are made, or of the test split, "
    "which is read once per release (default: %(default)s)"
)


@dataclass(frozen=True, kw_only=True)
class PaintSettings:
    """Settings of the sampler that paints lesions; `runtime` and `tier` are those of `gbci_fast.accelerate`.

    Raises:
        GBCIError: a number below its minimum.
    """

    steps: int = option(STEPS, "sampler steps (default: %(default)s)", least=1)
    guidance: float = option(GUIDANCE_SCALE, "guidance scale (default: %(default)s)")
    batch_size: int = option(8, "images sampled at once (default: %(default)s)", least=1)
    runtime: str = option(RUNTIME, "what executes the UNet (default: %(default)s)", choices=RUNTIMES)
    tier: str = option(TIER, "of the fast path (default: %(default)s)", choices=TIERS)

    def __post_init__(self):
        check_least(self)


STUDENT: dict[str, Any] = {"steps": 4, "tier": "approximate"}
"""The few-step student's settings, for evaluations that paint more than a thousand lesions."""


def check_even(train_batch: int) -> None:
    """Raises GBCIError unless a batch has two equal halves."""
    if train_batch < 2 or train_batch % 2:
        raise GBCIError(f"train_batch is {train_batch}; expected an even number, half of it lesions")


@dataclass(frozen=True, kw_only=True)
class PairedSettings:
    """Settings of a paired evaluation; the eager pipeline samples.

    Raises:
        GBCIError: a number below its minimum.
    """

    split: str = option(JUDGED[0], SPLIT_HELP, choices=JUDGED)
    steps: int = like(PaintSettings, "steps")
    guidance: float = like(PaintSettings, "guidance")
    seed: int = option(0, "of noise and bootstrap (default: %(default)s)", least=0)
    batch_size: int = like(PaintSettings, "batch_size")
    limit: int | None = option(None, "use N images, spread evenly over all", least=1, metavar="N")

    def __post_init__(self):
        check_least(self)


@dataclass(frozen=True, kw_only=True)
class DistributionSettings:
    """Settings of a distribution evaluation.

    Attributes:
        splits: number of random halvings of the patients.
        resamples: number of bootstrap resamples of the patients, for intervals.
        neighbors: k of precision, recall, density and coverage.
        pairs: largest number of pairs of crops for MS-SSIM.

    Raises:
        GBCIError: a number below its minimum.
    """

    split: str = like(PairedSettings, "split")
    seed: int = option(0, "of noise, halves and resamples (default: %(default)s)", least=0)
    limit: int | None = option(None, "use N images of each, real and synthetic", least=1, metavar="N")
    splits: int = field(default=100, metadata={"least": 1})
    resamples: int = field(default=500, metadata={"least": 1})
    neighbors: int = field(default=5, metadata={"least": 1})
    pairs: int = field(default=2000, metadata={"least": 1})

    def __post_init__(self):
        check_least(self)


@dataclass(frozen=True, kw_only=True)
class ObedienceSettings:
    """Settings of an obedience evaluation. The few-step student paints unless `painting` says otherwise.

    Attributes:
        yardstick: folds of the training patients; measured, nothing is trained on them.
        seeds: paintings of every lesion by every telling, each with other noise.

    Raises:
        GBCIError: a number below its minimum, or unknown folds.
    """

    split: str = like(PairedSettings, "split")
    yardstick: str = option(
        "ABC",
        "folds of the training patients whose real lesions show how much classes differ in what is measured "
        "(default: %(default)s)",
        metavar="FOLDS",
    )
    lesions: int = option(48, "masses painted, of as many patients as there are (default: %(default)s)", least=2)
    seeds: int = option(4, "paintings of every lesion by every telling (default: %(default)s)", least=2, metavar="N")
    seed: int = option(0, "of noise, choice and bootstrap (default: %(default)s)", least=0)
    limit: int | None = option(None, "read only N images, spread evenly over all", least=1, metavar="N")
    painting: PaintSettings = field(default_factory=lambda: PaintSettings(**STUDENT))

    def __post_init__(self):
        check_least(self)
        check_folds(self.yardstick)


@dataclass(frozen=True, kw_only=True)
class MemorisationSettings:
    """Settings of a memorisation evaluation.

    Attributes:
        quantile: the quantile of the real distances that is the threshold, in (0, 0.5].
        seed: of noise, bootstrap and controls.

    Raises:
        GBCIError: a quantile or a seed out of range.
    """

    split: str = like(PairedSettings, "split")
    quantile: float = option(0.01, "share of new lesions below the threshold (default: %(default)s)")
    seed: int = option(0, "of noise and bootstrap (default: %(default)s)", least=0)
    limit: int | None = option(None, "use N real and N synthetic images, spread evenly", least=1, metavar="N")

    def __post_init__(self):
        if not 0 < self.quantile <= 0.5:
            raise GBCIError(f"quantile is {self.quantile:g}; expected above 0, at most 0.5")
        check_least(self)


@dataclass(frozen=True, kw_only=True)
class UtilitySettings:
    """Settings of a utility evaluation.

    Attributes:
        seed: of patches, moved masks, noise, bootstrap and the first training; each further training adds 1.
        seeds: trainings per arm and fraction, each with its own choice of patients and initial weights.
        fractions: percentages of the real training patients, ascending.
        train_steps: optimizer steps of every training, in every arm.
        offset: largest distance in model pixels of a window's middle from its lesion's along each axis, so that the
            place in the window does not tell a lesion.
        train_batch: patches per step, half of them lesions; even.

    Raises:
        GBCIError: a number below its minimum, an odd batch, or fractions that do not ascend within (0, 100].
    """

    split: str = like(PairedSettings, "split")
    seed: int = option(0, "the first seed (default: %(default)s)", least=0)
    seeds: int = option(5, "trainings per arm and fraction (default: %(default)s)", least=1)
    fractions: tuple[float, ...] = option(
        (10, 100),
        "percent of the real training patients (default: %(default)s)",
        metavar="P,P",
        such="percentages such as 10,25,50,100",
    )
    train_steps: int = option(300, "optimizer steps per training (default: %(default)s)", least=2)
    train_batch: int = 32
    synthetic_count: int = option(256, "synthetic lesions (default: %(default)s)", least=1, metavar="N")
    offset: int = option(16, "pixels by which lesions lie off the middle of their windows (%(default)s)", least=0)
    limit: int | None = option(None, "use N images for training and N to judge, spread evenly", least=1, metavar="N")
    painting: PaintSettings = field(default_factory=PaintSettings)

    def __post_init__(self):
        check_least(self)
        check_even(self.train_batch)
        ascending = tuple(sorted(set(self.fractions)))
        if not ascending or ascending != self.fractions or not all(0 < value <= 100 for value in ascending):
            told = ",".join(f"{value:g}" for value in self.fractions)
            raise GBCIError(f"fractions is {told!r}; expected ascending percentages up to 100 such as 10,25,50,100")


@dataclass(frozen=True, kw_only=True)
class RealismSettings:
    """Settings of a realism evaluation. The judges are trained on the folds A and B of the training split.

    Attributes:
        seed: of noise, bootstrap and the first training; each further training adds 1.
        seeds: trainings per comparison, over which the AUC is averaged.
        train_steps: optimizer steps of every network.
        train_batch: windows per step, half of them of each set; even.

    Raises:
        GBCIError: a number below its minimum, or an odd batch.
    """

    split: str = like(PairedSettings, "split")
    seed: int = option(0, "the first seed (default: %(default)s)", least=0)
    seeds: int = option(2, "trainings per comparison (default: %(default)s)", least=1)
    train_steps: int = option(800, "optimizer steps per network (default: %(default)s)", least=2)
    train_batch: int = 32
    limit: int | None = option(None, "use N images to train and N to judge, spread evenly", least=1, metavar="N")
    painting: PaintSettings = field(default_factory=lambda: PaintSettings(**STUDENT))

    def __post_init__(self):
        check_least(self)
        check_even(self.train_batch)
