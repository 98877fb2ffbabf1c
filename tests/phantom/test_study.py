"""The phantom's images: plausible, exact, and a pure function of (seed, study, size)."""

import itertools

import numpy as np
import pytest
from scipy import ndimage

from gbci_fast.phantom import render_study
from gbci_fast.phantom.anatomy import draw_shape, map_anatomy
from gbci_fast.phantom.population import DENSITIES, Population
from gbci_fast.phantom.study import (
    FIELD_BETA,
    MODEL_VERSION,
    draw_study,
    growth_series,
    make_grid,
    render_plan,
    stream,
)
from gbci_fast.phantom.texture import glandular_map


def test_another_seed_or_size_is_another_image():
    base, seed, size = (render_study(*args)[0] for args in ((0, 0, 128), (1, 0, 128), (0, 0, (130, 128))))
    assert len({image.header.instance_uid for image in (base, seed, size)}) == 3
    assert len({image.image_id for image in (base, seed, size)}) == 3
    assert (base.stored != seed.stored).any()


def test_different_images_have_different_uids():
    drawn = [draw_study(0, 0, population) for population in (None, Population(prevalence=1), Population(balance=True))]
    series = [plan for timepoints, interval in ((2, 365), (3, 365), (2, 90)) for plan in
              growth_series(drawn[0], timepoints, interval)]  # fmt: skip
    plans = (*drawn, *(plan for plan in series if plan.timepoint == 0))
    images = [render_plan(plan, make_grid(128))[0] for plan in plans]
    assert len({image.header.instance_uid for image in images}) == len(plans)
    assert len({image.header.study_uid for image in images}) == len(plans)
    assert len({image.study_id for image in images}) == len(plans)
    assert len({image.plan.patient_id for image in images}) == 1


def test_the_model_has_a_version_of_its_own():
    assert MODEL_VERSION == "phantom 2"
    assert render_study(0, 0, 128)[0].header.software_version == MODEL_VERSION


@pytest.mark.parametrize("view", ["CC", "MLO"])
def test_glandular_fraction(view):
    grid = make_grid(256)
    for index, (density, (_, fat_fraction, thickness)) in enumerate(DENSITIES.items()):
        shape = draw_shape(stream(index), view_position=view, depth=95, thickness=thickness)
        anatomy = map_anatomy(shape, grid)
        share = glandular_map(
            stream(index), shape, anatomy, grid, beta=FIELD_BETA[view], fat_fraction=fat_fraction
        ).share
        interior = anatomy.thickness - anatomy.skin - anatomy.muscle
        assert (share * interior).sum() / interior.sum() == pytest.approx(1 - fat_fraction, abs=0.02), density


def test_denser_classes_look_denser(tools):
    def bright(density: str) -> float:
        images = [tools.render(index=index, density=density, twins=False).stored for index in range(4)]
        # Brighter than a quarter of the way from fat to gland.
        slab = DENSITIES[density][2]
        level = 12800 + 0.25 * 18400 * (0.0802 - 0.0456) * slab
        return float(np.mean([(stored > level).sum() / (stored > 0).sum() for stored in images]))

    fractions = [bright(density) for density in "ABCD"]
    assert fractions == sorted(fractions)
    assert fractions[0] < 0.2
    assert fractions[3] > 0.6


@pytest.mark.parametrize(("view", "beta"), [("CC", 3.17), ("MLO", 3.30)])
def test_power_spectrum(view, beta, tools):
    grid = make_grid(512)
    side = round(50 / grid.spacing)
    top, left = (
        (grid.height - side) // 2 + (0 if view == "CC" else 32),
        round((22 if view == "CC" else 32) / grid.spacing),
    )
    slopes = []
    for index in range(12):
        stored = tools.render(index=index, density="BC"[index % 2], view=view, size=512, twins=False).stored
        slopes.append(spectrum_slope(stored[top : top + side, left : left + side].astype(float), grid.spacing))
    assert np.mean(slopes) == pytest.approx(beta, abs=0.3)


