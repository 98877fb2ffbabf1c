"""Limits on the memory that a file may make its reader allocate: no more than a file of its length can hold.

A damaged or forged header of a few bytes can claim gigabytes. The checks compare lengths before memory is allocated.
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
# Several times the pixels of the largest detector. A header that claims more is damaged; decoding would exhaust memory.
MAX_PIXELS = 150_000_000
# Largest expansion of deflate (RFC 1951): a match yields at most 258 bytes and takes at least 2 bits.
MAX_DEFLATE = 1032
# Largest accepted expansion of a deflated data set. Noise barely compresses; air and the header do.
MAX_INFLATED = 100
# Image bytes per encoded byte. RLE: a run of 128 bytes takes 2 (PS3.5 G.3.1). Lossless JPEG: at least a bit per sample
# (ISO/IEC 10918-1 H.1.2.2); other JPEG: two bits per block of 64. JPEG-LS and JPEG 2000 have no such limit; noise on
# 0.2 % of an otherwise black detector reaches 1550.
MAX_RLE, MAX_LOSSLESS_JPEG, MAX_JPEG, MAX_OTHER = 64, 16, 512, 4000
# Longest value, in bytes, of an element that is parsed into numbers or strings. An explicit VR allows no more
# (PS3.5 7.1.2).
MAX_SHORT_VALUE = 65536
BULK = ("OB", "OW", "OF", "OD", "OL", "OV", "OB or OW", "UN", "SQ", "UC", "UR", "UT", "US or OW", "US or SS or OW")
MAX_LUT_BYTES = 2 * 65536
# Limits of one data set. pydicom reads every tag, length, value and item separately; a header takes some thousand
# reads. An item of 8 bytes becomes an object of 700 bytes.
MAX_READS = 60_000
MAX_ITEMS = 10_000
ITEM_TAGS = b"\xfe\xff\x00\xe0", b"\xff\xfe\xe0\x00"  # in either byte order
MAX_LINE = MEBIBYTE  # characters in one line of a table


class BoundedFile(io.BufferedReader):
    """A file for libraries that read as many bytes as a header claims: large reads are cut to the rest of the file.

    Raises:
        GBCIError: the path is a pipe, a socket or a device, on which a read could wait for ever.
    """

    def __init__(self, path: Path):
        check_regular(path)
        super().__init__(io.FileIO(str(path)))  # pydicom expects the file's name to be a string
        self._size = path.stat().st_size

    def read(self, size: int | None = -1, /) -> bytes:
        """As `io.BufferedReader.read`; a size of more than a mebibyte is cut to the rest of the file."""
        if size is not None and size > MEBIBYTE:
            size = min(size, max(0, self._size - self.tell()))
        return super().read(size)


class BoundedDicom(BoundedFile):
    """A DICOM file for pydicom, with limits on the number of reads and on the size of an inflated data set.

    pydicom reads "the rest of the file" (no size) only to inflate a deflated data set in one step.
    """

    def __init__(self, path: Path):
        super().__init__(path)
        self._reads = 0

    @property
    def overrun(self) -> bool:
        """Whether there were more than `MAX_READS` reads."""
        return self._reads > MAX_READS

    def read(self, size: int | None = -1, /) -> bytes:
        """As `BoundedFile.read`.

        Raises:
            EOFError: more than `MAX_READS` reads.
            GBCIError: the rest of the file is read, and is no complete deflated data set, or inflates to more than
                `MAX_INFLATED` times its length (at least 16 MiB) or to more than `MAX_ITEMS` items.
        """
        self._reads += 1
        if self.overrun:
            raise EOFError
        content = super().read(size)
        if size is None or size < 0:
            _check_deflated(content)
        return content


def check_regular(path: Path) -> None:
    """Refuses a path that is neither a file nor a folder: opening or reading it could wait for ever.

    Raises:
        GBCIError: the path is a pipe, a socket or a device.
        OSError: the path does not exist.
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
    """Refuses numbers, strings and sequences that would become millions of objects (an implicit VR allows 4 GB).

    Raises:
        GBCIError: a value longer than `MAX_SHORT_VALUE` bytes, or a sequence of more than `MAX_ITEMS` items.
    """
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
    """Refuses a Modality or VOI LUT item whose table is longer than any LUTDescriptor can state.

    Raises:
        GBCIError: LUTData holds more than `MAX_LUT_BYTES` bytes, or as `check_short_values`.
    """
    check_short_values(item)
    data = item.get_item("LUTData")
    if data is not None and isinstance(data.value, bytes) and len(data.value) > MAX_LUT_BYTES:
        raise GBCIError(f"a LUT holds {len(data.value)} bytes; expected at most {MAX_LUT_BYTES}")


def check_native(found: int, rows: int, columns: int, bits: int) -> None:
    """Refuses native (unencapsulated) pixel data of ``found`` bytes that cannot hold ``rows`` x ``columns`` pixels.

    Raises:
        GBCIError: fewer bytes than ``rows * columns * bits // 8``.
    """
    expected = rows * columns * bits // 8
    if found < expected:
        raise GBCIError(f"damaged or not decodable (PixelData holds {found} of {expected} bytes); cut short")


def check_frame(frame: bytes, syntax: UID, rows: int, columns: int, bits: int) -> None:
    """Refuses an encoded frame too short to hold ``rows`` x ``columns`` pixels of ``bits`` allocated bits each.

    Images of up to a mebibyte always pass.

    Raises:
        GBCIError: the pixels exceed the largest possible expansion of the frame under ``syntax``.
    """
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
    """Refuses a PNG file that is too short to hold the pixels that its header states.

    Raises:
        GBCIError: the pixels exceed `MAX_DEFLATE` times the file's length.
    """
    length = path.stat().st_size
    if width * height * bits // 8 > MAX_DEFLATE * length:
        raise GBCIError(f"the header claims {width} x {height} pixels; a file of {length} bytes cannot hold them")


def bounded_lines(file: TextIO) -> Iterator[str]:
    """Yields the lines of a table.

    Raises:
        GBCIError: a line is longer than `MAX_LINE` characters.
    """
    while line := file.readline(MAX_LINE + 1):
        if len(line) > MAX_LINE:
            raise GBCIError(f"it has a line of more than {MAX_LINE} characters; expected a table")
        yield line
