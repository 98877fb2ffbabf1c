"""A look at a JPEG frame's structure before it is decoded."""

import re
import struct

from gbci_fast.errors import GBCIError

_START_OF_FRAME = (0xC0, 0xC1, 0xC2, 0xC3, 0xF7)  # baseline, extended, progressive, lossless, JPEG-LS
_START_OF_SCAN = 0xDA
# Frame, Huffman and quantization tables, restart interval, JPEG-LS parameters, application data, comment, scan.
_SEGMENT = re.compile(rb"\xff+([\xc0-\xc4\xf7\xdb\xdd\xf8\xe0-\xef\xfe\xda])(..)", re.DOTALL)
# Coded data holds no marker but restarts: 0xFF is followed by zero, in JPEG-LS by any byte whose first bit is zero.
_END_OF_SCAN = re.compile(rb"\xff+([\x80-\xcf\xd8-\xfe])")
_END_OF_IMAGE = b"\xd9"


def check_jpeg(frame: bytes, *, rows: int, columns: int, bits: int) -> int:
    """Walks the marker segments (ISO/IEC 10918-1 annex B, 14495-1 annex C) up to the end of the only scan.

    GDCM, the one freely licensed decoder of lossless JPEG, ends the whole process over some frames that are damaged
    there.

    Returns:
        the frame's bits per sample.

    Raises:
        GBCIError: a segment is out of place, the frame is not one component of that size with at most ``bits`` bits,
            or it has no end.
    """
    if not frame.startswith(b"\xff\xd8"):
        raise GBCIError("damaged JPEG data: no start of image")
    size, precision, components = None, 0, 0
    marker, position = None, 2
    while marker != _START_OF_SCAN:
        segment = _SEGMENT.match(frame, position)
        if segment is None:
            raise GBCIError(f"damaged JPEG data: no marker segment at byte {position}")
        marker, length = segment[1][0], int.from_bytes(segment[2], "big")
        if marker in _START_OF_FRAME:
            precision, *size, components = struct.unpack_from(">BHHB", frame + bytes(6), segment.end())
        position = segment.start(2) + length
    if size != [rows, columns] or components != 1 or not 2 <= precision <= bits:
        raise GBCIError(
            f"damaged JPEG data: its frame has {components} components, rows and columns {size} and {precision} bits; "
            f"expected 1, {[rows, columns]} and up to {bits}"
        )
    end = _END_OF_SCAN.search(frame, position)
    if end is None or end[1] != _END_OF_IMAGE:
        raise GBCIError("damaged JPEG data: its scan does not run to the end of the image")
    return precision
