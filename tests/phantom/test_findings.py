"""Findings: the radiographic features of each category, one place for both views, twins, and growth."""

import dataclasses

import numpy as np
import pytest
from scipy import ndimage
from skimage.measure import regionprops

from gbci_fast.attributes import FINDING_CATEGORIES
from gbci_fast.phantom.anatomy import SKIN_THICKNESS, map_anatomy
from gbci_fast.phantom.bodies import VIEW_AXES, draw_mass
from gbci_fast.phantom.findings import draw_findings
from gbci_fast.phantom.lesions import Scene
from gbci_fast.phantom.placement import Room
from gbci_fast.phantom.population import DENSITIES, Population
from gbci_fast.phantom.study import draw_study, growth_series, make_grid, stream
from gbci_fast.phantom.texture import glandular_map

BOTH = ("CC", "MLO")
WHOLE = ("Mass", "Suspicious Calcification", "Focal Asymmetry", "Architectural Distortion")


def center_of(mask: np.ndarray) -> np.ndarray:
    """(x, y) in mm as in `BreastShape.point`."""
    rows, columns = np.nonzero(mask)
    spacing = 240 / mask.shape[0]
    return np.array([columns.mean() + 0.5, rows.mean() + 0.5 - mask.shape[0] / 2]) * spacing


@pytest.mark.parametrize("category", WHOLE)
def test_both_views_show_one_place(category, tools):
    for index in range(4):
        finding = tools.finding(category, index)
        _, breast = tools.breast(index)
        depth, across = {}, {}
        for view in BOTH:
            image = tools.render(finding, index=index, view=view, twins=False)
            x, y = center_of(image.lesions[0].mask)
            shape = breast.shapes[view]
            depth[view], across[view] = shape.depth - x, shape.nipple_line(x) - y
        behind, lateral, above = finding.place
        slack = 3 if category in ("Mass", "Architectural Distortion") else 8
        # The distance behind the nipple is nearly the same in both views (arc and straight-line rules of mammography).
        assert depth["CC"] == pytest.approx(depth["MLO"], abs=2 * slack)
        assert depth["CC"] == pytest.approx(behind, abs=slack)
        assert across["CC"] == pytest.approx(lateral, abs=slack)
        assert across["MLO"] == pytest.approx((lateral + above) / np.sqrt(2), abs=slack)


def test_places_prefer_the_upper_outer_quadrant():
    places = []
    for index in range(40):
        room = Room(draw_study(0, index).breasts[0].shapes)
        places.append(room.in_tissue(stream("place", index), 9.0))
    share = np.mean([lateral > 0 and above > 0 for _, lateral, above in places])
    assert 0.3 < share < 0.7


@pytest.mark.parametrize("category", WHOLE)
def test_a_lesion_lies_in_tissue(category, tools):
    for index in range(6):
        finding = tools.finding(category, index)
        for view in BOTH:
            image = tools.render(finding, index=index, view=view, size=192, twins=False)
            mask = image.lesions[0].mask
            assert not (mask & image.pectoral).any()
            assert not (mask & ~image.breast).any()
            depth = ndimage.distance_transform_edt(np.pad(image.breast, 1, mode="edge"))[1:-1, 1:-1] * 240 / 192
            assert depth[mask].min() > 1.5  # off the skin
            assert not np.concatenate([mask[0], mask[-1], mask[:, 0], mask[:, -1]]).any()  # off the image's edge


def test_a_lymph_node_is_seen_in_the_axilla_of_the_mlo_only(tools):
    for index in range(6):
        finding = tools.finding("Suspicious Lymph Node", index)
        assert not tools.render(finding, index=index, view="CC", twins=False).lesions
        image = tools.render(finding, index=index, view="MLO", twins=False)
        (lesion,) = image.lesions
        assert lesion.box[3] < 0.45 * 256  # in the upper part
        near = ndimage.binary_dilation(image.pectoral, iterations=12)
        assert (near & lesion.mask).sum() > 0.3 * lesion.mask.sum()
        room = Room(tools.breast(index)[1].shapes)
        assert room.clearance(finding.place, "CC") == 0


