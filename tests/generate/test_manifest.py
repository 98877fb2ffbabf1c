"""The annotation tables, read back by the VinDr-Mammo reader."""

import csv
import json
import re
import shutil
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from pydicom import dcmread

from gbci_fast.attributes import Attributes
from gbci_fast.data.boxes import box_ellipse
from gbci_fast.data.fields import lesion_truth
from gbci_fast.data.mask_files import read_mask
from gbci_fast.data.vindr import VinDr
from gbci_fast.errors import GBCIError, InputWarning
from gbci_fast.generate.job import run_job
from gbci_fast.generate.manifest import MANIFEST_SCHEMA
from gbci_fast.generate.mask_sources import BoxMask
from gbci_fast.generate.plan import make_plan
from gbci_fast.generate.settings import JobSettings
from gbci_fast.generate.writer import SHARD_FINDINGS
from gbci_fast.model.conditioning import ConditionEncoder
from gbci_fast.model.pipeline import GBCIPipeline


def only_image(output):
    (image,) = VinDr(output).images
    return image


def tables(output):
    for name in ("breast-level_annotations.csv", "finding_annotations.csv"):
        with (output / name).open(newline="") as file:
            yield list(csv.DictReader(file))


def test_the_painted_lesion_and_the_templates_own(finished, phantom):
    originals = {record.image_id: record for record in VinDr(phantom).images}
    kept = 0
    for image in VinDr(finished).images:
        template = originals[image.extra["template_image_id"]]
        painted, *own = image.findings
        mask = np.asarray(Image.open(finished / "masks" / image.study_id / f"{image.image_id}.png")) == 255
        ys, xs = np.nonzero(mask)
        inside = (xs.min(), ys.min(), -xs.max() - 1, -ys.max() - 1)
        assert all(np.array(inside) <= (painted.box[0], painted.box[1], -painted.box[2], -painted.box[3]))
        assert (painted.attributes.finding_categories, painted.attributes.finding_birads) == (("Mass",), 4)
        assert [finding.box for finding in own] == [finding.box for finding in template.findings]
        assert [finding.attributes.finding_birads for finding in own] == [3] * len(own)
        assert image.attributes.breast_birads == 4
        assert image.attributes.breast_density == template.attributes.breast_density
        assert (image.laterality, image.view_position) == (template.laterality, template.view_position)
        assert (image.split, image.extra["source"]) == (template.split, "synthetic")
        assert (image.height, image.width) == image.read().shape
        assert image.patient == template.patient  # a split by patients keeps variants of one breast together
        kept += len(own)
    assert kept == 2


def test_the_templates_own_lesions_keep_their_reports_and_pathology(make_job, phantom, tmp_path):
    make_job(phantom, tmp_path / "data", report="painted")
    originals = {record.image_id: record for record in VinDr(phantom).images}
    kept = 0
    for image in VinDr(tmp_path / "data").images:
        template = originals[image.extra["template_image_id"]]
        painted, *own = image.findings
        assert (painted.extra["report"], painted.extra.get("pathology")) == ("painted", None)
        assert image.extra.get("report") == (None if own else "painted")  # it would count for `own`, too
        for finding, original in zip(own, template.findings, strict=True):
            assert finding.report(image) == original.report(template) is not None
            assert finding.extra["pathology"] == original.extra["pathology"]
            assert (painted.extra["source"], finding.extra["source"]) == ("synthetic", "template")
            kept += 1
    assert kept == 2


def test_shape_margin_pathology_and_subtlety_are_in_every_table(make_job, phantom, tmp_path):
    """Of the painted lesion and of the template's own; the reader takes them back."""
    told = {"shape": "irregular", "margin": "spiculated", "pathology": "malignant", "subtlety": 3}
    formats = {"formats": ("png", "webdataset")}
    make_job(phantom, tmp_path / "data", overrides=told, report="round mass with obscured margins", settings=formats)
    originals = {record.image_id: record for record in VinDr(phantom).images}
    kept = 0
    for image in VinDr(tmp_path / "data").images:
        painted, *own = image.findings
        assert {name: getattr(painted.attributes, name) for name in told} == told
        for finding, original in zip(own, originals[image.extra["template_image_id"]].findings, strict=True):
            assert {name: getattr(finding.attributes, name) for name in told} == {
                name: getattr(original.attributes, name) for name in told
            }
            assert None not in (original.attributes.shape, original.attributes.margin)
            kept += 1
    assert kept == 2
    manifest = pq.read_table(tmp_path / "data" / "manifest.parquet").to_pylist()
    with tarfile.open(tmp_path / "data" / "shards" / "000000.tar") as tar:
        members = [tar.extractfile(name).read() for name in tar.getnames() if name.endswith(".json")]
    for row in [*manifest, *map(json.loads, members)]:
        assert {name: row[name] for name in told} == told
        assert told.items() <= json.loads(row["attributes"]).items()
        assert row["ignored_attributes"] == ""


