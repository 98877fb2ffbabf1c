"""Batches of a plan through the sampler and back onto the templates' own pixel grids."""

import os
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Generic, TypeVar

import numpy as np
import torch
from scipy import ndimage

from gbci_fast.data.acquisition import side_contradiction
from gbci_fast.data.attributes import Attributes
from gbci_fast.data.dicom import Mammogram
from gbci_fast.data.preprocess import Frame, whole_breast_frame
from gbci_fast.data.segmentation import breast_mask, pectoral_mask, placement_mask
from gbci_fast.data.vindr import ImageRecord
from gbci_fast.errors import GBCIError
from gbci_fast.files import sha256_of
from gbci_fast.generate.copies import CopyGate
from gbci_fast.generate.masks import AutomaticMask, BoxMask, FileMask, automatic_mask
from gbci_fast.generate.plan import PlanItem
from gbci_fast.generate.settings import SamplerSettings
from gbci_fast.pipeline import GBCIPipeline

T = TypeVar("T")
ASSUMED_SPACING = (0.05, 0.05)  # mm, where the input states none
# Of the model image's side. The training masks are lesions grown by 1 to 5 of 224 pixels.
MASK_GROWTH = 3 / 224
SKIN_MARGIN = 3 / 224  # about 3 mm, the skin and what the outline may be off


@dataclass(frozen=True, kw_only=True, eq=False)
class Template:
    """One opened input.

    Attributes:
        record, sha256, mammogram: the file, and its native pixels.
        frame: between the native grid and model space.
        pixels: float32 [S, S], the image in model space.
        breast: bool [S, S], the breast with its skin and muscle.
        tissue: bool [S, S], where a lesion may lie: off the skin and the pectoral muscle.
    """

    record: ImageRecord
    sha256: str
    mammogram: Mammogram
    frame: Frame
    pixels: np.ndarray
    breast: np.ndarray
    tissue: np.ndarray

    @property
    def spacing(self) -> tuple[float, float]:
        """mm per native pixel; `ASSUMED_SPACING` where the file is silent."""
        return self.mammogram.spacing or ASSUMED_SPACING

    @property
    def notes(self) -> tuple[str, ...]:
        """What is unusual about the file, and whether its pixels contradict the side that it states."""
        contradiction = side_contradiction(self.mammogram.laterality, "R" if self.frame.flip else "L")
        return self.mammogram.notes if contradiction is None else (*self.mammogram.notes, contradiction)


@dataclass(frozen=True, kw_only=True, eq=False)
class Synthesis:
    """One synthetic image on its template's grid.

    Attributes:
        item, template: where it comes from.
        attributes: the description the sampler was given.
        stored: native integers [H, W]; outside `mask` the template's own.
        mask: bool [H, W], the synthesized pixels.
        box: (xmin, ymin, xmax, ymax) around the lesion, half-open; the mask has a rim more.
    """

    item: PlanItem
    template: Template
    attributes: Attributes
    stored: np.ndarray
    mask: np.ndarray
    box: tuple[int, int, int, int]


