"""The breast in one view as a compressed slab: outline, thickness, skin, nipple and pectoral muscle, in mm.

Every breast is drawn as a left one (chest wall at the left edge); images of right breasts are mirrored at the end.
"""

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from gbci_fast.phantom.bodies import VIEW_AXES

FIELD_HEIGHT = 240.0  # mm from the top to the bottom edge of every image
SKIN_THICKNESS = 0.75  # mm
NIPPLE_RADIUS = 5.0  # mm


@dataclass(frozen=True)
class Grid:
    """Pixel centers in mm: x from the chest wall, y from the middle of the image, downward."""

    height: int
    width: int

    @property
    def spacing(self) -> float:
        return FIELD_HEIGHT / self.height

    @cached_property
    def x(self) -> np.ndarray:  # [1, W]
        return ((np.arange(self.width, dtype=np.float32) + 0.5) * self.spacing)[None, :]

    @cached_property
    def y(self) -> np.ndarray:  # [H, 1]
        return ((np.arange(self.height, dtype=np.float32) + 0.5) * self.spacing - FIELD_HEIGHT / 2)[:, None]


@dataclass(frozen=True, kw_only=True)
class BreastShape:
    """The shape of one breast in one view; lengths in mm.

    The outline is a superellipse around the nipple line.

    Attributes:
        depth: distance from chest wall to nipple.
        upper, lower: semi-axes of the outline above and below the nipple line.
        exponent: exponent of the superellipse.
        nipple_y: y of the nipple, from the middle of the image downward.
        droop: how far the nipple line sinks from the chest wall to the nipple.
        waves: (amplitude relative to ``depth``, cycles per 100 mm, phase) of the outline's undulations.
        thickness: thickness of the compressed breast.
        pectoral: width of the muscle at the top edge, and its length down the chest wall; None in CC.
    """

    depth: float
    upper: float
    lower: float
    exponent: float
    nipple_y: float
    droop: float
    waves: tuple[tuple[float, float, float], ...]
    thickness: float
    pectoral: tuple[float, float] | None

    def nipple_line(self, x: np.ndarray | float) -> np.ndarray | float:
        """y of the nipple line at ``x`` mm from the chest wall."""
        return self.nipple_y + self.droop * ((x / self.depth) ** 2 - 1)

    def outline(self, x: np.ndarray, v: np.ndarray) -> np.ndarray:
        """A function that is positive inside the outline (without the nipple).

        Args:
            x: mm from the chest wall.
            v: mm below the nipple line; broadcasts with ``x``.
        """
        reach = np.full_like(v, self.depth)
        for amplitude, cycles, phase in self.waves:
            reach += self.depth * amplitude * np.cos(2 * np.pi * cycles / 100 * v + phase)
        semi_axis = np.where(v < 0, np.float32(self.upper), np.float32(self.lower))
        return 1 - ((x / reach) ** self.exponent + (np.abs(v) / semi_axis) ** self.exponent) ** (1 / self.exponent)

    def rim(self, v: float) -> tuple[float, float]:
        """The point (x, y) of the skin at ``v`` mm below the nipple line."""
        x = np.arange(0, 1.2 * self.depth, 0.05)
        inside = np.flatnonzero(self.outline(x, np.full_like(x, v)) > 0)
        rim = float(x[inside[-1]]) if len(inside) else 0.0
        return rim, float(self.nipple_line(rim) + v)

    def point(self, center: tuple[float, float, float], view: str) -> tuple[float, float]:
        """The point (x, y) at which a view shows ``center``: (behind, lateral, above) in mm from the nipple."""
        behind, lateral, above = center
        x = self.depth - behind
        _, down_of_lateral, down_of_above = VIEW_AXES[view][1]
        return x, self.nipple_line(x) + down_of_lateral * lateral + down_of_above * above


@dataclass(frozen=True, kw_only=True)
class Anatomy:
    """Maps [H, W] of one view in mm.

    Attributes:
        inside: signed distance to the outline, positive inside.
        without_nipple: the same without the nipple.
        thickness, skin, muscle: path lengths of the X-rays through the breast, its skin and its pectoral muscle.
        nipple_line_distance: distance below the nipple line.
    """

    inside: np.ndarray
    without_nipple: np.ndarray
    thickness: np.ndarray
    skin: np.ndarray
    muscle: np.ndarray
    nipple_line_distance: np.ndarray


