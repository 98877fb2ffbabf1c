"""Which DICOM objects are mammograms: X-ray projections of a breast, by class, Modality, ImageType and body part."""

from collections.abc import Iterator

from pydicom import Dataset
from pydicom.multival import MultiValue
from pydicom.uid import (
    UID,
    BreastProjectionXRayImageStorageForPresentation,
    BreastProjectionXRayImageStorageForProcessing,
    BreastTomosynthesisImageStorage,
    ComputedRadiographyImageStorage,
    DigitalMammographyXRayImageStorageForPresentation,
    DigitalMammographyXRayImageStorageForProcessing,
    DigitalXRayImageStorageForPresentation,
    DigitalXRayImageStorageForProcessing,
    MultiFrameGrayscaleByteSecondaryCaptureImageStorage,
    MultiFrameGrayscaleWordSecondaryCaptureImageStorage,
    SecondaryCaptureImageStorage,
)

from gbci_fast.dicom.file import code_string
from gbci_fast.dicom.view_positions import BODY_VIEWS, MAMMOGRAPHY_VIEWS, UNKNOWN_TERM, stated_view
from gbci_fast.errors import GBCIError

MAMMOGRAPHY = (
    DigitalMammographyXRayImageStorageForPresentation,
    DigitalMammographyXRayImageStorageForProcessing,
    BreastProjectionXRayImageStorageForPresentation,
    BreastProjectionXRayImageStorageForProcessing,
)
CLASSES = (
    *MAMMOGRAPHY,
    DigitalXRayImageStorageForPresentation,
    DigitalXRayImageStorageForProcessing,
    ComputedRadiographyImageStorage,
    SecondaryCaptureImageStorage,
    MultiFrameGrayscaleByteSecondaryCaptureImageStorage,
    MultiFrameGrayscaleWordSecondaryCaptureImageStorage,
)
# Modalities of radiographs of any body part: storage phosphor plates, other detectors, films.
RADIOGRAPHY = ("CR", "DX", "RG")
# Modalities of a Secondary Capture or of an emptied header.
UNSPECIFIC = ("", "OT", "SC")
BREAST = ("BREAST", "MAM")  # parts of vendors' spellings: BREAST, LEFT BREAST, MAMMO, MAMMA, MAMA
# Codes in AnatomicRegionSequence of breast, right, left and both breasts: SNOMED CT, then the retired SNOMED-RT codes.
BREAST_CODES = ("76752008", "73056007", "80248007", "63762007", "T-04000", "T-04020", "T-04030", "T-04080")
BREAST_VIEWS = tuple(view[0] for view in MAMMOGRAPHY_VIEWS)
OTHER_VIEWS = tuple(view[0] for view in BODY_VIEWS)
# Values of ImageType: of parts of a tomosynthesis, and of images that look like a plain mammogram but are not one.
TOMOSYNTHESIS = ("TOMO", "TOMO_PROJ", "TOMOSYNTHESIS")
SYNTHETIC_2D = ("GENERATED_2D", "TOMO_2D")
TYPE_NOTES = {
    **dict.fromkeys(SYNTHETIC_2D, "computed from a tomosynthesis"),
    "POST_CONTRAST": "taken after a contrast agent",
    "SUBTRACTION": "a subtraction of images",
}
# Terms that errors and notes may quote (PS3.3 C.7.3.1.1.1, PS3.16 annex L). Other header text may identify a patient.
MODALITIES = ("MG", *RADIOGRAPHY, "BI", "BMD", "CT", "DR", "DS", "ES", "GM", "IO", "IVUS", "KO", "MR", "NM", "OCT",
              "OT", "PR", "PT", "PX", "REG", "RF", "RTDOSE", "RTIMAGE", "RTPLAN", "RTSTRUCT", "SC", "SEG", "SM", "SR",
              "US", "XA", "XC")  # fmt: skip
BODY_PARTS = ("ABDOMEN", "ANKLE", "ARM", "AXILLA", "CHEST", "CLAVICLE", "CSPINE", "ELBOW", "EXTREMITY", "FEMUR",
              "FINGER", "FOOT", "HAND", "HEAD", "HIP", "HUMERUS", "JAW", "KNEE", "LEG", "LSPINE", "NECK", "PELVIS",
              "RIB", "SHOULDER", "SKULL", "SPECIMEN", "SPINE", "STERNUM", "TSPINE", "WRIST")  # fmt: skip


