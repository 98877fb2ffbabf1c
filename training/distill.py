"""Third stage: a few-step student of a trained pipeline, by latent consistency distillation with guidance inside.

Luo et al., "Latent Consistency Models", 2023: between two of the solver's timesteps the student's estimate of the
clean latent shall stay the same, where the step between them is one DDIM step of the guided teacher. The target is the
student itself without gradient (Song and Dhariwal, "Improved Techniques for Training Consistency Models", 2023). The
student is the teacher's UNet plus a low-rank change of every convolution and linear layer (Hu et al., "LoRA", 2021).
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn
from torch.nn.utils import parametrize

from gbci_fast.checkpoint import load_pipeline
from gbci_fast.errors import GBCIError
from gbci_fast.few_step import FewStepLoRA, few_step_scheduler
from gbci_fast.files import hash_weights
from gbci_fast.pipeline import GBCIPipeline
from gbci_fast.training.data import load_images
from gbci_fast.training.ldm import LatentBank, LDMConfig, LDMTask, build_bank
from gbci_fast.training.loop import LoopConfig, check_output, replace_folder, train
from gbci_fast.training.ranks import rank_device
from gbci_fast.training.stages import digest_roots

BOUNDARY = 0.5  # sigma_data of the consistency function, as in diffusers' LCMScheduler
SHEET_STEPS = 4


@dataclass(frozen=True, kw_only=True)
class DistillConfig:
    """What the student learns.

    Attributes:
        guidance: scale of the teacher's classifier-free guidance, which the student then has built in.
        solver_steps: DDIM steps of the teacher's trajectory; the student may be sampled with any fewer.
        rank: of the low-rank change of every layer.
        huber: where the loss turns from square to linear, in standard deviations of the latents (pseudo-Huber).
    """

    guidance: float = 3.0
    solver_steps: int = 50
    rank: int = 32
    huber: float = 0.1

    def __post_init__(self):
        if not 1 <= self.solver_steps <= 1000:
            raise GBCIError(f"solver_steps is {self.solver_steps}; expected 1 to 1000")
        if self.rank < 1:
            raise GBCIError(f"rank is {self.rank}; expected at least 1")
        if not self.guidance >= 1:
            raise GBCIError(f"guidance is {self.guidance}; expected at least 1, which is none")
        if not self.huber > 0:
            raise GBCIError(f"huber is {self.huber}; expected a positive number")


class LowRank(nn.Module):
    """A weight plus ``up @ down``, as a parametrization; `up` starts at zero, so that nothing changes at first."""

    def __init__(self, weight: Tensor, rank: int):
        super().__init__()
        rows, columns = weight.shape[0], weight[0].numel()
        rank = min(rank, rows, columns)
        self.down = nn.Parameter(torch.randn(rank, columns) / columns**0.5)
        self.up = nn.Parameter(torch.zeros(rows, rank))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + (self.up @ self.down).view_as(weight)


def with_low_rank(unet: UNet2DConditionModel, rank: int) -> UNet2DConditionModel:
    """A copy whose own weights are frozen and whose convolutions and linear layers learn a change of that rank."""
    student = copy.deepcopy(unet).requires_grad_(False)
    for layer in [part for part in student.modules() if isinstance(part, nn.Conv2d | nn.Linear)]:
        parametrize.register_parametrization(layer, "weight", LowRank(layer.weight, rank))
    return student


def low_rank_change(student: UNet2DConditionModel, config: DistillConfig) -> FewStepLoRA:
    """What the student of `with_low_rank` has learned, in float16."""
    tensors = {}
    for name, layer in student.named_modules():
        if parametrize.is_parametrized(layer):
            change = layer.parametrizations.weight[0]
            tensors |= {f"{name}.{part}": getattr(change, part).detach().cpu() for part in ("up", "down")}
    return FewStepLoRA.of(tensors, guidance_scale=config.guidance, solver_steps=config.solver_steps).half()


class DistillTask(LDMTask):
    """Consistency of the student's clean latent along the guided teacher's DDIM trajectory."""

    def __init__(
        self, teacher: GBCIPipeline, bank: LatentBank, sampling: LDMConfig, config: DistillConfig, device: torch.device
    ):
        teacher.unet.requires_grad_(False).eval()
        teacher.conditioner.requires_grad_(False)
        student = GBCIPipeline(
            vae=teacher.vae,
            unet=with_low_rank(teacher.unet, config.rank).to(device),
            scheduler=few_step_scheduler(teacher.scheduler, config.solver_steps),
            conditioner=teacher.conditioner,
        )
        super().__init__(student, bank, replace(sampling, null_probability=0.0), device)
        self.teacher, self.distill = teacher, config

    def loss(self, batch_size: int, generator: torch.Generator) -> Tensor:
        """Pseudo-Huber distance of the estimates at both ends of one solver step, heavier inside the mask."""
        drawn = self.draw(batch_size, generator)
        stride = len(self.alphas_cumprod) // self.distill.solver_steps
        step = torch.randint(1, self.distill.solver_steps + 1, (batch_size,), generator=generator)
        late = (step * stride - 1).to(self.device)
        early = late - stride  # -1 is the clean latent
        noise = torch.randn(drawn.latents.shape, generator=generator).to(self.device)
        alpha = self._alpha(late)
        noisy = alpha.sqrt() * drawn.latents + (1 - alpha).sqrt() * noise
        condition = self.condition(drawn.picks, drawn.rng)
        known = torch.cat([drawn.cells, drawn.masked_latents], 1)

        def velocity(unet: nn.Module, latents: Tensor, timesteps: Tensor, told: Any) -> Tensor:
            return unet(
                torch.cat([latents, known], 1),
                timesteps.clamp(min=0),
                encoder_hidden_states=told.tokens,
                encoder_attention_mask=told.token_mask,
                class_labels=told.pooled,
            ).sample.float()

        def estimate(latents: Tensor, timesteps: Tensor) -> Tensor:
            """The consistency function; the identity at the clean latent."""
            alpha, scaled = self._alpha(timesteps), (10.0 * timesteps.clamp(min=0)).view(-1, 1, 1, 1)
            clean = alpha.sqrt() * latents - (1 - alpha).sqrt() * velocity(
                self.module["unet"], latents, timesteps, condition
            )
            spread = scaled.square() + BOUNDARY**2
            found = BOUNDARY**2 / spread * latents + scaled / spread.sqrt() * clean
            return torch.where((timesteps < 0).view(-1, 1, 1, 1), latents, found)

        with torch.no_grad():
            null = self.module["conditioner"].null(batch_size, condition.tokens.shape[1])
            plain, told = (velocity(self.teacher.unet, noisy, late, part) for part in (null, condition))
            guided = plain + self.distill.guidance * (told - plain)
            clean = alpha.sqrt() * noisy - (1 - alpha).sqrt() * guided
            direction = alpha.sqrt() * guided + (1 - alpha).sqrt() * noisy
            before = self._alpha(early)
            target = estimate(before.sqrt() * clean + (1 - before).sqrt() * direction, early)
        width = self.distill.huber
        error = ((estimate(noisy, late) - target).square() + width**2).sqrt() - width
        weight = 1 + self.config.roi_weight * drawn.cells
        return ((error * weight).sum((1, 2, 3)) / (weight.sum((1, 2, 3)) * error.shape[1])).mean()

    def sample_sheet(self, path: Path) -> None:
        """Six pairs of the bank: masked image, the student at `SHEET_STEPS` steps, original decoded."""
        self.write_sheet(path, num_inference_steps=SHEET_STEPS, guidance_scale=1.0)

    def export(self, folder: Path) -> None:
        """Writes the teacher with the student's change of its weights as component `few_step` to ``pipeline/``."""
        change = low_rank_change(self.module["unet"], self.distill)
        pipe = GBCIPipeline(**(self.teacher.components | {"few_step": change}))
        replace_folder(folder / "pipeline", pipe.save_pretrained)

    def _alpha(self, timesteps: Tensor) -> Tensor:
        """Cumulative alpha [B, 1, 1, 1]; 1 at the clean latent, timestep -1."""
        alpha = self.alphas_cumprod[timesteps.clamp(min=0)]
        return torch.where(timesteps < 0, torch.ones_like(alpha), alpha).view(-1, 1, 1, 1)


