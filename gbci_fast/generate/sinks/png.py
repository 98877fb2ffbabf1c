"""16-bit gray PNG: display values as the reader sees them (bright = dense), or the stored values of a PNG template."""

from pathlib import Path

import numpy as np
from PIL import Image

from gbci_fast.files import atomically
from gbci_fast.generate.engine import Synthesis

_LEVEL = 1  # grain hardly compresses, and higher levels of deflate cost several times as long


def write_png(synthesis: Synthesis, path: Path) -> None:
    """uint16 [H, W], 65535 = 1.0. For a 16-bit PNG template these are its own stored values."""
    unit = synthesis.template.mammogram.presentation.to_unit(synthesis.stored)
    save_gray(np.round(unit * np.float32(65535)).astype(np.uint16), path)


def save_gray(pixels: np.ndarray, path: Path) -> None:
    """Writes uint8 or uint16 [H, W] as a gray PNG, whole or not at all."""
    image = Image.fromarray(pixels)
    atomically(path, lambda temporary: image.save(temporary, format="PNG", compress_level=_LEVEL))
