"""The phantom: plausible, exact, and a pure function of (seed, study, size)."""

import ast
import csv
import dataclasses
import itertools
import shutil
import subprocess

import numpy as np
import pytest
from PIL import Image
from pydicom import dcmread
from scipy import ndimage

from gbci_fast.data.phantom import generate_phantom, render_study
from gbci_fast.data.phantom.anatomy import Grid, draw_shape, map_anatomy
from gbci_fast.data.phantom.lesions import draw_lesion, render_lesion
from gbci_fast.data.phantom.study import DENSITIES, FIELD_BETA, draw_study, make_grid, render_image, stream
from gbci_fast.data.phantom.texture import glandular_map
from gbci_fast.errors import GBCIError

KINDS = ("round", "lobulated", "spiculated", "calcifications")
VINDR_FINDING_COLUMNS = [
    "study_id", "series_id", "image_id", "laterality", "view_position", "height", "width", "breast_birads",
    "breast_density", "finding_categories", "finding_birads", "xmin", "ymin", "xmax", "ymax", "split",
]  # fmt: skip
EXTRA_COLUMNS = ["report", "pathology", "source", "spacing_mm"]


@pytest.fixture(scope="module")
def phantom(tmp_path_factory):
    root = tmp_path_factory.mktemp("phantom") / "data"
    generate_phantom(root, studies=4, seed=3, size=128)
    return root