class Synthesizer:
    """Takes plan items batch by batch: opens templates and draws masks, samples, pastes.

    Args:
        gate: looks at every image after it was sampled, so that what it rejects changes no other image.
        workers: threads that open and paste; by default one per core.
    """

    def __init__(
        self,
        pipe: GBCIPipeline,
        settings: SamplerSettings,
        gate: CopyGate | None = None,
        *,
        workers: int | None = None,
    ):
        self._pipe = pipe
        self._settings = settings
        self._gate = gate
        self._workers = workers or len(os.sched_getaffinity(0))
        self._opened: dict[Path, Future[Template]] = {}

    def stream(
        self, batches: Sequence[Sequence[PlanItem]], finish: Callable[[Synthesis], T]
    ) -> "Generator[list[Made[T] | GBCIError], None, None]":
        """Per batch, in order, a list as long as it: what `finish` made of every image, or why there is none.

        A batch is sampled as one, of those of its items that can be. Meanwhile threads open the templates of the next
        batch and call `finish` on the images of the one before, so that a GPU waits for neither; `finish` is never at
        work on two batches at once. Where sampling raises (Ctrl-C, memory), the batch that is being finished is handed
        out first. Close the generator before touching what `finish` has written.

        An item's error names the file: its template cannot be read or shows no breast, its mask does not lie in it,
        the image cannot be pasted, or (a `CopyError`) the gate rejected it. Whatever else `finish` raises is raised.
        """
        pool = ThreadPoolExecutor(self._workers, thread_name_prefix="gbci-fast")
        try:
            upcoming = [self._begin(batch, pool) for batch in batches[:1]]
            finishing: list[Future[Made[T]] | GBCIError] = []
            for i in range(len(batches)):
                current, upcoming = upcoming, [self._begin(batch, pool) for batch in batches[i + 1 : i + 2]]
                painted, failure = [], None
                try:
                    painted = self._paint(current[0])
                except BaseException as error:
                    failure = error
                if i > 0:
                    yield [_outcome(future) for future in finishing]
                if failure is not None:
                    raise failure
                finishing = [
                    image if isinstance(image, GBCIError) else pool.submit(_finish, image, finish) for image in painted
                ]
            if batches:
                yield [_outcome(future) for future in finishing]
        finally:
            pool.shutdown(cancel_futures=True)  # and waits: afterwards nothing is written

    def _begin(self, batch: Sequence[PlanItem], pool: Executor) -> "list[Future[_Prepared]]":
        """A template stays open while consecutive batches use it."""
        records = {item.template.path: item.template for item in batch}
        opened = {path: self._opened.get(path) for path in records}
        self._opened = {path: future or pool.submit(open_template, records[path]) for path, future in opened.items()}
        # What these wait for was submitted before them.
        return [pool.submit(_prepare, item, self._opened[item.template.path]) for item in batch]

    def _paint(self, begun: "Sequence[Future[_Prepared]]") -> "list[_Painted | GBCIError]":
        parts = [_outcome(future) for future in begun]
        ready = [part for part in parts if isinstance(part, _Prepared)]
        images = iter(self._sample(ready) if ready else ())
        return [
            part
            if isinstance(part, GBCIError)
            else _Painted(part=part, image=next(images), gate=self._gate, guidance_scale=self._settings.guidance_scale)
            for part in parts
        ]

    def _sample(self, ready: Sequence["_Prepared"]) -> np.ndarray:
        """float32 [B, S, S] in [0, 1]."""
        images = self._pipe(
            torch.from_numpy(np.stack([part.template.pixels for part in ready]))[:, None],
            torch.from_numpy(np.stack([part.model_mask for part in ready]).astype(np.float32))[:, None],
            # A file's age and spacing go into the tables, not into the model: no real training image stated either.
            attributes=[
                replace(
                    part.attributes,
                    age=part.item.attributes.age,
                    pixel_spacing=part.item.attributes.pixel_spacing,
                )
                for part in ready
            ],
            report=[part.item.report for part in ready],
            num_inference_steps=self._settings.num_inference_steps,
            guidance_scale=self._settings.guidance_scale,
            seed=[part.item.seed for part in ready],
            paste_back=False,  # `paste` composites, on the native grid
            output_type="pt",
        ).images
        return images[:, 0].cpu().numpy()


@dataclass(frozen=True, kw_only=True, eq=False)
class Made(Generic[T]):
    """What became of one image.

    Attributes:
        value: what `finish` returned.
        again: pastes the image once more: native pixels are not kept.
    """

    value: T
    again: Callable[[], Synthesis]


@dataclass(frozen=True, kw_only=True, eq=False)
class _Prepared:
    """An item whose template is open: its description, its mask (bool [S, S], and native [H, W]), the lesion's box."""

    item: PlanItem
    template: Template
    attributes: Attributes
    model_mask: np.ndarray
    mask: np.ndarray
    box: tuple[int, int, int, int]


@dataclass(frozen=True, kw_only=True, eq=False)
class _Painted:
    """A sampled image, float32 [S, S] in [0, 1], and what looks at it."""

    part: _Prepared
    image: np.ndarray
    gate: CopyGate | None
    guidance_scale: float

    def synthesis(self) -> Synthesis:
        part, path = self.part, self.part.item.template.path
        if not np.isfinite(self.image).all():
            raise GBCIError(
                f"{path}: the sampled image holds NaN or infinity; guidance_scale {self.guidance_scale:g} may be too "
                "large"
            )
        if self.gate is not None:
            self.gate.check(part.item, part.template, part.model_mask, self.image)
        with _naming(path):
            stored = paste(part.template, self.image, part.mask)
        return Synthesis(
            item=part.item,
            template=part.template,
            attributes=part.attributes,
            stored=stored,
            mask=part.mask,
            box=part.box,
        )


def _finish(painted: _Painted, finish: Callable[[Synthesis], T]) -> Made[T]:
    return Made(value=finish(painted.synthesis()), again=painted.synthesis)


def _prepare(item: PlanItem, opened: "Future[Template]") -> _Prepared:
    template = opened.result()
    with _naming(item.template.path):
        model_mask, mask, box = _masks(item, template)
        attributes = _described(item, template)
    return _Prepared(item=item, template=template, attributes=attributes, model_mask=model_mask, mask=mask, box=box)


def _outcome(future: "Future[T] | GBCIError") -> "T | GBCIError":
    """What the future returned, or the sentence with which it failed."""
    try:
        return future if isinstance(future, GBCIError) else future.result()
    except GBCIError as error:
        return error


