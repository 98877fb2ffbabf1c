"""Training images in model space, from image folders or caches, and the masks that the model learns to fill."""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from typing import overload

import numpy as np
from scipy import ndimage

from gbci_fast.attributes import Attributes
from gbci_fast.choices import MODEL_SIZE
from gbci_fast.data.boxes import bounding_box, box_ellipse
from gbci_fast.data.cache import Cache, Selected, is_cache
from gbci_fast.data.fields import FieldOfView, read_fields
from gbci_fast.data.folds import TRAINED, patient_fold
from gbci_fast.data.vindr import VinDr
from gbci_fast.errors import GBCIError
from gbci_fast.training.progress import counting

# Model pixels by which a lesion's mask is grown, drawn uniformly; most often 3, as in generation and evaluation. A
# model that sees loose masks as often paints lesions that fill less of the mask.
RIMS = (1, 2, 3, 3, 3, 3, 4, 5)


def load_images(roots: Sequence[Path], size: int = MODEL_SIZE) -> Sequence[FieldOfView]:
    """Every field of view to train on under `roots`: VinDr-layout folders, caches of `gbci-fast prepare`, or both.

    These are the views of folds A and B of the training split; fold C trains nothing (see `patient_fold`). A folder of
    images is read into memory by `read_fields`. A cache holds the same fields, and reads an item from disk when it is
    accessed.

    Args:
        roots: folders and caches.
        size: side of the model image in pixels.

    Raises:
        GBCIError: no such image, or a cache of another size.
    """
    images = Chained([_load_root(Path(root), size) for root in roots])
    if not images:
        listed = ", ".join(map(str, roots))
        raise GBCIError(f"no image of folds A and B of the training split in {listed}; check the split column")
    return images


class Chained(Sequence[FieldOfView]):
    """Several sequences as one; items are fetched when they are accessed."""

    def __init__(self, parts: Sequence[Sequence[FieldOfView]]):
        self._parts = parts
        self._ends = list(accumulate(map(len, parts)))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    @overload
    def __getitem__(self, key: int) -> FieldOfView: ...
    @overload
    def __getitem__(self, key: slice) -> Selected: ...
    def __getitem__(self, key):
        picked = range(len(self))[key]
        if isinstance(key, slice):
            return Selected(self, picked)
        part = bisect_right(self._ends, picked)
        return self._parts[part][picked - (self._ends[part - 1] if part else 0)]


def _load_root(root: Path, size: int) -> Sequence[FieldOfView]:
    if is_cache(root):
        cache = Cache(root)
        if cache.size != size:
            raise GBCIError(f"{root} is a cache of {cache.size} pixels; expected {size}: prepare it with --size {size}")
        return cache.of_folds(TRAINED)
    records = [record for record in VinDr(root).of_split("training") if patient_fold(record.patient) in TRAINED]
    fields: list[FieldOfView] = []
    with counting(f"reading {root.name}", len(records)) as advance:
        for record in records:
            fields += [placed.field for placed in read_fields(record, root, size).fields]
            advance()
    return fields


def augment(item: FieldOfView, rng: np.random.Generator) -> FieldOfView:
    """Anatomically valid augmentation: gamma and gain, a shift of a few pixels, and an up-down flip for CC views."""
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
    """A training mask, bool [S, S], with attributes and report of what it covers.

    Three quarters of the masks cover a lesion and have its attributes and report. Of the others, a mask that touches no
    lesion is "No Finding". The finding is unknown if the mask overlaps a lesion, or if the image is not annotated.

    Raises:
        GBCIError: the breast mask is empty.
    """
    if item.lesions and rng.random() < 0.75:
        lesion = item.lesions[int(rng.integers(len(item.lesions)))]
        mask = _cover(lesion.pixels, rng) & _grow(item.breast, 2)
        # Another lesion under the mask would be painted without being described: leave it out of the mask.
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
    """A mask over a whole lesion: its outline grown by one of `RIMS` or, in one of four cases, an ellipse around it."""
    if rng.random() < 0.75:
        return _grow(pixels, int(rng.choice(RIMS)))
    xmin, ymin, xmax, ymax = bounding_box(pixels)
    half_h, half_w = (ymax - ymin) / 2, (xmax - xmin) / 2
    y, x = ymin + half_h, xmin + half_w
    # The ellipse inscribed in the box, stretched by sqrt(2), circumscribes the box.
    stretch = rng.uniform(1.1, 1.5, 2)
    ry, rx = half_h * stretch[0] + 1, half_w * stretch[1] + 1
    return box_ellipse((x - rx, y - ry, x + rx, y + ry), pixels.shape) | _grow(pixels, 1)


def _blob_in(breast: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """An ellipse centered on a random breast pixel, with a log-uniform diameter of 8 to 64 pixels at `MODEL_SIZE`."""
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
