"""Batches of a plan through the sampler and back onto the templates' own pixel grids."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from scipy import ndimage

from gbci_fast.data.attributes import Attributes
from gbci_fast.data.dicom import Mammogram
from gbci_fast.data.preprocess import Frame, box_ellipse, breast_mask, whole_breast_frame
from gbci_fast.data.vindr import ImageRecord
from gbci_fast.errors import GBCIError
from gbci_fast.generate.plan import PlanItem, automatic_mask, read_mask_file
from gbci_fast.pipeline import GBCIPipeline

ASSUMED_SPACING = (0.05, 0.05)  # mm, where the input states none


@dataclass(frozen=True, kw_only=True, eq=False)
class Template:
    """One opened input: native pixels, its breast, and the same in model space (float32 and bool [S, S])."""

    record: ImageRecord
    mammogram: Mammogram
    frame: Frame
    pixels: np.ndarray
    breast: np.ndarray

    @property
    def spacing(self) -> tuple[float, float]:
        """mm per native pixel; `ASSUMED_SPACING` where the file is silent."""
        return self.mammogram.spacing or ASSUMED_SPACING


@dataclass(frozen=True, kw_only=True, eq=False)
class Synthesis:
    """One synthetic image on its template's grid.

    Attributes:
        item, template: where it comes from.
        attributes: the description the sampler was given.
        stored: native integers [H, W]; outside `mask` the template's own.
        mask: bool [H, W], the synthesized pixels.
        box: (xmin, ymin, xmax, ymax) around the mask, half-open.
        scheduler: class name of the sampler's scheduler.
    """

    item: PlanItem
    template: Template
    attributes: Attributes
    stored: np.ndarray
    mask: np.ndarray
    box: tuple[int, int, int, int]
    scheduler: str


@dataclass(frozen=True, kw_only=True)
class SamplerSettings:
    """How every batch is sampled."""

    num_inference_steps: int = 20
    guidance_scale: float = 3.0
    mask: str = "auto"


def synthesize(
    pipe: GBCIPipeline, batches: Sequence[Sequence[PlanItem]], settings: SamplerSettings
) -> Iterator[list[Synthesis]]:
    """Runs the batches one after the other; a template stays open while consecutive batches use it."""
    opened: dict[Path, Template] = {}
    for batch in batches:
        paths = {item.template.path for item in batch}
        opened = {path: template for path, template in opened.items() if path in paths}
        for item in batch:
            if item.template.path not in opened:
                opened[item.template.path] = open_template(item.template)
        yield _sample(pipe, batch, [opened[item.template.path] for item in batch], settings)


def open_template(record: ImageRecord) -> Template:
    """Reads an input and finds its breast.

    Raises:
        GBCIError: the file cannot be read or shows no breast.
    """
    mammogram = record.read()
    unit = mammogram.unit()
    try:
        native_breast = breast_mask(unit)
    except GBCIError as error:
        raise GBCIError(f"{record.path}: {error}") from error
    frame = whole_breast_frame(native_breast)
    return Template(
        record=record,
        mammogram=mammogram,
        frame=frame,
        pixels=np.clip(frame.to_model(unit), 0, 1),
        breast=frame.to_model(native_breast) > 0.5,
    )


def _sample(
    pipe: GBCIPipeline, batch: Sequence[PlanItem], templates: Sequence[Template], settings: SamplerSettings
) -> list[Synthesis]:
    masks = [_masks(item, template, settings.mask) for item, template in zip(batch, templates, strict=True)]
    described = [_described(item, template) for item, template in zip(batch, templates, strict=True)]
    model_masks = np.stack([model for model, _ in masks])
    images = pipe(
        torch.from_numpy(np.stack([template.pixels for template in templates]))[:, None],
        torch.from_numpy(model_masks.astype(np.float32))[:, None],
        attributes=described,
        report=[item.report for item in batch],
        num_inference_steps=settings.num_inference_steps,
        guidance_scale=settings.guidance_scale,
        seed=[item.seed for item in batch],
        output_type="pt",
    ).images[:, 0]
    out = []
    for item, template, attributes, (_, mask), image in zip(
        batch, templates, described, masks, images.cpu().numpy(), strict=True
    ):
        box = _bounding_box(mask)
        out.append(
            Synthesis(
                item=item,
                template=template,
                attributes=attributes,
                stored=paste(template, image, mask, box),
                mask=mask,
                box=box,
                scheduler=type(pipe.scheduler).__name__,
            )
        )
    return out


def paste(template: Template, synthetic: np.ndarray, mask: np.ndarray, box: tuple[int, int, int, int]) -> np.ndarray:
    """The synthesis on the native grid, in stored values.

    What is resampled and added is the *change* in model space, so the original's finer detail (grain, fibers) stays
    and no seam can appear. It fades to zero over the last model pixel inside the mask.

    Args:
        template: the original.
        synthetic: float32 [S, S] in [0, 1].
        mask: bool [H, W]; outside it the result is the original bit for bit.
        box: the mask's bounding box.
    """
    xmin, ymin, xmax, ymax = box
    window = np.s_[ymin:ymax, xmin:xmax]
    change = template.frame.to_native(synthetic - template.pixels, box)
    depth = ndimage.distance_transform_edt(np.pad(mask[window], 1))[1:-1, 1:-1]
    weight = np.minimum(1.0, depth * template.frame.scale[0]).astype(np.float32)
    original = template.mammogram.stored
    unit = template.mammogram.unit()[window]
    changed = np.where(mask[window] & (change != 0), np.clip(unit + weight * change, 0, 1), unit)
    stored = original.copy()
    stored[window] = template.mammogram.presentation.paste(original[window], changed)
    return stored


def _masks(item: PlanItem, template: Template, source: str) -> tuple[np.ndarray, np.ndarray]:
    """The mask in model space and on the native grid."""
    shape, frame = template.mammogram.shape, template.frame
    if item.box is None and source == "auto":
        model = automatic_mask(template.breast, item.seed)
        native = np.zeros(shape, bool)
        window = _native_window(frame, model, shape)
        native[window[1] : window[3], window[0] : window[2]] = frame.to_native(model, window, mode="bilinear") > 0.5
    else:
        native = box_ellipse(item.box, shape) if item.box is not None else read_mask_file(Path(source), shape)
        model = frame.to_model(native) > 0.25
    if not (model.any() and native.any()):
        raise GBCIError(f"{item.template.path}: the mask lies outside the breast; expected it to overlap")
    return model, native


def _native_window(frame: Frame, model: np.ndarray, shape: tuple[int, int]) -> tuple[int, int, int, int]:
    """Native pixels that can lie under a model mask: its box, two model pixels wider, inside the image."""
    xmin, ymin, xmax, ymax = _bounding_box(model)
    box = frame.box_to_native((xmin - 2, ymin - 2, xmax + 2, ymax + 2))
    return (
        max(0, int(np.floor(box[0]))),
        max(0, int(np.floor(box[1]))),
        min(shape[1], int(np.ceil(box[2]))),
        min(shape[0], int(np.ceil(box[3]))),
    )


def _described(item: PlanItem, template: Template) -> Attributes:
    """The plan's attributes, completed by what the file itself says."""
    known = {
        "laterality": template.mammogram.laterality,
        "view_position": template.mammogram.view_position,
        "age": template.mammogram.age,
        "pixel_spacing": template.frame.model_spacing(template.mammogram.spacing),
    }
    missing = {name: value for name, value in known.items() if getattr(item.attributes, name) is None}
    return replace(item.attributes, **missing)


def _bounding_box(mask: np.ndarray) -> tuple[int, int, int, int]:
    ys, xs = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return int(xs[0]), int(ys[0]), int(xs[-1]) + 1, int(ys[-1]) + 1
