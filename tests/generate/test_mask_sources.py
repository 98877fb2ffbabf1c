"""Automatic masks: where they may lie, how large they are; boxes, ellipses and mask files."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy import ndimage

from gbci_fast.attributes import FINDING_CATEGORIES
from gbci_fast.data.frame import whole_breast_frame
from gbci_fast.data.segmentation import placement_mask
from gbci_fast.errors import GBCIError
from gbci_fast.generate.mask_sources import DIAMETER_RANGE, EllipseMask, FileMask, automatic_mask, read_mask_file
from gbci_fast.generate.priors import LogNormal, load_priors
from gbci_fast.phantom import render_study

PRIORS = load_priors()


def disk(size=224, radius=100):
    y, x = np.ogrid[:size, :size]
    return np.hypot(y - size / 2, x) < radius


def extent(mask):
    """Height and width of the bounding box."""
    return np.array([np.ptp(np.flatnonzero(mask.any(axis))) + 1 for axis in (1, 0)])


def write_mask(path, values):
    Image.fromarray(values).save(path)
    return path


@pytest.fixture(scope="module")
def phantoms():
    """(view, breast, muscle, tissue) of the four images of a phantom study in model space: its truth."""
    found = []
    for image in render_study(0, 0, (192, 160)):
        frame = whole_breast_frame(image.breast)
        breast, muscle = (frame.to_model(truth) > 0.5 for truth in (image.breast, image.pectoral))
        found.append((image.header.view_position, breast, muscle, placement_mask(breast, muscle, 3)))
    return found


@given(st.integers(0, 3), st.sampled_from((None, *FINDING_CATEGORIES)), st.integers(0, 2**63 - 1))
@settings(max_examples=120, deadline=None)
def test_no_lesion_on_muscle_skin_or_outside(phantoms, which, category, seed):
    view, breast, muscle, tissue = phantoms[which]
    mask = automatic_mask(PRIORS.of((category,) if category else None), breast, tissue, view, seed)
    assert mask.any()
    assert not (mask & ~tissue).any()
    assert not (mask & muscle).any()
    skin = ndimage.distance_transform_edt(np.pad(breast, 1, mode="edge"))[1:-1, 1:-1]
    assert skin[mask].min() > 3


def test_sizes_and_shapes_follow_the_prior():
    prior, breast = PRIORS.of(("Mass",)), np.ones((224, 224), bool)
    boxes = np.array([extent(automatic_mask(prior, breast, breast, "CC", seed)) for seed in range(250)])
    diameters = np.sqrt(boxes.prod(1))
    inside = np.clip((prior.diameter.low, prior.diameter.high), *DIAMETER_RANGE)
    assert inside[0] - 1 < diameters.min() < 1.2 * inside[0]
    assert diameters.max() < inside[1] + 1
    rng = np.random.default_rng(0)
    expected = [prior.diameter.draw(rng, DIAMETER_RANGE) for _ in range(3000)]
    assert np.median(diameters) == pytest.approx(np.median(expected), rel=0.12)
    # Every one lies in one piece, and some are tall and some are wide.
    assert np.quantile(boxes[:, 0] / boxes[:, 1], (0.1, 0.9)) == pytest.approx((0.78, 1.28), abs=0.15)


def test_lesions_are_tilted_to_either_side():
    """The correlation of an ellipse's x and y is its tilt; the waves of the outline alone give 0.1."""
    even = LogNormal(median=60, log_sd=0.01, low=59, high=61)
    prior = dataclasses.replace(PRIORS.pooled, diameter=even)
    breast = np.ones((112, 112), bool)  # lesions of 30 pixels
    tilts = [np.corrcoef(np.nonzero(automatic_mask(prior, breast, breast, "CC", seed)))[0, 1] for seed in range(60)]
    assert np.std(tilts) == pytest.approx(0.27, abs=0.06)
    assert abs(np.mean(tilts)) < 0.1


