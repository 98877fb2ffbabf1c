"""Lesions of VinDr-layout data sets in model space, and the crops around them for evaluations."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from skimage.transform import resize

from gbci_fast.choices import MODEL_SIZE
from gbci_fast.data.boxes import bounding_box
from gbci_fast.data.fields import read_fields
from gbci_fast.data.folds import TRAINED, check_folds, patient_fold
from gbci_fast.data.mask_files import read_mask
from gbci_fast.data.vindr import ImageRecord, VinDr
from gbci_fast.errors import GBCIError
from gbci_fast.evaluate.case import Case, image_seed, mask_around, root_names, spread

CROP_SIZE = 64
CONTEXT = 1.5  # side of a crop, as a multiple of the mask's longer side
SMALLEST_WINDOW = 32  # model pixels
NATIVE_SIZE = 32  # side in model pixels of a lesion's middle, which is not resampled

OnProgress = Callable[[str, float, int], None]
"""Called as ``f(stage, done, total)``."""


@dataclass(frozen=True, kw_only=True, eq=False)
class LesionCase(Case):
    """One lesion: its mask is the lesion grown, without other lesions; its patient is unique over all roots.

    Attributes:
        number: the finding's position among the image's findings.
        split: "training", "test", or None where the table says nothing.
        lesion: bool [S, S], its own pixels.
    """

    number: int
    split: str | None
    lesion: np.ndarray

    @property
    def name(self) -> str:
        """The lesion's name, unique in its root: the image id and the finding's number, from 1."""
        return f"{self.image_id}-{self.number + 1}"

    @cached_property
    def window(self) -> tuple[int, int, int]:
        """(top, left, side) of the lesion's crop in model pixels; the crop may extend beyond the image."""
        xmin, ymin, xmax, ymax = bounding_box(self.mask)
        side = max(SMALLEST_WINDOW, round(CONTEXT * max(xmax - xmin, ymax - ymin)))
        return (ymin + ymax - side) // 2, (xmin + xmax - side) // 2, side

    @property
    def diameter(self) -> float:
        """The diameter in model pixels of a circle with the lesion's area."""
        return float(2 * np.sqrt(self.lesion.sum() / np.pi))


@dataclass(frozen=True, kw_only=True, eq=False)
class Crops:
    """Squares around lesions, resampled to `CROP_SIZE`, and the lesions' middles at model pixels.

    Attributes:
        pixels: float32 [N, C, C] in [0, 1].
        masks: bool [N, C, C], the pixels that are or would be painted.
        patients: the patient of every crop, N; crops of one patient are not independent.
        middles: float32 [N, W, W] and bool [N, W, W] (W = `NATIVE_SIZE`), pixels and masks that are not resampled; None
            = the middles of the crops.
    """

    pixels: np.ndarray
    masks: np.ndarray
    patients: tuple[str, ...]
    middles: tuple[np.ndarray, np.ndarray] | None = None

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, rows: np.ndarray | slice) -> "Crops":
        """The crops at `rows`: indices, a mask or a slice."""
        picked = np.arange(len(self))[rows]
        return Crops(
            pixels=self.pixels[picked],
            masks=self.masks[picked],
            patients=tuple(self.patients[i] for i in picked),
            middles=None if self.middles is None else (self.middles[0][picked], self.middles[1][picked]),
        )

    @property
    def native(self) -> tuple[np.ndarray, np.ndarray]:
        """The pixels and the masks of the middles, [N, W, W] each."""
        if self.middles is not None:
            return self.middles
        start = (CROP_SIZE - NATIVE_SIZE) // 2
        middle = np.s_[:, start : start + NATIVE_SIZE, start : start + NATIVE_SIZE]
        return self.pixels[middle], self.masks[middle]

    @property
    def roi(self) -> np.ndarray:
        """The masked pixels, float32 [N, C, C]; all others are set to their mean, so that no background shows."""
        inside = np.where(self.masks, self.pixels, 0)
        mean = inside.sum((1, 2)) / self.masks.sum((1, 2))
        return np.where(self.masks, self.pixels, mean[:, None, None]).astype(np.float32)


