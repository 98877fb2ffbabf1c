"""What a file may make its reader allocate: no more than a file of its length can hold.

Headers are a few bytes, and damaged or made-up ones claim gigabytes. Everything here looks at lengths alone, before
memory is taken.
"""

import io
import stat
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
# Several times the largest detector; a header that claims more is damaged, and would exhaust memory when decoded.
MAX_PIXELS = 150_000_000
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
# Of a data set: pydicom asks for every tag, length, value and item by itself, and a header has some thousand. An item
# of 8 bytes becomes an object of 700.
MAX_READS = 60_000
MAX_ITEMS = 10_000
ITEM_TAGS = b"\xfe\xff\x00\xe0", b"\xff\xfe\xe0\x00"  # in either byte order
MAX_LINE = MEBIBYTE  # characters of a table's line


class BoundedFile(io.BufferedReader):
    """A file for libraries that ask for as many bytes as a header claims: no memory is taken beyond the file's end.

    Raises:
        GBCIError: a pipe or device, of which a reader would wait for ever.
    """

    def __init__(self, path: Path):
        check_regular(path)
        super().__init__(io.FileIO(str(path)))  # pydicom takes a file's name for a text
        self._size = path.stat().st_size

    def read(self, size: int | None = -1, /) -> bytes:
        """As `io.BufferedReader.read`."""
        if size is not None and size > MEBIBYTE:
            size = min(size, max(0, self._size - self.tell()))
        return super().read(size)


class BoundedDicom(BoundedFile):
    """A DICOM file for pydicom, which asks for the rest of a file only to inflate it all at once."""

    def __init__(self, path: Path):
        super().__init__(path)
        self._reads = 0

    @property
    def overrun(self) -> bool:
        """Whether more than `MAX_READS` pieces were asked for."""
        return self._reads > MAX_READS

    def read(self, size: int | None = -1, /) -> bytes:
        """As `BoundedFile.read`.

        Raises:
            EOFError: an `overrun`.
            GBCIError: the rest is asked for, and inflates to more than `MAX_INFLATED` times its length.
        """
        self._reads += 1
        if self.overrun:
            raise EOFError
        content = super().read(size)
        if size is None or size < 0:
            _check_deflated(content)
        return content


def check_regular(path: Path) -> None:
    """Refuses what is neither a file nor a folder; opening it or reading it could wait for ever.

    Raises:
        GBCIError: it is a pipe, a socket or a device.
        OSError: it does not exist.
    """
    mode = path.stat().st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise GBCIError("a pipe, a socket or a device; expected a file")


def _check_deflated(packed: bytes) -> None:
    allowed = max(16 * MEBIBYTE, MAX_INFLATED * len(packed))
    inflate, total, items = zlib.decompressobj(-zlib.MAX_WBITS), 0, 0
    while packed and not inflate.eof and total <= allowed and items <= MAX_ITEMS:
        piece = inflate.decompress(packed, MEBIBYTE)
        total, items = total + len(piece), items + piece.count(ITEM_TAGS[0])
        packed = inflate.unconsumed_tail
    if total > allowed:
        raise GBCIError(
            f"its deflated data set grows beyond {allowed} bytes, {MAX_INFLATED} times its length; expected an image"
        )
    if items > MAX_ITEMS:
        raise GBCIError(f"its deflated data set holds more than {MAX_ITEMS} items; expected an image")
    if not inflate.eof:
        raise GBCIError("damaged or not decodable (its deflated data set has no end); cut short")


def check_short_values(dataset: Dataset) -> None:
    """Refuses numbers, strings and sequences that would become millions of objects (an implicit VR allows 4 GB)."""
    for element in dataset.values():
        if not isinstance(element, RawDataElement) or not element.value or len(element.value) <= MAX_SHORT_VALUE:
            continue
        representation = element.VR or "UN"
        if representation == "UN" and dictionary_has_tag(element.tag):
            representation = dictionary_VR(element.tag)
        name = keyword_for_tag(element.tag) or str(element.tag)
        if representation not in BULK:
            raise GBCIError(f"{name} holds {len(element.value)} bytes; expected at most {MAX_SHORT_VALUE}")
        if representation == "SQ" and (items := sum(map(element.value.count, ITEM_TAGS))) > MAX_ITEMS:
            raise GBCIError(f"{name} holds {items} items; expected at most {MAX_ITEMS}")


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
        raise GBCIError(f"damaged or not decodable (PixelData holds {found} of {expected} bytes); cut short")


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
