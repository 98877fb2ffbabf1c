"""Nearest training crops of lesion crops in pixel space, and the index file that holds the training crops for a gate.

The distance of two crops is one minus their normalized cross-correlation over the query's masked pixels, maximized over
mirrorings and small shifts. Gain and offset cancel, and pixels outside the mask, which were not painted, do not count.
The crops are first band-passed (a difference of Gaussians within the tissue). Without this, all bright blobs and all
chest walls correlate, and a copy does not stand out. Copies at another scale, or rotated, are not found.
"""

import hashlib
import json
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from scipy.ndimage import gaussian_filter

from gbci_fast.dicom.bounds import MEBIBYTE, check_regular
from gbci_fast.errors import GBCIError
from gbci_fast.evaluate.lesions import CONTEXT, CROP_SIZE, SMALLEST_WINDOW, Crops
from gbci_fast.jobs.files import atomically_open

RESOLUTION = 32  # side in pixels at which crops are compared
SHIFT = 2  # largest shift in pixels at that resolution: four pixels of a crop
FINE, COARSE = 1.0, 6.0  # standard deviations of the band's Gaussians, in crop pixels
AIR = 0.04  # gray values below are air
FLATTEST = 0.02  # least contrast under a mask, as a share of the training crop's contrast
MAX_UNPACKED = 8  # unpacked bytes per byte of an index that others compressed; float16 noise hardly compresses
FARTHEST = 2.0  # the largest possible distance
_SETTINGS = {
    "format": "gbci-fast training crops 1",
    "crop": [CROP_SIZE, CONTEXT, SMALLEST_WINDOW],
    "resolution": RESOLUTION,
    "shift": SHIFT,
    "band": [FINE, COARSE, AIR],
    "flattest": FLATTEST,
}


@dataclass(frozen=True, kw_only=True, eq=False)
class Nearest:
    """The nearest training crop of each of N crops.

    Attributes:
        distances: float64 [N] in [0, 2]: 0 = equal up to gain and offset, 1 = uncorrelated.
        rows: int64 [N], row of the training crop in the index.
        moves: int64 [N], how the query was mirrored and shifted to match the training crop (see `laid_on`).
    """

    distances: np.ndarray
    rows: np.ndarray
    moves: np.ndarray


@dataclass(frozen=True, kw_only=True, eq=False)
class TrainingIndex:
    """Training crops, prepared for comparison.

    Attributes:
        details: float16 [M, R, R], band-passed crops of mean 0 and standard deviation 1.
        names: of the M lesions.
        image_ids: of their M images.
    """

    details: np.ndarray
    names: tuple[str, ...]
    image_ids: tuple[str, ...]

    @classmethod
    def of(cls, crops: Crops, names: Sequence[str], image_ids: Sequence[str]) -> "TrainingIndex":
        """The index of training lesions' crops."""
        small = _shrunk(_band(crops.pixels)[0])
        spread = small.std((1, 2), keepdims=True)
        normalized = (small - small.mean((1, 2), keepdims=True)) / np.where(spread > 0, spread, 1)
        return cls(details=normalized.astype(np.float16), names=tuple(names), image_ids=tuple(image_ids))

    def nearest(self, crops: Crops, excluded: Sequence[str | None]) -> Nearest:
        """The nearest training crop of every crop.

        Args:
            crops: the queries.
            excluded: per query, the id of an image whose training crops do not count; None = all count.

        Raises:
            GBCIError: all training crops are of an excluded image.
        """
        ids = np.array(self.image_ids)
        distances, rows, moves = np.empty(len(crops)), np.empty(len(crops), np.int64), np.empty(len(crops), np.int64)
        for i, (correlations, image_id) in enumerate(zip(self._correlations(crops), excluded, strict=True)):
            best = np.where(ids == image_id, -np.inf, correlations.max(0))
            rows[i] = best.argmax()
            if not np.isfinite(best[rows[i]]):
                raise GBCIError(f"all {len(ids)} training crops are of {image_id}; expected at least one other image")
            moves[i] = correlations[:, rows[i]].argmax()
            distances[i] = np.clip(1 - best[rows[i]], 0, FARTHEST)
        return Nearest(distances=distances, rows=rows, moves=moves)

    def distances(self, crops: Crops) -> np.ndarray:
        """The distance of every crop to every training crop, float64 [N, M]."""
        return np.stack([np.clip(1 - found.max(0), 0, FARTHEST) for found in self._correlations(crops)])

    @cached_property
    def _columns(self) -> tuple[np.ndarray, np.ndarray]:
        """The training crops and their squares, float32 [R R, M] each."""
        flat = np.ascontiguousarray(self.details.reshape(len(self.details), -1).T.astype(np.float32))
        return flat, np.square(flat)

    def _correlations(self, crops: Crops) -> Iterator[np.ndarray]:
        """Yields per crop its correlations with all M training crops at all V moves, float32 [V, M]."""
        bands, tissue = _band(crops.pixels)
        for values, mask in zip(_shrunk(bands), _shrunk(crops.masks & tissue) > 0.5, strict=True):
            spread = values[mask].std() if mask.any() else 0
            if spread < 1e-6:  # a flat crop correlates with nothing
                yield np.zeros((len(_moved(mask)), len(self.details)), np.float32)
                continue
            template = np.where(mask, (values - values[mask].mean()) / spread, 0)
            yield _correlate(_moved(template), _moved(mask), *self._columns)


