"""Fields of view: a mammogram and its lesions resampled into model space.

A mammogram gives the whole breast, and a closer look at every lesion that fits into one.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from gbci_fast.attributes import Attributes
from gbci_fast.choices import FIELDS, MODEL_SIZE
from gbci_fast.data.frame import Box, Frame, box_ellipse, whole_breast_frame
from gbci_fast.data.mask_files import read_mask
from gbci_fast.data.segmentation import breast_mask, pectoral_mask
from gbci_fast.data.vindr import TEMPLATE, ImageRecord
from gbci_fast.dicom.reading import Mammogram
from gbci_fast.errors import GBCIError

# An image is looked at more closely where it has at least this many native pixels per whole-breast model pixel.
ZOOM_FROM = 1.6


@dataclass(frozen=True, kw_only=True)
class Lesion:
    """One finding in model space: its pixels (bool [S, S]), what is known of it, and the report sentence.

    ``finding`` is its position among the image's findings.
    """

    pixels: np.ndarray
    attributes: Attributes
    report: str | None
    finding: int = 0


@dataclass(frozen=True, kw_only=True)
class FieldOfView:
    """One field of view: image uint16 [S, S] (65535 = 1.0), breast bool [S, S], lesions, image-level attributes."""

    image: np.ndarray
    breast: np.ndarray
    lesions: tuple[Lesion, ...]
    attributes: Attributes
    patient: str

    @property
    def any_lesion(self) -> np.ndarray:
        """The union of all lesion pixels, bool [S, S]."""
        union = np.zeros_like(self.breast)
        for lesion in self.lesions:
            union |= lesion.pixels
        return union


@dataclass(frozen=True, kw_only=True)
class PlacedField:
    """One field of view, its kind (of `FIELDS`) and where in the native image it lies."""

    kind: str
    frame: Frame
    field: FieldOfView


@dataclass(frozen=True, kw_only=True, eq=False)
class Reading:
    """One opened image.

    Attributes:
        mammogram: as read.
        breast: bool [H, W].
        truth: one bool [H, W] per finding of the record.
        fields: its fields of view, the whole breast first.
    """

    mammogram: Mammogram
    breast: np.ndarray
    truth: list[np.ndarray]
    fields: list[PlacedField]

    @property
    def pectoral(self) -> np.ndarray:
        """The pectoral muscle, bool [H, W], found anew at every call."""
        return pectoral_mask(self.mammogram.unit(), self.breast, self.mammogram.view_position)


def read_fields(record: ImageRecord, root: Path, size: int = MODEL_SIZE, kinds: Sequence[str] = FIELDS) -> Reading:
    """Opens one image and resamples it into its fields of view.

    "whole" is the whole breast. "lesion" adds, where the native resolution is at least `ZOOM_FROM` times that of the
    whole breast in model space, one field of view at twice its magnification around each lesion that fits.

    Args:
        record: what the tables say.
        root: holds ``masks/``, where there are any.
        size: side of the model image in pixels.
        kinds: out of `FIELDS`.

    Raises:
        GBCIError: the image or its lesion mask is damaged, or shows no breast; the sentence names the file.
    """
    mammogram = record.read()
    unit = mammogram.unit()
    try:
        breast = breast_mask(unit)
    except GBCIError as error:
        raise GBCIError(f"{record.path}: {error}") from error
    whole = whole_breast_frame(breast, size)
    truth = lesion_truth(record, root, unit.shape)
    frames = [("whole", whole)] if "whole" in kinds else []
    if "lesion" in kinds and whole.scale[0] <= 1 / ZOOM_FROM:
        frames += [("lesion", _zoomed(whole, finding.box)) for finding in record.findings if _fits(whole, finding.box)]
    fields = [
        PlacedField(kind=kind, frame=frame, field=field_of_view(record, mammogram, unit, breast, truth, frame))
        for kind, frame in frames
    ]
    return Reading(mammogram=mammogram, breast=breast, truth=truth, fields=fields)


def field_of_view(
    record: ImageRecord,
    mammogram: Mammogram,
    unit: np.ndarray,
    breast: np.ndarray,
    truth: list[np.ndarray],
    frame: Frame,
) -> FieldOfView:
    """Resamples one opened image.

    Args:
        record: its tables.
        mammogram: the image; of it spacing and patient, and view and side where no table states them.
        unit: float32 [H, W] in [0, 1], its pixels.
        breast: bool [H, W].
        truth: from `lesion_truth`.
        frame: where to look.
    """
    known = {"pixel_spacing": frame.model_spacing(mammogram.spacing)}
    if not record.listed:  # the header knows better than the file's name
        known |= {"view_position": mammogram.view_position, "laterality": mammogram.laterality}
    elif mammogram.other_view:
        known["view_position"] = None
    inside = frame.to_model(breast) > 0.5
    lesions = []
    for index, (finding, pixels) in enumerate(zip(record.findings, truth, strict=True)):
        share = frame.to_model(pixels)
        in_model = share > min(0.25, share.max() / 2)  # even the smallest finding keeps a pixel
        if in_model.any():
            inside |= in_model  # where there is a finding there is tissue, whatever the outline says
            attributes = replace(finding.attributes, **known)
            lesions.append(Lesion(pixels=in_model, attributes=attributes, report=finding.report(record), finding=index))
    return FieldOfView(
        image=np.round(frame.to_model(unit) * 65535).astype(np.uint16),
        breast=inside,
        lesions=tuple(lesions),
        attributes=replace(record.attributes, **known),
        patient=record.patient_in(mammogram),
    )


def lesion_truth(record: ImageRecord, root: Path, shape: tuple[int, int]) -> list[np.ndarray]:
    """One bool [H, W] per finding: its pixel mask inside its box where there is one, else the box's ellipse."""
    known = known_truth(record, root, shape)
    return [
        box_ellipse(finding.box, shape) if pixels is None else pixels
        for finding, pixels in zip(record.findings, known, strict=True)
    ]


