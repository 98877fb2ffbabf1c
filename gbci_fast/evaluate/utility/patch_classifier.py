"""A small network that classifies patches as lesion or normal, trained for a fixed number of steps."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gbci_fast.errors import GBCIError
from gbci_fast.evaluate.utility.patches import Patches

LEARNING_RATE, WEIGHT_DECAY = 2e-3, 0.05
WARMUP = 0.1  # share of a phase's steps
CHANNELS = (16, 32, 64, 64)
GROUPS = 8
GAIN, GAMMA = 0.2, 0.3  # bounds of the stronger augmentation, as exponents of 2
RECIPE = ("1", LEARNING_RATE, WEIGHT_DECAY, WARMUP, CHANNELS, GROUPS, GAIN, GAMMA)
"""Identifies the training procedure; the first entry counts the changes of the code below."""
CLASSIFIED = 256  # patches classified together

Network = TypeVar("Network", bound=nn.Module)
Augmentation = Callable[[Tensor, torch.Generator], Tensor]
"""Maps patches, float32 [N, C, P, P] in [0, 1], to patches of the same shape and range."""


@dataclass(frozen=True, kw_only=True, eq=False)
class PatchSet:
    """Patches with and without a lesion.

    Raises:
        GBCIError: there are no patches of one kind.
    """

    lesions: Patches
    normal: Patches

    def __post_init__(self):
        for kind in ("lesions", "normal"):
            if not len(getattr(self, kind)):
                raise GBCIError(f"the {kind} patches of a set are 0; expected at least 1: use more images or patients")

    def __add__(self, other: "PatchSet") -> "PatchSet":
        return PatchSet(lesions=self.lesions + other.lesions, normal=self.normal + other.normal)


@dataclass(frozen=True, kw_only=True)
class Phase:
    """A part of a training: the patches, the number of optimizer steps, and the augmentation."""

    data: PatchSet
    steps: int
    augment: Augmentation


class PatchClassifier(nn.Module):
    """Four convolutions with GroupNorm (Wu and He 2018), three of them strided, mean and maximum pooling, one logit."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for i, (inputs, outputs) in enumerate(zip((1, *CHANNELS), CHANNELS, strict=False)):
            layers += [
                nn.Conv2d(inputs, outputs, 5 if i == 0 else 3, stride=2 if i < 3 else 1, padding=2 if i == 0 else 1),
                nn.GroupNorm(GROUPS, outputs),
                nn.SiLU(),
            ]
        self.features = nn.Sequential(*layers)
        self.head = nn.Linear(2 * CHANNELS[-1], 1)

    def forward(self, x: Tensor) -> Tensor:
        """The logits [N] of patches [N, 1, P, P] in [0, 1]; positive = lesion."""
        features = self.features((x - 0.5) / 0.25)
        return self.head(torch.cat([features.mean((2, 3)), features.amax((2, 3))], 1))[:, 0]


def fit_patch_classifier(
    phases: Sequence[Phase], *, seed: int, batch_size: int, build: Callable[[], Network] = PatchClassifier
) -> Network:
    """Trains on the phases one after the other, on the CPU; equal arguments give equal weights on one machine.

    Half of every batch are lesions, whatever their share in the data. The optimizer's state is kept between phases;
    every phase has its own warm-up and cosine schedule.

    Args:
        phases: parts of the training.
        seed: of initial weights, batches and augmentation.
        batch_size: patches per step, even.
        build: makes the network, which maps patches [N, C, P, P] to logits [N].
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = build()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    half = batch_size // 2
    labels = torch.cat([torch.ones(half), torch.zeros(half)])
    for phase in phases:
        pools = [_channels(kind) for kind in (phase.data.lesions, phase.data.normal)]
        for step in range(phase.steps):
            for group in optimizer.param_groups:
                group["lr"] = LEARNING_RATE * _schedule((step + 0.5) / phase.steps)
            batch = torch.cat([pool[torch.randint(len(pool), (half,), generator=generator)] for pool in pools])
            loss = F.binary_cross_entropy_with_logits(model(phase.augment(batch, generator)), labels)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
    return model.eval()


@torch.no_grad()
def classify(model: nn.Module, patches: Patches) -> np.ndarray:
    """The logits of patches, float64 [N].

    Raises:
        GBCIError: a logit is not finite, since the training diverged.
    """
    logits = torch.cat([model(part) for part in _channels(patches).split(CLASSIFIED)]).double().numpy()
    if not np.isfinite(logits).all():
        raise GBCIError("a patch classifier's score is NaN or infinity; its training diverged")
    return logits


def flip(x: Tensor, generator: torch.Generator) -> Tensor:
    """Mirrors each patch [N, C, P, P] at random along each axis."""
    for axis in (2, 3):
        chosen = torch.rand(len(x), 1, 1, 1, generator=generator) < 0.5
        x = torch.where(chosen, x.flip(axis), x)
    return x


def vary(x: Tensor, generator: torch.Generator) -> Tensor:
    """Classical augmentation: random flips, rotation by any angle (mirrored at the edges), gain and gamma."""
    x = flip(x, generator)
    angle = 2 * torch.pi * torch.rand(len(x), generator=generator)
    cos, sin, zero = angle.cos(), angle.sin(), torch.zeros_like(angle)
    turns = torch.stack([torch.stack([cos, -sin, zero], 1), torch.stack([sin, cos, zero], 1)], 1)
    grid = F.affine_grid(turns, list(x.shape), align_corners=False)
    x = F.grid_sample(x, grid, padding_mode="reflection", align_corners=False)
    gain, gamma = (2 ** (bound * (2 * torch.rand(len(x), 1, 1, 1, generator=generator) - 1)) for bound in (GAIN, GAMMA))
    return (gain * x.clamp(0, 1) ** gamma).clamp(0, 1)


def _channels(patches: Patches) -> Tensor:
    """The patches as float32 [N, C, P, P]."""
    x = torch.from_numpy(patches.pixels)
    return x if x.ndim == 4 else x[:, None]


def _schedule(done: float) -> float:
    """The factor of the learning rate after a share `done` of a phase: linear warm-up, then a cosine to zero."""
    if done < WARMUP:
        return done / WARMUP
    return 0.5 * (1 + float(np.cos(np.pi * (done - WARMUP) / (1 - WARMUP))))
