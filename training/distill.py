"""Third stage: a few-step student of a trained pipeline, by progressive distillation with guidance inside.

After Salimans and Ho, "Progressive Distillation for Fast Sampling of Diffusion Models", 2022, and Meng et al., "On
Distillation of Guided Diffusion Models", 2023: a DDIM step of the student is trained to end where several DDIM steps of
the guided teacher end. Unlike in these papers, the number of steps is reduced in one stage, and the student's steps
start from states on the teacher's trajectories, not from noised images. The student is the teacher's UNet plus a
low-rank change of every convolution and linear layer (Hu et al., "LoRA", 2021).
"""

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn
from torch.nn.utils import parametrize

from gbci_fast.errors import GBCIError
from gbci_fast.jobs.files import hash_weights, replace_folder
from gbci_fast.model.checkpoint import load_pipeline
from gbci_fast.model.conditioning import Conditioning
from gbci_fast.model.few_step import FewStepLoRA, few_step_scheduler
from gbci_fast.model.masks import feather_latent_mask
from gbci_fast.model.noise import seeded_normal
from gbci_fast.model.pipeline import LATENT_FEATHER, GBCIPipeline
from gbci_fast.training.bank import LatentBank, build_bank, kept_bank
from gbci_fast.training.data import load_images
from gbci_fast.training.ldm import LDMTask, condition, cut, drop, random_window
from gbci_fast.training.loop import check_output, train
from gbci_fast.training.progress import counting
from gbci_fast.training.ranks import rank_device
from gbci_fast.training.settings import DistillConfig, LDMConfig, LoopConfig
from gbci_fast.training.stages import data_of


class LowRank(nn.Module):
    """Parametrization of a weight: adds ``up @ down``. `up` is initialized to zero, so that the weight is unchanged."""

    def __init__(self, weight: Tensor, rank: int):
        super().__init__()
        rows, columns = weight.shape[0], weight[0].numel()
        rank = min(rank, rows, columns)
        self.down = nn.Parameter(torch.randn(rank, columns) / columns**0.5)
        self.up = nn.Parameter(torch.zeros(rows, rank))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + (self.up @ self.down).view_as(weight)


def with_low_rank(unet: UNet2DConditionModel, rank: int) -> UNet2DConditionModel:
    """A copy with frozen weights, whose convolutions and linear layers learn a change of rank `rank`."""
    student = copy.deepcopy(unet).requires_grad_(False)
    for layer in [part for part in student.modules() if isinstance(part, nn.Conv2d | nn.Linear)]:
        parametrize.register_parametrization(layer, "weight", LowRank(layer.weight, rank))
    return student


def low_rank_change(student: nn.Module, config: DistillConfig) -> FewStepLoRA:
    """The learned change of a student of `with_low_rank`, in float16."""
    tensors = {}
    for name, layer in student.named_modules():
        if parametrize.is_parametrized(layer):
            change = layer.parametrizations.weight[0]
            tensors |= {f"{name}.{part}": getattr(change, part).detach().cpu() for part in ("up", "down")}
    return FewStepLoRA.of(tensors, guidance_scale=config.guidance, steps=config.student_steps).half()


@torch.no_grad()
def paint_trajectories(
    teacher: GBCIPipeline, bank: LatentBank, config: DistillConfig, seed: int, batch_size: int = 16
) -> LatentBank:
    """Adds the guided teacher's trajectories to a bank: latents at the student's timesteps, then clean latents.

    A window of every pair is painted. The initial noise of row i is that of the pipeline with seed ``seed + i``.

    Args:
        teacher: the pipeline to distill.
        bank: the pairs.
        config: steps, guidance and window.
        seed: of noise and windows.
        batch_size: pairs painted together.
    """
    scheduler = few_step_scheduler(teacher.scheduler)
    scheduler.set_timesteps(config.solver_steps)
    stride, device = config.solver_steps // config.student_steps, teacher.unet.device
    batches = np.array_split(np.arange(len(bank)), math.ceil(len(bank) / batch_size))
    windows = [
        random_window(cells, config.latent_crop, np.random.default_rng((seed, i))) for i, cells in enumerate(bank.cells)
    ]
    painted = []
    with counting("painting trajectories", len(batches)) as advance:
        for rows in batches:
            noise = seeded_normal([seed + int(row) for row in rows], bank.latents.shape[1:])
            noise, image, masked, cells = (
                cut(part, [windows[row] for row in rows]).to(device)
                for part in (noise, bank.latents[rows], bank.masked_latents[rows], bank.cells[rows])
            )
            told = conditions(teacher, bank, rows)
            null = teacher.conditioner.null(*told.tokens.shape[:2])
            known, weight = torch.cat([cells, masked], 1), feather_latent_mask(cells, LATENT_FEATHER)
            latents, states = noise, [noise]
            for i, t in enumerate(scheduler.timesteps):
                plain, conditional = (velocity(teacher.unet, latents, known, t, part) for part in (null, told))
                latents = scheduler.step(plain + config.guidance * (conditional - plain), t, latents).prev_sample
                last = i + 1 == config.solver_steps
                around = image if last else scheduler.add_noise(image, noise, scheduler.timesteps[i + 1])
                latents = torch.lerp(around, latents, weight)
                if (i + 1) % stride == 0:
                    states.append(latents)
            painted.append(torch.stack(states, 1).cpu())
            advance()
    corners = torch.tensor([(y.start, x.start) for y, x in windows])
    return replace(bank, states=torch.cat(painted), corners=corners)


