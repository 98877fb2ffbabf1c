"""Fields of view: a mammogram and its lesions resampled into model space."""

import os
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from gbci_fast.attributes import Attributes
from gbci_fast.data.mask_files import read_mask
from gbci_fast.data.preprocess import Frame, box_ellipse
from gbci_fast.data.vindr import TEMPLATE, ImageRecord
from gbci_fast.dicom.reading import Mammogram
from gbci_fast.errors import GBCIError


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
