"""The network's windows: native pixels, place, mirror images; and that one set can be told from another."""

import numpy as np
import torch
from scipy import ndimage

from gbci_fast.evaluate.realism.network import (
    CELL,
    STRIDE,
    TURNS,
    WINDOW,
    cut_windows,
    score_windows,
    train_network,
    turn_at_random,
    window_corners,
)
from gbci_fast.evaluate.realism.regions import Place


def windows(side, region="whole", kind="real"):
    return cut_windows(side.cases, side.places, side.fillings[kind], region)


def test_windows_are_cut_at_the_model_s_own_pixels(noisy_cases, side):
    (case,) = cases = noisy_cases(1)
    found = windows(side(cases))
    ((top, left),) = window_corners(case, Place.of(case), "whole")
    np.testing.assert_array_equal(found.pixels[0, 0], case.pixels[top : top + WINDOW, left : left + WINDOW])
    np.testing.assert_array_equal(found.pixels[0, 1], case.mask[top : top + WINDOW, left : left + WINDOW])
    assert found.pixels[0, 1].sum() == case.mask.sum()


def test_a_large_lesion_has_several_windows_that_cover_it(square):
    case = square(top=10, left=4, side=80)
    corners = window_corners(case, Place.of(case), "whole")
    covered = np.zeros_like(case.mask)
    for top, left in corners:
        assert top % CELL == left % CELL == 0
        covered[top : top + WINDOW, left : left + WINDOW] = True
    assert (covered & case.mask).sum() > 0.95 * case.mask.sum()
    rows = sorted({top for top, _ in corners})
    assert len(rows) > 1
    assert max(np.diff(rows)) <= STRIDE + CELL


def test_every_window_of_a_region_shows_some_of_it(square):
    case = square(top=0, left=0, side=96)
    ring = window_corners(case, Place.of(case), "ring")
    assert 0 < len(ring) <= len(window_corners(case, Place.of(case), "interior"))
    assert window_corners(square(side=2), Place.of(square(side=2)), "whole")


def test_choosing_lesions_keeps_their_windows_together(square, side):
    cases = [square(top=4, left=4, side=80, patient="a"), square(patient="b"), square(side=70, top=9, patient="c")]
    found = windows(side(cases))
    chosen = found.of(np.array([2, 0]))
    assert chosen.patients == ("c", "a")
    assert len(chosen.pixels) == len(chosen.lesions) == (found.lesions != 1).sum()
    np.testing.assert_array_equal(chosen.pixels[chosen.lesions == 0], found.pixels[found.lesions == 2])
    assert set(chosen.patches.patients) == {"a", "c"}


def test_turns_are_the_eight_of_a_square_and_turn_image_and_mask_together():
    x = torch.arange(2 * 9.0).reshape(1, 2, 3, 3).expand(200, -1, -1, -1)
    turned = turn_at_random(x, torch.Generator().manual_seed(0))
    assert len({tuple(one.flatten().tolist()) for one in turned[:, 0]}) == TURNS
    assert torch.equal(turned[:, 1] - turned[:, 0], torch.full_like(turned[:, 0], 9))


class TestJudging:
    def blurred(self, cases):
        return [
            np.where(case.mask, ndimage.gaussian_filter(case.pixels, 1.0), case.pixels).astype(np.float32)
            for case in cases
        ]

    def test_blurred_lesions_are_told_from_sharp_ones_of_other_patients(self, noisy_cases, side):
        train, test = noisy_cases(24, seed=1), noisy_cases(12, seed=2)
        train, test = (side(cases, painted=self.blurred(cases)) for cases in (train, test))
        network = train_network(windows(train), windows(train, kind="painted"), seed=0, steps=30, batch_size=16)
        real, painted = (score_windows(network, windows(test, kind=kind)) for kind in ("real", "painted"))
        assert (real[:, None] > painted).mean() > 0.9

    def test_scores_do_not_depend_on_mirroring_and_equal_seeds_give_equal_networks(self, noisy_cases, side):
        found = windows(side(noisy_cases(4)))
        one, two = (train_network(found, found, seed=3, steps=2, batch_size=4) for _ in range(2))
        scores = score_windows(one, found)
        np.testing.assert_array_equal(score_windows(two, found), scores)
        mirrored = type(found)(
            pixels=np.ascontiguousarray(found.pixels[..., ::-1]), lesions=found.lesions, patients=found.patients
        )
        np.testing.assert_allclose(score_windows(one, mirrored), scores, rtol=1e-4, atol=1e-5)
