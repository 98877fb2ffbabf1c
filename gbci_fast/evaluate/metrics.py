"""Fidelity inside regions, and means with confidence intervals over patients."""

import math
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence

import numpy as np
from scipy import ndimage
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

DATA_RANGE = 1.0
SSIM_WINDOW = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
"""The window of Wang et al. 2004; scikit-image cuts it at 11 x 11 pixels."""
PSNR_LIMIT = 20 * math.log10(65535)
"""PSNR in dB of an error of one 16-bit step in every pixel, the images' resolution; used where there is no error."""
RING = (3, 8)  # distance from the mask in pixels, both ends included
ROI_GROWTH = 2  # pixels by which the RoI exceeds the mask, so that a seam counts
RESAMPLES, LEVEL = 2000, 0.95  # of the bootstrap
QUANTILES = ((1 - LEVEL) / 2, (1 + LEVEL) / 2)


def fidelity(
    reference: np.ndarray, image: np.ndarray, regions: Mapping[str, np.ndarray]
) -> dict[str, dict[str, float]]:
    """SSIM and PSNR of `image` in every region.

    SSIM is the mean of scikit-image's full map over the region's pixels, including those at the image border, where the
    window covers the mirrored image. PSNR is computed from the mean squared error over the region's pixels, and is
    capped at `PSNR_LIMIT`.

    Args:
        reference, image: float [H, W] in [0, 1], sides of at least 11.
        regions: {name: bool [H, W] with at least one pixel}.

    Returns:
        ``{region: {"ssim": ..., "psnr": ...}}``, PSNR in dB.
    """
    reference, image = reference.astype(np.float64), image.astype(np.float64)
    _, similarity = structural_similarity(reference, image, data_range=DATA_RANGE, full=True, **SSIM_WINDOW)
    return {
        name: {"ssim": float(similarity[region].mean()), "psnr": _psnr(reference[region], image[region])}
        for name, region in regions.items()
    }


def patient_summary(
    values: Sequence[float] | np.ndarray, patients: Sequence[Hashable], seed: int = 0
) -> dict[str, float | None]:
    """Mean over images with a percentile bootstrap interval over patients, and the median.

    A resample draws as many patients as there are, with replacement, each with all of their images: images of one
    patient are not independent (the cluster bootstrap of Field and Welsh 2007).

    Args:
        values: one per image.
        patients: the patient of every image.
        seed: of the resamples; equal `patients` and seeds give equal resamples for every measure.

    Returns:
        ``mean``, ``low``, ``high`` and ``median``; `low` and `high` are None for a single patient.
    """
    numbers, owner = np.asarray(values, np.float64), numbered(patients)
    sums, counts = np.bincount(owner, numbers), np.bincount(owner)
    draws = resample(len(counts), np.random.default_rng(seed))
    means = (draws @ sums) / (draws @ counts) if len(counts) > 1 else np.empty(0)
    return {"mean": float(numbers.mean()), **interval(means), "median": float(np.median(numbers))}


def numbered(patients: Iterable[Hashable]) -> np.ndarray:
    """The patients' numbers in the order of their first appearance, int [N], from the patient of every image."""
    index: dict[Hashable, int] = {}
    return np.array([index.setdefault(patient, len(index)) for patient in patients])


def resample(count: int, rng: np.random.Generator, times: int = RESAMPLES) -> np.ndarray:
    """How often bootstrap resamples, `count` draws with replacement, hold each of `count` items: int [times, count]."""
    return rng.multinomial(count, np.full(count, 1 / count), size=times)


def interval(values: np.ndarray) -> dict[str, float | None]:
    """The quantiles ``low`` and ``high`` between which the share `LEVEL` of resampled values lies; None without any."""
    if not len(values):
        return {"low": None, "high": None}
    low, high = np.quantile(values, QUANTILES)
    return {"low": float(low), "high": float(high)}


def patient_draws(patients: Sequence[Hashable] | np.ndarray, seed: int = 0) -> np.ndarray:
    """How often every lesion counts, int [1 + RESAMPLES, N]: once in row 0, then as bootstrap resamples of patients.

    Args:
        patients: the patient of every lesion, N.
        seed: of the resamples.
    """
    owner = numbered(patients)
    drawn = resample(int(owner.max()) + 1, np.random.default_rng(seed))
    return np.concatenate([np.ones((1, len(owner)), int), drawn[:, owner]])


