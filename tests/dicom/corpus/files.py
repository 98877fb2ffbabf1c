"""DICOM files as bytes, from pixels or from an encoded frame."""

import io

import numpy as np
from pydicom import DataElement, Dataset
from pydicom.dataset import FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.uid import (
    UID,
    DigitalMammographyXRayImageStorageForPresentation,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    RLELossless,
)

RAMP = (np.arange(512, dtype=np.uint16) * 8).reshape(16, 32)  # 12 bits
SIGNED_RAMP = RAMP.astype(np.int16) - 2048
RAMP_8 = (np.arange(512) // 2).astype(np.uint8).reshape(16, 32)


def make_breast() -> np.ndarray:
    """uint16 [128, 96], 12 bits: a half ellipse at the left edge, brighter toward its middle, in slightly noisy air."""
    y, x = np.mgrid[:128, :96]
    depth = 1 - ((y - 64) / 52) ** 2 - (x / 62) ** 2
    air = 100 + np.random.default_rng(0).integers(0, 40, depth.shape)
    return np.where(depth > 0, 1200 + 1800 * np.sqrt(np.maximum(depth, 0)), air).astype(np.uint16)


def dataset(stored: np.ndarray, **tags: object) -> Dataset:
    """A mammogram For Presentation with the pixels `stored` [H, W]; `tags` override any attribute, None removes it."""
    bits = 8 * stored.dtype.itemsize
    header = Dataset()
    header.SOPClassUID = DigitalMammographyXRayImageStorageForPresentation
    header.SOPInstanceUID = "2.25.1"
    header.Modality = "MG"
    header.ViewPosition = "CC"
    header.ImageLaterality = "L"
    header.SamplesPerPixel = 1
    header.PhotometricInterpretation = "MONOCHROME2"
    header.Rows, header.Columns = stored.shape
    header.BitsAllocated = bits
    header.BitsStored = tags.get("BitsStored", bits)
    header.HighBit = header.BitsStored - 1
    header.PixelRepresentation = int(stored.dtype.kind == "i")
    header.add_new("PixelData", "OB" if bits == 8 else "OW", stored.tobytes() + b"\0" * (stored.nbytes % 2))
    for keyword, value in tags.items():
        if value is None:
            delattr(header, keyword)
        elif isinstance(value, DataElement):
            header.add(value)
        else:
            setattr(header, keyword, value)
    return header


def file_bytes(
    header: Dataset, syntax: UID = ExplicitVRLittleEndian, *, frame: bytes | None = None, preamble: bool = True
) -> bytes:
    """A data set as the bytes of a file.

    Args:
        syntax: a native syntax, RLE, or the syntax in which `frame` is encoded.
        preamble: False: the data set alone, without preamble and file meta information.
    """
    header.file_meta = FileMetaDataset()
    header.file_meta.MediaStorageSOPClassUID = header.SOPClassUID
    header.file_meta.MediaStorageSOPInstanceUID = header.SOPInstanceUID
    header.file_meta.TransferSyntaxUID = syntax
    if frame is not None:
        header.PixelData = encapsulate([frame])
        header["PixelData"].VR = "OB"
    elif syntax == RLELossless:
        header.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        header.compress(syntax, encoding_plugin="pydicom", generate_instance_uid=False)
    elif syntax == ExplicitVRBigEndian:
        cells = np.frombuffer(header.PixelData, f"<u{header.BitsAllocated // 8}")
        header["PixelData"].value = cells.astype(cells.dtype.newbyteorder(">")).tobytes()
    file = io.BytesIO()
    if preamble:
        header.save_as(file, enforce_file_format=True)
    else:
        del header.file_meta
        header.save_as(file, implicit_vr=syntax.is_implicit_VR, little_endian=syntax.is_little_endian)
    return file.getvalue()


def make(
    stored: np.ndarray,
    syntax: UID = ExplicitVRLittleEndian,
    *,
    frame: bytes | None = None,
    preamble: bool = True,
    overlay: int | None = None,
    **tags: object,
) -> bytes:
    """`file_bytes` of a `dataset`; `overlay` is the bit of the cells that holds one (legal until 2004, PS3.5 8.1.2)."""
    header = dataset(stored, **tags)
    if overlay is not None:
        for element, value in ((0x10, header.Rows), (0x11, header.Columns), (0x100, 16), (0x102, overlay)):
            header.add_new((0x6000, element), "US", value)
        header.add_new((0x6000, 0x40), "CS", "G")
        header.add_new((0x6000, 0x50), "SS", [1, 1])
    return file_bytes(header, syntax, frame=frame, preamble=preamble)


def lut(data: np.ndarray | list[int], first: int = 0, bits: int = 16) -> list[Dataset]:
    """A Modality or VOI LUT Sequence of one item."""
    item = Dataset()
    item.add_new("LUTDescriptor", "US" if first >= 0 else "SS", [len(data), first, bits])
    item.add_new("LUTData", "US", [int(value) for value in data])
    item.add_new("ModalityLUTType", "LO", "US")
    return [item]


def short_lut(stated: int, count: int, bits: int) -> list[Dataset]:
    """A LUT of `count` words 0, 1, … whose descriptor states `stated` of them."""
    item = Dataset()
    item.add_new("LUTDescriptor", "US", [stated, 0, bits])
    item.add_new("LUTData", "OW", np.arange(count, dtype="<u2").tobytes())
    return [item]


def code(value: str, scheme: str = "SCT", **inside: object) -> list[Dataset]:
    """A code sequence with one item, which also holds the attributes `inside`."""
    item = Dataset()
    item.CodeValue, item.CodingSchemeDesignator, item.CodeMeaning = value, scheme, value
    for keyword, sequence in inside.items():
        setattr(item, keyword, sequence)
    return [item]
