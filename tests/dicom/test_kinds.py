"""Which objects count as mammograms by their headers, and how every other kind of object is refused."""

import numpy as np
import pydicom
import pytest
from pydicom import Dataset
from pydicom.dataset import FileMetaDataset
from pydicom.uid import (
    BasicTextSRStorage,
    BreastProjectionXRayImageStorageForPresentation,
    ComputedRadiographyImageStorage,
    CTImageStorage,
    DigitalXRayImageStorageForPresentation,
    EncapsulatedPDFStorage,
    ExplicitVRLittleEndian,
    GrayscaleSoftcopyPresentationStateStorage,
    MediaStorageDirectoryStorage,
    MRImageStorage,
    SecondaryCaptureImageStorage,
    UltrasoundImageStorage,
)

from gbci_fast.dicom.reading import read_header, read_mammogram
from gbci_fast.errors import GBCIError

CR, DX, SC = ComputedRadiographyImageStorage, DigitalXRayImageStorageForPresentation, SecondaryCaptureImageStorage
UNSTATED = "neither Modality MG nor a body part is stated: taken as a mammogram"


def region(code, meaning):
    item = Dataset()
    item.CodeValue, item.CodingSchemeDesignator, item.CodeMeaning = code, "SCT", meaning
    return [item]


def sentence(path):
    """The reason why `path` is refused, checked to be the same with and without reading the pixels."""
    with pytest.raises(GBCIError) as header:
        read_header(path)
    with pytest.raises(GBCIError) as whole:
        read_mammogram(path)
    assert str(header.value) == str(whole.value)
    return str(whole.value).removeprefix(f"{path}: ")


@pytest.mark.parametrize(
    ("tags", "reason"),
    [
        ({"SOPClassUID": CTImageStorage, "Modality": "CT"}, "an object of another kind (CT Image Storage); expected"),
        ({"SOPClassUID": MRImageStorage, "BodyPartExamined": "BREAST"}, "an object of another kind (MR Image Storage)"),
        ({"SOPClassUID": UltrasoundImageStorage}, "an object of another kind (Ultrasound Image Storage)"),
        ({"SOPClassUID": SC, "Modality": "US", "BodyPartExamined": "BREAST"}, "Modality is US; expected a mammogram"),
        ({"SOPClassUID": "1.2.3.4", "Modality": "PT"}, "Modality is PT; expected a mammogram"),
        (
            {"SOPClassUID": CR, "Modality": "CR", "BodyPartExamined": "CHEST", "ViewPosition": "CC"},
            "Modality is CR and BodyPartExamined CHEST; expected a breast",
        ),
        (
            {"SOPClassUID": SC, "Modality": None, "BodyPartExamined": "HAND"},
            "Modality is not stated and BodyPartExamined HAND; expected a breast",
        ),
        (
            {"SOPClassUID": CR, "Modality": "CR", "ViewPosition": "AP"},
            "Modality is CR and neither a body part nor a view says that it is of a breast",
        ),
        (
            {"SOPClassUID": DX, "Modality": "DX"},
            "Modality is DX and neither a body part nor a view says that it is of a breast",
        ),
        (
            {"ImageType": ["ORIGINAL", "PRIMARY", "TOMO_PROJ", "LEFT"]},
            "a part of a tomosynthesis (ImageType TOMO_PROJ); expected a mammogram (2D)",
        ),
        (
            {"SOPClassUID": SC, "Modality": "OT", "ViewPosition": "AP"},
            "Modality is OT and the view AP; expected a breast",
        ),
        (
            {"SOPClassUID": DX, "Modality": "DX", "AnatomicRegionSequence": region("51185008", "Chest")},
            "Modality is DX and AnatomicRegionSequence names another part; expected a breast",
        ),
        # Header text that is not a term of the standard is not quoted.
        (
            {"SOPClassUID": CR, "Modality": "CR", "BodyPartExamined": "JANE DOE 1950"},
            "Modality is CR and BodyPartExamined (not a known term); expected a breast",
        ),
        ({"SOPClassUID": SC, "Modality": "JANE DOE"}, "Modality is (not a known term); expected a mammogram"),
        ({"ImageType": "DERIVED\\PRIMARY\\TOMO"}, "a part of a tomosynthesis (ImageType TOMO)"),
        ({"ImageType": "DERIVED\\PRIMARY\\TOMOSYNTHESIS"}, "a part of a tomosynthesis (ImageType TOMOSYNTHESIS)"),
    ],
    ids=str,
)
def test_other_kinds(make_dicom, ramp, tags, reason):
    assert sentence(make_dicom(ramp, **tags)).startswith(reason)


