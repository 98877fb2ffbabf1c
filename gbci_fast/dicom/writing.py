"""Writes Digital Mammography X-Ray Image For Presentation (DICOM PS3.3 A.26 and C.8.11), deterministically."""

import copy
import os
import uuid
from collections.abc import Collection, Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
from pydicom.dataelem import DataElement
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.multival import MultiValue
from pydicom.sequence import Sequence
from pydicom.uid import (
    UID,
    DigitalMammographyXRayImageStorageForPresentation,
    ExplicitVRLittleEndian,
    JPEG2000Lossless,
    RLELossless,
)
from pydicom.valuerep import DSfloat

from gbci_fast.dicom.acquisition import magnification
from gbci_fast.dicom.complaints import CODEC_LOCK
from gbci_fast.dicom.file import code_string
from gbci_fast.dicom.luts import lut_entries
from gbci_fast.dicom.presentation import stored_range
from gbci_fast.dicom.view_positions import DOWN_COLUMNS, MAMMOGRAPHY_VIEWS, view_modifiers
from gbci_fast.errors import GBCIError
from gbci_fast.jobs.files import atomically

ASSUMED_SPACING = (0.05, 0.05)
COMPRESSIONS = {"none": ExplicitVRLittleEndian, "rle": RLELossless, "jpeg2000": JPEG2000Lossless}

_UID_NAMESPACE = uuid.UUID("6b0c1c0e-8f0f-5d0a-9a53-1d0f8a3e6f11")
_VIEWS = {name: (code, meaning) for name, code, _, meaning, *_ in MAMMOGRAPHY_VIEWS}
# PatientOrientation (PS3.3 C.7.6.1.1.1): direction of the rows by the side of the chest wall.
_ALONG_ROWS = {"L": "A", "R": "P"}
# Attributes that give a source's stored values their meaning: modality, padding, VOI and calibrated size.
_VOI = ("WindowCenter", "WindowWidth", "VOILUTFunction", "VOILUTSequence")
_NUMBERS = (
    "RescaleIntercept",
    "RescaleSlope",
    "WindowCenter",
    "WindowWidth",
    "PixelPaddingValue",
    "PixelPaddingRangeLimit",
    "PixelSpacing",
    "LossyImageCompressionRatio",
    "PixelIntensityRelationshipSign",
    "EstimatedRadiographicMagnificationFactor",
)
# Defined terms that are copied from a source. Free text is not copied: it may identify a patient.
_YES_NO = ("YES", "NO")
_MODALITY_UNITS = ("OD", "HU", "US", "MGML", "Z_EFF", "ED", "EDW", "HU_MOD", "PCT")
_WORDS = {
    "RescaleType": _MODALITY_UNITS,
    "VOILUTFunction": ("LINEAR", "LINEAR_EXACT", "SIGMOID"),
    "PixelSpacingCalibrationType": ("GEOMETRY", "FIDUCIAL"),
    "BurnedInAnnotation": _YES_NO,
    "BreastImplantPresent": _YES_NO,
    "PartialView": _YES_NO,
    "PixelIntensityRelationship": ("LIN", "LOG"),
    # Once lossy, always lossy: a lossless copy of a lossy image still says so.
    "LossyImageCompression": ("00", "01"),
    "LossyImageCompressionMethod": (
        "ISO_10918_1",
        "ISO_14495_1",
        "ISO_15444_1",
        "ISO_15444_15",
        "ISO_18181_1",
        "ISO_13818_2",
        "ISO_14496_10",
        "ISO_23008_2",
    ),
}
_TABLES = ("ModalityLUTSequence", "VOILUTSequence")
# De-identification methods (PS3.15 E.1, PS3.16 CID 7050): the profile and the options that may apply.
_PROFILE = ("113100", "Basic Application Confidentiality Profile")
_MODIFIED_DATES = ("113107", "Retain Longitudinal Temporal Information Modified Dates Option")
_CHARACTERISTICS = ("113108", "Retain Patient Characteristics Option")


@dataclass(frozen=True, kw_only=True)
class SourceImage:
    """The image that a derived one was made from."""

    sop_class_uid: str
    sop_instance_uid: str


