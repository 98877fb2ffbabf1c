"""The data set on disk: VinDr-Mammo's layout, truth beside it, and the same bytes from the same seed."""

import ast
import multiprocessing
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pydicom import dcmread

from gbci_fast.attributes import FINDING_CATEGORIES
from gbci_fast.data.fields import lesion_truth
from gbci_fast.data.vindr import VinDr
from gbci_fast.dicom.reading import read_mammogram
from gbci_fast.errors import GBCIError
from gbci_fast.phantom import Population, generate_phantom, render_study

VINDR_FINDING_COLUMNS = [
    "study_id", "series_id", "image_id", "laterality", "view_position", "height", "width", "breast_birads",
    "breast_density", "finding_categories", "finding_birads", "xmin", "ymin", "xmax", "ymax", "split",
]  # fmt: skip
LESION_COLUMNS = [
    "report", "shape", "margin", "pathology", "volume_mm3", "doubling_days", "mask_file", "ultrasound",
]  # fmt: skip
PATIENT_COLUMNS = ["source", "spacing_mm", "patient_id", "timepoint", "days", "age", "hazard", "twin"]
RICH, SEED = Population(prevalence=1.0, balance=True), 34  # nine categories in five studies, some in one breast


@pytest.fixture(scope="module")
def phantom(tmp_path_factory):
    root = tmp_path_factory.mktemp("phantom") / "data"
    generate_phantom(root, studies=5, seed=SEED, size=160, population=RICH, twins=True, truth=True)
    return root


@pytest.fixture(scope="module")
def images():
    return [image for index in range(5) for image in render_study(SEED, index, 160, population=RICH, twins=True)]


def read_png(path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image)


def test_layout_is_vindr(phantom, tools):
    findings = tools.rows(phantom / "finding_annotations.csv")
    breasts = tools.rows(phantom / "breast-level_annotations.csv")
    assert list(findings[0]) == [*VINDR_FINDING_COLUMNS, *LESION_COLUMNS, *PATIENT_COLUMNS]
    assert list(breasts[0]) == [*VINDR_FINDING_COLUMNS[:9], "split", *PATIENT_COLUMNS]
    assert len(breasts) == 20
    named = {f"{row['study_id']}/{row['image_id']}" for row in breasts}
    assert {f"{row['study_id']}/{row['image_id']}" for row in findings} == named
    everywhere = {"images": ".dicom", "masks": ".png", "truth/breast": ".png", "truth/pectoral": ".png"}
    for folder, suffix in everywhere.items():
        files = [path for path in (phantom / folder).rglob("*") if path.is_file()]
        assert {str(path.relative_to(phantom / folder).with_suffix("")) for path in files} == named
        assert {path.suffix for path in files} == {suffix}
    assert {str(path.relative_to(phantom)) for path in (phantom / "twins").rglob("*.dicom")} == {
        row["twin"] for row in breasts
    } - {""}
    assert {str(path.relative_to(phantom)) for path in (phantom / "finding_masks").rglob("*.png")} == {
        row["mask_file"] for row in findings
    } - {""}