def test_each_mask_is_in_one_piece():
    prior, breast = PRIORS.of(("Suspicious Calcification",)), disk()
    for seed in range(50):
        mask = automatic_mask(prior, breast, breast, None, seed)
        assert ndimage.label(mask, np.ones((3, 3)))[1] == 1


def test_a_category_larger_than_the_model_has_seen_is_cut():
    large = dataclasses.replace(PRIORS.pooled, diameter=LogNormal(median=120, log_sd=0.2, low=100, high=150))
    breast = np.ones((224, 224), bool)
    assert extent(automatic_mask(large, breast, breast, "CC", 0)).prod() ** 0.5 == pytest.approx(64, abs=1.5)


def test_positions_follow_the_map_of_the_view():
    corner, even = np.full((8, 8), 0.01), np.ones((8, 8))
    corner[6, 1] = 100.0
    small = LogNormal(median=9, log_sd=0.01, low=9, high=9)
    prior = dataclasses.replace(PRIORS.pooled, position={"CC": corner, "MLO": even}, diameter=small)
    breast = np.zeros((224, 224), bool)
    breast[20:180, :160] = True

    def centers(view):
        masks = [automatic_mask(prior, breast, breast, view, seed) for seed in range(60)]
        return np.array([ndimage.center_of_mass(mask) for mask in masks])

    # Cell (6, 1) spans rows 140 to 160 and columns 20 to 40; interpolation reaches a cell further.
    at = centers("CC")
    assert ((np.abs(at - (150, 30)) < 21).all(1)).mean() > 0.9
    assert (centers("MLO").std(0) > 30).all()


def test_an_automatic_mask_is_a_function_of_its_arguments():
    def mask(seed=3, view="CC", category="Mass"):
        return automatic_mask(PRIORS.of((category,)), disk(), disk(radius=90), view, seed)

    np.testing.assert_array_equal(mask(), mask())
    for other in (mask(seed=4), mask(view="MLO"), mask(category="Asymmetry")):
        assert (mask() != other).any()


def test_a_breast_too_narrow_for_the_lesion_still_gets_one():
    sliver = np.zeros((224, 224), bool)
    sliver[60:160, :6] = True
    for seed in range(20):
        mask = automatic_mask(PRIORS.pooled, sliver, sliver, "MLO", seed)
        assert mask.any()
        assert not (mask & ~sliver).any()
    point = np.zeros((224, 224), bool)
    point[7, 9] = True
    np.testing.assert_array_equal(automatic_mask(PRIORS.pooled, sliver, point, None, 0), point)


def test_no_tissue():
    with pytest.raises(GBCIError, match="no place for a lesion: the tissue mask is empty"):
        automatic_mask(PRIORS.pooled, disk(), np.zeros((224, 224), bool), "CC", 0)


@pytest.mark.parametrize(
    ("ellipse", "spacing", "expected"),
    [
        ({"diameter": 20, "unit": "px"}, None, (20, 20)),
        ({"diameter": 20, "unit": "px", "aspect": 4.0}, None, (40, 10)),
        ({"diameter": 20, "unit": "px", "aspect": 4.0, "tilt": 90}, None, (10, 40)),
        ({"diameter": 10, "unit": "mm"}, (0.5, 0.25), (20, 40)),
    ],
)
def test_ellipses(ellipse, spacing, expected):
    mask = EllipseMask(center=(50, 40), **ellipse).on((80, 100), spacing)
    assert tuple(extent(mask)) == expected
    assert ndimage.center_of_mass(mask) == pytest.approx((39.5, 49.5))


def test_a_tilt_turns_clockwise():
    mask = EllipseMask(center=(50, 50), diameter=20, unit="px", aspect=0.25, tilt=45).on((100, 100), None)
    assert mask[60, 60]
    assert not mask[60, 40]
    point = EllipseMask(center=(50.5, 99.9), diameter=0.02, unit="px").on((100, 100), None)
    assert np.argwhere(point).tolist() == [[99, 50]]