def rows(path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


def lesion_of(kind: str, *names: object):
    rng = stream("lesion", *names)
    while (lesion := draw_lesion(rng)).kind != kind:
        pass
    return lesion


def render_with(lesion, *, index: int, density: str = "B", view: str = "CC", grid: Grid | None = None):
    """The left breast of study ``index``, with this lesion and density whatever was drawn for it."""
    plan = dataclasses.replace(draw_study(0, index), breast_density=density)
    breast = dataclasses.replace(plan.breasts[0], lesion=lesion)
    return render_image(plan, breast, view, grid or make_grid(256))


def test_layout_is_vindr(phantom):
    findings = rows(phantom / "finding_annotations.csv")
    breasts = rows(phantom / "breast-level_annotations.csv")
    assert list(findings[0]) == VINDR_FINDING_COLUMNS + EXTRA_COLUMNS
    assert list(breasts[0]) == [*VINDR_FINDING_COLUMNS[:9], "split", *EXTRA_COLUMNS]
    assert len(findings) == len(breasts) == 16
    named = {f"{row['study_id']}/{row['image_id']}" for row in findings}
    for folder, suffix in (("images", ".dicom"), ("masks", ".png")):
        files = [path for path in (phantom / folder).rglob("*") if path.is_file()]
        assert {str(path.relative_to(phantom / folder).with_suffix("")) for path in files} == named
        assert {path.suffix for path in files} == {suffix}


def test_rows_agree_with_masks(phantom):
    findings = rows(phantom / "finding_annotations.csv")
    lesions = 0
    for row in findings:
        mask = np.asarray(Image.open(phantom / "masks" / row["study_id"] / f"{row['image_id']}.png"))
        assert mask.shape == (int(row["height"]), int(row["width"]))
        if ast.literal_eval(row["finding_categories"]) == ["No Finding"]:
            assert not mask.any()
            assert (row["breast_birads"], row["finding_birads"], row["xmin"]) == ("BI-RADS 1", "", "")
            continue
        lesions += 1
        assert set(np.unique(mask)) == {0, 255}
        y, x = np.nonzero(mask)
        box = [x.min(), y.min(), x.max() + 1, y.max() + 1]
        assert [int(row[key]) for key in ("xmin", "ymin", "xmax", "ymax")] == box
        assert row["finding_birads"] == row["breast_birads"] in {"BI-RADS 3", "BI-RADS 4", "BI-RADS 5"}
        assert row["report"]
    assert 0 < lesions < len(findings)


def test_same_seed_same_bytes_whatever_the_number_of_studies(phantom, tmp_path):
    generate_phantom(tmp_path / "again", studies=2, seed=3, size=128)
    files = [path.relative_to(tmp_path / "again") for path in (tmp_path / "again").rglob("*.*") if path.is_file()]
    assert len(files) == 18
    for file in files:
        again, first = (tmp_path / "again" / file).read_bytes(), (phantom / file).read_bytes()
        assert first.startswith(again) if file.suffix == ".csv" else first == again


def test_another_seed_or_size_is_another_image():
    base, seed, size = (render_study(*args)[0] for args in ((0, 0, 128), (1, 0, 128), (0, 0, (130, 128))))
    assert len({image.header.instance_uid for image in (base, seed, size)}) == 3
    assert len({image.image_id for image in (base, seed, size)}) == 3
    assert (base.stored != seed.stored).any()


def test_dicom_reads_back(phantom):
    for image in render_study(3, 0, 128):
        dataset = dcmread(phantom / "images" / image.study_id / f"{image.image_id}.dicom")
        np.testing.assert_array_equal(dataset.pixel_array, image.stored)
        assert (dataset.ImageLaterality, dataset.ViewPosition) == (image.header.laterality, image.header.view_position)
        assert list(dataset.ImagerPixelSpacing) == [240 / 128] * 2
        assert (dataset.WindowCenter, dataset.WindowWidth) == image.window
        assert dataset.SyntheticData == "YES"


@pytest.mark.skipif(shutil.which("dciodvfy") is None, reason="dciodvfy (dicom3tools) is not installed")
def test_dicom_is_valid(phantom):
    for path in list(phantom.rglob("*.dicom"))[:4]:
        result = subprocess.run(["dciodvfy", path], capture_output=True, text=True, check=False)
        errors = [line for line in (result.stdout + result.stderr).splitlines() if line.startswith("Error")]
        # dicom3tools predates SyntheticData, of DICOM 2024b.
        assert [line for line in errors if "(0x0008,0x001c)" not in line] == []


def test_population():
    plans = [draw_study(0, index) for index in range(600)]
    lesions = [breast.lesion for plan in plans for breast in plan.breasts]
    assert 0.45 < np.mean([lesion is not None for lesion in lesions]) < 0.55
    assert 0.15 < np.mean([plan.split == "test" for plan in plans]) < 0.25
    assert {plan.breast_density for plan in plans} == set("ABCD")
    birads = {(lesion.kind, lesion.birads) for lesion in lesions if lesion is not None}
    assert birads == {
        ("round", 3),
        ("lobulated", 3),
        ("spiculated", 4),
        ("spiculated", 5),
        ("calcifications", 4),
        ("calcifications", 5),
    }


@pytest.mark.parametrize("view", ["CC", "MLO"])
def test_glandular_fraction(view):
    grid = make_grid(256)
    for index, (density, (_, fat_fraction, thickness)) in enumerate(DENSITIES.items()):
        shape = draw_shape(stream(index), view_position=view, depth=95, thickness=thickness)
        anatomy = map_anatomy(shape, grid)
        share = glandular_map(stream(index), shape, anatomy, grid, beta=FIELD_BETA[view], fat_fraction=fat_fraction)
        interior = anatomy.thickness - anatomy.skin - anatomy.muscle
        assert (share * interior).sum() / interior.sum() == pytest.approx(1 - fat_fraction, abs=0.02), density


def test_denser_classes_look_denser():
    def bright(density: str) -> float:
        images = [render_with(None, index=index, density=density).stored for index in range(4)]
        # More than a quarter of the way from fat to gland.
        slab = DENSITIES[density][2]
        level = 12800 + 0.25 * 18400 * (0.0802 - 0.0456) * slab
        return float(np.mean([(stored > level).sum() / (stored > 0).sum() for stored in images]))

    fractions = [bright(density) for density in "ABCD"]
    assert fractions == sorted(fractions)
    assert fractions[0] < 0.2
    assert fractions[3] > 0.6


@pytest.mark.parametrize(("view", "beta"), [("CC", 3.17), ("MLO", 3.30)])
def test_power_spectrum(view, beta):
    grid = make_grid(512)
    side = round(50 / grid.spacing)
    top, left = (
        (grid.height - side) // 2 + (0 if view == "CC" else 32),
        round((22 if view == "CC" else 32) / grid.spacing),
    )
    slopes = []
    for index in range(12):
        stored = render_with(None, index=index, density="BC"[index % 2], view=view, grid=grid).stored
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


@pytest.mark.parametrize("kind", KINDS)
def test_lesion_is_brighter_than_its_ring(kind):
    contrast = {}
    for density in "AD":
        differences = []
        for index in range(6):
            image = render_with(lesion_of(kind, index), index=index, density=density, view=("CC", "MLO")[index % 2])
            ring = ndimage.binary_dilation(image.mask, iterations=6) & ~ndimage.binary_dilation(image.mask)
            differences.append(image.stored[image.mask].mean() - image.stored[ring & (image.stored > 0)].mean())
        contrast[density] = np.mean(differences)
    assert contrast["A"] > 500
    if kind != "calcifications":
        assert contrast["A"] > contrast["D"]  # masses hide in dense tissue


@pytest.mark.parametrize("kind", KINDS)
def test_lesion_changes_its_mask_and_nothing_else(kind):
    lesion = lesion_of(kind, 0)
    image, healthy = (render_with(each, index=1, density="A").stored.astype(int) for each in (lesion, None))
    mask = render_with(lesion, index=1, density="A").mask
    change = image - healthy
    # Scatter and exposure, which are global, shift the rest by a hair.
    assert np.abs(change[~mask]).max() < 0.02 * 65535
    assert change[mask].max() > 0.05 * 65535


@pytest.mark.parametrize("kind", KINDS)
def test_lesion_has_its_size_in_mm_at_any_resolution(kind):
    lesion = lesion_of(kind, 0)
    areas = []
    for size in (512, 1024, 2048):
        grid = Grid(size, size)
        tissue, room = np.full((size, size), 0.05, np.float32), np.full((size, size), 50, np.float32)
        patch = render_lesion(stream("patch"), lesion, (90.0, 0.0), 0.2, tissue, room, grid)
        areas.append(patch.mask.sum() * grid.spacing**2)
    np.testing.assert_allclose(areas, areas[-1], rtol=0.25)
    radius = np.sqrt(areas[-1] / np.pi)
    assert 2 < radius < 2.2 * lesion.radius


def test_calcifications_are_a_cluster():
    grid = Grid(2048, 2048)
    tissue = np.full((2048, 2048), 0.05, np.float32)
    for index in range(5):
        lesion = lesion_of("calcifications", index)
        patch = render_lesion(stream(index), lesion, (90.0, 0.0), 0.2, tissue, tissue * 1000, grid)
        assert patch.mask.sum() * grid.spacing**2 < 100  # mm^2
        _, specks = ndimage.label(patch.added > 0)
        assert specks >= 5


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
    assert image.stored.shape == image.mask.shape == (height, width)
    assert image.header.spacing == (240 / height, 240 / height)


@pytest.mark.parametrize("size", [127, (128, 4097), (1000, 500), 0])
def test_impossible_sizes_are_refused(size, tmp_path):
    with pytest.raises(GBCIError, match="expected height and width from 128 to 4096"):
        generate_phantom(tmp_path / "data", studies=1, size=size)
    assert not list(tmp_path.iterdir())


def test_no_studies_is_refused(tmp_path):
    with pytest.raises(GBCIError, match="number of studies is 0"):
        generate_phantom(tmp_path / "data", studies=0)


def test_a_folder_with_content_is_refused(tmp_path):
    (tmp_path / "note.txt").write_text("mine")
    with pytest.raises(GBCIError, match=f"{tmp_path.name} already exists and is not empty"):
        generate_phantom(tmp_path, studies=1, size=128)
    assert [path.name for path in tmp_path.iterdir()] == ["note.txt"]


def test_an_empty_folder_is_filled(tmp_path):
    generate_phantom(tmp_path / "new", studies=1, size=128)
    (tmp_path / "empty").mkdir()
    generate_phantom(tmp_path / "empty", studies=1, size=128)
    assert len(list((tmp_path / "empty").rglob("*.dicom"))) == 4


def test_interruption_leaves_nothing(tmp_path):
    def interrupt(done: int):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generate_phantom(tmp_path / "data", studies=2, size=128, progress=interrupt)
    assert not list(tmp_path.iterdir())


def test_progress(tmp_path):
    done = []
    generate_phantom(tmp_path / "data", studies=3, size=128, progress=done.append)
    assert done == [1, 2, 3]
