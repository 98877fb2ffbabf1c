"""Fields of view: a mammogram and its lesions resampled into model space.

A mammogram gives one field of view of the whole breast, and a magnified one around every lesion that fits.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from gbci_fast.attributes import Attributes
from gbci_fast.choices import FIELDS, MODEL_SIZE
from gbci_fast.data.boxes import Box, box_ellipse
from gbci_fast.data.frame import Frame, whole_breast_frame
from gbci_fast.data.mask_files import read_mask
from gbci_fast.data.segmentation import breast_mask, pectoral_mask
from gbci_fast.data.vindr import TEMPLATE, ImageRecord
from gbci_fast.dicom.reading import Mammogram
from gbci_fast.errors import GBCIError

# Native pixels per model pixel of the whole breast, from which magnified fields of view are made.
ZOOM_FROM = 1.6


@dataclass(frozen=True, kw_only=True)
class VisibleLesion:
    """What a field of view shows of one finding: its pixels (bool [S, S]), its attributes, and its report sentence.

    ``finding`` is its position among the image's findings, from 0.
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
    lesions: tuple[VisibleLesion, ...]
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
    """One field of view, its kind (one of `FIELDS`) and its frame in the native image."""

    kind: str
    frame: Frame
    field: FieldOfView


@dataclass(frozen=True, kw_only=True, eq=False)
class Reading:
    """One decoded image with its masks and fields of view.

    Attributes:
        mammogram: the image as read.
        breast: bool [H, W].
        truth: lesion masks, one bool [H, W] per finding of the record.
        fields: the fields of view, the whole breast first.
    """

    mammogram: Mammogram
    breast: np.ndarray
    truth: list[np.ndarray]
    fields: list[PlacedField]

    @property
    def pectoral(self) -> np.ndarray:
        """The pectoral muscle, bool [H, W], computed at every call."""
        return pectoral_mask(self.mammogram.unit(), self.breast, self.mammogram.view_position)


def read_fields(record: ImageRecord, root: Path, size: int = MODEL_SIZE, kinds: Sequence[str] = FIELDS) -> Reading:
    """Decodes one image and resamples it into its fields of view.

    "whole" is the whole breast. "lesion" is one field of view around each lesion that fits, at twice the magnification
    of the whole breast. It needs a native resolution of at least `ZOOM_FROM` times that of the whole breast in model
    space.

    Args:
        record: the image's record.
        root: folder of the data set, with ``masks/`` and ``finding_masks/`` if there are any.
        size: side of the model image in pixels.
        kinds: one or more of `FIELDS`.

    Raises:
        GBCIError: the image or its lesion mask is damaged, or no breast is found; the sentence names the file.
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
    """Resamples one decoded image into one field of view.

    Args:
        record: the image's record, with findings and attributes.
        mammogram: the source of spacing and patient, and of view and side if no table lists the image.
        unit: float32 [H, W] in [0, 1], display values.
        breast: bool [H, W].
        truth: lesion masks from `lesion_truth`.
        frame: the affine to model space.
    """
    known = {"pixel_spacing": frame.model_spacing(mammogram.spacing)}
    if not record.listed:  # the header is more reliable than the file's name
        known |= {"view_position": mammogram.view_position, "laterality": mammogram.laterality}
    elif mammogram.other_view:
        known["view_position"] = None
    inside = frame.to_model(breast) > 0.5
    lesions = []
    for index, (finding, pixels) in enumerate(zip(record.findings, truth, strict=True)):
        share = frame.to_model(pixels)
        in_model = share > min(0.25, share.max() / 2)  # even the smallest finding keeps a pixel
        if in_model.any():
            inside |= in_model  # a finding lies in tissue, even outside the segmented breast
            shown = VisibleLesion(
                pixels=in_model,
                attributes=replace(finding.attributes, **known),
                report=finding.report(record),
                finding=index,
            )
            lesions.append(shown)
    return FieldOfView(
        image=np.round(frame.to_model(unit) * 65535).astype(np.uint16),
        breast=inside,
        lesions=tuple(lesions),
        attributes=replace(record.attributes, **known),
        patient=record.patient_in(mammogram),
    )


def lesion_truth(record: ImageRecord, root: Path, shape: tuple[int, int]) -> list[np.ndarray]:
    """One mask, bool [H, W], per finding: its pixel mask inside its box if there is one, else the box's ellipse."""
    known = known_truth(record, root, shape)
    return [
        box_ellipse(finding.box, shape) if pixels is None else pixels
        for finding, pixels in zip(record.findings, known, strict=True)
    ]


def known_truth(record: ImageRecord, root: Path, shape: tuple[int, int]) -> list[np.ndarray | None]:
    """One pixel mask, bool [H, W], per finding, cut to its box; None where no mask file shows the finding.

    A finding's own mask is ``finding_masks/<study_id>/<image_id>-<k>.png``, where k is its ``number``. Findings without
    an own mask share ``masks/<study_id>/<image_id>.png``. Findings of source `TEMPLATE` do not use the shared mask: in
    outputs of `generate` it shows only the painted lesions.
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
    """The mask, bool [H, W]; None if the file does not exist."""
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
    """The frame at twice the magnification of ``whole``, centered on ``box``."""
    half = round(whole.size / whole.scale[0] / 4)
    x, y = round((box[0] + box[2]) / 2), round((box[1] + box[3]) / 2)
    return replace(
        whole, x0=x - half, x1=x + half, y0=y - half, y1=y + half, width=whole.size, height=whole.size, left=0, top=0
    )
