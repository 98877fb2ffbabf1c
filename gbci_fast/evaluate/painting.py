"""Lesions painted again by the model for an evaluation, and the trivial fillings that stand beside it in every table.

The trivial fillings are `reconstruct` (the autoencoder alone), `blurred_fill` (the real lesion without its fine
detail), `blob_fill` (a smooth blob instead of a lesion) and `ring_mean_fill` (no lesion). A figure that one of them
reaches, too, says nothing about what that filling lacks.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import ndimage
from scipy.sparse import coo_array, diags_array
from scipy.sparse.linalg import spsolve
from torch import Tensor

from gbci_fast.attributes import Attributes
from gbci_fast.data.fields import to_unit
from gbci_fast.errors import GBCIError
from gbci_fast.evaluate.case import Case
from gbci_fast.evaluate.lesions import LesionCase, OnProgress
from gbci_fast.evaluate.settings import PaintSettings
from gbci_fast.jobs.files import atomically_open
from gbci_fast.jobs.folder import JobFolder, Kept
from gbci_fast.model.masks import composite
from gbci_fast.model.pipeline import PIXEL_FEATHER, GBCIPipeline

BLUR = 1.0  # standard deviation in model pixels of the blur that takes a lesion's fine detail
BLOB_HEIGHT = 0.10  # of the gray scale: real lesions on film are about 0.1 brighter than their surroundings
BLOB_BLUR = 3.0  # standard deviation in model pixels of a blob's edge
GRAIN_SCALE = 4.0  # standard deviation in model pixels of what is left out of copied texture
GRAIN_DIRECTIONS, GRAIN_REACH = 16, 5  # where texture is looked for: directions, and distances in mask radii


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


def trivial_fills(pipe: GBCIPipeline, cases: Sequence[LesionCase], batch_size: int) -> dict[str, list[np.ndarray]]:
    """{name: every case with a trivial filling under its mask}, for masks over real lesions."""
    return {
        "autoencoder": reconstruct(pipe, cases, batch_size),
        "blurred": blurred_fill(cases),
        "blob": blob_fill(cases),
        "ring_mean": ring_mean_fill(cases),
    }


def ring_mean_fill(cases: Sequence[LesionCase]) -> list[np.ndarray]:
    """Every case with the mean of its surroundings under the mask: a filling without information on the lesion."""
    return [np.where(case.mask, np.float32(case.ring_mean), case.pixels) for case in cases]


def blurred_fill(cases: Sequence[LesionCase]) -> list[np.ndarray]:
    """Every case with its own pixels under the mask, blurred by `BLUR`: the real lesion without its fine detail."""
    return [np.where(case.mask, ndimage.gaussian_filter(case.pixels, BLUR), case.pixels) for case in cases]


def blob_on_tissue(cases: Sequence[LesionCase]) -> list[np.ndarray]:
    """Every case with its mask, blurred and `BLOB_HEIGHT` bright, added to the tissue, also beyond the edge.

    For masks that lie in normal tissue. `blob_fill` is for masks over a real lesion.
    """
    return [np.clip(case.pixels + _blob(case), 0, 1) for case in cases]


def blob_fill(cases: Sequence[LesionCase]) -> list[np.ndarray]:
    """Every case with invented background and a blob (see `blob_on_tissue`) under the mask, instead of the lesion.

    The background continues the mask's surroundings smoothly, with the fine texture of a place nearby.
    """
    images = []
    for case in cases:
        tissue = np.where(case.mask, _background(case) + _grain(case), case.pixels)
        images.append(np.clip(tissue + _blob(case), 0, 1).astype(np.float32))
    return images


def _blob(case: LesionCase) -> np.ndarray:
    """float32 [S, S]."""
    return BLOB_HEIGHT * ndimage.gaussian_filter(case.mask.astype(np.float32), BLOB_BLUR)


def _background(case: LesionCase) -> np.ndarray:
    """The image, continued into the mask as a harmonic function: float64 [S, S]."""
    filled = case.pixels.astype(np.float64)
    rows, columns = np.nonzero(case.mask)
    number = np.full(case.mask.shape, -1)
    number[rows, columns] = np.arange(len(rows))
    # Laplace's equation on the masked pixels: each is the mean of its neighbors in the image.
    degree, right = np.zeros(len(rows)), np.zeros(len(rows))
    pairs = []
    for dy, dx in ((0, 1), (0, -1), (1, 0), (-1, 0)):
        y, x = rows + dy, columns + dx
        here = np.flatnonzero((y >= 0) & (y < len(number)) & (x >= 0) & (x < len(number)))
        y, x = y[here], x[here]
        inner = number[y, x] >= 0
        degree[here] += 1
        right[here[~inner]] += filled[y, x][~inner]
        pairs.append((here[inner], number[y, x][inner]))
    here, there = (np.concatenate(part) for part in zip(*pairs, strict=True))
    links = coo_array((np.ones(len(here)), (here, there)), shape=(len(rows), len(rows)))
    matrix = diags_array(degree) - links
    filled[rows, columns] = spsolve(matrix.tocsc(), right)
    return filled


def _grain(case: LesionCase) -> np.ndarray:
    """Fine texture for the masked pixels, float32 [S, S], from the nearest place in the breast that the mask leaves.

    It fades out toward the mask's edge. It is zero if the breast has no such place.
    """
    pixels = case.pixels
    fine = pixels - ndimage.gaussian_filter(pixels, GRAIN_SCALE)
    rows, columns = np.nonzero(case.mask)
    radius = float(np.sqrt(len(rows) / np.pi)) + GRAIN_SCALE
    normal = case.breast & ~case.mask
    out = np.zeros_like(pixels)
    for distance in radius * np.arange(2, GRAIN_REACH + 1, 0.5):
        for angle in 2 * np.pi * np.arange(GRAIN_DIRECTIONS) / GRAIN_DIRECTIONS:
            there = rows + round(distance * np.sin(angle)), columns + round(distance * np.cos(angle))
            inside = all(axis.min() >= 0 and axis.max() < len(pixels) for axis in there)
            if inside and normal[there].all():
                depth = ndimage.distance_transform_edt(case.mask)[rows, columns]
                out[rows, columns] = fine[there] * np.minimum(depth / GRAIN_SCALE, 1)
                return out
    return out


@torch.no_grad()
def reconstruct(pipe: GBCIPipeline, cases: Sequence[LesionCase], batch_size: int) -> list[np.ndarray]:
    """Every case with the autoencoder's reconstruction under the mask, float32 [S, S] each.

    This is the ceiling of a model in the autoencoder's latent space. It is pasted as the pipeline pastes a painting, so
    that the two differ in nothing but the lesion.
    """
    images: list[np.ndarray] = []
    for start in range(0, len(cases), batch_size):
        originals, masks = images_and_masks(cases[start : start + batch_size])
        x = originals.to(pipe.device) * 2 - 1
        decoded = pipe.decode_latents(pipe.encode_image(x.to(pipe.vae.dtype))).float().cpu()
        images += list(composite(originals, decoded, masks, PIXEL_FEATHER)[:, 0].numpy())
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
