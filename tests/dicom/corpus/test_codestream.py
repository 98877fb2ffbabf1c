"""If an encoded frame contradicts its header, the frame decides and a note says so, or the file is refused."""

import io
import struct

import numpy as np
import pydicom
import pytest
from PIL import Image
from pydicom import DataElement
from pydicom.encaps import encapsulate, encapsulate_extended, generate_frames
from pydicom.uid import (
    HTJ2K,
    JPEG2000,
    HTJ2KLossless,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGLosslessSV1,
    JPEGLSLossless,
    JPEGLSNearLossless,
    RLELossless,
)

from gbci_fast.dicom.reading import read_mammogram
from gbci_fast.errors import GBCIError

from . import frames
from .files import RAMP, make

DEEP = np.random.default_rng(0).integers(0, 2**14, (48, 40)).astype(np.uint16)
FLAT = DEEP >> 2  # 12 bits
SHALLOW = (DEEP >> 6).astype(np.uint8)
SYNTAXES = [JPEG2000Lossless, JPEGLosslessSV1, JPEGLSLossless]


def frame_of(path):
    return next(generate_frames(pydicom.dcmread(path).PixelData, number_of_frames=1))


@pytest.fixture
def relabel(tmp_path):
    """`relabel(path, syntax=..., data=..., **tags)` replaces attributes of the header and keeps the pixels."""

    def change(path, *, syntax=None, data=None, **tags):
        dataset = pydicom.dcmread(path)
        if data is not None:
            dataset.PixelData = data
        if syntax is not None:
            dataset.file_meta.TransferSyntaxUID = syntax
        for keyword, value in tags.items():
            setattr(dataset, keyword, value)
        dataset.save_as(tmp_path / "changed.dcm", enforce_file_format=True)
        return tmp_path / "changed.dcm"

    return change


# Precision and sign -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("syntax", SYNTAXES, ids=lambda syntax: syntax.keyword)
def test_more_bits_than_the_header_states(make_dicom, relabel, syntax):
    path = relabel(make_dicom(DEEP, syntax=syntax, BitsStored=14), BitsStored=12, HighBit=11)
    mammogram = read_mammogram(path)
    np.testing.assert_array_equal(mammogram.stored, DEEP)
    bits = 14 if syntax == JPEG2000Lossless else 16  # GDCM encodes whole cells
    assert mammogram.notes == (f"BitsStored is 12, but the frame's {bits} bits are in use, and taken",)
    assert (mammogram.dataset.BitsStored, mammogram.dataset.HighBit) == (bits, bits - 1)
    assert len(mammogram.presentation.levels) == 2**bits


@pytest.mark.parametrize("syntax", SYNTAXES, ids=lambda syntax: syntax.keyword)
def test_a_wider_frame_whose_pixels_fit(make_dicom, relabel, syntax):
    """A frame of whole cells is common and contradicts nothing."""
    mammogram = read_mammogram(relabel(make_dicom(FLAT, syntax=syntax, BitsStored=16), BitsStored=12, HighBit=11))
    np.testing.assert_array_equal(mammogram.stored, FLAT)
    assert (mammogram.notes, mammogram.dataset.BitsStored) == ((), 12)


def test_fewer_bits_than_the_header_states(make_dicom, relabel):
    path = relabel(make_dicom(FLAT, syntax=JPEG2000Lossless, BitsStored=12), BitsStored=14, HighBit=13)
    mammogram = read_mammogram(path)
    np.testing.assert_array_equal(mammogram.stored, FLAT)
    assert mammogram.notes == ("its frame has 12 bits, its header 14",)


def test_more_bits_than_a_cell(make_dicom, relabel):
    path = relabel(make_dicom(DEEP, syntax=JPEG2000Lossless), BitsAllocated=8, BitsStored=8, HighBit=7)
    with pytest.raises(GBCIError, match=r"\[48, 40\] and 16 bits; expected 1, \[48, 40\] and up to 8"):
        read_mammogram(path)