def open_template(record: ImageRecord) -> Template:
    """Reads an input and finds its breast.

    Raises:
        GBCIError: the file cannot be read or shows no breast.
    """
    mammogram = record.read()
    unit = mammogram.presentation.to_unit(mammogram.stored)  # `mammogram.unit()` would keep 4 bytes per pixel
    with _naming(record.path):
        native_breast = breast_mask(unit)
        frame = whole_breast_frame(native_breast)
        pixels, breast = np.clip(frame.to_model(unit), 0, 1), frame.to_model(native_breast) > 0.5
        pectoral = pectoral_mask(pixels, breast, mammogram.view_position)
        tissue = placement_mask(breast, pectoral, SKIN_MARGIN * frame.size)
    return Template(
        record=record,
        sha256=sha256_of(record.path),
        mammogram=mammogram,
        frame=frame,
        pixels=pixels,
        breast=breast,
        tissue=tissue,
    )


def paste(template: Template, synthetic: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """The synthesis on the native grid, in stored values.

    What is resampled and added is the *change* in model space, so the original's finer detail (grain, fibers) stays
    and no seam can appear. It fades to zero over the last model pixel inside the mask.

    Args:
        template: the original.
        synthetic: float32 [S, S] in [0, 1].
        mask: bool [H, W]; outside it the result is the original bit for bit.
    """
    xmin, ymin, xmax, ymax = box = _bounding_box(mask)
    window = np.s_[ymin:ymax, xmin:xmax]
    change = template.frame.to_native(synthetic - template.pixels, box)
    # The image's border is no edge of the mask: a lesion cut by it is painted up to it.
    around = np.pad(mask, 1, mode="edge")[ymin : ymax + 2, xmin : xmax + 2]
    depth = ndimage.distance_transform_edt(around)[1:-1, 1:-1]
    weight = np.minimum(1.0, depth * template.frame.scale[0]).astype(np.float32)
    presentation = template.mammogram.presentation
    stored = template.mammogram.stored.copy()
    unit = presentation.to_unit(stored[window]) + weight * change
    stored[window] = presentation.paste(stored[window], np.clip(unit, 0, 1))
    return stored


def _masks(item: PlanItem, template: Template) -> tuple[np.ndarray, np.ndarray, tuple[int, int, int, int]]:
    """What is painted, in model space and on the native grid, and the lesion's box.

    The model learned to fill masks that are larger than their lesions: around a lesion's extent goes a rim of
    `MASK_GROWTH`, in the tissue where the place was drawn. The pixels of a mask file are painted as they are.
    """
    lesion, native_lesion = _lesion(item, template)
    box = _bounding_box(native_lesion)
    if isinstance(item.mask, FileMask):
        return lesion, native_lesion, box
    model = ndimage.distance_transform_edt(~lesion) <= MASK_GROWTH * template.frame.size
    if isinstance(item.mask, AutomaticMask):
        model &= template.tissue
    return model, native_lesion | _to_native(template, model), box


def _lesion(item: PlanItem, template: Template) -> tuple[np.ndarray, np.ndarray]:
    """The lesion's extent in model space and on the native grid, at least a pixel of each."""
    shape, frame = template.mammogram.shape, template.frame
    if isinstance(item.mask, AutomaticMask):
        view = item.attributes.view_position or template.mammogram.view_position  # of which the sampler may not be told
        model = automatic_mask(item.mask.prior, template.breast, template.tissue, view, item.seed)
        native = _to_native(template, model)
        if not native.any():
            raise GBCIError(
                f"no pixel of this {shape[1]} x {shape[0]} image lies under the lesion; expected a larger one"
            )
        return model, native
    whole = item.mask.on(shape, template.mammogram.spacing)
    # What the model does not see it cannot paint.
    seen, native = np.s_[max(frame.y0, 0) : frame.y1, max(frame.x0, 0) : frame.x1], np.zeros(shape, bool)
    native[seen] = whole[seen]
    share = frame.to_model(native)
    model = share > min(0.25, share.max() / 2)  # even the smallest lesion keeps a pixel
    # Where a finding is boxed there is tissue, whatever the outline says.
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
    """Native pixels that can lie under a model mask: its box, two model pixels wider, inside image and frame."""
    xmin, ymin, xmax, ymax = _bounding_box(model)
    box = frame.box_to_native((xmin - 2, ymin - 2, xmax + 2, ymax + 2))
    return (
        max(0, frame.x0, int(np.floor(box[0]))),
        max(0, frame.y0, int(np.floor(box[1]))),
        min(shape[1], frame.x1, int(np.ceil(box[2]))),
        min(shape[0], frame.y1, int(np.ceil(box[3]))),
    )


def _described(item: PlanItem, template: Template) -> Attributes:
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
def _naming(path: Path) -> Iterator[None]:
    """Begins the sentence of an error with the file at fault, unless it names it already."""
    try:
        yield
    except GBCIError as error:
        if str(path) in str(error):
            raise
        raise GBCIError(f"{path}: {error}") from error


def _bounding_box(mask: np.ndarray) -> tuple[int, int, int, int]:
    ys, xs = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return int(xs[0]), int(ys[0]), int(xs[-1]) + 1, int(ys[-1]) + 1
