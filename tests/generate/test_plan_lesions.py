"""One lesion, many pictures: lesion ids, views and dates of plan rows."""

import json
from datetime import date, timedelta

import pandas as pd
import pytest
from pydicom import dcmread

from gbci_fast.data.deidentify import Deidentifier, KeptIdentifiers
from gbci_fast.data.vindr import ImageRecord, VinDr, find_inputs
from gbci_fast.errors import GBCIError
from gbci_fast.generate.identities import Identities
from gbci_fast.generate.job import run_job
from gbci_fast.generate.plan import make_plan
from gbci_fast.generate.plan_csv import read_plan, write_plan
from gbci_fast.generate.settings import JobSettings
from gbci_fast.lesion.lesion import Growth, Lesion


@pytest.fixture
def read(tmp_path):
    """`read(text, **options)`: the items of a plan file over the records a and b."""
    records = [ImageRecord(study_id="s", image_id=name, path=tmp_path / f"{name}.dcm") for name in "ab"]

    def parse(text, seed=5, **options):
        (tmp_path / "plan.csv").write_text(text)
        return list(read_plan(tmp_path / "plan.csv", records, tmp_path, seed=seed, **options))

    return parse


def test_rows_that_name_a_lesion_share_it_and_others_do_not(read):
    named = read("image,lesion_id,finding_birads\na,L1,\nb,L1,5\na,L2,\na,,\nb,,\n")
    first, second, third, *own = (item.lesion_id for item in named)
    assert (first, second, third) == ("L1", "L1", "L2")
    assert len({*own, first, third}) == 4
    assert [len(name) for name in own] == [32, 32]
    assert own == [item.lesion_id for item in read("image\na\nb\na\na\nb\n")][3:]  # of seed and description alone
    assert len({item.image_id for item in named}) == 5


def test_the_same_lesion_mask_and_seed_are_one_lesion(read):
    rows = "image,seed,finding_birads,diameter_px,center_x,center_y\n"
    one, other_template, other_seed, other_grade, other_size = (
        item.lesion_id
        for item in read(f"{rows}a,7,4,20,30,30\nb,7,4,20,30,30\na,8,4,20,30,30\na,7,5,20,30,30\na,7,4,21,30,30\n")
    )
    assert one == other_template
    assert len({one, other_seed, other_grade, other_size}) == 4
    assert read(f"{rows}a,7,4,20,30,30\n", seed=6)[0].lesion_id != one


def test_equal_lesions_of_two_patients_are_two(tmp_path):
    def lesions(study, patient):
        told = {"patient_id": patient} if patient else {}
        record = ImageRecord(study_id=study, image_id="a", path=tmp_path / "a.dcm", extra=told)
        (tmp_path / "plan.csv").write_text("image,seed,center_x,center_y,diameter_px\na,7,30,30,20\n")
        read = read_plan(tmp_path / "plan.csv", [record], tmp_path, seed=5)
        return [item.lesion_id for item in (*read, *make_plan([record], variants=1, seed=5))]

    # As in two jobs of the same seed, whose data sets are merged.
    one, same, other, unnamed = lesions("s", "p"), lesions("t", "p"), lesions("s", "q"), lesions("s", None)
    assert one == same
    assert len({*one, *other, *unnamed}) == 6


def test_a_lesion_without_a_name_has_a_pseudonym_in_a_plain_folder(tmp_path):
    record = ImageRecord(study_id="roe", image_id="a", path=tmp_path / "a.dcm", listed=False)
    (tmp_path / "plan.csv").write_text("image,lesion_id\na,L1\na,\n")
    named, plain = plan = read_plan(tmp_path / "plan.csv", [record], tmp_path, seed=5)
    first, second = (Identities(Deidentifier(bytes([byte]) * 32)) for byte in (1, 2))
    assert first.item(named).lesion_id == "L1"
    assert len({plain.lesion_id, first.item(plain).lesion_id, second.item(plain).lesion_id}) == 3
    write_plan(plan, tmp_path / "again.csv")  # a name would go into the tables as it is
    assert pd.read_csv(tmp_path / "again.csv", keep_default_na=False).lesion_id.tolist() == ["L1", ""]


def test_a_name_decides_no_image(read):
    (named,), (plain,) = read("image,lesion_id\na,L1\n"), read("image\na\n")
    assert (named.image_id, named.seed, named.study_id) == (plain.image_id, plain.seed, plain.study_id)