@pytest.mark.parametrize("signed", [False, True])
def test_signs_that_differ(make_dicom, relabel, signed):
    stored = (FLAT.astype(np.int16) - 2048) if signed else FLAT
    path = relabel(make_dicom(stored, syntax=JPEG2000Lossless, BitsStored=12), PixelRepresentation=int(not signed))
    own, other = ("with", "without") if signed else ("without", "with")
    with pytest.raises(GBCIError, match=f"its frame has 12 bits {own} a sign, its header 12 bits {other} a sign"):
        read_mammogram(path)


@pytest.mark.parametrize("signed", [False, True])
def test_signs_that_make_no_difference(make_dicom, relabel, signed):
    stored = (FLAT >> 1).astype(np.int16 if signed else np.uint16)
    path = relabel(make_dicom(stored, syntax=JPEG2000Lossless, BitsStored=12), PixelRepresentation=int(not signed))
    mammogram = read_mammogram(path)
    np.testing.assert_array_equal(mammogram.stored, stored)
    assert mammogram.stored.dtype == (np.uint16 if signed else np.int16)


@pytest.mark.parametrize("syntax", SYNTAXES, ids=lambda syntax: syntax.keyword)
def test_signed_samples(make_dicom, syntax):
    stored = FLAT.astype(np.int16) - 2048
    np.testing.assert_array_equal(read_mammogram(make_dicom(stored, syntax=syntax, BitsStored=12)).stored, stored)


def test_signed_samples_of_a_wider_frame(make_dicom, relabel):
    stored = FLAT.astype(np.int16) - 2048
    for syntax in SYNTAXES:
        path = relabel(make_dicom(stored, syntax=syntax, BitsStored=16), BitsStored=12, HighBit=11)
        np.testing.assert_array_equal(read_mammogram(path).stored, stored)


@pytest.mark.parametrize("syntax", [pydicom.uid.ExplicitVRLittleEndian, RLELossless], ids=lambda syntax: syntax.keyword)
def test_native_cells_with_bits_beyond(make_dicom, relabel, syntax):
    path = relabel(make_dicom(DEEP, syntax=syntax), BitsStored=12, HighBit=11)
    mammogram = read_mammogram(path)
    np.testing.assert_array_equal(mammogram.stored, DEEP & 4095)
    assert mammogram.notes == ("bits beyond the 12 of BitsStored are set, and left out",)


def test_native_cells_with_copies_of_the_sign(make_dicom, relabel):
    stored = FLAT.astype(np.int16) - 2048
    mammogram = read_mammogram(relabel(make_dicom(stored), BitsStored=12, HighBit=11))
    np.testing.assert_array_equal(mammogram.stored, stored)
    assert mammogram.notes == ()


# Loss ---------------------------------------------------------------------------------------------------------------

LOSSY = [
    (JPEG2000Lossless, JPEG2000, frames.JPEG_2000_LOSSY, "ISO_15444_1"),
    (HTJ2KLossless, HTJ2K, frames.HTJ2K_LOSSY, "ISO_15444_15"),
    (JPEGLSLossless, JPEGLSNearLossless, frames.JPEG_LS_NEAR_2, "ISO_14495_1"),
]


@pytest.mark.parametrize("stated", [None, "00"])
@pytest.mark.parametrize(("lossless", "lossy", "frame", "method"), LOSSY, ids=lambda value: str(value)[-10:])
def test_a_lossy_frame_under_a_lossless_syntax(tmp_path, lossless, lossy, frame, method, stated):
    tags = {"BitsStored": 12} | ({} if stated is None else {"LossyImageCompression": stated})
    for name, syntax in (("right", lossy), ("wrong", lossless)):
        (tmp_path / f"{name}.dcm").write_bytes(make(RAMP, syntax, frame=frame, **tags))
    right, wrong = (read_mammogram(tmp_path / f"{name}.dcm") for name in ("right", "wrong"))
    np.testing.assert_array_equal(wrong.stored, right.stored)
    note = f"its frame may be lossy ({method}), though its header says lossless"
    for mammogram in (right, wrong):
        header = mammogram.dataset
        assert (header.LossyImageCompression, header.LossyImageCompressionMethod) == ("01", method)
    assert wrong.notes == (note,)
    assert right.notes == (() if stated is None else (note,))


def test_what_is_said_to_be_lossy_is_no_contradiction(tmp_path):
    content = make(RAMP, JPEG2000Lossless, frame=frames.JPEG_2000_LOSSY, BitsStored=12, LossyImageCompression="01")
    (tmp_path / "x.dcm").write_bytes(content)
    assert read_mammogram(tmp_path / "x.dcm").notes == ()