def laid_on(move: int, crop: np.ndarray) -> np.ndarray:
    """A training crop [C, C], moved onto the query that matched it with `move`; zeros are shifted in."""
    side, step = 2 * SHIFT + 1, CROP_SIZE // RESOLUTION
    mirror, place = divmod(move, side * side)
    y, x = divmod(place, side)
    padded = np.pad(crop, 2 * SHIFT * step)
    # A window that starts at (y, x) of the padded query moves the query by SHIFT - y rows; this undoes the move.
    top, left = (3 * SHIFT - y) * step, (3 * SHIFT - x) * step
    moved = padded[top : top + CROP_SIZE, left : left + CROP_SIZE]
    return (moved, moved[::-1], moved[:, ::-1], moved[::-1, ::-1])[mirror]


def save_index(index: TrainingIndex, threshold: float, path: Path) -> None:
    """Writes an npz of the index and the distance below which a crop is a copy. The file holds training pixels."""
    content = {
        "settings": np.array(json.dumps(_SETTINGS)),
        "threshold": np.array(threshold, np.float64),
        "details": index.details,
        "names": np.array(index.names),
        "image_ids": np.array(index.image_ids),
    }
    atomically_open(path, lambda file: np.savez(file, **content))


def load_index(path: Path) -> tuple[TrainingIndex, float]:
    """Reads the index and the threshold of a file of `save_index`.

    Raises:
        GBCIError: the file is missing, damaged, or not such an index; the message names the file.
    """
    expected = "expected an index of gbci-fast evaluate memorisation --index"
    try:
        check_regular(path)
        _check_unpacked(path)
        with np.load(path, allow_pickle=False) as file:
            settings, threshold = json.loads(str(file["settings"])), float(file["threshold"])
            details, names, ids = file["details"], file["names"], file["image_ids"]
    except FileNotFoundError:
        raise GBCIError(f"{path} does not exist; {expected}") from None
    except Exception as error:  # numpy, zipfile and zlib raise a dozen types for a damaged file
        reason = " ".join(str(error).split()) or type(error).__name__
        raise GBCIError(f"{path} cannot be read ({reason}); {expected}") from None
    if settings != _SETTINGS:
        raise GBCIError(f"{path} was made with other settings than this version's; write it again")
    whole = details.ndim == 3 and len(details) and details.shape[1:] == (RESOLUTION, RESOLUTION)
    named = details.shape[:1] == names.shape == ids.shape
    if not (whole and named) or details.dtype != np.float16 or not np.isfinite(details).all():
        raise GBCIError(f"{path} holds arrays of wrong shapes or values; {expected}")
    if not 0 <= threshold <= FARTHEST:
        raise GBCIError(f"{path}: threshold is {threshold:g}; expected 0 to {FARTHEST:g}")
    index = TrainingIndex(details=details, names=tuple(map(str, names)), image_ids=tuple(map(str, ids)))
    return index, threshold


