"""Readers of lesion crops: linear maps of EfficientNet-Lite0's features that tell margin, shape, BI-RADS and more."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from safetensors.numpy import load_file, save_file

from gbci_fast.attributes import Attributes
from gbci_fast.data.boxes import bounding_box
from gbci_fast.errors import GBCIError
from gbci_fast.evaluate.backbone import MIDDLE_WIDTH, open_lite0
from gbci_fast.evaluate.lesions import LesionCase, OnProgress, cut
from gbci_fast.jobs.files import hash_weights
from gbci_fast.model.pipeline import PACKAGED_WEIGHTS

PACKAGED_READERS = PACKAGED_WEIGHTS.with_name("readers")
CONFIG_FILE, MODEL_FILE = "config.json", "model.safetensors"
SIDE = 160  # of the network's input, in pixels
CROPS = (1.6, 3.0)  # sides of the two crops, as multiples of the longer side of the lesion's box
WINDOW = 32  # side in model pixels of the window of fixed scale
STRETCH = (1, 99)  # percentiles that become 0 and 1
LEAST_CONTRAST = 1 / 255  # of a crop; noise below it is not stretched further
LEAST_AUC = 0.60  # the lower bound of the AUC that admits a reader
BATCH = 8  # lesions

SIZE = "size"


@dataclass(frozen=True, kw_only=True)
class Task:
    """A question with two answers about a lesion.

    Attributes:
        positive, negative: the answers, in words.
        truth: ``f(attributes, diameter, median_diameter)``: the answer, or None = unknown.
        scaled: whether the crops are scaled to the lesion; otherwise the reader sees a window of `WINDOW` model pixels.
    """

    positive: str
    negative: str
    truth: Callable[[Attributes, float, float], bool | None]
    scaled: bool = True


def _among(field: str, positive: Sequence[Any], negative: Sequence[Any]) -> Callable[..., bool | None]:
    def answer(attributes: Attributes, diameter: float, median_diameter: float) -> bool | None:
        value = getattr(attributes, field)
        return value in positive if value in (*positive, *negative) else None

    return answer


TASKS = {
    "margin": Task(
        positive="spiculated", negative="circumscribed", truth=_among("margin", ["spiculated"], ["circumscribed"])
    ),
    "shape": Task(
        positive="irregular", negative="round or oval", truth=_among("shape", ["irregular"], ["round", "oval"])
    ),
    "birads": Task(positive="BI-RADS 5", negative="2 or 3", truth=_among("finding_birads", [5], [2, 3])),
    "pathology": Task(positive="malignant", negative="benign", truth=_among("pathology", ["malignant"], ["benign"])),
    SIZE: Task(
        positive="larger", negative="smaller", truth=lambda _, diameter, median: diameter > median, scaled=False
    ),
}


def truth(task: str, attributes: Attributes, diameter: float, median_diameter: float) -> bool | None:
    """The answer to one task; None = unknown.

    Args:
        task: out of `TASKS`.
        attributes: of the lesion.
        diameter: of the lesion in model pixels, see `LesionCase.diameter`.
        median_diameter: `Readers.median_diameter`; "size" is positive above it.
    """
    return TASKS[task].truth(attributes, diameter, median_diameter)


def truths(cases: Sequence[LesionCase], task: str, median_diameter: float) -> np.ndarray:
    """The answers of all cases, float64 [N]: 1, 0, or NaN = unknown.

    NaN stands for all lesions of a data set whose known answers are all the same: such a set teaches only how to tell
    it from the others.
    """
    answers = [truth(task, case.attributes, case.diameter, median_diameter) for case in cases]
    found = np.array(answers, dtype=object).astype(np.float64)
    sets = np.array([case.root for case in cases])
    for name in np.unique(sets):
        known = found[(sets == name) & ~np.isnan(found)]
        if len(known) and known.min() == known.max():
            found[sets == name] = np.nan
    return found


class Interval(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A measured value with its 95 % interval over patients; None where it is undefined."""

    value: float | None
    low: float | None
    high: float | None


