"""Segmentation without learned weights: the breast, the pectoral muscle, and the area in which a lesion may lie.

Outlines are computed with a longer side of 256 pixels; constants in pixels refer to that grid.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage
from skimage.filters import threshold_otsu

from gbci_fast.data.boxes import bounding_box
from gbci_fast.errors import GBCIError

_SIDE = 256  # pixels of the longer side at which outlines are computed
_MIN_BREAST_FRACTION = 0.01

# Breast: gray levels as shares of the way from black to Otsu's threshold, which separates dense tissue from the rest.
_DIMMEST_FAT = 0.3  # brighter pixels are never air
_AIR_MARGIN = 0.12  # tissue is brighter than air by at least this ...
_AIR_NOISE = 4.0  # ... plus this many standard deviations of the air
_RIM = 6  # pixels: structures thinner than twice this (rims, tape, light leaks) are cut off the breast
_NIPPLE = 4  # pixels: up to this distance from the cut, the breast's own edge is restored

# Muscle: lengths as shares of the breast's height.
_ANGLES = np.deg2rad(np.arange(6, 61, 3))  # between the muscle's edge and the chest wall
_BLUR = 0.009
_SKIN = 0.02
_BAND = 0.05  # largest distance of the edge from the straight line
_LINE_SAMPLES = 48
_FAINTEST = 0.2  # smallest score of a line that counts as an edge
_SMALLEST = 32  # pixels: no muscle is searched for in a breast of less height


def breast_mask(unit: np.ndarray) -> np.ndarray:
    """The breast with its skin as the largest bright region, bool [H, W]; labels, tape and bright rims are left out.

    The threshold is the image's most frequent dark level (air) plus a multiple of its noise. Pixels above the threshold
    are opened, so that thin attachments fall off, reduced to the largest component, grown back where the opening
    removed the breast's own edge, and smoothed.

    Args:
        unit: float32 [H, W] in [0, 1], bright = dense.

    Raises:
        GBCIError: no region of at least 1 % of the image stands out.
    """
    if unit.max() - unit.min() < 1e-6:
        raise GBCIError("no breast found: the image has one value only")
    # A median keeps the skin line where it is; a Gaussian would push a low threshold outward.
    small = ndimage.median_filter(_shrunk(unit, _small_shape(unit.shape)), 3)
    bright = small > _air_threshold(small)
    body = _largest(ndimage.binary_opening(bright, iterations=_RIM))
    body = ndimage.binary_dilation(body, iterations=_NIPPLE, mask=bright | body)
    padded = np.pad(body, 8, mode="edge")
    padded = ndimage.binary_fill_holes(ndimage.binary_closing(padded, iterations=5))
    body = ndimage.gaussian_filter(padded.astype(np.float32), 1.5)[8:-8, 8:-8] > 0.5
    if body.mean() < _MIN_BREAST_FRACTION:
        raise GBCIError(f"no breast found: the largest region covers {body.mean():.2%} of the image, expected >= 1 %")
    full = F.interpolate(torch.from_numpy(body.astype(np.float32))[None, None], unit.shape, mode="bilinear")
    return full[0, 0].numpy() > 0.5


def chest_wall_side(mask: np.ndarray) -> str:
    """The side of the image, "L" or "R", on which the breast in the mask, bool [H, W], is taller: the chest wall."""
    columns = np.trim_zeros(mask.sum(0))
    half = len(columns) // 2
    return "L" if columns[:half].sum() >= columns[len(columns) - half :].sum() else "R"


def pectoral_mask(unit: np.ndarray, breast: np.ndarray, view_position: str | None) -> np.ndarray:
    """The pectoral muscle, the bright triangle between chest wall and upper edge of an oblique view, bool [H, W].

    Its border is first the straight line across which the image darkens most consistently (Karssemeijer, Phys. Med.
    Biol. 43, 1998, found it by a Hough transform), then the path of least cost near that line, which may bulge. Even a
    faint border counts, because nearly every oblique view has a muscle.

    Args:
        unit: float32 [H, W] in [0, 1], bright = dense.
        breast: bool [H, W], from `breast_mask`; the chest wall may be on either side.
        view_position: a CC view has no muscle. If None (unknown), the shape of the breast decides: an oblique view is
            cut off by the image's upper edge, a CC view tapers toward it.

    Returns:
        A subset of ``breast``, all False if no muscle is found.
    """
    muscle = np.zeros_like(breast)
    if view_position == "CC" or not breast.any():
        return muscle
    # The breast's bounding box, flipped so that the chest wall lies on the left.
    xmin, ymin, xmax, ymax = bounding_box(breast)
    window = np.s_[ymin:ymax, xmin:xmax]
    forward = slice(None, None, 1 if chest_wall_side(breast) == "L" else -1)
    inside = breast[window][:, forward]
    shape = _small_shape(inside.shape)
    small, small_inside = _shrunk(unit[window][:, forward], shape), _shrunk(inside, shape) > 0.5
    if view_position is None and not _is_cut_off(small_inside):
        return muscle
    field = _Shading.of(small, small_inside)
    line = _strongest_line(field)
    if line is None:
        return muscle
    border = _border(field, line)
    if not _stands_out(field, line, border):
        return muscle
    height, width = inside.shape
    rows = (np.arange(height) + 0.5) * shape[0] / height - 0.5
    # The muscle thins out toward its border, so it ends at the foot of the edge, not at the steepest point.
    border = border + _BLUR * shape[0] / line.normal[0]
    reach = np.interp(rows, np.arange(len(border)), border, right=0.0) * width / shape[1]
    muscle[window][:, forward] = (np.arange(width) + 0.5 < reach[:, None]) & inside
    return muscle


def placement_mask(breast: np.ndarray, pectoral: np.ndarray, skin: float) -> np.ndarray:
    """The pixels where a lesion may lie, bool [H, W]: in the breast, off the muscle, away from the skin.

    The edges of the image (chest wall, axilla) are not skin. In a breast so small that the margin would exceed half of
    its greatest depth, the margin is half of that depth.

    Args:
        breast, pectoral: bool [H, W].
        skin: margin to the skin in pixels, >= 0.

    Raises:
        GBCIError: every pixel of the breast lies on the muscle, or the margin is negative.
    """
    if not skin >= 0:
        raise GBCIError(f"the skin margin is {skin} pixels; expected 0 or more")
    tissue = breast & ~pectoral
    if not tissue.any():
        raise GBCIError("no place for a lesion: no pixel of the breast is off the pectoral muscle")
    # Distance to the nearest air in the image; infinite if the breast fills the whole image.
    depth = np.full(breast.shape, np.inf) if breast.all() else ndimage.distance_transform_edt(breast)
    return tissue & (depth > min(skin, depth[tissue].max() / 2))


def outline(mask: np.ndarray) -> np.ndarray:
    """The outermost pixels of a mask, bool [H, W], to draw over an image; closed along the image's border."""
    return mask & ~ndimage.binary_erosion(mask)


