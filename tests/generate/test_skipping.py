"""Jobs whose inputs are damaged or do not suit: stopped, or skipped and listed."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from gbci_fast.data.deidentify import Deidentifier
from gbci_fast.data.vindr import VinDr, find_inputs
from gbci_fast.dicom.reading import read_mammogram
from gbci_fast.errors import GBCIError
from gbci_fast.generate.identities import Identities, job_identities
from gbci_fast.generate.plan import make_plan


class StopError(Exception):
    """Something that nobody expects."""


def manifest_of(output):
    return pd.read_parquet(output / "manifest.parquet")


@pytest.fixture
def spoiled(templates, tmp_path):
    """`spoiled(content of c)`: a folder of four inputs, a to d, of which c is not a mammogram."""

    def make(third):
        folder = tmp_path / "input"
        folder.mkdir()
        for name in ("a_LCC.dcm", "b_LCC.dcm", "d_LCC.dcm"):
            shutil.copy(templates / "full_LCC.dcm", folder / name)
        (folder / "c_LCC.dcm").write_bytes(third((folder / "a_LCC.dcm").read_bytes()))
        return folder

    return make


def without_breast(content):
    """Black but for two pixels: only decoding can tell."""
    return content[: -2 * 160 * 120] + b"\xff\xff\xff\xff" + bytes(2 * 160 * 120 - 4)


def cut_short(content):
    return content[:5000]


def test_a_damaged_image_among_good_ones_stops_the_job_until_it_is_repaired(
    assert_valid_part, make_job, templates, spoiled, tmp_path
):
    folder = spoiled(without_breast)
    with pytest.raises(GBCIError, match=r"c_LCC.dcm: no breast found"):
        make_job(folder, tmp_path / "data")
    identities = job_identities(tmp_path / "data", 0, [])
    plan = [identities.item(item) for item in make_plan(find_inputs(folder), variants=1, seed=0)]
    assert_valid_part(tmp_path / "data", plan, 2)
    shutil.copy(templates / "full_LCC.dcm", folder / "c_LCC.dcm")
    make_job(folder, tmp_path / "data", resume=True)
    assert len(manifest_of(tmp_path / "data")) == 4


@pytest.mark.parametrize("skip_bad", [False, True])
def test_what_a_header_tells_is_found_before_anything_is_made(make_job, templates, tmp_path, skip_bad, monkeypatch):
    (tmp_path / "input").mkdir()
    (tmp_path / "input" / "c_LCC.dcm").write_bytes(cut_short((templates / "full_LCC.dcm").read_bytes()))
    monkeypatch.setattr("gbci_fast.jobs.folder.atomically", None)  # nothing is written
    with pytest.raises(GBCIError, match=r"c_LCC.dcm: damaged or not decodable \(PixelData holds"):
        make_job(tmp_path / "input", tmp_path / "data", skip_bad=skip_bad)
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize("damage", [cut_short, without_breast])
def test_bad_inputs_are_skipped_and_listed(images_of, make_job, templates, spoiled, tree, tmp_path, damage, stop_after):
    folder, output = spoiled(damage), tmp_path / "data"
    plan = make_job(folder, output, variants=2, skip_bad=True)
    rows = manifest_of(output)
    assert rows["index"].tolist() == [0, 1, 2, 3, 6, 7]
    assert rows.image_id.tolist() == [plan[index].image_id for index in rows["index"]]
    assert rows.batch.tolist() == [0, 0, 1, 1, 3, 3]  # batches are cut from the plan, hole or not
    assert images_of(output).keys() == {*rows.dicom_file, *rows.png_file, *rows.mask_file}
    assert VinDr(output).missing() == []
    skipped = pd.read_csv(output / "skipped.csv")
    assert skipped.columns.tolist() == ["file", "reason"]
    templates = json.loads((output / "job.json").read_text())["templates"]
    assert [templates[Path(name).stem] for name in skipped.file] == ["c_LCC.dcm"]
    assert skipped.reason[0].startswith("damaged or not decodable" if damage is cut_short else "no breast found")
    assert Image.open(output / "preview.png").size == (8 * 224, 224 * 6 + 18)
    assert not (output / ".progress").exists()
    # A second run, stopped and resumed, ends in the same bytes.
    with pytest.raises(StopError):
        make_job(folder, tmp_path / "cut", variants=2, skip_bad=True, on_batch=stop_after(6, StopError))
    assert (tmp_path / "cut" / "skipped.csv").exists()
    make_job(folder, tmp_path / "cut", variants=2, skip_bad=True, resume=True)
    assert tree(tmp_path / "cut") == tree(output)


def test_a_hole_in_a_batch_changes_no_other_image_beyond_rounding(make_job, templates, spoiled, tmp_path):
    folder, names = spoiled(without_breast), Identities(Deidentifier(bytes(16)))
    make_job(folder, tmp_path / "holes", skip_bad=True, identities=names)
    shutil.copy(templates / "full_LCC.dcm", folder / "c_LCC.dcm")
    make_job(folder, tmp_path / "whole", identities=names)
    holes, whole = (
        manifest_of(tmp_path / "holes").set_index("index"),
        manifest_of(tmp_path / "whole").set_index("index"),
    )
    assert holes.index.tolist() == [0, 1, 3]
    assert holes.dicom_sha256[[0, 1]].tolist() == whole.dicom_sha256[[0, 1]].tolist()
    image, other = (read_mammogram(tmp_path / name / holes.dicom_file[3]) for name in ("holes", "whole"))
    assert np.abs(image.unit() - other.unit()).max() < 2e-3


def test_a_stopped_job_goes_on_with_skip_bad_and_its_holes_stay(make_job, templates, spoiled, tmp_path):
    folder, output = spoiled(without_breast), tmp_path / "data"
    with pytest.raises(GBCIError, match="no breast found"):
        make_job(folder, output)
    counts = []
    make_job(folder, output, resume=True, skip_bad=True, on_batch=counts.append)
    assert counts == [2, 4]
    shutil.copy(templates / "full_LCC.dcm", folder / "c_LCC.dcm")
    make_job(folder, output, resume=True)  # finished: as it is
    assert manifest_of(output)["index"].tolist() == [0, 1, 3]


def test_only_what_does_not_suit_is_skipped(make_job, phantom, tmp_path):
    """One of two boxes of an image lies where the model does not look; the other is painted."""
    records = [record for record in VinDr(phantom).images if record.findings][:1]
    (finding,) = records[0].findings
    corner = replace(finding, box=(159.0, 0.0, 160.0, 1.0) if finding.box[0] < 80 else (0.0, 0.0, 1.0, 1.0))
    records = [replace(records[0], findings=(finding, corner))]
    make_job(records, tmp_path / "data", variants=2, mask="annotations", skip_bad=True)
    assert manifest_of(tmp_path / "data").variant.tolist() == [0]
    assert "outside the breast" in (tmp_path / "data" / "skipped.csv").read_text()


@pytest.mark.parametrize("damage", [cut_short, without_breast])
def test_nothing_stays_where_all_are_skipped(make_job, templates, tmp_path, damage):
    (tmp_path / "input").mkdir()
    for name in ("a_LCC.dcm", "b_LCC.dcm", "c_LCC.dcm"):
        (tmp_path / "input" / name).write_bytes(damage((templates / "full_LCC.dcm").read_bytes()))
    sentence = r"all 3 images were skipped, so nothing was made; the first reason: .*a_LCC.dcm: "
    with pytest.raises(GBCIError, match=sentence):
        make_job(tmp_path / "input", tmp_path / "data", skip_bad=True)
    assert not (tmp_path / "data").exists()
