"""Training of the scorer: masked lesion crops, several binary tasks, labels that may be missing."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from gbci_fast.attributes import FINDING_CATEGORIES
from gbci_fast.data.cache import is_cache
from gbci_fast.data.vindr import VinDr
from gbci_fast.errors import GBCIError
from gbci_fast.evaluate.lesions import CROP_SIZE, LesionCase, crop_lesions, read_lesions
from gbci_fast.evaluate.painting import ring_mean_fill
from gbci_fast.evaluate.scorer import CATEGORY, SIZE, LesionNet, Scorer, ScorerConfig, cut_windows, labels
from gbci_fast.jobs.files import replace_folder
from gbci_fast.training.sheets import save_sheet

PHANTOM = "phantom"  # value of the column source


@dataclass(frozen=True, kw_only=True)
class ClassifierConfig:
    """Network, augmentation, and the number of lesions that a task needs."""

    channels: tuple[int, ...] = (16, 32, 64, 64)
    fewest: int = 30  # lesions that a task needs in each class
    rotation: float = 20.0  # largest, in degrees
    shift: float = 3.0  # largest, in crop pixels
    zoom: float = 0.1  # largest change of scale of the masked crops; windows are not scaled, since `size` depends on it
    jitter: int = 2  # largest growth or shrinkage of a mask, in pixels
    foreign: float = 0.5  # share of the masks that are intersected with another lesion's mask
    erased: float = 0.25  # share of the windows with an erased lesion, whose target for `size` is 0.5
    smoothing: float = 0.05  # of labels


@dataclass(frozen=True, kw_only=True, eq=False)
class Examples:
    """N training lesions.

    Attributes:
        crops, masks: float32 [N, C, C].
        windows, erased: float32 [N, C, C], windows of fixed scale with the lesion, and with the lesion erased.
        truths: float32 [N, tasks], 1, 0, or NaN = unknown.
    """

    crops: Tensor
    masks: Tensor
    windows: Tensor
    erased: Tensor
    truths: Tensor


def read_training_lesions(roots: Sequence[Path]) -> tuple[list[LesionCase], list[LesionCase]]:
    """The lesions of the training split: those of real `roots` in fold A, and all of phantom roots.

    Raises:
        GBCIError: a root is a cache, or a group of roots has no lesion in the split.
    """
    for root in roots:
        if is_cache(root):
            raise GBCIError(f"{root} is a cache, which keeps no pathology; expected the VinDr-layout folder it is from")
    phantoms = [root for root in roots if _is_phantom(root)]
    real = [root for root in roots if root not in phantoms]
    return (
        read_lesions(real, split="training", folds="A") if real else [],
        read_lesions(phantoms, split="training") if phantoms else [],
    )


def choose_tasks(
    real: Sequence[LesionCase], phantom: Sequence[LesionCase], *, fewest: int, data: str, channels: tuple[int, ...]
) -> ScorerConfig:
    """The scorer's config with the tasks that have at least `fewest` lesions of each class, real and phantom together.

    Args:
        real, phantom: the training lesions.
        fewest: lesions per class.
        data: digest of the training tables.
        channels: widths of the network's stages.

    Raises:
        GBCIError: there is no such task.
    """
    cases = [*real, *phantom]
    median = float(np.median([case.diameter for case in real or phantom]))
    tasks = (*(CATEGORY + name for name in FINDING_CATEGORIES), "birads_high", "malignancy", SIZE)
    kinds = {"real": labels(real, tasks, median), "phantom": labels(phantom, tasks, median)}
    counts = {
        task: {kind: [int((truths[:, i] == value).sum()) for value in (0, 1)] for kind, truths in kinds.items()}
        for i, task in enumerate(tasks)
    }
    counts = {
        task: found for task, found in counts.items() if min(map(sum, zip(*found.values(), strict=True))) >= fewest
    }
    if not counts:
        raise GBCIError(f"no task has {fewest} lesions of both classes among {len(cases)}; expected more data")
    return ScorerConfig(
        tasks=tuple(counts),
        median_diameter=median,
        channels=channels,
        data=data,
        counts=counts,
        fold="A" if real else "-",
    )


def prepare_examples(cases: Sequence[LesionCase], config: ScorerConfig) -> Examples:
    """Crops, windows and labels of the training lesions."""
    crops = crop_lesions(cases)
    return Examples(
        crops=torch.from_numpy(crops.pixels),
        masks=torch.from_numpy(crops.masks).float(),
        windows=torch.from_numpy(cut_windows(cases)),
        erased=torch.from_numpy(cut_windows(cases, ring_mean_fill(cases))),
        truths=torch.from_numpy(labels(cases, config.tasks, config.median_diameter)).float(),
    )


class ClassifierTask:
    """Loss: cross-entropy of every task over the lesions of known truth, with equal weights of both classes."""

    def __init__(self, examples: Examples, scored: ScorerConfig, config: ClassifierConfig, device: torch.device):
        self.examples, self.scored, self.config, self.device = examples, scored, config, device
        self.module: nn.Module = LesionNet(scored.tasks, scored.channels)
        truths = examples.truths
        self.shares = ((truths == 1).sum(0) / (~truths.isnan()).sum(0)).clamp(0.01, 0.99)

    def loss(self, batch_size: int, generator: torch.Generator) -> Tensor:
        """The loss of one augmented batch."""
        rows = torch.randint(len(self.examples.truths), (batch_size,), generator=generator)
        roi, window, erased = self._augment(rows, generator)
        truths = self.examples.truths[rows]
        known = ~truths.isnan()
        truths = truths.nan_to_num()
        weights = known * torch.where(truths == 1, 0.5 / self.shares, 0.5 / (1 - self.shares))
        targets = truths * (1 - 2 * self.config.smoothing) + self.config.smoothing
        if SIZE in self.scored.tasks:
            column = self.scored.tasks.index(SIZE)
            targets[:, column] = torch.where(erased, 0.5, targets[:, column])
        logits = self.module(roi.to(self.device), window.to(self.device)).float()
        losses = functional.binary_cross_entropy_with_logits(logits, targets.to(self.device), reduction="none")
        return (losses * weights.to(self.device)).sum(1).mean() / len(self.scored.tasks)

    def sample_sheet(self, path: Path) -> None:
        """Writes a PNG of eight augmented examples: masked crops above windows."""
        rows = torch.linspace(0, len(self.examples.truths) - 1, 8).long()
        roi, window, _ = self._augment(rows, torch.Generator().manual_seed(0))
        save_sheet(path, [roi, window])

    def export(self, folder: Path) -> None:
        """Writes ``scorer/``."""
        net = LesionNet(self.scored.tasks, self.scored.channels)
        net.load_state_dict(self.module.state_dict())
        replace_folder(folder / "scorer", Scorer(net, self.scored).save)

    def _augment(self, rows: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Augmented masked crops and windows, float32 [B, C, C], and which windows are erased, bool [B]."""
        config, data, count = self.config, self.examples, len(rows)
        masks = data.masks[rows]
        foreign = data.masks[torch.randint(len(data.masks), (count,), generator=generator)] * masks
        use = (_uniform(count, generator) < config.foreign) & (foreign.sum((1, 2)) > 0.5 * masks.sum((1, 2)))
        masks = torch.where(use[:, None, None], foreign, masks)
        grid = self._grid(count, config.zoom, generator)
        crops = functional.grid_sample(data.crops[rows][:, None], grid, align_corners=False)
        masks = functional.grid_sample(masks[:, None], grid, align_corners=False)
        masks = self._jitter(masks > 0.5, generator)[:, 0]
        mean = (crops[:, 0] * masks).sum((1, 2)) / masks.sum((1, 2)).clamp(min=1)
        tone = (0.9 + 0.2 * _uniform(count, generator), torch.exp(0.4 * _uniform(count, generator) - 0.2))
        roi = torch.where(masks, crops[:, 0], mean[:, None, None])
        erased = _uniform(count, generator) < config.erased
        window = torch.where(erased[:, None, None], data.erased[rows], data.windows[rows])[:, None]
        window = functional.grid_sample(window, self._grid(count, 0.0, generator), align_corners=False)[:, 0]
        gain, gamma = (value[:, None, None] for value in tone)
        return (gain * roi**gamma).clamp(0, 1), (gain * window**gamma).clamp(0, 1), erased

    def _grid(self, count: int, zoom: float, generator: torch.Generator) -> Tensor:
        """Sampling grids [count, C, C, 2], each with a random rotation, shift, zoom and flip."""
        angle = torch.deg2rad((2 * _uniform(count, generator) - 1) * self.config.rotation)
        scale = 1 + (2 * _uniform(count, generator) - 1) * zoom
        flips = 2.0 * torch.randint(2, (2, count), generator=generator) - 1
        shift = (2 * torch.rand(2, count, generator=generator) - 1) * 2 * self.config.shift / CROP_SIZE
        cos, sin = scale * angle.cos(), scale * angle.sin()
        rows = [
            torch.stack([flips[0] * cos, -flips[1] * sin, shift[0]], 1),
            torch.stack([flips[0] * sin, flips[1] * cos, shift[1]], 1),
        ]
        return functional.affine_grid(torch.stack(rows, 1), [count, 1, CROP_SIZE, CROP_SIZE], align_corners=False)

    def _jitter(self, masks: Tensor, generator: torch.Generator) -> Tensor:
        """Grows or shrinks every mask, bool [B, 1, C, C], at random; a mask that would vanish is kept."""
        steps = torch.randint(-self.config.jitter, self.config.jitter + 1, (len(masks),), generator=generator)
        out = masks.clone()
        for step in steps.unique().tolist():
            chosen, side = steps == step, 2 * abs(step) + 1
            part = (masks if step >= 0 else ~masks)[chosen].float()
            grown = functional.max_pool2d(part, side, stride=1, padding=abs(step)) > 0.5
            out[chosen] = grown if step >= 0 else ~grown
        return torch.where(out.any(3, keepdim=True).any(2, keepdim=True), out, masks)


def _uniform(count: int, generator: torch.Generator) -> Tensor:
    return torch.rand(count, generator=generator)


def _is_phantom(root: Path) -> bool:
    findings = [finding for image in VinDr(root).images for finding in image.findings]
    return bool(findings) and all(finding.extra.get("source") == PHANTOM for finding in findings)
