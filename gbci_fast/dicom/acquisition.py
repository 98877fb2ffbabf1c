"""Acquisition data of a mammogram: pixel spacing in the plane of the breast, patient age, and notes for the user."""

import re
from collections.abc import Iterator

from pydicom import Dataset

from gbci_fast.dicom.file import code_string, first_number, numbers
from gbci_fast.dicom.presentation import Presentation, is_for_processing
from gbci_fast.dicom.view_positions import MAGNIFICATION, view_modifiers
from gbci_fast.errors import GBCIError

# Plausible spacing in mm per pixel, from a fine film scan to a thumbnail.
MIN_SPACING, MAX_SPACING = 0.01, 10.0
MAX_MAGNIFICATION = 10.0
# Contact views are magnified by a few percent, too: the breast has a thickness. Only larger factors are noted.
NOTED_MAGNIFICATION = 1.2
NOTED_ASPECT = 1.01


def spacing(dataset: Dataset) -> tuple[float, float] | None:
    """mm per pixel (between rows, between columns) in the plane of the breast; ``None`` where no attribute states it.

    The first of ImagerPixelSpacing, PixelSpacing and NominalScannedPixelSpacing counts. ImagerPixelSpacing is measured
    at the detector and is divided by `magnification` (PS3.3 C.8.7.10); the others are taken as they are.

    Raises:
        GBCIError: an implausible value. A missing spacing has a documented default; a wrong spacing would silently
            mis-scale every lesion.
    """
    for keyword in ("ImagerPixelSpacing", "PixelSpacing", "NominalScannedPixelSpacing"):
        values = numbers(dataset, keyword)
        if not values:
            continue
        if len(values) != 2 or not all(MIN_SPACING <= part <= MAX_SPACING for part in values):
            raise GBCIError(
                f"{keyword} is {dataset.get(keyword)}; expected two numbers from {MIN_SPACING} to {MAX_SPACING} mm"
            )
        factor = magnification(dataset) if keyword == "ImagerPixelSpacing" else 1.0
        return values[0] / factor, values[1] / factor
    return None


def magnification(dataset: Dataset) -> float:
    """EstimatedRadiographicMagnificationFactor: size at the detector divided by size in the breast; 1 where unstated.

    Raises:
        GBCIError: a factor below 1 or above `MAX_MAGNIFICATION`.
    """
    value = first_number(dataset, "EstimatedRadiographicMagnificationFactor")
    if not value:
        return 1.0
    if not 1 <= value <= MAX_MAGNIFICATION:
        raise GBCIError(
            f"EstimatedRadiographicMagnificationFactor is {value}; expected a number from 1 to {MAX_MAGNIFICATION:g}"
        )
    return value


def age(dataset: Dataset) -> float | None:
    """PatientAge (``045Y``; PS3.5 6.2, AS) in years; malformed or impossible values count as unknown."""
    match = re.fullmatch(r"(\d{1,3})([DWMY])", code_string(dataset, "PatientAge"))
    if match is None:
        return None
    years = int(match[1]) / {"D": 365.25, "W": 52.18, "M": 12, "Y": 1}[match[2]]
    return years if 0 < years <= 120 else None


def notes(dataset: Dataset, presentation: Presentation) -> Iterator[str]:
    """Short phrases on what is unusual about an image: how it was handled, or what its user has to know."""
    if is_for_processing(dataset):
        shown = "by its own histogram" if presentation.kind == "for processing" else "by the VOI that it states"
        yield f"For Processing, not for reading: displayed {shown}"
    if (count := len(dataset.get("VOILUTSequence") or ())) > 1:
        yield f"{count} VOI LUTs: the first is used"
    elif not count and (count := len(numbers(dataset, "WindowCenter"))) > 1:
        yield f"{count} windows: the first is used"
    modifiers = view_modifiers(dataset)
    if modifiers:
        yield f"view modified: {', '.join(meaning for _, meaning in modifiers)}"
    factor = magnification(dataset)
    if factor >= NOTED_MAGNIFICATION:
        yield f"magnified {factor:g} times: the spacing is that in the breast"
    elif MAGNIFICATION in modifiers and factor == 1:
        yield "magnified by an unknown factor: the spacing is that of the detector"
    for keyword, phrase in (
        ("BreastImplantPresent", "breast implant"),
        ("PartialView", "partial view"),
        ("BurnedInAnnotation", "burned-in annotation"),
    ):
        if code_string(dataset, keyword) == "YES":
            yield phrase
    rows, columns = spacing(dataset) or _aspect(dataset)
    if not 1 / NOTED_ASPECT <= rows / columns <= NOTED_ASPECT:
        yield f"pixels are {rows / columns:.3g} times as high as wide"


def side_contradiction(laterality: str | None, chest_wall: str) -> str | None:
    """A phrase if the stated side and the pixels disagree, else ``None``. The pixels decide how the image is flipped.

    Args:
        laterality: the stated side of the patient, "L" or "R"; ``None`` where unknown, which contradicts nothing.
        chest_wall: the edge of the image, "L" or "R", at which the chest wall lies. A left breast has it on the left
            (PatientOrientation ``A\\...``).
    """
    if laterality in (None, chest_wall):
        return None
    names = {"L": "left", "R": "right"}
    return f"stated to be a {names[laterality]} breast, but the chest wall lies on the {names[chest_wall]}"


def _aspect(dataset: Dataset) -> tuple[float, float]:
    """PixelAspectRatio (vertical, horizontal), which stands in for a missing spacing; (1, 1) if absent or illegal."""
    values = numbers(dataset, "PixelAspectRatio")
    if len(values) == 2 and min(values) > 0:
        return values[0], values[1]
    return 1.0, 1.0
