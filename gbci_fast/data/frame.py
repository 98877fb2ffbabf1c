"""The affine between native pixels and model space, and resampling in both directions.

Coordinates are continuous with pixel *i* covering ``[i, i + 1)``; boxes are half-open ``(xmin, ymin, xmax, ymax)``.
Model space is a square image whose chest wall lies on the left.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from gbci_fast.choices import MODEL_SIZE
from gbci_fast.data.boxes import Box, bounding_box
from gbci_fast.data.segmentation import chest_wall_side
from gbci_fast.errors import GBCIError


@dataclass(frozen=True, kw_only=True)
class Frame:
    """An axis-aligned affine between a native image and the model's square image.

    The native box ``[x0, x1) x [y0, y1)`` is flipped left-right if ``flip`` is set, resampled to ``width x height`` and
    placed at ``(left, top)`` of a ``size x size`` image of zeros. The box may reach outside the image, which is
    continued by zeros.
    """

    x0: int
    y0: int
    x1: int
    y1: int
    flip: bool
    width: int
    height: int
    left: int
    top: int
    size: int

    @property
    def scale(self) -> tuple[float, float]:
        """Model pixels per native pixel along x and y (equal up to the rounding of `width` and `height`)."""
        return self.width / (self.x1 - self.x0), self.height / (self.y1 - self.y0)

    def model_spacing(self, spacing: tuple[float, float] | None) -> float | None:
        """Millimeters per model pixel, from the native (row, column) spacing."""
        return None if spacing is None else float(spacing[0] / self.scale[1])

    def box_to_model(self, box: Box) -> Box:
        """A native box in model coordinates."""
        (sx, sy), (xmin, ymin, xmax, ymax) = self.scale, box
        if self.flip:
            xmin, xmax = self.x0 + self.x1 - xmax, self.x0 + self.x1 - xmin
        return (
            self.left + (xmin - self.x0) * sx,
            self.top + (ymin - self.y0) * sy,
            self.left + (xmax - self.x0) * sx,
            self.top + (ymax - self.y0) * sy,
        )

    def box_to_native(self, box: Box) -> Box:
        """A model box in native coordinates: the inverse of `box_to_model`."""
        (sx, sy), (xmin, ymin, xmax, ymax) = self.scale, box
        xmin, xmax = self.x0 + (xmin - self.left) / sx, self.x0 + (xmax - self.left) / sx
        if self.flip:
            xmin, xmax = self.x0 + self.x1 - xmax, self.x0 + self.x1 - xmin
        return (xmin, self.y0 + (ymin - self.top) / sy, xmax, self.y0 + (ymax - self.top) / sy)

    def to_model(self, image: np.ndarray) -> np.ndarray:
        """Resamples a native image [H, W] (float or bool) to model space, float32 [size, size], anti-aliased."""
        height, width = image.shape
        crop = np.zeros((self.y1 - self.y0, self.x1 - self.x0), np.float32)
        ys, xs = slice(max(self.y0, 0), min(self.y1, height)), slice(max(self.x0, 0), min(self.x1, width))
        if ys.start < ys.stop and xs.start < xs.stop:
            crop[ys.start - self.y0 : ys.stop - self.y0, xs.start - self.x0 : xs.stop - self.x0] = image[ys, xs]
        if self.flip:
            crop = crop[:, ::-1].copy()
        resized = F.interpolate(
            torch.from_numpy(crop)[None, None], (self.height, self.width), mode="bilinear", antialias=True
        )
        out = np.zeros((self.size, self.size), np.float32)
        out[self.top : self.top + self.height, self.left : self.left + self.width] = resized[0, 0].numpy()
        return out

    def to_native(self, image: np.ndarray, window: tuple[int, int, int, int], mode: str = "bicubic") -> np.ndarray:
        """Resamples a model image [size, size] onto the native pixels of `window` (xmin, ymin, xmax, ymax).

        Returns float32 [ymax - ymin, xmax - xmin]; outside the frame the nearest model pixel is repeated.
        """
        xmin, ymin, xmax, ymax = window
        (sx, sy) = self.scale
        x = np.arange(xmin, xmax, dtype=np.float64) + 0.5
        if self.flip:
            x = self.x0 + self.x1 - x
        x = self.left + (x - self.x0) * sx
        y = self.top + (np.arange(ymin, ymax, dtype=np.float64) + 0.5 - self.y0) * sy
        grid = np.stack(np.meshgrid(2 * x / self.size - 1, 2 * y / self.size - 1), -1).astype(np.float32)
        source = torch.from_numpy(np.array(image, np.float32))[None, None]
        sampled = F.grid_sample(
            source, torch.from_numpy(grid)[None], mode=mode, padding_mode="border", align_corners=False
        )
        return sampled[0, 0].numpy()


def whole_breast_frame(mask: np.ndarray, size: int = MODEL_SIZE) -> Frame:
    """The frame of the whole breast: crop with a margin of 2 %, chest wall flipped to the left, fitted and padded.

    Args:
        mask: the breast, bool [H, W].
        size: side of the model image in pixels.

    Raises:
        GBCIError: an empty mask.
    """
    if not mask.any():
        raise GBCIError("the breast mask is empty; expected at least one pixel")
    height, width = mask.shape
    xmin, ymin, xmax, ymax = bounding_box(mask)
    margin = round(0.02 * (max(xmax - xmin, ymax - ymin) - 1))
    x0, y0, x1, y1 = max(0, xmin - margin), max(0, ymin - margin), min(width, xmax + margin), min(height, ymax + margin)
    scale = size / max(y1 - y0, x1 - x0)
    out_w, out_h = max(1, round((x1 - x0) * scale)), max(1, round((y1 - y0) * scale))
    flip = chest_wall_side(mask) == "R"
    # Padding goes to the nipple side, so that the chest wall stays on the left edge.
    return Frame(
        x0=x0, y0=y0, x1=x1, y1=y1, flip=flip, width=out_w, height=out_h, left=0, top=(size - out_h) // 2, size=size
    )
