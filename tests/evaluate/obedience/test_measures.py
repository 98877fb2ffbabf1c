"""Every measure moves with what it is named after, and with little else."""

from dataclasses import replace

import numpy as np
import pytest
from scipy import ndimage

from gbci_fast.evaluate.obedience.measures import MEASURED, measure


def seen(images, cases, name):
    return measure(cases, images)[:, MEASURED.index(name)]


@pytest.fixture(scope="module")
def cases(disk_case):
    return [disk_case(i, False) for i in range(12)]


@pytest.fixture(scope="module")
def plain(cases, lesion_image):
    return [lesion_image(case, False, i) for i, case in enumerate(cases)]


def test_spicules_are_ridges_along_the_radius(cases, plain, lesion_image):
    spiculated = [lesion_image(case, True, i) for i, case in enumerate(cases)]
    assert (seen(spiculated, cases, "spiculation") > seen(plain, cases, "spiculation") + 0.5).all()
    rng = np.random.default_rng(0)
    noise = [rng.random(case.image.shape) for case in cases]
    assert abs(seen(noise, cases, "spiculation").mean()) < 0.3  # no direction


def test_a_smooth_edge_rises_less(cases, plain):
    smooth = [ndimage.gaussian_filter(image, 2) for image in plain]
    assert (seen(smooth, cases, "edge_rise") < seen(plain, cases, "edge_rise")).all()
    brighter = [0.3 + 1.5 * (image - 0.3) for image in plain]
    np.testing.assert_allclose(seen(brighter, cases, "edge_rise"), seen(plain, cases, "edge_rise"), atol=0.05)


def test_contrast_is_against_the_ring(cases, plain):
    brighter = [image + 0.1 for image in plain]
    np.testing.assert_allclose(seen(brighter, cases, "contrast"), seen(plain, cases, "contrast"), atol=1e-6)
    doubled = [2 * image for image in plain]
    np.testing.assert_allclose(seen(doubled, cases, "contrast"), 2 * seen(plain, cases, "contrast"), rtol=1e-5)


def test_detail_under_the_mask_is_compared_with_that_of_the_ring(cases, plain):
    rng = np.random.default_rng(0)
    grainy = [image + case.mask * rng.normal(0, 0.04, image.shape) for image, case in zip(plain, cases, strict=True)]
    assert (seen(grainy, cases, "fine_band") > seen(plain, cases, "fine_band") + 0.3).all()
    everywhere = [image * 2 for image in plain]
    np.testing.assert_allclose(seen(everywhere, cases, "fine_band"), seen(plain, cases, "fine_band"), atol=1e-4)


def test_a_notch_is_irregular(cases, plain):
    notched = []
    for case, image in zip(cases, plain, strict=True):
        row, column = np.argwhere(case.lesion).mean(0).round().astype(int)
        cut = image.copy()
        cut[row - 2 : row + 3, column:] = 0.3
        notched.append(cut)
    assert (seen(notched, cases, "irregularity") > seen(plain, cases, "irregularity") + 0.05).all()


def test_place_and_size_are_those_of_the_blob(cases, plain):
    moved = [np.roll(image, (1, -1), (0, 1)) for image in plain]
    np.testing.assert_allclose(seen(moved, cases, "row"), seen(plain, cases, "row") + 1, atol=0.3)
    np.testing.assert_allclose(seen(moved, cases, "column"), seen(plain, cases, "column") - 1, atol=0.3)
    told = [case.diameter - 4 for case in cases]  # `lesion_image` draws a smaller disk
    np.testing.assert_allclose(seen(plain, cases, "diameter"), told, rtol=0.08)


def test_a_faint_lesion_has_no_edge_and_no_place(cases):
    flat = [np.full(case.image.shape, 0.3) for case in cases]
    found = dict(zip(MEASURED, measure(cases, flat).T, strict=True))
    for name in ("irregularity", "edge_rise", "row", "column", "diameter"):
        assert np.isnan(found[name]).all()
    assert np.isfinite(found["spiculation"]).all()
    np.testing.assert_allclose(found["contrast"], 0, atol=1e-6)


def test_a_lesion_at_the_corner_is_measured(disk_case):
    case = disk_case(0, False)
    lesion = np.zeros_like(case.lesion)
    lesion[:8, :8] = True
    corner = replace(case, lesion=lesion, mask=lesion)
    assert np.isfinite(measure([corner], [np.where(lesion, 0.8, 0.3)])).all()
