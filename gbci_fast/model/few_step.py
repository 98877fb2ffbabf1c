"""The few-step student that a checkpoint may carry: a low-rank change of its UNet with guidance inside."""

import copy
import math
from collections.abc import Mapping
from numbers import Integral, Real

import torch
from diffusers import DDIMScheduler, SchedulerMixin, UNet2DConditionModel
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from gbci_fast.errors import GBCIError
from gbci_fast.model.devices import without_autocast
from gbci_fast.model.schedulers import check_scheduler


class FewStepLoRA(ModelMixin, ConfigMixin):
    """``<layer>.up`` [rows, rank] and ``<layer>.down`` [rank, columns] of every changed layer of a UNet.

    Args:
        layers: name of each changed layer -> (rows, rank, columns); a layer's weight gains ``up @ down`` in its shape.
        guidance_scale: of the guided teacher, which the student repeats without guidance.
        steps: that the student takes from noise to clean latents.

    Raises:
        GBCIError: the guidance scale is not a number, or the number of steps or a size is not a whole number above 0.
    """

    __module__ = "gbci_fast.few_step"  # what checkpoints name

    @register_to_config
    def __init__(self, layers: Mapping[str, tuple[int, int, int]], guidance_scale: float, steps: int):
        super().__init__()
        if (
            isinstance(guidance_scale, bool)
            or not isinstance(guidance_scale, Real)
            or not math.isfinite(guidance_scale)
        ):
            raise GBCIError(f"guidance_scale of the few-step weights is {guidance_scale!r}; expected a number")
        if not _is_count(steps):
            raise GBCIError(f"steps of the few-step weights is {steps!r}; expected a whole number from 1")
        for name, sizes in layers.items():
            if len(sizes) != 3 or not all(map(_is_count, sizes)):
                raise GBCIError(f"the few-step weights change {name} as {sizes!r}; expected three sizes")
            rows, rank, columns = sizes
            place: nn.Module = self
            for part in name.split("."):
                if not hasattr(place, part):
                    place.add_module(part, nn.Module())
                place = getattr(place, part)
            place.up = nn.Parameter(torch.zeros(rows, rank), requires_grad=False)
            place.down = nn.Parameter(torch.zeros(rank, columns), requires_grad=False)

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], guidance_scale: float, steps: int) -> "FewStepLoRA":
        """Made of ``<layer>.up`` and ``<layer>.down`` tensors, which are copied."""
        names = [name.removesuffix(".up") for name in tensors if name.endswith(".up")]
        layers = {name: (*tensors[f"{name}.up"].shape, tensors[f"{name}.down"].shape[1]) for name in names}
        made = cls(layers=layers, guidance_scale=guidance_scale, steps=steps)
        made.load_state_dict(dict(tensors))
        return made

    @torch.no_grad()
    def apply_to(self, unet: UNet2DConditionModel) -> UNet2DConditionModel:
        """A copy of `unet` with the change in its weights.

        Raises:
            GBCIError: the UNet lacks a changed layer, or has it in another shape.
        """
        student = copy.deepcopy(unet)
        for name, (rows, _, columns) in self.config.layers.items():
            try:
                weight = student.get_submodule(name).weight
            except AttributeError:
                raise GBCIError(f"the few-step weights change {name}, which this UNet lacks") from None
            if weight.shape[0] != rows or weight[0].numel() != columns:
                raise GBCIError(
                    f"the few-step weights change {name} as {rows} x {columns}; it is {list(weight.shape)} in this UNet"
                )
            change = self.get_submodule(name)
            with without_autocast(weight.device):  # of the call that it is made in
                weight += (change.up.float() @ change.down.float()).view_as(weight).to(weight)
        return student

    def note(self) -> str:
        """A sentence that says for which calls `gbci_fast.accelerate` uses these weights."""
        steps, scale = self.config.steps, self.config.guidance_scale
        return f"few-step weights: up to {steps} steps at guidance {scale:g} and eta 0"

    def covers(self, num_inference_steps: int, guidance_scale: float, eta: float) -> bool:
        """Whether the student samples a call: at most the steps it was trained for (measured in docs/training.md)."""
        few = num_inference_steps <= self.config.steps
        return few and guidance_scale == self.config.guidance_scale and eta == 0


def _is_count(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool) and value >= 1


def few_step_scheduler(like: SchedulerMixin) -> DDIMScheduler:
    """DDIM from the noisiest timestep to clean latents, on the noise schedule of `like`.

    Raises:
        GBCIError: `like` is for models of another kind, whose noise schedule DDIM does not have.
    """
    check_scheduler(like)
    return DDIMScheduler.from_config(
        like.config, timestep_spacing="trailing", set_alpha_to_one=True, clip_sample=False, thresholding=False
    )