def check_kind(dataset: Dataset) -> None:
    """Refuses objects that are not 2D mammograms.

    Raises:
        GBCIError: another kind of object, or a radiograph whose header does not name the breast.
    """
    sop_class = dataset.get("SOPClassUID") or _meta_class(dataset)
    name = _name(sop_class)
    if "Rows" not in dataset and name and sop_class not in CLASSES:
        raise GBCIError(f"no pixels ({name}); expected an image")
    if sop_class == BreastTomosynthesisImageStorage:
        raise GBCIError("a breast tomosynthesis object; expected a mammogram (2D)")
    if name and sop_class not in CLASSES:
        raise GBCIError(f"an object of another kind ({name}); expected a mammogram (2D)")
    types = _texts(dataset, "ImageType")
    tomosynthesis = [part for part in types if part in TOMOSYNTHESIS]
    if tomosynthesis and not any(part in SYNTHETIC_2D for part in types):
        raise GBCIError(f"a part of a tomosynthesis (ImageType {tomosynthesis[0]}); expected a mammogram (2D)")
    if sop_class not in MAMMOGRAPHY:
        _check_radiograph(dataset)


def _check_radiograph(dataset: Dataset) -> None:
    """Refuses an object of a general SOP class whose Modality, body part and view do not fit a breast."""
    modality, body = code_string(dataset, "Modality"), code_string(dataset, "BodyPartExamined")
    shown = _term(modality, MODALITIES)
    if modality not in ("MG", *RADIOGRAPHY, *UNSPECIFIC):
        raise GBCIError(f"Modality is {shown}; expected a mammogram (MG, or CR or DX of a breast)")
    if modality == "MG" or _states_breast(dataset):
        return
    if body:
        raise GBCIError(f"Modality is {shown} and BodyPartExamined {_term(body, BODY_PARTS)}; expected a breast")
    if dataset.get("AnatomicRegionSequence"):
        raise GBCIError(f"Modality is {shown} and AnatomicRegionSequence names another part; expected a breast")
    view = stated_view(dataset)
    if modality in RADIOGRAPHY and view not in BREAST_VIEWS:
        raise GBCIError(f"Modality is {shown} and neither a body part nor a view says that it is of a breast")
    if view in OTHER_VIEWS:
        raise GBCIError(f"Modality is {shown} and the view {view}; expected a breast")


def kind_notes(dataset: Dataset) -> Iterator[str]:
    """Short phrases on what is unusual about the kind of an image that passed `check_kind`."""
    modality, body = code_string(dataset, "Modality"), code_string(dataset, "BodyPartExamined")
    if dataset.get("SOPClassUID") in MAMMOGRAPHY and modality not in ("MG", ""):
        yield f"Modality is {_term(modality, MODALITIES)}, though its SOP class is that of a mammogram"
    if _is_mammography(dataset) and body and not _is_breast(body):
        yield f"BodyPartExamined is {_term(body, BODY_PARTS)}"
    if not _is_mammography(dataset) and not _states_breast(dataset):
        yield "neither Modality MG nor a body part is stated: taken as a mammogram"
    yield from dict.fromkeys(TYPE_NOTES[part] for part in _texts(dataset, "ImageType") if part in TYPE_NOTES)


def _is_mammography(dataset: Dataset) -> bool:
    return code_string(dataset, "Modality") == "MG" or dataset.get("SOPClassUID") in MAMMOGRAPHY


def _states_breast(dataset: Dataset) -> bool:
    """Whether BodyPartExamined is a breast, or AnatomicRegionSequence if BodyPartExamined is absent."""
    if body := code_string(dataset, "BodyPartExamined"):
        return _is_breast(body)
    regions = dataset.get("AnatomicRegionSequence") or ()
    return any(
        code_string(item, "CodeValue") in BREAST_CODES or "BREAST" in code_string(item, "CodeMeaning")
        for item in regions
    )


def _term(text: str, known: tuple[str, ...]) -> str:
    """A header's text as errors and notes show it: unchanged if it is a known term, else a placeholder."""
    return text if text in known else UNKNOWN_TERM if text else "not stated"


def _is_breast(body: str) -> bool:
    return any(word in body for word in BREAST)


def _meta_class(dataset: Dataset) -> str | None:
    """The SOP class of the file meta information, the only place where a DICOMDIR states it."""
    return getattr(dataset, "file_meta", Dataset()).get("MediaStorageSOPClassUID")


def _name(sop_class: str | None) -> str:
    """The standard's name of a SOP class; empty where the class is absent, private or unknown."""
    name = UID(sop_class).name if sop_class else ""
    return "" if name == sop_class else name


def _texts(dataset: Dataset, keyword: str) -> list[str]:
    value = dataset.get(keyword) or ()
    return [str(part).strip().upper() for part in (value if isinstance(value, MultiValue) else [value])]