def test_unknown_attributes_have_blank_cells(finished):
    for row in pq.read_table(finished / "manifest.parquet").to_pylist():
        assert [row[name] for name in ("shape", "margin", "pathology", "subtlety")] == ["", "", "", 0]
    painted = [row for row in list(tables(finished))[1] if row["source"] == "synthetic"]
    assert {(row["shape"], row["margin"], row["pathology"], row["subtlety"]) for row in painted} == {("", "", "", "")}


def test_the_manifest_says_what_the_checkpoint_does_not_know(make_job, phantom, tmp_path, recwarn):
    """Attributes of tables are left out without a warning."""
    encoder = ConditionEncoder(image_size=224, width=64, depth=1, report_depth=1, pooled_dim=64).eval()
    pipe = GBCIPipeline(**{**make_job.pipe.components, "conditioner": encoder})
    pipe.set_progress_bar_config(disable=True)
    make_job(phantom, tmp_path / "told", pipe=pipe, overrides={"margin": "spiculated"})
    make_job(phantom, tmp_path / "plain", pipe=pipe)
    told, plain = (pq.read_table(tmp_path / name / "manifest.parquet").to_pylist() for name in ("told", "plain"))
    assert {row["ignored_attributes"] for row in told} == {"shape,margin,pathology,subtlety"}
    assert [row["png_sha256"] for row in told] == [row["png_sha256"] for row in plain]
    assert not [each for each in recwarn if issubclass(each.category, InputWarning)]


@pytest.mark.parametrize("overrides", [{}, {"finding_categories": "No Finding"}])
def test_the_mask_is_that_of_what_was_painted_alone(make_job, phantom, tmp_path, overrides):
    """A lesion of the template that it touches keeps its whole extent."""
    (source, *_) = [record for record in VinDr(phantom).images if record.findings]
    (finding,) = source.findings
    xmin, ymin, xmax, ymax = finding.box
    corner = BoxMask(box=(xmin, ymin, xmin + (xmax - xmin) / 3, ymin + (ymax - ymin) / 3))
    plan = make_plan([source], variants=1, seed=0, overrides=overrides).mapped(lambda item: replace(item, mask=corner))
    run_job(make_job.pipe, plan, tmp_path / "data", JobSettings(seed=0, sampler=make_job.sampler))
    image = only_image(tmp_path / "data")
    *painted, kept = lesion_truth(image, tmp_path / "data", image.read().shape)
    assert [each.sum() < kept.sum() for each in painted] == [True] * (not overrides)
    (own,) = lesion_truth(source, phantom, kept.shape)
    np.testing.assert_array_equal(kept, own)


def box_of(mask):
    ys, xs = np.nonzero(mask)
    return xs.min(), ys.min(), xs.max() + 1, ys.max() + 1


