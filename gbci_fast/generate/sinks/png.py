"""16-bit gray PNG: display values (bright = dense), or the stored values where the template is a 16-bit PNG."""

import zlib
from io import BytesIO
from typing import Any

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from gbci_fast.generate.template import Synthesis


def encode_synthesis(synthesis: Synthesis) -> bytes:
    """The image as a PNG, uint16 [H, W] with 65535 = 1.0; where the template is a 16-bit PNG, in its own scale.

    A chunk sBIT states that 65535 is white, except where the template's own scale has fewer levels.
    """
    mammogram, pixels = synthesis.template.mammogram, synthesis.stored
    own_scale = mammogram.dataset is None and pixels.dtype == np.uint16
    if not own_scale:
        presentation = mammogram.presentation
        levels = presentation.to_unit(np.arange(len(presentation.levels)))  # of every stored value
        pixels = np.round(levels * np.float32(65535)).astype(np.uint16)[pixels]
    return encode_png(pixels, full_scale=not own_scale or len(mammogram.presentation.levels) == 2**16)


def encode_png(pixels: np.ndarray, *, full_scale: bool = False) -> bytes:
    """Encodes uint8 or uint16 [H, W], or uint8 [H, W, 3], as a PNG.

    Args:
        pixels: the image.
        full_scale: add a chunk sBIT, which states that the type's largest value is white; without it, readers guess the
            scale from the brightest pixel.
    """
    image, file = Image.fromarray(pixels), BytesIO()
    # Grain has no repetitions: matching only runs is faster than deflate's lowest level, and the file is no larger.
    options: dict[str, Any] = {"compress_level": 1, "compress_type": zlib.Z_RLE}
    if full_scale:
        options["pnginfo"] = chunks = PngInfo()
        chunks.add(b"sBIT", bytes([8 * pixels.itemsize]))
    image.save(file, format="PNG", **options)
    return file.getvalue()