@dataclass(frozen=True, kw_only=True)
class MammogramHeader:
    """Identity, geometry and provenance of a file to write. Nothing else is used: no clock and no random UIDs.

    Attributes:
        view_position: "CC" or "MLO".
        laterality: "L" or "R".
        derivation: text of DerivationDescription.
        synthetic: value of SyntheticData.
        spacing: mm per pixel (row, column) in the plane of the breast. ``None`` is written as an assumed 0.05 mm, which
            DerivationDescription then states.
        chest_wall: side of the image, "L" or "R", at which the chest wall lies; ``None`` = the side of ``laterality``.
        patient_age: years.
        from_scratch: rendered without a source image, and so without annotation, implant or partial view.
        deidentified: whether everything that identifies the source's patient was left out; ``None`` if there is no
            patient.
        dates: date and time are those of the source ("UNMODIFIED"), shifted ("MODIFIED") or invented ("REMOVED").

    Raises:
        GBCIError: an illegal view, side or ``chest_wall``, or a ``derivation`` that exceeds DICOM's 1024 characters.
    """

    view_position: str
    laterality: str
    study_uid: str
    series_uid: str
    instance_uid: str
    study_datetime: datetime
    patient_id: str
    software_version: str
    derivation: str
    synthetic: bool = True
    source: SourceImage | None = None
    spacing: tuple[float, float] | None = None
    chest_wall: str | None = None
    patient_age: float | None = None
    from_scratch: bool = False
    deidentified: bool | None = None
    dates: str | None = None
    series_number: int = 1
    instance_number: int = 1

    def __post_init__(self):
        if (self.view_position, self.laterality) not in DOWN_COLUMNS:
            raise GBCIError(
                f"image of patient {self.patient_id!r} has view {self.view_position!r} and side {self.laterality!r}; "
                "a mammogram For Presentation needs view CC or MLO and side L or R"
            )
        if self.chest_wall not in (None, *_ALONG_ROWS):
            raise GBCIError(f"chest_wall is {self.chest_wall!r}; expected L, R or None")
        if len(self.derivation_description) > 1024:
            raise GBCIError(f"derivation has {len(self.derivation)} characters; DICOM holds at most 1024")

    @property
    def derivation_description(self) -> str:
        """``derivation``, followed by a sentence about the spacing if that is assumed."""
        if self.spacing is not None:
            return self.derivation
        return f"{self.derivation} Pixel spacing unknown; {ASSUMED_SPACING[0]} mm assumed.".lstrip()


def uid_from_seed(*parts: object) -> str:
    """A UID that depends on ``parts`` alone: ``2.25.<UUID version 5>`` (PS3.5 B.2)."""
    return f"2.25.{uuid.uuid5(_UID_NAMESPACE, chr(31).join(map(str, parts))).int}"


def mammogram_dataset(
    stored: np.ndarray,  # [H, W] uint8, uint16, int8 or int16
    header: MammogramHeader,
    *,
    like: Dataset | None = None,
    window: tuple[float, float] | None = None,
    lut: tuple[int, np.ndarray] | None = None,
) -> Dataset:
    """A mammogram For Presentation whose stored values have the same meaning as in ``like``.

    The standard allows only unsigned pixels and an identity rescale. Other sources keep theirs, because a conversion
    would change every stored value. BurnedInAnnotation is mandatory: YES if ``like`` does not state it, because nobody
    has looked.

    Args:
        stored: the pixels, written unchanged.
        header: identity, geometry and provenance.
        like: header of the source image. Copied are its photometric interpretation, bit depth, modality transform, VOI,
            padding, calibrated spacing, magnification, view modifiers, and its statements on annotations, implants and
            lossy compression: only numbers, defined terms, and descriptor and data of the first Modality and VOI LUT.
            Patient data and free text are not copied. ``None``: MONOCHROME2, all bits of the dtype.
        window: WindowCenter and WindowWidth (linear, after the modality transform), used if ``like`` has no VOI.
            ``None``: the full range.
        lut: VOI LUT as in `Presentation`, used instead of the VOI of ``like``.

    Raises:
        GBCIError: pixels that are not [H, W] of those types, or do not fit the bit depth of ``like``.
    """
    dataset = Dataset()
    _set_general(dataset, header)
    _set_series(dataset, header)
    _set_geometry(dataset, header, like)
    _set_pixels(dataset, stored, like)
    _set_display(dataset, like, window, lut)
    _set_assurances(dataset, header)
    return dataset


def write_dicom(dataset: Dataset, path: str | os.PathLike[str], *, compression: str = "none") -> None:
    """Writes a data set to a DICOM file, atomically.

    Args:
        compression: "none", "rle" or "jpeg2000"; all are lossless.

    Raises:
        GBCIError: an unknown compression.
        OSError: the file cannot be written.
    """
    if compression not in COMPRESSIONS:
        raise GBCIError(f"compression is {compression!r}; expected one of {', '.join(COMPRESSIONS)}")
    path = Path(path)
    output = copy.deepcopy(dataset)
    output.file_meta = _file_meta(dataset)
    if compression != "none":
        _compress(output, COMPRESSIONS[compression])
    encoding = {"implicit_vr": False, "little_endian": True, "enforce_file_format": True}
    atomically(path, lambda temporary: output.save_as(temporary, **encoding))


