"""Decodes the stored integers of a DICOM image: checks before decoding, choice of the decoder, bits in use."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import numpy as np
from pydicom import Dataset
from pydicom.pixels import get_decoder
from pydicom.pixels.decoders.base import Decoder
from pydicom.uid import (
    HTJ2K,
    JPEG2000,
    UID,
    JPEG2000TransferSyntaxes,
    JPEGBaseline8Bit,
    JPEGExtended12Bit,
    JPEGLSNearLossless,
    JPEGLSTransferSyntaxes,
    JPEGTransferSyntaxes,
)

from gbci_fast.dicom.bounds import MAX_PIXELS, check_frame, check_native, check_short_values
from gbci_fast.dicom.codestream import Codestream, only_frame
from gbci_fast.dicom.complaints import no_complaints
from gbci_fast.dicom.file import first_number
from gbci_fast.dicom.jpeg import read_jpeg
from gbci_fast.dicom.jpeg2000 import check_tiles, read_jpeg2000
from gbci_fast.dicom.kinds import check_kind
from gbci_fast.dicom.presentation import stored_range
from gbci_fast.errors import GBCIError

READABLE = "uncompressed, deflated, RLE, JPEG (8 bits or lossless), JPEG-LS, JPEG 2000 or HTJ2K"
# Pillow comes before GDCM, which ends the process on some damaged lossy frames. pylibjpeg is the fastest where there is
# a choice (RLE, JPEG 2000), up to 4 times, and prints nothing itself.
PREFERRED_PLUGINS = ("pylibjpeg", "pillow", "gdcm")
# JPEG-LS and JPEG 2000 frames may be lossless under these, too.
LOSSY_SYNTAXES = (JPEGBaseline8Bit, JPEGExtended12Bit, JPEGLSNearLossless, JPEG2000, HTJ2K)


def check_header(dataset: Dataset, *, has_pixels: bool) -> None:
    """Refuses, before decoding, every data set that is not a single gray mammogram of 8 to 16 bits.

    Args:
        has_pixels: whether the file holds PixelData.

    Raises:
        GBCIError: with what was found and what was expected.
    """
    check_short_values(dataset)
    check_kind(dataset)
    if "FloatPixelData" in dataset or "DoubleFloatPixelData" in dataset:
        raise GBCIError("floating-point pixels; expected integers in PixelData")
    if not has_pixels:
        raise GBCIError("no PixelData, or cut short before its end; expected an image")
    photometric, samples = dataset.get("PhotometricInterpretation"), dataset.get("SamplesPerPixel", 1)
    if not photometric:
        raise GBCIError("no PhotometricInterpretation; expected MONOCHROME1 or MONOCHROME2")
    if samples != 1 or photometric not in ("MONOCHROME1", "MONOCHROME2"):
        raise GBCIError(
            f"a color image ({photometric}, {samples} samples per pixel); expected MONOCHROME1 or MONOCHROME2"
        )
    if (frames := first_number(dataset, "NumberOfFrames")) not in (None, 0, 1):
        raise GBCIError(f"{frames:g} frames; expected a single image")
    check_size(dataset.get("Columns"), dataset.get("Rows"))
    allocated, bits, high = (dataset.get(key) for key in ("BitsAllocated", "BitsStored", "HighBit"))
    if allocated not in (8, 16) or not bits or not 8 <= bits <= allocated or high not in range(bits - 1, allocated):
        raise GBCIError(
            f"BitsAllocated, BitsStored and HighBit are {allocated}, {bits} and {high}; "
            "expected 8 or 16, 8 to BitsAllocated, and BitsStored - 1 to BitsAllocated - 1"
        )
    if dataset.get("PixelRepresentation") not in (0, 1):
        raise GBCIError(f"PixelRepresentation is {dataset.get('PixelRepresentation')}; expected 0 or 1")


def check_size(width: int | None, height: int | None) -> None:
    """Refuses a size that is absent or exceeds `MAX_PIXELS`.

    Raises:
        GBCIError: width or height is absent or 0, or their product exceeds `MAX_PIXELS`.
    """
    if not width or not height or width * height > MAX_PIXELS:
        raise GBCIError(f"the header claims {width} x {height} pixels; expected 1 to {MAX_PIXELS} in all")


def decode(dataset: Dataset) -> tuple[np.ndarray, list[str]]:
    """Stored integers [H, W] in the type that the header states, and notes on contradictions.

    Native pixels: the value occupies the BitsStored bits up to HighBit of its cell. HighBit is BitsStored - 1 today
    (PS3.5 8.1.1); in older files the value may lie higher, between overlay or unused bits, and is shifted down.

    Encoded frames state their own bit depth and whether their coding is lossy. Where that contradicts the header, the
    frame is believed: `dataset` is corrected in place, and a note says so.

    Raises:
        GBCIError: no decoder, several frames, or a frame that is damaged, cut short, or of another size or sign than
            the header states.
    """
    syntax = _decoder(dataset.file_meta.TransferSyntaxUID).UID
    if not syntax.is_encapsulated:
        _check_native(dataset)
        cells = _cells(dataset, _decoder(syntax))
        return _used_bits(cells, dataset)
    frame = only_frame(dataset, syntax)
    codestream = _codestream(frame, syntax, dataset)
    coding = syntax if codestream is None or syntax in (codestream.syntaxes or [syntax]) else codestream.syntaxes[0]
    check_frame(frame, coding, dataset.Rows, dataset.Columns, dataset.BitsAllocated)
    if codestream is None:
        with _said_damaged(coding):
            return _used_bits(_cells(dataset, _decoder(coding)), dataset)
    _check_high_bit(dataset, syntax)
    if coding in JPEG2000TransferSyntaxes:
        check_tiles(frame)
    dataset.file_meta.TransferSyntaxUID = coding
    with _said_damaged(coding):
        cells = _cells(dataset, _decoder(coding), codestream.precision)
    lossy_note = _state_lossy(dataset, syntax, codestream, len(frame))
    stored, depth_note = _by_frame(cells, codestream, dataset)
    return stored, [note for note in (depth_note, lossy_note) if note]


def _codestream(frame: bytes, syntax: UID, dataset: Dataset) -> Codestream | None:
    """The frame's own header; ``None`` for RLE, which encodes whole cells and has none."""
    expected = {"rows": dataset.Rows, "columns": dataset.Columns, "bits": dataset.BitsAllocated}
    if syntax in JPEG2000TransferSyntaxes:
        return read_jpeg2000(frame, **expected)
    if syntax not in (*JPEGTransferSyntaxes, *JPEGLSTransferSyntaxes):
        return None
    codestream = read_jpeg(frame, **expected)
    if JPEGBaseline8Bit in codestream.syntaxes and codestream.precision > 8:
        raise GBCIError(f"lossy JPEG of {codestream.precision} bits cannot be decoded; expected {READABLE}")
    if JPEGBaseline8Bit in codestream.syntaxes and dataset.BitsAllocated != 8:
        raise GBCIError(f"lossy JPEG of 8 bits, and BitsAllocated is {dataset.BitsAllocated}; expected 8")
    return codestream


