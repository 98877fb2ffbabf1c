"""Detects that a module changed after something was derived from it."""

import operator
from collections import OrderedDict, defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gbci_fast.fast.modules.adapters import adapter_state, is_adapter

_CONTAINERS = (dict, OrderedDict, list, set)  # compared by their items
_TENSORS = ("_parameters", "_buffers")  # compared one by one


class Watch:
    """A record of a module's state, to compare with its later state.

    Detected: parameters, buffers, parts, processors, hooks and other attributes that were added, removed or exchanged;
    weights that were moved or written to; and adapters that were set, scaled, disabled or merged. Writing to a tensor
    through ``.data`` changes only its values, of which one per tensor is compared: always on the CPU, and on a GPU if
    `values` is true, because the comparison waits for the GPU. Not detected: changes inside other objects, such as
    writes to tensors that are plain attributes, or the state of a processor.

    Args:
        module: the module to watch. Attributes that the types of its parts name in ``_unwatched`` may change.
        values: whether values on a GPU are compared.
    """

    def __init__(self, module: nn.Module, values: bool = False):
        parts = list(module.modules())
        self.module = module
        self._owners = [owner for part in parts for owner in (part._parameters, part._buffers)]
        self._owned = self._tensors()  # kept alive, so that their ids stay unique
        self._plain = [part for part in self._owned if type(part) in (nn.Parameter, Tensor)]
        self._counted = [part for part in self._plain if not part.is_inference()]  # the others do not count changes
        self._adapters = [part for part in parts if is_adapter(part)]
        # Of an adapter's layer only the parts; `adapter_state` has the rest.
        self._names = [part._modules if is_adapter(part) else vars(part) for part in parts]
        self._unwatched = [getattr(type(part), "_unwatched", ()) for part in parts]
        self._attributes = list(map(_copied, self._names, self._unwatched))
        self._before = self._state()
        self._samples = _samples(self._plain, values)
        self._values = [torch.cat(samples) for samples in self._samples]

    def changed(self) -> bool:
        """Whether anything that is watched has changed."""
        tensors = self._tensors()
        if len(tensors) != len(self._owned) or not all(map(operator.is_, tensors, self._owned)):
            return True
        if self._state() != self._before or any(map(_differ, self._names, self._attributes, self._unwatched)):
            return True
        if not self._samples or (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()):
            return False
        pairs = zip(self._samples, self._values, strict=True)
        return not all(_same_bits(torch.cat(samples), before) for samples, before in pairs)

    def _tensors(self) -> list[Any]:
        return [tensor for owner in self._owners for tensor in owner.values()]

    def _state(self) -> tuple[list[Any], ...]:
        return (
            [tensor.data_ptr() for tensor in self._plain],
            [tensor._version for tensor in self._counted],
            [adapter_state(part) for part in self._adapters],
        )


def _copied(names: dict[str, Any], unwatched: tuple[str, ...]) -> dict[str, Any]:
    """A module's attributes. Containers are copied, tensors are not."""
    return {
        name: value.copy() if type(value) in _CONTAINERS and name not in _TENSORS else value
        for name, value in names.items()
        if name not in unwatched
    }


def _differ(names: dict[str, Any], before: dict[str, Any], unwatched: tuple[str, ...]) -> bool:
    if unwatched:
        names = {name: value for name, value in names.items() if name not in unwatched}
    try:
        return names != before
    except (RuntimeError, ValueError):  # raised by the comparison of two different tensors
        return True


def _samples(tensors: list[Tensor], values: bool) -> list[list[Tensor]]:
    """Views of one value of each tensor, grouped by device."""
    views = defaultdict(list)
    for tensor in tensors:
        device = tensor.device.type
        if tensor.numel() and tensor.is_floating_point() and (device == "cpu" or (values and device == "cuda")):
            views[tensor.device].append(tensor.detach()[tuple(side // 2 for side in tensor.shape)].reshape(1))
    return list(views.values())


def _same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def still(watches: Sequence[Watch], parts: Sequence[nn.Module]) -> bool:
    """Whether the parts are the watched modules, unchanged."""
    same = len(watches) == len(parts) and all(watch.module is part for watch, part in zip(watches, parts, strict=True))
    return same and not any(watch.changed() for watch in watches)


def same_weights(ours: nn.Module, theirs: nn.Module) -> bool:
    """Whether the weights of `ours` are those of `theirs`, rounded to the dtype of `ours`."""
    ours, theirs = ours.state_dict(), theirs.state_dict()
    return ours.keys() == theirs.keys() and all(
        torch.equal(ours[name].cpu(), theirs[name].cpu().to(ours[name].dtype)) for name in ours
    )
