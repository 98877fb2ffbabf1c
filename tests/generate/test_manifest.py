"""The annotation tables, read back by the VinDr-Mammo reader."""

import csv
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from pydicom import dcmread

from gbci_fast.data.attributes import Attributes
from gbci_fast.data.fields import lesion_truth
from gbci_fast.data.preprocess import box_ellipse
from gbci_fast.data.vindr import VinDr
from gbci_fast.errors import GBCIError
from gbci_fast.generate.job import run_job
from gbci_fast.generate.masks import BoxMask
from gbci_fast.generate.plan import make_plan
from gbci_fast.generate.settings import JobSettings


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
        assert image.extra.get("report") == (None if own else "painted")  # or it would count for them, too
        for finding, original in zip(own, template.findings, strict=True):
            assert finding.report(image) == original.report(template) is not None
            assert finding.extra["pathology"] == original.extra["pathology"]
            assert (painted.extra["source"], finding.extra["source"]) == ("synthetic", "template")
            kept += 1
    assert kept == 2


@pytest.mark.parametrize("overrides", [{}, {"finding_categories": "No Finding"}])
def test_the_mask_is_that_of_what_was_painted_alone(make_job, phantom, tmp_path, overrides):
    """A lesion of the template that it touches keeps its whole extent."""
    (source, *_) = [record for record in VinDr(phantom).images if record.findings]
    (finding,) = source.findings
    xmin, ymin, xmax, ymax = finding.box
    corner = BoxMask(box=(xmin, ymin, xmin + (xmax - xmin) / 3, ymin + (ymax - ymin) / 3))
    (item,) = make_plan([source], variants=1, seed=0, overrides=overrides)
    run_job(
        make_job.pipe, [replace(item, mask=corner)], tmp_path / "data", JobSettings(seed=0, sampler=make_job.sampler)
    )
    image = only_image(tmp_path / "data")
    *painted, kept = lesion_truth(image, tmp_path / "data", image.read().shape)
    assert [each.sum() < kept.sum() for each in painted] == [True] * (not overrides)
    np.testing.assert_array_equal(kept, box_ellipse(finding.box, kept.shape))


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
