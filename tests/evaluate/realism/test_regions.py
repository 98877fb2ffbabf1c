"""Regions: what each shows, and that what it does not show cannot be seen."""

import numpy as np
import pytest

from gbci_fast.evaluate.realism.regions import ERODED, FEWEST, REGIONS, Place


@pytest.fixture
def case(noisy_cases):
    return noisy_cases(1)[0]


def test_a_place_is_a_rectangle_around_the_mask(case):
    place = Place.of(case)
    assert place.mask.sum() == case.mask.sum()
    np.testing.assert_array_equal(place.cut(case.mask), place.mask)
    assert (place.core & ~place.mask).sum() == 0
    assert not (place.around & (place.mask | place.rim)).any()
    assert (place.rim & place.mask).any()
    assert (place.rim & ~place.mask).any()


def test_interior_and_ring_share_no_pixel_and_hold_all(case):
    place = Place.of(case)
    interior, ring = place.seen("interior"), place.seen("ring")
    assert not (interior & ring).any()
    assert (interior | ring).all()
    assert (ring & place.mask).any()


def test_the_interior_is_the_mask_without_its_outermost_pixels(square):
    core = Place.of(square(side=20)).core
    assert core.sum() == (20 - 2 * ERODED) ** 2


def test_a_small_lesion_keeps_an_interior(square):
    small, tiny = Place.of(square(side=7)), Place.of(square(side=3))
    assert small.core.sum() == FEWEST
    assert tiny.core.sum() == 9


@pytest.mark.parametrize("region", REGIONS)
def test_hidden_pixels_change_nothing_that_is_shown(case, region):
    place, rng = Place.of(case), np.random.default_rng(0)
    seen = np.full(case.mask.shape, region != "interior")
    place.cut(seen)[...] = place.seen(region)
    other = np.where(seen, case.pixels, rng.random(seen.shape)).astype(np.float32)
    shown = place.show(case.pixels, region)
    np.testing.assert_array_equal(place.show(other, region), shown)
    np.testing.assert_array_equal(shown[seen], case.pixels[seen])
    assert len(np.unique(shown[~seen])) == (0 if region == "whole" else 1)