def crop_lesions(cases: Sequence[LesionCase], images: Sequence[np.ndarray] | None = None) -> Crops:
    """The crop of every case, from its own image or from `images`, float32 [S, S] in [0, 1], one per case."""
    images = [case.pixels for case in cases] if images is None else images
    size = (len(cases), CROP_SIZE, CROP_SIZE)
    pixels, masks = np.empty(size, np.float32), np.empty(size, bool)
    native = (len(cases), NATIVE_SIZE, NATIVE_SIZE)
    middles = np.empty(native, np.float32), np.empty(native, bool)
    for i, (case, image) in enumerate(zip(cases, images, strict=True)):
        pixels[i] = cut(image, case.window)
        covered = cut(case.mask.astype(np.float32), case.window)
        masks[i] = covered > min(0.5, covered.max() / 2)
        for found, whole in zip(middles, (image, case.mask), strict=True):
            found[i] = whole[_middle(case.mask)]
    return Crops(pixels=pixels, masks=masks, patients=tuple(case.patient for case in cases), middles=middles)


def read_lesions(
    roots: Sequence[Path],
    *,
    split: str | None = None,
    folds: str | None = None,
    size: int = MODEL_SIZE,
    limit: int | None = None,
    seed: int = 0,
    on_progress: OnProgress = lambda stage, done, total: None,
) -> list[LesionCase]:
    """Every lesion of the whole-breast views under the VinDr-layout `roots`.

    Args:
        roots: folders in the VinDr layout.
        split: "training" or "test"; None = every image.
        folds: of the patients, such as "AB" (see `patient_fold`); None = all.
        size: side of the model image in pixels.
        limit: number of images to take, spread evenly; None = all.
        seed: the cases' own seeds follow from it.
        on_progress: called as ``f(stage, done, total)``.

    Raises:
        GBCIError: no such image with a finding, an image that cannot be read, or no usable lesion. Lesions whose mask
            covers the whole image are left out.
    """
    if limit is not None and limit < 1:
        raise GBCIError(f"limit is {limit}; expected at least 1")
    names = root_names(roots)
    records = spread(find_records(roots, split=split, folds=folds), limit)
    cases: list[LesionCase] = []
    for done, (root, record) in enumerate(records, start=1):
        view = read_fields(record, root, size, ("whole",)).fields[0].field
        for lesion in view.lesions:
            # Without another lesion, which would go undescribed.
            mask = mask_around(lesion.pixels, view.breast) & ~(view.any_lesion & ~lesion.pixels)
            if mask.all():
                continue
            cases.append(
                LesionCase(
                    root=names[root],
                    image_id=record.image_id,
                    number=lesion.finding,
                    patient=f"{names[root]}/{record.patient}",
                    split=record.split,
                    seed=image_seed(seed, record.study_id, f"{record.image_id}-{lesion.finding + 1}"),
                    image=view.image,
                    breast=view.breast,
                    lesion=lesion.pixels,
                    mask=mask,
                    attributes=lesion.attributes,
                    report=lesion.report,
                )
            )
        on_progress("reading", done, len(records))
    if not cases:
        raise GBCIError(f"no lesion lies inside the breast in any image of {_wanted(roots, split, folds)}")
    return cases


def read_split(
    roots: Sequence[Path],
    split: str,
    *,
    limit: int | None = None,
    seed: int = 0,
    on_progress: OnProgress = lambda stage, done, total: None,
) -> list[LesionCase]:
    """The lesions that an evaluation judges.

    Args:
        roots, limit, seed, on_progress: as for `read_lesions`.
        split: "C" = fold C of the training split, "test" = the test split.
    """
    part = part_of(split)
    return read_lesions(
        roots, split=part["split"], folds=part["folds"], limit=limit, seed=seed, on_progress=on_progress
    )


def read_training(
    roots: Sequence[Path],
    *,
    folds: str = TRAINED,
    limit: int | None = None,
    seed: int = 0,
    on_progress: OnProgress = lambda stage, done, total: None,
) -> list[LesionCase]:
    """The lesions to train judges on, of the training split, whichever split is judged; arguments of `read_lesions`."""
    return read_lesions(roots, split="training", folds=folds, limit=limit, seed=seed, on_progress=on_progress)


def refuse_shared(training: Sequence[LesionCase], judged: Sequence[LesionCase]) -> None:
    """Raises GBCIError if a patient both trains and is judged."""
    if shared := {case.patient for case in training} & {case.patient for case in judged}:
        raise GBCIError(f"patient {min(shared)} trains and is judged; expected the splits to share no patient")


