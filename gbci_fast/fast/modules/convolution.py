"""Convolutions by minimal filtering (`gbci_fast.ops.conv3x3`) on a CPU in float32, where they are faster."""

import copy
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from gbci_fast.ops.conv3x3 import conv3x3, conv3x3_weight

MIN_CHANNELS = 16  # in and out; with fewer channels the transforms cost more than they save


class FilteredConv2d(nn.Conv2d):
    """A 3 x 3 convolution that shares the parameters of another.

    On a GPU, in other dtypes than float32, under autograd and in a compiled graph it runs as a plain `nn.Conv2d`. The
    transformed weight is computed again when the weight was exchanged or written to. A comparison of four values
    detects writes through ``.data``.
    """

    _unwatched = ("_filtered",)

    def __init__(self, conv: nn.Conv2d):
        super().__init__(conv.in_channels, conv.out_channels, 3, padding=1, bias=conv.bias is not None, device="meta")
        self.weight, self.bias = conv.weight, conv.bias
        self.train(conv.training)
        self._filtered: tuple[tuple[Any, ...], Tensor] | None = None

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, K, H, W]."""
        here = x.dtype == torch.float32 and x.device.type == "cpu"
        if not here or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return super().forward(x)
        weight = self.weight.detach()
        key = weight.data_ptr(), weight._version, weight[:: (len(weight) + 3) // 4, 0, 1, 1].tolist()
        if self._filtered is None or self._filtered[0] != key:
            self._filtered = key, conv3x3_weight(weight.contiguous())
        return conv3x3(x.contiguous(), self._filtered[1], self.bias, self.out_channels)


def filtered(conv: nn.Conv2d) -> nn.Conv2d:
    """The convolution as a `FilteredConv2d` where that is faster, else `conv` itself."""
    pays = (
        type(conv) is nn.Conv2d
        and conv.weight.device.type == "cpu"
        and conv.weight.dtype == torch.float32
        and (conv.kernel_size, conv.stride, conv.padding, conv.dilation) == ((3, 3), (1, 1), (1, 1), (1, 1))
        and conv.groups == 1
        and conv.padding_mode == "zeros"
        and min(conv.in_channels, conv.out_channels) >= MIN_CHANNELS
        and torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")
        and not conv.weight.is_inference()  # inference tensors do not count their changes
        and not (conv._forward_hooks or conv._forward_pre_hooks)
    )
    return FilteredConv2d(conv) if pays else conv


def with_filtered_convolutions(module: nn.Module) -> nn.Module:
    """A copy of a module with the same parameters and its convolutions `filtered`."""
    module = shared_copy(module)
    for part in list(module.modules()):
        for name, child in part.named_children():
            if isinstance(child, nn.Conv2d):
                setattr(part, name, filtered(child))
    return module


def shared_copy(module: nn.Module) -> nn.Module:
    """A copy of a module with the same parameters and buffers."""
    shared = chain(module.parameters(), module.buffers())
    return copy.deepcopy(module, {id(tensor): tensor for tensor in shared})
