"""Written mammograms are valid by an independent checker, deterministic, and keep the meaning of their source."""

import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from pathlib import Path

import numpy as np
import pytest
from pydicom import Dataset, dcmread
from pydicom.uid import UID, ExplicitVRBigEndian

from gbci_fast.dicom.reading import read_mammogram
from gbci_fast.dicom.writing import MammogramHeader, SourceImage, mammogram_dataset, uid_from_seed, write_dicom
from gbci_fast.errors import GBCIError

needs_dciodvfy = pytest.mark.skipif(shutil.which("dciodvfy") is None, reason="dciodvfy (dicom3tools) is not installed")


def header(**changes) -> MammogramHeader:
    values = {
        "view_position": "MLO",
        "laterality": "R",
        "study_uid": uid_from_seed(7, "study"),
        "series_uid": uid_from_seed(7, "series"),
        "instance_uid": uid_from_seed(7, "image"),
        "study_datetime": datetime(2001, 2, 3, 4, 5, 6),
        "patient_id": "patient-7",
        "patient_age": 52.0,
        "software_version": "1.2",
        "derivation": "Painted.",
        "spacing": (0.085, 0.07),
        "source": SourceImage(sop_class_uid="1.2.840.10008.5.1.4.1.1.1.2", sop_instance_uid="1.2.3"),
    }
    return MammogramHeader(**values | changes)


def source_header(photometric: str = "MONOCHROME2", bits_stored: int = 12, **elements) -> Dataset:
    dataset = Dataset()
    dataset.PhotometricInterpretation = photometric
    dataset.BitsStored = bits_stored
    dataset.PixelRepresentation = 0
    for keyword, value in elements.items():
        setattr(dataset, keyword, value)
    return dataset


def pixels(bits: int = 12, shape: tuple[int, int] = (41, 37)) -> np.ndarray:
    values = np.random.default_rng(bits).integers(0, 2**bits, shape)
    return values.astype(np.uint8 if bits <= 8 else np.uint16)


@needs_dciodvfy
@pytest.mark.parametrize("bits", [8, 12, 16])
@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
@pytest.mark.parametrize("laterality", ["L", "R"])
@pytest.mark.parametrize("view", ["CC", "MLO"])
def test_valid_for_dciodvfy(tmp_path, view, laterality, photometric, bits):
    dataset = mammogram_dataset(
        pixels(bits), header(view_position=view, laterality=laterality), like=source_header(photometric, bits)
    )
    write_dicom(dataset, tmp_path / "image.dicom")
    errors = dciodvfy_errors(tmp_path / "image.dicom")
    # dicom3tools predates SyntheticData, of DICOM 2024b.
    assert [line for line in errors if "(0x0008,0x001c)" not in line] == []
    assert len(errors) == 1


@needs_dciodvfy
def test_lut_magnification_and_modifiers_are_valid_for_dciodvfy(tmp_path):
    spot, view = Dataset(), Dataset()
    spot.CodeValue = "399055006"
    view.ViewModifierCodeSequence = [spot]
    like = source_header(
        EstimatedRadiographicMagnificationFactor="1.8",
        ViewCodeSequence=[view],
        PixelIntensityRelationship="LIN",
        PixelIntensityRelationshipSign=1,
        WindowCenter=5,
        WindowWidth=2,
    )
    lut = (0, np.arange(4096, dtype=np.uint16)[::-1] * 16)
    dataset = mammogram_dataset(pixels(), header(chest_wall="L"), like=like, lut=lut)
    assert "WindowCenter" not in dataset
    write_dicom(dataset, tmp_path / "image.dicom")
    assert [line for line in dciodvfy_errors(tmp_path / "image.dicom") if "(0x0008,0x001c)" not in line] == []


@needs_dciodvfy
def test_dciodvfy_would_object(tmp_path):
    dataset = mammogram_dataset(pixels(), header())
    del dataset.PatientOrientation
    write_dicom(dataset, tmp_path / "image.dicom")
    assert any("PatientOrientation" in line for line in dciodvfy_errors(tmp_path / "image.dicom"))


def dciodvfy_errors(path) -> list[str]:
    result = subprocess.run(["dciodvfy", path], capture_output=True, text=True, check=False)
    return [line for line in (result.stdout + result.stderr).splitlines() if line.startswith("Error")]