def test_rows_agree_with_masks(phantom, tools):
    rows = tools.rows(phantom / "finding_annotations.csv")
    unions: dict[str, np.ndarray] = {}
    for row in rows:
        name = f"{row['study_id']}/{row['image_id']}"
        union = read_png(phantom / "masks" / f"{name}.png") > 0
        unions.setdefault(name, union.copy())
        if ast.literal_eval(row["finding_categories"]) == ["No Finding"]:
            assert not union.any()
            assert {row[key] for key in ("finding_birads", "xmin", *LESION_COLUMNS, "twin")} == {""}
            continue
        mask = read_png(phantom / row["mask_file"])
        assert mask.shape == (int(row["height"]), int(row["width"]))
        assert set(np.unique(mask)) == {0, 255}
        y, x = np.nonzero(mask)
        box = [x.min(), y.min(), x.max() + 1, y.max() + 1]
        assert [int(row[key]) for key in ("xmin", "ymin", "xmax", "ymax")] == box
        assert not (mask > 0)[~union].any()
        unions[name] &= mask == 0
        assert row["finding_birads"] in {"BI-RADS 3", "BI-RADS 4", "BI-RADS 5"}
        assert row["finding_birads"] <= row["breast_birads"]
        assert row["report"]
        volumes = {"Mass", "Suspicious Calcification", "Suspicious Lymph Node"}
        assert bool(row["volume_mm3"]) == bool(volumes & set(ast.literal_eval(row["finding_categories"])))
        assert set(ast.literal_eval(row["finding_categories"])) <= set(FINDING_CATEGORIES)
    # The union mask holds only the findings. An image has rows of findings or one row "No Finding".
    assert not any(union.any() for union in unions.values())
    assert any(row["mask_file"].endswith("-2.png") for row in rows)
    for name in unions:
        mine = [row["finding_categories"] for row in rows if f"{row['study_id']}/{row['image_id']}" == name]
        assert len(mine) == 1 or "['No Finding']" not in mine


def test_both_readers_read_it(phantom, images):
    records = VinDr(phantom).images
    assert [record.image_id for record in records] == [image.image_id for image in images]
    for record, image in zip(records, images, strict=True):
        mammogram = record.read()
        np.testing.assert_array_equal(mammogram.stored, image.stored)
        assert (mammogram.laterality, mammogram.view_position) == (image.header.laterality, image.header.view_position)
        assert mammogram.spacing == (240 / 160, 240 / 160)
        assert record.attributes.age == image.plan.age
        assert float(record.extra["hazard"]) == pytest.approx(image.plan.hazard, abs=1e-4)
        truth = lesion_truth(record, phantom, image.stored.shape)
        assert len(truth) == len(image.lesions) == len(record.findings)
        for mask, lesion, finding in zip(truth, image.lesions, record.findings, strict=True):
            assert finding.box == lesion.box
            assert finding.attributes.finding_categories == lesion.finding.categories
            np.testing.assert_array_equal(mask, lesion.mask)  # the finding's own mask, also where findings overlap


def test_twins_and_truth_are_the_rendered_ones(phantom, images, tools):
    rows = {row["image_id"]: row for row in tools.rows(phantom / "breast-level_annotations.csv")}
    for image in images:
        name = f"{image.study_id}/{image.image_id}.png"
        np.testing.assert_array_equal(read_png(phantom / "truth" / "breast" / name) > 0, image.breast)
        np.testing.assert_array_equal(read_png(phantom / "truth" / "pectoral" / name) > 0, image.pectoral)
        twin = rows[image.image_id]["twin"]
        assert bool(twin) == bool(image.lesions)
        if twin:
            read = read_mammogram(phantom / twin)
            np.testing.assert_array_equal(read.stored, image.twin)
            assert not (image.stored != image.twin)[~image.mask].any()
            dataset = dcmread(phantom / twin)
            assert dataset.SOPInstanceUID != image.header.instance_uid
            assert image.header.instance_uid in dataset.DerivationDescription
            assert (dataset.WindowCenter, dataset.WindowWidth) == image.window


def test_dicom_says_what_it_is(phantom, images):
    for image in images[:4]:
        dataset = dcmread(phantom / "images" / image.study_id / f"{image.image_id}.dicom")
        assert list(dataset.ImagerPixelSpacing) == [240 / 160] * 2
        assert (dataset.WindowCenter, dataset.WindowWidth) == image.window
        assert (dataset.SyntheticData, dataset.BurnedInAnnotation) == ("YES", "NO")
        assert dataset.PatientID == image.plan.patient_id


@pytest.mark.skipif(shutil.which("dciodvfy") is None, reason="dciodvfy (dicom3tools) is not installed")
def test_dicom_is_valid(phantom):
    for path in [*list(phantom.glob("images/*/*.dicom"))[:4], next(phantom.glob("twins/*/*.dicom"))]:
        result = subprocess.run(["dciodvfy", path], capture_output=True, text=True, check=False)
        errors = [line for line in (result.stdout + result.stderr).splitlines() if line.startswith("Error")]
        # dicom3tools predates SyntheticData, of DICOM 2024b.
        assert [line for line in errors if "(0x0008,0x001c)" not in line] == []