def _compress(dataset: Dataset, syntax: UID) -> None:
    """Compresses the pixels in place, losslessly.

    RLE encodes whole cells (PS3.5 G.2), but pydicom's encoder takes 8 bits stored in 16 for cells of 8 bits. So
    BitsStored is BitsAllocated while it runs.
    """
    stated = dataset.BitsStored
    if syntax == RLELossless:
        dataset.BitsStored, dataset.HighBit = dataset.BitsAllocated, dataset.BitsAllocated - 1
    with CODEC_LOCK if syntax == JPEG2000Lossless else nullcontext():
        dataset.compress(syntax, encoding_plugin="pylibjpeg", generate_instance_uid=False)
    dataset.BitsStored, dataset.HighBit = stated, stated - 1


def _file_meta(dataset: Dataset) -> FileMetaDataset:
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = dataset.SOPClassUID
    meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    meta.ImplementationClassUID = UID(uid_from_seed("gbci_fast", "implementation"))
    meta.ImplementationVersionName = "GBCI_FAST"
    return meta


def _set_general(dataset: Dataset, header: MammogramHeader) -> None:
    """Sets Patient, General Study, SOP Common, and the provenance in General Image and Enhanced Equipment."""
    dataset.SpecificCharacterSet = "ISO_IR 192"
    dataset.ImageType = ["DERIVED", "PRIMARY", ""]
    dataset.SOPClassUID = DigitalMammographyXRayImageStorageForPresentation
    dataset.SOPInstanceUID = header.instance_uid
    dataset.SyntheticData = "YES" if header.synthetic else "NO"
    dataset.StudyDate = dataset.ContentDate = header.study_datetime.strftime("%Y%m%d")
    dataset.StudyTime = dataset.ContentTime = header.study_datetime.strftime("%H%M%S")
    dataset.AccessionNumber = ""
    dataset.ReferringPhysicianName = ""
    dataset.PatientName = "Anonymous"
    dataset.PatientID = header.patient_id
    dataset.PatientBirthDate = ""
    dataset.PatientSex = ""
    if header.patient_age is not None:
        dataset.PatientAge = f"{round(header.patient_age):03d}Y"
    dataset.StudyInstanceUID = header.study_uid
    dataset.StudyID = ""
    dataset.DerivationDescription = header.derivation_description
    if header.source is not None:
        source = Dataset()
        source.ReferencedSOPClassUID = header.source.sop_class_uid
        source.ReferencedSOPInstanceUID = header.source.sop_instance_uid
        source.SpatialLocationsPreserved = "YES"
        source.PurposeOfReferenceCodeSequence = _code("121322", "DCM", "Source image for image processing operation")
        dataset.SourceImageSequence = Sequence([source])
    equipment = Dataset()
    equipment.PurposeOfReferenceCodeSequence = _code("109100", "DCM", "Synthesizing Equipment")
    equipment.Manufacturer = "gbci_fast"
    equipment.ManufacturerModelName = "gbci_fast"
    equipment.SoftwareVersions = header.software_version
    dataset.ContributingEquipmentSequence = Sequence([equipment])


def _set_series(dataset: Dataset, header: MammogramHeader) -> None:
    dataset.Modality = "MG"
    dataset.PresentationIntentType = "FOR PRESENTATION"
    dataset.Manufacturer = "gbci_fast"
    dataset.ManufacturerModelName = "gbci_fast"
    dataset.SoftwareVersions = header.software_version
    dataset.SeriesInstanceUID = header.series_uid
    dataset.SeriesNumber = header.series_number
    dataset.InstanceNumber = header.instance_number


