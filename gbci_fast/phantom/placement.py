"""Places of lesions in the breast: one place in three dimensions that suits both views.

A place is (behind, lateral, above): mm behind the nipple, toward the side of the body, and above the nipple.
Compression is assumed to move no tissue: CC shows (behind, lateral), MLO shows (behind, lateral and above mixed at 45
degrees).
"""

import numpy as np
from scipy import ndimage

from gbci_fast.phantom.anatomy import FIELD_HEIGHT, BreastShape, Grid, map_anatomy

Place = tuple[float, float, float]

SKIN_MARGIN = 3.0  # mm: distance of lesions from the outline
_CELLS = 120  # cells per side of the map of free tissue: 2 mm each, for every image size
_TRIES = 400


class Room:
    """The free tissue of one breast; ``shapes`` holds its shape in each view."""

    def __init__(self, shapes: dict[str, BreastShape]):
        self.shapes = shapes
        self._clearance = {view: _clearance(shape) for view, shape in shapes.items()}

    def clearance(self, place: Place, view: str) -> float:
        """Distance in mm from the place, as the view shows it, to skin, muscle or the image's edge; 0 outside.

        If the place's coordinates are arrays, the result is an array.
        """
        return _look_up(self._clearance[view], *self.shapes[view].point(place, view))

    def in_tissue(self, rng: np.random.Generator, reach: float) -> Place:
        """Draws a place with ``reach`` mm of free tissue around it in both views, or else the roomiest of many.

        Half of all places are in the upper outer quadrant, as with real cancers.
        """
        depth = self.shapes["CC"].depth
        places = np.stack([rng.uniform(0.2, 0.75, _TRIES) * depth, *rng.normal(12, 25, (2, _TRIES))])
        slack = np.min([self.clearance(tuple(places), view) for view in self.shapes], axis=0) - reach
        first = np.argmax(slack >= 0) if (slack >= 0).any() else np.argmax(slack)
        behind, lateral, above = places[:, first].tolist()
        return behind, lateral, above

    def in_axilla(self, rng: np.random.Generator, reach: float) -> Place:
        """Draws a place that MLO shows near the top, over the border of the muscle, and CC does not show."""
        shape = self.shapes["MLO"]
        width, length = shape.pectoral
        down = reach + 3 + rng.uniform(0, max(1.0, 0.35 * length - reach))
        x = max(reach + 2, width * (1 - down / length) + rng.uniform(-0.5, 0.4) * reach)
        height = (shape.nipple_line(x) - (down - FIELD_HEIGHT / 2)) * np.sqrt(2)  # lateral + above
        lateral = max(0.5 * height, self.shapes["CC"].upper + reach)  # beyond the edge of the CC
        return shape.depth - x, float(lateral), float(height - lateral)

    def on_skin(self, rng: np.random.Generator, toward: Place | None = None) -> Place:
        """A place on the skin: over the place ``toward``, or drawn beside the nipple.

        ``behind`` is 0; each view has its own point on the skin (`skin_point`).
        """
        if toward is not None:
            return (0.0, *toward[1:])
        side = rng.choice([-1.0, 1.0])
        # Upper outer or lower inner, so that the place is beside the nipple in both views.
        return 0.0, float(side * rng.uniform(22, 42)), float(side * rng.uniform(5, 25))


def skin_point(shape: BreastShape, place: Place, view: str) -> tuple[float, float]:
    """The point (x, y) of the outline at which a view shows a place on the skin."""
    _, y = shape.point((0.0, *place[1:]), view)
    down = float(np.clip(y - shape.nipple_y, -0.7 * shape.depth, 0.75 * shape.lower))
    return shape.rim(down)


def _clearance(shape: BreastShape) -> np.ndarray:
    """Distance in mm of each cell to the nearest cell that is not free, [_CELLS, _CELLS]."""
    anatomy = map_anatomy(shape, Grid(_CELLS, _CELLS))
    free = np.pad((anatomy.inside > SKIN_MARGIN) & (anatomy.muscle == 0), 1)
    return ndimage.distance_transform_edt(free)[1:-1, 1:-1] * (FIELD_HEIGHT / _CELLS)


def _look_up(clearance: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    row, column = (np.floor(mm * (_CELLS / FIELD_HEIGHT)).astype(int) for mm in (y + FIELD_HEIGHT / 2, np.asarray(x)))
    inside = (np.clip(row, 0, _CELLS - 1) == row) & (np.clip(column, 0, _CELLS - 1) == column)
    return np.where(inside, clearance[np.clip(row, 0, _CELLS - 1), np.clip(column, 0, _CELLS - 1)], 0.0)