def _check_unpacked(path: Path) -> None:
    """Refuses an archive that unpacks to far more than its length; `save_index` does not compress.

    Raises:
        ValueError: it does.
    """
    with zipfile.ZipFile(path) as archive:
        unpacked = sum(member.file_size for member in archive.infolist())
    allowed = max(MEBIBYTE, MAX_UNPACKED * path.stat().st_size)
    if unpacked > allowed:
        raise ValueError(f"it unpacks to {unpacked} bytes, {MAX_UNPACKED} times its length or more")


def index_digest(index: TrainingIndex, threshold: float) -> str:
    """SHA-256 (hexadecimal) of all that decides which crops are rejected."""
    digest = hashlib.sha256(json.dumps([_SETTINGS, threshold, index.names, index.image_ids]).encode())
    digest.update(np.ascontiguousarray(index.details).tobytes())
    return digest.hexdigest()


def _band(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The band-passed images, float32 [N, C, C] and 0 outside the tissue, and the tissue, bool [N, C, C]."""
    tissue = images > AIR
    weights, inside = tissue.astype(np.float32), np.where(tissue, images, 0).astype(np.float32)

    def blurred(sigma: float) -> np.ndarray:
        sigmas = (0, sigma, sigma)
        return gaussian_filter(inside, sigmas) / np.maximum(gaussian_filter(weights, sigmas), 1e-3)

    return np.where(tissue, blurred(FINE) - blurred(COARSE), 0).astype(np.float32), tissue


def _shrunk(images: np.ndarray) -> np.ndarray:
    """The images [N, C, C] at `RESOLUTION`, float32 [N, R, R], by block means."""
    step = CROP_SIZE // RESOLUTION
    return images.reshape(len(images), RESOLUTION, step, RESOLUTION, step).mean((2, 4), dtype=np.float32)


def _moved(image: np.ndarray) -> np.ndarray:
    """All mirrored and shifted versions of an image [R, R], float32 [4 (2 SHIFT + 1)^2, R R]; zeros are shifted in."""
    places = range(2 * SHIFT + 1)
    moved = []
    for mirrored in (image, image[::-1], image[:, ::-1], image[::-1, ::-1]):
        padded = np.pad(mirrored.astype(np.float32), SHIFT)
        moved += [padded[y : y + RESOLUTION, x : x + RESOLUTION].ravel() for y in places for x in places]
    return np.stack(moved)


def _correlate(templates: np.ndarray, masks: np.ndarray, columns: np.ndarray, squares: np.ndarray) -> np.ndarray:
    """Pearson's correlations [V, M] of V templates with M columns over the templates' masks.

    Args:
        templates: [V, P], zero outside their masks.
        masks: [V, P].
        columns, squares: [P, M].
    """
    counts = np.maximum(masks.sum(1, keepdims=True), 1)
    sums = templates.sum(1, keepdims=True)  # 0, unless a shift pushed a pixel over the edge
    means = masks @ columns / counts
    spreads = np.sqrt(np.maximum(masks @ squares / counts - np.square(means), FLATTEST**2))
    own = np.sqrt(np.maximum(np.square(templates).sum(1, keepdims=True) - np.square(sums) / counts, 1e-6))
    return (templates @ columns - sums * means) / (spreads * own * np.sqrt(counts))
