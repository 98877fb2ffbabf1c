"""Sources of lesion masks: automatic masks drawn from priors, boxes, ellipses and mask files."""

import hashlib
import math
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from scipy.signal import fftconvolve
from skimage.draw import polygon2mask

from gbci_fast.choices import MODEL_SIZE
from gbci_fast.data.boxes import Box, box_ellipse
from gbci_fast.data.mask_files import read_mask
from gbci_fast.errors import GBCIError
from gbci_fast.generate.priors import CategoryPrior

# The lesion diameters of the training masks, in pixels of the whole-breast view. Priors are cut to this range.
DIAMETER_RANGE = (8.0, 64.0)
# Priors are fitted from boxes, which hold no tilt. In the lesion masks of CBIS-DDSM and CDD-CESM (training split) the
# correlation of x and y has this standard deviation (median 0.02). Beyond the limit an ellipse is almost a line.
TILT_SD, TILT_LIMIT = 0.25, 0.6


@dataclass(frozen=True, kw_only=True)
class AutomaticMask:
    """A mask drawn from the prior of the description's category, by the item's seed (see `automatic_mask`)."""

    prior: CategoryPrior
    source = "auto"

    def identity(self) -> list[Any]:
        """The mask's identity as JSON: its source, then what decides its pixels."""
        return [self.source, self.prior.digest]


@dataclass(frozen=True, kw_only=True)
class BoxMask:
    """The ellipse in a box of native pixels; `source` is "annotations" or "plan". It may lie outside the breast."""

    box: Box
    source: str = "annotations"

    def identity(self) -> list[Any]:
        return [self.source, *map(float, self.box)]

    def on(self, shape: tuple[int, int], spacing: tuple[float, float] | None) -> np.ndarray:
        """bool [H, W]."""
        return box_ellipse(self.box, shape)


@dataclass(frozen=True, kw_only=True)
class EllipseMask:
    """An ellipse on the native grid.

    Attributes:
        center: (x, y) in native pixels.
        diameter: geometric mean of the two axes' lengths.
        unit: of the diameter, "px" (native) or "mm".
        aspect: vertical axis / horizontal axis, before the tilt.
        tilt: degrees, clockwise on the screen.
    """

    center: tuple[float, float]
    diameter: float
    unit: str
    aspect: float = 1.0
    tilt: float = 0.0
    source = "plan"

    def identity(self) -> list[Any]:
        return [self.source, asdict(self)]

    def check(self, shape: tuple[int, int]) -> None:
        """Checks that the center lies in an image of `shape` (height, width).

        Raises:
            GBCIError: it lies outside.
        """
        if not (0 <= self.center[0] < shape[1] and 0 <= self.center[1] < shape[0]):
            center = f"{self.center[0]:g}, {self.center[1]:g}"
            raise GBCIError(f"the ellipse's center ({center}) lies outside the image of {shape[1]}x{shape[0]} pixels")

    def on(self, shape: tuple[int, int], spacing: tuple[float, float] | None) -> np.ndarray:
        """The mask, bool [H, W], with at least the center's pixel; `spacing` is the file's (row, column) in mm.

        Raises:
            GBCIError: the center lies outside the image, or the diameter is in mm and the spacing unknown.
        """
        self.check(shape)
        if self.unit != "mm":
            spacing = (1.0, 1.0)
        elif spacing is None:
            raise GBCIError("the file states no pixel spacing, so diameter_mm has no meaning; give diameter_px")
        per_row, per_column = spacing
        y, x = np.ogrid[: shape[0], : shape[1]]
        dx, dy = (x + 0.5 - self.center[0]) * per_column, (y + 0.5 - self.center[1]) * per_row
        turn, radius = math.radians(self.tilt), self.diameter / 2
        along = (dx * math.cos(turn) + dy * math.sin(turn)) * math.sqrt(self.aspect)
        across = (dy * math.cos(turn) - dx * math.sin(turn)) / math.sqrt(self.aspect)
        mask = np.hypot(along, across) <= radius
        mask[int(self.center[1]), int(self.center[0])] = True
        return mask


@dataclass(frozen=True, kw_only=True)
class FileMask:
    """A mask image of the template's size. Its pixels are read when needed, and must not have changed since the plan.

    Attributes:
        path: the file.
        digest: SHA-256 of its pixels.
    """

    path: Path
    digest: str
    source = "file"

    @classmethod
    def of(cls, path: Path) -> "FileMask":
        """Reads the file once, so that a bad file is found before any work is done; errors as `read_mask_file`."""
        return cls(path=path, digest=_digest(read_mask_file(path)))

    def identity(self) -> list[Any]:
        return [self.source, self.digest]

    def on(self, shape: tuple[int, int], spacing: tuple[float, float] | None) -> np.ndarray:
        """The mask, bool [H, W].

        Raises:
            GBCIError: its size is not `shape`, or the file has changed since the plan was made.
        """
        mask = _unchanged(self)
        if mask.shape != shape:
            raise GBCIError(
                f"the mask file {self.path} is {mask.shape[1]}x{mask.shape[0]} but the image is {shape[1]}x{shape[0]}; "
                "expected a mask of the same size"
            )
        return mask


