"""Mask weights: hand-computed cases, and the properties that keep the background bit-exact."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import ndimage

from gbci_fast.model.masks import composite, feather_latent_mask, feather_pixels, latent_mask

MASKS = hnp.arrays(bool, (16, 24))
RADII = st.integers(0, 3)


def tensor(array):
    return torch.from_numpy(np.asarray(array, np.float32))[None, None]


def chessboard(mask):
    """Chessboard distance of every element to the mask; a large number if the mask is empty."""
    return ndimage.distance_transform_cdt(~mask, "chessboard") if mask.any() else np.full(mask.shape, 999)


def test_latent_mask_by_hand():
    mask = np.zeros((8, 8))
    mask[3, 3] = 1  # one pixel is enough for its cell
    mask[4:6, 2:5] = 0.51
    mask[7, 7] = 0.5  # not above one half
    assert latent_mask(tensor(mask), 4)[0, 0].tolist() == [[1, 0], [1, 1]]


@given(mask=MASKS, factor=st.sampled_from([1, 2, 4, 8]))
@settings(deadline=None)
def test_latent_mask_is_conservative(mask, factor):
    cells = latent_mask(tensor(mask), factor)[0, 0].numpy()
    assert cells.shape == (16 // factor, 24 // factor)
    expected = mask.reshape(16 // factor, factor, 24 // factor, factor).any((1, 3))
    assert np.array_equal(cells, expected)


def test_feather_latent_mask_by_hand():
    row = feather_latent_mask(tensor([[0, 0, 0, 0, 1, 0, 0, 0]] * 5), 1)[0, 0, 2]
    torch.testing.assert_close(row, torch.tensor([0, 0, 1 / 3, 2 / 3, 1, 2 / 3, 1 / 3, 0]))


@given(mask=MASKS, radius=RADII)
@settings(deadline=None)
def test_feather_latent_mask_is_one_inside_and_zero_far_outside(mask, radius):
    weight = feather_latent_mask(tensor(mask), radius)[0, 0].numpy()
    assert (weight[mask] == 1).all()
    assert (weight[chessboard(mask) > 2 * radius] == 0).all()
    assert (weight >= 0).all()
    assert (weight <= 1).all()
    if mask.any() and radius:
        near = ~mask & (chessboard(mask) == 1)
        assert (weight[near] > 0).all()


def test_feather_pixels_by_hand():
    mask = np.zeros((7, 9))
    mask[1:6, 1:8] = 1
    weight = 3 * feather_pixels(tensor(mask), 2)[0, 0]
    assert weight.round().int().tolist() == [
        [0, 0, 0, 0, 0, 0, 0, 0, 0],
        [0, 1, 1, 1, 1, 1, 1, 1, 0],
        [0, 1, 2, 2, 2, 2, 2, 1, 0],
        [0, 1, 2, 3, 3, 3, 2, 1, 0],
        [0, 1, 2, 2, 2, 2, 2, 1, 0],
        [0, 1, 1, 1, 1, 1, 1, 1, 0],
        [0, 0, 0, 0, 0, 0, 0, 0, 0],
    ]


def test_thin_masks_stay_faint():
    """The ramp depends only on the distance, not on the largest weight of this mask or of others in the batch."""
    masks = torch.zeros(2, 1, 7, 7)
    masks[0, :, 3] = 1
    masks[1, :, 1:6, 1:6] = 1
    weight = feather_pixels(masks, 2)
    torch.testing.assert_close(weight[0, 0, 3], torch.full((7,), 1 / 3))
    assert torch.equal(feather_pixels(masks[:1], 2), weight[:1])
    assert weight[1, 0, 3, 3] == 1


def test_the_image_border_is_no_edge_of_the_mask():
    assert (feather_pixels(torch.ones(1, 1, 5, 5), 2) == 1).all()


@given(mask=MASKS, radius=RADII)
@settings(deadline=None)
def test_feather_pixels_is_zero_outside_and_one_deep_inside(mask, radius):
    weight = feather_pixels(tensor(mask), radius)[0, 0].numpy()
    assert (weight[~mask] == 0).all()
    assert (weight[mask] > 0).all()
    assert (weight[chessboard(~mask) > radius] == 1).all()


@given(mask=MASKS, radius=RADII, seed=st.integers(0, 9))
@settings(deadline=None)
def test_composite_keeps_the_background_whatever_was_synthesized(mask, radius, seed):
    rng = np.random.default_rng(seed)
    image = tensor(rng.random(mask.shape))
    synthetic = tensor(rng.random(mask.shape))
    synthetic[0, 0][~torch.from_numpy(mask)] = torch.nan
    result = composite(image, synthetic, tensor(mask), radius)[0, 0].numpy()
    assert np.array_equal(result[~mask], image[0, 0].numpy()[~mask])
    core = chessboard(~mask) > radius
    assert np.array_equal(result[core], synthetic[0, 0].numpy()[core])
    assert np.isfinite(result).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_weights_keep_the_masks_dtype(dtype):
    mask = torch.zeros(2, 1, 8, 8, dtype=dtype)
    mask[..., 2:6, 2:6] = 1
    assert latent_mask(mask, 4).dtype == dtype
    assert feather_latent_mask(mask, 1).dtype == dtype
    assert feather_pixels(mask, 2).dtype == dtype
