"""The entries of a Modality or VOI LUT, in words or in bytes: its reader and its writer take them alike."""

import numpy as np
from pydicom import Dataset

from gbci_fast.dicom.bounds import check_lut
from gbci_fast.errors import GBCIError


def lut_size(item: Dataset) -> int:
    """How many entries a LUT's descriptor states, 0 meaning 65536."""
    return int(item.LUTDescriptor[0]) & 0xFFFF or 0x10000


def lut_bits(item: Dataset) -> int:
    """Bits per entry.

    Raises:
        GBCIError: not 8 to 16.
    """
    bits = int(item.LUTDescriptor[2])
    if not 8 <= bits <= 16:
        raise GBCIError(f"a LUTDescriptor asks for {bits} bits per entry; expected 8 to 16")
    return bits


def lut_entries(item: Dataset, *, big_endian: bool) -> np.ndarray:
    """LUTData of a Modality or VOI LUT item (PS3.3 C.11.1.1.1, C.11.2.1.1), integers [N] as LUTDescriptor states.

    uint8 where the entries are bytes: they have 8 bits, and the data are one byte for each, or one more to be even.
    Otherwise words, in the byte order of the file; what lies behind the last entry is left out.

    Raises:
        GBCIError: too few entries, one beyond the bits, or a length that is neither that of bytes nor that of words.
    """
    check_lut(item)
    size, bits, data = lut_size(item), lut_bits(item), item.LUTData
    if isinstance(data, bytes):
        narrow = bits == 8 and len(data) in (size, size + size % 2)
        if bits == 8 and not narrow and len(data) < 2 * size:
            raise GBCIError(f"a LUT holds {len(data)} bytes; expected {size} entries of 8 bits in bytes or words")
        word = np.dtype("u1" if narrow else ">u2" if big_endian else "<u2")
        data = np.frombuffer(data, word, count=len(data) // word.itemsize)[:size]
        if narrow and _is_half_of_words(data, big_endian=big_endian):
            raise GBCIError(f"a LUT of 8 bits holds {(size + 1) // 2} words; expected {size} entries; cut short")
    table = np.atleast_1d(np.asarray(data))
    if len(table) != size or table.max() >= 2**bits:
        raise GBCIError(
            f"a LUT holds {len(table)} entries up to {table.max(initial=0):.0f}; "
            f"expected {size} of {bits} bits, as its LUTDescriptor says"
        )
    return table


def _is_half_of_words(data: np.ndarray, *, big_endian: bool) -> bool:
    """Whether the high bytes that words would have are all zero, and others not: as bytes no display is like that."""
    high, low = (data[::2], data[1::2]) if big_endian else (data[1::2], data[::2])
    return not high.any() and int(np.count_nonzero(low)) > 1
