"""Features: what they measure, that no hidden pixel and no left-out band gets in, and small lesions."""

import numpy as np
import pytest
from scipy import ndimage

from gbci_fast.evaluate.realism.regions import REGIONS, Place
from gbci_fast.evaluate.realism.texture import BLUR, FINEST, GROUPS, features, smooth


@pytest.fixture
def case(noisy_cases):
    return noisy_cases(1)[0]


def inside(case, change):
    """The case's image with `change` under the mask."""
    return np.where(case.mask, change, case.pixels).astype(np.float32)


def test_all_groups_are_measured_and_names_do_not_depend_on_the_lesion(noisy_cases, square):
    for region in REGIONS:
        cases = [*noisy_cases(2), square(side=3), square(top=0, left=0, side=40)]
        names = [tuple(features(Place.of(case), case.pixels, region)) for case in cases]
        assert len(set(names)) == 1
        assert {name.split("/")[0] for name in names[0]} == set(GROUPS)


@pytest.mark.parametrize("region", REGIONS)
def test_hidden_pixels_are_not_measured(case, region):
    place, rng = Place.of(case), np.random.default_rng(0)
    seen = np.full(case.mask.shape, region != "interior")
    place.cut(seen)[...] = place.seen(region)
    other = np.where(seen, case.pixels, rng.random(seen.shape)).astype(np.float32)
    one, two = (features(place, image, region) for image in (case.pixels, other))
    np.testing.assert_allclose(list(two.values()), list(one.values()), rtol=1e-9)


def test_a_checkerboard_is_seen_by_the_finest_band_alone(case):
    """It is the finest detail there is; a group that saw it would let the finest band in where that is left out."""
    y, x = np.mgrid[:64, :64]
    plain = features(Place.of(case), case.pixels, "interior")
    board = features(Place.of(case), inside(case, case.pixels + 0.05 * (-1.0) ** (x + y)), "interior")
    moved = {name: abs(board[name] - plain[name]) for name in plain if np.isfinite(plain[name])}
    assert moved[f"{FINEST}/checker_core"] > 1
    assert moved[f"{FINEST}/band0_core"] > 0.5
    others = {name: value for name, value in moved.items() if name.startswith(("bands/", "residual/residual_power"))}
    assert max(others.values()) < 0.1


def test_a_blurred_lesion_has_less_power_in_fine_bands_and_as_much_in_its_mean(case):
    blurred = features(Place.of(case), inside(case, ndimage.gaussian_filter(case.pixels, 1)), "whole")
    plain = features(Place.of(case), case.pixels, "whole")
    assert blurred[f"{FINEST}/band0_core"] < plain[f"{FINEST}/band0_core"] - 2
    assert blurred[f"{FINEST}/band0_step"] < -2 < plain[f"{FINEST}/band0_step"]
    assert blurred[f"{FINEST}/lag01_core"] > plain[f"{FINEST}/lag01_core"] + 0.3
    assert blurred["contrast/contrast"] == pytest.approx(plain["contrast/contrast"], abs=0.02)


@pytest.mark.parametrize("cell", [4, 8])
def test_the_lattice_of_latent_cells_is_seen(case, cell):
    """Steps at the borders of the cells of the model image, wherever the lesion lies."""
    y, x = np.mgrid[:64, :64]
    tiles = 0.1 * ((y // cell + x // cell) % 2)
    found = features(Place.of(case), inside(case, case.pixels + tiles), "interior")
    phases = [found[f"{FINEST}/cell{cell}_phase{i}"] for i in range(cell)]
    assert np.argmax(phases) == cell - 1  # from the last pixel of a cell to the first one of the next
    plain = features(Place.of(case), case.pixels, "interior")
    assert found[f"{FINEST}/cell{cell}_spread"] > 2 * plain[f"{FINEST}/cell{cell}_spread"]


def test_smoothing_ignores_hidden_pixels_and_keeps_a_constant():
    seen = np.zeros((20, 20), bool)
    seen[5:12, 5:12] = True
    x = np.where(seen, 0.7, 1e3)
    np.testing.assert_allclose(smooth(x, seen, BLUR)[seen], 0.7)


def test_a_lesion_of_few_pixels_has_unknown_features_and_no_infinite_ones(square):
    case = square(side=2)
    found = np.array(list(features(Place.of(case), case.pixels, "interior").values()))
    assert np.isnan(found).any()
    assert not np.isinf(found).any()
