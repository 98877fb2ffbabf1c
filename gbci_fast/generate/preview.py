"""A contact sheet: template | mask | synthetic | difference, for the whole breast and around the lesion."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from scipy import ndimage

from gbci_fast.choices import MODEL_SIZE
from gbci_fast.data.frame import Frame
from gbci_fast.generate.template import Synthesis
from gbci_fast.jobs.files import atomically

PREVIEW = "preview.png"
_COLUMNS = ("template", "mask", "synthetic", "difference")
_GAIN = 2.0  # contrast of the difference panel
_HEADER = 18  # pixels


def preview_panels(synthesis: Synthesis) -> np.ndarray:
    """One row of the sheet, uint8 [S, 8 S, 3]: the four panels at whole-breast scale, then around the lesion.

    All panels are resampled from the native images, so that they show what is in the files.
    """
    template = synthesis.template
    before, after = map(template.mammogram.presentation.to_unit, (template.mammogram.stored, synthesis.stored))
    panels = []
    for frame in (template.frame, _close_up(synthesis)):
        old, new = frame.to_model(before), frame.to_model(after)
        mask = frame.to_model(synthesis.mask) > 0.5
        outline = mask ^ ndimage.binary_erosion(mask)
        overlay = _gray(old)
        overlay[outline] = (255, 64, 64)
        panels += [_gray(old), overlay, _gray(new), _signed(new - old)]
    return np.concatenate(panels, axis=1)


def write_preview(rows: Sequence[np.ndarray], path: Path) -> None:
    """Writes a PNG of rows from `preview_panels`, stacked under a line of captions."""
    sheet = np.concatenate(rows, axis=0)
    image = Image.new("RGB", (sheet.shape[1], sheet.shape[0] + _HEADER))
    image.paste(Image.fromarray(sheet), (0, _HEADER))
    draw = ImageDraw.Draw(image)
    for i, caption in enumerate([*_COLUMNS, *(f"{name}, close up" for name in _COLUMNS)]):
        draw.text((i * MODEL_SIZE + 4, 3), caption, fill=(255, 255, 255))
    atomically(path, lambda temporary: image.save(temporary, format="PNG"))


def _close_up(synthesis: Synthesis) -> Frame:
    """A square of four lesion diameters around the lesion."""
    xmin, ymin, xmax, ymax = synthesis.box
    half = 2 * max(xmax - xmin, ymax - ymin)
    x, y = (xmin + xmax) // 2, (ymin + ymax) // 2
    return Frame(
        x0=x - half,
        y0=y - half,
        x1=x + half,
        y1=y + half,
        flip=synthesis.template.frame.flip,
        width=MODEL_SIZE,
        height=MODEL_SIZE,
        left=0,
        top=0,
        size=MODEL_SIZE,
    )


def _gray(unit: np.ndarray) -> np.ndarray:
    return np.repeat(np.round(np.clip(unit, 0, 1) * 255).astype(np.uint8)[..., None], 3, axis=-1)


def _signed(change: np.ndarray) -> np.ndarray:
    """A difference image as colors, uint8 [H, W, 3]: brighter in red, darker in blue, on black."""
    level = np.clip(change * _GAIN, -1, 1)
    color = np.stack([np.maximum(level, 0), np.zeros_like(level), np.maximum(-level, 0)], axis=-1)
    return np.round(color * 255).astype(np.uint8)