def within_sets_auc(
    scores: np.ndarray, truths: np.ndarray, sets: Sequence[Hashable] | np.ndarray, draws: np.ndarray
) -> np.ndarray:
    """The probability that a positive outscores a negative of its data set: float64 [R]; ties count half.

    Data sets differ in their labels, and to tell one set from another says nothing about a lesion. See `within_sets`.

    Args:
        scores, truths, sets: [N]: numbers, bool labels, and the data set of every lesion.
        draws: weights of the lesions, [R, N], such as of `patient_draws`.
    """

    def value(rows: np.ndarray, weights: np.ndarray) -> np.ndarray:
        positive, values = truths[rows], scores[rows]
        return weighted_auc(values[positive], values[~positive], weights[:, positive], weights[:, ~positive])

    return within_sets(value, truths, sets, draws)


def within_sets(
    value: Callable[[np.ndarray, np.ndarray], np.ndarray],
    truths: np.ndarray,
    sets: Sequence[Hashable] | np.ndarray,
    draws: np.ndarray,
) -> np.ndarray:
    """The mean of ``value(rows, weights)`` over the data sets with both classes, weighted by lesions: float64 [R].

    NaN where no data set has both.

    Args:
        value: of the lesions `rows`, int [M], under their `weights`, float64 [R, M]: float64 [R].
        truths, sets, draws: as for `within_sets_auc`.
    """
    total, weight, owner = np.zeros(len(draws)), np.zeros(len(draws)), numbered(sets)
    for number in np.unique(owner):
        rows = np.flatnonzero(owner == number)
        weights = draws[:, rows].astype(np.float64)
        both = (weights @ truths[rows] > 0) & (weights @ ~truths[rows] > 0)
        with np.errstate(invalid="ignore", divide="ignore"):
            found = value(rows, weights)
        count = np.where(both, weights.sum(1), 0)
        total, weight = total + np.where(both, found, 0) * count, weight + count
    with np.errstate(invalid="ignore"):
        return total / weight


def first_with_interval(values: np.ndarray) -> dict[str, float | None]:
    """``value`` = the first, with the interval ``low`` to ``high`` of the others, which are resamples.

    All are None where the first is NaN; there is no interval if most resamples are NaN.
    """
    first, others = values[0], values[1:][~np.isnan(values[1:])]
    if np.isnan(first):
        return {"value": None, "low": None, "high": None}
    return {"value": float(first), **interval(others if len(others) >= len(values) / 2 else others[:0])}


def weighted_auc(
    positive: np.ndarray, negative: np.ndarray, positive_weights: np.ndarray, negative_weights: np.ndarray
) -> np.ndarray:
    """The probability that a positive outscores a negative, under R sets of weights; ties count half.

    Args:
        positive, negative: scores, [P] and [N].
        positive_weights, negative_weights: float64 [R, P] and [R, N].

    Returns:
        float64 [R]; NaN, with a floating-point warning, where a class weighs nothing.
    """
    wins = (positive[:, None] > negative) + 0.5 * (positive[:, None] == negative)
    total = positive_weights.sum(1) * negative_weights.sum(1)
    return ((positive_weights @ wins) * negative_weights).sum(1) / total


def grow(mask: np.ndarray, radius: int) -> np.ndarray:
    """A mask, bool [H, W] with at least one pixel, dilated by a disk of `radius` pixels."""
    return ndimage.distance_transform_edt(~mask) <= radius


def ring_mean(pixels: np.ndarray, mask: np.ndarray, breast: np.ndarray) -> float:
    """The mean of the breast's pixels in the `RING` around the mask; of all unmasked pixels if there are none."""
    distance = ndimage.distance_transform_edt(~mask)
    ring = (distance >= RING[0]) & (distance <= RING[1]) & breast
    return float(pixels[ring if ring.any() else ~mask].mean())


def _psnr(reference: np.ndarray, image: np.ndarray) -> float:
    with np.errstate(divide="ignore"):
        return min(float(peak_signal_noise_ratio(reference, image, data_range=DATA_RANGE)), PSNR_LIMIT)
