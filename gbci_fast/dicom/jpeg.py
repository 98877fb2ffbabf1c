"""A look at a JPEG frame's structure before it is decoded."""

import re
import struct

from pydicom.uid import JPEGBaseline8Bit, JPEGExtended12Bit, JPEGLossless, JPEGLosslessSV1, JPEGLSTransferSyntaxes

from gbci_fast.dicom.codestream import Codestream
from gbci_fast.errors import GBCIError

_LOSSLESS, _JPEG_LS = 0xC3, 0xF7
_START_OF_FRAME = (0xC0, 0xC1, 0xC2, _LOSSLESS, _JPEG_LS)  # baseline, extended, progressive, lossless, JPEG-LS
_SYNTAXES = {_LOSSLESS: (JPEGLossless, JPEGLosslessSV1), _JPEG_LS: tuple(JPEGLSTransferSyntaxes)}
_LOSSY_SYNTAXES = (JPEGBaseline8Bit, JPEGExtended12Bit)
_DCT = (0xC0, 0xC1, 0xC2)
_START_OF_SCAN, _RESTART_INTERVAL = 0xDA, 0xDD
# Frame, Huffman and quantization tables, restart interval, JPEG-LS parameters, application data, comment, scan.
_SEGMENT = re.compile(rb"\xff+([\xc0-\xc4\xf7\xdb\xdd\xf8\xe0-\xef\xfe\xda])(..)", re.DOTALL)
# Coded data holds no marker but restarts: 0xFF is followed by zero, in JPEG-LS by any byte whose first bit is zero.
_END_OF_SCAN = re.compile(rb"\xff+([\x80-\xcf\xd8-\xfe])")
_RESTART = re.compile(rb"\xff+([\xd0-\xd7])")
_START_OF_IMAGE, _END_OF_IMAGE = b"\xff\xd8", b"\xd9"


def read_jpeg(frame: bytes, *, rows: int, columns: int, bits: int) -> Codestream:
    """Walks the marker segments (ISO/IEC 10918-1 annex B, 14495-1 annex C) up to the end of the only scan.

    GDCM, the one freely licensed decoder of lossless JPEG, ends the whole process over some frames that are damaged
    there. Lossless JPEG and JPEG-LS are lossy all the same where they shift low bits out (point transform), and JPEG-LS
    where it may deviate (NEAR).

    Raises:
        GBCIError: a segment is out of place, the frame is not one component of that size with at most ``bits`` bits,
            it has no end, its restarts are not those that it states, or another image follows.
    """
    if not frame.startswith(_START_OF_IMAGE):
        raise GBCIError("damaged JPEG data: no start of image")
    size, precision, components, kind, interval = None, 0, 0, 0, 0
    marker, position = None, 2
    while marker != _START_OF_SCAN:
        segment = _SEGMENT.match(frame, position)
        if segment is None:
            cut = " (cut short)" if position >= len(frame) - 4 else ""
            raise GBCIError(f"damaged JPEG data: no marker segment at byte {position}{cut}")
        marker, length = segment[1][0], int.from_bytes(segment[2], "big")
        if marker in _START_OF_FRAME:
            kind = marker
            precision, *size, components = struct.unpack_from(">BHHB", frame + bytes(6), segment.end())
        elif marker == _RESTART_INTERVAL:
            (interval,) = struct.unpack_from(">H", frame + bytes(2), segment.end())
        position = segment.start(2) + length
    if size != [rows, columns] or components != 1 or not 2 <= precision <= bits:
        raise GBCIError(
            f"damaged JPEG data: its frame has {components} components, rows and columns {size} and {precision} bits; "
            f"expected 1, {[rows, columns]} and up to {bits}"
        )
    end = _END_OF_SCAN.search(frame, position)
    if end is None or end[1] != _END_OF_IMAGE:
        cut = " (cut short)" if end is None else ""
        raise GBCIError(f"damaged JPEG data: its scan does not run to the end of the image{cut}")
    if frame[end.end() :].lstrip(b"\0").startswith(_START_OF_IMAGE):
        raise GBCIError("PixelData holds several frames; expected a single image")
    if kind in _DCT and interval:
        _check_restarts(frame[position : end.start()], blocks=-(-rows // 8) * -(-columns // 8), interval=interval)
    # The scan's header ends with the predictor or NEAR, the end of the spectrum or the interleave, and the shift.
    deviation, shift = frame[position - 3], frame[position - 1] & 0x0F
    exact = shift == 0 and (kind == _LOSSLESS or (kind == _JPEG_LS and deviation == 0))
    return Codestream(
        precision=precision,
        lossy=not exact,
        method="ISO_14495_1" if kind == _JPEG_LS else "ISO_10918_1",
        syntaxes=_SYNTAXES.get(kind, _LOSSY_SYNTAXES),
    )


def _check_restarts(scan: bytes, *, blocks: int, interval: int) -> None:
    """Whether a lossy scan of one component restarts after each ``interval`` blocks of 8 x 8 (ISO/IEC 10918-1 E.1.4).

    Decoders go on over missing ones with a gray image.
    """
    expected = (blocks - 1) // interval
    restarts = b"".join(_RESTART.findall(scan))
    if restarts != (bytes(range(0xD0, 0xD8)) * (expected // 8 + 1))[:expected]:
        raise GBCIError(
            f"damaged JPEG data: its scan restarts {len(restarts)} times, or out of order; expected {expected}; "
            "perhaps cut short"
        )