def part_of(split: str) -> dict[str, str | None]:
    """``split`` and ``folds`` of `read_lesions` and `find_records` for "C" (of the training split) or a whole split."""
    return {"split": "training", "folds": "C"} if split == "C" else {"split": split, "folds": None}


def find_records(roots: Sequence[Path], *, split: str | None, folds: str | None) -> list[tuple[Path, ImageRecord]]:
    """The root and the record of every image with a finding; `split` and `folds` as for `read_lesions`.

    Raises:
        GBCIError: no such image, or no such folds.
    """
    if folds is not None:
        check_folds(folds)
    records = [
        (root, record)
        for root in roots
        for record in (VinDr(root).images if split is None else VinDr(root).of_split(split))
        if record.findings and (folds is None or patient_fold(record.patient) in folds)
    ]
    if not records:
        wanted = _wanted(roots, split, folds)
        raise GBCIError(f"no image with a finding in {wanted}; check the columns split and xmin")
    return records


def _wanted(roots: Sequence[Path], split: str | None, folds: str | None) -> str:
    return f"{', '.join(map(str, roots))} ({split or 'any'} split{f', fold {folds}' if folds else ''})"


def read_painted(
    root: Path,
    *,
    limit: int | None = None,
    seed: int = 0,
    on_progress: OnProgress = lambda stage, done, total: None,
) -> tuple[list[LesionCase], tuple[str, ...]]:
    """The painted lesions of an output of `gbci-fast generate`, and the ids of the images they were painted into.

    The tables also list the templates' own lesions, which are real; they are left out.

    Raises:
        GBCIError: `root` is another kind of data set, or has no painted lesion.
    """
    _templates(root)  # fail before the reading
    return pick_painted(root, read_lesions([root], limit=limit, seed=seed, on_progress=on_progress))


def pick_painted(root: Path, cases: Sequence[LesionCase]) -> tuple[list[LesionCase], tuple[str, ...]]:
    """The painted ones of the lesions of `root`; see `read_painted`."""
    templates, painted = _templates(root), []
    for case in cases:
        record = templates[case.image_id]
        # The painted finding comes first. If "No Finding" was painted, the first finding's box holds no painted pixel.
        if case.number == 0:
            mask = read_mask(root / "masks" / record.study_id / f"{record.image_id}.png")
            xmin, ymin, xmax, ymax = (round(value) for value in record.findings[0].box)
            if mask[ymin:ymax, xmin:xmax].any():
                painted.append(case)
    if not painted:
        raise GBCIError(f"no image of {root} has a painted lesion; expected the output of gbci-fast generate")
    return painted, tuple(templates[case.image_id].extra["template_image_id"] for case in painted)


def _templates(root: Path) -> dict[str, ImageRecord]:
    """{image id: record} of an output of `gbci-fast generate`, whose records name templates."""
    records = {record.image_id: record for record in VinDr(root).images}
    if any(record.extra.get("template_image_id") is None for record in records.values()):
        raise GBCIError(f"{root} has images without template_image_id; expected the output of gbci-fast generate")
    return records


def _middle(mask: np.ndarray) -> tuple[slice, slice]:
    """The square of `NATIVE_SIZE` around the middle of a mask's box, shifted into the image."""
    xmin, ymin, xmax, ymax = bounding_box(mask)
    middles = zip(((ymin + ymax) // 2, (xmin + xmax) // 2), mask.shape, strict=True)
    starts = [min(max(middle - NATIVE_SIZE // 2, 0), side - NATIVE_SIZE) for middle, side in middles]
    return slice(starts[0], starts[0] + NATIVE_SIZE), slice(starts[1], starts[1] + NATIVE_SIZE)


def cut(image: np.ndarray, window: tuple[int, int, int], size: int = CROP_SIZE) -> np.ndarray:
    """A window of an image [H, W], zero beyond the edge, resampled to float32 [size, size].

    Args:
        image: float32 [H, W].
        window: (top, left, side) in pixels.
        size: side of the result; the window is smoothed first if it shrinks.
    """
    top, left, side = window
    out = np.zeros((side, side), np.float32)
    height, width = image.shape
    y0, y1, x0, x1 = max(top, 0), min(top + side, height), max(left, 0), min(left + side, width)
    out[y0 - top : y1 - top, x0 - left : x1 - left] = image[y0:y1, x0:x1]
    if side == size:
        return out
    return resize(out, (size, size), order=1, anti_aliasing=side > size).astype(np.float32)
