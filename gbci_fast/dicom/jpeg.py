"""Parses and checks the marker segments of a JPEG or JPEG-LS frame before it is decoded."""

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
# The only markers within coded data are restarts: a data byte 0xFF is followed by zero, in JPEG-LS by any byte whose
# first bit is zero.
_END_OF_SCAN = re.compile(rb"\xff+([\x80-\xcf\xd8-\xfe])")
_RESTART = re.compile(rb"\xff+([\xd0-\xd7])")
_START_OF_IMAGE, _END_OF_IMAGE = b"\xff\xd8", b"\xd9"


def read_jpeg(frame: bytes, *, rows: int, columns: int, bits: int) -> Codestream:
    """The header of a JPEG or JPEG-LS frame, whose marker segments are checked up to the end of its only scan.

    Segments follow ISO/IEC 10918-1 annex B and 14495-1 annex C. The check protects the process: GDCM, the only freely
    licensed decoder of lossless JPEG, ends the process on some frames with damaged segments. Lossless JPEG and JPEG-LS
    lose information if they shift low bits out (point transform), JPEG-LS also if it allows deviations (NEAR).

    Raises:
        GBCIError: a segment is out of place, the frame is not one component of ``rows`` x ``columns`` with at most
            ``bits`` bits, the end is absent, the restarts are not the stated ones, or another image follows.
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
    # The scan header ends with three bytes: predictor or NEAR, end of spectrum or interleave mode, point transform.
    deviation, shift = frame[position - 3], frame[position - 1] & 0x0F
    exact = shift == 0 and (kind == _LOSSLESS or (kind == _JPEG_LS and deviation == 0))
    return Codestream(
        precision=precision,
        lossy=not exact,
        method="ISO_14495_1" if kind == _JPEG_LS else "ISO_10918_1",
        syntaxes=_SYNTAXES.get(kind, _LOSSY_SYNTAXES),
    )


def _check_restarts(scan: bytes, *, blocks: int, interval: int) -> None:
    """Refuses a lossy scan of one component that does not restart after each ``interval`` blocks of 8 x 8 pixels.

    See ISO/IEC 10918-1 E.1.4. Where restarts are missing, decoders continue with gray pixels.

    Raises:
        GBCIError: restarts are missing, superfluous or out of order.
    """
    expected = (blocks - 1) // interval
    restarts = b"".join(_RESTART.findall(scan))
    if restarts != (bytes(range(0xD0, 0xD8)) * (expected // 8 + 1))[:expected]:
        raise GBCIError(
            f"damaged JPEG data: its scan restarts {len(restarts)} times, or out of order; expected {expected}; "
            "perhaps cut short"
        )
