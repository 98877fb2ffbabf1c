"""Writes the UNet as the sampler calls it, and the autoencoder's decoder, as ONNX files.

Only the part of the UNet that runs per step is exported (`UNetCore`). Its inputs include what the fused runtime
computes once per call: keys and values of the context, FiLM rows, and the convolution of the constant channels. Shapes
are static, those of one `Bucket`. A file is strongly typed: weights and activations have the dtype that was asked for.
Norms and softmax are float32, between casts in the graph (`ISLANDS`): their sums and exponentials exceed the range of
float16.
"""

import copy
import logging
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor, nn

from gbci_fast.errors import GBCIError
from gbci_fast.fast.modules.blocks import Context
from gbci_fast.fast.runtimes.fused import FusedDenoiser
from gbci_fast.jobs.files import atomically

OPSET = 20
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True, kw_only=True)
class Bucket:
    """The static shapes of an exported UNet.

    Attributes:
        batch: number of images.
        height, width: size of their latents.
        tokens: length of their context, padding included.
        guided: whether each image is denoised with its condition and with the null condition.
    """

    batch: int
    height: int
    width: int
    tokens: int
    guided: bool = True

    def __post_init__(self) -> None:
        for name in ("batch", "height", "width", "tokens"):
            if getattr(self, name) < 1:
                raise GBCIError(f"{name} is {getattr(self, name)}; expected at least 1")

    def __str__(self) -> str:
        """The shapes as a part of a file name."""
        shapes = f"b{self.batch}-{self.height}x{self.width}-t{self.tokens}"
        return f"{shapes}-{'guided' if self.guided else 'unguided'}"


def input_names(num_resnets: int, num_layers: int, guided: bool) -> list[str]:
    """Names of an exported UNet's inputs, in their order.

    * ``latents`` [B, 4, h, w].
    * ``first`` [B, C, h, w], the convolution of mask and masked image.
    * ``kv_lengths`` int32 [B], the number of valid keys, at least 1.
    * per ResNet block ``film_i`` [R, 2 C]; R = B or, if guided, 2 B with the null condition's rows first.
    * per cross-attention layer ``key_i`` and ``value_i`` [B, heads, N, head_dim] and, if guided, ``null_i`` [C], the
      layer's output for the null condition.
    """
    films = [f"film_{i}" for i in range(num_resnets)]
    kinds = ("key", "value", "null") if guided else ("key", "value")
    return ["latents", "first", "kv_lengths", *films, *(f"{kind}_{i}" for kind in kinds for i in range(num_layers))]


def output_names(guided: bool) -> tuple[str, ...]:
    """Names of an exported UNet's outputs, each [B, 4, h, w]."""
    return ("conditional", "unconditional") if guided else ("conditional",)


def unet_inputs(latents: Tensor, rows: Sequence[Tensor], state: Any, bucket: Bucket) -> dict[str, Tensor]:
    """The inputs of an exported UNet in one step, by name, without copies.

    Args:
        latents: ``[B, 4, h, w]``.
        rows: this step's FiLM rows, one tensor per ResNet block.
        state: from `FusedDenoiser.prepare`, for a conditioning with a padding mask.
        bucket: the shapes of these tensors.
    """
    parts = {"latents": latents, "first": state.first, "kv_lengths": state.contexts[0].kv_lengths}
    parts |= {f"film_{i}": row for i, row in enumerate(rows)}
    for i, context in enumerate(state.contexts):
        parts |= {f"key_{i}": context.key, f"value_{i}": context.value, f"null_{i}": context.null}
    return {name: parts[name] for name in input_names(len(rows), len(state.contexts), bucket.guided)}


