"""What a file may make its reader allocate: no more than a file of its length can hold.

Headers are a few bytes, and damaged or made-up ones claim gigabytes. Everything here looks at lengths alone, before
memory is taken.
"""

import io
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from pydicom import Dataset
from pydicom.datadict import dictionary_has_tag, dictionary_VR, keyword_for_tag
from pydicom.dataelem import RawDataElement
from pydicom.uid import UID, JPEGLossless, JPEGLosslessSV1, JPEGTransferSyntaxes, RLELossless

from gbci_fast.errors import GBCIError

MEBIBYTE = 2**20
# Deflate makes at most 1032 bytes of one (RFC 1951: 258 bytes per match, of 2 bits at least).
MAX_DEFLATE = 1032
# An inflated data set: bytes per byte. Grain barely shrinks; air and header do.
MAX_INFLATED = 100
# Image bytes per encoded byte. RLE: a run of 128 takes 2 (PS3.5 G.3.1). Lossless JPEG: a bit per sample at least
# (ISO/IEC 10918-1 H.1.2.2); other JPEG: two bits per block of 64. JPEG-LS and JPEG 2000 have no such limit; grain on
# 0.2 % of an otherwise black detector comes to 1550.
MAX_RLE, MAX_LOSSLESS_JPEG, MAX_JPEG, MAX_OTHER = 64, 16, 512, 4000
# Longest value of an element that is parsed into numbers or strings; an explicit VR allows no more (PS3.5 7.1.2).
MAX_SHORT_VALUE = 65536
BULK = ("OB", "OW", "OF", "OD", "OL", "OV", "OB or OW", "UN", "SQ", "UC", "UR", "UT", "US or OW", "US or SS or OW")
MAX_LUT_BYTES = 2 * 65536
MAX_LINE = MEBIBYTE  # characters of a table's line


class BoundedFile(io.BufferedReader):
    """A file for libraries that ask for as many bytes as a header claims: no memory is taken beyond the file's end."""

    def __init__(self, path: Path):
        super().__init__(io.FileIO(path))
        self._size = path.stat().st_size

    def read(self, size: int | None = -1, /) -> bytes:
        """As `io.BufferedReader.read`."""
        if size is not None and size > MEBIBYTE:
            size = min(size, max(0, self._size - self.tell()))
        return super().read(size)


class BoundedDicom(BoundedFile):
    """A DICOM file for pydicom, which asks for the rest of a file only to inflate it all at once."""

    def read(self, size: int | None = -1, /) -> bytes:
        """As `BoundedFile.read`.

        Raises:
            GBCIError: the rest is asked for, and inflates to more than `MAX_INFLATED` times its length.
        """
        content = super().read(size)
        if size is None or size < 0:
            _check_deflated(content)
        return content


def _check_deflated(packed: bytes) -> None:
    allowed = max(16 * MEBIBYTE, MAX_INFLATED * len(packed))
    inflate, total = zlib.decompressobj(-zlib.MAX_WBITS), 0
    while packed and not inflate.eof and total <= allowed:
        total += len(inflate.decompress(packed, MEBIBYTE))
        packed = inflate.unconsumed_tail
    if total > allowed:
        raise GBCIError(
            f"its deflated data set grows beyond {allowed} bytes, {MAX_INFLATED} times its length; expected an image"
        )


def check_short_values(dataset: Dataset) -> None:
    """Refuses numbers and strings that would become millions of objects (an implicit VR allows 4 GB of them)."""
    for element in dataset.values():
        if not isinstance(element, RawDataElement) or not element.value or len(element.value) <= MAX_SHORT_VALUE:
            continue
        representation = element.VR or (dictionary_VR(element.tag) if dictionary_has_tag(element.tag) else "UN")
        if representation not in BULK:
            name = keyword_for_tag(element.tag) or str(element.tag)
            raise GBCIError(f"{name} holds {len(element.value)} bytes; expected at most {MAX_SHORT_VALUE}")


def check_lut(item: Dataset) -> None:
    """Refuses a Modality or VOI LUT item whose table is longer than a descriptor can say."""
    check_short_values(item)
    data = item.get_item("LUTData")
    if data is not None and isinstance(data.value, bytes) and len(data.value) > MAX_LUT_BYTES:
        raise GBCIError(f"a LUT holds {len(data.value)} bytes; expected at most {MAX_LUT_BYTES}")


def check_native(found: int, rows: int, columns: int, bits: int) -> None:
    """Whether `found` bytes can be the unencapsulated pixels that the header states."""
    expected = rows * columns * bits // 8
    if found < expected:
        raise GBCIError(f"damaged or not decodable (PixelData holds {found} of {expected} bytes)")


def check_frame(frame: bytes, syntax: UID, rows: int, columns: int, bits: int) -> None:
    """Whether an encoded frame can hold the pixels that the header states; small images always can."""
    if syntax == RLELossless:
        most = MAX_RLE
    elif syntax in (JPEGLossless, JPEGLosslessSV1):
        most = MAX_LOSSLESS_JPEG
    else:
        most = MAX_JPEG if syntax in JPEGTransferSyntaxes else MAX_OTHER
    expected = rows * columns * bits // 8
    if expected > max(MEBIBYTE, most * len(frame)):
        raise GBCIError(
            f"the header claims {columns} x {rows} pixels; its frame of {len(frame)} bytes cannot hold them"
        )


def check_jpeg2000(frame: bytes, *, rows: int, columns: int) -> None:
    """Whether the codestream's SIZ segment (ISO/IEC 15444-1 A.5.1) states one component of that size.

    Raises:
        GBCIError: it does not, or there is none.
    """
    start = frame.find(b"\xff\x4f\xff\x51")  # start of codestream, SIZ; some files wrap the codestream in JP2 boxes
    if start < 0 or len(frame) < start + 42:
        raise GBCIError("damaged JPEG 2000 data: no start of codestream")
    right, bottom, left, top = struct.unpack_from(">4I", frame, start + 8)
    (components,) = struct.unpack_from(">H", frame, start + 40)
    if (components, bottom - top, right - left) != (1, rows, columns):
        raise GBCIError(
            f"damaged JPEG 2000 data: its frame has {components} components, rows and columns "
            f"{[bottom - top, right - left]}; expected 1, {[rows, columns]}"
        )


def check_png(path: Path, width: int, height: int, bits: int) -> None:
    """Whether a PNG file is long enough to hold its pixels."""
    length = path.stat().st_size
    if width * height * bits // 8 > MAX_DEFLATE * length:
        raise GBCIError(f"the header claims {width} x {height} pixels; a file of {length} bytes cannot hold them")


def bounded_lines(file: TextIO) -> Iterator[str]:
    """The lines of a table.

    Raises:
        GBCIError: a line is longer than `MAX_LINE`.
    """
    while line := file.readline(MAX_LINE + 1):
        if len(line) > MAX_LINE:
            raise GBCIError(f"it has a line of more than {MAX_LINE} characters; expected a table")
        yield line
