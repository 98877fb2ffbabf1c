"""The written files: true to their template outside the mask, valid, and honest about their origin."""

import shutil
import subprocess

import numpy as np
import pytest
from PIL import Image
from pydicom import dcmread

from gbci_fast.data.vindr import VinDr, find_inputs
from gbci_fast.dicom.reading import read_mammogram
from gbci_fast.generate.settings import SamplerSettings
from gbci_fast.generate.sinks import png

DICOM_TEMPLATES = ("full_LCC", "inverted_LCC", "windowed_LCC")
PNG_TEMPLATES = ("eight_LCC", "twelve_LCC", "sixteen_LCC")


@pytest.fixture(scope="module")
def written(make_job, templates, tmp_path_factory):
    """By template: its reading, the mask, and the paths of its synthetic DICOM and PNG."""
    output = tmp_path_factory.mktemp("written") / "data"
    plan = make_job(templates, output, settings={"compression": "jpeg2000"})
    files = {}
    for item in plan:
        stem = output / "images" / item.study_id / item.image_id
        mask = np.asarray(Image.open(output / "masks" / item.study_id / f"{item.image_id}.png")) == 255
        template = read_mammogram(item.template.path)
        files[item.template.image_id] = (template, mask, stem.with_suffix(".dicom"), stem.with_suffix(".png"))
    return files


@pytest.mark.parametrize("name", DICOM_TEMPLATES)
def test_dicom_is_the_template_outside_the_mask(written, name):
    template, mask, path, _ = written[name]
    synthetic = read_mammogram(path)
    assert synthetic.stored.dtype == template.stored.dtype
    assert synthetic.spacing == template.spacing == (0.5, 0.25)
    np.testing.assert_array_equal(synthetic.stored[~mask], template.stored[~mask])
    assert (synthetic.stored[mask] != template.stored[mask]).mean() > 0.5
    for keyword in ("PhotometricInterpretation", "BitsStored", "HighBit", "Rows", "Columns", "PixelRepresentation"):
        assert synthetic.dataset[keyword].value == template.dataset[keyword].value, keyword
    # Written lossless; what is unchanged also looks unchanged.
    np.testing.assert_array_equal(synthetic.unit()[~mask], template.unit()[~mask])


@pytest.mark.parametrize("name", DICOM_TEMPLATES)
def test_png_of_a_dicom_is_what_it_displays(written, name):
    _, _, dicom_path, png_path = written[name]
    pixels = np.asarray(Image.open(png_path))
    assert pixels.dtype == np.uint16
    np.testing.assert_allclose(pixels / 65535, read_mammogram(dicom_path).unit(), atol=0.51 / 65535)


@pytest.mark.parametrize(("name", "factor"), [("eight_LCC", 257), ("twelve_LCC", 1), ("sixteen_LCC", 1)])
def test_png_of_a_png_keeps_its_values_outside_the_mask(written, name, factor):
    template, mask, _, path = written[name]
    pixels = np.asarray(Image.open(path))
    assert (pixels.dtype, pixels.shape) == (np.uint16, template.shape)
    np.testing.assert_array_equal(pixels[~mask], template.stored[~mask].astype(np.uint16) * factor)
    assert (pixels[mask] != template.stored[mask].astype(np.uint16) * factor).mean() > 0.5


@pytest.mark.parametrize("name", PNG_TEMPLATES)
def test_dicom_of_a_png_displays_the_png(written, name):
    template, mask, path, _ = written[name]
    synthetic = read_mammogram(path)
    assert synthetic.stored.dtype == template.stored.dtype
    np.testing.assert_array_equal(synthetic.stored[~mask], template.stored[~mask])
    np.testing.assert_allclose(synthetic.unit()[~mask], template.unit()[~mask], atol=1e-6)
    assert "SourceImageSequence" not in synthetic.dataset
    assert "Pixel spacing unknown; 0.05 mm assumed" in synthetic.dataset.DerivationDescription


def test_provenance(make_job, templates, written, tmp_path):
    template, _, path, _ = written["full_LCC"]
    dataset = dcmread(path)
    (source,) = dataset.SourceImageSequence
    assert source.ReferencedSOPInstanceUID != template.dataset.SOPInstanceUID
    assert source.ReferencedSOPClassUID == template.dataset.SOPClassUID
    assert dataset.SyntheticData == "YES"
    assert dataset.ContributingEquipmentSequence[0].Manufacturer == "gbci_fast"
    (item,) = (item for item in make_job(templates, tmp_path / "data") if item.template.image_id == "full_LCC")
    assert dataset.DerivationDescription == (
        f"Synthetic lesion (Mass) by latent diffusion (weights abababababab, seed {item.seed}); "
        "research data, not for diagnosis."
    )
    assert dataset.SOPInstanceUID != template.dataset.SOPInstanceUID
    assert dataset.PatientID.startswith("SYN-")