class UNetCore(nn.Module):
    """A step of the fused runtime as a module that takes and returns only tensors. It shares the UNet's weights.

    Raises:
        GBCIError: the fused runtime cannot run this UNet; the sentence says why.
    """

    @torch.no_grad()
    def __init__(self, unet: UNet2DConditionModel):
        super().__init__()
        self.unet = unet
        self._denoiser = FusedDenoiser(unet)
        for stage, block in zip(self._denoiser._up, unet.up_blocks, strict=True):
            stage.upsamplers = list(block.upsamplers or ())  # stock: one resize and one convolution

    def example_inputs(self, bucket: Bucket) -> dict[str, Tensor]:
        """Zeros for all inputs by name, and lengths of 1, in the UNet's dtype."""
        batch, unet, layers = bucket.batch, self.unet, self._denoiser._layers
        sizes: dict[str, tuple[int, ...]] = {
            "latents": (batch, unet.config.out_channels, bucket.height, bucket.width),
            "first": (batch, unet.conv_in.out_channels, bucket.height, bucket.width),
        }
        for i, resnet in enumerate(self._denoiser._resnets):
            sizes[f"film_{i}"] = 2 * batch if bucket.guided else batch, resnet.block.time_emb_proj.out_features
        for i, layer in enumerate(layers):
            cross = layer.block.attn2
            context = batch, cross.heads, bucket.tokens, cross.inner_dim // cross.heads
            sizes |= {f"key_{i}": context, f"value_{i}": context, f"null_{i}": (cross.query_dim,)}
        given = {name: torch.zeros(size, dtype=unet.dtype, device=unet.device) for name, size in sizes.items()}
        given["kv_lengths"] = torch.ones(batch, dtype=torch.int32, device=unet.device)
        names = input_names(len(self._denoiser._resnets), len(layers), bucket.guided)
        return {name: given[name] for name in names}

    def forward(self, latents: Tensor, first: Tensor, kv_lengths: Tensor, *parts: Tensor) -> tuple[Tensor, ...]:
        """Inputs in the order of `input_names` -> outputs in the order of `output_names`."""
        num_films, n = len(self._denoiser._resnets), len(self._denoiser._layers)
        films, layers = list(parts[:num_films]), parts[num_films:]
        guided = len(layers) > 2 * n
        nulls = layers[2 * n :] if guided else [None] * n
        counts = (torch.arange(layers[0].shape[2], device=latents.device) < kv_lengths[:, None])[:, None, None]
        contexts = [
            Context(key=key, value=value, bias=counts, kv_lengths=None, null=null)
            for key, value, null in zip(layers[:n], layers[n : 2 * n], nulls, strict=True)
        ]
        output = self._denoiser._forward(latents, films, first, contexts, guided)
        return output if guided else (output,)


def _group_norm(x, num_groups, weight=None, bias=None, eps=1e-5, cudnn_enabled=True):
    weight, bias = (None if part is None else part.float() for part in (weight, bias))
    shape = x.shape[0], x.shape[1], x[0, 0].numel()
    return torch.native_group_norm(x.float(), weight, bias, *shape, num_groups, eps)[0].to(x.dtype)


def _layer_norm(x, shape, weight=None, bias=None, eps=1e-5, cudnn_enable=True):
    weight, bias = (None if part is None else part.float() for part in (weight, bias))
    return torch.native_layer_norm(x.float(), shape, weight, bias, eps)[0].to(x.dtype)


def _attention(q, k, v, mask=None, dropout=0.0, causal=False, *, scale=None, enable_gqa=False):
    """Product, softmax, product: a pattern that TensorRT recognizes and fuses. The mask is true for valid keys."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    scores = torch.matmul(q * scale**0.5, k.transpose(-1, -2) * scale**0.5).float()  # each scaled: fits float16
    if mask is not None:
        scores = torch.where(mask, scores, torch.finfo(torch.float32).min)
    return torch.matmul(scores.softmax(-1).to(v.dtype), v)


def _slice_scatter(x, source, dim=0, start=None, end=None, step=1):
    """A slice scatter by concatenation. Tracing turns an in-place addition to a slice into this operator."""
    start, end = start or 0, x.shape[dim] if end is None else min(end, x.shape[dim])
    parts = x.narrow(dim, 0, start), source, x.narrow(dim, end, x.shape[dim] - end)
    return torch.cat([part for part in parts if part.shape[dim] > 0], dim)


ISLANDS: dict[torch._ops.OpOverload, Callable] = {
    torch.ops.aten.group_norm.default: _group_norm,
    torch.ops.aten.layer_norm.default: _layer_norm,
    torch.ops.aten.scaled_dot_product_attention.default: _attention,
    torch.ops.aten.slice_scatter.default: _slice_scatter,
}
"""Replacements of PyTorch's operators in the graph: float32 between casts, and no scatter."""


