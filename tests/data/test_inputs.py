"""Data sets, plain files and folders as inputs, in records."""

import os
import re
from pathlib import Path

import pytest

from gbci_fast.attributes import Attributes
from gbci_fast.data.vindr import BREAST_TABLE, VinDr, find_inputs
from gbci_fast.dicom.presentation import full_scale
from gbci_fast.dicom.reading import Mammogram
from gbci_fast.errors import GBCIError


def test_inputs_of_a_data_set_are_its_images(make_root):
    root = make_root(findings=[{}])
    assert find_inputs(root) == VinDr(root).images


def test_input_of_one_file(make_dicom, ramp):
    path = make_dicom(ramp, name="P1_LEFT_MLO.dcm")
    (record,) = find_inputs(path)
    assert (record.path, record.image_id, record.study_id) == (path, "P1_LEFT_MLO", path.parent.name)
    assert record.attributes == Attributes(laterality="L", view_position="MLO")
    assert record.read().shape == (16, 32)


def test_inputs_of_a_folder_are_sorted_and_unique(tmp_path, make_dicom, ramp):
    for name in ("b/LCC.dcm", "a/LCC.dcm", "a/LCC.png", "a/no_suffix"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        make_dicom(ramp, name=name)
    (tmp_path / "a" / "readme.txt").write_text("not an image")
    (tmp_path / "a" / "broken.dcm").write_bytes(b"")
    records = find_inputs(tmp_path)
    assert [str(record.path.relative_to(tmp_path)) for record in records] == [
        "a/LCC.dcm",
        "a/LCC.png",
        "a/broken.dcm",
        "a/no_suffix",
        "b/LCC.dcm",
    ]
    assert [record.image_id for record in records] == ["LCC", "LCC-2", "broken", "no_suffix", "LCC-3"]
    assert [record.study_id for record in records] == ["a", "a", "a", "a", "b"]


def test_folders_of_one_name_are_different_studies(tmp_path, make_dicom, ramp):
    for name in ("001/left/CC.dcm", "002/left/CC.dcm", "CC.dcm"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        make_dicom(ramp, name=name)
    assert [record.study_id for record in find_inputs(tmp_path)] == ["001-left", "002-left", tmp_path.name]


def test_unique_names_do_not_collide_with_real_ones(tmp_path, make_dicom, ramp):
    for folder, name in (("a", "x.dcm"), ("a", "x-2.dcm"), ("b", "x.dcm")):
        (tmp_path / folder).mkdir(exist_ok=True)
        make_dicom(ramp, name=f"{folder}/{name}")
    names = [record.image_id for record in find_inputs(tmp_path)]
    assert sorted(names) == ["x", "x-2", "x-3"]


def test_views_and_folders_of_one_woman_are_one_patient(tmp_path, make_dicom, ramp):
    """By her PatientID, in which some sets name the view; without one, by the folder."""
    ids = {"A/S1/x.dcm": "P-7", "A/S2/x.dcm": "P-7", "B/x.dcm": "P-7_LEFT_CC", "C/x.dcm": "P-8", "C/y.dcm": ""}
    for name, patient in ids.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        make_dicom(ramp, name=name, PatientID=patient)
    found = [record.patient_in(record.read()) for record in find_inputs(tmp_path)]
    assert found[0] == found[1] == found[2] != found[3]
    assert found[4] == "C"
    assert not any("P-" in patient for patient in found)


def test_a_table_knows_its_patients_better_than_a_header(make_root, make_dicom, ramp):
    root = make_root()
    (record,) = VinDr(root).images
    mammogram = Mammogram(path=record.path, stored=ramp, presentation=full_scale(16), patient_id="x")
    assert record.patient_in(mammogram) == record.patient


def test_a_name_that_is_no_text_is_one_sentence(tmp_path, make_dicom, ramp):
    make_dicom(ramp, name="a.dcm")
    (tmp_path / "a.dcm").rename(os.fsdecode(os.fsencode(tmp_path) + b"/M\xfcller_LCC.dcm"))
    sentence = r"M\\udcfcller_LCC.dcm' has a name that is not plain text \(UTF-8\); rename it"
    with pytest.raises(GBCIError, match=sentence):
        find_inputs(tmp_path)


def test_what_cannot_be_looked_at_stops_or_becomes_a_record_with_its_fault(tmp_path, make_dicom, ramp):
    make_dicom(ramp, name="a.dcm")
    make_dicom(ramp, name="b.dcm").rename(os.fsdecode(os.fsencode(tmp_path) + b"/z\xfcrich.dcm"))
    (tmp_path / "study").symlink_to(tmp_path / "unmounted")
    (tmp_path / ".lock").symlink_to("nobody")  # hidden files are no inputs
    os.mkfifo(tmp_path / "c.dcm")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(GBCIError, match=r"c.dcm is no regular file \(2 more cannot be looked at either\)"):
        find_inputs(tmp_path)
    records = find_inputs(tmp_path, skip_bad=True)
    assert [(record.image_id, record.fault) for record in records] == [
        ("a", None),
        ("c", "is no regular file"),
        ("study", "is a link that leads nowhere"),
        (r"z\udcfcrich", "has a name that is not plain text (UTF-8); rename it"),
    ]
    for record in records[1:]:
        with pytest.raises(GBCIError, match=re.escape(record.fault)):
            record.read()
        assert record.fault in record.file_fault()


def test_an_unreadable_file_may_be_an_image(tmp_path, make_dicom, ramp, monkeypatch):
    """It is no reason to leave it out in silence that its first bytes cannot be read."""
    make_dicom(ramp, name="a.dcm")
    (tmp_path / "no_suffix").write_bytes(b"secret")
    (tmp_path / "notes.txt").write_text("not an image")
    opened = Path.open

    def refuse(path, *args, **kwargs):
        if path.name == "no_suffix":
            raise PermissionError(13, "Permission denied", str(path))
        return opened(path, *args, **kwargs)

    monkeypatch.setattr(Path, "open", refuse)
    assert [record.image_id for record in find_inputs(tmp_path)] == ["a", "no_suffix"]
    with pytest.raises(GBCIError, match=r"no_suffix.*Permission denied"):
        find_inputs(tmp_path)[1].read()


def test_an_input_that_is_a_loop_of_links_is_one_sentence(tmp_path):
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    with pytest.raises(GBCIError, match=r"/a cannot be read: Too many levels of symbolic links; expected a DICOM"):
        find_inputs(tmp_path / "a")


def test_input_that_holds_nothing(tmp_path):
    (tmp_path / "notes.txt").write_text("nothing here")
    with pytest.raises(GBCIError, match=r"holds no DICOM or PNG file and no breast-level_annotations.csv"):
        find_inputs(tmp_path)
    with pytest.raises(GBCIError, match=r"absent does not exist; expected a DICOM or PNG file or a folder of them"):
        find_inputs(tmp_path / "absent")


def test_data_set_without_its_image_table(make_root):
    root = make_root(findings=[{}])
    (root / BREAST_TABLE).unlink()
    with pytest.raises(GBCIError, match=r"breast-level_annotations.csv does not exist"):
        find_inputs(root)
