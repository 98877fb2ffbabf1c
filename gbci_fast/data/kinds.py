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

from gbci_fast.data.views import stated_view
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
# Of any part of the body: storage phosphor plates, other detectors, films.
RADIOGRAPHY = ("CR", "DX", "RG")
# What a Secondary Capture may say, or a header that was emptied.
UNSPECIFIC = ("", "OT", "SC")
BREAST = ("BREAST", "MAM")  # how vendors write it: BREAST, LEFT BREAST, MAMMO, MAMMA, MAMA
# ImageType of images that were computed from a tomosynthesis and look like a mammogram.
SYNTHETIC_2D = "GENERATED_2D"


def check_kind(dataset: Dataset) -> None:
    """Refuses what is not a mammogram (2D).

    Raises:
        GBCIError: another kind of object, or a radiograph that does not say that it is of a breast.
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
    if SYNTHETIC_2D not in types and (tomo := [part for part in types if part.startswith("TOMO")]):
        raise GBCIError(f"a part of a tomosynthesis (ImageType {tomo[0]}); expected a mammogram (2D)")
    modality, body = _text(dataset, "Modality"), _text(dataset, "BodyPartExamined")
    if modality not in ("MG", *RADIOGRAPHY, *UNSPECIFIC):
        raise GBCIError(f"Modality is {modality}; expected a mammogram (MG, or CR or DX of a breast)")
    if _is_mammography(dataset) or _is_breast(body):
        return
    if body:
        raise GBCIError(f"Modality is {modality or 'not stated'} and BodyPartExamined {body}; expected a breast")
    if modality in RADIOGRAPHY and stated_view(dataset) not in ("CC", "MLO"):
        raise GBCIError(f"Modality is {modality} and neither BodyPartExamined nor a view says that it is of a breast")


def kind_notes(dataset: Dataset) -> Iterator[str]:
    """What is unusual about the kind of an image that `check_kind` lets pass."""
    body = _text(dataset, "BodyPartExamined")
    if _is_mammography(dataset) and body and not _is_breast(body):
        yield f"BodyPartExamined is {body}"
    if not _is_mammography(dataset) and not body:
        yield "neither Modality MG nor a body part is stated: taken as a mammogram"
    if SYNTHETIC_2D in _texts(dataset, "ImageType"):
        yield "computed from a tomosynthesis"


def _is_mammography(dataset: Dataset) -> bool:
    return _text(dataset, "Modality") == "MG" or dataset.get("SOPClassUID") in MAMMOGRAPHY


def _is_breast(body: str) -> bool:
    return any(word in body for word in BREAST)


def _meta_class(dataset: Dataset) -> str | None:
    """A DICOMDIR states its class in the file meta information alone."""
    return getattr(dataset, "file_meta", Dataset()).get("MediaStorageSOPClassUID")


def _name(sop_class: str | None) -> str:
    """What the standard calls it; empty where it is absent, private or unknown."""
    name = UID(sop_class).name if sop_class else ""
    return "" if name == sop_class else name


def _text(dataset: Dataset, keyword: str) -> str:
    return str(dataset.get(keyword) or "").strip().upper()


def _texts(dataset: Dataset, keyword: str) -> list[str]:
    value = dataset.get(keyword) or ()
    return [str(part).strip().upper() for part in (value if isinstance(value, MultiValue) else [value])]