@pytest.mark.parametrize(
    ("tags", "notes"),
    [
        ({"BodyPartExamined": "BREAST"}, ()),
        ({"SOPClassUID": CR, "Modality": "CR", "BodyPartExamined": "BREAST"}, ()),
        ({"SOPClassUID": CR, "Modality": "CR", "BodyPartExamined": " left breast"}, ()),
        ({"SOPClassUID": CR, "Modality": "CR", "BodyPartExamined": "MAMMO"}, ()),
        ({"SOPClassUID": CR, "Modality": "MG"}, ()),
        ({"SOPClassUID": DX, "Modality": "DX", "ViewPosition": "MLO"}, (UNSTATED,)),
        ({"SOPClassUID": SC, "Modality": "MG", "BodyPartExamined": "BREAST"}, ()),
        ({"SOPClassUID": SC, "Modality": "OT"}, (UNSTATED,)),
        ({"SOPClassUID": SC, "Modality": None}, (UNSTATED,)),
        ({"SOPClassUID": BreastProjectionXRayImageStorageForPresentation, "Modality": None}, ()),
        ({"BodyPartExamined": "SPECIMEN"}, ("BodyPartExamined is SPECIMEN",)),
        ({"BodyPartExamined": "DOE^JANE 1950"}, ("BodyPartExamined is (not a known term)",)),
        ({"Modality": "DR"}, ("Modality is DR, though its SOP class is that of a mammogram",)),
        ({"Modality": "DOE"}, ("Modality is (not a known term), though its SOP class is that of a mammogram",)),
        ({"SOPClassUID": DX, "Modality": "DX", "AnatomicRegionSequence": region("76752008", "Breast")}, ()),
        ({"SOPClassUID": DX, "Modality": "DX", "AnatomicRegionSequence": region("T-04000", "")}, ()),
        ({"SOPClassUID": SC, "Modality": "OT", "AnatomicRegionSequence": region("B-1", "Left breast")}, ()),
        ({"SOPClassUID": CR, "Modality": "CR", "ViewPosition": "ML"}, (UNSTATED,)),
        ({"SOPClassUID": DX, "Modality": "DX", "ViewPosition": "XCCL"}, (UNSTATED,)),
        ({"SOPClassUID": SC, "Modality": "OT", "ViewPosition": "LM"}, (UNSTATED,)),
        ({"ImageType": ["DERIVED", "PRIMARY", "TOMO", "GENERATED_2D"]}, ("computed from a tomosynthesis",)),
        ({"ImageType": ["DERIVED", "PRIMARY", "TOMO_2D", "LEFT"]}, ("computed from a tomosynthesis",)),
        (
            {"ImageType": ["DERIVED", "PRIMARY", "POST_CONTRAST", "SUBTRACTION"]},
            ("taken after a contrast agent", "a subtraction of images"),
        ),
    ],
    ids=str,
)
def test_mammograms(make_dicom, ramp, tags, notes):
    path = make_dicom(ramp, **tags)
    assert read_header(path).shape == ramp.shape
    assert read_mammogram(path).notes == notes


@pytest.mark.parametrize(
    ("sop_class", "name"),
    [
        (BasicTextSRStorage, "Basic Text SR Storage"),
        (EncapsulatedPDFStorage, "Encapsulated PDF Storage"),
        (GrayscaleSoftcopyPresentationStateStorage, "Grayscale Softcopy Presentation State Storage"),
        (MediaStorageDirectoryStorage, "Media Storage Directory Storage"),
    ],
    ids=lambda value: str(value)[-12:],
)
def test_objects_without_pixels(tmp_path, sop_class, name):
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.file_meta.MediaStorageSOPClassUID = sop_class
    dataset.file_meta.MediaStorageSOPInstanceUID = "2.25.1"
    if sop_class != MediaStorageDirectoryStorage:  # a DICOMDIR states it in the file meta information alone
        dataset.SOPClassUID, dataset.SOPInstanceUID = sop_class, "2.25.1"
    dataset.save_as(tmp_path / "object", enforce_file_format=True)
    assert sentence(tmp_path / "object") == f"no pixels ({name}); expected an image"


def test_no_photometric_interpretation(make_dicom, ramp):
    path = make_dicom(ramp, PhotometricInterpretation=None)
    assert sentence(path) == "no PhotometricInterpretation; expected MONOCHROME1 or MONOCHROME2"


@pytest.mark.parametrize("written", [" MONOCHROME1", "  MONOCHROME1 ", "MONOCHROME1\0"])
def test_spaces_around_the_photometric_interpretation(make_dicom, ramp, written):
    """Neither leading nor trailing spaces are significant in a CS (PS3.5 6.2)."""
    window = {"WindowCenter": 2048, "WindowWidth": 4096, "BitsStored": 12}
    path = make_dicom(ramp, **window)
    dataset = pydicom.dcmread(path)
    dataset.PhotometricInterpretation = written
    dataset.save_as(path)
    mammogram = read_mammogram(path)
    np.testing.assert_allclose(mammogram.unit(), 1 - ramp / 4095, atol=1e-6)
    assert mammogram.dataset.PhotometricInterpretation == "MONOCHROME1"


@pytest.mark.parametrize(
    ("keyword", "written", "shown"),
    [
        ("WindowCenter", b"2048,0", "2048,0"),
        ("WindowCenter", b"\\2048 ", "\\\\2048"),
        ("WindowWidth", b"4096,5\\9 ", "4096,5\\\\9"),
        ("ImagerPixelSpacing", b"0,07\\0,07 ", "0,07\\\\0,07"),
        ("ImagerPixelSpacing", b"unknown ", "unknown"),
        ("EstimatedRadiographicMagnificationFactor", b"1,8 ", "1,8"),
        ("RescaleSlope", b"1,0 ", "1,0"),
    ],
)
def test_numbers_that_are_none_are_named(make_dicom, ramp, keyword, written, shown):
    values = {"WindowCenter": 2048, "WindowWidth": 4096, "ImagerPixelSpacing": [1, 1], "RescaleIntercept": 0}
    path = make_dicom(ramp, **values | {keyword: "777777"})
    content = path.read_bytes()
    at = content.index(b"777777") - 2
    path.write_bytes(content[:at] + len(written).to_bytes(2, "little") + written + content[at + 8 :])
    with pytest.raises(GBCIError) as error:
        read_mammogram(path)
    assert str(error.value) == f"{path}: {keyword} is '{shown}'; expected numbers with a decimal point"


def test_a_number_that_nothing_reads_may_be_any_text(make_dicom, ramp):
    path = make_dicom(ramp, KVP="777777")
    path.write_bytes(path.read_bytes().replace(b"777777", b"28,5  "))
    assert read_mammogram(path).shape == ramp.shape
