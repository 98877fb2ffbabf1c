"""Settings of the training stages. Torch is not imported, so that the command line can take its options from here."""

import math
from dataclasses import dataclass

from gbci_fast.attributes import CONDITIONED
from gbci_fast.choices import GUIDANCE_SCALE
from gbci_fast.errors import GBCIError
from gbci_fast.options import check_least, check_seed, option


@dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """Settings of a training run.

    Attributes:
        batch_size: images per micro-batch.
        learning_rate: peak; see `learning_rate_at`.
        warmup: steps of linear warm-up.
        ema_decay: see `EMA`.
        grad_clip: largest norm of the gradient.
        seed: of all random choices, in [0, 2^63).
        precision: "fp32" or "bf16" (autocast).
        save_every, sample_every: steps between two saves and two sample sheets.

    Raises:
        GBCIError: a value out of range.
    """

    steps: int = option(help="optimizer steps in all", least=1)
    batch_size: int = option(help="images per micro-batch (default: of the preset)", least=1)
    accumulate: int = option(1, "micro-batches per optimizer step; processes under torchrun share them", least=1)
    learning_rate: float = option(2e-4, "peak learning rate (default: of the preset)")
    weight_decay: float = 0.01
    warmup: int = 100
    ema_decay: float = 0.999
    grad_clip: float = 1.0
    seed: int = option(0, "of all random choices (default: 0)")
    precision: str = option("bf16", "of forward and backward pass (default: bf16)", choices=("fp32", "bf16"))
    save_every: int = option(200, "steps between two saves (default: 200)", least=1)
    sample_every: int = option(500, "steps between two sample sheets (default: 500)", least=1)
    tensorboard: bool = option(False, "write curves to OUTPUT/tensorboard (gbci_fast[train])")

    def __post_init__(self):
        check_least(self)
        check_seed(self.seed)
        if not 0 < self.learning_rate < math.inf:
            raise GBCIError(f"learning_rate is {self.learning_rate}; expected a positive number")
        if self.precision not in ("fp32", "bf16"):
            raise GBCIError(f"precision is {self.precision!r}; expected 'fp32' or 'bf16'")


@dataclass(frozen=True, kw_only=True)
class LDMConfig:
    """Widths of the UNet and the conditioner, and how training samples are drawn.

    Attributes:
        latent_crops: the side affects normalizations and self-attention, and so the difference between sampling in
            windows and on whole latents.
        null_probability: of a null condition.
        attribute_dropout, report_dropout: probability that an attribute or a report is left out.
        roi_weight: extra weight of the loss inside the mask.
        least_snr, most_snr: bounds of the signal-to-noise ratio as the weight of the clean latents' error.
        beta_end: of the noise schedule (see `build_scheduler`).
        attributes: those that the conditioner is built for (see `ConditionEncoder`).

    Raises:
        GBCIError: `variants` or a crop below 1, or no crop.
    """

    block_out_channels: tuple[int, ...] = (64, 128, 192)
    layers_per_block: int = 1
    head_dim: int = 32
    context_dim: int = 128
    pooled_dim: int = 256
    vit_depth: int = 4
    report_depth: int = 2
    variants: int = option(4, "augmented (image, mask) pairs encoded per image before training", least=1)
    latent_crops: tuple[int, ...] = option(
        (28,),
        "sides of the random latent crops, of which each batch takes one; the full latent's is no crop",
        nargs="+",
        metavar="SIDE",
    )
    null_probability: float = 0.1
    attribute_dropout: float = 0.15
    report_dropout: float = 0.3
    roi_weight: float = 4.0
    least_snr: float = 1.0
    most_snr: float = 5.0
    beta_end: float = 0.025
    attributes: tuple[str, ...] = CONDITIONED

    def __post_init__(self):
        check_least(self)
        if min(self.latent_crops, default=0) < 1:
            raise GBCIError(f"latent_crops are {list(self.latent_crops)}; expected one or more, each at least 1")


@dataclass(frozen=True, kw_only=True)
class DistillConfig:
    """Settings of a distillation.

    Attributes:
        guidance: scale of the teacher's classifier-free guidance, which the student learns.
        student_steps: steps of the student from noise to clean latents.
        solver_steps: steps of the teacher, a multiple of `student_steps` that divides the 1000 timesteps.
        huber: error at which the loss turns from square to linear, in standard deviations of the latents
            (pseudo-Huber).

    Raises:
        GBCIError: a value out of range.
    """

    guidance: float = option(GUIDANCE_SCALE, "guidance scale that the student has built in")
    student_steps: int = option(4, "steps the student takes", least=1, metavar="N")
    solver_steps: int = option(20, "DDIM steps of the teacher, a multiple of the student's", metavar="N")
    trajectories: int = option(4000, "pairs of image and mask that the teacher paints first", least=1, metavar="N")
    rank: int = option(32, "of the low-rank change of every layer", least=1)
    latent_crop: int = option(24, "of the window of each pair, in latent cells", least=1, metavar="SIDE")
    huber: float = 0.1

    def __post_init__(self):
        check_least(self)
        if self.solver_steps < 1 or self.solver_steps % self.student_steps or 1000 % self.solver_steps:
            raise GBCIError(
                f"solver_steps is {self.solver_steps}; expected a multiple of the student's {self.student_steps} that "
                f"divides 1000"
            )
        if not self.guidance >= 1:
            raise GBCIError(f"guidance is {self.guidance}; expected at least 1 (1 = no guidance)")
        if not self.huber > 0:
            raise GBCIError(f"huber is {self.huber}; expected a positive number")


@dataclass(frozen=True, kw_only=True)
class ReaderSettings:
    """How the readers of the evaluations are chosen.

    Attributes:
        components, regularization: the numbers of principal components and the C of logistic regression to choose from.
        parts: of the cross-validation.
        seed: of its partition of the patients.

    Raises:
        GBCIError: a value out of range.
    """

    fewest: int = option(
        20, "lesions that a task needs of each answer in fold A (default: %(default)s)", least=1, metavar="N"
    )
    components: tuple[int, ...] = (25, 50, 100, 150)
    regularization: tuple[float, ...] = (1e-4, 1e-3, 1e-2, 1e-1)
    parts: int = 5
    seed: int = option(0, "of the cross-validation (default: %(default)s)", least=0)

    def __post_init__(self):
        check_least(self)
