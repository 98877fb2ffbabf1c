"""Plan files: a written plan reads back as itself; every kind of mask; what is refused, with file and line."""

import dataclasses
import os

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from pydicom import dcmread

from gbci_fast.attributes import Attributes
from gbci_fast.data.vindr import Finding, ImageRecord, VinDr
from gbci_fast.errors import GBCIError
from gbci_fast.generate.identities import job_identities
from gbci_fast.generate.job import run_job
from gbci_fast.generate.mask_sources import BoxMask, EllipseMask, FileMask
from gbci_fast.generate.plan import make_plan
from gbci_fast.generate.plan_csv import read_plan, write_plan
from gbci_fast.generate.settings import JobSettings


@pytest.fixture
def records(tmp_path):
    known = Attributes(laterality="L", view_position="CC", breast_density="C", breast_birads=3, age=61.0)
    mass = dataclasses.replace(known, finding_categories=("Mass", "Asymmetry"), finding_birads=3)
    found = Finding(box=(1.5, 2, 31, 4.25), attributes=mass, extra={"report": 'round, "dense"\nmass'})
    return [
        ImageRecord(study_id="s", image_id="a", path=tmp_path / "in" / "s" / "a.dicom", attributes=known,
                    findings=(found,)),
        ImageRecord(study_id="s", image_id="b", path=tmp_path / "in" / "s" / "b.dicom"),
    ]  # fmt: skip


@pytest.fixture
def read(tmp_path, records):
    """`read(text, **options)`: the items of a plan file."""

    (tmp_path / "in").mkdir()

    def parse(text, seed=5, **options):
        (tmp_path / "plan.csv").write_text(text)
        return read_plan(tmp_path / "plan.csv", records, tmp_path / "in", seed=seed, **options)

    return parse


