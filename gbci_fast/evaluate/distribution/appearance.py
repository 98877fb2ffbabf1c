"""What crops look like, measured without a network: diversity, spectrum, and seams at the mask's outline."""

import numpy as np
from scipy import ndimage

from gbci_fast.evaluate.lesions import CROP_SIZE, Crops

MS_SSIM_WEIGHTS = (0.0448, 0.2856, 0.3001)
"""The first three of Wang et al. 2003's five, made to sum to 1: two more halvings leave less than the window."""
WINDOW, SIGMA = 11, 1.5
K1, K2 = 0.01, 0.03
BAND = (4.0, 16.0)
"""Cycles per crop, both ends included. Below, the Hann window mixes neighbors; above, the smallest lesions' crops are
enlarged twofold and have nothing of their own."""
FLANK = (2.0, 5.0)  # crop pixels from the outline: near it, and clear of it
DARKEST_STEP = 1 / 65535  # the images' resolution: no gradient is known to be smaller


def ms_ssim(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Multi-scale structural similarity of pairs of crops, float [N, C, C] in [0, 1]: float64 [N] in [0, 1].

    Wang et al. 2003 with the Gaussian window of 11 pixels at three scales, the most that 64 pixels hold.
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


def spectrum(crops: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Frequencies of `BAND`, in cycles per crop [F], and the power at each, averaged over directions: float64 [N, F].

    Args:
        crops: [N, C, C]; their mean is taken off before the Hann window.
    """
    hann = np.hanning(CROP_SIZE + 1)[:-1]  # periodic
    window = hann[:, None] * hann
    # The mean under the window, or what is left of it would leak into the lowest frequencies.
    centered = crops - (crops * window).sum((1, 2), keepdims=True) / window.sum()
    power = np.abs(np.fft.fft2(centered * window)) ** 2
    axis = np.fft.fftfreq(CROP_SIZE, 1 / CROP_SIZE)
    rings = np.rint(np.hypot(axis[:, None], axis)).astype(int)
    frequencies = np.arange(int(BAND[0]), int(BAND[1]) + 1)
    return frequencies, np.stack([power[:, rings == ring].mean(1) for ring in frequencies], axis=1)


def spectrum_slopes(crops: np.ndarray) -> np.ndarray:
    """Of the least-squares line of log power over log frequency within `BAND`: float64 [N].

    1/f^b noise has -b; a flat crop, without power, has 0. Frequencies weigh as they have directions: the logarithm of
    a mean over few is biased downward.
    """
    frequencies, power = spectrum(crops)
    weights = frequencies / frequencies.sum()
    x = np.log(frequencies) - weights @ np.log(frequencies)
    return np.log(np.maximum(power, 1e-12)) @ (weights * x) / (weights @ x**2)


def seams(crops: Crops) -> np.ndarray:
    """How much steeper a crop is across the outline of its mask than beside it, as a logarithm: float64 [N].

    The mean absolute difference of two neighbors of which one is masked, over that of two neighbors `FLANK` away from
    the outline, of both sides together; its natural logarithm. 0: the outline does not show.
    """
    values = np.empty(len(crops))
    for i, (pixels, mask) in enumerate(zip(crops.pixels.astype(np.float64), crops.masks, strict=True)):
        # Pixel centers are half a pixel from the outline at least.
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
    """The mean similarity and its contrast-and-structure part where the window is inside, for values in [0, 1]."""
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
    """Means of 2 x 2 pixels; the sides are even."""
    return (x[:, ::2, ::2] + x[:, 1::2, ::2] + x[:, ::2, 1::2] + x[:, 1::2, 1::2]) / 4
