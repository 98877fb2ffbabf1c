"""16-bit gray PNG: display values as the reader sees them (bright = dense), or the stored values of a PNG template."""

import zlib
from io import BytesIO
from typing import Any

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from gbci_fast.generate.template import Synthesis


def encode_synthesis(synthesis: Synthesis) -> bytes:
    """uint16 [H, W], 65535 = 1.0, which its chunk sBIT states; where the template is a 16-bit PNG, its own scale."""
    mammogram, pixels = synthesis.template.mammogram, synthesis.stored
    own_scale = mammogram.dataset is None and pixels.dtype == np.uint16
    if not own_scale:
        presentation = mammogram.presentation
        levels = presentation.to_unit(np.arange(len(presentation.levels)))  # of every stored value
        pixels = np.round(levels * np.float32(65535)).astype(np.uint16)[pixels]
    return encode_png(pixels, full_scale=not own_scale or len(mammogram.presentation.levels) == 2**16)


def encode_png(pixels: np.ndarray, *, full_scale: bool = False) -> bytes:
    """uint8 or uint16 [H, W], or uint8 [H, W, 3], as a PNG.

    Args:
        full_scale: states that the type's largest value is white; a reader would guess it from the brightest pixel.
    """
    image, file = Image.fromarray(pixels), BytesIO()
    # Grain holds no repetitions: matching runs alone is faster than deflate's lowest level, and no larger.
    options: dict[str, Any] = {"compress_level": 1, "compress_type": zlib.Z_RLE}
    if full_scale:
        options["pnginfo"] = chunks = PngInfo()
        chunks.add(b"sBIT", bytes([8 * pixels.itemsize]))
    image.save(file, format="PNG", **options)
    return file.getvalue()
