"""Seeds and masks of cases, names of data sets, and the choice of some cases."""

from pathlib import Path

import numpy as np
import pytest

from gbci_fast.evaluate.case import AIR_MARGIN, MASK_GROWTH, image_seed, mask_around, root_names, spread, variant_seed


def test_image_seed():
    """Frozen: a stored report is repeatable only as long as this function stands."""
    assert image_seed(0, "study", "image") == 4389857050242636194
    assert len({image_seed(seed, study, "i") for seed in (0, 1) for study in "ab"}) == 4
    assert all(0 <= image_seed(seed, "s", "i") < 2**63 for seed in range(50))


def test_variants_have_other_noise_and_the_first_the_cases_own():
    assert variant_seed(7, 0) == 7
    assert variant_seed(7, 1) == variant_seed(7, 1) != variant_seed(7, 2)
    assert len({variant_seed(seed, variant) for seed in range(9) for variant in range(4)}) == 36


def test_a_mask_stays_near_the_lesion_and_the_breast():
    lesion, breast = np.zeros((32, 32), bool), np.zeros((32, 32), bool)
    lesion[16, 10], breast[:, :11] = True, True
    mask = mask_around(lesion, breast)
    assert mask[16].nonzero()[0].tolist() == list(range(10 - MASK_GROWTH, 11 + AIR_MARGIN))
    assert mask[:, 10].sum() == 2 * MASK_GROWTH + 1


def test_data_sets_of_one_name_are_told_apart_by_their_paths():
    assert root_names([Path("/a/x"), Path("/a/y")]) == {Path("/a/x"): "x", Path("/a/y"): "y"}
    assert root_names([Path("/a/x"), Path("/b/x")]) == {Path("/a/x"): "/a/x", Path("/b/x"): "/b/x"}


@pytest.mark.parametrize(("limit", "chosen"), [(None, "abcdef"), (9, "abcdef"), (3, "ace"), (1, "a")])
def test_a_limit_is_spread_over_all(limit, chosen):
    assert "".join(spread("abcdef", limit)) == chosen