@pytest.mark.parametrize("options", [{}, {"mask": "annotations"}, {"overrides": {"finding_categories": "No Finding"}}])
def test_every_finding_has_the_mask_of_its_lesion(make_job, phantom, tmp_path, options):
    """The painted one without its rim, the template's as its data set has it; and the reader takes both."""
    make_job(phantom, tmp_path / "data", **options)
    originals = {record.image_id: record for record in VinDr(phantom).images}
    named = {row["mask_file"] for row in list(tables(tmp_path / "data"))[1]} - {""}
    assert named == {path.relative_to(tmp_path / "data").as_posix() for path in tmp_path.glob("data/finding_masks/*/*")}
    sources = []
    for image in VinDr(tmp_path / "data").images:
        shape = (image.height, image.width)
        painted = read_mask(tmp_path / "data" / "masks" / image.study_id / f"{image.image_id}.png")
        template = originals[image.extra["template_image_id"]]
        for number, finding in enumerate(image.findings, 1):
            name = f"finding_masks/{image.study_id}/{image.image_id}-{number}.png"
            assert finding.extra["mask_file"] == name
            mask = read_mask(tmp_path / "data" / name)
            assert box_of(mask) == finding.box
            np.testing.assert_array_equal(lesion_truth(image, tmp_path / "data", shape)[number - 1], mask)
            sources.append(finding.extra["source"])
            if sources[-1] == "synthetic":
                assert (mask <= painted).all()
                assert painted.sum() > 1.3 * mask.sum()
            else:
                np.testing.assert_array_equal(mask, lesion_truth(template, phantom, shape)[0])
    kept, new = (2, 4) if not options else (0, 2) if "mask" in options else (2, 0)
    assert (sources.count("template"), sources.count("synthetic")) == (kept, new)


def test_a_finding_that_has_a_box_alone_gets_no_mask(make_job, phantom, tmp_path):
    root = shutil.copytree(phantom, tmp_path / "root")
    for folder in ("masks", "finding_masks"):
        shutil.rmtree(root / folder)
    make_job(root, tmp_path / "data")
    rows = [row for row in list(tables(tmp_path / "data"))[1] if row["source"] == "template"]
    assert [row["mask_file"] for row in rows] == ["", ""]
    assert len(list(tmp_path.glob("data/finding_masks/*/*"))) == 4
    image = next(image for image in VinDr(tmp_path / "data").images if len(image.findings) == 2)
    shape = (image.height, image.width)
    np.testing.assert_array_equal(
        lesion_truth(image, tmp_path / "data", shape)[1], box_ellipse(image.findings[1].box, shape)
    )


def test_a_damaged_mask_of_a_template_is_named(make_job, phantom, tmp_path):
    root = shutil.copytree(phantom, tmp_path / "root")
    mask = sorted(root.glob("finding_masks/*/*"))[0]
    mask.write_bytes(mask.read_bytes()[:60])
    with pytest.raises(GBCIError, match=f"{mask.name} cannot be read as a mask image"):
        make_job(root, tmp_path / "data")


def test_more_findings_than_a_sample_of_a_shard_holds(make_job, phantom, tmp_path):
    record = next(record for record in VinDr(phantom).images if record.findings)
    crowded = replace(record, findings=record.findings * SHARD_FINDINGS)
    with pytest.raises(GBCIError, match=f"{record.image_id}.* has a mask of finding 17; a sample of a shard holds 16"):
        make_job([crowded], tmp_path / "data", settings={"formats": ("webdataset",)})
    make_job([crowded], tmp_path / "files", settings={"formats": ("png",)})
    assert len(list(tmp_path.glob("files/finding_masks/*/*"))) == 17


@pytest.fixture(scope="module")
def manifests(make_job, phantom, templates, tmp_path_factory):
    """Jobs that have as little as possible in common: the paths of their outputs."""
    folder = tmp_path_factory.mktemp("manifests")
    plain = templates / "full_LCC.dcm"
    make_job(plain, folder / "bare", settings={"formats": ("webdataset",)}, overrides={"finding_categories": "unknown"})
    make_job(phantom, folder / "full", settings={"formats": ("dicom", "webdataset")}, report="round")
    healthy = {"formats": ("png", "webdataset")}
    make_job(plain, folder / "healthy", settings=healthy, overrides={"finding_categories": "No Finding"})
    return sorted(folder.iterdir())


def test_every_manifest_has_the_one_schema(manifests):
    tables = [pq.read_table(output / "manifest.parquet") for output in manifests]
    assert [table.schema for table in tables] == [MANIFEST_SCHEMA] * 3
    assert pa.concat_tables(tables).num_rows == 6
    for table in tables:
        assert all(column.null_count == 0 for column in table.columns)
    assert {report for table in tables for report in table["report"].to_pylist()} == {"", "round"}


def test_every_shards_json_has_the_types_of_the_manifest(manifests):
    """A reader may infer types from the first samples: no value is null or an empty list, whose type is unknown."""
    shards = [shard for output in manifests for shard in output.glob("shards/*.tar")]
    assert len(shards) == 3
    for shard in shards:
        with tarfile.open(shard) as tar:
            told = [json.load(tar.extractfile(name)) for name in tar.getnames() if name.endswith(".json")]
        for row in told:
            found = pa.Table.from_pylist([row]).schema
            assert found.names == MANIFEST_SCHEMA.names
            assert found.types == MANIFEST_SCHEMA.types


