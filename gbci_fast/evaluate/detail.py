"""Fine detail inside lesions, at model pixels: crops are resampled, which hides it.

Only the interior counts, `SEAM` pixels and more from the mask's edge, so that a seam is no detail.
"""

from itertools import pairwise

import numpy as np
from scipy import ndimage
from scipy.signal import firwin

from gbci_fast.evaluate.lesions import Crops

SEAM = 3  # pixels
CUTOFF = 0.25  # cycles per pixel, half the highest frequency
TAPS = 11  # of the filter; its attenuation at the cutoff is 6 dB
SCALES = (0.0, 0.5, 1.0, 2.0, 4.0)  # pixels; the standard deviations between which the bands lie
DARKEST = 1 / 65535  # the images' resolution, the smallest detail that is measurable


def fine_power(crops: Crops) -> np.ndarray:
    """The natural logarithm of the power beyond `CUTOFF`, along either axis, inside every lesion: float64 [N]."""
    low = firwin(TAPS, CUTOFF, fs=1)
    smooth = ndimage.correlate1d(ndimage.correlate1d(_native(crops), low, axis=1), low, axis=2)
    return _log_power(_native(crops) - smooth, interiors(crops))


def band_energies(crops: Crops) -> np.ndarray:
    """The natural logarithm of the power inside every lesion, in the bands between `SCALES`: float64 [N, bands].

    A band is the difference of two Gaussian blurs (a Laplacian pyramid without its subsampling, Burt and Adelson 1983).
    """
    pixels, inside = _native(crops), interiors(crops)
    blurred = [ndimage.gaussian_filter(pixels, (0, scale, scale)) for scale in SCALES]
    return np.stack([_log_power(fine - coarse, inside) for fine, coarse in pairwise(blurred)], 1)


def interiors(crops: Crops) -> np.ndarray:
    """The masked pixels more than `SEAM` from the mask's edge, or all if the mask is too small: bool [N, W, W]."""
    found = np.empty(crops.native[1].shape, bool)
    for i, mask in enumerate(crops.native[1]):
        # A mask that is cut off by the window goes on there, for most lesions.
        inner = ndimage.distance_transform_edt(np.pad(mask, SEAM, mode="edge"))[SEAM:-SEAM, SEAM:-SEAM] > SEAM
        found[i] = inner if inner.any() else mask
    return found


def _native(crops: Crops) -> np.ndarray:
    return crops.native[0].astype(np.float64)


def _log_power(detail: np.ndarray, inside: np.ndarray) -> np.ndarray:
    return np.log(np.maximum((detail**2 * inside).sum((1, 2)) / inside.sum((1, 2)), DARKEST**2))