def test_same_seed_same_bytes_whatever_the_number_of_studies_and_workers(phantom, tmp_path):
    generate_phantom(
        tmp_path / "again", studies=2, seed=SEED, size=160, population=RICH, twins=True, truth=True, workers=2
    )
    files = [path.relative_to(tmp_path / "again") for path in (tmp_path / "again").rglob("*.*") if path.is_file()]
    assert len(files) > 2 * 4 * 4
    for file in files:
        again, first = (tmp_path / "again" / file).read_bytes(), (phantom / file).read_bytes()
        if file.name != "preview.png":  # it depends on the whole data set
            assert first.startswith(again) if file.suffix == ".csv" else first == again


def test_preview_outlines_a_finding_of_every_category(phantom, tools):
    sheet = read_png(phantom / "preview.png")
    assert sheet.shape[1:] == (5 * 300, 3)
    red = (sheet == (255, 64, 64)).all(axis=-1)
    rows = tools.rows(phantom / "finding_annotations.csv")
    having = {category for row in rows for category in ast.literal_eval(row["finding_categories"])}
    assert len(having) > 6
    for number, category in enumerate(FINDING_CATEGORIES):
        line, column = divmod(number, 5)
        cell = slice(line * 618 + 18, line * 618 + 318), slice(column * 300, column * 300 + 300)
        # The outline keeps some of its red when the image is reduced to the cell.
        reddish = sheet[cell][..., 0].astype(int) - sheet[cell][..., 1] > 60
        assert reddish.any() == (category in having), category
    assert not red[2 * 618 :].any()  # healthy breasts


def test_growth_series_is_one_patient_with_dates(tmp_path, tools):
    population = Population(prevalence=1.0)
    generate_phantom(
        tmp_path / "growth", studies=2, seed=1, size=128, population=population, timepoints=3, interval=180
    )
    rows = tools.rows(tmp_path / "growth" / "finding_annotations.csv")
    assert len({row["study_id"] for row in rows}) == 6
    assert len({row["patient_id"] for row in rows}) == 2
    assert {(row["timepoint"], row["days"]) for row in rows} == {("0", "0"), ("1", "180"), ("2", "360")}
    for patient in {row["patient_id"] for row in rows}:
        assert len({row["split"] for row in rows if row["patient_id"] == patient}) == 1
    grown = 0
    for row in rows:
        if row["timepoint"] == "2" and row["doubling_days"]:
            before = [
                other for other in rows
                if other["timepoint"] == "1"
                and (other["patient_id"], other["doubling_days"]) == (row["patient_id"], row["doubling_days"])
                and (other["laterality"], other["view_position"]) == (row["laterality"], row["view_position"])
            ]  # fmt: skip
            for other in before:
                ratio = float(row["volume_mm3"]) / float(other["volume_mm3"])
                assert ratio == pytest.approx(2 ** (180 / float(row["doubling_days"])), rel=0.05)
                grown += 1
    assert grown
    dates = {}
    for path in sorted((tmp_path / "growth").rglob("*.dicom")):
        dataset = dcmread(path, stop_before_pixels=True)
        dates.setdefault(dataset.PatientID, set()).add(dataset.StudyDate)
    assert all(len(days) == 3 for days in dates.values())


@pytest.mark.parametrize("size", [127, (128, 4097), (1000, 500), 0])
def test_impossible_sizes_are_refused(size, tmp_path):
    with pytest.raises(GBCIError, match="expected height and width from 128 to 4096"):
        generate_phantom(tmp_path / "data", studies=1, size=size)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"studies": 0}, "number of studies is 0; expected at least 1"),
        ({"workers": 0}, "number of workers is 0; expected at least 1"),
        ({"timepoints": 0}, "number of timepoints is 0; expected 1 to 100"),
        ({"interval": 0}, "interval between timepoints is 0; expected 1 to 3650 days"),
    ],
)
def test_impossible_numbers_are_refused(options, sentence, tmp_path):
    with pytest.raises(GBCIError, match=sentence):
        generate_phantom(tmp_path / "data", **{"studies": 1, "size": 128, **options})
    assert not list(tmp_path.iterdir())