@pytest.mark.parametrize("density", "AD")
@pytest.mark.parametrize("category", FINDING_CATEGORIES)
def test_the_twin_is_the_same_image_outside_the_mask(category, density, tools):
    seen = 0
    for index, view in ((0, "CC"), (1, "MLO")):
        image = tools.render(tools.finding(category, index), index=index, view=view, density=density)
        change = image.stored.astype(int) - image.twin
        assert not change[~image.mask].any()
        if image.lesions:
            seen += 1
            assert (change[image.mask] != 0).mean() > (0.02 if category == "Suspicious Calcification" else 0.3)
        else:
            assert category in ("Asymmetry", "Suspicious Lymph Node")
    assert seen


def test_the_mask_of_a_mass_is_its_shadow(tools):
    """The mask agrees with the body's path lengths, ray by ray."""
    finding = tools.finding("Mass", 3)
    grid = make_grid(256)
    for view in BOTH:
        image = tools.render(finding, index=3, view=view, twins=False)
        x, y = tools.breast(3)[1].shapes[view].point(finding.place, view)
        u, v = (grid.x[0] - x).astype(float), (grid.y[:, 0] - y).astype(float)
        path = finding.body.path(VIEW_AXES[view], u, v)
        np.testing.assert_array_equal(image.lesions[0].mask, path >= 0.1)
        assert path.sum() * grid.spacing**2 == pytest.approx(finding.volume_mm3, rel=0.02)


@pytest.mark.parametrize("kind", ["round", "oval", "lobular", "irregular", "spiculated"])
def test_masses_hide_in_dense_tissue(kind, tools):
    contrast = {}
    for density in "AD":
        differences = []
        for index in range(4):
            mass = tools.finding("Mass", index)
            mass = dataclasses.replace(mass, kind=kind, body=draw_mass(stream(kind, index), kind, 7.0))
            image = tools.render(mass, index=index, density=density, view=BOTH[index % 2])
            differences.append((image.stored.astype(int) - image.twin)[image.mask].mean())
        contrast[density] = np.mean(differences)
    assert contrast["A"] > 1000
    assert contrast["A"] > 1.5 * contrast["D"] > 0


@pytest.mark.parametrize("kind", ["round", "spiculated"])
def test_a_mass_has_its_size_in_mm_at_any_resolution(kind, tools):
    mass = tools.finding("Mass", 0)
    mass = dataclasses.replace(mass, kind=kind, body=draw_mass(stream(kind), kind, 7.0))
    areas = []
    for size in (256, 512, 1024):
        image = tools.render(mass, index=0, size=size, twins=False)
        areas.append(image.lesions[0].mask.sum() * (240 / size) ** 2)
    np.testing.assert_allclose(areas, areas[-1], rtol=0.3)
    assert areas[-1] > 0.9 * np.pi * 7**2


def test_calcifications_are_bright_specks_in_a_group(tools):
    image = tools.render(tools.finding("Suspicious Calcification", 0), index=0, size=1024)
    change = image.stored.astype(int) - image.twin
    assert ndimage.label(change > 2000)[1] >= 5
    assert image.mask.sum() * (240 / 1024) ** 2 < 150  # mm^2


def test_distortion_has_strands_and_no_central_mass(tools):
    for index in range(3):
        finding = tools.finding("Architectural Distortion", index)
        assert finding.volume_mm3 is None
        image = tools.render(finding, index=index, density="A", size=512)
        change = (image.stored.astype(int) - image.twin).astype(float)
        x, y = center_of(image.mask)
        spacing = 240 / 512
        rows, columns = np.mgrid[:512, :512]
        distance = np.hypot((columns + 0.5) * spacing - x, (rows + 0.5 - 256) * spacing - y)
        ring = (distance > 0.4 * finding.radius) & (distance < 0.6 * finding.radius)
        angle = np.arctan2((rows + 0.5 - 256) * spacing - y, (columns + 0.5) * spacing - x)[ring]
        profile = [change[ring][np.abs(angle - a) < 0.08].mean() for a in np.linspace(-3, 3, 60)]
        crossings = np.sum(np.diff(np.sign(profile - np.median(profile))) != 0)
        assert crossings >= 10  # radiating lines give many bright and dark sectors along the ring
        # A 7 mm mass in the same place has a far brighter center.
        mass = dataclasses.replace(finding, kind="round", body=draw_mass(stream(0), "round", 7.0), distortion=0.0)
        brightness = tools.render(mass, index=index, density="A", size=512)
        middle = distance < 0.25 * finding.radius
        assert change[middle].mean() < 0.6 * (brightness.stored.astype(int) - brightness.twin)[middle].mean()


