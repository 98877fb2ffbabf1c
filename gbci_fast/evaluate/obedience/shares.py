"""Differences between real classes, shifts between tellings, and their ratio, with intervals over patients.

Every figure is computed for R sets of weights, as `gbci_fast.evaluate.metrics.patient_draws` makes them for all lesions
at once, real and painted: a patient weighs the same in all figures of one resample.
"""

from collections.abc import Sequence

import numpy as np

from gbci_fast.evaluate.metrics import numbered, weighted_auc


class RealClasses:
    """Two classes of real lesions, compared at equal size and within their data sets.

    A value is modeled as linear in class, ln diameter and data set (weighted least squares). The classes differ in
    size, and a painted lesion gets its size from the mask, whatever it is told.

    Args:
        ones: bool [N], whether a lesion is of class 1 or of class 0.
        diameters: in pixels, [N].
        roots: the data set of every lesion, N.
        weights: float64 [R, N].
    """

    def __init__(self, ones: np.ndarray, diameters: np.ndarray, roots: Sequence[str], weights: np.ndarray):
        self.ones, self.weights = ones, weights
        sets = numbered(roots)
        dummies = [sets == number for number in range(1, sets.max() + 1)] if len(sets) else []
        self.others = np.stack([np.ones(len(ones)), np.log(diameters), *dummies], 1).astype(np.float64)

    def difference(self, values: np.ndarray) -> np.ndarray:
        """Class 1 minus class 0 at equal size, [R]; values [N] may hold NaN; NaN where a class weighs nothing."""
        return self._coefficients(values)[:, 0]

    def auc(self, values: np.ndarray) -> np.ndarray:
        """The probability that class 1 exceeds class 0 at equal size and within data sets, [R]."""
        known = ~np.isnan(values)
        rest = values - self.others @ self._coefficients(values)[0, 1:]
        one, zero = known & self.ones, known & ~self.ones
        with np.errstate(invalid="ignore"):
            return weighted_auc(rest[one], rest[zero], self.weights[:, one], self.weights[:, zero])

    def _coefficients(self, values: np.ndarray) -> np.ndarray:
        """Of class and covariates, [R, 1 + K]."""
        known = ~np.isnan(values)
        x = np.concatenate([self.ones[:, None], self.others], 1)[known]
        weights = self.weights[:, known]
        width = x.shape[1]
        products = (weights @ (x[:, :, None] * x[:, None]).reshape(len(x), width**2)).reshape(-1, width, width)
        moments = weights @ (x * values[known, None])
        found = (np.linalg.pinv(products, hermitian=True) @ moments[..., None])[..., 0]
        one = weights @ self.ones[known]
        found[(one == 0) | (one == weights.sum(1))] = np.nan
        return found


def mean(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """The weighted means of values [N] without those that are NaN, [R]; NaN where nothing weighs."""
    known = ~np.isnan(values)
    with np.errstate(invalid="ignore"):
        return (weights[:, known] @ values[known]) / weights[:, known].sum(1)


def told_auc(zero: np.ndarray, one: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """The probability that a painting told 1 exceeds a painting told 0, of any lesions, [R]; ties count half.

    Args:
        zero, one: readings [V, N] of V paintings of N lesions.
        weights: [R, N].
    """
    each = np.tile(weights, len(zero))
    return weighted_auc(one.ravel(), zero.ravel(), each, each)