def content(item):
    values = {each.name: getattr(item, each.name) for each in dataclasses.fields(item)}
    return {**values, "mask": item.mask.identity()[item.mask_source in ("annotations", "plan") :]}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"variants": 35, "balance": "finding_categories,finding_birads"},
        {"balance": "natural"},
        {"mask": "annotations"},
        {"mask": "mask.png"},
        {"overrides": {"finding_categories": "No Finding", "breast_density": "unknown", "age": "unknown"}},
        {"overrides": {"finding_categories": "unknown", "finding_birads": "unknown", "breast_birads": "2"}},
        {"overrides": {"view_position": "MLO", "pixel_spacing": "0.7"}, "report": "spiculated, irregular"},
    ],
)
def test_a_written_plan_reads_back_as_itself(tmp_path, records, options, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Image.fromarray(np.eye(4, dtype=np.uint8)).save("mask.png")
    plan = make_plan(records, **{"variants": 2, "seed": 5, **options})
    write_plan(plan, tmp_path / "deep" / "plan.csv")
    read = read_plan(tmp_path / "deep" / "plan.csv", records, tmp_path / "in", seed=5)
    for item, other in zip(plan, read, strict=True):
        if isinstance(item.mask, FileMask):
            assert other.mask.path.samefile(item.mask.path)
        assert content(other) == content(item)


def test_a_plan_makes_the_same_images(pipe, make_job, phantom, finished, tmp_path):
    """Bytes of every image and mask of the job that the plan was written of."""
    records = VinDr(phantom).images
    write_plan(make_plan(records, variants=1, seed=0), tmp_path / "plan.csv")
    plan = read_plan(tmp_path / "plan.csv", records, phantom, seed=0)
    settings = JobSettings(seed=0, batch_size=2, sampler=make_job.sampler, weights_hash="ab" * 32)
    run_job(pipe, plan, tmp_path / "data", settings)
    expected, made = (pd.read_parquet(folder / "manifest.parquet") for folder in (finished, tmp_path / "data"))
    for column in ("image_id", "seed", "dicom_sha256", "png_sha256", "mask_sha256"):
        assert list(made[column]) == list(expected[column])


@pytest.mark.parametrize("cut", [[[0, 1], [2, 3]], [[3, 1], [2, 0]]])
def test_pieces_of_a_plan_make_the_images_of_the_whole(pipe, make_job, phantom, finished, tmp_path, cut):
    """Ids, seeds, studies, UIDs and pixels, however the rows are dealt out; and no two pieces share an id."""
    records = VinDr(phantom).images
    write_plan(make_plan(records, variants=1, seed=0), tmp_path / "plan.csv")
    header, *rows = (tmp_path / "plan.csv").read_text().splitlines()
    whole = pd.read_parquet(finished / "manifest.parquet").set_index("index")
    settings = JobSettings(seed=0, batch_size=2, sampler=make_job.sampler, weights_hash="ab" * 32)
    columns = ["image_id", "study_id", "seed", "variant", "dicom_sha256", "png_sha256", "mask_sha256"]
    names = job_identities(tmp_path / "none", 0, {record.path for record in records})  # of INPUT, not of the piece
    for number, piece in enumerate(cut):
        (tmp_path / f"{number}.csv").write_text("\n".join([header, *(rows[i] for i in piece)]) + "\n")
        plan = read_plan(tmp_path / f"{number}.csv", records, phantom, seed=0)
        assert [item.index for item in plan] == piece
        run_job(pipe, plan, tmp_path / str(number), settings, identities=names)
        run_job(pipe, plan, tmp_path / str(number), settings, identities=names, resume=True)  # nothing is left to do
        made = pd.read_parquet(tmp_path / str(number) / "manifest.parquet").set_index("index")
        pd.testing.assert_frame_equal(made[columns], whole.loc[piece, columns])
        assert [dcmread(tmp_path / str(number) / name).InstanceNumber for name in made.dicom_file] == [
            i + 1 for i in piece
        ]


def test_the_index_is_the_rows_number_where_it_is_blank(read, records):
    whole = make_plan(records, variants=2, seed=5)
    plain = read("image\na\na\nb\nb\n")
    assert [(item.index, item.image_id, item.seed) for item in plain] == [
        (item.index, item.image_id, item.seed) for item in whole
    ]
    moved = read("image,variant,index\nb,1,3\na,,\n")
    assert [item.index for item in moved] == [3, 1]
    assert [item.image_id for item in moved] == [whole[3].image_id, whole[1].image_id]


@pytest.mark.parametrize("edit", ["finding_birads", "report", "seed", "xmin", "image"])
def test_an_edited_row_of_the_same_index_has_another_id(read, edit):
    cells = {"image": "a", "finding_birads": "3", "report": "x", "seed": "7", "xmin": "1", "ymin": "1", "xmax": "9",
             "ymax": "9", "index": "4"}  # fmt: skip
    changed = cells | {edit: {"report": "y", "image": "b"}.get(edit, "4")}
    before, after = (read(f"{','.join(row)}\n{','.join(row.values())}\n")[0] for row in (cells, changed))
    assert before.index == after.index == 4
    assert before.image_id != after.image_id


def test_resume_refuses_a_changed_plan(pipe, make_job, phantom, tmp_path):
    records = VinDr(phantom).images[:1]
    settings = JobSettings(seed=0, formats=("png",), sampler=make_job.sampler)

    def run(row, **options):
        (tmp_path / "plan.csv").write_text(f"image,seed,xmin,ymin,xmax,ymax\n{records[0].image_id},{row}\n")
        run_job(
            pipe, read_plan(tmp_path / "plan.csv", records, phantom, seed=0), tmp_path / "data", settings, **options
        )

    run("1,20,80,40,100")
    run("1,20,80,40,100", resume=True)
    for row, changed in (("2,20,80,40,100", "descriptions"), ("1,20,80,41,100", "masks")):
        with pytest.raises(GBCIError, match=f"holds another job: other {changed};"):
            run(row, resume=True)


def test_blank_cells_are_what_the_command_would_do(read, records):
    (item,) = read("image,finding_birads,report,seed\na,,,\n", overrides={"finding_birads": 5}, report="x")
    (like,) = make_plan(records[:1], variants=1, seed=5, overrides={"finding_birads": 5}, report="x")
    assert content(item) == content(like)
    (item,) = read("image,finding_birads,report,seed\na,3,y,77\n", overrides={"finding_birads": 5}, report="x")
    assert (item.attributes.finding_birads, item.report, item.seed) == (3, "y", 77)


def test_an_image_id_goes_before_a_path_of_that_name(tmp_path):
    """Without suffixes, the path of one file is the image_id of another."""
    paths = (tmp_path / "in" / "001" / "IM1", tmp_path / "in" / "IM1")
    records = [
        ImageRecord(study_id="s", image_id=name, path=path) for name, path in zip(("IM1", "IM1-2"), paths, strict=True)
    ]
    write_plan(make_plan(records, variants=1, seed=5), tmp_path / "plan.csv")
    (tmp_path / "in").mkdir()
    read = read_plan(tmp_path / "plan.csv", records, tmp_path / "in", seed=5)
    assert [item.template.path for item in read] == list(paths)


def test_a_healthy_row_takes_no_grade_from_the_command(read):
    (item,) = read("image,finding_categories\nb,No Finding\n", overrides={"finding_birads": 5})
    assert (item.attributes.finding_birads, item.attributes.breast_birads) == (None, None)


def test_rows_name_images_by_id_or_path_and_count_variants(read):
    items = read("image,variant\na,\ns/b.dicom,\na,\na,7\na,\n")
    assert [(item.template.image_id, item.variant) for item in items] == [
        ("a", 0), ("b", 0), ("a", 1), ("a", 7), ("a", 8),
    ]  # fmt: skip
    assert len({item.image_id for item in items}) == 5


def test_an_input_that_is_a_file_is_its_own_name(records, tmp_path):
    file = tmp_path / "in" / "s" / "b.dicom"
    file.parent.mkdir(parents=True)
    file.touch()
    (tmp_path / "plan.csv").write_text("image\nb.dicom\n")
    (item,) = read_plan(tmp_path / "plan.csv", records[1:], file, seed=0)
    assert item.template is records[1]


@pytest.mark.parametrize(
    "text", ["Mass|Asymmetry", '"Mass, Asymmetry"', "\"['Mass', 'Asymmetry']\"", "Asymmetry | Mass"]
)
def test_categories(read, text):
    (item,) = read(f"image,finding_categories\na,{text}\n")
    assert item.attributes.finding_categories == ("Mass", "Asymmetry")


def test_masks(read, tmp_path):
    (tmp_path / "masks").mkdir()
    Image.fromarray(np.eye(4, dtype=np.uint8)).save(tmp_path / "masks" / "m.png")
    items = read(
        "image,mask,xmin,ymin,xmax,ymax,center_x,center_y,diameter_px,diameter_mm,aspect,tilt\n"
        "a,,1,2,3.5,4,,,,,,\n"
        "a,,,,,,30,40,12,,,\n"
        "a,,,,,,30,40,,7.5,1.5,30\n"
        "a,masks/m.png,,,,,,,,,,\n"
        "a,auto,,,,,,,,,,\n"
    )
    assert [item.mask for item in items[:3]] == [
        BoxMask(box=(1, 2, 3.5, 4), source="plan"),
        EllipseMask(center=(30, 40), diameter=12, unit="px"),
        EllipseMask(center=(30, 40), diameter=7.5, unit="mm", aspect=1.5, tilt=30),
    ]
    assert [item.mask_source for item in items] == ["plan", "plan", "plan", "file", "auto"]
    write_plan(items, tmp_path / "masks" / "again.csv")
    again = read((tmp_path / "masks" / "again.csv").read_text().replace("m.png", "masks/m.png"))
    assert [item.mask.identity() for item in again] == [item.mask.identity() for item in items]


BAD = {
    "no column": ("picture\na\n", "has no column image; expected at least image"),
    "no rows": ("image\n", "has no rows; expected one per synthetic image"),
    "unknown column": ("image,colour\na,gray\n", "column 'colour' is not known; expected out of image, variant, seed"),
    "twice": ("image,seed,seed\na,1,2\n", "has more than one column seed"),
    "short row": ("image,seed\na\n", "line 2 has 1 fields; expected 2"),
    "unknown image": ("image\na\n\nc\n", "line 4: image is 'c'; expected an image_id of INPUT or a path below it"),
    "outside": ("image\n../in/s/a.dicom\n", "line 2: image is '../in/s/a.dicom'; expected an image_id"),
    "category": ("image,finding_categories\na,Lump\n", "line 2: finding_categories is 'Lump'; expected one of Mass"),
    "birads": ("image,finding_birads\na,7\n", "line 2: finding_birads is 7; expected one of 1, 2, 3, 4, 5"),
    "seed": ("image,seed\na,-1\n", "line 2: seed is '-1'; expected a whole number from 0 to 9223372036854775807"),
    "large seed": ("image,seed\na,9223372036854775808\n", "seed is '9223372036854775808'; expected a whole number"),
    "index": ("image,index\na,-1\n", "line 2: index is '-1'; expected a whole number from 0 to 2147483646"),
    "large index": ("image,index\na,2147483647\n", "line 2: index is '2147483647'; expected a whole number from 0 to"),
    "index twice": ("image,index\na,3\n\nb,3\n", "line 4: index is 3, as in line 2; expected every index once"),
    "a row of that number": ("image,index\na,1\nb,\n", "line 3: index is 1, as in line 2; expected every index once"),
    "variant": ("image,variant\na,1.5\n", "line 2: variant is '1.5'; expected a whole number from 0 to"),
    "half a box": ("image,xmin,ymin,xmax,ymax\na,1,2,,4\n", r"line 2: the box is \(1, 2, , 4\); expected numbers"),
    "no box": ("image,xmin\na,1\n", r"line 2: the box is \(1, , , \); expected numbers with xmin < xmax"),
    "turned box": (
        "image,xmin,ymin,xmax,ymax\na,9,2,3,4\n",
        r"the box is \(9, 2, 3, 4\); expected numbers",
    ),
    "number": ("image,xmin,ymin,xmax,ymax\na,1,2,nan,4\n", "line 2: xmax is 'nan'; expected a number"),
    "center": (
        "image,center_x,diameter_px\na,1,2\n",
        "line 2: an ellipse has center_x, diameter_px; expected",
    ),
    "two sizes": (
        "image,center_x,center_y,diameter_px,diameter_mm\na,1,2,3,4\n",
        "an ellipse has center_x, center_y, diameter_px, diameter_mm; expected center_x, center_y and one of",
    ),
    "size": ("image,center_x,center_y,diameter_mm\na,1,2,0\n", "diameter_mm is 0; expected a number from 0.01"),
    "aspect": ("image,center_x,center_y,diameter_mm,aspect\na,1,2,3,99\n", "aspect is 99; expected a number from 0.1"),
    "two masks": (
        "image,mask,xmin,ymin,xmax,ymax\na,auto,1,2,3,4\n",
        "line 2: the row has a box and mask 'auto'; expected one of them, or none for an automatic mask",
    ),
    "mask file": ("image,mask\na,absent.png\n", "line 2: .*absent.png cannot be read as a mask image"),
}


@pytest.mark.parametrize(("text", "sentence"), BAD.values(), ids=BAD)
def test_bad_plans(read, text, sentence):
    with pytest.raises(GBCIError, match=rf"plan\.csv.*{sentence}"):
        read(text)


def test_no_plan_and_one_too_many(tmp_path, records):
    with pytest.raises(GBCIError, match=r"absent\.csv does not exist; expected a plan file with the column image"):
        read_plan(tmp_path / "absent.csv", records, tmp_path, seed=0)
    (tmp_path / "plan.csv").write_text("edited")
    with pytest.raises(GBCIError, match=r"plan\.csv exists, and may have been edited; choose another name"):
        write_plan(make_plan(records, variants=1, seed=0), tmp_path / "plan.csv")
    assert (tmp_path / "plan.csv").read_text() == "edited"


def test_names_and_reports_that_are_no_text(tmp_path, records):
    """They are refused before sampling, since no table could hold them."""
    name = tmp_path / os.fsdecode(b"m\xfcsk.png")
    Image.fromarray(np.eye(4, dtype=np.uint8)).save(name)
    plan = make_plan(records, variants=1, seed=0, mask=str(name))
    with pytest.raises(GBCIError, match=r"m\\udcfcsk.png' has a name that is not plain text \(UTF-8\), so no plan"):
        write_plan(plan, tmp_path / "plan.csv")
    assert not (tmp_path / "plan.csv").exists()
    with pytest.raises(GBCIError, match=r"report is 'r\\udcfcnd'; expected plain text \(UTF-8\)"):
        make_plan(records, variants=1, seed=0, report=os.fsdecode(b"r\xfcnd"))


@pytest.mark.parametrize(
    ("cells", "sentence"),
    [
        (
            "center_x,center_y,diameter_px\n{id},900,80,20",
            r"center \(900, 80\) lies outside the image of 160x192",
        ),
        ("center_x,center_y,diameter_px\n{id},159,1,3", "the mask lies outside the breast; expected it to overlap"),
        ("xmin,ymin,xmax,ymax\n{id},300,10,310,20", "lies outside the image of 160 x 192 pixels"),
    ],
)
def test_a_lesion_beside_the_breast_names_the_image(pipe, make_job, phantom, tmp_path, cells, sentence):
    record = next(record for record in VinDr(phantom).images if record.laterality == "L")
    (tmp_path / "plan.csv").write_text("image," + cells.format(id=record.image_id) + "\n")
    plan = read_plan(tmp_path / "plan.csv", [record], phantom, seed=0)
    with pytest.raises(GBCIError, match=rf"{record.image_id}.*{sentence}"):
        run_job(pipe, plan, tmp_path / "data", JobSettings(seed=0, sampler=make_job.sampler))
    assert not (tmp_path / "data").exists()
