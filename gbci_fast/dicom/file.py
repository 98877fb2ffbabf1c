"""Reads a DICOM data set from a file, with or without the preamble that PS3.10 requires, and values from a data set."""

import re
from pathlib import Path

import pydicom
from pydicom import Dataset
from pydicom.datadict import tag_for_keyword
from pydicom.multival import MultiValue
from pydicom.uid import ExplicitVRBigEndian, ExplicitVRLittleEndian, ImplicitVRLittleEndian

from gbci_fast.dicom.bounds import MAX_READS, BoundedDicom, check_short_values
from gbci_fast.errors import GBCIError

MAGIC_LENGTH = 132
LUT_ELEMENTS = [tag_for_keyword(name) for name in ("LUTDescriptor", "LUTExplanation", "ModalityLUTType", "LUTData")]
DICOM_MAGIC = b"DICM"  # after a preamble of 128 bytes, PS3.10 section 7.1
# Older software wrote the data set alone. It begins with a short element of group 2 or 8, in either byte order, with
# an explicit VR or a length of at most 65535.
_BARE = re.compile(rb"[\x02\x08]\0.\0(?:[A-Z]{2}|..\0\0)|\0\x08\0.[A-Z]{2}", re.DOTALL)


def is_dicom(head: bytes) -> bool:
    """Whether the first `MAGIC_LENGTH` bytes of a file are those of a DICOM file with a preamble."""
    return head[128:] == DICOM_MAGIC


def is_bare_dicom(head: bytes) -> bool:
    """Whether the first bytes of a file can begin a data set without a preamble. Other formats may match, too."""
    return _BARE.match(head) is not None


def read_dataset(path: Path, *, stop_before_pixels: bool = False) -> Dataset:
    """Reads a data set. Its ``file_meta`` states a transfer syntax even where the file does not.

    Raises:
        GBCIError: the file is cut short, has too many elements, or holds encoded pixels without a transfer syntax.
        OSError: the file cannot be opened or read.
    """
    with BoundedDicom(path) as file:
        try:
            dataset = pydicom.dcmread(file, stop_before_pixels=stop_before_pixels, force=True)
        except (EOFError, OSError) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise
            if not file.overrun:
                raise GBCIError("damaged or not decodable (an element or sequence has no end); cut short") from error
        if file.overrun:  # pydicom may turn the EOFError into a shorter data set
            raise GBCIError(f"more than {MAX_READS // 4} elements and items; expected an image")
    if "TransferSyntaxUID" not in dataset.file_meta:
        if "PixelData" in dataset and dataset["PixelData"].is_undefined_length:
            raise GBCIError("no TransferSyntaxUID, so its encoded pixels cannot be decoded; expected one")
        implicit, little = dataset.original_encoding
        explicit = ExplicitVRLittleEndian if little else ExplicitVRBigEndian
        dataset.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian if implicit else explicit
    if photometric := dataset.get("PhotometricInterpretation"):  # leading spaces are not significant (PS3.5 6.2)
        dataset.PhotometricInterpretation = str(photometric).strip(" \0")
    return dataset


def numbers(dataset: Dataset, keyword: str) -> list[float]:
    """The values of a numeric attribute; an empty list where the attribute is absent or blank.

    Raises:
        GBCIError: a value is not a number, such as one with a decimal comma.
    """
    try:
        value = dataset.get(keyword)
        if value is None or value == "":
            return []
        return [float(part) for part in (value if isinstance(value, list | MultiValue) else [value])]
    except (ValueError, TypeError, OverflowError):
        raw = dataset.get_item(keyword).value
        text = raw.decode("latin-1") if isinstance(raw, bytes) else raw
        text = "\\".join(map(str, text)) if isinstance(text, list | MultiValue) else str(text).strip()
        raise GBCIError(f"{keyword} is {text!r}; expected numbers with a decimal point") from None


def first_number(dataset: Dataset, keyword: str) -> float | None:
    """The first of `numbers`; None where the attribute is absent or blank."""
    return next(iter(numbers(dataset, keyword)), None)


def code_string(dataset: Dataset, keyword: str) -> str:
    """The text of an attribute in capitals, without spaces around it; empty where the attribute is absent or blank."""
    return str(dataset.get(keyword) or "").strip().upper()


def trim_luts(dataset: Dataset) -> None:
    """Deletes everything but the LUT from the items of Modality and VOI LUTs, such as endlessly nested sequences."""
    for keyword in ("ModalityLUTSequence", "VOILUTSequence"):
        for item in dataset.get(keyword) or ():
            for tag in set(item.keys()).difference(LUT_ELEMENTS):
                del item[tag]


def flatten_functional_groups(dataset: Dataset) -> None:
    """Copies the functional groups of an enhanced single-frame image to the top level, where a plain image has them.

    The groups are Frame VOI LUT, Pixel Value Transformation, Pixel Measures, … (PS3.3 C.7.6.16), with one item each.
    Attributes that the top level already states are kept.
    """
    for keyword in ("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence"):
        groups = dataset.get(keyword)
        for macro in groups[0] if groups else ():
            if macro.VR == "SQ" and len(macro.value) == 1:
                check_short_values(macro.value[0])
                for element in macro.value[0]:
                    if element.tag not in dataset:
                        dataset.add(element)