def spectrum_slope(patch: np.ndarray, spacing: float) -> float:
    """beta of 1/f^beta, fitted from 0.1 to 0.6 cycles/mm."""
    side = len(patch)
    taper = np.outer(np.hanning(side), np.hanning(side))
    power = np.abs(np.fft.fft2((patch - patch.mean()) * taper)) ** 2
    axis = np.fft.fftfreq(side, spacing)
    frequency = np.hypot(axis[:, None], axis)
    edges = np.geomspace(0.1, 0.6, 12)
    rings = [(frequency >= low) & (frequency < high) for low, high in itertools.pairwise(edges)]
    x, y = ([np.log(values[ring].mean()) for ring in rings] for values in (frequency, power))
    return -np.polyfit(x, y, 1)[0]


def test_picture_looks_like_a_mammogram():
    for image in render_study(0, 2, (256, 220)):
        stored = image.stored if image.header.laterality == "L" else image.stored[:, ::-1]
        assert stored[128, 5] > 0  # chest wall left for L, right for R
        assert not stored[:, -40:].any()  # air is black
        breast = stored > 0
        assert ndimage.label(breast)[1] == 1
        assert ndimage.binary_fill_holes(breast).sum() == breast.sum()
        corner = stored[:20, :12]
        if image.header.view_position == "MLO":
            assert corner.min() > np.median(stored[breast])  # pectoral muscle


def test_truth_of_breast_and_muscle():
    for index, image in itertools.product(range(2), range(4)):
        image = render_study(1, index, 192)[image]
        bright = image.stored > 0
        assert image.breast.dtype == image.pectoral.dtype == bool
        # The image's outline is soft by half a pixel.
        assert not (ndimage.binary_erosion(image.breast, border_value=1) & ~bright).any()
        assert not (bright & ~ndimage.binary_dilation(image.breast)).any()
        assert not (image.pectoral & ~image.breast).any()
        if image.header.view_position == "CC":
            assert not image.pectoral.any()
            continue
        rows, columns = np.nonzero(image.pectoral if image.header.laterality == "L" else image.pectoral[:, ::-1])
        assert rows.min() == 0  # a triangle in the upper corner at the chest wall
        assert columns.min() == 0
        area = (240 / 192) ** 2 * len(rows)
        assert 40 * 120 / 2 * 0.6 < area < 60 * 165 / 2 * 1.6  # mm^2


def test_skin_is_a_bright_line():
    grid = make_grid(1024)
    shape = draw_shape(stream("skin"), view_position="CC", depth=95, thickness=50)
    anatomy = map_anatomy(shape, grid)
    rim = (anatomy.inside > 0.1) & (anatomy.inside < 1)
    deep = anatomy.inside > 30
    assert anatomy.skin[rim].mean() > 5 * anatomy.skin[deep].mean()
    np.testing.assert_allclose(anatomy.skin[deep], 1.5, rtol=1e-4)


@pytest.mark.parametrize("size", [128, (256, 200), (301, 255)])
def test_sizes(size):
    height, width = (size, size) if isinstance(size, int) else size
    image = render_study(0, 0, size)[0]
    assert image.stored.shape == image.mask.shape == image.breast.shape == (height, width)
    assert image.header.spacing == (240 / height, 240 / height)


def test_findings_are_the_same_at_any_size():
    index = next(i for i in range(50) if draw_study(0, i).breasts[0].findings)
    small, large = (render_study(0, index, size)[0] for size in (128, 384))
    assert [lesion.finding.kind for lesion in small.lesions] == [lesion.finding.kind for lesion in large.lesions]
    for a, b in zip(small.lesions, large.lesions, strict=True):
        centers = [np.argwhere(lesion.mask).mean(axis=0) * image.header.spacing[0] for lesion, image in
                   ((a, small), (b, large))]  # fmt: skip
        np.testing.assert_allclose(*centers, atol=2.5)
