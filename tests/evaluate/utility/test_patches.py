"""Patches: what they show, what they touch, and where moved masks lie."""

from dataclasses import replace

import numpy as np
import pytest

from gbci_fast.attributes import Attributes
from gbci_fast.errors import GBCIError
from gbci_fast.evaluate.lesions import LesionCase, read_lesions
from gbci_fast.evaluate.utility.patches import (
    PATCH_SIZE,
    Site,
    cut,
    lesion_patches,
    lesion_window,
    moved_lesions,
    normal_patches,
    sites,
)
from gbci_fast.phantom import generate_phantom

SIZE = 160
BRIGHT = 60000


@pytest.fixture(scope="module")
def phantoms(tmp_path_factory):
    root = tmp_path_factory.mktemp("patches") / "phantom"
    generate_phantom(root, studies=4, seed=3, size=192)
    return read_lesions([root], size=SIZE)


def bright(top, left, height=12, width=12, *, image_id="image", patient="set/p", others=(), **changes):
    """A bright lesion in a gray half of an image; `others` are further lesions (top, left, height, width) of it."""
    image = np.full((SIZE, SIZE), 20000, np.uint16)
    lesion = np.zeros((SIZE, SIZE), bool)
    lesion[top : top + height, left : left + width] = True
    for y, x, h, w in ((top, left, height, width), *others):
        image[y : y + h, x : x + w] = BRIGHT
    breast = np.zeros((SIZE, SIZE), bool)
    breast[:, :120] = True
    values = {
        "root": "set",
        "image_id": image_id,
        "number": 0,
        "patient": patient,
        "split": "training",
        "seed": 1,
        "image": np.where(breast, image, 0).astype(np.uint16),
        "breast": breast,
        "lesion": lesion,
        "mask": lesion,
        "attributes": Attributes(),
        "report": None,
    }
    return LesionCase(**(values | changes))


class TestLesionPatches:
    def test_pixels_are_the_image_s_own_and_the_lesion_is_in_the_middle(self):
        case = bright(60, 50)
        patch = lesion_patches([case]).pixels[0]
        ys, xs = np.nonzero(patch > 0.5)
        assert patch.shape == (PATCH_SIZE, PATCH_SIZE)
        assert len(ys) == 12 * 12  # not resampled
        assert (ys.mean(), xs.mean()) == ((PATCH_SIZE - 1) / 2, (PATCH_SIZE - 1) / 2)

    @pytest.mark.parametrize(("top", "left"), [(0, 0), (148, 0), (3, 108)])
    def test_at_the_edge_the_window_stays_in_the_image_and_shows_the_lesion(self, top, left):
        case = bright(top, left)
        y, x = lesion_window(case)
        assert 0 <= y <= SIZE - PATCH_SIZE
        assert 0 <= x <= SIZE - PATCH_SIZE
        assert cut(case.lesion, (y, x)).sum() == case.lesion.sum()

    def test_windows_are_off_the_lesions_by_their_seeds_and_hold_them_whole(self):
        cases = [bright(60, 50, seed=seed) for seed in range(200)]
        offsets = np.array([lesion_window(case, 16) for case in cases]) - lesion_window(cases[0])
        assert offsets.min() == -16
        assert offsets.max() == 16
        assert np.abs(offsets.mean(0)).max() < 3
        assert np.abs(np.corrcoef(offsets.T)[0, 1]) < 0.2
        assert all(cut(case.lesion, lesion_window(case, 16)).sum() == case.lesion.sum() for case in cases)
        assert lesion_window(cases[3], 16) == lesion_window(replace(cases[3]), 16)

    @pytest.mark.parametrize(("side", "largest"), [(60, 2), (64, 0), (90, 16)])
    def test_a_wide_lesion_s_window_moves_as_far_as_the_lesion_allows(self, side, largest):
        """A lesion that fits stays inside; of a larger one, the middle does."""
        cases = [bright(30, 15, side, side, seed=seed) for seed in range(60)]
        offsets = np.array([lesion_window(case, 16) for case in cases]) - lesion_window(cases[0])
        assert (offsets.min(), offsets.max()) == (-largest, largest)

    def test_images_may_be_others(self):
        case = bright(60, 50)
        assert not lesion_patches([case], [np.zeros((SIZE, SIZE), np.float32)]).pixels.any()


