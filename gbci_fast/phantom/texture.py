"""Fibroglandular tissue: a 1/f^beta random field, stretched toward the nipple, thresholded to a fat fraction."""

import math
from dataclasses import dataclass

import numpy as np
from scipy import fft

from gbci_fast.phantom.anatomy import Anatomy, BreastShape, Grid

STRETCH = 1.35  # factor along the ducts; its inverse across
SOFTNESS = 0.8  # width of the border between fat and gland, in standard deviations of the field
DENSEST = 0.9  # glandular share of the densest column of tissue
VESSEL_BETA = 4.5  # smooth enough for its zero crossings to be lines
FAN = (-math.pi / 4.5, 0.0, math.pi / 4.5)  # the duct directions that are blended


@dataclass(frozen=True)
class Tissue:
    """Maps [H, W] of the tissue.

    Attributes:
        share: glandular share of the interior, in [0, 1]: `share_of` (``texture``, ``offset``) plus a few vessels.
        texture: random field of unit variance.
        offset: what is added to ``texture`` before the threshold.
    """

    share: np.ndarray
    texture: np.ndarray
    offset: np.ndarray


def power_law_field(rng: np.random.Generator, grid: Grid, beta: float, angles: tuple[float, ...]) -> list[np.ndarray]:
    """Random fields [H, W] with power spectrum 1/f^beta, one per angle (radians from x) along which it is stretched.

    The fields have zero mean and unit variance. All are shaped from the same white noise, so that blending them loses
    no variance.
    """
    shape = (grid.height, grid.width // 2 + 1)
    noise = rng.standard_normal((2, *shape), dtype=np.float32)
    spectrum = noise[0] + 1j * noise[1]
    fy = fft.fftfreq(grid.height, grid.spacing).astype(np.float32)[:, None]
    fx = fft.rfftfreq(grid.width, grid.spacing).astype(np.float32)[None, :]
    fields = []
    for angle in angles:
        along = STRETCH * (fx * np.float32(np.cos(angle)) + fy * np.float32(np.sin(angle)))
        across = (fy * np.float32(np.cos(angle)) - fx * np.float32(np.sin(angle))) / STRETCH
        squared = along**2 + across**2
        squared[0, 0] = np.inf
        field = fft.irfft2(spectrum * squared ** np.float32(-beta / 4), s=(grid.height, grid.width))
        fields.append(field / field.std())
    return fields


def glandular_map(
    rng: np.random.Generator, shape: BreastShape, anatomy: Anatomy, grid: Grid, *, beta: float, fat_fraction: float
) -> Tissue:
    """The glandular share of the interior under each pixel.

    Its mean over the breast, weighted by thickness, is ``1 - fat_fraction`` (vessels apart). Fat gathers under the
    skin, in front of the chest wall and away from the nipple line.
    """
    texture = _toward_nipple(power_law_field(rng, grid, beta, FAN), shape, grid)
    semi_axis = np.where(anatomy.nipple_line_distance < 0, min(shape.upper, shape.depth), shape.lower)
    place = -2.5 * np.exp(-((anatomy.inside / 9) ** 2)) - 2.0 * np.exp(-((grid.x / 14) ** 2))
    place -= 3.0 * (anatomy.nipple_line_distance / semi_axis.astype(np.float32)) ** 2
    interior = anatomy.thickness - anatomy.skin - anatomy.muscle
    step = max(1, grid.height // 256)
    level = threshold(*(a[::step, ::step] for a in (texture, place, interior)), 1 - fat_fraction)
    vessels = np.exp(-((_toward_nipple(power_law_field(rng, grid, VESSEL_BETA, FAN), shape, grid) / 0.08) ** 2))
    vessels *= np.clip((texture + place) / 3 + 4 / 3, 0, 1)
    offset = place - np.float32(level)
    return Tissue(np.clip(share_of(texture, offset) + 0.12 * vessels, 0, 1), texture, offset)


def share_of(texture: np.ndarray, offset: np.ndarray) -> np.ndarray:
    """Glandular share by a soft threshold of ``texture + offset``; the texture stays visible where it saturates."""
    return _logistic((texture + offset) / SOFTNESS) * (DENSEST + 0.06 * texture)


def _toward_nipple(fields: list[np.ndarray], shape: BreastShape, grid: Grid) -> np.ndarray:
    """Blends the stretched fields so that the strands at each pixel point to the nipple."""
    behind = np.maximum(shape.depth - grid.x, 0) + 20  # toward 20 mm beyond the nipple: strands do not meet in a point
    angle = np.clip(np.arctan2(shape.nipple_y - grid.y, behind), FAN[0], FAN[-1])
    position = (angle - FAN[0]) / (FAN[1] - FAN[0])
    return sum(field * np.maximum(1 - np.abs(position - i), 0) for i, field in enumerate(fields))


def threshold(texture: np.ndarray, place: np.ndarray, weight: np.ndarray, target: float) -> float:
    """The threshold at which the weighted mean of the glandular share is ``target`` (bisection)."""
    low, high = -10.0, 10.0
    weight = weight / weight.sum()
    for _ in range(20):
        middle = (low + high) / 2
        low, high = (middle, high) if (weight * share_of(texture, place - middle)).sum() > target else (low, middle)
    return (low + high) / 2


def _logistic(value: np.ndarray) -> np.ndarray:
    return 0.5 + 0.5 * np.tanh(value / 2)