def test_asymmetry_is_in_one_view_and_focal_asymmetry_in_both(tools):
    for index in range(3):
        for category, views in (("Asymmetry", 1), ("Focal Asymmetry", 2)):
            finding = tools.finding(category, index)
            shown = [view for view in BOTH if tools.render(finding, index=index, view=view, twins=False).lesions]
            assert len(shown) == views
            assert tuple(shown) == finding.views


def test_focal_asymmetry_is_denser_with_fat_between_and_no_convex_outline(tools):
    solidity, spread = [], []
    for index in range(4):
        image = tools.render(tools.finding("Focal Asymmetry", index), index=index, size=384)
        change = (image.stored.astype(int) - image.twin)[image.mask]
        assert change.mean() > 300
        spread.append(change.std() / change.mean())
        solidity.append(regionprops(ndimage.binary_fill_holes(image.mask).astype(int))[0].solidity)
    assert np.mean(spread) > 0.5  # larger than in a mass of even density
    assert np.mean(solidity) < 0.93  # concave borders


def test_global_asymmetry_is_large_and_in_one_breast(tools):
    finding = tools.finding("Global Asymmetry", 0)
    image = tools.render(finding, index=0, density="B")
    assert image.mask.sum() > 0.2 * image.breast.sum()
    both = either = 0
    for index in range(60):
        plan = draw_study(5, index, Population(prevalence=1, balance=True))
        sides = [any("Global Asymmetry" in f.categories for f in breast.findings) for breast in plan.breasts]
        both, either = both + all(sides), either + any(sides)
    assert both == 0
    assert either > 4


def test_skin_is_3_to_6_mm_thick_where_thickened(tools):
    for index in range(3):
        finding = tools.finding("Skin Thickening", index)
        assert 3 <= finding.strength <= 6
        scene, changed = drawn(tools, finding, index, 768)
        # From the outline inward: the depth down to which the whole path is skin.
        deepest = {}
        for name, each in (("before", scene), ("after", changed)):
            solid = each.inside[(each.skin > 0.98 * each.thickness) & (each.inside > 0) & (each.inside < 10)]
            deepest[name] = solid.max()
        assert deepest["before"] == pytest.approx(SKIN_THICKNESS, abs=0.4)
        assert deepest["after"] == pytest.approx(finding.strength, abs=1.2)


def test_retracted_skin_is_a_dent(tools):
    for index in range(3):
        finding = tools.finding("Skin Retraction", index)
        image = tools.render(finding, index=index, size=384)
        gone = (image.twin > 0) & (image.stored == 0)
        depth = ndimage.distance_transform_edt(np.pad(image.twin > 0, 1, mode="edge"))[1:-1, 1:-1] * 240 / 384
        assert depth[gone].max() == pytest.approx(finding.strength, abs=1.3)
        assert not ((image.twin == 0) & (image.stored > 0)).any()


def test_a_retracted_nipple_does_not_protrude(tools):
    for view in BOTH:
        finding = tools.finding("Nipple Retraction", 1)
        image = tools.render(finding, index=1, view=view, size=384)
        reach = {}
        for name, stored in (("healthy", image.twin), ("retracted", image.stored)):
            middle = round((tools.breast(1)[1].shapes[view].nipple_y + 120) / 240 * 384)
            reach[name] = (stored[middle] > 0).sum() * 240 / 384
        assert reach["retracted"] < reach["healthy"] - finding.strength