class TestNormalPatches:
    def test_none_shows_a_lesion_of_its_image(self):
        first, second = (10, 20, 12, 12), (120, 90, 12, 12)
        cases = [bright(*first, others=[second], image_id=f"i{i}", patient=f"p{i}") for i in range(10)]
        cases += [bright(*second, others=[first], number=1, image_id=f"i{i}", patient=f"p{i}") for i in range(10)]
        patches = normal_patches(cases, seed=0)
        assert len(patches) == len(cases)
        assert patches.pixels.max() < 0.5

    def test_phantom_windows_are_free_of_lesions_and_centered_in_the_breast(self, phantoms):
        found = 0
        for site in sites(phantoms):
            for window in site.draw(0.7, 20, np.random.default_rng(0)):
                found += 1
                assert not cut(site.occupied, window).any()
                assert site.case.breast[window[0] + PATCH_SIZE // 2, window[1] + PATCH_SIZE // 2]
        assert found > 0

    def test_windows_are_the_ones_that_a_plain_search_finds(self):
        site = Site([bright(60, 50)])
        half = PATCH_SIZE // 2
        expected = [
            (y, x)
            for y in range(SIZE - PATCH_SIZE + 1)
            for x in range(SIZE - PATCH_SIZE + 1)
            if site.case.breast[y + half, x + half] and not cut(site.occupied, (y, x)).any()
        ]
        assert [tuple(place) for place in site.windows[0]] == expected
        np.testing.assert_allclose(site.windows[1], [cut(site.case.breast, place).mean() for place in expected])

    def test_they_hold_as_much_breast_as_the_lesions_do(self):
        inner = [bright(100, 20, image_id=f"a{i}") for i in range(20)]
        outer = [bright(100, 107, image_id=f"b{i}") for i in range(20)]
        shares = [np.mean(normal_patches(cases, seed=0).pixels > 0) for cases in (inner, outer)]
        wanted = [np.mean(lesion_patches(cases).pixels > 0) for cases in (inner, outer)]
        np.testing.assert_allclose(shares, wanted, atol=0.05)
        assert shares[0] > shares[1] + 0.2

    def test_an_image_full_of_lesion_has_none(self):
        assert len(normal_patches([bright(0, 0, SIZE, SIZE)], seed=0)) == 0

    def test_off_center_windows_touch_no_lesion_either_and_vary_as_the_lesions_do(self):
        others = bright(120, 90, number=1)
        cases = [bright(10, 20, others=[(120, 90, 12, 12)], seed=seed) for seed in range(30)]
        patches = normal_patches(cases, seed=0, offset=16, others=[others])
        assert len(patches) == len(cases)
        assert patches.pixels.max() < 0.5
        centered = normal_patches(cases, seed=0, others=[others])
        assert patches.pixels.shape == centered.pixels.shape
        assert (patches.pixels != centered.pixels).any()

    def test_another_seed_is_another_place(self):
        rng = np.random.default_rng(0)
        case = bright(0, 0, image=rng.integers(0, 65535, (SIZE, SIZE), np.uint16))
        patches = [normal_patches([case], seed).pixels for seed in (0, 0, 1)]
        np.testing.assert_array_equal(patches[0], patches[1])
        assert (patches[0] != patches[2]).any()

    def test_images_below_a_patch_are_refused(self):
        small = np.ones((32, 32), bool)
        with pytest.raises(GBCIError, match="images are 32 pixels wide; expected at least 64"):
            normal_patches([bright(0, 0, mask=small, breast=small)], seed=0)


class TestMovedLesions:
    @pytest.mark.parametrize("offset", [0, 16])
    def test_masks_lie_in_the_breast_and_off_every_lesion_and_so_do_their_windows(self, phantoms, offset):
        originals = {site.case.image_id: site for site in sites(phantoms)}
        moved = moved_lesions(phantoms, 12, seed=0, offset=offset)
        assert len(moved) == 12
        for case in moved:
            site = originals[case.image_id]
            assert case.mask.any()
            assert not (case.mask & ~case.breast).any()
            assert not (case.mask & site.occupied).any()
            assert not cut(site.occupied, lesion_window(case, offset)).any()
            assert not (case.lesion & ~case.mask).any()
            np.testing.assert_array_equal(case.image, site.case.image)

    def test_mask_and_lesion_are_another_patient_s_and_the_breast_is_the_host_s(self):
        def case(patient, height, width, **attributes):
            return bright(10, 10, height, width, image_id=patient, patient=patient, attributes=Attributes(**attributes))

        cases = [
            case("a", 12, 17, laterality="L", breast_density="A", finding_birads=3, finding_categories=("Mass",)),
            case("b", 9, 14, laterality="R", breast_density="D", finding_birads=5, finding_categories=("Asymmetry",)),
        ]
        sizes = {"a": (9, 14), "b": (12, 17)}
        moved = moved_lesions(cases, 4, seed=0)
        assert {one.patient for one in moved} == {"a", "b"}
        for one in moved:
            host, donor = (cases[0], cases[1]) if one.patient == "a" else (cases[1], cases[0])
            assert (np.sum(one.mask.any(1)), np.sum(one.mask.any(0))) == sizes[one.patient]
            assert one.attributes == replace(
                host.attributes,
                finding_birads=donor.attributes.finding_birads,
                finding_categories=donor.attributes.finding_categories,
            )

    @pytest.mark.parametrize("size", [(11, 14), (12, 13), (70, 20)])
    def test_their_windows_are_centered_on_them(self, size):
        cases = [bright(0, 0, *size, image_id=p, patient=p) for p in ("a", "b")]
        for case in moved_lesions(cases, 3, seed=1):
            ys, xs = np.nonzero(case.mask)
            top, left = lesion_window(case)
            assert abs(ys.mean() - (top + (PATCH_SIZE - 1) / 2)) <= 0.5
            assert abs(xs.mean() - (left + (PATCH_SIZE - 1) / 2)) <= 0.5

    def test_a_longer_list_begins_with_the_shorter_one(self, phantoms):
        short, long = moved_lesions(phantoms, 3, seed=0), moved_lesions(phantoms, 6, seed=0)
        for one, two in zip(short, long, strict=False):
            assert one.seed == two.seed
            np.testing.assert_array_equal(one.mask, two.mask)
        assert len({case.seed for case in long}) == 6

    def test_what_cannot_be_is_refused(self):
        with pytest.raises(GBCIError, match="all training lesions are of one patient; expected at least 2"):
            moved_lesions([bright(0, 0)], 1, seed=0)
        full = [bright(0, 0, SIZE, SIZE, image_id=p, patient=p) for p in ("a", "b")]
        with pytest.raises(GBCIError, match="no lesion's mask fits into the normal tissue of any of 2 images"):
            moved_lesions(full, 1, seed=0)