def draw_shape(rng: np.random.Generator, *, view_position: str, depth: float, thickness: float) -> BreastShape:
    """Draws a plausible shape of a breast ``depth`` mm deep (CC: half a disc; MLO: hanging from the axilla)."""
    waves = tuple((rng.uniform(0.004, 0.012), rng.uniform(0.4, 1.6), rng.uniform(0, 2 * np.pi)) for _ in range(3))
    if view_position == "CC":
        half = min(depth * rng.uniform(0.95, 1.1), 105)
        return BreastShape(
            depth=depth,
            upper=half,
            lower=half * rng.uniform(0.9, 1.1),
            exponent=rng.uniform(2.0, 2.3),
            nipple_y=rng.uniform(-8, 8),
            droop=rng.uniform(-6, 6),
            waves=waves,
            thickness=thickness,
            pectoral=None,
        )
    return BreastShape(
        depth=depth * rng.uniform(0.95, 1.05),
        upper=depth * rng.uniform(1.75, 2.0),
        lower=depth * rng.uniform(0.75, 0.85),
        exponent=rng.uniform(2.0, 2.2),
        nipple_y=rng.uniform(20, 32),
        droop=rng.uniform(8, 18),
        waves=waves,
        thickness=thickness,
        pectoral=(rng.uniform(40, 60), rng.uniform(120, 165)),
    )


def map_anatomy(shape: BreastShape, grid: Grid) -> Anatomy:
    """Rasterizes the shape. The rim of the slab is a half circle with its thickness as diameter."""
    v = grid.y - shape.nipple_line(grid.x)  # [H, W] distance below the nipple line
    without_nipple = np.maximum(_outline_depth(shape, grid, v), -FIELD_HEIGHT)
    nipple = NIPPLE_RADIUS - np.hypot(grid.x - shape.depth + 1.5, v)
    inside = _smooth_maximum(without_nipple, nipple, 3.0)
    thickness = chord(inside, shape.thickness)
    skin = thickness - chord(inside - SKIN_THICKNESS, shape.thickness - 2 * SKIN_THICKNESS)
    muscle = np.zeros_like(inside) if shape.pectoral is None else _pectoral_path(shape, grid, thickness - skin)
    return Anatomy(
        inside=inside,
        without_nipple=without_nipple,
        thickness=thickness,
        skin=skin,
        muscle=muscle,
        nipple_line_distance=v,
    )


def _outline_depth(shape: BreastShape, grid: Grid, v: np.ndarray) -> np.ndarray:
    """First-order signed distance to the outline, f / |grad f|, which is exact at the edge."""
    f = shape.outline(grid.x, v)
    slope_y, slope_x = np.gradient(f, np.float32(grid.spacing))
    return f / np.maximum(np.hypot(slope_x, slope_y), 1e-4)


def _pectoral_path(shape: BreastShape, grid: Grid, interior: np.ndarray) -> np.ndarray:
    """Path length through the muscle: a triangle in the upper corner, thinner toward its slightly bulging border."""
    width, length = shape.pectoral
    down = (grid.y + FIELD_HEIGHT / 2) / length  # 0 at the top edge, 1 at the tip
    border = width * (1 - down + 0.35 * down * (1 - down))
    depth = np.maximum((border - grid.x) * length / math.hypot(width, length), 0)
    return interior * 0.5 * (1 - np.exp(-depth / 9))


def chord(depth: np.ndarray, thickness: float | np.floating | np.ndarray) -> np.ndarray:
    """Path length in mm through a slab whose rim is a half circle, at ``depth`` mm from the rim."""
    depth = np.clip(depth, 0, thickness / 2)
    return 2 * np.sqrt(depth * (thickness - depth))


def _smooth_maximum(a: np.ndarray, b: np.ndarray, radius: float) -> np.ndarray:
    blend = np.maximum(radius - np.abs(a - b), 0) / radius
    return np.maximum(a, b) + blend**2 * np.float32(radius / 4)