def test_the_schema_is_written_down():
    text = (Path(__file__).parents[2] / "docs" / "data.md").read_text()
    section = text.partition("## The manifest")[2].partition("\n## ")[0]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in section.splitlines() if line.startswith("| `")]
    written = {name: kind for names, kind, _ in rows for name in re.findall(r"`(\w+)`", names)}
    assert written == {field.name: str(field.type) for field in MANIFEST_SCHEMA}


def test_a_lesion_that_was_painted_over_loses_its_row(make_job, phantom, tmp_path):
    make_job(phantom, tmp_path / "data", mask="annotations", overrides={"finding_birads": 5})
    originals = {record.image_id: record for record in VinDr(phantom).images}
    images = VinDr(tmp_path / "data").images
    assert len(images) == 2
    for image in images:
        (finding,) = image.findings
        (original,) = originals[image.extra["template_image_id"]].findings
        assert finding.box == original.box
        assert finding.attributes.finding_birads == image.attributes.breast_birads == 5
        assert finding.extra["report"] == original.extra["report"]


@pytest.mark.parametrize(
    ("overrides", "categories", "birads"),
    [
        ({"finding_categories": "Mass,Skin Retraction", "finding_birads": 5}, ("Mass", "Skin Retraction"), 5),
        ({"finding_categories": "unknown"}, None, 4),
        ({"finding_birads": "unknown"}, ("Mass",), None),
    ],
)
def test_what_was_asked_for_stands_in_the_tables(make_job, templates, tmp_path, overrides, categories, birads):
    overrides = {**overrides, "breast_density": "D", "breast_birads": 3, "age": 61}
    make_job(templates / "full_LCC.dcm", tmp_path / "data", overrides=overrides, report='a "round", mass\nin two lines')
    image = only_image(tmp_path / "data")
    (finding,) = image.findings
    assert (finding.attributes.finding_categories, finding.attributes.finding_birads) == (categories, birads)
    assert image.attributes == Attributes(
        laterality="L", view_position="CC", breast_density="D", breast_birads=3, age=61
    )
    assert image.extra["report"] == 'a "round", mass\nin two lines'


def test_what_was_set_to_unknown_is_not_looked_up_in_the_file(make_job, templates, tmp_path):
    dataset = dcmread(templates / "full_LCC.dcm")
    dataset.PatientAge = "055Y"
    dataset.save_as(tmp_path / "aged_LCC.dcm")
    for name, overrides, ages in (("a", {}, [55]), ("b", {"age": "unknown"}, [None])):
        make_job(tmp_path / "aged_LCC.dcm", tmp_path / name, overrides=overrides)
        (image,) = VinDr(tmp_path / name).images
        assert [image.attributes.age] == ages
        assert [image.read().age] == ages


def test_a_view_that_was_set_to_unknown_is_no_dicom(make_job, templates, tmp_path):
    with pytest.raises(GBCIError, match="view is unknown and side L; DICOM needs both"):
        make_job(templates / "full_LCC.dcm", tmp_path / "a", overrides={"view_position": "unknown"})


def test_healthy_tissue_is_no_finding(make_job, templates, tmp_path):
    make_job(templates / "full_LCC.dcm", tmp_path / "data", overrides={"finding_categories": "No Finding"})
    image = only_image(tmp_path / "data")
    assert image.findings == ()
    assert image.attributes.finding_categories == ()
    assert image.attributes.breast_birads is None
    _, (row,) = tables(tmp_path / "data")
    assert (row["finding_categories"], row["finding_birads"], row["xmin"]) == ("['No Finding']", "", "")


@pytest.mark.parametrize(("name", "spacing"), [("full_LCC.dcm", "0.5"), ("sixteen_LCC.png", "")])
def test_only_a_stated_spacing_stands_in_the_tables(make_job, templates, tmp_path, name, spacing):
    make_job(templates / name, tmp_path / "data")
    for (row,) in tables(tmp_path / "data"):
        assert row["spacing_mm"] == spacing