@pytest.mark.parametrize("compression", ["none", "rle", "jpeg2000"])
@pytest.mark.parametrize(
    ("stored", "bits"),
    [
        (pixels(8), 8),
        ((pixels(8).astype(np.int16) - 128).astype(np.int8), 8),
        (pixels(8).astype(np.uint16), 8),
        (pixels(8).astype(np.int16) - 128, 8),
        (pixels(12), 12),
        (pixels(12).astype(np.int16) - 2048, 12),
        (pixels(16), 16),
    ],
    ids=str,
)
def test_pixels_survive(tmp_path, stored, bits, compression):
    path = tmp_path / "image.dicom"
    write_dicom(
        mammogram_dataset(stored, header(), like=source_header(bits_stored=bits)), path, compression=compression
    )
    assert (dcmread(path).BitsStored, dcmread(path).HighBit) == (bits, bits - 1)
    dataset = dcmread(path)
    assert dataset.pixel_array.dtype == stored.dtype
    np.testing.assert_array_equal(dataset.pixel_array, stored)
    assert dataset.file_meta.TransferSyntaxUID.is_compressed == (compression != "none")
    assert dataset.SOPInstanceUID == dataset.file_meta.MediaStorageSOPInstanceUID == header().instance_uid


@pytest.mark.parametrize("compression", ["none", "jpeg2000"])
def test_same_bytes_twice(tmp_path, compression):
    for name in ("a", "b"):
        write_dicom(mammogram_dataset(pixels(), header()), tmp_path / name, compression=compression)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_provenance(tmp_path):
    write_dicom(mammogram_dataset(pixels(), header()), tmp_path / "image.dicom")
    dataset = dcmread(tmp_path / "image.dicom")
    assert dataset.SyntheticData == "YES"
    assert dataset.SourceImageSequence[0].ReferencedSOPInstanceUID == "1.2.3"
    assert dataset.SourceImageSequence[0].PurposeOfReferenceCodeSequence[0].CodeValue == "121322"
    equipment = dataset.ContributingEquipmentSequence[0]
    assert equipment.PurposeOfReferenceCodeSequence[0].CodeValue == "109100"
    assert (equipment.Manufacturer, equipment.SoftwareVersions) == ("gbci_fast", "1.2")
    assert dataset.DerivationDescription == "Painted."
    assert list(dataset.ImagerPixelSpacing) == [0.085, 0.07]
    assert (dataset.PatientID, dataset.PatientAge, dataset.PatientName) == ("patient-7", "052Y", "Anonymous")
    assert (dataset.StudyDate, dataset.StudyTime) == ("20010203", "040506")


def test_not_synthetic():
    assert mammogram_dataset(pixels(), header(synthetic=False)).SyntheticData == "NO"


def test_unknown_spacing_is_said():
    dataset = mammogram_dataset(pixels(), header(spacing=None))
    assert list(dataset.ImagerPixelSpacing) == [0.05, 0.05]
    assert dataset.DerivationDescription == "Painted. Pixel spacing unknown; 0.05 mm assumed."


def test_meaning_of_stored_values_is_kept_and_identity_is_not():
    lut = Dataset()
    lut.LUTDescriptor = [4096, 0, 16]
    lut.LUTData = np.arange(4096, dtype=np.uint16).tobytes()
    like = source_header(
        "MONOCHROME1",
        RescaleSlope="2.5",
        RescaleIntercept="-7",
        WindowCenter=["100", "200"],
        WindowWidth=["50", "60"],
        VOILUTFunction="SIGMOID",
        VOILUTSequence=[lut],
        PixelPaddingValue=4095,
        PixelPaddingRangeLimit=4000,
        PixelSpacing=[0.09, 0.09],
        LossyImageCompression="01",
        PatientName="Doe^Jane",
        PatientBirthDate="19500101",
        InstitutionName="Somewhere",
    )
    dataset = mammogram_dataset(pixels(), header(), like=like, window=(1, 2))
    for keyword in ("PhotometricInterpretation", "BitsStored", "RescaleSlope", "RescaleIntercept", "WindowCenter",
                    "WindowWidth", "VOILUTFunction", "VOILUTSequence", "PixelPaddingValue", "PixelPaddingRangeLimit",
                    "PixelSpacing", "LossyImageCompression"):  # fmt: skip
        assert dataset[keyword].value == like[keyword].value, keyword
    assert (dataset.HighBit, dataset.PresentationLUTShape, dataset.PixelIntensityRelationshipSign) == (11, "INVERSE", 1)
    assert dataset.PatientName == "Anonymous"
    assert dataset.PatientBirthDate == ""
    assert "InstitutionName" not in dataset