def _cells(dataset: Dataset, decoder: Decoder, bits: int | None = None) -> np.ndarray:
    """The decoded cells of the only frame, [H, W] unsigned, BitsAllocated wide. GDCM cuts samples to ``bits`` bits."""
    plugin = next((name for name in PREFERRED_PLUGINS if name in decoder.available_plugins), "")
    with no_complaints() if decoder.UID.is_encapsulated else nullcontext():
        cells, _ = decoder.as_array(
            dataset,
            decoding_plugin=plugin,
            bits_stored=bits or dataset.BitsStored,
            correct_unused_bits=False,
            apply_j2k_sign_correction=False,
            apply_jls_sign_correction=False,
        )
    # Some decoders choose the narrowest type that holds the data.
    return cells.astype(f"u{dataset.BitsAllocated // 8}", copy=False)


@contextmanager
def _said_damaged(coding: UID) -> Iterator[None]:
    """Replaces a decoder's own exception by a `GBCIError` that says that the frame cannot be decoded."""
    try:
        yield
    except (GBCIError, MemoryError):
        raise
    except Exception as error:
        reason = f"damaged or not decodable (no image can be made of its frame, {coding.name}); perhaps cut short"
        raise GBCIError(reason) from error


def _check_native(dataset: Dataset) -> None:
    """Refuses PixelData that is shorter than one image or as long as several."""
    found, expected = len(dataset.PixelData), dataset.Rows * dataset.Columns * dataset.BitsAllocated // 8
    check_native(found, dataset.Rows, dataset.Columns, dataset.BitsAllocated)
    if (frames := (found - expected % 2) // expected) > 1:
        raise GBCIError(f"PixelData holds {frames} frames; expected a single image")


def _used_bits(cells: np.ndarray, dataset: Dataset) -> tuple[np.ndarray, list[str]]:
    """The values in the cells, and a note where unused bits are set although no overlay is declared there."""
    signed, bits = dataset.PixelRepresentation == 1, dataset.BitsStored
    above, unused = dataset.BitsAllocated - 1 - dataset.HighBit, dataset.BitsAllocated - bits
    values = cells.view(f"{'ui'[signed]}{cells.itemsize}")
    if not unused:
        return values, []
    stored, below = (values << above) >> unused, unused - above
    stray = (cells & ~np.array((2**bits - 1) << below, cells.dtype)) != 0
    if signed:
        stray &= (stored << below) != values  # copies of the sign
    if not stray.any() or _overlay_in_cells(dataset):
        return stored, []
    return stored, [f"bits beyond the {bits} of BitsStored are set, and left out"]


def _by_frame(cells: np.ndarray, codestream: Codestream, dataset: Dataset) -> tuple[np.ndarray, str | None]:
    """The samples of an encoded frame, by its own precision and sign, and a note where the header contradicts them.

    BitsStored may be less than the precision if every sample fits in it. Otherwise BitsStored is set to the precision.

    Raises:
        GBCIError: a sample is negative according to the frame and positive according to the header, or vice versa.
    """
    precision, bits, signed = codestream.precision, dataset.BitsStored, dataset.PixelRepresentation == 1
    own = signed if codestream.signed is None else codestream.signed
    codes = cells & np.array(2**precision - 1, cells.dtype)
    top = int(codes.max())
    # The bits above BitsStored hold an overlay; or JPEG, which states no sign, leaves them empty in signed samples.
    if precision > bits and (_overlay_in_cells(dataset) or (codestream.signed is None and signed and top < 2**bits)):
        codes, own, precision = codes & np.array(2**bits - 1, cells.dtype), signed, bits
    samples = _signed(codes, precision) if own else codes
    lowest, highest = int(samples.min()), int(samples.max())
    limits = stored_range(bits, signed=signed)
    other_sign = (own and not signed and lowest < 0) or (signed and not own and highest > limits[1])
    if other_sign or (codestream.signed is None and precision < bits and lowest < 0):
        raise GBCIError(
            f"its frame has {precision} bits{'' if codestream.signed is None else _sign(own)}, its header {bits} bits"
            f"{_sign(signed)}, and its pixels differ by that; expected the same"
        )
    stored = samples.view(f"{'ui'[signed]}{cells.itemsize}")
    if limits[0] <= lowest and highest <= limits[1]:
        smaller = codestream.precision < bits
        return stored, f"its frame has {precision} bits, its header {bits}" if smaller else None
    dataset.BitsStored, dataset.HighBit = precision, precision - 1
    return stored, f"BitsStored is {bits}, but the frame's {precision} bits are in use, and taken"


def _signed(codes: np.ndarray, bits: int) -> np.ndarray:
    """Signed integers [H, W] from two's complement codes of ``bits`` bits, unsigned [H, W]."""
    unused = 8 * codes.itemsize - bits
    return (codes.view(f"i{codes.itemsize}") << unused) >> unused


def _sign(signed: bool) -> str:
    return " with a sign" if signed else " without a sign"


def _overlay_in_cells(dataset: Dataset) -> bool:
    """Whether unused bits of the pixel cells hold an overlay plane (legal until 2004, PS3.5 8.1.2)."""
    planes = (dataset.get((group, 0x0100)) for group in range(0x6000, 0x6020, 2))  # OverlayBitsAllocated
    return any(plane is not None and plane.value != 1 for plane in planes)


def _decoder(syntax: UID) -> Decoder:
    try:
        decoder = get_decoder(syntax)
    except NotImplementedError:  # pydicom knows no decoder for this transfer syntax
        raise GBCIError(f"transfer syntax {syntax.name} cannot be decoded; expected {READABLE}") from None
    if not decoder.is_available:
        raise GBCIError(f"no decoder for {decoder.UID.name} is installed; expected python-gdcm or a pylibjpeg plugin")
    return decoder


def _check_high_bit(dataset: Dataset, syntax: UID) -> None:
    """Refuses a HighBit other than BitsStored - 1: an encoded sample begins at bit 0 of its cell."""
    if dataset.HighBit != dataset.BitsStored - 1:
        raise GBCIError(
            f"HighBit is {dataset.HighBit} and BitsStored {dataset.BitsStored} in {syntax.name}; "
            "expected BitsStored - 1 in what is not uncompressed or RLE"
        )


def _state_lossy(dataset: Dataset, syntax: UID, codestream: Codestream, length: int) -> str | None:
    """Records lossy coding in ``dataset``, which outlives the frame; returns a note where the header denied it.

    Several quality layers of a reversible coding are taken as complete if the transfer syntax is lossless.
    """
    stated = str(dataset.get("LossyImageCompression") or "").strip()
    perhaps = codestream.lossy or codestream.layered
    lossy = codestream.lossy or (codestream.layered and syntax in LOSSY_SYNTAXES)
    denied = perhaps and stated != "01" and (stated == "00" or syntax not in LOSSY_SYNTAXES)
    if stated != "01" and (lossy or (syntax in LOSSY_SYNTAXES and stated != "00")):
        dataset.LossyImageCompression = "01"
        dataset.LossyImageCompressionMethod = codestream.method
        native = dataset.Rows * dataset.Columns * dataset.BitsAllocated // 8
        dataset.LossyImageCompressionRatio = f"{native / length:.4g}"
    return f"its frame may be lossy ({codestream.method}), though its header says lossless" if denied else None
