"""What is measured on a lesion: spiculation, irregularity, edge, contrast and fine detail; its place and its size.

All are measured the same way on real and on painted lesions, from the pixels of the mask and of the ring around it.
"""

from collections.abc import Sequence
from functools import cached_property

import numpy as np
from scipy import ndimage
from skimage.measure import label, regionprops

from gbci_fast.data.boxes import bounding_box
from gbci_fast.evaluate.lesions import LesionCase
from gbci_fast.evaluate.metrics import RING

MEASURES = ("spiculation", "irregularity", "edge_rise", "contrast", "fine_band")
BLOB = ("row", "column", "diameter")
MEASURED = (*MEASURES, *BLOB)

FAINTEST = 0.02  # of the gray scale: a lesion less bright than this has no edge, no outline and no place
SMALLEST_BLOB = 4  # pixels
PEAK = 0.9  # quantile of a lesion's pixels that stands for its brightness
RIDGE_DEPTH, EDGE_DEPTH = 4, 2.5  # pixels by which the rim reaches into the lesion
RIDGE_SIGMA, OUTLINE_SIGMA, EDGE_SIGMA, FINE_SIGMA = 0.7, 0.7, 1.0, 1.0  # of Gaussians, pixels
MARGIN = max(RING) + 4  # pixels around the mask's box that the filters see
TINY = 1e-9


def measure(cases: Sequence[LesionCase], images: Sequence[np.ndarray] | None = None) -> np.ndarray:
    """`MEASURED` of every lesion, float64 [N, len(MEASURED)]; NaN where the lesion is too faint to have the quantity.

    Args:
        cases: the lesions.
        images: float32 [S, S] in [0, 1], one per case; None = the cases' own.
    """
    images = [case.pixels for case in cases] if images is None else images
    found = [_Geometry(case).measure(image) for case, image in zip(cases, images, strict=True)]
    return np.array(found).reshape(len(cases), len(MEASURED))


class _Geometry:
    """The geometry of a lesion's place, and the measures of an image there.

    - ``spiculation``: ln of the energy of bright ridges that run along the radius over the energy of those that run
      across it, in the rim. A ridge's strength is the negative second derivative across it (Gaussian derivatives);
      the radius starts at the lesion's center. 0 = no preferred direction.
    - ``irregularity``: 1 minus solidity (area over that of the convex hull) of the bright blob.
    - ``edge_rise``: ln of the root mean square of the radial derivative in the rim over the lesion's brightness, per
      pixel.
    - ``contrast``: mean of the lesion minus mean of the ring around the mask, in units of the gray scale.
    - ``fine_band``: ln of the standard deviation of the detail finer than a Gaussian of one pixel, under the mask over
      that in the ring.
    - ``row``, ``column``, ``diameter``: center of the bright blob, and diameter of a disk of its area, in pixels.

    The blob is what is brighter than halfway between ring and lesion, in one piece that overlaps the lesion most. The
    rim is the mask without the lesion's core.
    """

    def __init__(self, case: LesionCase):
        xmin, ymin, xmax, ymax = bounding_box(case.mask)
        self.window = (slice(max(0, ymin - MARGIN), ymax + MARGIN), slice(max(0, xmin - MARGIN), xmax + MARGIN))
        self.mask, self.breast = case.mask[self.window], case.breast[self.window]
        self.lesion = case.lesion[self.window]

    def measure(self, image: np.ndarray) -> np.ndarray:
        """`MEASURED` of an image [S, S] in [0, 1], float64; NaN where the lesion is too faint."""
        x = image[self.window].astype(np.float64)
        around = float(x[self._ring].mean())
        height = float(np.quantile(ndimage.gaussian_filter(x, EDGE_SIGMA)[self.lesion], PEAK)) - around
        irregularity, *blob = self._blob(x, around, height)
        found = {
            "spiculation": self._spiculation(x),
            "irregularity": irregularity,
            "edge_rise": float(np.log(self._slope(x) / height)) if height > FAINTEST else np.nan,
            "contrast": float(x[self.lesion].mean()) - around,
            "fine_band": self._fine_band(x),
        }
        found |= zip(BLOB, blob, strict=True)
        return np.array([found[name] for name in MEASURED])

    def _spiculation(self, x: np.ndarray) -> float:
        yy, xx, xy = (ndimage.gaussian_filter(x, RIDGE_SIGMA, order=order) for order in ((2, 0), (0, 2), (1, 1)))
        dy, dx = self._radius
        rim = self._rim(RIDGE_DEPTH)
        along = yy * dx**2 + xx * dy**2 - 2 * xy * dy * dx  # the curvature across a ridge that runs along the radius
        across = yy * dy**2 + xx * dx**2 + 2 * xy * dy * dx
        energies = [float((np.clip(-part, 0, None)[rim] ** 2).mean()) for part in (along, across)]
        return float(np.log((energies[0] + TINY) / (energies[1] + TINY)))

    def _slope(self, x: np.ndarray) -> float:
        """The root mean square of the radial derivative in the rim, per pixel; never 0."""
        dy, dx = self._radius
        slope = dy * ndimage.gaussian_filter(x, EDGE_SIGMA, order=(1, 0))
        slope += dx * ndimage.gaussian_filter(x, EDGE_SIGMA, order=(0, 1))
        return float(np.sqrt((slope[self._rim(EDGE_DEPTH)] ** 2).mean() + TINY**2))

    def _fine_band(self, x: np.ndarray) -> float:
        fine = x - ndimage.gaussian_filter(x, FINE_SIGMA)
        return float(np.log((fine[self.mask].std() + TINY) / (fine[self._ring].std() + TINY)))

    def _blob(self, x: np.ndarray, around: float, height: float) -> tuple[float, float, float, float]:
        """Irregularity, row, column and diameter of the bright blob; NaN without one."""
        none = (np.nan, np.nan, np.nan, np.nan)
        if height <= FAINTEST:
            return none
        pieces = label((ndimage.gaussian_filter(x, OUTLINE_SIGMA) > around + height / 2) & self.mask, connectivity=1)
        overlaps = np.bincount(pieces[self.lesion], minlength=2)[1:]
        if not overlaps.any():
            return none
        blob = ndimage.binary_fill_holes(np.equal(pieces, 1 + overlaps.argmax()))
        (region,) = regionprops(blob.astype(np.uint8))
        if region.area < SMALLEST_BLOB:
            return none
        row, column = (c + s.start for c, s in zip(region.centroid, self.window, strict=True))
        return 1 - region.solidity, row, column, region.equivalent_diameter_area

    def _rim(self, depth: float) -> np.ndarray:
        """The mask's pixels that lie at most `depth` pixels inside of the lesion's outline, bool [H, W]."""
        return self.mask & (self._depth < depth)

    @cached_property
    def _depth(self) -> np.ndarray:
        return ndimage.distance_transform_edt(np.pad(self.lesion, 1))[1:-1, 1:-1]

    @cached_property
    def _ring(self) -> np.ndarray:
        distance = ndimage.distance_transform_edt(~self.mask)
        ring = (distance >= RING[0]) & (distance <= RING[1]) & self.breast
        return ring if ring.any() else ~self.mask

    @cached_property
    def _radius(self) -> tuple[np.ndarray, np.ndarray]:
        """Row and column of the unit vector from the lesion's center to every pixel; 0 at the center itself."""
        center = ndimage.center_of_mass(self.lesion)
        dy, dx = (axis - c for axis, c in zip(np.indices(self.mask.shape), center, strict=True))
        length = np.maximum(np.hypot(dy, dx), TINY)
        return dy / length, dx / length