def _small_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    scale = min(1.0, _SIDE / max(shape))
    return max(1, round(shape[0] * scale)), max(1, round(shape[1] * scale))


def _shrunk(image: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """The image reduced to ``shape``, float32: each pixel is the mean of its area."""
    tensor = torch.from_numpy(np.array(image, np.float32))[None, None]
    return F.interpolate(tensor, shape, mode="area")[0, 0].numpy()


def _air_threshold(small: np.ndarray) -> float:
    """The gray value between air and fat."""
    low = float(small.min())
    step = float(threshold_otsu(small)) - low
    if step <= 0:
        return low
    limit = low + _DIMMEST_FAT * step
    dark = small[small <= limit]
    counts, edges = np.histogram(dark, 64, range=(low, limit))
    air = edges[np.argmax(counts) + 1]
    # Fat and glow only add to the bright side of the air's peak; its dark side shows the noise.
    noise = np.sqrt(np.mean((air - dark[dark <= air]) ** 2))
    return min(air + _AIR_MARGIN * step + _AIR_NOISE * noise, limit)


def _largest(foreground: np.ndarray) -> np.ndarray:
    labels, count = ndimage.label(foreground)
    if count == 0:
        raise GBCIError("no breast found: nothing stands out from the background")
    return labels == 1 + int(np.argmax(np.bincount(labels.ravel())[1:]))


def _is_cut_off(inside: np.ndarray) -> bool:
    """Whether the breast, bool [H, W] in its bounding box, is wide at the upper edge instead of tapering toward it."""
    widths = inside.sum(1)
    return widths[0] > 0.5 * widths[round(0.05 * (len(widths) - 1))]


@dataclass(frozen=True, kw_only=True)
class _Shading:
    """Maps [H, W] of a breast with the chest wall on the left.

    Attributes:
        gray: smoothed gray values.
        fall_x, fall_y: decrease of ``gray`` along x and y, in units of the breast's root-mean-square gradient; zero
            near the skin.
        deep: bool, pixels away from the skin, where the gradient counts.
    """

    gray: np.ndarray
    fall_x: np.ndarray
    fall_y: np.ndarray
    deep: np.ndarray

    @classmethod
    def of(cls, small: np.ndarray, inside: np.ndarray) -> "_Shading":
        sigma = _BLUR * len(small)
        # Smoothed within the breast only, so that the air causes no gradient.
        weight = ndimage.gaussian_filter(inside.astype(np.float32), sigma, mode="nearest")
        gray = ndimage.gaussian_filter(np.where(inside, small, 0), sigma, mode="nearest") / np.maximum(weight, 1e-3)
        deep = ndimage.binary_erosion(inside, iterations=max(1, round(_SKIN * len(small))), border_value=1)
        slope_y, slope_x = np.gradient(np.pad(gray, 1, mode="edge"))
        slope_y, slope_x = slope_y[1:-1, 1:-1] * deep, slope_x[1:-1, 1:-1] * deep
        scale = np.sqrt((slope_x**2 + slope_y**2).sum() / max(1, deep.sum())) + 1e-6
        return cls(gray=gray, fall_x=-slope_x / scale, fall_y=-slope_y / scale, deep=deep)


@dataclass(frozen=True, kw_only=True)
class _Line:
    """A line from (``top``, 0) on the upper edge to (0, ``tip``) on the chest wall, in pixels, and its score."""

    top: float
    tip: float
    score: float

    @property
    def normal(self) -> tuple[float, float]:
        """The unit vector (x, y) that points away from the muscle."""
        length = np.hypot(self.top, self.tip)
        return self.tip / length, self.top / length


def _strongest_line(field: _Shading) -> _Line | None:
    """The line with the largest score: mean fall across it times the square root of its length in breast heights.

    None in too small a breast.
    """
    height, width = field.gray.shape
    tops = np.arange(0.06, min(width / height, 0.75), 0.012) * height
    top, angle = (grid.ravel() for grid in np.meshgrid(tops, _ANGLES, indexing="ij"))
    tip = top / np.tan(angle)
    possible = (0.15 * height < tip) & (tip < 1.15 * height)
    top, tip, angle = top[possible, None], tip[possible, None], angle[possible, None]
    if height < _SMALLEST or not len(top):
        return None
    along = np.linspace(0.02, 0.98, _LINE_SAMPLES)
    y, x = np.rint(along * tip).astype(int), np.rint((1 - along) * top).astype(int)
    seen = (y < height) & (x < width)
    y, x = np.minimum(y, height - 1), np.minimum(x, width - 1)
    seen &= field.deep[y, x]
    # Clipped, so that a single bright speck does not make a line.
    fall = np.clip(field.fall_x[y, x] * np.cos(angle) + field.fall_y[y, x] * np.sin(angle), -1.5, 1.5) * seen
    share = seen.mean(1)
    length = share * np.hypot(top, tip)[:, 0] / height
    score = np.where(share > 0.5, fall.mean(1) / np.maximum(share, 1e-6) * np.sqrt(length), -np.inf)
    best = int(np.argmax(score))
    return _Line(top=float(top[best, 0]), tip=float(tip[best, 0]), score=float(score[best]))


def _border(field: _Shading, line: _Line) -> np.ndarray:
    """The end of the muscle in each row, in pixels from the chest wall; one entry per row that has muscle.

    Dynamic programming over offsets from the line: the fall across the line is the gain; steps aside and the distance
    from the line are costs.
    """
    height, width = field.gray.shape
    rows = np.arange(min(height, round(1.15 * line.tip)))  # a bulging muscle ends below the line
    half = max(2, round(_BAND * height))
    offsets = np.arange(-half, half + 1)
    straight = line.top * (1 - rows / line.tip)
    x = straight[:, None] + offsets
    across = field.fall_x * line.normal[0] + field.fall_y * line.normal[1]
    gain = ndimage.map_coordinates(across, [np.broadcast_to(rows[:, None], x.shape), x], order=1, mode="constant")
    gain = np.where((x >= 0) & (x < width), np.clip(gain, -1, 2) - 0.3 * (offsets / half) ** 2, 0)
    border = straight + offsets[_best_path(gain, step_cost=0.5)]
    ended = np.flatnonzero(border <= 0)
    return border[: ended[0]] if len(ended) else border


def _best_path(gain: np.ndarray, step_cost: float) -> np.ndarray:
    """The path with the largest sum of ``gain`` [N, K]: one column per row, at most one apart in neighboring rows."""
    total, came = gain[0], np.zeros(gain.shape, int)
    for row in range(1, len(gain)):
        padded = np.pad(total, 1, constant_values=-np.inf)
        choices = np.stack([total, padded[:-2] - step_cost, padded[2:] - step_cost])
        choice = np.argmax(choices, 0)
        came[row] = np.array([0, -1, 1])[choice]
        total = choices.max(0) + gain[row]
    path = np.empty(len(gain), int)
    path[-1] = np.argmax(total)
    for row in range(len(gain) - 1, 0, -1):
        path[row - 1] = path[row] + came[row, path[row]]
    return path


def _stands_out(field: _Shading, line: _Line, border: np.ndarray) -> bool:
    """Whether the border is that of a muscle: clear, mostly falling, and brighter on the muscle's side."""
    rows = np.arange(len(border))
    counts = ndimage.map_coordinates(field.deep.astype(np.float32), [rows, border], order=0, mode="nearest") > 0
    if not counts.any():
        return False
    (nx, ny), reach = line.normal, 0.03 * len(field.gray)

    def at(image: np.ndarray, distance: float) -> np.ndarray:
        x, y = np.maximum(border + distance * nx, 0), np.maximum(rows + distance * ny, 0)
        return ndimage.map_coordinates(image, [y, x], order=1, mode="nearest")[counts]

    falling = at(field.fall_x * nx + field.fall_y * ny, 0) > 0.15
    contrast = np.median(at(field.gray, -reach) - at(field.gray, reach))
    return line.score >= _FAINTEST and falling.mean() >= 0.45 and contrast > 0
