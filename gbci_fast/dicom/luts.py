"""The entries of a Modality or VOI LUT, stored as words or bytes; shared by reading and writing."""

import numpy as np
from pydicom import Dataset

from gbci_fast.dicom.bounds import check_lut
from gbci_fast.errors import GBCIError


def lut_size(item: Dataset) -> int:
    """Number of entries that the LUT's descriptor states, where 0 means 65536."""
    return int(item.LUTDescriptor[0]) & 0xFFFF or 0x10000


def lut_bits(item: Dataset) -> int:
    """Bits per entry that the LUT's descriptor states.

    Raises:
        GBCIError: fewer than 8 or more than 16 bits.
    """
    bits = int(item.LUTDescriptor[2])
    if not 8 <= bits <= 16:
        raise GBCIError(f"a LUTDescriptor asks for {bits} bits per entry; expected 8 to 16")
    return bits


def lut_entries(item: Dataset, *, big_endian: bool) -> np.ndarray:
    """LUTData of a Modality or VOI LUT item (PS3.3 C.11.1.1.1, C.11.2.1.1), integers [N] as LUTDescriptor states.

    The entries are uint8 if they have 8 bits and the data are one byte per entry, perhaps padded to an even length.
    Otherwise they are 16-bit words in the byte order of the file. Data after the last entry are ignored.

    Raises:
        GBCIError: too few entries, an entry that exceeds the stated bits, or a length that fits neither bytes nor
            words.
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
    """Whether bytes are the first half of a table of words: every high byte is zero, and several low bytes are not.

    No real table of bytes has a zero in every other entry.
    """
    high, low = (data[::2], data[1::2]) if big_endian else (data[1::2], data[::2])
    return not high.any() and int(np.count_nonzero(low)) > 1