def conditions(teacher: GBCIPipeline, bank: LatentBank, picks: np.ndarray) -> Conditioning:
    """The teacher's condition for the rows `picks` of a bank."""
    attributes, reports = ([column[row] for row in picks] for column in (bank.attributes, bank.reports))
    return condition(teacher.conditioner, bank, picks, attributes, reports)


def velocity(unet: nn.Module, latents: Tensor, known: Tensor, timesteps: Tensor, told: Conditioning) -> Tensor:
    """A UNet's v-prediction, float32 [B, 4, h, w]; `known` [B, 5, h, w] holds the mask and the masked latents."""
    return unet(
        torch.cat([latents, known], 1),
        timesteps,
        encoder_hidden_states=told.tokens,
        encoder_attention_mask=told.token_mask,
        class_labels=told.pooled,
    ).sample.float()


class DistillTask(LDMTask):
    """Trains the student's steps to match those in a bank of `paint_trajectories`."""

    def __init__(
        self, teacher: GBCIPipeline, bank: LatentBank, sampling: LDMConfig, config: DistillConfig, device: torch.device
    ):
        teacher.unet.requires_grad_(False).eval()
        teacher.conditioner.requires_grad_(False)
        student = GBCIPipeline(
            vae=teacher.vae,
            unet=with_low_rank(teacher.unet, config.rank).to(device),
            scheduler=few_step_scheduler(teacher.scheduler),
            conditioner=teacher.conditioner,
        )
        super().__init__(student, bank, sampling, device)
        self.teacher, self.distill = teacher, config
        student.scheduler.set_timesteps(config.student_steps)
        self.timesteps = student.scheduler.timesteps.to(device)
        self.alphas = torch.cat([self.alphas_cumprod[self.timesteps], self.alphas_cumprod.new_ones(1)])

    def window(self, index: int, side: int, rng: np.random.Generator) -> tuple[slice, slice]:
        """The window of a row that the teacher painted."""
        y, x = self.bank.corners[index].tolist()
        size = self.bank.states.shape[-1]
        return slice(y, y + size), slice(x, x + size)

    def loss(self, batch_size: int, generator: torch.Generator) -> Tensor:
        """Pseudo-Huber distance between the student's clean latents and the target, with a larger weight in the mask.

        The target is the estimate of clean latents with which a single DDIM step leads from one of the teacher's states
        to the next.
        """
        drawn = self.draw(batch_size, generator)
        leap = torch.randint(self.distill.student_steps, (batch_size,), generator=generator)
        before, after = (self.bank.states[drawn.picks, leap + i].to(self.device) for i in (0, 1))
        alpha, next_alpha = (self.alphas[leap.to(self.device) + i].view(-1, 1, 1, 1) for i in (0, 1))
        shrink = ((1 - next_alpha) / (1 - alpha)).sqrt()
        target = (after - shrink * before) / (next_alpha.sqrt() - shrink * alpha.sqrt())
        known, timesteps = torch.cat([drawn.cells, drawn.masked_latents], 1), self.timesteps[leap]
        told = conditions(self.teacher, self.bank, drawn.picks)
        predicted = velocity(self.module["unet"], before, known, timesteps, told)
        clean = alpha.sqrt() * before - (1 - alpha).sqrt() * predicted
        width = self.distill.huber
        error = ((clean - target).square() + width**2).sqrt() - width
        weight = 1 + self.config.roi_weight * drawn.cells
        return ((error * weight).sum((1, 2, 3)) / (weight.sum((1, 2, 3)) * error.shape[1])).mean()

    def sample_sheet(self, path: Path) -> None:
        """Writes a PNG of six pairs of the bank: masked image, the student's synthesis, decoded original."""
        self.write_sheet(path, num_inference_steps=self.distill.student_steps, guidance_scale=1.0)

    def export(self, folder: Path) -> None:
        """Writes ``pipeline/``: the teacher, with the student's change of its weights as the component `few_step`."""
        change = low_rank_change(self.module["unet"], self.distill)
        parts: dict[str, Any] = self.teacher.components | {"few_step": change}
        pipe = GBCIPipeline(**parts)
        replace_folder(folder / "pipeline", pipe.save_pretrained)


