"""SSIM, PSNR and the bootstrap against cases worked out by hand."""

import math

import numpy as np
import pytest
from skimage.metrics import structural_similarity

from gbci_fast.evaluate.metrics import (
    PSNR_LIMIT,
    SSIM_WINDOW,
    fidelity,
    first_with_interval,
    patient_draws,
    patient_summary,
    weighted_auc,
    within_sets_auc,
)

SIZE = 32
EVERYWHERE = {"image": np.ones((SIZE, SIZE), bool)}


def noise(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).random((SIZE, SIZE), np.float32)


def test_identical_images():
    scores = fidelity(noise(), noise(), EVERYWHERE)["image"]
    assert scores["ssim"] == pytest.approx(1.0, abs=1e-12)
    assert scores["psnr"] == PSNR_LIMIT == pytest.approx(96.33, abs=0.005)


@pytest.mark.parametrize("offset", [0.5, 0.1, 1 / 255])
def test_psnr_is_the_formula(offset):
    reference = noise() * 0.4
    scores = fidelity(reference, reference + offset, EVERYWHERE)["image"]
    assert scores["psnr"] == pytest.approx(-20 * math.log10(offset), abs=1e-4)


def test_ssim_of_two_constants():
    """Without variance SSIM is its luminance term, (2 a b + c1) / (a^2 + b^2 + c1) with c1 = 0.01^2."""
    a, b, c1 = 0.2, 0.6, 1e-4
    scores = fidelity(np.full((SIZE, SIZE), a), np.full((SIZE, SIZE), b), EVERYWHERE)["image"]
    assert scores["ssim"] == pytest.approx((2 * a * b + c1) / (a**2 + b**2 + c1), abs=1e-9)


def test_ssim_map_is_that_of_scikit_image():
    """Its own average leaves out the five pixels at the border; so does this region."""
    reference, image = noise(1).astype(float), noise(2).astype(float)
    inner = np.zeros((SIZE, SIZE), bool)
    inner[5:-5, 5:-5] = True
    expected = structural_similarity(reference, image, data_range=1.0, **SSIM_WINDOW)
    assert fidelity(reference, image, {"inner": inner})["inner"]["ssim"] == pytest.approx(expected, abs=1e-12)


def test_a_region_sees_its_own_pixels():
    reference = noise() * 0.5
    image = reference.copy()
    image[:, :16] += 0.25
    left = np.zeros((SIZE, SIZE), bool)
    left[:, :16] = True
    far_right = np.zeros((SIZE, SIZE), bool)
    far_right[:, 22:] = True  # beyond the reach of the 11-pixel window
    scores = fidelity(reference, image, {"left": left, "right": ~left, "far_right": far_right} | EVERYWHERE)
    assert scores["left"]["psnr"] == pytest.approx(20 * math.log10(4), abs=1e-4)
    assert scores["image"]["psnr"] == pytest.approx(20 * math.log10(4) + 10 * math.log10(2), abs=1e-4)
    assert scores["right"]["psnr"] == PSNR_LIMIT
    assert scores["far_right"]["ssim"] == pytest.approx(1.0, abs=1e-12)
    assert scores["left"]["ssim"] < scores["image"]["ssim"] < scores["right"]["ssim"] < 1


def test_summary_is_over_images():
    summary = patient_summary([1.0, 2.0, 6.0], ["a", "a", "b"])
    assert (summary["mean"], summary["median"]) == (3.0, 2.0)
    # Of two patients a resample is aa, bb or (half of the time) ab.
    assert (summary["low"], summary["high"]) == (1.5, 6.0)


def test_interval_takes_patients_as_units():
    """Copies of a patient's image add nothing: the interval stays as wide as with one image each."""
    values, patients = np.random.default_rng(0).normal(size=40), list(range(40))
    once = patient_summary(values, patients)
    copied = patient_summary(np.repeat(values, 9), np.repeat(patients, 9).tolist())
    assert copied == pytest.approx(once)
    standard_error = values.std() / math.sqrt(40)
    assert once["high"] - once["low"] == pytest.approx(2 * 1.96 * standard_error, rel=0.1)


def test_one_patient_has_no_interval():
    summary = patient_summary([1.0, 3.0], ["a", "a"])
    assert summary == {"mean": 2.0, "low": None, "high": None, "median": 2.0}


def test_summary_depends_on_the_seed_alone():
    values, patients = np.arange(10.0), list(range(10))
    assert patient_summary(values, patients, seed=1) == patient_summary(values, patients, seed=1)
    assert patient_summary(values, patients, seed=1) != patient_summary(values, patients, seed=2)


def test_weighted_auc_by_hand():
    positive, negative, weights = np.array([1.0, 3.0]), np.array([1.0, 2.0]), np.array([[1.0, 1.0], [2.0, 0.0]])
    assert weighted_auc(positive, negative, weights, np.ones((2, 2))).tolist() == [(0.5 + 0 + 1 + 1) / 4, 0.25]
    assert weighted_auc(positive + 2, negative, weights, weights).tolist() == [1, 1]
    assert weighted_auc(negative - 2, positive, weights, weights).tolist() == [0, 0]


def test_auc_within_sets_is_that_of_repeated_lesions():
    rng = np.random.default_rng(0)
    scores, truths, weights = rng.random(30).round(1), rng.random(30) < 0.4, rng.integers(0, 3, 30)
    again = np.repeat(np.arange(30), weights)
    positive, negative = scores[again][truths[again]], scores[again][~truths[again]]
    pairs = [(a > b) + (a == b) / 2 for a in positive for b in negative]
    assert within_sets_auc(scores, truths, ["set"] * 30, weights[None])[0] == pytest.approx(np.mean(pairs))


def test_to_tell_the_sets_apart_is_worth_nothing():
    sets = np.repeat(["film", "digital"], 50)
    truths = np.concatenate([np.arange(50) < 45, np.arange(50) < 5])
    assert within_sets_auc((sets == "film").astype(float), truths, sets, np.ones((1, 100), int))[0] == 0.5


def test_a_set_of_one_class_counts_for_nothing():
    scores, truths, draws = np.array([1.0, 0.0, 9.0, 9.0]), np.array([True, False, True, True]), np.ones((1, 4), int)
    assert within_sets_auc(scores, truths, [0, 0, 1, 1], draws)[0] == 1
    assert np.isnan(within_sets_auc(scores, truths | True, [0, 0, 1, 1], draws)[0])


def test_lesions_of_one_patient_are_drawn_together():
    draws = patient_draws(["a", "a", "b", "c"])
    assert (draws[0] == 1).all()
    assert (draws[:, 0] == draws[:, 1]).all()
    assert (draws[1:, 0] != draws[1:, 2]).any()


def test_an_interval_is_of_the_resamples_and_needs_half_of_them():
    values = np.concatenate([[0.7], np.linspace(0, 1, 101)])
    assert first_with_interval(values) == pytest.approx({"value": 0.7, "low": 0.025, "high": 0.975})
    values[2:80] = np.nan
    assert first_with_interval(values) == {"value": 0.7, "low": None, "high": None}
    assert first_with_interval(values[2:]) == {"value": None, "low": None, "high": None}