def _set_geometry(dataset: Dataset, header: MammogramHeader, like: Dataset | None) -> None:
    """Sets the modules Mammography Image, DX Anatomy Imaged, DX Detector and DX Positioning."""
    dataset.BodyPartExamined = "BREAST"
    dataset.OrganExposed = "BREAST"
    dataset.AnatomicRegionSequence = _code("76752008", "SCT", "Breast")
    dataset.AcquisitionContextSequence = Sequence()
    dataset.PositionerType = "MAMMOGRAPHIC"
    dataset.DetectorType = ""
    dataset.ViewPosition = header.view_position
    value, meaning = _VIEWS[header.view_position]
    dataset.ViewCodeSequence = _code(value, "SCT", meaning)
    modifiers = view_modifiers(like) if like is not None else ()
    dataset.ViewCodeSequence[0].ViewModifierCodeSequence = Sequence(
        _code(code, "SCT", meaning)[0] for code, meaning in modifiers
    )
    dataset.ImageLaterality = header.laterality
    dataset.PatientOrientation = [
        _ALONG_ROWS[header.chest_wall or header.laterality],
        DOWN_COLUMNS[header.view_position, header.laterality],
    ]
    factor = magnification(like) if like is not None else 1.0
    dataset.ImagerPixelSpacing = _decimals(part * factor for part in header.spacing or ASSUMED_SPACING)


def _set_pixels(dataset: Dataset, stored: np.ndarray, like: Dataset | None) -> None:
    """Sets the module Image Pixel, with the photometric interpretation and bit depth of ``like``."""
    if stored.ndim != 2 or stored.dtype not in (np.uint8, np.uint16, np.int8, np.int16):
        raise GBCIError(f"pixels are {stored.dtype} {list(stored.shape)}; expected [H, W] uint8, uint16, int8 or int16")
    bits = 8 * stored.dtype.itemsize
    bits_stored = int(like.BitsStored) if like is not None else bits
    lowest, highest = stored_range(bits_stored, signed=stored.dtype.kind == "i")
    if bits_stored > bits or stored.min() < lowest or stored.max() > highest:
        raise GBCIError(
            f"stored values go from {stored.min()} to {stored.max()} in {stored.dtype}; "
            f"expected {lowest} to {highest} for {bits_stored} bits"
        )
    dataset.SamplesPerPixel = 1
    dataset.PhotometricInterpretation = like.PhotometricInterpretation if like is not None else "MONOCHROME2"
    dataset.Rows, dataset.Columns = stored.shape
    dataset.BitsAllocated = bits
    dataset.BitsStored = bits_stored
    dataset.HighBit = bits_stored - 1
    dataset.PixelRepresentation = int(stored.dtype.kind == "i")
    pixels = np.ascontiguousarray(stored, dtype=stored.dtype.newbyteorder("<")).tobytes()
    dataset.add_new("PixelData", "OB" if bits == 8 else "OW", pixels + b"\0" * (len(pixels) % 2))


def stated(dataset: Dataset | None, keyword: str) -> list[str]:
    """The values of ``keyword`` in a header that are defined terms (`_WORDS`); other text is left out."""
    value = dataset.get(keyword) if dataset is not None else None
    words = value if isinstance(value, list | MultiValue) else [value or ""]
    return [word for each in words if (word := str(each).strip().upper()) in _WORDS[keyword]]


def _copy_meaning(dataset: Dataset, like: Dataset, unless: Collection[str]) -> None:
    """Copies the numbers, defined terms and first LUTs of ``like``, except the keywords in ``unless``."""
    for keyword in (*_NUMBERS, *_WORDS, *_TABLES):
        if keyword in unless or keyword not in like or like[keyword].is_empty:
            continue
        if keyword in _TABLES:
            big_endian = like.original_encoding[1] is False
            in_use = like[keyword].value[0]
            table = _copied_table(in_use, keyword, big_endian=big_endian)
            dataset[keyword] = DataElement(like[keyword].tag, "SQ", Sequence([table]))
        elif keyword in _NUMBERS and _is_number(like[keyword].value):
            dataset[keyword] = copy.deepcopy(like[keyword])
        elif keyword in _WORDS and (words := stated(like, keyword)):
            setattr(dataset, keyword, words if len(words) > 1 else words[0])
    if "PixelSpacingCalibrationType" in dataset:
        dataset.PixelSpacingCalibrationDescription = "as stated by the source image"


def _copied_table(item: Dataset, keyword: str, *, big_endian: bool) -> Dataset:
    """A LUT's descriptor and data in little endian, without the rest of its item.

    pydicom keeps OW values in the byte order of the file.
    """
    table = Dataset()
    table["LUTDescriptor"] = copy.deepcopy(item["LUTDescriptor"])
    table["LUTData"] = copy.deepcopy(item["LUTData"])
    if isinstance(item.LUTData, bytes):
        entries = lut_entries(item, big_endian=big_endian)
        if entries.itemsize == 1:  # single bytes have no byte order
            table.LUTData = entries.tobytes() + b"\0" * (entries.size % 2)
        else:
            table.LUTData = entries.astype("<u2").tobytes()
    if keyword == "ModalityLUTSequence":
        unit = code_string(item, "ModalityLUTType")
        table.ModalityLUTType = unit if unit in _MODALITY_UNITS else "US"  # unspecified
    return table


