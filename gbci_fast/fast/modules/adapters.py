"""Adapters of PEFT, such as LoRA: their layers, and copies of modules with the adapters merged into the weights.

A layer with an adapter contains the stock layer, and adds to its output. Fused blocks are built from stock layers, so
they are built from the copy that `merged` makes.
"""

import copy
from collections import Counter
from typing import Any

import torch
from torch import nn

from gbci_fast.fast.modules.convolution import shared_copy
from gbci_fast.model.lora import is_adapter


def adapter_state(layer: Any) -> tuple[Any, ...]:
    """The state of a layer's adapters besides the weights. Scales are rounded to 9 digits: undoing one is inexact."""
    scales = tuple((name, f"{scale:.9g}") for name, scale in getattr(layer, "scaling", {}).items())
    return scales, tuple(layer.active_adapters), tuple(layer.merged_adapters), layer.disable_adapters


@torch.no_grad()
def merged(module: nn.Module, scale: float = 1.0) -> nn.Module:
    """A copy of a module that shares its parameters, with stock layers whose weights contain what adapters add.

    Returns the module itself where it has no adapters. A layer keeps adapters that have hooks, use dropout, or are of a
    kind that cannot be merged.

    Args:
        module: its adapters may be merged already, active or disabled; the copy computes what PEFT would.
        scale: factor on the scales of the active adapters.
    """
    if not any(is_adapter(part) for part in module.modules()):
        return module
    module = shared_copy(module)
    for part in list(module.modules()):
        for name, child in part.named_children():
            if is_adapter(child) and not is_adapter(part):
                setattr(part, name, _plain(child, scale))
    return module


def _plain(layer: Any, scale: float) -> nn.Module:
    """The stock layer with the adapters in its weights, or the layer itself where they cannot be merged."""
    listened_to = any(part._forward_hooks or part._forward_pre_hooks for part in layer.modules())
    drops_out = any(isinstance(part, nn.Dropout) and part.training and part.p > 0 for part in layer.modules())
    if listened_to or drops_out:
        return layer
    twin = copy.deepcopy(layer)
    try:
        if twin.disable_adapters:
            if twin.merged:
                twin.unmerge()
        elif not twin.merged:
            if scale != 1:
                twin.scale_layer(scale)
            twin.merge()
    except (AttributeError, NotImplementedError, RuntimeError, ValueError):
        return layer  # an adapter of a kind that cannot be merged
    return twin.get_base_layer()


def _has_any(layer: Any) -> bool:
    """Whether a PEFT layer still has adapters."""
    return any(len(getattr(layer, names)) for names in layer.adapter_layer_names)


def adapter_notes(module: nn.Module) -> list[str]:
    """Names the adapters in a module, one sentence each; empty if there are none."""
    layers = [part for part in module.modules() if is_adapter(part) and _has_any(part)]
    active, fused = Counter(), Counter()
    for layer in layers:
        kinds = fused if layer.merged else active
        if not layer.disable_adapters:
            kinds.update(layer.merged_adapters if layer.merged else layer.active_adapters)
    notes = [f"adapter {name} in {count} layers" for name, count in active.items()]
    notes += [f"adapter {name} in {count} layers, fused" for name, count in fused.items()]
    return notes or ([f"adapters of {len(layers)} layers are disabled"] if layers else [])
