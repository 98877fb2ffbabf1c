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
from gbci_fast.dicom.luts import lut_entries
from gbci_fast.dicom.view_positions import view_modifiers
from gbci_fast.errors import GBCIError
from gbci_fast.jobs.files import atomically

ASSUMED_SPACING = (0.05, 0.05)
COMPRESSIONS = {"none": ExplicitVRLittleEndian, "rle": RLELossless, "jpeg2000": JPEG2000Lossless}

_UID_NAMESPACE = uuid.UUID("6b0c1c0e-8f0f-5d0a-9a53-1d0f8a3e6f11")
_VIEWS = {"CC": ("399162004", "cranio-caudal"), "MLO": ("399368009", "medio-lateral oblique")}
# PatientOrientation (PS3.3 C.7.6.1.1.1): where rows lead to, by the side of the chest wall, and columns.
_ALONG_ROWS = {"L": "A", "R": "P"}
_DOWN_COLUMNS = {("CC", "L"): "R", ("CC", "R"): "L", ("MLO", "L"): "FR", ("MLO", "R"): "FL"}
# What gives the stored values of a source their meaning: modality, padding, VOI and calibrated size.
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
# Of words those that the standard defines; free text may name somebody, and is not copied.
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
# PS3.15 E.1 and the options of CID 7050 that may hold.
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
    """Who, what and when: everything in a file that the pixels do not say. No clock and no random UID is ever used.

    ``spacing`` is in mm per pixel (row, column) in the plane of the breast; ``None`` is written as an assumed 0.05 mm
    and said so in DerivationDescription. ``chest_wall`` is the side of the image, "L" or "R", on which it lies, where
    that is not ``laterality``. ``patient_age`` is in years. ``derivation`` is the text of DerivationDescription.
    ``from_scratch``: rendered without a source image, and so without annotation, implant or partial view.
    ``deidentified``: whether what identifies the source's patient was left out; ``None`` where nobody was imaged.
    ``dates``: whether date and time are the source's ("UNMODIFIED"), shifted ("MODIFIED") or invented ("REMOVED").
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
        if (self.view_position, self.laterality) not in _DOWN_COLUMNS:
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
        """``derivation``, and a sentence about the spacing where it is assumed."""
        if self.spacing is not None:
            return self.derivation
        return f"{self.derivation} Pixel spacing unknown; {ASSUMED_SPACING[0]} mm assumed.".lstrip()


def uid_from_seed(*parts: object) -> str:
    """The same UID for the same parts, anywhere and always: ``2.25.<UUID version 5>`` (PS3.5 B.2)."""
    return f"2.25.{uuid.uuid5(_UID_NAMESPACE, chr(31).join(map(str, parts))).int}"


def mammogram_dataset(
    stored: np.ndarray,  # [H, W] uint8, uint16, int8 or int16
    header: MammogramHeader,
    *,
    like: Dataset | None = None,
    window: tuple[float, float] | None = None,
    lut: tuple[int, np.ndarray] | None = None,
) -> Dataset:
    """A mammogram For Presentation whose stored values mean what they mean in ``like``.

    Args:
        stored: the pixels, written as they are.
        header: identity, geometry and provenance.
        like: header of the source image; its photometric interpretation, bit depth, modality transform, VOI, padding,
            calibrated spacing, magnification, view modifiers, and what it says of annotations, implants and lossy
            compression are kept as numbers and defined terms, and nothing else: no patient data, no free text, and
            of the first Modality and VOI LUT descriptor and data alone. Without it: MONOCHROME2, all bits of the dtype.
            (The standard allows unsigned pixels and an identity rescale only. Other sources are kept as they are,
            because changing them would change every stored value.) BurnedInAnnotation must be stated: where the
            source does not, nobody has looked, and it is YES.
        window: WindowCenter and WindowWidth (linear, after the modality transform), used where ``like`` has no VOI.
            Without any: the full range.
        lut: VOI LUT as in `Presentation`, used instead of whatever ``like`` has.

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
    """Writes the file whole or not at all; ``compression`` is lossless: "none", "rle" or "jpeg2000".

    Raises:
        GBCIError: an unknown compression.
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
    """RLE codes whole cells (PS3.5 G.2), but its encoder would take 8 bits stored in 16 to be cells of 8."""
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
    """Patient, General Study, SOP Common and the provenance attributes of General Image and Enhanced Equipment."""
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
    """Mammography Image, DX Anatomy Imaged, DX Detector and DX Positioning."""
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
        _DOWN_COLUMNS[header.view_position, header.laterality],
    ]
    factor = magnification(like) if like is not None else 1.0
    dataset.ImagerPixelSpacing = _decimals(part * factor for part in header.spacing or ASSUMED_SPACING)


def _set_pixels(dataset: Dataset, stored: np.ndarray, like: Dataset | None) -> None:
    """Image Pixel, with the photometric interpretation and bit depth of ``like``."""
    if stored.ndim != 2 or stored.dtype not in (np.uint8, np.uint16, np.int8, np.int16):
        raise GBCIError(f"pixels are {stored.dtype} {list(stored.shape)}; expected [H, W] uint8, uint16, int8 or int16")
    bits = 8 * stored.dtype.itemsize
    bits_stored = int(like.BitsStored) if like is not None else bits
    lowest, highest = _stored_range(bits_stored, signed=stored.dtype.kind == "i")
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
    """What a header says of `keyword` in terms that the standard defines (`_WORDS`); other text counts as nothing."""
    value = dataset.get(keyword) if dataset is not None else None
    words = value if isinstance(value, list | MultiValue) else [value or ""]
    return [word for each in words if (word := str(each).strip().upper()) in _WORDS[keyword]]


def _copy_meaning(dataset: Dataset, like: Dataset, unless: Collection[str]) -> None:
    """Numbers, defined terms and the LUT in use of `like`, element by element."""
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
    """A LUT without what else its item holds, in little endian: words (OW) lie in memory as they did in the file."""
    table = Dataset()
    table["LUTDescriptor"] = copy.deepcopy(item["LUTDescriptor"])
    table["LUTData"] = copy.deepcopy(item["LUTData"])
    if isinstance(item.LUTData, bytes):
        entries = lut_entries(item, big_endian=big_endian)
        if entries.itemsize == 1:  # of bytes there is no order
            table.LUTData = entries.tobytes() + b"\0" * (entries.size % 2)
        else:
            table.LUTData = entries.astype("<u2").tobytes()
    if keyword == "ModalityLUTSequence":
        unit = str(item.get("ModalityLUTType") or "").strip().upper()
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
    """Modality LUT, VOI LUT and Presentation LUT Shape: how stored values become brightness."""
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
    # Bright is dense: in MONOCHROME2 a higher value is less X-ray at the detector, in MONOCHROME1 more.
    if dataset.get("PixelIntensityRelationshipSign") not in (1, -1):
        dataset.PixelIntensityRelationshipSign = 1 if inverted else -1


def _set_assurances(dataset: Dataset, header: MammogramHeader) -> None:
    """What has to be stated and the source did not state; nothing is claimed that nobody looked at."""
    dataset.setdefault("LossyImageCompression", "00")
    dataset.setdefault("BurnedInAnnotation", "NO" if header.from_scratch else "YES")
    if header.from_scratch:
        dataset.BreastImplantPresent = dataset.PartialView = "NO"
    if header.dates is not None:
        dataset.LongitudinalTemporalInformationModified = header.dates
    if header.deidentified is not None:
        _set_deidentification(dataset, header)


def _set_deidentification(dataset: Dataset, header: MammogramHeader) -> None:
    """Says what was done, after PS3.15 E.1; text in the pixels that nobody has ruled out may still name the patient."""
    removed = header.deidentified and dataset.BurnedInAnnotation == "NO"
    dataset.PatientIdentityRemoved = "YES" if removed else "NO"
    if removed:
        dataset.DeidentificationMethod = "header rebuilt after the PS3.15 Basic Profile"
        done = (_PROFILE, *([_MODIFIED_DATES] if header.dates == "MODIFIED" else []),
                *([_CHARACTERISTICS] if header.patient_age is not None else []))  # fmt: skip
        dataset.DeidentificationMethodCodeSequence = Sequence(_code(code, "DCM", meaning)[0] for code, meaning in done)


def _lut_sequence(first: int, table: np.ndarray) -> Sequence:
    """A VOI LUT of 16 bits; its first input value is two's complement where it is negative."""
    item = Dataset()
    item.add_new("LUTDescriptor", "US", [len(table) & 0xFFFF, first & 0xFFFF, 16])
    item.add_new("LUTData", "OW", np.ascontiguousarray(table, "<u2").tobytes())
    return Sequence([item])


def _full_window(dataset: Dataset) -> tuple[float, float]:
    """Center and width that map the whole output of the modality transform onto black to white (PS3.3 C.11.2.1.2)."""
    if "ModalityLUTSequence" in dataset:
        first, last = 0, 2 ** int(dataset.ModalityLUTSequence[0].LUTDescriptor[2]) - 1
    else:
        values = _stored_range(dataset.BitsStored, signed=dataset.PixelRepresentation == 1)
        first, last = sorted(float(dataset.RescaleSlope) * v + float(dataset.RescaleIntercept) for v in values)
    return (first + last + 1) / 2, last - first + 1


def _stored_range(bits_stored: int, *, signed: bool) -> tuple[int, int]:
    return (-(2 ** (bits_stored - 1)), 2 ** (bits_stored - 1) - 1) if signed else (0, 2**bits_stored - 1)


def _decimals(values: Iterable[float]) -> list[DSfloat]:
    return [DSfloat(float(value), auto_format=True) for value in values]


def _code(value: str, scheme: str, meaning: str) -> Sequence:
    item = Dataset()
    item.CodeValue = value
    item.CodingSchemeDesignator = scheme
    item.CodeMeaning = meaning
    return Sequence([item])
