"""Differences at equal size, the AUC of told paintings, and what happens where nothing is known."""

import numpy as np
import pytest

from gbci_fast.evaluate.metrics import patient_draws
from gbci_fast.evaluate.obedience.shares import RealClasses, mean, told_auc


@pytest.fixture
def classes():
    """Class 1 is larger; the value rises by 2 from class 0 to 1, by 3 per unit of ln diameter, by 10 in set "b"."""
    rng = np.random.default_rng(0)
    ones = np.arange(200) % 2 == 1
    diameters = np.exp(rng.normal(2.5, 0.3, 200) + 0.8 * ones)
    roots = ["b" if i % 4 < 2 else "a" for i in range(200)]
    values = 2.0 * ones + 3 * np.log(diameters) + np.where(np.array(roots) == "b", 10, 0) + rng.normal(0, 0.5, 200)
    weights = patient_draws(np.arange(200) // 2).astype(float)
    return RealClasses(ones, diameters, roots, weights), values


def test_the_difference_is_at_equal_size_within_sets(classes):
    real, values = classes
    found = real.difference(values)
    assert found[0] == pytest.approx(2, abs=0.2)
    low, high = np.quantile(found[1:], (0.025, 0.975))
    assert low < 2 < high
    assert high - low < 0.6


def test_size_alone_separates_no_classes(classes):
    real, values = classes
    assert real.auc(values)[0] > 0.99
    by_size = 3 * real.others[:, 1] + np.random.default_rng(1).normal(0, 1, 200)
    assert real.auc(by_size)[0] == pytest.approx(0.5, abs=0.1)


def test_unknown_values_are_left_out(classes):
    real, values = classes
    holes = values.copy()
    holes[::5] = np.nan
    rest = np.isfinite(holes)
    fewer = RealClasses(
        real.ones[rest],
        np.exp(real.others[rest, 1]),
        ["b" if b else "a" for b in 1 - real.others[rest, 2]],
        real.weights[:, rest],
    )
    np.testing.assert_allclose(real.difference(holes), fewer.difference(holes[rest]), atol=1e-8)
    np.testing.assert_allclose(real.auc(holes), fewer.auc(holes[rest]), atol=1e-8)


def test_a_class_without_weight_is_undefined(classes):
    real, values = classes
    real.weights[3, real.ones] = 0
    found = real.difference(values)
    assert np.isnan(found[3])
    assert np.isfinite(found[0])


def test_weighted_means_and_told_auc():
    weights = np.array([[1.0, 1, 1], [0, 2, 1], [1, 0, 0]])
    found = mean(np.array([np.nan, 1, 4]), weights)
    np.testing.assert_allclose(found[:2], [2.5, 2])
    assert np.isnan(found[2])
    zero, one = np.array([[0.0, 1, 2], [0, 1, 2]]), np.array([[0.5, 1.5, 2.5], [0, 1, 2]])
    pairs = [(a > b) + (a == b) / 2 for a in one.ravel() for b in zero.ravel()]
    assert told_auc(zero, one, weights)[0] == pytest.approx(np.mean(pairs))
    assert told_auc(zero, zero, weights)[0] == 0.5
