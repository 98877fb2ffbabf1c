"""Reads hand-drawn or computed masks: gray images of any common format, with any two values."""

import logging
import warnings
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from gbci_fast.dicom.bounds import MAX_DEFLATE, MAX_PIXELS, BoundedFile
from gbci_fast.errors import GBCIError

MASK_FORMATS = ("PNG", "TIFF", "BMP", "GIF", "JPEG")
# More than `FEW` grays (or `SMALL`, if the largest value is below `SMALL`) are soft edges; fewer are labels.
FEW, SMALL = 8, 16

# Pillow logs damaged files and also raises. Without a handler Python would print the log.
logging.getLogger("PIL").addHandler(logging.NullHandler())


def read_mask(path: Path) -> np.ndarray:
    """Reads a mask, bool [H, W]: True above half of the image's largest value. The mask may be empty.

    So values of 0 and 1, 0 and 255, 16 bits, and anti-aliased edges all work. A palette of grays is applied.

    Raises:
        GBCIError: the file is absent, not an image, in color, a map of labels, or too short for its stated size.
    """
    try:
        with (
            warnings.catch_warnings(action="ignore"),
            BoundedFile(path) as file,
            Image.open(file, formats=MASK_FORMATS) as image,
        ):
            width, height = image.size
            if width * height > min(MAX_PIXELS, 8 * MAX_DEFLATE * path.stat().st_size):
                raise GBCIError(f"{path} claims {width} x {height} pixels, too many for a mask or for its length")
            indexed = image.mode in ("P", "PA")
            values = np.asarray(image.convert("RGB") if indexed else image)
    except GBCIError as error:
        raise error if str(path) in str(error) else GBCIError(f"{path}: {error}") from None
    except UnidentifiedImageError:
        raise GBCIError(f"{path} cannot be read as a mask image; expected one of {', '.join(MASK_FORMATS)}") from None
    except Exception as error:  # Pillow raises half a dozen types for a damaged file
        told = getattr(error, "strerror", None) or str(error)
        reason = " ".join(told.split()) or type(error).__name__
        raise GBCIError(f"{path} cannot be read as a mask image: {reason}") from error
    if indexed and (values == values[..., :1]).all():
        values = values[..., 0]
    if values.ndim != 2:
        raise GBCIError(f"{path} is a color image; expected a gray mask")
    if not np.isfinite(values).all():
        raise GBCIError(f"{path} holds NaN or infinity; expected a gray mask")
    return above_half(values, path)


def above_half(values: np.ndarray, name: object) -> np.ndarray:
    """Where a mask's values are above half of their maximum and above 0; bool of the same shape.

    Args:
        values: the mask on any scale.
        name: begins the error message.

    Raises:
        GBCIError: three or a few more whole numbers: a map of labels, of which none can be chosen.
    """
    largest = values.max()
    most = SMALL if largest < SMALL else FEW
    levels = _levels(values, most)
    if 2 < len(levels) <= most and all(level == round(level) for level in levels):
        shown = ", ".join(f"{level:g}" for level in levels)
        raise GBCIError(f"{name} has the values {shown}; expected two values, or the many grays of soft edges")
    return values > max(0, largest / 2)


def _levels(values: np.ndarray, most: int) -> list[float]:
    """The distinct values in rising order; if there are more than ``most``, any ``most + 1`` of them."""
    levels, rest = [], values.ravel()
    while rest.size and len(levels) <= most:
        levels.append(rest[0].item())
        rest = rest[rest != rest[0]]
    return sorted(levels)
