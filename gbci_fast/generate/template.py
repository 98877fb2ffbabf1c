"""Opened templates, the masks drawn on them, and pasting onto their native pixel grids."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from scipy import ndimage

from gbci_fast.attributes import Attributes
from gbci_fast.data.boxes import bounding_box
from gbci_fast.data.fields import known_truth
from gbci_fast.data.frame import Frame, whole_breast_frame
from gbci_fast.data.segmentation import breast_mask, pectoral_mask, placement_mask
from gbci_fast.data.vindr import ImageRecord
from gbci_fast.dicom.acquisition import side_contradiction
from gbci_fast.dicom.reading import Mammogram
from gbci_fast.dicom.writing import ASSUMED_SPACING
from gbci_fast.errors import GBCIError
from gbci_fast.generate.mask_sources import AutomaticMask, BoxMask, FileMask, automatic_mask
from gbci_fast.generate.plan import PlanItem
from gbci_fast.jobs.files import sha256_of

# Shares of the model image's side. The training masks are lesions grown by 1 to 5 of 224 pixels.
MASK_GROWTH_SHARE = 3 / 224
SKIN_MARGIN_SHARE = 3 / 224  # about 3 mm: the skin and the error of the outline


@dataclass(frozen=True, kw_only=True, eq=False)
class Extent:
    """The pixels of one lesion on the native grid.

    Attributes:
        box: (xmin, ymin, xmax, ymax) around them, half-open.
        pixels: bool [ymax - ymin, xmax - xmin].
    """

    box: tuple[int, int, int, int]
    pixels: np.ndarray

    @classmethod
    def of(cls, mask: np.ndarray) -> "Extent":
        """The extent of a mask, bool [H, W] with at least one true pixel."""
        xmin, ymin, xmax, ymax = box = bounding_box(mask)
        return cls(box=box, pixels=mask[ymin:ymax, xmin:xmax].copy())

    def on(self, shape: tuple[int, int]) -> np.ndarray:
        """The extent as a mask, bool [H, W]."""
        mask, (xmin, ymin, xmax, ymax) = np.zeros(shape, bool), self.box
        mask[ymin:ymax, xmin:xmax] = self.pixels
        return mask


@dataclass(frozen=True, kw_only=True, eq=False)
class Template:
    """One opened input.

    Attributes:
        record, sha256: the input file, and the digest of its bytes.
        mammogram: its header and native pixels.
        frame: the map between the native grid and model space.
        pixels: float32 [S, S] in [0, 1], the image in model space.
        breast: bool [S, S], the breast with its skin and muscle.
        tissue: bool [S, S], where a lesion may lie: the breast without skin and pectoral muscle.
        lesions: one per finding of the record; None where the data set has no mask of the finding.
    """

    record: ImageRecord
    sha256: str
    mammogram: Mammogram
    frame: Frame
    pixels: np.ndarray
    breast: np.ndarray
    tissue: np.ndarray
    lesions: tuple[Extent | None, ...]

    @property
    def spacing(self) -> tuple[float, float]:
        """(row, column) spacing in mm per native pixel; `ASSUMED_SPACING` where the file states none."""
        return self.mammogram.spacing or ASSUMED_SPACING

    @property
    def notes(self) -> tuple[str, ...]:
        """Notes on what is unusual about the file, including pixels that contradict the stated side."""
        contradiction = side_contradiction(self.mammogram.laterality, "R" if self.frame.flip else "L")
        return self.mammogram.notes if contradiction is None else (*self.mammogram.notes, contradiction)


@dataclass(frozen=True, kw_only=True, eq=False)
class Synthesis:
    """One synthetic image on its template's grid.

    Attributes:
        item, template: its plan item and its template.
        attributes: the description for the tables, completed from the opened file.
        stored: stored values, integer [H, W]; outside `mask` they are the template's.
        mask: bool [H, W], the synthesized pixels: the lesion and a rim around it.
        lesion: the lesion alone.
    """

    item: PlanItem
    template: Template
    attributes: Attributes
    stored: np.ndarray
    mask: np.ndarray
    lesion: Extent

    @property
    def box(self) -> tuple[int, int, int, int]:
        """(xmin, ymin, xmax, ymax) around the lesion, half-open."""
        return self.lesion.box


def open_template(record: ImageRecord) -> Template:
    """Reads an input with the masks of its findings, and segments its breast.

    Raises:
        GBCIError: the file or a mask cannot be read, or the image shows no breast.
    """
    mammogram = record.read()
    unit = mammogram.presentation.to_unit(mammogram.stored)  # `mammogram.unit()` would keep 4 bytes per pixel
    with naming(record.path):
        native_breast = breast_mask(unit)
        frame = whole_breast_frame(native_breast)
        pixels, breast = np.clip(frame.to_model(unit), 0, 1), frame.to_model(native_breast) > 0.5
        pectoral = pectoral_mask(pixels, breast, mammogram.view_position)
        tissue = placement_mask(breast, pectoral, SKIN_MARGIN_SHARE * frame.size)
        known = known_truth(record, record.root, unit.shape) if record.findings else []
    return Template(
        record=record,
        sha256=sha256_of(record.path),
        mammogram=mammogram,
        frame=frame,
        pixels=pixels,
        breast=breast,
        tissue=tissue,
        lesions=tuple(None if pixels is None else Extent.of(pixels) for pixels in known),
    )


def paste(template: Template, synthetic: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """The synthesis on the native grid, in stored values, integer [H, W].

    The *change* in model space is resampled and added, so the original's finer detail (grain, fibers) stays and no seam
    can appear. The change fades to zero over the last model pixel inside the mask.

    Args:
        template: the original.
        synthetic: float32 [S, S] in [0, 1], the image in model space.
        mask: bool [H, W]; outside it the result equals the original bit for bit.
    """
    xmin, ymin, xmax, ymax = box = bounding_box(mask)
    window = np.s_[ymin:ymax, xmin:xmax]
    change = template.frame.to_native(synthetic - template.pixels, box)
    # The image's border does not count as an edge of the mask: a lesion that it cuts is painted up to the border.
    around = np.pad(mask, 1, mode="edge")[ymin : ymax + 2, xmin : xmax + 2]
    depth = ndimage.distance_transform_edt(around)[1:-1, 1:-1]
    weight = np.minimum(1.0, depth * template.frame.scale[0]).astype(np.float32)
    presentation = template.mammogram.presentation
    stored = template.mammogram.stored.copy()
    unit = presentation.to_unit(stored[window]) + weight * change
    stored[window] = presentation.paste(stored[window], np.clip(unit, 0, 1))
    return stored


def draw_masks(item: PlanItem, template: Template) -> tuple[np.ndarray, np.ndarray, Extent]:
    """The mask to paint, bool [S, S] in model space and bool [H, W] on the native grid, and the lesion in it.

    The model learned to fill masks that are larger than their lesions, so a lesion gets a rim of `MASK_GROWTH_SHARE`.
    The rim of an automatic mask stays in the tissue. The pixels of a mask file are painted as they are.

    Raises:
        GBCIError: the mask lies outside the image or the breast, or there is no tissue for an automatic mask.
    """
    lesion, native_lesion = _lesion(item, template)
    extent = Extent.of(native_lesion)
    if isinstance(item.mask, FileMask):
        return lesion, native_lesion, extent
    model = ndimage.distance_transform_edt(~lesion) <= MASK_GROWTH_SHARE * template.frame.size
    if isinstance(item.mask, AutomaticMask):
        model &= template.tissue
    return model, native_lesion | _to_native(template, model), extent


def _lesion(item: PlanItem, template: Template) -> tuple[np.ndarray, np.ndarray]:
    """The lesion's pixels in model space, bool [S, S], and on the native grid, bool [H, W]; at least one pixel each."""
    shape, frame = template.mammogram.shape, template.frame
    if isinstance(item.mask, AutomaticMask):
        view = item.attributes.view_position or template.mammogram.view_position  # even if withheld from the sampler
        model = automatic_mask(item.mask.prior, template.breast, template.tissue, view, item.seed)
        native = _to_native(template, model)
        if not native.any():
            raise GBCIError(
                f"no pixel of this {shape[1]} x {shape[0]} image lies under the lesion; expected a larger one"
            )
        return model, native
    whole = item.mask.on(shape, template.mammogram.spacing)
    # The model cannot paint outside its frame.
    seen, native = np.s_[max(frame.y0, 0) : frame.y1, max(frame.x0, 0) : frame.x1], np.zeros(shape, bool)
    native[seen] = whole[seen]
    share = frame.to_model(native)
    model = share > min(0.25, share.max() / 2)  # even the smallest lesion keeps a pixel
    # An annotated box holds tissue even where the breast's outline misses it.
    if not (model.any() if isinstance(item.mask, BoxMask) else (model & template.breast).any()):
        raise GBCIError("the mask lies outside the breast; expected it to overlap")
    return model, native


