"""Paired fidelity: erase a real lesion, paint it again from its description, compare with what was there.

Every image of the split with a finding is taken as a whole-breast field of view, as in training. The mask is the union
of its lesions' pixels, grown by `MASK_GROWTH`. The model is compared with a ceiling and with two fillings without
information, because most of an inpainted image is a copy.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gbci_fast.attributes import FINDING_CATEGORIES, Attributes
from gbci_fast.data.fields import VisibleLesion, read_fields
from gbci_fast.data.vindr import ImageRecord
from gbci_fast.errors import GBCIError
from gbci_fast.evaluate.case import MASK_GROWTH, Case, image_seed, mask_around, root_names, spread
from gbci_fast.evaluate.lesions import OnProgress, find_records, part_of
from gbci_fast.evaluate.metrics import (
    DATA_RANGE,
    LEVEL,
    PSNR_LIMIT,
    RESAMPLES,
    RING,
    ROI_GROWTH,
    SSIM_WINDOW,
    fidelity,
    grow,
    patient_summary,
)
from gbci_fast.evaluate.painting import sampler_arguments
from gbci_fast.evaluate.report import target, versions
from gbci_fast.evaluate.settings import PairedSettings
from gbci_fast.jobs.files import hash_weights
from gbci_fast.model.checkpoint import load_pipeline
from gbci_fast.model.pipeline import GBCIPipeline

MASK_GRAY = 0.5  # what the model sees under the mask, in [0, 1]
NUM_EXAMPLES = 4  # rows of the figure

CONDITIONS = {
    "pipeline": "the pipeline: known-region blend after every step, composite into the input",
    "source_setting": "masked-image channels, pure noise over the whole latent, no known-region blend, no composite",
    "vae": "the autoencoder alone, decode(encode(original)): the ceiling of a model in its latent space",
    "copy_input": f"the model's input handed back: gray {MASK_GRAY} under the mask",
    "ring_mean": f"under the mask the mean of the breast {RING[0]} to {RING[1]} pixels around it",
}
REGIONS = {
    "image": "the whole image, padding included",
    "breast": "the breast mask",
    "roi": f"the mask (lesions grown by {MASK_GROWTH} pixels) grown by {ROI_GROWTH} more",
}
METRICS = {
    "ssim": {
        "function": "skimage.metrics.structural_similarity",
        "data_range": DATA_RANGE,
        "window": "Gaussian, 11 x 11 pixels",
        **SSIM_WINDOW,
        "average": "the full map over the region's pixels, image border included",
    },
    "psnr": {
        "function": "skimage.metrics.peak_signal_noise_ratio",
        "data_range": DATA_RANGE,
        "average": "squared error over the region's pixels",
        "limit": PSNR_LIMIT,
    },
}
TARGETS = (
    ("vae", "breast", "ssim", 0.97),
    ("vae", "breast", "psnr", 36.0),
    ("vae", "roi", "psnr", 34.0),
)
"""(condition, region, metric, lowest mean that a checkpoint should reach), of the autoencoder alone.