def test_a_baseline_frame_under_lossless_jpeg(make_dicom, relabel):
    stored, file = SHALLOW, io.BytesIO()
    Image.fromarray(stored).save(file, format="JPEG", quality=90)
    path = relabel(
        make_dicom(stored, syntax=JPEGLosslessSV1), data=encapsulate([file.getvalue()]), LossyImageCompression="00"
    )
    mammogram = read_mammogram(path)
    np.testing.assert_array_equal(mammogram.stored, np.asarray(Image.open(file)))
    assert mammogram.dataset.LossyImageCompression == "01"
    assert mammogram.notes == ("its frame may be lossy (ISO_10918_1), though its header says lossless",)


def test_a_lossless_frame_under_baseline_jpeg(make_dicom, relabel):
    path = relabel(make_dicom(FLAT, syntax=JPEGLosslessSV1, BitsStored=12), syntax=JPEGBaseline8Bit)
    np.testing.assert_array_equal(read_mammogram(path).stored, FLAT)


def test_a_point_transform_is_lossy(make_dicom, relabel):
    """The low bits that lossless JPEG shifts out are lost (ISO/IEC 10918-1 H.1.2.1)."""
    path = make_dicom(FLAT, syntax=JPEGLosslessSV1, BitsStored=12)
    frame = bytearray(frame_of(path))
    scan = frame.index(b"\xff\xda\x00\x08")
    frame[scan + 9] = 1
    header = read_mammogram(relabel(path, data=encapsulate([bytes(frame)]))).dataset
    assert header.LossyImageCompression == "01"


@pytest.mark.parametrize("stated", [None, "00"])
def test_several_quality_layers_are_lossless_under_a_lossless_syntax(make_dicom, relabel, stated):
    """The last of three layers makes the 5-3 transform exact. The codestream does not say whether it is complete."""
    frame = jpeg2000(FLAT, quality_mode="rates", quality_layers=[20, 5, 1])
    tags = {} if stated is None else {"LossyImageCompression": stated}
    path = relabel(make_dicom(FLAT, syntax=JPEG2000Lossless), data=encapsulate([frame]), **tags)
    mammogram = read_mammogram(path)
    np.testing.assert_array_equal(mammogram.stored, FLAT)
    assert mammogram.dataset.get("LossyImageCompression") == stated
    assert mammogram.notes == ("its frame may be lossy (ISO_15444_1), though its header says lossless",)


@pytest.mark.parametrize("stated", [None, "00"])
def test_several_quality_layers_are_lossy_under_the_lossy_syntax(make_dicom, relabel, stated):
    frame = jpeg2000(FLAT, quality_mode="rates", quality_layers=[20, 5, 1])
    tags = {} if stated is None else {"LossyImageCompression": stated}
    path = relabel(make_dicom(FLAT, syntax=JPEG2000Lossless), data=encapsulate([frame]), syntax=JPEG2000, **tags)
    assert read_mammogram(path).dataset.LossyImageCompression == "01"


# Whole frames -------------------------------------------------------------------------------------------------------


def jpeg2000(stored, **options):
    file = io.BytesIO()
    Image.fromarray(stored).save(file, format="JPEG2000", no_jp2=True, **options)
    return file.getvalue()


def tile_parts(frame):
    """The positions at which the tile-parts of a codestream begin, and the end of the last."""
    positions = [frame.index(b"\xff\x90\x00\x0a")]
    while frame[positions[-1] : positions[-1] + 2] == b"\xff\x90":
        positions.append(positions[-1] + struct.unpack_from(">I", frame, positions[-1] + 6)[0])
    return positions


def test_a_codestream_of_nine_tiles(make_dicom, relabel):
    frame = jpeg2000(SHALLOW, tile_size=(16, 16))
    path = relabel(make_dicom(SHALLOW, syntax=JPEG2000Lossless), data=encapsulate([frame]))
    assert len(tile_parts(frame)) == 10  # 3 x 3 tiles of 48 x 40 pixels
    np.testing.assert_array_equal(read_mammogram(path).stored, SHALLOW)


