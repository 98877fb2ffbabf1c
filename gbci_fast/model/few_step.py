"""The few-step student that a checkpoint may hold: a low-rank change of its UNet with guidance built in."""

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
    """The low-rank change of a UNet: ``<layer>.up`` [rows, rank] and ``<layer>.down`` [rank, columns] per layer.

    Args:
        layers: {name of a changed layer: (rows, rank, columns)}; ``up @ down`` is added to the layer's weight.
        guidance_scale: of the guided teacher, whose result the student reproduces without guidance.
        steps: number of steps of the student from noise to clean latents.

    Raises:
        GBCIError: the guidance scale is not a finite number, or steps or a size are not whole numbers above 0.
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
        """The change that ``<layer>.up`` and ``<layer>.down`` tensors hold; they are copied."""
        names = [name.removesuffix(".up") for name in tensors if name.endswith(".up")]
        layers = {name: (*tensors[f"{name}.up"].shape, tensors[f"{name}.down"].shape[1]) for name in names}
        made = cls(layers=layers, guidance_scale=guidance_scale, steps=steps)
        made.load_state_dict(dict(tensors))
        return made

    @torch.no_grad()
    def apply_to(self, unet: UNet2DConditionModel) -> UNet2DConditionModel:
        """A copy of `unet` with the change in its weights.

        Raises:
            GBCIError: the UNet lacks a changed layer, or the layer has another shape.
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
            with without_autocast(weight.device):  # the calling code may have enabled it
                weight += (change.up.float() @ change.down.float()).view_as(weight).to(weight)
        return student

    def note(self) -> str:
        """One line for users: the calls for which `gbci_fast.accelerate` uses the student."""
        steps, scale = self.config.steps, self.config.guidance_scale
        return f"few-step weights: up to {steps} steps at guidance {scale:g} and eta 0"

    def covers(self, num_inference_steps: int, guidance_scale: float, eta: float) -> bool:
        """Whether the student can take over a call: its number of steps or fewer, its guidance scale, and eta 0.

        docs/training.md has measurements with fewer steps than the student was trained for.
        """
        few = num_inference_steps <= self.config.steps
        return few and guidance_scale == self.config.guidance_scale and eta == 0


def _is_count(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool) and value >= 1


def few_step_scheduler(like: SchedulerMixin) -> DDIMScheduler:
    """DDIM from the noisiest timestep to clean latents, on the noise schedule of `like`.

    Raises:
        GBCIError: `like` is a scheduler for another kind of model, whose noise schedule DDIM cannot use.
    """
    check_scheduler(like)
    return DDIMScheduler.from_config(
        like.config, timestep_spacing="trailing", set_alpha_to_one=True, clip_sample=False, thresholding=False
    )
