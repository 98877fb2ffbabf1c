"""Lesions painted again by the model for an evaluation, and two other fillings to compare with."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gbci_fast.attributes import Attributes
from gbci_fast.data.fields import to_unit
from gbci_fast.errors import GBCIError
from gbci_fast.evaluate.case import Case
from gbci_fast.evaluate.lesions import LesionCase, OnProgress
from gbci_fast.evaluate.settings import PaintSettings
from gbci_fast.jobs.files import atomically_open
from gbci_fast.jobs.folder import JobFolder, Kept
from gbci_fast.model.pipeline import GBCIPipeline


@dataclass(frozen=True, kw_only=True)
class Description:
    """The description of a lesion that the sampler gets."""

    attributes: Attributes
    report: str | None

    @classmethod
    def of(cls, case: LesionCase) -> "Description":
        return cls(attributes=case.attributes, report=case.report)


def images_and_masks(cases: Sequence[Case]) -> tuple[Tensor, Tensor]:
    """float32 [B, 1, S, S] in [0, 1] and bool [B, 1, S, S]."""
    images = torch.stack([to_unit(case.image) for case in cases])[:, None]
    return images, torch.from_numpy(np.stack([case.mask for case in cases]))[:, None]


def sampler_arguments(cases: Sequence[Case], *, steps: int, guidance: float) -> dict[str, Any]:
    """Keywords of a pipeline's call that paints every case after its own description, with its own noise."""
    images, masks = images_and_masks(cases)
    return {
        "image": images,
        "mask_image": masks,
        "attributes": [case.attributes for case in cases],
        "report": [case.report for case in cases],
        "num_inference_steps": steps,
        "guidance_scale": guidance,
        "seed": [case.seed for case in cases],
    }


def paint(
    pipe: GBCIPipeline,
    cases: Sequence[LesionCase],
    settings: PaintSettings,
    *,
    weights: str,
    folder: Path,
    descriptions: Sequence[Description] | None = None,
    stage: str = "painting",
    on_progress: OnProgress = lambda stage, done, total: None,
) -> list[np.ndarray]:
    """Erases and paints the lesion of every case: float32 [S, S] in [0, 1] each; resumable.

    Outside the mask an image is the original. Painted batches are kept in `folder`, under a digest of everything that
    decides their pixels. Batches that are there and undamaged are not painted again.

    Args:
        pipe: the accelerated pipeline (`gbci_fast.accelerate`), or the eager one.
        cases: the lesions.
        settings: of the sampler.
        weights: digest of the pipeline's weights.
        folder: of the kept batches; made if it does not exist.
        descriptions: one per case; None = the cases' own.
        stage: name of the stage for `on_progress`.
        on_progress: called as ``f(stage, done, total)``.

    Raises:
        GBCIError: `folder` holds something else, another run is painting into it, or a painted image is not finite.
    """
    if descriptions is not None:
        described = zip(cases, descriptions, strict=True)
        cases = [replace(case, attributes=told.attributes, report=told.report) for case, told in described]
    images: list[np.ndarray] = []
    job = JobFolder(folder, {"painted": 1})  # version of the format; all that decides the pixels is in the files' names
    with job.claimed(resume=True):
        for start in range(0, len(cases), settings.batch_size):
            batch = cases[start : start + settings.batch_size]
            key = _digest(batch, settings, weights)
            path = folder / f"{key}.npy"
            if key not in job or job.is_damaged(key):
                painted = _paint_batch(pipe, batch, settings)
                atomically_open(path, partial(np.save, arr=painted))
                job.note(key, None, [Kept.of(folder, path)])
            images += list(np.load(path))
            on_progress(stage, len(images), len(cases))
    return images


def ring_mean_fill(cases: Sequence[LesionCase]) -> list[np.ndarray]:
    """Every case with the mean of its surroundings under the mask: a filling without information on the lesion."""
    return [np.where(case.mask, np.float32(case.ring_mean), case.pixels) for case in cases]


@torch.no_grad()
def reconstruct(pipe: GBCIPipeline, cases: Sequence[LesionCase], batch_size: int) -> list[np.ndarray]:
    """Every case with the autoencoder's reconstruction under the mask, float32 [S, S] each.

    This is the ceiling of a model in the autoencoder's latent space.
    """
    images: list[np.ndarray] = []
    for start in range(0, len(cases), batch_size):
        batch = cases[start : start + batch_size]
        x = images_and_masks(batch)[0].to(pipe.device) * 2 - 1
        decoded = pipe.decode_latents(pipe.encode_image(x.to(pipe.vae.dtype))).float().cpu().numpy()[:, 0]
        images += [np.where(case.mask, part, case.pixels) for case, part in zip(batch, decoded, strict=True)]
    return images


def _paint_batch(pipe: GBCIPipeline, batch: Sequence[Case], settings: PaintSettings) -> np.ndarray:
    arguments = sampler_arguments(batch, steps=settings.steps, guidance=settings.guidance)
    images = pipe(**arguments, output_type="pt").images[:, 0]
    painted = images.float().cpu().numpy()
    if not np.isfinite(painted).all():
        raise GBCIError(f"a painted image holds NaN or infinity; guidance {settings.guidance:g} may be too large")
    return painted


def _digest(batch: Sequence[LesionCase], settings: PaintSettings, weights: str) -> str:
    digest = hashlib.sha256(json.dumps([asdict(settings), weights]).encode())
    for case in batch:
        digest.update(json.dumps([case.seed, case.attributes.to_mapping(), case.report]).encode())
        digest.update(case.image.tobytes())
        digest.update(np.packbits(case.mask).tobytes())
    return digest.hexdigest()[:32]
