"""A judge that looks: a small network on windows at the model's own pixels."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gbci_fast.data.boxes import bounding_box
from gbci_fast.evaluate.lesions import LesionCase
from gbci_fast.evaluate.realism.paintings import Filling, fill
from gbci_fast.evaluate.realism.regions import Place, Region
from gbci_fast.evaluate.utility.patch_classifier import PatchSet, Phase, classify, fit_patch_classifier
from gbci_fast.evaluate.utility.patches import Patches

WINDOW = 48  # model pixels; larger lesions have several windows
STRIDE = 32  # model pixels between two windows of one lesion, at most
CELL = 8  # windows start at multiples of it, so that latent cells lie alike in all of them and in their mirror images
FEWEST = 20  # pixels of the region that a window must hold
CHANNELS, STRIDES, FIRST = (8, 16, 32, 64), (1, 2, 2, 2), 5  # full resolution first: the finest band is looked for
GROUPS = 8
LOCAL = 9  # pixels; the mean over such a square is taken away
TURNS = 8  # mirrorings and quarter turns


@dataclass(frozen=True, kw_only=True, eq=False)
class Windows:
    """Windows of the lesions of one set.

    Attributes:
        pixels: float32 [W, 2, `WINDOW`, `WINDOW`], the image in [0, 1] and the mask.
        lesions: number of the lesion of each window, int [W].
        patients: of each lesion.
    """

    pixels: np.ndarray
    lesions: np.ndarray
    patients: tuple[str, ...]

    def of(self, lesions: np.ndarray) -> "Windows":
        """The windows of some lesions, which are numbered anew in the given order; int [N], each at most once."""
        order = np.full(len(self.patients), -1)
        order[lesions] = np.arange(len(lesions))
        kept = order[self.lesions] >= 0
        return Windows(
            pixels=self.pixels[kept],
            lesions=order[self.lesions[kept]],
            patients=tuple(self.patients[i] for i in lesions),
        )

    @property
    def patches(self) -> Patches:
        """As what the trainer of networks takes."""
        return Patches(pixels=self.pixels, patients=tuple(self.patients[i] for i in self.lesions))


class DetailNetwork(nn.Module):
    """Four convolutions with GroupNorm, the first at full resolution; mean and maximum pooling, one logit.

    The image's local mean is taken away and the rest scaled to unit variance, so that brightness and contrast count
    less than texture.
    """

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for i, (inputs, outputs) in enumerate(zip((2, *CHANNELS), CHANNELS, strict=False)):
            size = FIRST if i == 0 else 3
            convolution = nn.Conv2d(inputs, outputs, size, stride=STRIDES[i], padding=size // 2)
            layers += [convolution, nn.GroupNorm(GROUPS, outputs), nn.SiLU()]
        self.features = nn.Sequential(*layers)
        self.head = nn.Linear(2 * CHANNELS[-1], 1)

    def forward(self, x: Tensor) -> Tensor:
        """The logits [N] of windows [N, 2, P, P]; positive = of the first class."""
        image, mask = x[:, :1], x[:, 1:]
        mean = F.avg_pool2d(F.pad(image, [LOCAL // 2] * 4, mode="reflect"), LOCAL, 1)
        detail = (image - mean) / ((image - mean).std((2, 3), keepdim=True) + 1e-3)
        features = self.features(torch.cat([detail, mask - 0.5], 1))
        return self.head(torch.cat([features.mean((2, 3)), features.amax((2, 3))], 1))[:, 0]


def cut_windows(cases: Sequence[LesionCase], places: Sequence[Place], filling: Filling, region: Region) -> Windows:
    """The windows of every case with its filling, flattened as the region says."""
    pixels, lesions = [], []
    for number, (case, place, inside) in enumerate(zip(cases, places, filling, strict=True)):
        image = place.show(fill(case, inside), region)
        for top, left in window_corners(case, place, region):
            cut = np.s_[top : top + WINDOW, left : left + WINDOW]
            pixels.append(np.stack([image[cut], case.mask[cut]]))
            lesions.append(number)
    return Windows(
        pixels=np.stack(pixels).astype(np.float32),
        lesions=np.array(lesions),
        patients=tuple(case.patient for case in cases),
    )


def window_corners(case: LesionCase, place: Place, region: Region) -> list[tuple[int, int]]:
    """(top, left) of a lesion's windows; at least one."""
    xmin, ymin, xmax, ymax = bounding_box(case.mask)
    height, width = case.mask.shape
    corners = [(y, x) for y in _starts(ymin, ymax, height) for x in _starts(xmin, xmax, width)]
    wanted = {"whole": place.mask, "interior": place.core, "ring": place.mask & ~place.core}[region]
    ys, xs = np.nonzero(wanted)
    ys, xs = ys + place.top, xs + place.left
    held = [((ys >= y) & (ys < y + WINDOW) & (xs >= x) & (xs < x + WINDOW)).sum() for y, x in corners]
    return [corner for corner, count in zip(corners, held, strict=True) if count >= min(FEWEST, max(held))]


def train_network(first: Windows, second: Windows, *, seed: int, steps: int, batch_size: int) -> DetailNetwork:
    """A network that tells lesions of the first set from those of the second."""
    data = PatchSet(lesions=first.patches, normal=second.patches)
    phase = Phase(data=data, steps=steps, augment=turn_at_random)
    return fit_patch_classifier([phase], seed=seed, batch_size=batch_size, build=DetailNetwork)


def score_windows(network: DetailNetwork, windows: Windows) -> np.ndarray:
    """The mean logit of every lesion over its windows and their `TURNS`, float64 [N]."""
    total = np.zeros(len(windows.pixels))
    for turn in range(TURNS):
        turned = np.ascontiguousarray(_turned(torch.from_numpy(windows.pixels), turn).numpy())
        total += classify(network, Patches(pixels=turned, patients=windows.patches.patients))
    counts = np.bincount(windows.lesions, minlength=len(windows.patients))
    return np.bincount(windows.lesions, total, minlength=len(windows.patients)) / (TURNS * counts)


def turn_at_random(x: Tensor, generator: torch.Generator) -> Tensor:
    """Mirrors or turns each window [N, C, P, P] at random, in one of `TURNS` ways."""
    turns, out = torch.randint(TURNS, (len(x),), generator=generator), x.clone()
    for turn in range(1, TURNS):
        out[turns == turn] = _turned(x[turns == turn], turn)
    return out


def _turned(x: Tensor, turn: int) -> Tensor:
    turned = x.rot90(turn % 4, (2, 3))
    return turned.flip(3) if turn >= 4 else turned


def _starts(low: int, high: int, size: int) -> list[int]:
    """Starts of windows along one axis that cover [low, high) and half a cell beside, within an image of `size`."""
    low, high = low - CELL // 2, high + CELL // 2
    count = 1 if high - low <= WINDOW else 1 + -(-(high - low - WINDOW) // STRIDE)
    centers = [(low + high) / 2] if count == 1 else np.linspace(low + WINDOW / 2, high - WINDOW / 2, count)
    last = (size - WINDOW) // CELL * CELL
    return sorted({int(min(max(round((center - WINDOW / 2) / CELL) * CELL, 0), last)) for center in centers})
