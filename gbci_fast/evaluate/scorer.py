"""A small classifier of lesion crops: an independent judge of painted lesions, and a feature extractor."""

import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from gbci_fast.attributes import FINDING_CATEGORIES, Attributes
from gbci_fast.data.boxes import bounding_box
from gbci_fast.errors import GBCIError
from gbci_fast.evaluate.lesions import CROP_SIZE, Crops, LesionCase
from gbci_fast.jobs.files import hash_weights
from gbci_fast.model.pipeline import PACKAGED_WEIGHTS

PACKAGED_SCORER = PACKAGED_WEIGHTS.with_name("scorer")
CATEGORY = "category/"  # task names: category/Mass, birads_high, malignancy, size
SIZE = "size"
HIGH_BIRADS = 4
CONFIG_FILE, MODEL_FILE = "config.json", "model.safetensors"
BATCH = 64


@dataclass(frozen=True, kw_only=True)
class ScorerConfig:
    """The tasks of a scorer and the data it was trained on.

    Attributes:
        tasks: names of the binary tasks, in the order of the outputs.
        median_diameter: in model pixels; the task `size` is positive above it.
        channels: widths of the network's stages.
        data: digest of the training tables.
        counts: ``{task: {"real": [negative, positive], "phantom": [negative, positive]}}`` of the training lesions.
        split, fold: of the real patients that it was trained on.

    Raises:
        GBCIError: no task, or an unknown one.
    """

    tasks: tuple[str, ...]
    median_diameter: float
    channels: tuple[int, ...] = (16, 32, 64, 64)
    data: str = ""
    counts: Mapping[str, Mapping[str, Sequence[int]]] | None = None
    split: str = "training"
    fold: str = "A"

    def __post_init__(self):
        known = (*(CATEGORY + name for name in FINDING_CATEGORIES), "birads_high", "malignancy", SIZE)
        for task in self.tasks:
            if task not in known:
                raise GBCIError(f"task is {task!r}; expected one of {', '.join(known)}")
        if not self.tasks:
            raise GBCIError("tasks are empty; expected at least one")


class LesionNet(nn.Module):
    """Two residual trunks with group norm: one sees only masked pixels, the other a window of fixed scale.

    The second serves only the task `size`: the crops of the first are scaled to one size.
    """

    def __init__(self, tasks: Sequence[str], channels: Sequence[int]):
        super().__init__()
        self.tasks = tuple(tasks)
        self.roi, self.window = _Trunk(channels), _Trunk(channels)
        self.roi_head = nn.Linear(channels[-1], sum(task != SIZE for task in tasks))
        self.window_head = nn.Linear(channels[-1], 1)
        self.dropout = nn.Dropout(0.2)

    def forward(self, roi: Tensor, window: Tensor) -> Tensor:
        """The logits [N, len(tasks)].

        Args:
            roi: [N, C, C] in [0, 1], `Crops.roi`.
            window: [N, C, C] in [0, 1], of `cut_windows`.
        """
        seen = self.roi_head(self.dropout(self.roi(roi)))
        size = self.window_head(self.dropout(self.window(window)))[:, 0]
        others = iter(seen.unbind(1))
        return torch.stack([size if task == SIZE else next(others) for task in self.tasks], 1)


class _Trunk(nn.Module):
    def __init__(self, channels: Sequence[int]):
        super().__init__()
        self.stem = nn.Conv2d(2, channels[0], 5, stride=2, padding=2)
        pairs = itertools.pairwise(channels)
        self.blocks = nn.Sequential(*(_Block(before, after) for before, after in pairs))

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, C] to [N, D]."""
        mean, sd = x.mean((1, 2), keepdim=True), x.std((1, 2), keepdim=True)
        both = torch.stack([2 * x - 1, (x - mean) / (sd + 0.02)], 1)  # film and detector differ in their gray scales
        return self.blocks(self.stem(both)).mean((2, 3))


class _Block(nn.Module):
    """Pre-activation residual block (He et al. 2016) with group norm; halves the side."""

    def __init__(self, before: int, after: int):
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(8, before), nn.GroupNorm(8, after)
        self.conv1 = nn.Conv2d(before, after, 3, stride=2, padding=1)
        self.conv2 = nn.Conv2d(after, after, 3, padding=1)
        self.skip = nn.Conv2d(before, after, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(torch.relu(self.norm1(x)))
        y = self.conv2(torch.relu(self.norm2(y)))
        return y + self.skip(nn.functional.avg_pool2d(x, 2))


class Scorer:
    """A trained `LesionNet` in evaluation mode, float32 on the CPU."""

    def __init__(self, net: LesionNet, config: ScorerConfig, digest: str = ""):
        self.net, self.config, self.digest = net.float().eval(), config, digest

    @torch.no_grad()
    def predict(self, crops: Crops, windows: np.ndarray) -> dict[str, np.ndarray]:
        """{task: probability of the positive class, float64 [N]}.

        Args:
            crops: of the lesions.
            windows: float32 [N, C, C] of `cut_windows`, for the task `size`.
        """
        parts = zip(*(torch.from_numpy(np.array(x)).split(BATCH) for x in (crops.roi, windows)), strict=True)
        logits = torch.cat([self.net(roi, window) for roi, window in parts])
        return dict(zip(self.config.tasks, logits.sigmoid().double().numpy().T, strict=True))

    @torch.no_grad()
    def features(self, crops: Crops) -> np.ndarray:
        """The input of the masked pixels' head, float64 [N, D]."""
        return torch.cat([self.net.roi(x) for x in torch.from_numpy(crops.roi).split(BATCH)]).double().numpy()

    def save(self, folder: Path) -> None:
        """Writes config.json and model.safetensors (fp16) to a new `folder`."""
        folder.mkdir(parents=True)
        state = {name: value.detach().half().cpu().contiguous() for name, value in self.net.state_dict().items()}
        save_file(state, folder / MODEL_FILE)
        (folder / CONFIG_FILE).write_text(json.dumps(asdict(self.config), indent=1) + "\n", encoding="utf-8")


