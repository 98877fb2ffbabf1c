"""Training images and masks: the description of a mask matches what lies under it."""

import re
import shutil
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from gbci_fast.attributes import Attributes
from gbci_fast.data.fields import FieldOfView, VisibleLesion, to_unit
from gbci_fast.data.folds import patient_fold
from gbci_fast.data.prepare import prepare
from gbci_fast.data.settings import PrepareSettings
from gbci_fast.data.vindr import Finding, ImageRecord, VinDr
from gbci_fast.errors import GBCIError
from gbci_fast.evaluate.case import MASK_GROWTH
from gbci_fast.evaluate.metrics import grow
from gbci_fast.phantom import generate_phantom
from gbci_fast.training.data import augment, draw_mask, load_images

MASS = Attributes(view_position="MLO", finding_categories=("Mass",), finding_birads=4)
SPECKS = Attributes(view_position="MLO", finding_categories=("Suspicious Calcification",))


def disk(y, x, radius, size=96):
    ys, xs = np.ogrid[:size, :size]
    return np.hypot(ys - y, xs - x) <= radius


def breast_with(*lesions, attributes=None, view="MLO"):
    """A 96 x 96 image: a half disk of breast on the left border, bright lesions in it."""
    breast = disk(48, 0, 44)
    image = breast * 20000
    for lesion in lesions:
        image[lesion.pixels] = 60000
    return FieldOfView(
        image=image.astype(np.uint16),
        breast=breast,
        lesions=lesions,
        attributes=attributes or Attributes(view_position=view, breast_density="C"),
        patient="p",
    )


TWO = breast_with(
    VisibleLesion(pixels=disk(40, 20, 6), attributes=MASS, report="a mass"),
    VisibleLesion(pixels=disk(54, 18, 5), attributes=SPECKS, report="specks"),
)
HEALTHY = breast_with(attributes=Attributes(view_position="MLO", finding_categories=()))
UNREAD = breast_with()


def draws(item, count=200):
    return [draw_mask(item, np.random.default_rng(seed)) for seed in range(count)]


def test_covering_masks_carry_their_lesions_description():
    covering = 0
    for mask, attributes, report in draws(TWO):
        for mine, other in (TWO.lesions, TWO.lesions[::-1]):
            if attributes is mine.attributes:
                covering += 1
                assert mask[mine.pixels].all()
                assert not mask[other.pixels].any()
                assert report == mine.report
                # larger than the lesion, but not by far: its outline is no hint
                assert mine.pixels.sum() < mask.sum() < 12 * mine.pixels.sum()
    assert 0.65 < covering / 200 < 0.85


def test_most_masks_are_grown_as_where_lesions_are_generated():
    masks = [mask for mask, attributes, _ in draws(TWO) if attributes is MASS]
    wanted = grow(TWO.lesions[0].pixels, MASK_GROWTH) & grow(TWO.breast, 2) & ~TWO.lesions[1].pixels
    assert 0.25 < np.mean([np.array_equal(mask, wanted) for mask in masks]) < 0.5  # 3 of 8 growths
    assert len({mask.tobytes() for mask in masks}) > 10  # the others are of many kinds


def test_other_masks_say_what_is_under_them():
    nothing = partial = 0
    for mask, attributes, report in draws(TWO):
        if attributes in (MASS, SPECKS):
            continue
        assert report is None
        if (mask & TWO.any_lesion).any():
            partial += 1
            assert attributes == TWO.attributes
            assert attributes.finding_categories is None
        else:
            nothing += 1
            assert attributes == replace(TWO.attributes, finding_categories=())
    assert min(nothing, partial) > 5


def test_healthy_and_unread_images():
    assert {attributes.finding_categories for _, attributes, _ in draws(HEALTHY)} == {()}
    assert {attributes.finding_categories for _, attributes, _ in draws(UNREAD)} == {None}


def test_masks_lie_in_the_breast():
    grown = disk(48, 0, 47)
    for item in (TWO, HEALTHY):
        for mask, _, _ in draws(item):
            assert mask.any()
            assert not mask[~grown].any()


def test_masks_follow_their_generator():
    first, second = (draw_mask(TWO, np.random.default_rng(4))[0] for _ in range(2))
    assert np.array_equal(first, second)


def test_overlapping_lesions_stay_whole():
    item = breast_with(
        VisibleLesion(pixels=disk(40, 20, 6), attributes=MASS, report=None),
        VisibleLesion(pixels=disk(46, 20, 6), attributes=SPECKS, report=None),
    )
    for mask, attributes, _ in draws(item, 50):
        for lesion in item.lesions:
            assert attributes is not lesion.attributes or mask[lesion.pixels].all()


