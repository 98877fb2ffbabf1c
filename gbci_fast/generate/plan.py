"""What will be generated: one `PlanItem` per synthetic image, a pure function of the inputs and the job's settings."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from scipy import ndimage

from gbci_fast.data.attributes import Attributes
from gbci_fast.data.vindr import Box, ImageRecord
from gbci_fast.errors import GBCIError

# Lesion diameters in pixels of the 224-pixel whole-breast view: median and log-spread of the CBIS-DDSM masses, and
# the range that the training masks cover.
MEDIAN_DIAMETER, LOG_SPREAD, DIAMETER_RANGE = 18.0, 0.35, (9.0, 48.0)
DEFAULT_FINDING = {"finding_categories": ("Mass",), "finding_birads": 4}


@dataclass(frozen=True, kw_only=True)
class PlanItem:
    """One synthetic image to make.

    Attributes:
        index: position in the plan; with the job's seed it decides `seed`.
        image_id, study_id: 32 hexadecimal digits; the variants of a study's images share a synthetic study.
        template: the image to paint into.
        variant: 0, 1, ... within the template.
        seed: of the sampler's noise and of an automatic mask, in [0, 2^63).
        box: the annotated box that becomes the mask; None for an automatic mask or a mask file.
        attributes, report: the description of the lesion.
    """

    index: int
    image_id: str
    study_id: str
    template: ImageRecord
    variant: int
    seed: int
    box: Box | None
    attributes: Attributes
    report: str | None


def make_plan(
    records: Sequence[ImageRecord],
    *,
    variants: int,
    seed: int,
    mask: str = "auto",
    overrides: Mapping[str, Any] | None = None,
    report: str | None = None,
) -> list[PlanItem]:
    """Every record `variants` times.

    Args:
        mask: "auto" (sampled inside the breast), "annotations" (a record's boxes in turn; records without are left
            out), or a mask file that holds for every record.
        overrides: attributes that replace what the record or the annotation says.
        report: free text that replaces the annotation's.

    Raises:
        GBCIError: an unknown attribute or value, or no annotated box in any record.
    """
    if variants < 1:
        raise GBCIError(f"variants is {variants}; expected at least 1")
    if mask == "annotations":
        records = [record for record in records if record.findings]
        if not records:
            raise GBCIError("no input has an annotated box; use --mask auto or a mask file")
    given = Attributes.from_mapping(overrides or {}).to_mapping()
    if "finding_categories" in given:
        given["finding_categories"] = tuple(given["finding_categories"])
    items = []
    for record in records:
        for variant in range(variants):
            index = len(items)
            finding = record.findings[variant % len(record.findings)] if mask == "annotations" else None
            described = finding.attributes if finding else replace(record.attributes, **DEFAULT_FINDING)
            items.append(
                PlanItem(
                    index=index,
                    image_id=_digest("image", seed, index, record.study_id, record.image_id),
                    study_id=_digest("study", seed, variant, record.study_id),
                    template=record,
                    variant=variant,
                    seed=int(_digest("noise", seed, index), 16) >> 65,
                    box=finding.box if finding else None,
                    attributes=replace(described, **given),
                    report=report or (_annotated_report(record, finding) if finding else None),
                )
            )
    return items


def automatic_mask(breast: np.ndarray, seed: int) -> np.ndarray:
    """A lesion-shaped blob well inside the breast.

    The diameter is log-normal, the outline an ellipse with three random harmonics, the center uniform over the breast
    pixels at least a radius (where the breast is that wide) away from skin and image border.

    Args:
        breast: bool [S, S] in model space.

    Returns:
        bool [S, S].
    """
    rng = np.random.default_rng(seed)
    scale = breast.shape[0] / 224
    radius = scale / 2 * np.clip(MEDIAN_DIAMETER * np.exp(LOG_SPREAD * rng.standard_normal()), *DIAMETER_RANGE)
    depth = ndimage.distance_transform_edt(np.pad(breast, 1))[1:-1, 1:-1]
    ys, xs = np.nonzero(depth >= min(1.5 * radius, 0.8 * depth.max()))
    pick = int(rng.integers(len(ys)))
    aspect, tilt = np.exp(rng.uniform(-0.25, 0.25)), rng.uniform(0, np.pi)
    y, x = np.ogrid[: breast.shape[0], : breast.shape[1]]
    dy, dx = y - ys[pick], x - xs[pick]
    along = (dx * np.cos(tilt) + dy * np.sin(tilt)) / aspect
    across = (dy * np.cos(tilt) - dx * np.sin(tilt)) * aspect
    angle = np.arctan2(across, along)
    outline = 1.0
    for harmonic in (2, 3, 5):
        outline = outline + rng.uniform(0, 0.12) * np.cos(harmonic * angle + rng.uniform(0, 2 * np.pi))
    return (np.hypot(along, across) <= radius * outline) & breast


def read_mask_file(path: Path, shape: tuple[int, int]) -> np.ndarray:
    """A gray image of the template's size; above half of its range = synthesize. Returns bool [H, W]."""
    try:
        with Image.open(path) as image:
            values = np.asarray(image)
    except OSError as error:
        raise GBCIError(f"{path} cannot be read as a mask image: {error}") from error
    if values.ndim != 2:
        raise GBCIError(f"{path} is a color image; expected a gray mask")
    if values.shape != shape:
        raise GBCIError(f"{path} is {values.shape[1]}x{values.shape[0]}; expected the template's {shape[1]}x{shape[0]}")
    mask = values > values.max() / 2
    if not mask.any():
        raise GBCIError(f"{path} is all zero; expected at least one pixel to synthesize")
    return mask


def _annotated_report(record: ImageRecord, finding: Any) -> str | None:
    return finding.extra.get("report") or record.extra.get("report")


def _digest(*parts: object) -> str:
    """32 hexadecimal digits of SHA-256 over the parts."""
    return hashlib.sha256("\x1f".join(map(str, parts)).encode()).hexdigest()[:32]
