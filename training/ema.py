"""Exponential moving average of parameters, kept beside the model and stored in checkpoints."""

import torch
from torch import nn


class EMA:
    """``shadow = decay_t * shadow + (1 - decay_t) * parameter`` with ``decay_t = min(decay, (1 + t) / (10 + t))``.

    The ramp lets the average follow the fast first steps. Buffers are not averaged, since they never change here.
    """

    def __init__(self, module: nn.Module, decay: float):
        self.decay = decay
        self.shadow = {name: parameter.detach().clone() for name, parameter in module.named_parameters()}

    @torch.no_grad()
    def update(self, module: nn.Module, step: int) -> None:
        """Folds in the parameters after optimizer step `step` (counted from 0)."""
        weight = 1.0 - min(self.decay, (1 + step) / (10 + step))
        parameters = dict(module.named_parameters())
        torch._foreach_lerp_(list(self.shadow.values()), [parameters[name].detach() for name in self.shadow], weight)

    @torch.no_grad()
    def copy_to(self, module: nn.Module) -> None:
        """Overwrites the module's parameters with the average."""
        for name, parameter in module.named_parameters():
            parameter.copy_(self.shadow[name])