def test_a_breast_without_pixels_is_refused():
    with pytest.raises(GBCIError) as raised:
        draw_mask(replace(HEALTHY, breast=np.zeros((96, 96), bool)), np.random.default_rng(0))
    assert str(raised.value) == "the breast mask is empty in model space; expected at least one pixel"


def test_augmentation_moves_everything_together():
    """The bright disk stays under the lesion's pixels, and the gray of breast and air inside and outside its mask."""
    moved = 0
    for seed in range(40):
        item = augment(TWO, np.random.default_rng(seed))
        assert item.image.dtype == np.uint16
        assert len(item.lesions) == 2
        bright = item.image > 40000
        assert np.array_equal(bright, item.any_lesion)
        assert np.array_equal(item.image > 0, item.breast)
        moved += not np.array_equal(item.breast, TWO.breast)
        assert [lesion.attributes for lesion in item.lesions] == [MASS, SPECKS]
    assert moved > 30


def test_only_cc_views_are_flipped():
    def upside_down(view):
        item = breast_with(VisibleLesion(pixels=disk(30, 20, 6), attributes=MASS, report=None), view=view)
        centers = [
            augment(item, np.random.default_rng(seed)).any_lesion.any(1).nonzero()[0].mean() for seed in range(60)
        ]
        return sum(center > 48 for center in centers)

    assert upside_down("MLO") == upside_down(None) == 0
    assert 15 < upside_down("CC") < 45


def test_a_lesion_moved_out_is_gone():
    item = breast_with(VisibleLesion(pixels=disk(40, 0, 1), attributes=MASS, report=None))
    counts = [len(augment(item, np.random.default_rng(seed)).lesions) for seed in range(30)]
    assert set(counts) == {0, 1}


def test_folds_are_stable_and_balanced():
    names = ("P_00001", "P_00007", "P_00010", "4e3a578fe535ea4f5258d3f7f4419db8")
    assert "".join(map(patient_fold, names)) == "BACB"
    for names in ((f"P_{i:05d}" for i in range(2000)), (f"{i * 2654435761 % 2**32:032x}" for i in range(2000))):
        found = "".join(map(patient_fold, names))
        for fold, share in (("A", 0.425), ("B", 0.425), ("C", 0.15)):
            assert abs(found.count(fold) - 2000 * share) < 100  # at least 4.5 standard deviations


def test_all_studies_of_a_patient_share_the_fold_and_the_split(tmp_path):
    generate_phantom(tmp_path / "phantom", studies=2, size=128, timepoints=2)
    records = VinDr(tmp_path / "phantom").images
    assert len({record.study_id for record in records}) == 4
    patients = {record.patient: {r.split for r in records if r.patient == record.patient} for record in records}
    assert [len(splits) for splits in patients.values()] == [1, 1]


def test_to_unit():
    assert to_unit(np.array([[0, 65535]], np.uint16)).tolist() == [[0.0, 1.0]]


def test_loaded_images_agree_with_the_phantom(images, phantom_root):
    assert len(images) >= 8
    assert all(item.image.shape == item.breast.shape == (64, 64) for item in images)
    assert all(item.image.dtype == np.uint16 for item in images)
    assert {item.patient for item in images} <= {record.extra["patient_id"] for record in VinDr(phantom_root).images}
    lesions = [lesion for item in images for lesion in item.lesions]
    assert lesions
    for item in images:
        assert item.image[item.breast].mean() > 3 * item.image[~item.breast].mean()
        assert item.attributes.pixel_spacing == pytest.approx(240 / 64, rel=0.7)
        assert not item.lesions or item.attributes.finding_categories is None
        for lesion in item.lesions:
            assert lesion.pixels.any()
            assert not (lesion.pixels & ~item.breast).any()
            assert lesion.attributes.pixel_spacing == item.attributes.pixel_spacing
            assert lesion.attributes.finding_categories
            assert lesion.report


def test_whole_views_and_zoomed_views(images):
    """128 native pixels are at least 1.6 times 64: every lesion has its own view at twice the magnification."""
    spacings = sorted({round(item.attributes.pixel_spacing, 3) for item in images})
    assert len(images) > len(
        {(item.patient, item.attributes.laterality, item.attributes.view_position) for item in images}
    )
    zoomed = [item for item in images if item.attributes.pixel_spacing < 0.6 * spacings[-1]]
    assert zoomed
    others = [item for item in images if item.attributes.pixel_spacing >= 0.6 * spacings[-1]]
    assert all(item.breast[:, 0].any() for item in others)  # the chest wall is on the left
    for item in zoomed:
        assert any(np.hypot(*(np.argwhere(lesion.pixels).mean(0) - 31.5)) < 4 for lesion in item.lesions)


