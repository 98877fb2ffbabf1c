"""Which fields of view a mammogram gives: the whole breast, and a closer look at every lesion that fits into one."""

import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from gbci_fast.choices import FIELDS, MODEL_SIZE
from gbci_fast.data.fields import FieldOfView, field_of_view, lesion_truth
from gbci_fast.data.preprocess import Box, Frame, whole_breast_frame
from gbci_fast.data.segmentation import breast_mask, pectoral_mask
from gbci_fast.data.vindr import ImageRecord
from gbci_fast.dicom.reading import Mammogram
from gbci_fast.errors import GBCIError

# An image is looked at more closely where it has at least this many native pixels per whole-breast model pixel.
ZOOM_FROM = 1.6


@dataclass(frozen=True, kw_only=True)
class FramedView:
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
        views: its fields of view, the whole breast first.
    """

    mammogram: Mammogram
    breast: np.ndarray
    truth: list[np.ndarray]
    views: list[FramedView]

    @property
    def pectoral(self) -> np.ndarray:
        """The pectoral muscle, bool [H, W], found anew at every call."""
        return pectoral_mask(self.mammogram.unit(), self.breast, self.mammogram.view_position)


def read_views(record: ImageRecord, root: Path, size: int = MODEL_SIZE, views: Sequence[str] = FIELDS) -> Reading:
    """Opens one image and resamples it into its fields of view.

    "whole" is the whole breast. "lesion" adds, where the native resolution is at least `ZOOM_FROM` times that of the
    whole breast in model space, one field of view at twice its magnification around each lesion that fits.

    Args:
        record: what the tables say.
        root: holds ``masks/``, where there are any.
        size: side of the model image in pixels.
        views: out of `FIELDS`.

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
    frames = [("whole", whole)] if "whole" in views else []
    if "lesion" in views and whole.scale[0] <= 1 / ZOOM_FROM:
        frames += [("lesion", _zoomed(whole, finding.box)) for finding in record.findings if _fits(whole, finding.box)]
    fields = [
        FramedView(kind=kind, frame=frame, field=field_of_view(record, mammogram, unit, breast, truth, frame))
        for kind, frame in frames
    ]
    return Reading(mammogram=mammogram, breast=breast, truth=truth, views=fields)


def patient_fold(patient: str) -> str:
    """ "A" or "B" by hash of the patient id: the scorer sees A alone, the verifier B alone."""
    return "AB"[zlib.crc32(patient.encode()) & 1]


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
