"""16-bit gray PNG: display values as the reader sees them (bright = dense), or the stored values of a PNG template."""

import zlib
from pathlib import Path

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from gbci_fast.files import atomically
from gbci_fast.generate.engine import Synthesis


def write_synthesis(synthesis: Synthesis, path: Path) -> None:
    """uint16 [H, W], 65535 = 1.0, which its chunk sBIT states; where the template is a 16-bit PNG, its own scale."""
    mammogram, pixels = synthesis.template.mammogram, synthesis.stored
    own_scale = mammogram.dataset is None and pixels.dtype == np.uint16
    if not own_scale:
        presentation = mammogram.presentation
        levels = presentation.to_unit(np.arange(len(presentation.levels)))  # of every stored value
        pixels = np.round(levels * np.float32(65535)).astype(np.uint16)[pixels]
    save_png(pixels, path, full_scale=not own_scale or len(mammogram.presentation.levels) == 2**16)


def save_png(pixels: np.ndarray, path: Path, *, full_scale: bool = False) -> None:
    """Writes uint8 or uint16 [H, W], or uint8 [H, W, 3], as a PNG, whole or not at all.

    Args:
        full_scale: states that the type's largest value is white; a reader would guess it from the brightest pixel.
    """
    image = Image.fromarray(pixels)
    # Grain holds no repetitions: matching runs alone is faster than deflate's lowest level, and no larger.
    options = {"compress_level": 1, "compress_type": zlib.Z_RLE}
    if full_scale:
        options["pnginfo"] = chunks = PngInfo()
        chunks.add(b"sBIT", bytes([8 * pixels.itemsize]))
    atomically(path, lambda temporary: image.save(temporary, format="PNG", **options))