def test_an_item_s_lesion_is_that_of_its_description(read):
    (item,) = read("image,finding_birads,margin,subtlety,pathology\na,5,spiculated,4,malignant\n")
    assert item.lesion == Lesion(
        finding_categories=("Mass",), finding_birads=5, margin="spiculated", subtlety=4, pathology="malignant"
    )
    (healthy,) = read("image,finding_categories\na,No Finding\n")
    assert healthy.lesion == Lesion(finding_categories=())


def test_a_lesion_as_json(read, tmp_path):
    text = '"{""margin"": ""spiculated"", ""axes"": [12, 9, 8.5], ""growth"": {""doubling_days"": 180}}"'
    (item,), (plain,) = read(f"image,lesion\na,{text}\n"), read("image,margin\na,spiculated\n")
    assert item.attributes == plain.attributes
    assert item.lesion == Lesion(
        finding_categories=("Mass",),
        finding_birads=4,
        margin="spiculated",
        axes=(12, 9, 8.5),
        growth=Growth(doubling_days=180),
    )
    assert item.image_id != plain.image_id
    write_plan([item], tmp_path / "again.csv")
    (again,) = read((tmp_path / "again.csv").read_text())
    assert (again.lesion, again.lesion_id, again.image_id) == (item.lesion, item.lesion_id, item.image_id)
    (stated,) = read(f"image,margin,lesion\na,spiculated,{text}\n")
    assert stated.lesion == item.lesion


def test_a_drawn_lesion_is_written_and_read_back(tmp_path):
    records = [ImageRecord(study_id="s", image_id=name, path=tmp_path / f"{name}.dcm") for name in "ab"]
    plan = make_plan(records, variants=30, seed=0, balance="natural")
    assert any(item.lesion.growth for item in plan)
    assert len({item.lesion_id for item in plan}) == 60
    write_plan(plan, tmp_path / "plan.csv")
    for item, other in zip(plan, read_plan(tmp_path / "plan.csv", records, tmp_path, seed=0), strict=True):
        assert other.lesion == item.lesion
        assert (other.image_id, other.lesion_id) == (item.image_id, item.lesion_id)


@pytest.mark.parametrize(
    ("text", "expected"),
    [("", None), ("2031-05-02", date(2031, 5, 2)), ("180", timedelta(180)), ("-30", timedelta(-30))],
)
def test_dates(read, tmp_path, text, expected):
    (item,) = read(f"image,date\na,{text}\n")
    assert item.date == expected
    write_plan([item], tmp_path / "again.csv")
    (again,) = read((tmp_path / "again.csv").read_text())
    assert (again.date, again.image_id, again.study_id) == (item.date, item.image_id, item.study_id)
    (plain,) = read("image\na\n")
    assert (item.image_id != plain.image_id, item.study_id != plain.study_id) == (bool(text), bool(text))
    assert item.seed == plain.seed


@pytest.mark.parametrize(
    ("columns", "cells", "sentence"),
    [
        ("date", "tomorrow", "date is 'tomorrow'; expected a day such as 2031-05-02, or days from the template's"),
        ("date", "2031-02-30", "date is '2031-02-30'; expected a day"),
        ("date", "99999", "date is '99999'; expected a day"),
        ("view", "ML", "view is 'ML'; expected one of CC, MLO"),
        ("view,view_position", "CC,MLO", "view is CC, and view_position is MLO; expected the same"),
        ("lesion_id", "x" * 201, "lesion_id is 'x+'; expected at most 200 printable characters"),
        ("lesion", "{", r"lesion is '\{'; expected JSON such as"),
        ("lesion", '"{""colour"": 1}"', "lesion: lesion has the key 'colour'; expected out of finding_categories"),
        (
            "margin,lesion",
            'circumscribed,"{""margin"": ""spiculated""}"',
            "margin is 'circumscribed', and 'spiculated' in lesion; expected the same",
        ),
        (
            "finding_categories,lesion",
            'Asymmetry,"{""margin"": ""spiculated""}"',
            "margin is 'spiculated' beside Asymmetry; expected it of a Mass alone",
        ),
        (
            "laterality,lesion",
            'L,"{""laterality"": ""R""}"',
            "laterality is 'L', and 'R' in lesion; expected the same",
        ),
        ("shape", "square", "shape is 'square'; expected one of round"),
    ],
)
def test_bad_cells_name_their_line(read, columns, cells, sentence):
    with pytest.raises(GBCIError, match=rf"plan\.csv, line 3: {sentence}"):
        read(f"image,{columns}\na{',' * (columns.count(',') + 1)}\na,{cells}\n")