def large_record(box):
    """A record of a full-field image, 2000 x 1600, with one finding; `read` gives a half disk of breast."""
    attributes = Attributes(finding_categories=None)
    return ImageRecord(
        study_id="s", image_id="i", path=None, split="training",
        findings=(Finding(box=box, attributes=replace(attributes, finding_categories=("Mass",))),),
    )  # fmt: skip


@pytest.fixture
def load_large(monkeypatch, tmp_path):
    """Loads `large_record(box)` into 224 x 224 views."""

    class Full:
        spacing, patient_id, other_view = (0.1, 0.1), None, None

        def unit(self):
            return (np.hypot(*np.ogrid[-1000:1000, :1600]) < 900).astype(np.float32)

    class Root:
        def __init__(self, root):
            pass

        def of_split(self, split):
            return Root.records

    def load(box):
        Root.records = [large_record(box)]
        monkeypatch.setattr("gbci_fast.training.data.VinDr", Root)
        monkeypatch.setattr(ImageRecord, "read", lambda self: Full())
        return load_images([tmp_path])

    return load


def test_full_field_lesions_are_zoomed(load_large):
    """A lesion of 300 native pixels fits a zoomed view of a full-field image, though it exceeds 224."""
    whole, zoomed = load_large((300, 900, 600, 1200))
    assert zoomed.attributes.pixel_spacing == pytest.approx(whole.attributes.pixel_spacing / 2, rel=0.01)
    assert zoomed.any_lesion.sum() == pytest.approx(4 * whole.any_lesion.sum(), rel=0.1)


def test_lesions_larger_than_a_zoomed_view_are_not(load_large):
    assert len(load_large((0, 600, 850, 1400))) == 1


def test_the_smallest_lesion_keeps_a_pixel(load_large):
    whole, zoomed = load_large((300, 900, 301, 901))
    assert whole.any_lesion.sum() >= 1
    assert zoomed.any_lesion.sum() >= 1


def test_a_lesion_outside_the_outline_counts_as_breast(load_large):
    for item in load_large((780, 230, 840, 290)):
        assert item.any_lesion.any()
        assert item.breast[item.any_lesion].all()


@pytest.fixture
def broken_root(phantom_root, tmp_path):
    """A copy of the phantom, and the mask of one of its training images."""
    root = tmp_path / "broken"
    shutil.copytree(phantom_root, root)
    return root, next((root / "masks").rglob("*.png"))


def test_masks_of_another_size_are_refused(broken_root):
    root, path = broken_root
    Image.new("L", (30, 20)).save(path)
    with pytest.raises(GBCIError, match=rf"^{re.escape(str(path))} is 30x20; expected the image's 128x128$"):
        load_images([root], size=64)


def test_damaged_masks_are_refused(broken_root):
    root, path = broken_root
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(GBCIError, match=rf"^{re.escape(str(path))} cannot be read as a mask image; expected one of"):
        load_images([root], size=64)


def test_boxes_stand_in_for_absent_masks(phantom_root, images, tmp_path):
    """Without masks/ a lesion is its box's ellipse: as large as the drawn one, within a factor."""
    root = tmp_path / "boxes"
    shutil.copytree(phantom_root, root, ignore=shutil.ignore_patterns("masks"))
    for drawn, boxed in zip(images, load_images([root], size=64), strict=True):
        for first, second in zip(drawn.lesions, boxed.lesions, strict=True):
            overlap = (first.pixels & second.pixels).sum() / (first.pixels | second.pixels).sum()
            assert overlap > 0.3


@pytest.mark.parametrize("cached", [False, True])
def test_fold_c_and_the_test_split_train_nothing(tmp_path, cached):
    root, cache = tmp_path / "root", tmp_path / "cache"
    generate_phantom(root, studies=12, seed=10, size=128)
    if cached:
        prepare([root], cache, PrepareSettings(size=64))
    records = VinDr(root).images
    left_out = {r.patient for r in records if r.split == "test" or patient_fold(r.patient) == "C"}
    assert any(r.split == "training" and r.patient in left_out for r in records)
    trained = {item.patient for item in load_images([cache if cached else root], size=64)}
    assert trained == {r.patient for r in records} - left_out


def test_nothing_to_train_on_is_one_sentence(phantom_root, tmp_path):
    root = tmp_path / "root"
    shutil.copytree(phantom_root, root)
    for table in root.glob("*.csv"):
        table.write_text(table.read_text().replace(",training", ",test"))
    with pytest.raises(GBCIError) as raised:
        load_images([root])
    said = f"no image of folds A and B of the training split in {root}; check the split column"
    assert str(raised.value) == said