@pytest.mark.filterwarnings("ignore:Invalid value for VR CS")
def test_no_text_of_the_source_is_written(tmp_path):
    """LUTs keep descriptor and data, attributes keep defined terms; other text may identify a patient."""

    def spoiled(values: np.ndarray, bits: int) -> Dataset:
        item, deep = Dataset(), Dataset()
        item.LUTDescriptor = [len(values), 0, bits]
        item.LUTData = values.tobytes() + (b"DOE^JANE" if bits == 12 else b"")  # after the last entry
        item.LUTExplanation = item.ModalityLUTType = "DOE^JANE"
        item.PatientName, item.PatientID = "DOE^JANE", "DOE^JANE"
        item.private_block(0x0029, "DOE^JANE", create=True).add_new(1, "LO", "DOE^JANE")
        deep.CodeMeaning = "DOE^JANE"
        item.PurposeOfReferenceCodeSequence = [deep]
        return item

    table = np.arange(4096, dtype=np.uint16)
    like = source_header(
        ModalityLUTSequence=[spoiled(table, 12)],
        VOILUTSequence=[spoiled(np.arange(255, dtype=np.uint8), 8), spoiled(table, 12)],
        PixelSpacing=[0.09, 0.09],
        LossyImageCompressionMethod=["ISO_15444_1", "DOE^JANE"],
        **dict.fromkeys(
            ("WindowCenterWidthExplanation", "PartialViewDescription", "PixelSpacingCalibrationDescription",
             "RescaleType", "VOILUTFunction", "BurnedInAnnotation", "BreastImplantPresent", "PartialView",
             "LossyImageCompression", "PixelIntensityRelationship", "PixelSpacingCalibrationType"), "DOE^JANE"
        ),
    )  # fmt: skip
    like.add_new("LossyImageCompressionRatio", "LO", "DOE^JANE")  # the standard's VR is DS
    write_dicom(mammogram_dataset(pixels(), header(), like=like), tmp_path / "image.dicom")
    assert b"DOE" not in (tmp_path / "image.dicom").read_bytes()
    written = dcmread(tmp_path / "image.dicom")
    (modality,) = written.ModalityLUTSequence
    assert {element.keyword for element in modality} == {"LUTDescriptor", "LUTData", "ModalityLUTType"}
    assert (modality.ModalityLUTType, modality.LUTData) == ("US", table.tobytes())
    (voi,) = written.VOILUTSequence
    assert {element.keyword for element in voi} == {"LUTDescriptor", "LUTData"}
    assert voi.LUTData[:255] == bytes(range(255))
    assert (written.BurnedInAnnotation, written.LossyImageCompressionMethod) == ("YES", "ISO_15444_1")


