"""Settings of the evaluations. Torch is not imported, so that the command line can take its options from here."""

import math
from dataclasses import dataclass, field

from gbci_fast.choices import GUIDANCE_SCALE, JUDGED, RUNTIME, RUNTIMES, STEPS, TIER, TIERS
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
class AdherenceSettings:
    """Settings of an adherence evaluation.

    Raises:
        GBCIError: a number below its minimum, a guidance that is not finite, or a sweep value given twice.
    """

    split: str = like(PairedSettings, "split")
    guidance: float = PaintSettings.guidance
    sweep: tuple[float, ...] = option(
        (),
        "paint at these guidance scales, too, such as 1,2,3,5",
        flag="--guidance-sweep",
        metavar="G,G,...",
        such="numbers such as 1,2,3,5",
    )
    shuffled: bool = option(
        True, "paint every lesion by another's description as well, which takes as long again (default: yes)"
    )
    variants: int = option(
        1,
        "paint every lesion N times, with other noise each time, so that the luck of a single painting averages out "
        "(default: %(default)s)",
        least=1,
        metavar="N",
    )
    seed: int = option(0, "of noise, shuffling and bootstrap (default: %(default)s)", least=0)
    limit: int | None = like(PairedSettings, "limit")

    def __post_init__(self):
        check_least(self)
        for guidance in (self.guidance, *self.sweep):
            if not math.isfinite(guidance):
                raise GBCIError(f"guidance is {guidance}; expected a finite number")
        if len(set(self.sweep)) < len(self.sweep):
            raise GBCIError(f"guidance sweep is {', '.join(f'{g:g}' for g in self.sweep)}; expected each value once")


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
        if self.train_batch < 2 or self.train_batch % 2:
            raise GBCIError(f"train_batch is {self.train_batch}; expected an even number, half of it lesions")
        ascending = tuple(sorted(set(self.fractions)))
        if not ascending or ascending != self.fractions or not all(0 < value <= 100 for value in ascending):
            told = ",".join(f"{value:g}" for value in self.fractions)
            raise GBCIError(f"fractions is {told!r}; expected ascending percentages up to 100 such as 10,25,50,100")
