"""Training images in model space, held in memory, and the masks that the model learns to fill."""

import zlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from rich.progress import track
from scipy import ndimage

from gbci_fast.data.attributes import Attributes
from gbci_fast.data.fields import FieldOfView, field_of_view, lesion_truth
from gbci_fast.data.preprocess import (
    MODEL_SIZE,
    Frame,
    box_ellipse,
    breast_mask,
    whole_breast_frame,
)
from gbci_fast.data.vindr import ImageRecord, VinDr
from gbci_fast.errors import GBCIError


def patient_fold(patient: str) -> str:
    """ "A" or "B" by hash of the patient id: the scorer sees A alone, the verifier B alone."""
    return "AB"[zlib.crc32(patient.encode()) & 1]


def load_images(roots: Sequence[Path], split: str, size: int = MODEL_SIZE) -> list[FieldOfView]:
    """Reads every image of `split` under the VinDr-layout `roots`, whole breast, and zoomed where pixels allow.

    An image whose native resolution is at least 1.6 times the whole-breast model resolution also yields one field of
    view at twice the magnification around each lesion.

    Raises:
        GBCIError: no image in that split.
    """
    images: list[FieldOfView] = []
    for root in roots:
        records = [record for record in VinDr(root).images if record.split == split]
        for record in track(records, description=f"reading {Path(root).name}", disable=not records):
            images.extend(_load_record(record, Path(root), size))
    if not images:
        raise GBCIError(f"no {split!r} image in {', '.join(map(str, roots))}; check the split column")
    return images


def _load_record(record: ImageRecord, root: Path, size: int) -> list[FieldOfView]:
    mammogram = record.read()
    unit = mammogram.unit()
    breast = breast_mask(unit)
    frame = whole_breast_frame(breast, size)
    truth = lesion_truth(record, root, unit.shape)
    boxes = [finding.box for finding in record.findings]
    frames = [frame]
    if frame.scale[0] <= 1 / 1.6:
        field = size / frame.scale[0] / 2
        frames += [_zoomed(frame, box) for box in boxes if max(box[2] - box[0], box[3] - box[1]) < 0.8 * field]
    return [field_of_view(record, mammogram.spacing, unit, breast, truth, view) for view in frames]


def _zoomed(frame: Frame, box: tuple[float, float, float, float]) -> Frame:
    """The field of view at twice the magnification of `frame`, centered on `box`."""
    half = round(frame.size / frame.scale[0] / 4)
    x, y = round((box[0] + box[2]) / 2), round((box[1] + box[3]) / 2)
    return replace(
        frame, x0=x - half, x1=x + half, y0=y - half, y1=y + half, width=frame.size, height=frame.size, left=0, top=0
    )


def augment(item: FieldOfView, rng: np.random.Generator) -> FieldOfView:
    """Anatomically valid variation: gray-value gamma and gain, a shift of a few pixels, up-down flip for CC views."""
    gamma, gain = np.exp(rng.uniform(-0.15, 0.15)), rng.uniform(0.9, 1.05)
    image = np.clip(gain * (item.image / 65535.0) ** gamma, 0, 1)
    flip = item.attributes.view_position == "CC" and rng.random() < 0.5
    dy, dx = int(rng.integers(-8, 9)), -int(rng.integers(0, 5))

    def move(array: np.ndarray) -> np.ndarray:
        moved = np.zeros_like(array)
        height, width = array.shape
        source = array[max(0, -dy) : height - max(0, dy), max(0, -dx) : width - max(0, dx)]
        moved[max(0, dy) : height + min(0, dy), max(0, dx) : width + min(0, dx)] = source
        return moved[::-1] if flip else moved

    lesions = tuple(replace(lesion, pixels=move(lesion.pixels)) for lesion in item.lesions)
    return replace(
        item,
        image=np.round(move(image) * 65535).astype(np.uint16),
        breast=move(item.breast),
        lesions=tuple(lesion for lesion in lesions if lesion.pixels.any()),
    )


def draw_mask(item: FieldOfView, rng: np.random.Generator) -> tuple[np.ndarray, Attributes, str | None]:
    """A training mask (bool [S, S]) with the description that is true of it.

    Three quarters cover a lesion and carry its attributes and report; of the rest, a mask that touches no lesion is
    "No Finding", and a partial overlap leaves the finding unknown. So does an image of which nobody said anything.
    """
    if item.lesions and rng.random() < 0.75:
        lesion = item.lesions[int(rng.integers(len(item.lesions)))]
        mask = _cover(lesion.pixels, rng) & _grow(item.breast, 2)
        # Another lesion half under the mask would be painted without being described: leave it out of the mask.
        for other in item.lesions:
            if other is not lesion:
                mask &= ~other.pixels | lesion.pixels
        return mask, lesion.attributes, lesion.report
    mask = _blob_in(item.breast, rng)
    annotated = item.lesions or item.attributes.finding_categories is not None
    if not annotated or (mask & item.any_lesion).any():
        return mask, replace(item.attributes, finding_categories=None), None
    return mask, replace(item.attributes, finding_categories=()), None


def _cover(pixels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A mask over a whole lesion: its outline grown by 1 to 5 pixels, or an ellipse around its box."""
    if rng.random() < 0.5:
        return _grow(pixels, int(rng.integers(1, 6)))
    ys, xs = np.flatnonzero(pixels.any(1)), np.flatnonzero(pixels.any(0))
    half_h, half_w = (ys[-1] + 1 - ys[0]) / 2, (xs[-1] + 1 - xs[0]) / 2
    y, x = ys[0] + half_h, xs[0] + half_w
    # sqrt(2) takes the inscribed ellipse to the circumscribed one.
    stretch = rng.uniform(1.1, 1.5, 2)
    ry, rx = half_h * stretch[0] + 1, half_w * stretch[1] + 1
    return box_ellipse((x - rx, y - ry, x + rx, y + ry), pixels.shape) | _grow(pixels, 1)


def _blob_in(breast: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """An ellipse of plausible lesion size centered in the breast (log-uniform diameter of 8 to 64 pixels)."""
    ys, xs = np.nonzero(breast)
    if not len(ys):
        raise GBCIError("the breast mask is empty in model space; expected at least one pixel")
    pick = int(rng.integers(len(ys)))
    radius = np.exp(rng.uniform(np.log(4), np.log(32))) * breast.shape[0] / MODEL_SIZE
    aspect = rng.uniform(0.7, 1.4)
    y, x, ry, rx = ys[pick], xs[pick], radius * aspect, radius / aspect
    return box_ellipse((x - rx, y - ry, x + rx, y + ry), breast.shape) & breast


def _grow(mask: np.ndarray, radius: int) -> np.ndarray:
    """Dilation by a disk of `radius` pixels."""
    y, x = np.ogrid[-radius : radius + 1, -radius : radius + 1]
    return ndimage.binary_dilation(mask, x * x + y * y <= radius * radius)