def test_a_finding_covers_its_own_mask_only(tools):
    """Two findings in one place have separate masks, and each box is that of the finding's own mask."""
    mass = tools.finding("Mass", 2)
    cluster = dataclasses.replace(tools.finding("Suspicious Calcification", 2), place=mass.place)
    both = tools.render(mass, cluster, index=2)
    alone = [tools.render(finding, index=2).lesions[0] for finding in (mass, cluster)]
    for lesion, single in zip(both.lesions, alone, strict=True):
        np.testing.assert_array_equal(lesion.mask, single.mask)
        y, x = np.nonzero(lesion.mask)
        assert lesion.box == (x.min(), y.min(), x.max() + 1, y.max() + 1)
    assert (both.lesions[0].mask & both.lesions[1].mask).any()


def test_malignant_masses_bring_findings_along():
    room = Room(draw_study(0, 0).breasts[0].shapes)
    seen, joint, number = set(), 0, 60
    for index in range(number):
        findings = draw_findings(stream("brought", index), [("Mass", True)], room)
        assert all(finding.malignant for finding in findings)
        joint += findings[0].categories == ("Mass", "Architectural Distortion")
        seen |= {finding.categories for finding in findings[1:]}
        assert len(draw_findings(stream("benign", index), [("Mass", False)], room)) == 1
    assert 0.04 < joint / number < 0.3
    assert {("Suspicious Calcification",), ("Suspicious Lymph Node",), ("Skin Thickening",)} <= seen


def test_growth_is_exponential_in_volume_and_nothing_else_changes():
    plans = (draw_study(0, index) for index in range(200))
    plan = next(p for p in plans if any(f.doubling_days and f.kind == "spiculated" for f in p.breasts[0].findings))
    series = growth_series(plan, 4, 200)
    assert [each.days for each in series] == [0, 200, 400, 600]
    assert [each.timepoint for each in series] == [0, 1, 2, 3]
    assert len({each.patient_id for each in series}) == len({each.split for each in series}) == 1
    for k, finding in enumerate(plan.breasts[0].findings):
        history = [each.breasts[0].findings[k] for each in series]
        assert len({each.place for each in history}) == 1
        if finding.doubling_days is None:
            assert all(each == finding for each in history)
            continue
        volumes = np.array([each.volume_mm3 for each in history])
        np.testing.assert_allclose(volumes[1:] / volumes[:-1], 2 ** (200 / finding.doubling_days), rtol=0.03)
        assert volumes[-1] == finding.volume_mm3
    assert series[0].breasts[0].shapes == plan.breasts[0].shapes
    assert series[0].age == plan.age - 2


def test_benign_findings_do_not_grow():
    findings = [f for i in range(50) for breast in draw_study(2, i).breasts for f in breast.findings]
    assert all(finding.doubling_days is None for finding in findings if not finding.malignant)
    grown = [finding.doubling_days for finding in findings if finding.malignant and finding.volume_mm3]
    assert 100 < np.median(grown) < 320


def test_assessment_agrees_with_pathology():
    for index in range(60):
        for breast in draw_study(1, index).breasts:
            for finding in breast.findings:
                assert finding.birads in ((4, 5) if finding.malignant else (3, 4))
                assert finding.pathology == ("malignant" if finding.malignant else "benign")
                if "Mass" in finding.categories:
                    shape = "irregular" if finding.kind == "spiculated" else finding.kind
                    assert finding.report.startswith(f"{shape} mass")
                    assert finding.malignant == (finding.kind in ("spiculated", "irregular"))


def drawn(tools, finding, index: int, size: int) -> tuple[Scene, Scene]:
    """The CC scenes without and with the finding."""
    grid = make_grid(size)
    shape = tools.breast(index)[1].shapes["CC"]
    anatomy = map_anatomy(shape, grid)
    tissue = glandular_map(stream(index), shape, anatomy, grid, beta=3.17, fat_fraction=DENSITIES["B"][1])
    scene = Scene.healthy("CC", grid, shape, anatomy, tissue)
    changed = scene.copy()
    changed.add((finding,), [stream("drawn")])
    return scene, changed