def test_ellipses_that_do_not_fit():
    with pytest.raises(GBCIError, match="states no pixel spacing, so diameter_mm has no meaning; give diameter_px"):
        EllipseMask(center=(50, 40), diameter=5, unit="mm").on((80, 100), None)
    sentence = r"the ellipse's center \(200, 40\) lies outside the image of 100x80 pixels"
    with pytest.raises(GBCIError, match=sentence):
        EllipseMask(center=(200, 40), diameter=5, unit="px").on((80, 100), None)


def test_a_mask_file_must_not_change(tmp_path):
    mask = FileMask.of(write_mask(tmp_path / "mask.png", np.eye(4, dtype=np.uint8)))
    np.testing.assert_array_equal(mask.on((4, 4), None), np.eye(4, dtype=bool))
    with pytest.raises(GBCIError, match=r"mask\.png is 4x4 but the image is 6x5; expected a mask of the same size"):
        mask.on((5, 6), None)
    other = FileMask.of(write_mask(tmp_path / "other.png", 1 - np.eye(4, dtype=np.uint8)))
    write_mask(tmp_path / "other.png", np.eye(4, dtype=np.uint8))
    with pytest.raises(GBCIError, match=r"other\.png has changed since the plan was made"):
        other.on((4, 4), None)


def test_a_palette_is_applied(tmp_path):
    indices = np.array([[0, 1], [1, 0]], np.uint8)
    for white, selected in ((0, indices == 0), (1, indices == 1)):
        image = Image.fromarray(indices, "P")
        image.putpalette([255 * (entry == white) for entry in (0, 1) for _ in range(3)])
        image.save(tmp_path / "mask.png")
        np.testing.assert_array_equal(read_mask_file(tmp_path / "mask.png"), selected)
    image.putpalette([0, 0, 0, 255, 0, 0])
    image.save(tmp_path / "mask.png")
    with pytest.raises(GBCIError, match=r"mask\.png is a color image; expected a gray mask"):
        read_mask_file(tmp_path / "mask.png")


@pytest.mark.parametrize(
    ("values", "selected"),
    [
        (np.array([[0, 1, 40, 80, 120, 127, 128, 254, 255]], np.uint8), [0, 0, 0, 0, 0, 0, 1, 1, 1]),
        (np.array([[0, 0, 1, 1]], np.uint8), [0, 0, 1, 1]),
        (np.array([[0, 30000]], np.uint16), [0, 1]),
        (np.array([[*range(0, 32768, 4096), 65535]], np.uint16), [0] * 8 + [1]),
        (np.array([[False, True]]), [0, 1]),
    ],
)
def test_mask_file_is_cut_at_half_of_its_range(tmp_path, values, selected):
    Image.fromarray(values).save(tmp_path / "mask.png")
    mask = read_mask_file(tmp_path / "mask.png")
    assert mask.dtype == bool
    assert mask.tolist() == [[bool(value) for value in selected]]


def damaged_png(path):
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64), np.uint8)).save(path)
    path.write_bytes(path.read_bytes()[:-300])


@pytest.mark.parametrize(
    ("write", "sentence"),
    [
        (lambda path: None, "cannot be read as a mask image: .*No such file"),
        (lambda path: path.write_text("no image"), "cannot be read as a mask image; expected one of PNG, TIFF"),
        (damaged_png, "cannot be read as a mask image: .*truncated"),
        (lambda path: Image.new("RGB", (4, 4), (9, 9, 9)).save(path), "is a color image; expected a gray mask"),
        (lambda path: Image.new("L", (4, 4)).save(path), "is all zero; expected at least one pixel"),
    ],
)
def test_bad_mask_file(tmp_path, write, sentence):
    path = tmp_path / "mask.png"
    write(path)
    with pytest.raises(GBCIError, match=f"mask.png {sentence}"):
        read_mask_file(path)
