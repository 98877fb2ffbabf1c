"""Windowed denoising: only the latents around a lesion are denoised, with the context of the whole image.

The cost follows the size of the lesion. The technique is approximate, because the UNet's normalizations and
self-attention see the window instead of the image. The ViT's tokens are those of the whole image.
"""

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from gbci_fast.model.noise import STREAM_SCHEDULER, seed_tensor
from gbci_fast.model.pipeline import LATENT_FEATHER, GBCIPipeline, Trajectory
from gbci_fast.ops.mask_to_latent import mask_to_latent
from gbci_fast.ops.philox_normal import philox_normal

SIDES = (8, 12, 16, 20, 24, 28, 32, 40)
"""Sides of windows in latent cells. A mask that is too large for all of them takes the whole latents."""
HALO = 6
"""Latent cells around the blend weight. On real lesions 2, 4 and 6 cells gave a mean RoI PSNR to the whole run of 36.9,
38.5 and 39.8 dB, at 0.5, 0.7 and 1 times the UNet's cost. Windows that start at multiples of the UNet's stride, or a
few steps on the whole latents, were no better than a halo of the same cost. (Measured with an earlier checkpoint.)"""
NOTE = f"windowed: the latents around each mask and {HALO} cells more alone; whole where known_region is False"


@dataclass(frozen=True, kw_only=True)
class Group:
    """Samples of a batch whose windows are of one size, so that they can be denoised together.

    Attributes:
        rows: indices of the G samples in the batch.
        corners: (y, x) of each sample's window, in latent cells.
        height, width: of the windows, in latent cells.
    """

    rows: list[int]
    corners: list[tuple[int, int]]
    height: int
    width: int

    def crop(self, batch: Tensor) -> Tensor:
        """``[B, C, h, w]`` -> ``[G, C, height, width]``."""
        return torch.stack(self._views(batch))

    def paste(self, windows: Tensor, batch: Tensor) -> Tensor:
        """Writes windows ``[G, C, height, width]`` to their places in `batch` ``[B, C, h, w]``, and returns `batch`."""
        for view, window in zip(self._views(batch), windows, strict=True):
            view.copy_(window)
        return batch

    def _views(self, batch: Tensor) -> list[Tensor]:
        return [
            batch[row, :, y : y + self.height, x : x + self.width]
            for row, (y, x) in zip(self.rows, self.corners, strict=True)
        ]


def choose(mask_latents: Tensor, halo: int, stride: int, *, together: bool = False) -> list[Group]:
    """A square window for every sample, of the smallest of `SIDES` that is large enough.

    A window holds every cell whose blend weight is not 0, and `halo` cells around them within the image.

    Args:
        mask_latents: ``[B, 1, h, w]`` of zeros and ones, sides divisible by `stride`.
        halo: cells.
        stride: the product of the UNet's strides; sides that it does not divide are skipped.
        together: whether all samples get the largest window, as one group.

    Returns:
        Groups that hold every sample once, from the smallest windows to the largest.
    """
    extents = mask_latents.shape[-2:]
    corners = mask_to_latent(mask_latents, 1, feather=LATENT_FEATHER, halo=halo)[2].tolist()
    boxes = [((ymin, ymax), (xmin, xmax)) for xmin, ymin, xmax, ymax in corners]
    sides = [_side(max(high - low for low, high in box), max(extents), stride) for box in boxes]
    if together:
        sides = [max(sides)] * len(sides)
    groups: dict[int, Group] = {}
    for row, (box, side) in enumerate(zip(boxes, sides, strict=True)):
        height, width = (min(side, extent) for extent in extents)
        group = groups.setdefault(side, Group(rows=[], corners=[], height=height, width=width))
        group.rows.append(row)
        group.corners.append(
            tuple(
                min(max((low + high - length) // 2, 0), extent - length)
                for (low, high), length, extent in zip(box, (height, width), extents, strict=True)
            )
        )
    return [groups[side] for side in sorted(groups)]


def _side(needed: int, largest: int, stride: int) -> int:
    return next((side for side in SIDES if needed <= side < largest and side % stride == 0), largest)


@dataclass(kw_only=True)
class Part(Trajectory):
    """The part of a trajectory that lies in a group's windows.

    Attributes:
        whole: the trajectory.
        group: the samples and their windows.
        draw: a step's index -> the scheduler's noise in the windows.
    """

    whole: Trajectory
    group: Group
    draw: Callable[[int], Tensor]

    def call_back(self, pipe: GBCIPipeline, step: int, latents: Tensor) -> Tensor:
        """As `Trajectory.call_back`; the callback gets whole latents, with the known region around the windows."""
        if self.callback is None:
            return latents
        known = self.whole.image_latents.clone()
        if step + 1 < len(self.timesteps):
            t_next = self.timesteps[step + 1].expand(len(known))
            scheduler = copy.copy(pipe.scheduler)
            scheduler._begin_index = None  # or some schedulers would use that step's level instead of this one's
            known = scheduler.add_noise(known, self.whole.noise, t_next)
        latents = self.whole.call_back(pipe, step, self.group.paste(latents, known))
        self.noise, self.image_latents = (self.group.crop(t) for t in (self.whole.noise, self.whole.image_latents))
        return self.group.crop(latents)


def split(run: Trajectory, stride: int) -> list[Part]:
    """The parts of a trajectory that its masks need; a single part if there is a callback, which sees all samples."""
    groups = choose(run.mask_latents, HALO, stride, together=run.callback is not None)

    @functools.cache  # so that a generator draws once for all windows, in step order
    def draw(step: int) -> list[Tensor]:
        noise = draw_noise(run, step)
        return [group.crop(noise) for group in groups]

    return [_part(run, group, lambda step, i=i: draw(step)[i]) for i, group in enumerate(groups)]


def draw_noise(run: Trajectory, step: int) -> Tensor:
    """The scheduler's noise of a step for the whole latents, float32."""
    latents = run.latents
    if run.seeds is None:
        return randn_tensor(latents.shape, run.generator, latents.device, torch.float32)
    return philox_normal(seed_tensor(run.seeds, latents.device), latents.shape[1:], step=step, stream=STREAM_SCHEDULER)


def _part(whole: Trajectory, group: Group, draw: Callable[[int], Tensor]) -> Part:
    tensors = ("latents", "noise", "image_latents", "masked_image_latents", "mask_latents")
    cropped = {name: group.crop(getattr(whole, name)) for name in tensors}
    fields = vars(whole) | cropped | {"conditioning": whole.conditioning.select(group.rows)}
    return Part(whole=whole, group=group, draw=draw, **fields)