The whole image has none: most of it is copied, and a ring mean under the mask meets any target there. Nor has the
painted lesion, which is another one than the real one, as intended."""
SOURCE_REPORTED = {"ssim": 0.84, "psnr": 22.5}
"""What the source paper reports for its model on its own data; compare with `source_setting`."""

Images = dict[str, np.ndarray]
"""Condition to float32 [S, S] in [0, 1]."""


@dataclass(frozen=True, kw_only=True, eq=False)
class ImageCase(Case):
    """One image to repaint: mask and description are those of all of its lesions."""

    study_id: str

    @property
    def regions(self) -> dict[str, np.ndarray]:
        """Every name of `REGIONS` to bool [S, S]."""
        return {"image": np.ones_like(self.mask), "breast": self.breast, "roi": grow(self.mask, ROI_GROWTH)}


def evaluate_paired(
    roots: Sequence[Path],
    weights: Path,
    settings: PairedSettings,
    *,
    device: torch.device | str = "cpu",
    on_progress: OnProgress = lambda stage, done, total: None,
) -> tuple[dict[str, Any], list[tuple[ImageCase, Images]]]:
    """Measures the pipeline in `weights` on the images with findings under the VinDr-layout `roots`.

    Returns:
        The report, ready for JSON, and `NUM_EXAMPLES` cases (spread evenly) with their images for a figure.

    Raises:
        GBCIError: no pipeline in `weights`, no image with a finding, or an image that cannot be read. All images are
            read before sampling.
    """
    pipe = load_pipeline(weights, device=device)
    cases, skipped = load_cases(roots, settings, pipe.unet.config.sample_size * pipe.vae_scale_factor, on_progress)
    shown = {i * len(cases) // NUM_EXAMPLES for i in range(NUM_EXAMPLES)}
    rows, examples = [], []
    for index, (case, images) in enumerate(repaint(pipe, cases, settings, on_progress)):
        rows.append(_row(case, images))
        if index in shown:
            examples.append((case, images))
    names = list(dict.fromkeys(row["root"] for row in rows))
    everything = summarize(rows, settings.seed)
    sampler = {
        "weights_sha256": hash_weights(weights),
        "scheduler": type(pipe.scheduler).__name__,
        "image_size": len(cases[0].mask),
        "device": pipe.device.type,
        "dtype": str(pipe.dtype).removeprefix("torch."),
    }
    report = {
        "evaluation": "paired",
        "settings": asdict(settings) | sampler,
        "versions": versions(),
        "conditions": CONDITIONS,
        "regions": REGIONS,
        "metrics": METRICS,
        "interval": f"{LEVEL:.0%} percentile bootstrap of the mean, {RESAMPLES} resamples of patients",
        "source_reported": SOURCE_REPORTED,
        "targets": _targets(everything["scores"]),
        "all": everything,
        "roots": {name: summarize([row for row in rows if row["root"] == name], settings.seed) for name in names},
        "skipped": skipped,
        "images": rows,
    }
    return report, examples


def load_cases(
    roots: Sequence[Path], settings: PairedSettings, size: int, on_progress: OnProgress
) -> tuple[list[ImageCase], list[str]]:
    """Reads the chosen images; also returns the ids of those whose lesion leaves nothing to paint or to know.

    Raises:
        GBCIError: no image with a finding in that split, or an image that cannot be read.
    """
    names = root_names(roots)
    records = spread(find_records(roots, **part_of(settings.split)), settings.limit)
    cases, skipped = [], []
    for done, (root, record) in enumerate(records, start=1):
        case = read_case(record, root, names[root], settings.seed, size)
        if case is None:
            skipped.append(record.image_id)
        else:
            cases.append(case)
        on_progress("reading", done, len(records))
    if not cases:
        listed = ", ".join(map(str, roots))
        raise GBCIError(f"no lesion lies inside the breast in any image of {listed}, split {settings.split}")
    return cases, skipped


def read_case(record: ImageRecord, root: Path, name: str, seed: int, size: int) -> ImageCase | None:
    """The whole-breast field of view of one record; None where it shows no lesion, or nothing but lesion."""
    view = read_fields(record, root, size, ("whole",)).fields[0].field
    lesion = view.any_lesion
    if not lesion.any():
        return None
    mask = mask_around(lesion, view.breast)
    if mask.all():
        return None
    attributes, report = describe(view.lesions)
    return ImageCase(
        root=name,
        study_id=record.study_id,
        image_id=record.image_id,
        patient=record.patient,
        seed=image_seed(seed, record.study_id, record.image_id),
        image=view.image,
        breast=view.breast,
        mask=mask,
        attributes=attributes,
        report=report,
    )


def describe(lesions: Sequence[VisibleLesion]) -> tuple[Attributes, str | None]:
    """One description of several lesions: that of the largest, with all categories and reports, the highest BI-RADS."""
    largest = max(lesions, key=lambda lesion: lesion.pixels.sum())
    present = {name for lesion in lesions for name in lesion.attributes.finding_categories or ()}
    grades = [lesion.attributes.finding_birads for lesion in lesions if lesion.attributes.finding_birads is not None]
    attributes = replace(
        largest.attributes,
        finding_categories=tuple(name for name in FINDING_CATEGORIES if name in present) or None,
        finding_birads=max(grades, default=None),
    )
    return attributes, "; ".join(dict.fromkeys(lesion.report for lesion in lesions if lesion.report)) or None


def repaint(
    pipe: GBCIPipeline, cases: Sequence[ImageCase], settings: PairedSettings, on_progress: OnProgress
) -> Iterator[tuple[ImageCase, Images]]:
    """Yields every case with its image under each of `CONDITIONS`."""
    steps_done = 0

    def on_step(pipe: GBCIPipeline, *_: Any) -> None:
        nonlocal steps_done
        steps_done += len(batch)
        on_progress("sampling", steps_done / (2 * pipe.num_timesteps), len(cases))

    for start in range(0, len(cases), settings.batch_size):
        batch = cases[start : start + settings.batch_size]
        columns = _repaint_batch(pipe, batch, settings, on_step)
        for i, case in enumerate(batch):
            yield case, {name: images[i, 0].cpu().numpy() for name, images in columns.items()}


@torch.no_grad()
def _repaint_batch(
    pipe: GBCIPipeline, batch: Sequence[ImageCase], settings: PairedSettings, on_step: Callable[..., None]
) -> dict[str, Tensor]:
    """Condition to float32 [B, 1, S, S]."""
    arguments = sampler_arguments(batch, steps=settings.steps, guidance=settings.guidance)
    images, masks = (arguments[name].to(pipe.device) for name in ("image", "mask_image"))
    ring_means = torch.tensor([case.ring_mean for case in batch], device=pipe.device).view(-1, 1, 1, 1)
    sample = partial(
        pipe,
        **arguments,
        strength=1.0,
        output_type="pt",
        callback_on_step_end=on_step,
    )
    return {
        "pipeline": sample().images,
        "source_setting": sample(known_region=False, paste_back=False).images,
        "vae": pipe.decode_latents(pipe.encode_image(images * 2 - 1)),
        "copy_input": images.masked_fill(masks, MASK_GRAY),
        "ring_mean": torch.where(masks, ring_means, images),
    }


def summarize(rows: Sequence[dict[str, Any]], seed: int) -> dict[str, Any]:
    """Numbers of images and patients, and ``scores[condition][region][metric]`` as `patient_summary` gives them."""
    patients = [(row["root"], row["patient"]) for row in rows]
    return {
        "num_images": len(rows),
        "num_patients": len(set(patients)),
        "scores": {
            condition: {
                region: {
                    metric: patient_summary([row["scores"][condition][region][metric] for row in rows], patients, seed)
                    for metric in METRICS
                }
                for region in REGIONS
            }
            for condition in CONDITIONS
        },
    }


def _targets(scores: dict[str, Any]) -> list[dict[str, Any]]:
    return [
        target(f"{condition}, {region}: {metric}", scores[condition][region][metric]["mean"], bound, at_least=True)
        for condition, region, metric, bound in TARGETS
    ]


def _row(case: ImageCase, images: Images) -> dict[str, Any]:
    regions, pixels = case.regions, case.pixels
    return {
        "root": case.root,
        "study_id": case.study_id,
        "image_id": case.image_id,
        "patient": case.patient,
        "seed": case.seed,
        "finding_categories": list(case.attributes.finding_categories or ()),
        "num_pixels": {"mask": int(case.mask.sum())} | {name: int(region.sum()) for name, region in regions.items()},
        "scores": {name: fidelity(pixels, images[name], regions) for name in CONDITIONS},
    }