def test_identities_follow_the_job_seed(make_job, templates, tmp_path):
    headers = []
    for name, seed in (("a", 0), ("b", 1)):
        make_job(templates / "full_LCC.dcm", tmp_path / name, variants=2, seed=seed, settings={"formats": ("dicom",)})
        headers += [dcmread(image.path, stop_before_pixels=True) for image in VinDr(tmp_path / name).images]
    for keyword in ("SOPInstanceUID", "SeriesInstanceUID", "StudyInstanceUID", "PatientID"):
        assert len({header[keyword].value for header in headers}) == 4, keyword
    assert len({header.StudyDate for header in headers}) > 1


def test_other_patients_under_the_same_names_have_other_identities(make_job, templates, tmp_path):
    headers, patients = [], set()
    for patient in ("one", "two"):
        dataset = dcmread(templates / "full_LCC.dcm")
        dataset.PatientID = f"P-{patient}"
        (tmp_path / patient / "mammo").mkdir(parents=True)
        dataset.save_as(tmp_path / patient / "mammo" / "LCC.dcm")
        make_job(tmp_path / patient / "mammo", tmp_path / f"{patient} out", settings={"formats": ("dicom",)})
        (image,) = VinDr(tmp_path / f"{patient} out").images
        headers.append(dcmread(image.path, stop_before_pixels=True))
        patients.add(image.patient)
    for keyword in ("SOPInstanceUID", "SeriesInstanceUID", "StudyInstanceUID", "PatientID"):
        assert len({header[keyword].value for header in headers}) == 2, keyword
    assert len(patients) == 2


def test_other_pixels_have_another_instance_uid(make_job, templates, tmp_path):
    uids = []
    for name, scale in (("a", 1.0), ("b", 2.0)):
        sampler = SamplerSettings(num_inference_steps=1, guidance_scale=scale)
        settings = {"formats": ("dicom",), "sampler": sampler}
        make_job(templates / "full_LCC.dcm", tmp_path / name, settings=settings)
        (image,) = VinDr(tmp_path / name).images
        uids.append(image.read().dataset.SOPInstanceUID)
    assert len(set(uids)) == 2


@pytest.mark.parametrize("name", ["full_LCC", "eight_LCC", "sixteen_LCC", "twelve_LCC"])
def test_a_dark_image_is_read_back_as_dark_as_it_was(written, tmp_path, name):
    """Without the chunk sBIT of a PNG of display values, its brightest pixel would be taken for white."""
    stated = name != "twelve_LCC"  # which keeps its own scale
    _, _, _, path = written[name]
    assert (b"sBIT" in path.read_bytes()[:64]) is stated
    dark = np.full((8, 8), 20000, np.uint16)
    dark[0] = 0
    (tmp_path / "dark.png").write_bytes(png.encode_png(dark, full_scale=stated))
    mammogram = read_mammogram(tmp_path / "dark.png")
    assert mammogram.unit().max() == pytest.approx(20000 / (65535 if stated else 32767), abs=1e-6)
    assert bool(mammogram.notes) is not stated


def test_a_template_without_identity_has_no_source(make_job, templates, tmp_path):
    dataset = dcmread(templates / "full_LCC.dcm")
    dataset.SOPInstanceUID = ""
    dataset.save_as(tmp_path / "nameless_LCC.dcm")
    make_job(tmp_path / "nameless_LCC.dcm", tmp_path / "data")
    (image,) = VinDr(tmp_path / "data").images
    assert "SourceImageSequence" not in image.read().dataset


@pytest.mark.skipif(shutil.which("dciodvfy") is None, reason="dciodvfy (dicom3tools) is not installed")
def test_both_views_and_sides_are_valid_for_dciodvfy(finished, written):
    images = VinDr(finished).images
    assert {(image.view_position, image.laterality) for image in images} == {
        ("CC", "L"), ("CC", "R"), ("MLO", "L"), ("MLO", "R"),
    }  # fmt: skip
    for path in (*(image.path for image in images), *(path for _, _, path, _ in written.values())):
        result = subprocess.run(["dciodvfy", path], capture_output=True, text=True, check=False)
        errors = [line for line in (result.stdout + result.stderr).splitlines() if line.startswith("Error")]
        # dicom3tools predates SyntheticData, of DICOM 2024b.
        assert len(errors) == 1, (path, errors)
        assert "(0x0008,0x001c)" in errors[0]


def test_inputs_are_never_touched(make_job, templates, tmp_path, tree):
    before = tree(templates)
    assert len(before) == len(find_inputs(templates))
    make_job(templates, tmp_path / "data")
    assert tree(templates) == before