def test_a_lut_that_is_cut_is_not_copied():
    item = Dataset()
    item.LUTDescriptor, item.LUTData = [4096, 0, 8], (np.arange(4096) // 16).astype("<u2").tobytes()[:5000]
    with pytest.raises(GBCIError, match="a LUT holds 5000 bytes; expected 4096 entries of 8 bits"):
        mammogram_dataset(pixels(), header(), like=source_header(VOILUTSequence=[item]))


@pytest.mark.parametrize("keyword", ["VOILUTSequence", "ModalityLUTSequence"])
def test_of_several_luts_the_one_in_use_is_copied(keyword):
    """Only the first LUT is read; others may lack mandatory attributes."""
    first, second = Dataset(), Dataset()
    first.LUTDescriptor = second.LUTDescriptor = [4096, 0, 16]
    first.LUTData = np.arange(4096, dtype=np.uint16).tobytes()  # the second item has no LUTData
    written = mammogram_dataset(pixels(), header(), like=source_header(**{keyword: [first, second]}))
    (item,) = written[keyword].value
    assert item.LUTData == first.LUTData


@needs_dciodvfy
def test_a_calibrated_spacing_stays_valid_without_the_words_of_the_source(tmp_path):
    like = source_header(
        PixelSpacing=[0.09, 0.09],
        PixelSpacingCalibrationType="GEOMETRY",
        PixelSpacingCalibrationDescription="by DOE^JANE",
        BurnedInAnnotation="NO",
    )
    dataset = mammogram_dataset(pixels(), header(deidentified=True, dates="MODIFIED"), like=like)
    assert dataset.PixelSpacingCalibrationType == "GEOMETRY"
    assert "DOE" not in str(dataset)
    write_dicom(dataset, tmp_path / "image.dicom")
    assert [line for line in dciodvfy_errors(tmp_path / "image.dicom") if "(0x0008,0x001c)" not in line] == []


@pytest.mark.parametrize(
    ("burned_in", "changes", "expected"),
    [
        ("NO", {"deidentified": True, "dates": "MODIFIED"}, ("YES", ["113100", "113107", "113108"])),
        ("NO", {"deidentified": True, "dates": "REMOVED", "patient_age": None}, ("YES", ["113100"])),
        ("YES", {"deidentified": True}, ("NO", [])),
        (None, {"deidentified": True}, ("NO", [])),  # text in the pixels is not ruled out
        ("NO", {"deidentified": False}, ("NO", [])),
        ("NO", {}, (None, [])),  # there is no patient
    ],
)
def test_an_identity_counts_as_removed_only_where_no_text_is_in_the_pixels(burned_in, changes, expected):
    like = source_header() if burned_in is None else source_header(BurnedInAnnotation=burned_in)
    dataset = mammogram_dataset(pixels(), header(**changes), like=like)
    codes = [item.CodeValue for item in dataset.get("DeidentificationMethodCodeSequence", [])]
    assert (dataset.get("PatientIdentityRemoved"), codes) == expected
    assert ("DeidentificationMethod" in dataset) == (expected[0] == "YES")
    assert dataset.get("LongitudinalTemporalInformationModified") == changes.get("dates")


def test_nothing_is_assured_that_nobody_looked_at():
    silent = mammogram_dataset(pixels(), header(), like=source_header())
    assert (silent.BurnedInAnnotation, silent.LossyImageCompression) == ("YES", "00")
    assert "BreastImplantPresent" not in silent
    assert "PartialView" not in silent
    stated = source_header(BurnedInAnnotation="NO", BreastImplantPresent="YES", LossyImageCompression="01")
    kept = mammogram_dataset(pixels(), header(), like=stated)
    assert (kept.BurnedInAnnotation, kept.BreastImplantPresent, kept.LossyImageCompression) == ("NO", "YES", "01")
    # A PNG template is a source without a header: `like` is None, but the image is not from scratch.
    assert mammogram_dataset(pixels(), header(source=None)).BurnedInAnnotation == "YES"
    rendered = mammogram_dataset(pixels(), header(source=None, from_scratch=True))
    assert (rendered.BurnedInAnnotation, rendered.BreastImplantPresent, rendered.PartialView) == ("NO", "NO", "NO")


@pytest.mark.parametrize(("chest_wall", "expected"), [(None, ["P", "FL"]), ("R", ["P", "FL"]), ("L", ["A", "FL"])])
def test_rows_lead_away_from_the_chest_wall_of_the_pixels(chest_wall, expected):
    dataset = mammogram_dataset(pixels(), header(laterality="R", chest_wall=chest_wall))
    assert (dataset.PatientOrientation, dataset.ImageLaterality) == (expected, "R")


def test_chest_wall_on_another_side_is_refused():
    with pytest.raises(GBCIError, match="chest_wall is 'left'; expected L, R or None"):
        header(chest_wall="left")


def test_magnification_and_view_modifiers_are_kept():
    magnified, spot = Dataset(), Dataset()
    magnified.CodeValue, spot.CodeValue = "R-102D6", "399055006"
    view = Dataset()
    view.ViewModifierCodeSequence = [magnified, spot]
    like = source_header(EstimatedRadiographicMagnificationFactor="1.8", ViewCodeSequence=[view])
    dataset = mammogram_dataset(pixels(), header(spacing=(0.05, 0.04)), like=like)
    assert list(dataset.ImagerPixelSpacing) == [pytest.approx(0.09), pytest.approx(0.072)]
    assert dataset.EstimatedRadiographicMagnificationFactor == 1.8
    modifiers = dataset.ViewCodeSequence[0].ViewModifierCodeSequence
    assert [(item.CodeValue, item.CodingSchemeDesignator) for item in modifiers] == [
        ("399163009", "SCT"),
        ("399055006", "SCT"),
    ]


def test_pixel_intensity_relationship_is_kept_where_it_is_legal():
    stated = source_header("MONOCHROME1", PixelIntensityRelationship="LIN", PixelIntensityRelationshipSign=1)
    dataset = mammogram_dataset(pixels(), header(), like=stated)
    assert (dataset.PixelIntensityRelationship, dataset.PixelIntensityRelationshipSign) == ("LIN", 1)
    other = source_header(PixelIntensityRelationship="DISP", PixelIntensityRelationshipSign=0)
    dataset = mammogram_dataset(pixels(), header(), like=other)
    assert (dataset.PixelIntensityRelationship, dataset.PixelIntensityRelationshipSign) == ("LOG", -1)


def test_a_table_of_a_big_endian_file_is_written_in_this_order(make_dicom, tmp_path):
    """pydicom keeps OW values in the byte order of the file."""
    lut = Dataset()
    lut.LUTDescriptor = [4096, 0, 16]
    lut.add_new("LUTData", "OW", (65535 - np.arange(4096) * 16).astype(">u2").tobytes())
    path = make_dicom(
        np.arange(4096, dtype=np.uint16).reshape(64, 64), syntax=ExplicitVRBigEndian, VOILUTSequence=[lut]
    )
    source = read_mammogram(path)
    write_dicom(mammogram_dataset(source.stored, header(), like=source.dataset), tmp_path / "copy.dcm")
    np.testing.assert_array_equal(read_mammogram(tmp_path / "copy.dcm").unit(), source.unit())


def test_modality_lut_replaces_the_rescale(tmp_path):
    lut = Dataset()
    lut.LUTDescriptor = [4096, 0, 12]
    lut.ModalityLUTType = "US"
    lut.LUTData = np.arange(4096, dtype=np.uint16)[::-1].tobytes()
    write_dicom(mammogram_dataset(pixels(), header(), like=source_header(ModalityLUTSequence=[lut])), tmp_path / "a")
    dataset = dcmread(tmp_path / "a")
    assert dataset.ModalityLUTSequence[0].LUTData == lut.LUTData
    assert "RescaleSlope" not in dataset
    assert (dataset.WindowCenter, dataset.WindowWidth) == (2048, 4096)


@pytest.mark.parametrize(
    ("stored", "like", "window", "expected"),
    [
        (pixels(16), None, None, (32768, 65536)),
        (pixels(8), None, None, (128, 256)),
        (pixels(12).astype(np.int16), None, None, (0, 65536)),
        (pixels(12), source_header(), None, (2048, 4096)),
        (pixels(12), source_header(RescaleSlope=-2, RescaleIntercept=10), None, (-4084.5, 8191)),
        (pixels(12), source_header(WindowCenter=None, WindowWidth=None), (300.25, 20.5), (300.25, 20.5)),
    ],
)
def test_window(stored, like, window, expected):
    dataset = mammogram_dataset(stored, header(), like=like, window=window)
    assert (dataset.WindowCenter, dataset.WindowWidth) == expected


@pytest.mark.parametrize(("view", "side"), [("ML", "L"), (None, "L"), ("CC", None), ("CC", "B")])
def test_unknown_view_or_side_is_refused(view, side):
    with pytest.raises(GBCIError, match="needs view CC or MLO and side L or R"):
        header(view_position=view, laterality=side)


def test_values_beyond_the_source_bits_are_refused():
    with pytest.raises(GBCIError, match="expected 0 to 4095 for 12 bits"):
        mammogram_dataset(np.full((2, 2), 4096, np.uint16), header(), like=source_header())


@pytest.mark.parametrize("stored", [np.zeros((2, 2), np.float32), np.zeros((1, 2, 2), np.uint16)])
def test_pixels_of_another_type_are_refused(stored):
    with pytest.raises(GBCIError, match="expected \\[H, W\\] uint8, uint16, int8 or int16"):
        mammogram_dataset(stored, header())


def test_long_derivation_is_refused():
    with pytest.raises(GBCIError, match="at most 1024"):
        header(derivation="x" * 1025)


def test_unknown_compression_is_refused(tmp_path):
    with pytest.raises(GBCIError, match="expected one of none, rle, jpeg2000"):
        write_dicom(mammogram_dataset(pixels(), header()), tmp_path / "a", compression="jpeg")


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "image.dicom"
    path.write_bytes(b"old")

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write_dicom(mammogram_dataset(pixels(), header()), path)
    assert [p.name for p in tmp_path.iterdir()] == ["image.dicom"]
    assert path.read_bytes() == b"old"


def test_uid_from_seed():
    uid = uid_from_seed(1, "a")
    assert uid == uid_from_seed(1, "a") == uid_from_seed(np.int64(1), "a")
    assert len({uid, uid_from_seed(1, "b"), uid_from_seed("1a"), uid_from_seed("1", "a", "")}) == 4
    assert UID(uid).is_valid
    assert uid.startswith("2.25.")


def test_several_threads_may_write(tmp_path):
    """OpenJPEG's wrapper crashes when two threads use it at once."""
    stored = [np.random.default_rng(i).integers(0, 2**16, (96, 64)).astype(np.uint16) for i in range(4)]

    def write(i):
        for k in range(25):
            path = tmp_path / f"{i}-{k}.dcm"
            write_dicom(mammogram_dataset(stored[i], header()), path, compression="jpeg2000")
            np.testing.assert_array_equal(read_mammogram(path).stored, stored[i])

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(write, range(4)))
