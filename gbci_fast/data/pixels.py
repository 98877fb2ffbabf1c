"""The stored integers of a DICOM image: what is refused before decoding, which decoder, which bits."""

from contextlib import nullcontext

import numpy as np
from pydicom import Dataset
from pydicom.encaps import generate_frames
from pydicom.pixels import get_decoder
from pydicom.pixels.decoders.base import Decoder
from pydicom.uid import (
    HTJ2K,
    JPEG2000,
    UID,
    BreastTomosynthesisImageStorage,
    JPEG2000TransferSyntaxes,
    JPEGBaseline8Bit,
    JPEGExtended12Bit,
    JPEGLSNearLossless,
    JPEGLSTransferSyntaxes,
    JPEGTransferSyntaxes,
    RLELossless,
)

from gbci_fast.data.bounds import check_frame, check_jpeg2000, check_native, check_short_values
from gbci_fast.data.complaints import no_complaints
from gbci_fast.data.jpeg import check_jpeg
from gbci_fast.errors import GBCIError

# Several times the largest detector; a header that claims more is damaged, and would exhaust memory when decoded.
MAX_PIXELS = 150_000_000
READABLE = "uncompressed, deflated, RLE, JPEG (8 bits or lossless), JPEG-LS, JPEG 2000 or HTJ2K"
# Pillow before GDCM, which ends the process over some damaged lossy frames. pylibjpeg is the fastest where there is a
# choice (RLE, JPEG 2000), up to 4 times, and prints nothing of its own.
PREFERRED_PLUGINS = ("pylibjpeg", "pillow", "gdcm")
# LossyImageCompressionMethod (PS3.3 C.7.6.1.1.5.1). What is not JPEG may be lossless under these too.
LOSSY_METHODS = {
    JPEGBaseline8Bit: "ISO_10918_1",
    JPEGExtended12Bit: "ISO_10918_1",
    JPEGLSNearLossless: "ISO_14495_1",
    JPEG2000: "ISO_15444_1",
    HTJ2K: "ISO_15444_15",
}


def check_header(dataset: Dataset, *, has_pixels: bool) -> None:
    """Refuses, before anything is decoded, what is not one gray image of 8 to 16 bits.

    Raises:
        GBCIError: what was found and what was expected.
    """
    check_short_values(dataset)
    if dataset.get("SOPClassUID") == BreastTomosynthesisImageStorage:
        raise GBCIError("a breast tomosynthesis object; expected a mammogram (2D)")
    if "FloatPixelData" in dataset or "DoubleFloatPixelData" in dataset:
        raise GBCIError("floating-point pixels; expected integers in PixelData")
    if not has_pixels:
        raise GBCIError("no PixelData, or cut short before its end; expected an image")
    photometric, samples = dataset.get("PhotometricInterpretation"), dataset.get("SamplesPerPixel", 1)
    if samples != 1 or photometric not in ("MONOCHROME1", "MONOCHROME2"):
        raise GBCIError(
            f"a color image ({photometric}, {samples} samples per pixel); expected MONOCHROME1 or MONOCHROME2"
        )
    if int(dataset.get("NumberOfFrames") or 1) != 1:
        raise GBCIError(f"{dataset.NumberOfFrames} frames; expected a single image")
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
    """Refuses a size that is absent or beyond `MAX_PIXELS`."""
    if not width or not height or width * height > MAX_PIXELS:
        raise GBCIError(f"the header claims {width} x {height} pixels; expected 1 to {MAX_PIXELS} in all")


def decode(dataset: Dataset) -> np.ndarray:
    """Integers [H, W] in the type that the header states, from the BitsStored bits up to HighBit.

    HighBit is BitsStored - 1 today (PS3.5 8.1.1). In older files the value may lie higher in its cell, and the bits
    around it hold overlays or nothing; it is moved down. Where the transfer syntax is lossy, `dataset` says so
    afterwards.

    Raises:
        GBCIError: no decoder, or a frame that is damaged or not of the size that the header states.
    """
    decoder = _decoder(dataset.file_meta.TransferSyntaxUID)
    rows, columns, allocated = dataset.Rows, dataset.Columns, dataset.BitsAllocated
    plugin = next((name for name in PREFERRED_PLUGINS if name in decoder.available_plugins), "")
    if not decoder.UID.is_encapsulated:
        check_native(len(dataset.PixelData), rows, columns, allocated)
    else:
        frame = next(generate_frames(dataset.PixelData, number_of_frames=1))
        check_frame(frame, decoder.UID, rows, columns, allocated)
        if decoder.UID in (*JPEGTransferSyntaxes, *JPEGLSTransferSyntaxes):
            precision = check_jpeg(frame, rows=rows, columns=columns, bits=allocated)
            if plugin == "pillow" and precision > 8:
                raise GBCIError(f"lossy JPEG of {precision} bits cannot be decoded; expected {READABLE}")
        elif decoder.UID in JPEG2000TransferSyntaxes:
            check_jpeg2000(frame, rows=rows, columns=columns)
        _check_high_bit(dataset, decoder.UID)
        _state_lossy(dataset, decoder.UID, len(frame))
    with no_complaints() if decoder.UID.is_encapsulated else nullcontext():
        stored, _ = decoder.as_array(dataset, decoding_plugin=plugin, correct_unused_bits=False)
    # Some decoders choose the narrowest type that holds the data, or leave the unused bits as they find them.
    stored = stored.astype(f"{'ui'[dataset.PixelRepresentation]}{allocated // 8}", copy=False)
    above, unused = allocated - 1 - dataset.HighBit, allocated - dataset.BitsStored
    return (stored << above) >> unused if unused else stored


def _decoder(syntax: UID) -> Decoder:
    try:
        decoder = get_decoder(syntax)
    except NotImplementedError:  # how pydicom says that no decoder of it exists
        raise GBCIError(f"transfer syntax {syntax.name} cannot be decoded; expected {READABLE}") from None
    if not decoder.is_available:
        raise GBCIError(f"no decoder for {decoder.UID.name} is installed; expected python-gdcm or a pylibjpeg plugin")
    return decoder


def _check_high_bit(dataset: Dataset, syntax: UID) -> None:
    """Encoded frames have a bit depth of their own, which would contradict a value that lies higher in its cell."""
    if syntax != RLELossless and dataset.HighBit != dataset.BitsStored - 1:
        raise GBCIError(
            f"HighBit is {dataset.HighBit} and BitsStored {dataset.BitsStored} in {syntax.name}; "
            "expected BitsStored - 1 in what is not uncompressed or RLE"
        )


def _state_lossy(dataset: Dataset, syntax: UID, length: int) -> None:
    """Once lossy, always lossy: `dataset` outlives the transfer syntax, and some files leave it at that."""
    stated = str(dataset.get("LossyImageCompression") or "").strip()
    method = LOSSY_METHODS.get(syntax)
    if method is None or stated == "01" or (stated == "00" and method != "ISO_10918_1"):
        return
    dataset.LossyImageCompression = "01"
    dataset.LossyImageCompressionMethod = method
    native = dataset.Rows * dataset.Columns * dataset.BitsAllocated // 8
    dataset.LossyImageCompressionRatio = f"{native / length:.4g}"