def test_a_folder_with_content_is_refused(tmp_path):
    (tmp_path / "note.txt").write_text("mine")
    with pytest.raises(GBCIError, match=f"{tmp_path.name} already exists and is not empty"):
        generate_phantom(tmp_path, studies=1, size=128)
    assert [path.name for path in tmp_path.iterdir()] == ["note.txt"]


def test_an_empty_folder_is_filled(tmp_path):
    (tmp_path / "empty").mkdir()
    generate_phantom(tmp_path / "empty", studies=1, size=128)
    assert len(list((tmp_path / "empty").rglob("*.dicom"))) == 4


def test_an_empty_folder_is_filled_where_it_stands(tmp_path, monkeypatch):
    """The folder itself is not replaced: it may be a link, a mount point or the working directory."""
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to("there")
    generate_phantom(tmp_path / "link", studies=1, size=128)
    assert (tmp_path / "there" / "preview.png").is_file()
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    generate_phantom(".", studies=1, size=128)
    assert {path.name for path in Path.cwd().iterdir()} == {path.name for path in (tmp_path / "there").iterdir()}
    assert {path.name for path in tmp_path.iterdir()} == {"here", "there", "link"}


def test_a_breast_is_as_suspicious_as_what_it_shows(tmp_path, tools):
    generate_phantom(
        tmp_path / "data", studies=2, seed=7, size=128, population=RICH, timepoints=2, interval=3650
    )  # ten years before, all findings of one of these breasts are too small to be seen
    findings = tools.rows(tmp_path / "data" / "finding_annotations.csv")
    shown = {}
    for row in findings:
        grade = int(row["finding_birads"].split()[-1]) if row["finding_birads"] else 1
        shown.setdefault((row["study_id"], row["laterality"]), []).append(grade)
    assert any(shown[row["study_id"], row["laterality"]] == [1, 1] for row in findings if row["timepoint"] == "0")
    for row in findings:
        assert row["breast_birads"] == f"BI-RADS {max(shown[row['study_id'], row['laterality']])}"


def test_workers_end_with_a_killed_parent(tmp_path):
    """The pipe reaches its end when the last process that holds it ends."""
    script = (
        "import os, signal, sys; from gbci_fast.phantom import generate_phantom\n"
        "if __name__ == '__main__':\n"
        "    kill = lambda done: done and os.kill(os.getpid(), signal.SIGKILL)\n"
        "    generate_phantom(sys.argv[1], 1000, size=128, progress=kill, workers=2)"
    )
    ended = subprocess.run([sys.executable, "-c", script, tmp_path / "data"], capture_output=True, timeout=60)
    assert ended.returncode == -signal.SIGKILL


def test_a_dead_worker_is_one_sentence_and_leaves_nothing(tmp_path):
    def kill(done: int):
        nonlocal children  # asked for once: a second reader of a process's status would take it from the pool
        children = children or multiprocessing.active_children()
        for child in children:
            child.kill()

    children = []
    with pytest.raises(GBCIError, match=r"^a worker process was killed by SIGKILL, .*; use fewer --workers$"):
        generate_phantom(tmp_path / "data", studies=30, size=128, progress=kill, workers=2)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("workers", [1, 2])
def test_interruption_leaves_nothing(workers, tmp_path):
    def interrupt(done: int):
        if done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generate_phantom(tmp_path / "data", studies=3, size=128, progress=interrupt, workers=workers)
    assert not list(tmp_path.iterdir())


def test_progress(tmp_path):
    done = []
    generate_phantom(tmp_path / "data", studies=3, size=128, progress=done.append)
    assert done == [0, 1, 2, 3]