def _to_native(template: Template, model: np.ndarray) -> np.ndarray:
    """A model mask on the native grid, bool [H, W]."""
    native = np.zeros(template.mammogram.shape, bool)
    xmin, ymin, xmax, ymax = window = _native_window(template.frame, model, native.shape)
    share = template.frame.to_native(model, window, mode="bilinear")
    native[ymin:ymax, xmin:xmax] = share > min(0.5, share.max() / 2)  # even the smallest lesion keeps a pixel
    return native


def _native_window(frame: Frame, model: np.ndarray, shape: tuple[int, int]) -> tuple[int, int, int, int]:
    """(xmin, ymin, xmax, ymax) of a model mask on the native grid, two model pixels wider, inside image and frame."""
    xmin, ymin, xmax, ymax = bounding_box(model)
    box = frame.box_to_native((xmin - 2, ymin - 2, xmax + 2, ymax + 2))
    return (
        max(0, frame.x0, int(np.floor(box[0]))),
        max(0, frame.y0, int(np.floor(box[1]))),
        min(shape[1], frame.x1, int(np.ceil(box[2]))),
        min(shape[0], frame.y1, int(np.ceil(box[3]))),
    )


def completed_attributes(item: PlanItem, template: Template) -> Attributes:
    """The plan's attributes, completed by what the file itself says."""
    mammogram = template.mammogram
    known = {
        "laterality": mammogram.laterality,
        "view_position": mammogram.view_position,
        "age": mammogram.age,
        "pixel_spacing": template.frame.model_spacing(mammogram.spacing),
    }
    missing = {
        name: value
        for name, value in known.items()
        if getattr(item.attributes, name) is None and name not in item.withheld
    }
    return replace(item.attributes, **missing)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Prepends the file's path to the message of a `GBCIError`, unless the message names the file already."""
    try:
        yield
    except GBCIError as error:
        if str(path) in str(error):
            raise
        raise GBCIError(f"{path}: {error}") from error