def test_a_filled_cell_that_the_set_category_cannot_have(read):
    with pytest.raises(GBCIError, match="line 2: margin is 'spiculated' beside Asymmetry; expected it of a Mass alone"):
        read("image,margin\na,spiculated\n", overrides={"finding_categories": "Asymmetry"})
    rows = "image,finding_categories,margin\na,Mass,spiculated\n"
    (mass,) = read(rows, overrides={"finding_categories": "Asymmetry"})
    assert (mass.attributes.finding_categories, mass.attributes.margin) == (("Mass",), "spiculated")
    # What is set for all rows is left out of those that cannot have it.
    (other,) = read("image,finding_categories\na,Asymmetry\n", overrides={"margin": "spiculated"})
    assert (other.attributes.finding_categories, other.attributes.margin) == (("Asymmetry",), None)


def run(pipe, make_job, plan, output, **options):
    settings = JobSettings(seed=0, batch_size=2, sampler=make_job.sampler, weights_hash="ab" * 32)
    run_job(pipe, plan, output, settings, **options)
    return pd.read_parquet(output / "manifest.parquet")


def test_a_written_plan_gives_the_same_bytes(pipe, make_job, phantom, tree, tmp_path):
    records = find_inputs(phantom)
    plan = make_plan(records, variants=2, seed=0, balance="natural")
    write_plan(plan, tmp_path / "plan.csv")
    for name, each in (("whole", plan), ("read", read_plan(tmp_path / "plan.csv", records, phantom, seed=0))):
        run(pipe, make_job, each, tmp_path / name)
    whole, read = (tree(tmp_path / name) for name in ("whole", "read"))
    assert {name for name in whole if whole[name] != read.get(name)} == {"job.json"}  # the plan's own digests
    assert whole.keys() == read.keys()


def test_two_views_and_two_dates_of_one_lesion(pipe, make_job, phantom, tmp_path):
    records = {record.view_position: record for record in VinDr(phantom).images if record.laterality == "L"}
    cells = [
        f"{records['CC'].image_id},0,L1,CC,",
        f"{records['MLO'].image_id},0,L1,MLO,",
        f"{records['CC'].image_id},0,L1,CC,180",
        f"{records['CC'].image_id},0,L2,,2031-05-02",
    ]
    (tmp_path / "plan.csv").write_text("image,variant,lesion_id,view,date\n" + "\n".join(cells) + "\n")
    plan = read_plan(tmp_path / "plan.csv", list(records.values()), phantom, seed=0)
    names = Identities(KeptIdentifiers())
    manifest = run(pipe, make_job, plan, tmp_path / "data", identities=names)
    assert manifest.lesion_id.tolist() == ["L1", "L1", "L1", "L2"]
    assert manifest.date.tolist() == ["", "", "+180", "2031-05-02"]
    assert manifest["index"].tolist() == [0, 1, 2, 3]
    assert [Lesion.from_json(json.loads(text)) for text in manifest.lesion] == [item.lesion for item in plan]
    files = [dcmread(tmp_path / "data" / name) for name in manifest.dicom_file]
    days = [pd.Timestamp(file.StudyDate) for file in files]
    assert days[0] == days[1] == days[2] - pd.Timedelta(days=180)
    assert days[3] == pd.Timestamp("2031-05-02")
    assert len({file.PatientID for file in files}) == 1
    studies = [file.StudyInstanceUID for file in files]
    assert studies[0] == studies[1]
    assert len(set(studies)) == 3
    assert [file.LongitudinalTemporalInformationModified for file in files] == [
        "UNMODIFIED", "UNMODIFIED", "MODIFIED", "MODIFIED",
    ]  # fmt: skip
    findings = pd.read_csv(tmp_path / "data" / "finding_annotations.csv", keep_default_na=False)
    assert set(findings.lesion_id[findings.source == "synthetic"]) == {"L1", "L2"}
    assert set(findings.lesion_id[findings.source == "template"]) == {""}


@pytest.mark.parametrize(
    ("cells", "sentence"),
    [
        ("view\n{id},MLO", "view is MLO in the plan and CC in the image; expected the same"),
        ('lesion\n{id},"{{""laterality"": ""R""}}"', "side is R in the lesion and L in the image; expected the same"),
    ],
)
def test_another_view_or_side_than_the_image_s(pipe, make_job, phantom, tmp_path, cells, sentence):
    record = next(each for each in VinDr(phantom).images if (each.laterality, each.view_position) == ("L", "CC"))
    (tmp_path / "plan.csv").write_text("image," + cells.format(id=record.image_id) + "\n")
    plan = read_plan(tmp_path / "plan.csv", [record], phantom, seed=0)
    with pytest.raises(GBCIError, match=rf"{record.image_id}.*: {sentence}"):
        run(pipe, make_job, plan, tmp_path / "data")
    assert not (tmp_path / "data").exists()