class _Decoder(nn.Module):
    """The autoencoder's decoder, [B, 4, h, w] -> [B, 1, H, W]."""

    def __init__(self, vae: AutoencoderKL):
        super().__init__()
        self.post_quant_conv, self.decoder = vae.post_quant_conv, vae.decoder

    def forward(self, latents: Tensor) -> Tensor:
        return self.decoder(latents if self.post_quant_conv is None else self.post_quant_conv(latents))


def export_unet(unet: UNet2DConditionModel, bucket: Bucket, dtype: torch.dtype, path: Path) -> None:
    """Writes an ONNX file of a step of the UNet; see `input_names` and `output_names`.

    Args:
        unet: stays as it is.
        bucket: the static shapes of the file.
        dtype: of weights, inputs and outputs: float32, float16 or bfloat16.
        path: the file, weights included. After an error there is no file.

    Raises:
        GBCIError: onnx is not installed, the fused runtime cannot run this UNet, another dtype, or a graph with
            operators that are not ONNX's.
    """
    core = UNetCore(_copy(unet, dtype))
    _export(core, core.example_inputs(bucket), output_names(bucket.guided), path)


def export_decoder(vae: AutoencoderKL, batch: int, height: int, width: int, dtype: torch.dtype, path: Path) -> None:
    """Writes an ONNX file of ``vae.decode``: ``latents`` [B, 4, h, w] -> ``image`` [B, 1, H, W].

    The latents are those that `vae` takes, divided by the scaling factor. Arguments and errors are those of
    `export_unet`; `height` and `width` are the latents'.
    """
    decoder = _Decoder(_copy(vae, dtype))
    latents = torch.zeros(batch, vae.config.latent_channels, height, width, dtype=dtype)
    _export(decoder, {"latents": latents}, ("image",), path)


def _copy(module: nn.Module, dtype: torch.dtype) -> Any:
    """A copy of a module on the CPU, in `dtype`, in contiguous layout."""
    if dtype not in _DTYPES:
        raise GBCIError(f"dtype is {dtype}; expected {', '.join(map(str, _DTYPES))}")
    return nn.Module.to(copy.deepcopy(module), "cpu", dtype, memory_format=torch.contiguous_format).eval()


@torch.no_grad()
def _export(module: nn.Module, given: dict[str, Tensor], outputs: tuple[str, ...], path: Path) -> None:
    try:
        import onnx
        import onnxscript  # noqa: F401  torch.onnx needs it
    except ModuleNotFoundError as error:
        raise GBCIError(f"{error.name} is not installed: pip install 'gbci_fast[export]'") from error

    registration = logging.getLogger("torch.onnx._internal.exporter._registration")
    level = registration.level
    registration.setLevel(logging.ERROR)  # it warns that torchvision's operators are missing
    try:
        model = _trace(module, given, outputs)
    finally:
        registration.setLevel(level)
    foreign = {f"{node.domain}.{node.op_type}" for node in model.graph.node if node.domain not in ("", "ai.onnx")}
    if foreign or model.functions:
        raise GBCIError(f"the graph has operators that are not ONNX's: {', '.join(sorted(foreign)) or 'functions'}")

    def write(part: Path) -> None:
        onnx.save_model(model, part)
        onnx.checker.check_model(part)

    atomically(path, write)


def _trace(module: nn.Module, given: dict[str, Tensor], outputs: tuple[str, ...]) -> Any:
    """The ONNX model of a module, traced with the inputs `given`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # these warn about their own code
        program = torch.export.export(module, tuple(given.values())).run_decompositions(ISLANDS)
        return torch.onnx.export(
            program, input_names=list(given), output_names=list(outputs), opset_version=OPSET, verbose=False
        ).model_proto
