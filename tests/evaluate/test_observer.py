"""The model observer against closed forms."""

import numpy as np
import pytest
from scipy import stats

from gbci_fast.errors import GBCIError
from gbci_fast.evaluate.observer import auc_interval, matched_filter, roc_auc, score


def disc(radius: float, height: float) -> np.ndarray:
    axis = np.arange(-12, 13)
    return height * (axis[:, None] ** 2 + axis**2 < radius**2)


def test_score_is_the_height_above_the_surroundings():
    image = np.full((60, 50), 7.0)
    image[10:35, 20:45] += disc(6, 3.0)
    assert score(image, matched_filter(disc(6, 1.0)), (10, 20)) == pytest.approx(3)
    assert score(image + 100, matched_filter(disc(6, 1.0)), (10, 20)) == pytest.approx(3)


def test_area_in_white_noise_is_that_of_theory():
    rng = np.random.default_rng(0)
    signal = disc(5, 0.15)
    template = matched_filter(signal)
    noise = rng.standard_normal((2, 4000, *signal.shape))
    present = [score(signal + each, template, (0, 0)) for each in noise[0]]
    absent = [score(each, template, (0, 0)) for each in noise[1]]
    detectability = (template * signal).sum() / np.linalg.norm(template)
    assert roc_auc(present, absent) == pytest.approx(stats.norm.cdf(detectability / np.sqrt(2)), abs=0.015)


def test_roc_auc_by_hand():
    assert roc_auc([2, 3], [0, 1]) == 1
    assert roc_auc([0, 1], [2, 3]) == 0
    assert roc_auc([1, 3], [1, 2]) == pytest.approx((0.5 + 0 + 1 + 1) / 4)


def test_interval_covers_the_truth_at_its_level():
    rng = np.random.default_rng(1)
    truth = stats.norm.cdf(1 / np.sqrt(2))
    covered = 0
    for seed in range(60):
        low, high = auc_interval(rng.normal(1, 1, 50), rng.normal(0, 1, 50), rounds=200, level=0.9, seed=seed)
        covered += low < truth < high
    assert 46 <= covered <= 60


def test_what_cannot_be_scored_is_refused():
    with pytest.raises(GBCIError, match="no surroundings"):
        matched_filter(np.ones((3, 3)))
    with pytest.raises(GBCIError, match=r"template of 25x25 at \(-1, 0\) reaches beyond an image of 40x40"):
        score(np.zeros((40, 40)), matched_filter(disc(5, 1.0)), (-1, 0))
    with pytest.raises(GBCIError, match="expected pairs"):
        auc_interval([1, 2], [1])