def _is_number(value: Any) -> bool:
    try:
        for part in value if isinstance(value, list | MultiValue) else [value]:
            float(part)
    except (TypeError, ValueError):
        return False
    return True


def _set_display(
    dataset: Dataset,
    like: Dataset | None,
    window: tuple[float, float] | None,
    lut: tuple[int, np.ndarray] | None,
) -> None:
    """Sets Modality LUT, VOI LUT and Presentation LUT Shape: how stored values become brightness."""
    if like is not None:
        _copy_meaning(dataset, like, unless=() if lut is None else _VOI)
    if "ModalityLUTSequence" not in dataset:
        for keyword, identity in (("RescaleIntercept", 0), ("RescaleSlope", 1), ("RescaleType", "US")):
            dataset.setdefault(keyword, identity)
    if lut is not None:
        dataset.VOILUTSequence = _lut_sequence(*lut)
    elif "WindowCenter" not in dataset and "VOILUTSequence" not in dataset:
        center, width = _full_window(dataset) if window is None else window
        dataset.WindowCenter, dataset.WindowWidth = _decimals((center, width))
    inverted = dataset.PhotometricInterpretation == "MONOCHROME1"
    dataset.PresentationLUTShape = "INVERSE" if inverted else "IDENTITY"
    dataset.setdefault("PixelIntensityRelationship", "LOG")
    # Bright is dense: a higher value means less X-ray at the detector in MONOCHROME2, more in MONOCHROME1.
    if dataset.get("PixelIntensityRelationshipSign") not in (1, -1):
        dataset.PixelIntensityRelationshipSign = 1 if inverted else -1


def _set_assurances(dataset: Dataset, header: MammogramHeader) -> None:
    """Sets mandatory statements that the source lacks, cautiously: what nobody has checked is not ruled out."""
    dataset.setdefault("LossyImageCompression", "00")
    dataset.setdefault("BurnedInAnnotation", "NO" if header.from_scratch else "YES")
    if header.from_scratch:
        dataset.BreastImplantPresent = dataset.PartialView = "NO"
    if header.dates is not None:
        dataset.LongitudinalTemporalInformationModified = header.dates
    if header.deidentified is not None:
        _set_deidentification(dataset, header)


def _set_deidentification(dataset: Dataset, header: MammogramHeader) -> None:
    """Sets the de-identification attributes (PS3.15 E.1). YES requires that burned-in text is ruled out, too."""
    removed = header.deidentified and dataset.BurnedInAnnotation == "NO"
    dataset.PatientIdentityRemoved = "YES" if removed else "NO"
    if removed:
        dataset.DeidentificationMethod = "header rebuilt after the PS3.15 Basic Profile"
        done = (_PROFILE, *([_MODIFIED_DATES] if header.dates == "MODIFIED" else []),
                *([_CHARACTERISTICS] if header.patient_age is not None else []))  # fmt: skip
        dataset.DeidentificationMethodCodeSequence = Sequence(_code(code, "DCM", meaning)[0] for code, meaning in done)


def _lut_sequence(first: int, table: np.ndarray) -> Sequence:
    """VOILUTSequence with one LUT of 16 bits. A negative first input value is written in two's complement."""
    item = Dataset()
    item.add_new("LUTDescriptor", "US", [len(table) & 0xFFFF, first & 0xFFFF, 16])
    item.add_new("LUTData", "OW", np.ascontiguousarray(table, "<u2").tobytes())
    return Sequence([item])


def _full_window(dataset: Dataset) -> tuple[float, float]:
    """Center and width that map the whole output range of the modality transform to [0, 1] (PS3.3 C.11.2.1.2)."""
    if "ModalityLUTSequence" in dataset:
        first, last = 0, 2 ** int(dataset.ModalityLUTSequence[0].LUTDescriptor[2]) - 1
    else:
        values = stored_range(dataset.BitsStored, signed=dataset.PixelRepresentation == 1)
        first, last = sorted(float(dataset.RescaleSlope) * v + float(dataset.RescaleIntercept) for v in values)
    return (first + last + 1) / 2, last - first + 1


def _decimals(values: Iterable[float]) -> list[DSfloat]:
    return [DSfloat(float(value), auto_format=True) for value in values]


def _code(value: str, scheme: str, meaning: str) -> Sequence:
    item = Dataset()
    item.CodeValue = value
    item.CodingSchemeDesignator = scheme
    item.CodeMeaning = meaning
    return Sequence([item])
