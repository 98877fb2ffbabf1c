"""What a judge of realism sees of a lesion: its surroundings whole, the inside of its mask, or the ring around it.

Nothing is resampled, because fine detail is what tells a painted lesion from a real one.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy import ndimage

from gbci_fast.data.boxes import bounding_box
from gbci_fast.evaluate.lesions import LesionCase

Region = Literal["whole", "interior", "ring"]

REGIONS: tuple[Region, ...] = ("whole", "interior", "ring")
ERODED = 3  # pixels; the mask is the lesion grown by as many
FEWEST = 25  # pixels of an interior, where the mask has as many
MARGIN = 24  # pixels around the mask's box
RIM, AROUND = 2.0, 10.0  # largest distance from the mask's outline, in pixels


@dataclass(frozen=True, kw_only=True, eq=False)
class Place:
    """Where a lesion lies: a rectangle of the model image, and masks in it, bool [H, W] each.

    Attributes:
        top, left: of the rectangle in the model image.
        mask: the painted pixels.
        core: the interior, the mask without its outermost `ERODED` pixels.
        rim: pixels within `RIM` of the mask's outline, on both sides.
        around: pixels of the breast between `RIM` and `AROUND` outside of the mask.
    """

    top: int
    left: int
    mask: np.ndarray
    core: np.ndarray
    rim: np.ndarray
    around: np.ndarray

    @classmethod
    def of(cls, case: LesionCase) -> "Place":
        xmin, ymin, xmax, ymax = bounding_box(case.mask)
        height, width = case.mask.shape
        top, left = max(ymin - MARGIN, 0), max(xmin - MARGIN, 0)
        cut = np.s_[top : min(ymax + MARGIN, height), left : min(xmax + MARGIN, width)]
        mask, breast = case.mask[cut], case.breast[cut]
        inside, outside = depth_of(mask), ndimage.distance_transform_edt(~mask)
        around = (outside > RIM) & (outside <= AROUND)
        return cls(
            top=top,
            left=left,
            mask=mask,
            core=core_of(inside),
            rim=(inside <= RIM) & (outside <= RIM),
            around=around & breast if (around & breast).any() else around,
        )

    def cut(self, image: np.ndarray) -> np.ndarray:
        """The rectangle of an image [S, S]."""
        return image[self.top : self.top + self.mask.shape[0], self.left : self.left + self.mask.shape[1]]

    def seen(self, region: Region) -> np.ndarray:
        """The pixels that a region shows, bool [H, W]."""
        return {"whole": np.ones_like(self.mask), "interior": self.core, "ring": ~self.core}[region]

    def show(self, image: np.ndarray, region: Region) -> np.ndarray:
        """An image [S, S] in which all that the region does not show is flat, at the mean of what it shows nearby."""
        if region == "whole":
            return image
        seen, pixels = self.seen(region), self.cut(image)
        nearby = self.core if region == "interior" else seen & (ndimage.distance_transform_edt(seen) <= ERODED)
        mean = pixels[nearby].mean()
        shown = np.full_like(image, mean) if region == "interior" else image.copy()
        self.cut(shown)[...] = np.where(seen, pixels, mean)
        return shown


def depth_of(mask: np.ndarray) -> np.ndarray:
    """The distance of every pixel of a mask to the nearest pixel outside; the rectangle's edge is inside, [H, W]."""
    return ndimage.distance_transform_edt(mask)


def core_of(depth: np.ndarray) -> np.ndarray:
    """The pixels deeper than `ERODED`; fewer are eroded where less than `FEWEST` would stay, bool [H, W]."""
    for eroded in range(ERODED, 0, -1):
        if (depth > eroded).sum() >= FEWEST:
            return depth > eroded
    return depth > 0
