"""Paired fidelity: erase a real lesion, paint it again from its description, compare with what was there.

Every image of the split with a finding is taken as a whole-breast field of view, as in training. The mask is the union
of its lesions' pixels, grown by `MASK_GROWTH`. The model is compared with a ceiling and with two fillings without
information, because most of an inpainted image is a copy.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gbci_fast.attributes import FINDING_CATEGORIES, Attributes
from gbci_fast.choices import GUIDANCE_SCALE
from gbci_fast.data.fields import Lesion, read_fields, to_unit
from gbci_fast.data.vindr import ImageRecord, VinDr
from gbci_fast.errors import GBCIError
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
    ring_mean,
)
from gbci_fast.evaluate.report import target, versions
from gbci_fast.jobs.files import hash_weights, real_path
from gbci_fast.model.checkpoint import load_pipeline
from gbci_fast.model.pipeline import GBCIPipeline

MASK_GROWTH = 3  # pixels around the lesion; training masks are grown by 1 to 5
AIR_MARGIN = 2  # pixels of air that a mask may cover, as in training
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
    ("source_setting", "image", "ssim", 0.93),
    ("source_setting", "image", "psnr", 30.0),
)
"""(condition, region, metric, lowest mean that a checkpoint should reach)."""
SOURCE_REPORTED = {"ssim": 0.84, "psnr": 22.5}
"""What the source paper reports for its model on its own data; compare with `source_setting`."""

OnProgress = Callable[[str, float, int], None]
"""Called as ``f(stage, done, total)``, in images."""
Images = dict[str, np.ndarray]
"""Condition to float32 [S, S] in [0, 1]."""


@dataclass(frozen=True, kw_only=True)
class PairedSettings:
    """What is evaluated and how it is sampled; `limit` takes that many images, spread evenly over all."""

    split: str = "test"
    steps: int = 20
    guidance: float = GUIDANCE_SCALE
    seed: int = 0
    batch_size: int = 8
    limit: int | None = None

    def __post_init__(self):
        for name in ("steps", "batch_size", "limit"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise GBCIError(f"{name} is {value}; expected at least 1")
        if self.seed < 0:
            raise GBCIError(f"seed is {self.seed}; expected at least 0")


@dataclass(frozen=True, kw_only=True, eq=False)
class Case:
    """One image to repaint.

    Attributes:
        root: name of the data set.
        seed: of the sampler's noise, a function of the run's seed and the image's ids alone.
        image: uint16 [S, S], 65535 = 1.0.
        breast, mask: bool [S, S].
        attributes, report: the description of all lesions under the mask.
    """

    root: str
    study_id: str
    image_id: str
    patient: str
    seed: int
    image: np.ndarray
    breast: np.ndarray
    mask: np.ndarray
    attributes: Attributes
    report: str | None

    @property
    def pixels(self) -> np.ndarray:
        """float32 [S, S] in [0, 1]."""
        return to_unit(self.image).numpy()

    @property
    def regions(self) -> dict[str, np.ndarray]:
        """Every name of `REGIONS` to bool [S, S]."""
        return {"image": np.ones_like(self.mask), "breast": self.breast, "roi": grow(self.mask, ROI_GROWTH)}

    @property
    def ring_mean(self) -> float:
        """The mean of the mask's surroundings in the breast."""
        return ring_mean(self.pixels, self.mask, self.breast)


def evaluate_paired(
    roots: Sequence[Path],
    weights: Path,
    settings: PairedSettings,
    *,
    device: torch.device | str = "cpu",
    on_progress: OnProgress = lambda stage, done, total: None,
) -> tuple[dict[str, Any], list[tuple[Case, Images]]]:
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
) -> tuple[list[Case], list[str]]:
    """Reads the chosen images; also returns the ids of those whose lesion leaves nothing to paint or to know.

    Raises:
        GBCIError: no image with a finding in that split, or an image that cannot be read.
    """
    names = {root: real_path(root).name for root in roots}
    if len(set(names.values())) < len(names):
        names = {root: str(root) for root in names}
    records = [(root, record) for root in names for record in VinDr(root).of_split(settings.split) if record.findings]
    listed = ", ".join(map(str, roots))
    if not records:
        raise GBCIError(f"no {settings.split!r} image with a finding in {listed}; check the columns split and xmin")
    if settings.limit is not None and settings.limit < len(records):
        records = [records[i * len(records) // settings.limit] for i in range(settings.limit)]
    cases, skipped = [], []
    for done, (root, record) in enumerate(records, start=1):
        case = read_case(record, root, names[root], settings.seed, size)
        if case is None:
            skipped.append(record.image_id)
        else:
            cases.append(case)
        on_progress("reading", done, len(records))
    if not cases:
        raise GBCIError(f"no lesion lies inside the breast in any {settings.split!r} image of {listed}")
    return cases, skipped


def read_case(record: ImageRecord, root: Path, name: str, seed: int, size: int) -> Case | None:
    """The whole-breast field of view of one record; None where it shows no lesion, or nothing but lesion."""
    view = read_fields(record, root, size, ("whole",)).fields[0].field
    lesion = view.any_lesion
    if not lesion.any():
        return None
    mask = lesion | (grow(lesion, MASK_GROWTH) & grow(view.breast, AIR_MARGIN))
    if mask.all():
        return None
    attributes, report = describe(view.lesions)
    return Case(
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


def describe(lesions: Sequence[Lesion]) -> tuple[Attributes, str | None]:
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


def image_seed(seed: int, study_id: str, image_id: str) -> int:
    """63 bits of SHA-256, so that neither the batch size nor the choice of images changes an image's noise."""
    return int(hashlib.sha256(f"{seed}\x1f{study_id}\x1f{image_id}".encode()).hexdigest()[:16], 16) >> 1


def repaint(
    pipe: GBCIPipeline, cases: Sequence[Case], settings: PairedSettings, on_progress: OnProgress
) -> Iterator[tuple[Case, Images]]:
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
    pipe: GBCIPipeline, batch: Sequence[Case], settings: PairedSettings, on_step: Callable[..., None]
) -> dict[str, Tensor]:
    """Condition to float32 [B, 1, S, S]."""
    images = torch.stack([to_unit(case.image) for case in batch])[:, None].to(pipe.device)
    masks = torch.from_numpy(np.stack([case.mask for case in batch]))[:, None].to(pipe.device)
    ring_means = torch.tensor([case.ring_mean for case in batch], device=pipe.device).view(-1, 1, 1, 1)
    sample = partial(
        pipe,
        images,
        masks,
        attributes=[case.attributes for case in batch],
        report=[case.report for case in batch],
        strength=1.0,
        num_inference_steps=settings.steps,
        guidance_scale=settings.guidance,
        seed=[case.seed for case in batch],
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


def _row(case: Case, images: Images) -> dict[str, Any]:
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