class ScorerFeatures:
    """The scorer's penultimate layer as an `Extractor`.

    Args:
        folder: of a scorer; None = the packaged one.
    """

    name = "scorer"

    def __init__(self, folder: Path | None = None):
        self.scorer = load_scorer(folder)
        self.digest = self.scorer.digest

    def __call__(self, crops: Crops) -> np.ndarray:
        """float64 [N, D]."""
        return self.scorer.features(crops)


def load_scorer(folder: Path | None = None) -> Scorer:
    """The scorer in `folder`, as `gbci-fast train classifier` writes it; None = the packaged one.

    Raises:
        GBCIError: the folder holds no scorer, or a damaged one.
    """
    folder = folder or PACKAGED_SCORER
    for name in (CONFIG_FILE, MODEL_FILE):
        if not (folder / name).is_file():
            raise GBCIError(f"{folder} has no {name}; expected a scorer as `gbci-fast train classifier` writes")
    try:
        config = _read_config(json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8")))
        net = LesionNet(config.tasks, config.channels)
        net.load_state_dict({name: value.float() for name, value in load_file(folder / MODEL_FILE).items()})
    except Exception as error:  # json, safetensors and torch raise half a dozen types for a damaged folder
        raise GBCIError(f"{folder} cannot be loaded as a scorer: {' '.join(str(error).split())}") from error
    return Scorer(net, config, hash_weights(folder))


def cut_windows(cases: Sequence[LesionCase], images: Sequence[np.ndarray] | None = None) -> np.ndarray:
    """Squares of `CROP_SIZE` model pixels around the masks' centers, float32 [N, C, C]; zero beyond the image's edge.

    Args:
        cases: the lesions.
        images: float32 [S, S] in [0, 1], one per case; None = the cases' own.
    """
    images = [case.pixels for case in cases] if images is None else images
    windows = np.empty((len(cases), CROP_SIZE, CROP_SIZE), np.float32)
    for i, (case, image) in enumerate(zip(cases, images, strict=True)):
        xmin, ymin, xmax, ymax = bounding_box(case.mask)
        # After padding by half a window, the window starts at the center's index.
        top, left = (ymin + ymax) // 2, (xmin + xmax) // 2
        windows[i] = np.pad(image, CROP_SIZE // 2)[top : top + CROP_SIZE, left : left + CROP_SIZE]
    return windows


def label(task: str, attributes: Attributes, diameter: float, median_diameter: float) -> bool | None:
    """The truth of one binary task; None = unknown.

    Args:
        task: out of `ScorerConfig.tasks`.
        attributes: of the lesion.
        diameter: of the lesion in model pixels.
        median_diameter: the task `size` is positive above it.
    """
    if task.startswith(CATEGORY):
        categories = attributes.finding_categories
        return None if categories is None else task.removeprefix(CATEGORY) in categories
    if task == "birads_high":
        birads = attributes.finding_birads
        return None if birads in (None, 1) else birads >= HIGH_BIRADS
    if task == "malignancy":
        return None if attributes.pathology is None else attributes.pathology == "malignant"
    return diameter > median_diameter


def labels(cases: Sequence[LesionCase], tasks: Sequence[str], median_diameter: float) -> np.ndarray:
    """The truths of all tasks, float64 [N, len(tasks)]: 1, 0, or NaN = unknown."""
    rows = [[label(task, case.attributes, case.diameter, median_diameter) for task in tasks] for case in cases]
    return np.array(rows, dtype=object).astype(np.float64).reshape(len(cases), len(tasks))


def _read_config(values: Mapping[str, Any]) -> ScorerConfig:
    known = {field.name for field in fields(ScorerConfig)}
    unknown = sorted(values.keys() - known)
    if unknown:
        raise GBCIError(f"{CONFIG_FILE} holds {unknown[0]!r}; expected {', '.join(sorted(known))}")
    lists = {name: tuple(values[name]) for name in ("tasks", "channels") if name in values}
    return ScorerConfig(**{**values, **lists})