@pytest.mark.parametrize("kept", [1, 5, 8])
def test_a_tiled_codestream_that_is_cut_and_closed(make_dicom, relabel, kept):
    frame = jpeg2000(SHALLOW, tile_size=(16, 16))
    cut = frame[: tile_parts(frame)[kept]] + b"\xff\xd9"
    path = relabel(make_dicom(SHALLOW, syntax=JPEG2000Lossless), data=encapsulate([cut]))
    with pytest.raises(GBCIError, match=f"its JPEG 2000 codestream holds {kept} of 9 tiles\\); cut short"):
        read_mammogram(path)


@pytest.mark.parametrize("tiles", [{}, {"tile_size": (16, 16)}], ids=str)
def test_a_codestream_that_is_cut_inside_a_tile_and_closed(make_dicom, relabel, tiles):
    frame = jpeg2000(SHALLOW, **tiles)
    cut = frame[: len(frame) * 2 // 3] + b"\xff\xd9"
    path = relabel(make_dicom(SHALLOW, syntax=JPEG2000Lossless), data=encapsulate([cut]))
    with pytest.raises(GBCIError, match=r"its JPEG 2000 codestream has no end\); cut short"):
        read_mammogram(path)


def test_a_tile_part_that_is_absent(make_dicom, relabel):
    frame = bytearray(jpeg2000(DEEP))
    frame[tile_parts(frame)[0] + 11] = 2  # the number of parts of the tile
    path = relabel(make_dicom(DEEP, syntax=JPEG2000Lossless), data=encapsulate([bytes(frame)]))
    with pytest.raises(GBCIError, match=r"its JPEG 2000 codestream lacks a part of a tile\); cut short"):
        read_mammogram(path)


def test_a_last_tile_part_of_open_length(make_dicom, relabel):
    frame = bytearray(jpeg2000(DEEP))
    frame[tile_parts(frame)[0] + 6 : tile_parts(frame)[0] + 10] = bytes(4)
    path = relabel(make_dicom(DEEP, syntax=JPEG2000Lossless), data=encapsulate([bytes(frame)]))
    np.testing.assert_array_equal(read_mammogram(path).stored, DEEP)


def test_a_lossy_scan_with_restarts_that_is_cut_and_closed(make_dicom, relabel):
    stored, file = SHALLOW, io.BytesIO()
    Image.fromarray(stored).save(file, format="JPEG", restart_marker_blocks=2)  # the image has 6 x 5 blocks
    frame = file.getvalue()
    path = make_dicom(stored)
    whole = relabel(path, data=encapsulate([frame]), syntax=JPEGBaseline8Bit)
    np.testing.assert_array_equal(read_mammogram(whole).stored, np.asarray(Image.open(file)))
    cut = frame[: frame.rindex(b"\xff\xd3")] + b"\xff\xd9"
    swapped = frame.replace(b"\xff\xd1", b"\xff\xd2", 1)
    for damaged, restarts in ((cut, 11), (swapped, 14)):
        damaged = relabel(path, data=encapsulate([damaged]), syntax=JPEGBaseline8Bit)
        with pytest.raises(GBCIError, match=f"its scan restarts {restarts} times, or out of order; expected 14"):
            read_mammogram(damaged)


def test_a_decoder_s_own_words_are_not_repeated(make_dicom, relabel):
    for syntax in (JPEGLSLossless, RLELossless):
        path = make_dicom(FLAT, syntax=syntax, BitsStored=12)
        frame = frame_of(path)
        cut = frame[: len(frame) // 4] + (b"" if syntax == RLELossless else b"\xff\xd9")
        with pytest.raises(GBCIError) as caught:
            read_mammogram(relabel(path, data=encapsulate([cut])))
        assert str(caught.value).endswith(
            f": damaged or not decodable (no image can be made of its frame, {syntax.name}); perhaps cut short"
        )


def test_lossy_jpeg_in_cells_of_16_bits(make_dicom, relabel):
    stored, file = SHALLOW, io.BytesIO()
    Image.fromarray(stored).save(file, format="JPEG")
    path = relabel(
        make_dicom(stored.astype(np.uint16), BitsStored=8), data=encapsulate([file.getvalue()]), syntax=JPEGBaseline8Bit
    )
    with pytest.raises(GBCIError, match="lossy JPEG of 8 bits, and BitsAllocated is 16; expected 8"):
        read_mammogram(path)


def test_a_frame_s_own_coding_limits_its_size(make_dicom, relabel):
    """A lossy frame with more than 40 pixels per byte under the syntax of lossless JPEG, which allows at most 16."""
    stored, file = np.zeros((1500, 1400), np.uint8), io.BytesIO()
    stored[:, :700] = np.arange(1500, dtype=np.uint8)[:, None] // 8
    Image.fromarray(stored).save(file, format="JPEG")
    assert stored.size > 40 * len(file.getvalue())
    path = relabel(make_dicom(stored), data=encapsulate([file.getvalue()]), syntax=JPEGLosslessSV1)
    np.testing.assert_array_equal(read_mammogram(path).stored, np.asarray(Image.open(file)))


# Number of frames ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tags", [{}, {"NumberOfFrames": 1}], ids=str)
@pytest.mark.parametrize("has_bot", [True, False])
@pytest.mark.parametrize("syntax", [*SYNTAXES, RLELossless], ids=lambda syntax: syntax.keyword)
def test_two_encoded_frames(make_dicom, relabel, syntax, has_bot, tags):
    path = make_dicom(FLAT, syntax=syntax)
    path = relabel(path, data=encapsulate([frame_of(path)] * 2, has_bot=has_bot), **tags)
    with pytest.raises(GBCIError, match="PixelData holds 2 frames; expected a single image"):
        read_mammogram(path)


def test_two_frames_by_the_extended_offset_table(make_dicom, relabel):
    path = make_dicom(FLAT, syntax=JPEG2000Lossless)
    data, offsets, lengths = encapsulate_extended([frame_of(path)] * 2)
    path = relabel(path, data=data, ExtendedOffsetTable=offsets, ExtendedOffsetTableLengths=lengths)
    with pytest.raises(GBCIError, match="PixelData holds 2 frames; expected a single image"):
        read_mammogram(path)


def test_two_images_in_one_fragment(make_dicom, relabel):
    path = make_dicom(FLAT, syntax=JPEGLosslessSV1)
    with pytest.raises(GBCIError, match="PixelData holds several frames; expected a single image"):
        read_mammogram(relabel(path, data=encapsulate([frame_of(path) * 2])))


@pytest.mark.parametrize("tags", [{}, {"NumberOfFrames": 1}], ids=str)
def test_two_native_frames(make_dicom, tags):
    path = make_dicom(FLAT, PixelData=FLAT.tobytes() * 2, **tags)
    with pytest.raises(GBCIError, match="PixelData holds 2 frames; expected a single image"):
        read_mammogram(path)


@pytest.mark.parametrize("syntax", [*SYNTAXES, RLELossless], ids=lambda syntax: syntax.keyword)
def test_one_frame_in_three_fragments(make_dicom, relabel, syntax):
    path = make_dicom(FLAT, syntax=syntax, BitsStored=12)
    path = relabel(path, data=encapsulate([frame_of(path)], fragments_per_frame=3, has_bot=False))
    np.testing.assert_array_equal(read_mammogram(path).stored, FLAT)


def test_excess_bytes_are_no_second_frame(make_dicom):
    path = make_dicom(FLAT, PixelData=FLAT.tobytes() + bytes(1000))
    np.testing.assert_array_equal(read_mammogram(path).stored, FLAT)


# Overlays -----------------------------------------------------------------------------------------------------------


def test_an_overlay_above_the_pixels_of_a_frame(make_dicom, relabel):
    """Bits above BitsStored that are declared as an overlay do not belong to the image."""
    cells = FLAT | (np.uint16(1) << 15)
    path = relabel(make_dicom(cells, syntax=JPEG2000Lossless), BitsStored=12, HighBit=11)
    dataset = pydicom.dcmread(path)
    dataset.add(DataElement((0x6000, 0x0100), "US", 16))
    dataset.save_as(path)
    mammogram = read_mammogram(path)
    np.testing.assert_array_equal(mammogram.stored, FLAT)
    assert (mammogram.notes, mammogram.dataset.BitsStored) == ((), 12)