class Record(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How a reader was trained and how well it reads.

    Attributes:
        trained, judged: ``{data set: [negative, positive]}`` lesions of the training folds and of fold C.
        components, regularization: chosen by cross-validation over the training patients: principal components that
            are kept, and the logistic regression's C.
        cross_validated: AUC of that cross-validation.
        auc: AUC on fold C, within data sets.
        size_auc: AUC on the same lesions of the diameter alone.
        matched_auc: AUC on fold C among lesions of about the same diameter; None for "size".
        by_set: AUC on fold C of every data set with both classes.
    """

    trained: dict[str, tuple[int, int]]
    judged: dict[str, tuple[int, int]]
    components: int
    regularization: float
    cross_validated: float
    auc: Interval
    size_auc: Interval
    matched_auc: Interval | None
    by_set: dict[str, Interval]

    @property
    def admitted(self) -> bool:
        """Whether the lower bound of the AUC on fold C is at least `LEAST_AUC`."""
        return self.auc.low is not None and self.auc.low >= LEAST_AUC


class ReadersConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a folder of readers says about them.

    Attributes:
        median_diameter: of the training lesions, in model pixels.
        backbone: SHA-256 of the weights that the features were made with.
        data: digest of the training tables.
        folds, split: of the training patients.
        tasks: the admitted readers.
        refused: readers that were trained and not admitted; their maps are not kept.
        control: AUC on fold C with which the crops' features tell one data set from the others, by data set.

    Raises:
        GBCIError: no task, an unknown one, or one whose record does not admit it.
    """

    median_diameter: float
    backbone: str
    data: str
    folds: str
    split: str
    tasks: dict[str, Record]
    refused: dict[str, Record]
    control: dict[str, Interval]

    def __post_init__(self):
        if not self.tasks:
            raise GBCIError("tasks are empty; expected at least one")
        for task, record in self.tasks.items():
            if task not in TASKS:
                raise GBCIError(f"task is {task!r}; expected one of {', '.join(TASKS)}")
            if not record.admitted:
                raise GBCIError(
                    f"the lower bound of the AUC of {task} is {record.auc.low}; expected at least {LEAST_AUC}"
                )


@dataclass(frozen=True, kw_only=True, eq=False)
class LinearMap:
    """A reader: ``logit = features @ weight + bias``; `weight` is float32 [D]."""

    weight: np.ndarray
    bias: float

    def __call__(self, features: np.ndarray) -> np.ndarray:
        """The logits, float64 [N], of features [N, D]."""
        return features.astype(np.float64) @ self.weight.astype(np.float64) + self.bias


class Readers:
    """Readers of several tasks.

    Attributes:
        config: with the AUCs.
        tasks: the admitted tasks.
        median_diameter: "size" is positive above it, in model pixels.
        digest: SHA-256 of the folder.
    """

    def __init__(self, config: ReadersConfig, maps: Mapping[str, LinearMap], digest: str = ""):
        self.config, self._maps, self.digest = config, maps, digest
        self.tasks = tuple(config.tasks)
        self.median_diameter = config.median_diameter

    def read(
        self,
        cases: Sequence[LesionCase],
        images: Sequence[np.ndarray] | None = None,
        on_progress: OnProgress = lambda stage, done, total: None,
    ) -> dict[str, np.ndarray]:
        """{task: logit of the positive answer, float64 [N]}; see `TASKS`.

        Args:
            cases: the lesions; their `lesion` decides what is cut out, also from `images`.
            images: float32 [S, S] in [0, 1], one per case; None = the cases' own.
            on_progress: called as ``f("features", done, total)``.

        Raises:
            GBCIError: EfficientNet-Lite0 is not installed.
        """
        seen = features_of(cases, images, on_progress=on_progress)
        return {task: self._maps[task](seen[TASKS[task].scaled]) for task in self.tasks}

    def save(self, folder: Path) -> None:
        """Writes `CONFIG_FILE` and `MODEL_FILE` to a new `folder`."""
        folder.mkdir(parents=True)
        tensors = {}
        for task, found in self._maps.items():
            tensors[f"{task}.weight"] = np.ascontiguousarray(found.weight, np.float32)
            tensors[f"{task}.bias"] = np.array([found.bias], np.float32)
        save_file(tensors, folder / MODEL_FILE)
        text = msgspec.json.format(msgspec.json.encode(self.config), indent=1)
        (folder / CONFIG_FILE).write_bytes(text + b"\n")


def describe(auc: Interval) -> str:
    """An AUC with its interval, such as "0.81 (0.75-0.87)"."""
    if auc.value is None:
        return "unknown"
    return f"{auc.value:.2f}" + ("" if auc.low is None else f" ({auc.low:.2f}-{auc.high:.2f})")


def load_readers(folder: Path | None = None) -> Readers:
    """The readers in `folder`, as `gbci-fast train classifier` writes them; None = the packaged ones.

    Raises:
        GBCIError: the folder holds no readers, damaged ones, or readers of other features than the installed ones.
    """
    folder = folder or PACKAGED_READERS
    for name in (CONFIG_FILE, MODEL_FILE):
        if not (folder / name).is_file():
            raise GBCIError(f"{folder} has no {name}; expected readers as `gbci-fast train classifier` writes")
    try:
        config = msgspec.json.decode((folder / CONFIG_FILE).read_bytes(), type=ReadersConfig)
        tensors = load_file(folder / MODEL_FILE)
        maps = {task: _read_map(tensors, task) for task in config.tasks}
    except Exception as error:  # msgspec, safetensors and numpy raise half a dozen types for a damaged folder
        raise GBCIError(f"{folder} cannot be loaded as readers: {' '.join(str(error).split())}") from error
    if config.backbone != open_lite0().digest:
        raise GBCIError(f"{folder} was trained on other weights of EfficientNet-Lite0 than the installed ones")
    return Readers(config, maps, hash_weights(folder))


def _read_map(tensors: Mapping[str, np.ndarray], task: str) -> LinearMap:
    weight, expected = tensors[f"{task}.weight"], (len(CROPS) if TASKS[task].scaled else 1) * MIDDLE_WIDTH
    if weight.shape != (expected,):
        raise GBCIError(f"{task}.weight has the shape {list(weight.shape)}; expected [{expected}]")
    return LinearMap(weight=weight, bias=float(tensors[f"{task}.bias"][0]))


def features_of(
    cases: Sequence[LesionCase],
    images: Sequence[np.ndarray] | None = None,
    on_progress: OnProgress = lambda stage, done, total: None,
) -> dict[bool, np.ndarray]:
    """What the readers see: ``{True: of the crops, [N, 2 x 384]; False: of the window, [N, 384]}``, float32.

    Features are those of `Lite0.middle`, means over an image and its mirror image. Arguments are as for `Readers.read`.

    Raises:
        GBCIError: EfficientNet-Lite0 is not installed.
    """
    net = open_lite0()
    images = [case.pixels for case in cases] if images is None else images
    parts = []
    for start in range(0, len(cases), BATCH):
        rows = slice(start, start + BATCH)
        pixels = np.concatenate([see(case, image) for case, image in zip(cases[rows], images[rows], strict=True)])
        parts.append((net.middle(pixels) + net.middle(pixels[:, :, ::-1])) / 2)
        on_progress("features", min(start + BATCH, len(cases)), len(cases))
    found = np.concatenate(parts).reshape(len(cases), -1)
    crops, window = np.split(found, [len(CROPS) * MIDDLE_WIDTH], axis=1)
    return {True: crops, False: window}


def see(case: LesionCase, image: np.ndarray) -> np.ndarray:
    """The crops and the window around a lesion, float32 [len(CROPS) + 1, SIDE, SIDE] in [0, 1], each stretched.

    Args:
        case: its `lesion` decides place and scale.
        image: float32 [S, S] in [0, 1].
    """
    xmin, ymin, xmax, ymax = bounding_box(case.lesion)
    longer = max(xmax - xmin, ymax - ymin)
    sides = [max(1, round(factor * longer)) for factor in CROPS] + [WINDOW]
    return np.stack([_stretch(cut(image, ((ymin + ymax - s) // 2, (xmin + xmax - s) // 2, s), SIDE)) for s in sides])


def _stretch(pixels: np.ndarray) -> np.ndarray:
    low, high = np.percentile(pixels, STRETCH)
    return np.clip((pixels - low) / max(high - low, LEAST_CONTRAST), 0, 1).astype(np.float32)
