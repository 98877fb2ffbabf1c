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
from gbci_fast.data.preprocess import MODEL_SIZE
from gbci_fast.data.vindr import Box, Finding, ImageRecord
from gbci_fast.errors import GBCIError

# Lesion diameters in pixels of the whole-breast view (`MODEL_SIZE`): median and log-spread of the CBIS-DDSM masses, and
# the range that the training masks cover.
MEDIAN_DIAMETER, LOG_SPREAD, DIAMETER_RANGE = 18.0, 0.35, (9.0, 48.0)
DEFAULT_FINDING = {"finding_categories": ("Mass",), "finding_birads": 4}


@dataclass(frozen=True, kw_only=True, eq=False)
class PlanItem:
    """One synthetic image to make.

    Attributes:
        index: position in the plan; with the job's seed it decides `seed`.
        image_id, study_id: 32 hexadecimal digits; the variants of a study's images share a synthetic study.
        template: the image to paint into.
        variant: 0, 1, ... within the template.
        seed: of the sampler's noise and of an automatic mask, in [0, 2^63).
        box: the annotated box whose ellipse is the mask.
        drawn: bool [H, W], a mask from a file. Without a box or a drawing the mask is automatic.
        attributes, report: the description of the lesion. View and side are here only where they were overridden:
            the opened file knows them better than its name or its table.
    """

    index: int
    image_id: str
    study_id: str
    template: ImageRecord
    variant: int
    seed: int
    box: Box | None
    drawn: np.ndarray | None
    attributes: Attributes
    report: str | None

    @property
    def mask_source(self) -> str:
        """ "annotations", "file" or "auto"."""
        return "annotations" if self.box is not None else "auto" if self.drawn is None else "file"


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
        GBCIError: an unknown attribute or value, a mask file that is none, or no annotated box in any record.
    """
    if variants < 1:
        raise GBCIError(f"variants is {variants}; expected at least 1")
    if mask == "annotations":
        records = [record for record in records if record.findings]
        if not records:
            raise GBCIError("no input has an annotated box; use --mask auto or a mask file")
    drawn = read_mask_file(Path(mask)) if mask not in ("auto", "annotations") else None
    parsed = Attributes.from_mapping(overrides or {})
    given = {name: getattr(parsed, name) for name in overrides or {}}
    items = []
    for record in records:
        for variant in range(variants):
            index = len(items)
            finding = record.findings[variant % len(record.findings)] if mask == "annotations" else None
            items.append(
                PlanItem(
                    index=index,
                    image_id=_digest("image", seed, index, record.study_id, record.image_id),
                    study_id=_digest("study", seed, variant, record.study_id),
                    template=record,
                    variant=variant,
                    seed=int(_digest("noise", seed, index), 16) >> 65,
                    box=finding.box if finding else None,
                    drawn=drawn,
                    attributes=_described(record, finding, given),
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
    scale = breast.shape[0] / MODEL_SIZE
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


def read_mask_file(path: Path) -> np.ndarray:
    """A gray image; above half of its range = synthesize. Returns bool [H, W].

    Raises:
        GBCIError: absent, not an image, in color, or all zero.
    """
    try:
        with Image.open(path) as image:
            values = np.asarray(image)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:  # what Pillow raises
        raise GBCIError(f"{path} cannot be read as a mask image: {error}") from error
    if values.ndim != 2:
        raise GBCIError(f"{path} is a color image; expected a gray mask")
    mask = values > values.max() / 2
    if not mask.any():
        raise GBCIError(f"{path} is all zero; expected at least one pixel to synthesize")
    return mask


def _described(record: ImageRecord, finding: Finding | None, given: Mapping[str, Any]) -> Attributes:
    """The annotation's description, or the default lesion in this breast, changed to what was `given`."""
    described = finding.attributes if finding else replace(record.attributes, **DEFAULT_FINDING)
    described = replace(described, **{"laterality": None, "view_position": None, **given})
    if described.finding_categories == () and "finding_birads" not in given:
        described = replace(described, finding_birads=None)
    if "breast_birads" not in given:
        # A breast is graded by the worst that is in it.
        grades = [grade for grade in (described.breast_birads, described.finding_birads) if grade is not None]
        described = replace(described, breast_birads=max(grades, default=None))
    return described


def _annotated_report(record: ImageRecord, finding: Finding) -> str | None:
    return finding.extra.get("report") or record.extra.get("report")


def _digest(*parts: object) -> str:
    """32 hexadecimal digits of SHA-256 over the parts."""
    return hashlib.sha256("\x1f".join(map(str, parts)).encode()).hexdigest()[:32]
