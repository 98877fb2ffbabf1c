"""Parses and checks a JPEG 2000 or HTJ2K codestream before it is decoded: main header and tile-parts."""

import struct
from collections import Counter

from gbci_fast.dicom.codestream import Codestream
from gbci_fast.errors import GBCIError

_START = b"\xff\x4f\xff\x51"  # start of codestream, SIZ; some files wrap the codestream in JP2 boxes
_END = b"\xff\xd9"
_START_OF_TILE_PART = b"\xff\x90"
_CAPABILITIES, _CODING, _COMPONENT_CODING, _TILE_PART = 0xFF50, 0xFF52, 0xFF53, 0xFF90
_IRREVERSIBLE = 0  # the 9-7 transform (ISO/IEC 15444-1 A.6.1)


def read_jpeg2000(frame: bytes, *, rows: int, columns: int, bits: int) -> Codestream:
    """The main header of a codestream, from SIZ, CAP, COD and COC (ISO/IEC 15444-1 A.5 and A.6).

    The 9-7 transform is lossy. Several quality layers may be lossy: all but the last are coarser images, and the
    codestream does not say whether the last layer is complete.

    Raises:
        GBCIError: the frame holds no codestream, is cut short, or is not one component of ``rows`` x ``columns`` with
            at most ``bits`` bits.
    """
    start = frame.find(_START)
    if start < 0:
        raise GBCIError("damaged JPEG 2000 data: no start of codestream")
    try:
        right, bottom, left, top = struct.unpack_from(">4I", frame, start + 8)
        components, depth = struct.unpack_from(">HB", frame, start + 40)
        capabilities, layers, transforms, _ = _coding(frame, start + 2)
    except (struct.error, IndexError):
        raise GBCIError("damaged JPEG 2000 data: cut short in its header") from None
    precision, signed = (depth & 0x7F) + 1, bool(depth & 0x80)
    if (components, bottom - top, right - left) != (1, rows, columns) or precision > bits:
        raise GBCIError(
            f"damaged JPEG 2000 data: its frame has {components} components, rows and columns "
            f"{[bottom - top, right - left]} and {precision} bits; expected 1, {[rows, columns]} and up to {bits}"
        )
    return Codestream(
        precision=precision,
        signed=signed,
        lossy=_IRREVERSIBLE in transforms,
        layered=layers > 1,
        method="ISO_15444_15" if capabilities else "ISO_15444_1",
    )


def check_tiles(frame: bytes) -> None:
    """Follows the tile-parts (ISO/IEC 15444-1 A.4.2) of a codestream that passed `read_jpeg2000`, up to its end.

    Raises:
        GBCIError: the codestream has no end marker, or lacks a tile or a part of a tile.
    """
    start = frame.find(_START)
    try:
        right, bottom, _, _, width, height, left, top = struct.unpack_from(">8I", frame, start + 8)
        tiles = -((left - right) // width) * -((top - bottom) // height)
        *_, position = _coding(frame, start + 2)
        found, stated = Counter(), {}
        while frame[position : position + 2] == _START_OF_TILE_PART:
            tile, length, _, parts = struct.unpack_from(">HIBB", frame, position + 4)
            found[tile] += 1
            stated[tile] = max(parts, stated.get(tile, 0))  # a number of parts of 0 means unstated
            # The last tile-part may state a length of 0: up to the end marker.
            position = position + length if length else frame.rfind(_END, position)
    except (struct.error, ZeroDivisionError):
        position = len(frame)
    if frame[position : position + 2] != _END:
        raise GBCIError("damaged or not decodable (its JPEG 2000 codestream has no end); cut short")
    if len(found) != tiles or max(found, default=0) >= tiles:
        raise GBCIError(
            f"damaged or not decodable (its JPEG 2000 codestream holds {len(found)} of {tiles} tiles); cut short"
        )
    if any(found[tile] < parts for tile, parts in stated.items()):
        raise GBCIError("damaged or not decodable (its JPEG 2000 codestream lacks a part of a tile); cut short")


def _coding(frame: bytes, position: int) -> tuple[bool, int, set[int], int]:
    """Whether CAP is present, the number of layers, the transforms, and the position of the first tile-part."""
    capabilities, layers, transforms = False, 1, set()
    while (marker := struct.unpack_from(">H", frame, position)[0]) != _TILE_PART:
        if marker == _CAPABILITIES:
            capabilities = True
        elif marker == _CODING:
            (layers,) = struct.unpack_from(">H", frame, position + 6)
            transforms.add(frame[position + 13])
        elif marker == _COMPONENT_CODING:
            transforms.add(frame[position + 10])
        position += 2 + struct.unpack_from(">H", frame, position + 2)[0]
    return capabilities, layers, transforms, position