def known_truth(record: ImageRecord, root: Path, shape: tuple[int, int]) -> list[np.ndarray | None]:
    """One bool [H, W] per finding: its pixel mask inside its box; None where there is none.

    A finding's own mask is ``finding_masks/<study_id>/<image_id>-<k>.png``, k being its ``number``;
    ``masks/<study_id>/<image_id>.png`` is that of all other findings of the image, but not of those whose source is
    `TEMPLATE`: `generate` lists them beside what it painted, and ``masks/`` is where it painted.
    """
    name = f"{record.study_id}/{record.image_id}"
    drawn = _mask_of_shape(root / "masks" / f"{name}.png", shape)
    masks: list[np.ndarray | None] = []
    for finding in record.findings:
        own = _mask_of_shape(root / "finding_masks" / f"{name}-{finding.number}.png", shape)
        shared = None if finding.extra.get("source") == TEMPLATE else drawn
        pixels = shared if own is None else own
        boxed = np.zeros(shape, bool)
        if pixels is not None:
            xmin, ymin, xmax, ymax = (round(value) for value in finding.box)
            boxed[ymin:ymax, xmin:xmax] = pixels[ymin:ymax, xmin:xmax]
        masks.append(boxed if boxed.any() else None)
    return masks


def _mask_of_shape(path: Path, shape: tuple[int, int]) -> np.ndarray | None:
    """The mask, bool [H, W]; None where there is no such file."""
    drawn = read_mask(path) if os.path.lexists(path) else None
    if drawn is not None and drawn.shape != shape:
        raise GBCIError(f"{path} is {drawn.shape[1]}x{drawn.shape[0]}; expected the image's {shape[1]}x{shape[0]}")
    return drawn


def to_unit(image: np.ndarray) -> torch.Tensor:
    """uint16 [H, W] to float32 [H, W] in [0, 1]."""
    return torch.from_numpy(np.ascontiguousarray(image).astype(np.float32) / 65535)


def _fits(whole: Frame, box: Box) -> bool:
    field = whole.size / whole.scale[0] / 2
    return max(box[2] - box[0], box[3] - box[1]) < 0.8 * field


def _zoomed(whole: Frame, box: Box) -> Frame:
    """The field of view at twice the magnification of `whole`, centered on `box`."""
    half = round(whole.size / whole.scale[0] / 4)
    x, y = round((box[0] + box[2]) / 2), round((box[1] + box[3]) / 2)
    return replace(
        whole, x0=x - half, x1=x + half, y0=y - half, y1=y + half, width=whole.size, height=whole.size, left=0, top=0
    )
