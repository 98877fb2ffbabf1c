"""Paintings in a file: the same pixels come back, for the same lesions alone, and no real pixel is in it."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from gbci_fast.errors import GBCIError
from gbci_fast.evaluate.realism.paintings import fill, read_paintings, save_paintings, under_masks
from gbci_fast.evaluate.settings import PaintSettings

FIXTURE = Path(__file__).parents[3] / "benchmarks" / "fixtures" / "painted_2026_11.npz"
SETTINGS = PaintSettings(steps=4, tier="approximate")


@pytest.fixture
def cases(noisy_cases):
    return noisy_cases(5, roots=("film", "digital"))


@pytest.fixture
def images(cases):
    rng = np.random.default_rng(0)
    return [np.where(case.mask, rng.random(case.mask.shape), case.pixels).astype(np.float32) for case in cases]


@pytest.fixture
def stored(cases, images, tmp_path):
    path = tmp_path / "paintings.npz"
    save_paintings(path, cases, under_masks(cases, images), weights="w" * 64, painting=SETTINGS)
    return read_paintings(path)


def test_a_filling_is_the_image_to_16_bits_and_exact_outside_of_the_mask(cases, images):
    for case, image, pixels in zip(cases, images, under_masks(cases, images), strict=True):
        found = fill(case, pixels)
        np.testing.assert_array_equal(found[~case.mask], case.pixels[~case.mask])
        np.testing.assert_allclose(found, image, atol=0.51 / 65535)
        np.testing.assert_array_equal(fill(case, case.image[case.mask]), case.pixels)


def test_the_same_paintings_come_back_in_any_order(cases, images, stored):
    assert stored.weights == "w" * 64
    assert stored.painting["steps"] == 4
    for order in (range(5), (3, 0)):
        wanted = under_masks([cases[i] for i in order], [images[i] for i in order])
        for one, other in zip(stored.of([cases[i] for i in order]), wanted, strict=True):
            np.testing.assert_array_equal(one, other)


def test_the_file_holds_masked_pixels_alone(cases, stored):
    with np.load(stored.path, allow_pickle=False) as file:
        assert set(file.files) == {"about", "keys", "counts", "steps"}
        assert len(file["steps"]) == sum(case.mask.sum() for case in cases)
        assert set(json.loads(str(file["about"]))) == {"format", "weights", "painting"}


@pytest.mark.parametrize("change", ["image", "mask", "name"])
def test_another_image_mask_or_lesion_is_refused(cases, stored, change):
    case = cases[0]
    image, mask = case.image.copy(), case.mask.copy()
    image[0, 0] += 1
    mask[0, 0] = True
    other = {"image": {"image": image}, "mask": {"mask": mask}, "name": {"number": 7}}[change]
    with pytest.raises(GBCIError, match=r"paintings\.npz holds no painting of film/image0_0-\d with this image and"):
        stored.of([replace(case, **other)])


def test_a_damaged_or_foreign_file_is_one_sentence(stored, tmp_path):
    path = stored.path
    whole = path.read_bytes()
    foreign = tmp_path / "foreign.npz"
    np.savez(foreign, x=np.zeros(3))
    for content in (b"", b"text", whole[:100], whole[: len(whole) // 2], foreign.read_bytes()):
        path.write_bytes(content)
        with pytest.raises(GBCIError, match=r"paintings\.npz cannot be read as paintings"):
            read_paintings(path)
    with pytest.raises(GBCIError, match=r"gone\.npz cannot be read as paintings"):
        read_paintings(tmp_path / "gone.npz")


def test_the_stored_paintings_of_november_2026_are_whole():
    stored = read_paintings(FIXTURE)
    assert stored.weights.startswith("c7e2e79a9629")
    assert (stored.painting["steps"], stored.painting["tier"]) == (4, "approximate")
    roots = [key.split("/")[0] for key in stored.pixels]
    assert {root: roots.count(root) for root in set(roots)} == {"cbis_ddsm": 1180, "cdd_cesm": 283}
