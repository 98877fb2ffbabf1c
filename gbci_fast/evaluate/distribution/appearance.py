"""Appearance of lesions, measured without a network: diversity, spectrum, and seams at the mask's outline."""

import numpy as np
from scipy import ndimage

from gbci_fast.evaluate.lesions import NATIVE_SIZE, Crops

MS_SSIM_WEIGHTS = (0.0448, 0.2856, 0.3001)
"""The first three of the five weights of Wang et al. 2003, normalized below: further halvings leave less than the
window."""
WINDOW, SIGMA = 11, 1.5
K1, K2 = 0.01, 0.03
BAND = (3, NATIVE_SIZE // 2)
"""Cycles per middle (`NATIVE_SIZE` model pixels), both ends included: up to the highest frequency. Below this band, the
Hann window mixes neighboring frequencies."""
FLANK = (2.0, 5.0)  # distance from the outline in crop pixels: close to it, but clear of it
DARKEST_STEP = 1 / 65535  # the images' resolution, the smallest gradient that is measurable


def ms_ssim(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Multi-scale structural similarity (Wang et al. 2003) of N pairs of crops: float64 [N] in [0, 1].

    The Gaussian window has 11 pixels. There are three scales, the most that 64 pixels allow.

    Args:
        x, y: float [N, C, C] in [0, 1].
    """
    x, y = x.astype(np.float64), y.astype(np.float64)
    weights = np.array(MS_SSIM_WEIGHTS) / sum(MS_SSIM_WEIGHTS)
    result = np.ones(len(x))
    for scale, weight in enumerate(weights):
        whole, contrast = _ssim(x, y)
        last = scale == len(weights) - 1
        result *= np.maximum(whole if last else contrast, 0) ** weight
        x, y = _halve(x), _halve(y)
    return result


def spectrum(crops: Crops) -> tuple[np.ndarray, np.ndarray]:
    """The frequencies of `BAND`, int [F] in cycles per middle, and the power at each in the lesions' middles, [N, F].

    The power is averaged over directions. The mean is subtracted before the Hann window is applied.
    """
    hann = np.hanning(NATIVE_SIZE + 1)[:-1]  # periodic
    window = hann[:, None] * hann
    pixels = crops.native[0].astype(np.float64)
    # The weighted mean under the window: a remainder would leak into the lowest frequencies.
    centered = pixels - (pixels * window).sum((1, 2), keepdims=True) / window.sum()
    power = np.abs(np.fft.fft2(centered * window)) ** 2
    axis = np.fft.fftfreq(NATIVE_SIZE, 1 / NATIVE_SIZE)
    rings = np.rint(np.hypot(axis[:, None], axis)).astype(int)
    frequencies = np.arange(BAND[0], BAND[1] + 1)
    return frequencies, np.stack([power[:, rings == ring].mean(1) for ring in frequencies], axis=1)


def spectrum_slopes(crops: Crops) -> np.ndarray:
    """The slope of the least-squares line of log power over log frequency within `BAND`: float64 [N].

    The slope of 1/f^b noise is -b, that of a flat crop 0. Each frequency is weighted by its number of directions,
    because the logarithm of a mean over few directions is biased downward.
    """
    frequencies, power = spectrum(crops)
    weights = frequencies / frequencies.sum()
    x = np.log(frequencies) - weights @ np.log(frequencies)
    return np.log(np.maximum(power, 1e-12)) @ (weights * x) / (weights @ x**2)


def seams(crops: Crops) -> np.ndarray:
    """How much steeper a crop is across its mask's outline than beside it: float64 [N]; 0 = the outline does not show.

    The natural logarithm of a ratio of mean absolute differences between neighboring pixels: of pairs of which one is
    masked, over pairs that both lie `FLANK` away from the outline, on either side.
    """
    values = np.empty(len(crops))
    for i, (pixels, mask) in enumerate(zip(crops.pixels.astype(np.float64), crops.masks, strict=True)):
        # Pixel centers lie at least half a pixel from the outline.
        distance = np.where(mask, ndimage.distance_transform_edt(mask), ndimage.distance_transform_edt(~mask)) - 0.5
        beside = (distance >= FLANK[0]) & (distance <= FLANK[1])
        across, flank = [], []
        for one, other in ((np.s_[1:], np.s_[:-1]), (np.s_[:, 1:], np.s_[:, :-1])):
            step = np.abs(pixels[one] - pixels[other])
            across.append(step[mask[one] != mask[other]])
            flank.append(step[beside[one] & beside[other] & (mask[one] == mask[other])])
        means = [np.concatenate(steps).mean() if sum(map(len, steps)) else 0.0 for steps in (across, flank)]
        values[i] = np.log(max(means[0], DARKEST_STEP) / max(means[1], DARKEST_STEP))
    return values


def _ssim(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The mean SSIM and its contrast-and-structure part, [N] each, over the places where the whole window fits."""
    mean_x, mean_y = _blur(x), _blur(y)
    var_x, var_y = _blur(x * x) - mean_x**2, _blur(y * y) - mean_y**2
    covariance = _blur(x * y) - mean_x * mean_y
    contrast = (2 * covariance + K2**2) / (var_x + var_y + K2**2)
    luminance = (2 * mean_x * mean_y + K1**2) / (mean_x**2 + mean_y**2 + K1**2)
    return (luminance * contrast).mean((1, 2)), contrast.mean((1, 2))


def _blur(x: np.ndarray) -> np.ndarray:
    offsets = np.arange(WINDOW) - WINDOW // 2
    kernel = np.exp(-(offsets**2) / (2 * SIGMA**2))
    kernel /= kernel.sum()
    half = WINDOW // 2
    blurred = ndimage.correlate1d(ndimage.correlate1d(x, kernel, axis=1), kernel, axis=2)
    return blurred[:, half:-half, half:-half]


def _halve(x: np.ndarray) -> np.ndarray:
    """The images [N, H, W] at half the size: means of 2 x 2 pixels; the sides must be even."""
    return (x[:, ::2, ::2] + x[:, 1::2, ::2] + x[:, ::2, 1::2] + x[:, 1::2, 1::2]) / 4