def distill_preset(name: str) -> tuple[LDMConfig, DistillConfig, LoopConfig]:
    """`tiny` trains in seconds on a CPU (for tests); `base` is for the shipped shape."""
    if name == "tiny":
        loop = LoopConfig(steps=40, batch_size=4, learning_rate=1e-3, warmup=10, ema_decay=0.9, precision="fp32")
        return LDMConfig(), DistillConfig(rank=4, trajectories=16, solver_steps=8), loop
    return LDMConfig(), DistillConfig(), LoopConfig(steps=6000, batch_size=16, learning_rate=2e-4, ema_decay=0.995)


def train_distill(
    roots: Sequence[Path],
    output: Path,
    *,
    teacher: Path,
    preset: str,
    overrides: Mapping[str, Any],
    resume: bool,
    device: str = "auto",
    **changes: Any,
) -> None:
    """Distills the pipeline in `teacher` on the training split of `roots`.

    ``output/pipeline`` is the teacher with the student as its component `few_step`.

    Args:
        roots: VinDr-layout folders or caches.
        output: folder of the run.
        teacher: a pipeline folder with v-prediction.
        preset: see `distill_preset`.
        overrides: fields of `LoopConfig` to replace.
        resume: continue the run in `output`.
        device: see `rank_device`.
        changes: fields of the preset's `DistillConfig` to replace.

    Raises:
        GBCIError: a setting out of range, a teacher without v-prediction, or an error of `train`.
    """
    sampling, config, loop = distill_preset(preset)
    config, loop = replace(config, **changes), replace(loop, **overrides)
    place = rank_device(device)
    settings = {f"model.{name}": value for name, value in (asdict(sampling) | asdict(config)).items()}
    inputs = {"preset": preset, **settings, **data_of(roots), "teacher": hash_weights(teacher)[:16]}
    check_output(output, resume, loop, inputs)
    pipe = load_pipeline(teacher)
    if pipe.scheduler.config.prediction_type != "v_prediction":
        raise GBCIError(f"{teacher} predicts {pipe.scheduler.config.prediction_type}; expected v_prediction")
    side = pipe.unet.config.sample_size
    if config.latent_crop > side:
        raise GBCIError(f"latent_crop is {config.latent_crop}; expected at most the latent's side, {side}")
    pipe.to(place)

    def paint() -> LatentBank:
        images = load_images(roots, side * pipe.vae_scale_factor)
        variants = math.ceil(config.trajectories / len(images))
        bank = build_bank(pipe, images, variants, loop.seed, loop.precision, limit=config.trajectories)
        told = drop(bank, np.arange(len(bank)), sampling, np.random.default_rng(loop.seed))
        bank = replace(bank, attributes=told[0], reports=told[1])
        return paint_trajectories(pipe, bank, config, loop.seed)

    decides = ("guidance", "student_steps", "solver_steps", "trajectories", "latent_crop")
    decides += ("attribute_dropout", "report_dropout")
    origin = {name: inputs[name] for name in ("data", "folds", "teacher", *(f"model.{name}" for name in decides))}
    bank = kept_bank(output, origin | {"seed": loop.seed, "precision": loop.precision}, paint)
    torch.manual_seed(loop.seed)
    train(DistillTask(pipe, bank, sampling, config, place), loop, output, resume=resume, device=place, inputs=inputs)
