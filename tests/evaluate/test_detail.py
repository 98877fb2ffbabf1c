"""Fine detail at model pixels: power, bands, and that a seam is no detail."""

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter

from gbci_fast.evaluate.detail import SEAM, band_energies, fine_power, interiors
from gbci_fast.evaluate.lesions import NATIVE_SIZE, Crops


def middles(pixels, radius=12):
    """Crops of which the middles alone matter, with a disk as the mask."""
    y, x = np.indices((NATIVE_SIZE, NATIVE_SIZE)) - (NATIVE_SIZE - 1) / 2
    mask = np.broadcast_to(np.hypot(y, x) < radius, pixels.shape)
    blank = np.zeros((len(pixels), 64, 64))
    return Crops(pixels=blank, masks=blank > 0, patients=("p",) * len(pixels), middles=(pixels, mask))


def noise(n=20, seed=0):
    return 0.5 + np.random.default_rng(seed).normal(0, 0.02, (n, NATIVE_SIZE, NATIVE_SIZE))


def wave(cycles):
    """A wave of `cycles` per pixel along x, of amplitude 0.1."""
    x = np.arange(NATIVE_SIZE)
    return np.broadcast_to(0.5 + 0.1 * np.cos(2 * np.pi * cycles * x), (1, NATIVE_SIZE, NATIVE_SIZE))


def test_waves_beyond_the_cutoff_count_and_slow_ones_do_not():
    fast, slow = (fine_power(middles(wave(cycles)))[0] for cycles in (0.42, 0.08))
    assert np.exp(fast) == pytest.approx(0.1**2 / 2, rel=0.1)
    assert fast - slow > np.log(100)


def test_a_blur_by_a_pixel_takes_nine_tenths_of_the_power():
    sharp = noise()
    loss = fine_power(middles(gaussian_filter(sharp, (0, 1, 1)))) - fine_power(middles(sharp))
    assert loss.max() < np.log(0.1)


def test_gain_is_squared_and_brightness_does_not_count():
    sharp = noise()
    gain = fine_power(middles(0.5 * sharp + 0.2)) - fine_power(middles(sharp))
    np.testing.assert_allclose(gain, np.log(0.25), atol=1e-6)


def test_a_flat_lesion_has_the_least_power_that_16_bits_show():
    np.testing.assert_allclose(fine_power(middles(np.full((1, NATIVE_SIZE, NATIVE_SIZE), 0.3))), np.log(65535.0**-2))


def test_bands_tell_scales_apart():
    """A blur takes the finest band most and the coarsest least."""
    sharp = noise()
    loss = (band_energies(middles(sharp)) - band_energies(middles(gaussian_filter(sharp, (0, 1, 1))))).mean(0)
    assert loss.shape == (4,)
    assert (np.diff(loss) < 0).all()
    assert loss[0] > 3
    assert loss[-1] < 1


def test_what_lies_at_the_mask_s_edge_is_no_detail():
    flat = np.full((1, NATIVE_SIZE, NATIVE_SIZE), 0.5)
    crops = middles(flat)
    inside = interiors(crops)[0]
    mask = crops.native[1][0]
    assert inside.any()
    assert not (inside & ~mask).any()
    y, x = np.nonzero(~mask)
    for i, j in zip(*np.nonzero(inside), strict=True):
        assert np.hypot(y - i, x - j).min() > SEAM


def test_a_mask_too_small_for_an_interior_counts_whole_and_one_beyond_the_window_to_its_edge():
    flat = np.full((1, NATIVE_SIZE, NATIVE_SIZE), 0.5)
    small = middles(flat, radius=2)
    np.testing.assert_array_equal(interiors(small), small.native[1])
    assert interiors(middles(flat, radius=100)).all()