Mask = AutomaticMask | BoxMask | EllipseMask | FileMask


def automatic_mask(
    prior: CategoryPrior, breast: np.ndarray, tissue: np.ndarray, view: str | None, seed: int
) -> np.ndarray:
    """A lesion-shaped blob in the tissue; size, aspect and position are drawn from the prior.

    The center is drawn from the prior's position map over the places where the whole blob lies in the tissue. A blob
    that fits nowhere is shrunk until it fits, so every pixel of the result lies in `tissue`.

    Args:
        prior: of the lesion's category; sizes are cut to `DIAMETER_RANGE`.
        breast: bool [S, S] in model space, chest wall left.
        tissue: bool [S, S], where a lesion's pixels may lie (`placement_mask`).
        view: "CC", "MLO", or None = unknown.
        seed: of all random draws.

    Returns:
        bool [S, S].

    Raises:
        GBCIError: `tissue` is empty.
    """
    if not tissue.any():
        raise GBCIError("no place for a lesion: the tissue mask is empty")
    rng = np.random.default_rng(seed)
    size = prior.diameter.draw(rng, DIAMETER_RANGE) * breast.shape[0] / MODEL_SIZE
    stretch = math.sqrt(prior.aspect.draw(rng))  # height / width
    points = _outline(rng) * (size / stretch / 2, size * stretch / 2)
    blob = _filled(points)
    places = _places(tissue, blob)
    while not places.any():
        points = 0.85 * points
        blob = _filled(points)
        places = _places(tissue, blob)
    weights = np.cumsum(np.where(places, prior.position_weights(breast, view), 0.0))
    pick = int(np.searchsorted(weights, rng.uniform(0, weights[-1]), side="right"))
    return _stamped(blob, divmod(min(pick, int(np.flatnonzero(places)[-1])), breast.shape[1]), breast.shape)


def read_mask_file(path: Path) -> np.ndarray:
    """Reads a mask from a gray image: bool [H, W], true (synthesize) above half of the image's range.

    A palette is applied; a palette of colors counts as color.

    Raises:
        GBCIError: the file is absent, not an image, in color, or all zero.
    """
    mask = read_mask(path)
    if not mask.any():
        raise GBCIError(f"{path} is all zero; expected at least one pixel to synthesize")
    return mask


def _outline(rng: np.random.Generator) -> np.ndarray:
    """A closed curve around the origin with the bounding box [-1, 1]^2: a tilted ellipse with three random waves.

    The ellipse of a bivariate normal touches the same box for any correlation, so the correlation serves as the tilt.

    Returns:
        float64 [N, 2], (x, y).
    """
    tilt = float(np.clip(TILT_SD * rng.standard_normal(), -TILT_LIMIT, TILT_LIMIT))
    angle = np.linspace(0, 2 * np.pi, 256, endpoint=False)
    radius = np.ones_like(angle)
    for harmonic in (2, 3, 5):
        radius += rng.uniform(0, 0.12) * np.cos(harmonic * angle + rng.uniform(0, 2 * np.pi))
    x, y = radius * np.cos(angle), radius * np.sin(angle)
    points = np.stack([x, tilt * x + math.sqrt(1 - tilt**2) * y], axis=1)
    low, high = points.min(0), points.max(0)
    return (2 * points - low - high) / (high - low)


def _filled(points: np.ndarray) -> np.ndarray:
    """The pixels inside a curve around the origin, bool [2 R + 1, 2 R + 1]; the middle pixel is the origin."""
    reach = int(np.ceil(np.abs(points).max()))
    filled = polygon2mask((2 * reach + 1, 2 * reach + 1), points[:, ::-1] + reach)
    filled[reach, reach] = True  # the smallest lesion keeps a pixel
    return filled


def _places(tissue: np.ndarray, blob: np.ndarray) -> np.ndarray:
    """Centers at which all of `blob` lies in `tissue`, bool [S, S]: an erosion, by FFT because blobs are large."""
    reach = blob.shape[0] // 2
    outside = np.pad(~tissue, reach, constant_values=True).astype(np.float64)
    return fftconvolve(outside, blob[::-1, ::-1].astype(np.float64), mode="valid") < 0.5


def _stamped(blob: np.ndarray, center: tuple[int, int], shape: tuple[int, int]) -> np.ndarray:
    """An empty image of `shape` with `blob` centered at (y, x); the blob must fit."""
    mask, (ys, xs) = np.zeros(shape, bool), np.nonzero(blob)
    reach = blob.shape[0] // 2
    mask[ys + center[0] - reach, xs + center[1] - reach] = True
    return mask


def _digest(mask: np.ndarray) -> str:
    return hashlib.sha256(repr(mask.shape).encode() + np.packbits(mask).tobytes()).hexdigest()


@lru_cache(maxsize=1)  # consecutive items mostly share their mask file
def _unchanged(mask: FileMask) -> np.ndarray:
    pixels = read_mask_file(mask.path)
    if _digest(pixels) != mask.digest:
        raise GBCIError(f"{mask.path} has changed since the plan was made; run the command again")
    pixels.flags.writeable = False
    return pixels