def distill_preset(name: str) -> tuple[LDMConfig, DistillConfig, LoopConfig]:
    """`tiny` trains in seconds on a CPU (for tests); `base` is for the shipped shape."""
    if name == "tiny":
        loop = LoopConfig(steps=40, batch_size=4, learning_rate=1e-3, warmup=10, ema_decay=0.9, precision="fp32")
        return LDMConfig(variants=1), DistillConfig(rank=4), loop
    return LDMConfig(), DistillConfig(), LoopConfig(steps=6000, batch_size=16, learning_rate=2e-4, ema_decay=0.995)


def train_distill(
    roots: Sequence[Path],
    output: Path,
    *,
    teacher: Path,
    preset: str,
    overrides: Mapping[str, Any],
    resume: bool,
    guidance: float | None = None,
    solver_steps: int | None = None,
    rank: int | None = None,
    variants: int | None = None,
    latent_crop: int | None = None,
    device: str = "auto",
) -> None:
    """Distills the pipeline in `teacher` on the training split of `roots`.

    ``output/pipeline`` is the teacher with the student as its component `few_step`.

    Args:
        teacher: a pipeline folder with v-prediction.
        guidance, solver_steps, rank, variants, latent_crop: override the preset's.
    """
    sampling, config, loop = distill_preset(preset)
    loop = replace(loop, **overrides)
    sampling = replace(sampling, **_given(variants=variants, latent_crop=latent_crop))
    config = replace(config, **_given(guidance=guidance, solver_steps=solver_steps, rank=rank))
    place = rank_device(device)
    settings = {f"model.{name}": value for name, value in (asdict(sampling) | asdict(config)).items()}
    inputs = {"preset": preset, **settings, "data": digest_roots(roots), "teacher": hash_weights(teacher)[:16]}
    check_output(output, resume, loop, inputs)
    pipe = load_pipeline(teacher)
    if pipe.scheduler.config.prediction_type != "v_prediction":
        raise GBCIError(f"{teacher} predicts {pipe.scheduler.config.prediction_type}; expected v_prediction")
    side = pipe.unet.config.sample_size
    if sampling.latent_crop > side:
        raise GBCIError(f"latent_crop is {sampling.latent_crop}; expected at most the latent's side, {side}")
    pipe.to(place)
    images = load_images(roots, "training", side * pipe.vae_scale_factor)
    bank = build_bank(pipe, images, sampling.variants, loop.seed, loop.precision)
    torch.manual_seed(loop.seed)
    train(DistillTask(pipe, bank, sampling, config, place), loop, output, resume=resume, device=place, inputs=inputs)


def _given(**options: Any) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}
