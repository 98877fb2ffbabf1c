"""Compares exported ONNX files, run by onnxruntime on the CPU, with PyTorch."""

import tempfile
from collections.abc import Callable, Hashable, Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor

from gbci_fast.errors import GBCIError
from gbci_fast.fast.export import Bucket, UNetCore, output_names
from gbci_fast.fast.tensorrt.store import Recipe

LARGEST_ERROR = {torch.float32: 1e-4, torch.float16: 2e-2}
"""The largest error that `check_unet` and `check_decoder` accept, relative to the largest float32 output."""


class OnnxFunction:
    """An ONNX file as a function of CPU tensors.

    Raises:
        GBCIError: onnxruntime is not installed.
    """

    def __init__(self, path: Path):
        try:
            import onnxruntime
        except ModuleNotFoundError as error:
            raise GBCIError("onnxruntime is not installed: pip install 'gbci_fast[export]'") from error
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        self._session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        self._outputs = [output.name for output in self._session.get_outputs()]

    def __call__(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Maps all inputs by name to all outputs by name."""
        outputs = self._session.run(None, {name: tensor.numpy() for name, tensor in inputs.items()})
        return {name: torch.from_numpy(output) for name, output in zip(self._outputs, outputs, strict=True)}


class OnnxEngines:
    """A CPU replacement for `gbci_fast.fast.tensorrt.store.Engines`: exports each recipe and runs the ONNX file."""

    def __init__(self) -> None:
        self._functions: dict[Hashable, OnnxFunction] = {}

    def __call__(self, shape: Hashable, recipe: Callable[[], Recipe], device: torch.device) -> OnnxFunction:
        if shape not in self._functions:
            with tempfile.TemporaryDirectory(prefix="gbci_fast-") as folder:
                path = Path(folder) / "exported.onnx"
                recipe().write(path)
                self._functions[shape] = OnnxFunction(path)
        return self._functions[shape]

    def clear(self) -> None:
        self._functions.clear()


@torch.no_grad()
def check_unet(path: Path, unet: UNet2DConditionModel, bucket: Bucket, dtype: torch.dtype) -> float:
    """The largest error of an exported UNet's outputs on random inputs, relative to the largest output.

    Args:
        path: written by `gbci_fast.fast.export.export_unet` with the other arguments.
        unet: on the CPU, in float32.
        bucket: the shapes of the export.
        dtype: of the file, float32 or float16, which onnxruntime supports on a CPU.

    Raises:
        GBCIError: onnxruntime is not installed, another dtype, or an error above `LARGEST_ERROR`.
    """
    core, generator = UNetCore(unet), torch.Generator().manual_seed(0)
    given = {name: _random(part, bucket.tokens, generator) for name, part in core.example_inputs(bucket).items()}
    expected = dict(zip(output_names(bucket.guided), core(*given.values()), strict=True))
    return _check(path, given, expected, dtype)


@torch.no_grad()
def check_decoder(path: Path, vae: AutoencoderKL, shape: tuple[int, int, int], dtype: torch.dtype) -> float:
    """As `check_unet`, for `gbci_fast.fast.export.export_decoder`; `shape` is (batch, height, width) of the latents."""
    batch, *sides = shape
    latents = torch.randn(batch, vae.config.latent_channels, *sides, generator=torch.Generator().manual_seed(0))
    return _check(path, {"latents": latents}, {"image": vae.decode(latents).sample}, dtype)


def _random(like: Tensor, tokens: int, generator: torch.Generator) -> Tensor:
    """A random input like `like`: normals, or, for integers, lengths from `tokens` down to 1."""
    if like.is_floating_point():
        return torch.randn(like.shape, generator=generator)
    return torch.linspace(tokens, 1, len(like)).round().to(like.dtype)


def _check(path: Path, given: Mapping[str, Tensor], expected: Mapping[str, Tensor], dtype: torch.dtype) -> float:
    if dtype not in LARGEST_ERROR:
        raise GBCIError(f"{path} is {dtype}; expected torch.float32 or torch.float16, which onnxruntime has on a CPU")
    rounded = {name: part.to(dtype) if part.is_floating_point() else part for name, part in given.items()}
    found: dict[str, Any] = OnnxFunction(path)(rounded)
    error = max(
        ((found[name].float() - part).abs().max() / part.abs().max()).nan_to_num(torch.inf).item()
        for name, part in expected.items()
    )
    if error > LARGEST_ERROR[dtype]:
        raise GBCIError(f"{path} differs from PyTorch by {error:.2g}; expected at most {LARGEST_ERROR[dtype]:.2g}")
    return error
