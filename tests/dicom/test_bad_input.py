"""Every kind of bad file raises one sentence that names the file and its fault."""

import os
import re
import struct
import warnings

import numpy as np
import pydicom
import pytest
from PIL import Image
from pydicom import Dataset
from pydicom.encaps import encapsulate, generate_frames
from pydicom.pixels import get_decoder
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGLosslessSV1,
    RLELossless,
)

from gbci_fast.data.mask_files import read_mask
from gbci_fast.dicom.reading import read_mammogram
from gbci_fast.errors import GBCIError

WINDOW = {"WindowCenter": 2048, "WindowWidth": 4096}


def sentence(path):
    """The message of the error that reading `path` raises, checked for its form, without the file's name."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(GBCIError) as caught:
            read_mammogram(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    return message.removeprefix(f"{path}: ")


def lut(descriptor, data):
    item = Dataset()
    item.add_new("LUTDescriptor", "US", descriptor)
    item.add_new("LUTData", "US", data)
    return [item]


def words(descriptor, count):
    """A LUT of `count` words, 0, 256, 512, …: in bytes 0, 0, 0, 1, 0, 2, …"""
    item = Dataset()
    item.add_new("LUTDescriptor", "US", descriptor)
    item.add_new("LUTData", "OW", (256 * np.arange(count)).astype("<u2").tobytes())
    return [item]


# Not a mammogram at all ---------------------------------------------------------------------------------------------


def test_absent_file(tmp_path):
    assert sentence(tmp_path / "absent.dcm") == "No such file or directory; expected a readable DICOM or PNG file"


def test_directory(tmp_path):
    assert sentence(tmp_path) == "Is a directory; expected a readable DICOM or PNG file"


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "an empty file"),
        (b"GIF89a" + bytes(200), "neither DICOM nor PNG by its content"),
        (bytes(132), "neither DICOM nor PNG by its content"),
        (b"x", "neither DICOM nor PNG by its content"),
    ],
)
def test_other_content(tmp_path, content, reason):
    (tmp_path / "image.dcm").write_bytes(content)
    assert sentence(tmp_path / "image.dcm") == f"{reason}; expected a DICOM or PNG file"


def test_preamble_without_a_data_set(tmp_path):
    (tmp_path / "image.dcm").write_bytes(bytes(128) + b"DICM")
    assert sentence(tmp_path / "image.dcm").startswith("no PixelData")


# Headers ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tags", "reason"),
    [
        ({"PixelData": None}, "no PixelData, or cut short before its end; expected an image"),
        ({"PixelData": b""}, "no PixelData, or cut short before its end; expected an image"),
        ({"NumberOfFrames": 3}, "3 frames; expected a single image"),
        (
            {"SamplesPerPixel": 3, "PhotometricInterpretation": "RGB"},
            "a color image (RGB, 3 samples per pixel); expected MONOCHROME1 or MONOCHROME2",
        ),
        (
            {"PhotometricInterpretation": "PALETTE COLOR"},
            "a color image (PALETTE COLOR, 1 samples per pixel); expected MONOCHROME1 or MONOCHROME2",
        ),
        ({"Rows": 0}, "the header claims 32 x 0 pixels; expected 1 to 150000000 in all"),
        ({"Rows": None}, "the header claims 32 x None pixels; expected 1 to 150000000 in all"),
        ({"Rows": 60000, "Columns": 60000}, "the header claims 60000 x 60000 pixels; expected 1 to 150000000 in all"),
        ({"BitsStored": 4}, "BitsAllocated, BitsStored and HighBit are 16, 4 and 3; expected"),
        ({"BitsStored": 12, "HighBit": 10}, "BitsAllocated, BitsStored and HighBit are 16, 12 and 10; expected"),
        ({"BitsStored": 12, "HighBit": 16}, "BitsAllocated, BitsStored and HighBit are 16, 12 and 16; expected"),
        ({"BitsAllocated": 32}, "BitsAllocated, BitsStored and HighBit are 32, 16 and 15; expected"),
        ({"PixelRepresentation": 2}, "PixelRepresentation is 2; expected 0 or 1"),
        (
            {"WindowCenter": 5, "WindowWidth": 0},
            "WindowCenter is 5.0 and WindowWidth 0.0; expected numbers that LINEAR",
        ),
        ({"WindowCenter": 5}, "WindowCenter is 5.0 and WindowWidth None; expected numbers that LINEAR"),
        ({"WindowWidth": 5}, "WindowCenter is None and WindowWidth 5.0; expected numbers that LINEAR"),
        (
            {"WindowCenter": 5, "WindowWidth": -1, "VOILUTFunction": "SIGMOID"},
            "WindowCenter is 5.0 and WindowWidth -1.0; expected numbers that SIGMOID",
        ),
        ({**WINDOW, "VOILUTFunction": "GAMMA"}, "VOILUTFunction is 'GAMMA'; expected LINEAR, LINEAR_EXACT or SIGMOID"),
        ({"RescaleSlope": 0, "RescaleIntercept": 1}, "RescaleSlope is 0.0 and RescaleIntercept 1.0; expected finite"),
        ({"RescaleSlope": "1e308"}, "RescaleSlope is 1e+308 and RescaleIntercept 0.0; expected finite"),
        ({"VOILUTSequence": lut([4, 0, 16], [1, 2, 3])}, "a LUT holds 3 entries up to 3; expected 4 of 16 bits"),
        # Fewer words than entries are not taken as bytes, unless the entries have 8 bits.
        ({"VOILUTSequence": words([4, 0, 16], 3)}, "a LUT holds 3 entries up to 512; expected 4 of 16 bits"),
        ({"VOILUTSequence": words([6, 0, 12], 3)}, "a LUT holds 3 entries up to 512; expected 6 of 12 bits"),
        ({"ModalityLUTSequence": words([6, 0, 16], 3)}, "a LUT holds 3 entries up to 512; expected 6 of 16 bits"),
        ({"VOILUTSequence": words([9, 0, 8], 3)}, "a LUT holds 6 bytes; expected 9 entries of 8 bits in bytes"),
        ({"VOILUTSequence": lut([3, 0, 8], [1, 2, 300])}, "a LUT holds 3 entries up to 300; expected 3 of 8 bits"),
        (
            {"VOILUTSequence": lut([3, 0, 24], [1, 2, 3])},
            "a LUTDescriptor asks for 24 bits per entry; expected 8 to 16",
        ),
        ({"VOILUTSequence": lut([3, 0, 16], [9, 9, 9])}, "every pixel displays as one and the same value"),
        ({"WindowCenter": 60000, "WindowWidth": 100}, "every pixel displays as one and the same value"),
    ],
    ids=str,
)
def test_header(make_dicom, ramp, tags, reason, capfd):
    assert sentence(make_dicom(ramp, **tags)).startswith(reason)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("keyword", ["FloatPixelData", "DoubleFloatPixelData"])
def test_floating_point_pixels(make_dicom, ramp, keyword):
    tags = {"PixelData": None, keyword: bytes(8 * ramp.size)}
    assert sentence(make_dicom(ramp, **tags)) == "floating-point pixels; expected integers in PixelData"


def test_lut_of_bytes(make_dicom, ramp):
    """0, 0, 0, 1, 0, 2 is also a legal LUT of bytes with 8 bits per entry."""
    mammogram = read_mammogram(make_dicom(ramp, VOILUTSequence=words([6, 0, 8], 3)))
    assert mammogram.unit().max() == pytest.approx(2 / 255)


def nested_lut(path, depth, *, closed):
    """Puts a VOI LUT 0, 1, … 4095 into the file at `path`, with deeply nested sequences in its item."""
    table = np.arange(4096, dtype="<u2").tobytes()
    entries = b"\x28\0\x02\x30US\x06\0" + struct.pack("<3H", 4096, 0, 12)
    entries += b"\x28\0\x06\x30OW\0\0" + struct.pack("<I", len(table)) + table
    inner, tag, item = b"", b"\x28\0\x10\x30SQ\0\0", b"\xfe\xff\0\xe0"
    for level in range(depth):
        inner = (entries if level == depth - 1 else b"") + inner
        if closed:
            inner = tag + struct.pack("<I", 8 + len(inner)) + item + struct.pack("<I", len(inner)) + inner
        else:
            ends = b"\xfe\xff\x0d\xe0" + bytes(4) + b"\xfe\xff\xdd\xe0" + bytes(4)
            inner = tag + b"\xff" * 4 + item + b"\xff" * 4 + inner + ends
    content = path.read_bytes()
    at = content.index(b"\xe0\x7f\x10\0OW")
    path.write_bytes(content[:at] + inner + content[at:])
    return path


@pytest.mark.parametrize("depth", [2, 300, 10_000])
def test_what_is_nested_in_a_lut_is_not_kept(make_dicom, ramp, depth):
    """Copying or writing the header would recurse into the nested sequences."""
    mammogram = read_mammogram(nested_lut(make_dicom(ramp, BitsStored=12), depth, closed=True))
    np.testing.assert_allclose(mammogram.unit(), ramp / 4095, atol=1e-6)
    (item,) = mammogram.dataset.VOILUTSequence
    assert [element.keyword for element in item] == ["LUTDescriptor", "LUTData"]


def test_items_nested_without_lengths(make_dicom, ramp):
    """Sequences of undefined length have to be parsed recursively to find their end."""
    path = nested_lut(make_dicom(ramp, BitsStored=12), 10_000, closed=False)
    assert sentence(path) == "its sequences are nested too deeply; expected an image"


@pytest.mark.parametrize("name", ["pipe.dcm", "pipe", "pipe.png"])
def test_a_pipe_is_not_waited_for(tmp_path, name):
    os.mkfifo(tmp_path / name)
    assert sentence(tmp_path / name) == "a pipe, a socket or a device; expected a file"
    with pytest.raises(GBCIError, match=f"{name}: a pipe, a socket or a device; expected a file"):
        read_mask(tmp_path / name)


def test_number_that_is_none(make_dicom, ramp):
    path = make_dicom(ramp, WindowCenter=1234567, WindowWidth=4096)
    path.write_bytes(path.read_bytes().replace(b"1234567", b"1234x67"))
    assert sentence(path) == "WindowCenter is '1234x67.0'; expected numbers with a decimal point"


@pytest.mark.parametrize("value", [0, 77, 65535])
@pytest.mark.parametrize("tags", [{}, WINDOW, {"PhotometricInterpretation": "MONOCHROME1"}], ids=str)
def test_image_of_one_value(make_dicom, value, tags):
    assert "one and the same value; expected an image" in sentence(
        make_dicom(np.full((8, 8), value, np.uint16), **tags)
    )


def test_image_of_padding_and_one_value(make_dicom):
    stored = np.full((8, 8), 500, np.uint16)
    stored[:4] = 0
    assert "one and the same value" in sentence(make_dicom(stored, PixelPaddingValue=0))
    assert "one and the same value" in sentence(make_dicom(np.zeros_like(stored), PixelPaddingValue=0))


# Damage -------------------------------------------------------------------------------------------------------------

NOISE = np.random.default_rng(0).integers(0, 4096, (64, 64)).astype(np.uint16)


@pytest.mark.parametrize(
    "syntax",
    [ExplicitVRLittleEndian, DeflatedExplicitVRLittleEndian, RLELossless, JPEG2000Lossless, JPEGLosslessSV1],
    ids=lambda syntax: syntax.keyword,
)
@pytest.mark.parametrize("kept", [0.05, 0.3, 0.9, 0.995])
def test_file_cut_short(make_dicom, syntax, kept, capfd):
    path = make_dicom(NOISE, syntax=syntax)
    content = path.read_bytes()
    path.write_bytes(content[: max(int(kept * len(content)), 140)])
    assert "cut short" in sentence(path)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("syntax", [RLELossless, JPEG2000Lossless, JPEGLosslessSV1], ids=lambda syntax: syntax.keyword)
def test_compressed_frame_cut_short(make_dicom, syntax, capfd):
    path = make_dicom(NOISE, syntax=syntax)
    dataset = pydicom.dcmread(path)
    frame = next(generate_frames(dataset.PixelData, number_of_frames=1))
    dataset.PixelData = encapsulate([frame[: len(frame) // 4 * 2]])
    dataset.save_as(path)
    assert re.match(r"damaged.*cut short", sentence(path))
    assert capfd.readouterr() == ("", "")


def test_rle_segment_that_is_too_long(make_dicom):
    # The Rust decoder panics if a run crosses the end, and a panic is not an Exception.
    path = make_dicom(NOISE, syntax=RLELossless)
    dataset = pydicom.dcmread(path)
    frame = bytearray(next(generate_frames(dataset.PixelData, number_of_frames=1)))
    second = int.from_bytes(frame[8:12], "little")
    frame[second:] = b"\x00\x01" + b"\x81\x00" * 32
    dataset.PixelData = encapsulate([bytes(frame)])
    dataset.save_as(path)
    assert sentence(path).startswith("damaged or not decodable (")


def test_missing_decoder_is_named(make_dicom, monkeypatch):
    path = make_dicom(NOISE, syntax=JPEG2000Lossless)
    monkeypatch.setattr(get_decoder(JPEG2000Lossless), "_available", {})
    assert sentence(path).startswith("no decoder for JPEG 2000 Image Compression (Lossless Only) is installed")


def test_unknown_transfer_syntax(make_dicom):
    path = make_dicom(NOISE)
    path.write_bytes(path.read_bytes().replace(b"1.2.840.10008.1.2.1\0", b"1.2.840.10008.1.2.9\0"))
    assert sentence(path).startswith("transfer syntax 1.2.840.10008.1.2.9 cannot be decoded; expected uncompressed")


# PNG ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mode", "reason"),
    [
        ("RGB", "a PNG of color type 2 with 8 bits; expected gray (0) with 8 or 16"),
        ("RGBA", "a PNG of color type 6 with 8 bits; expected gray (0) with 8 or 16"),
        ("LA", "a PNG of color type 4 with 8 bits; expected gray (0) with 8 or 16"),
        ("P", "a PNG of color type 3 with 8 bits; expected gray (0) with 8 or 16"),
        ("1", "a PNG of color type 0 with 1 bits; expected gray (0) with 8 or 16"),
    ],
)
def test_png_that_is_not_gray(tmp_path, mode, reason):
    Image.fromarray(NOISE.astype(np.uint8)).convert("RGB").convert(mode).save(tmp_path / "x.png")
    assert sentence(tmp_path / "x.png") == reason


@pytest.mark.parametrize("kept", [0.002, 0.3, 0.9])
def test_png_cut_short(tmp_path, kept):
    path = tmp_path / "x.png"
    Image.fromarray(NOISE).save(path)
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content))])
    assert re.match(r"damaged or not decodable \(|.*; expected a readable DICOM or PNG file", sentence(path))


def test_png_that_claims_to_be_huge(tmp_path):
    path = tmp_path / "x.png"
    Image.fromarray(NOISE).save(path)
    content = bytearray(path.read_bytes())
    content[16:24] = (100_000).to_bytes(4, "big") * 2
    path.write_bytes(bytes(content))
    assert sentence(path) == "the header claims 100000 x 100000 pixels; expected 1 to 150000000 in all"


def test_png_of_one_value(tmp_path):
    Image.fromarray(np.full((8, 8), 9, np.uint16)).save(tmp_path / "x.png")
    assert sentence(tmp_path / "x.png") == "every pixel has one and the same value; expected an image"
