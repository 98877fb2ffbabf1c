"""Layer normalization over the last axis, then FiLM (Perez et al. 2018): a scale and a shift per sample and channel.

Equivalent to ``F.layer_norm(x, ...) * scale[:, None] + shift[:, None]``. Faster because x is read once and the result
written once. Mean and variance are computed in two passes over the values on chip, so that a large mean costs no
precision. Forward only.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from gbci_fast.errors import GBCIError
from gbci_fast.ops._triton import DTYPES, jit, tl, triton, triton_op

MAX_CHANNELS = 8192  # a row must fit into a program's registers
ELEMENTS = 2048  # per program of 128 threads; not measured yet


def layer_norm_film_ref(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float = 1e-5,
    *,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
) -> Tensor:
    """`layer_norm_film` in plain PyTorch."""
    y = F.layer_norm(x, x.shape[-1:], weight, bias, eps)
    return y if scale is None else torch.addcmul(shift[:, None], y, scale[:, None])


@jit
def _layer_norm_film_kernel(
    x_ptr,  # [B, S, C]
    weight_ptr,  # [C] or None
    bias_ptr,  # [C] or None
    scale_ptr,  # [B, C] or None
    shift_ptr,  # [B, C] or None
    out_ptr,  # [B, S, C]
    num_rows,  # S
    num_channels,  # C
    eps,
    x_stride_b,
    x_stride_s,
    x_stride_c,
    scale_stride_b,
    scale_stride_c,
    shift_stride_b,
    shift_stride_c,
    out_stride_b,
    out_stride_s,
    out_stride_c,
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """BLOCK_S rows of one sample. The sample's FiLM and the weights are loaded once for all rows."""
    b = tl.program_id(1).to(tl.int64)  # a batch may hold more than 2^31 elements
    s = (tl.program_id(0) * BLOCK_S + tl.arange(0, BLOCK_S))[:, None]
    c = tl.arange(0, BLOCK_C)
    in_row = c < num_channels
    mask = (s < num_rows) & in_row[None, :]

    x = tl.load(x_ptr + b * x_stride_b + s * x_stride_s + c[None, :] * x_stride_c, mask, other=0.0).to(tl.float32)
    mean = tl.sum(x, 1) / num_channels
    centered = tl.where(in_row[None, :], x - mean[:, None], 0.0)
    variance = tl.sum(centered * centered, 1) / num_channels
    y = centered * tl.rsqrt(variance + eps)[:, None]

    gain, offset = tl.full([BLOCK_C], 1.0, tl.float32), tl.zeros([BLOCK_C], tl.float32)
    if weight_ptr is not None:
        gain = tl.load(weight_ptr + c, in_row, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        offset = tl.load(bias_ptr + c, in_row, other=0.0).to(tl.float32)
    if scale_ptr is not None:
        scale = tl.load(scale_ptr + b * scale_stride_b + c * scale_stride_c, in_row, other=0.0).to(tl.float32)
        shift = tl.load(shift_ptr + b * shift_stride_b + c * shift_stride_c, in_row, other=0.0).to(tl.float32)
        gain, offset = gain * scale, offset * scale + shift
    y = y * gain[None, :] + offset[None, :]
    out = out_ptr + b * out_stride_b + s * out_stride_s + c[None, :] * out_stride_c
    tl.store(out, y.to(out_ptr.dtype.element_ty), mask)


def _launch(x, weight, bias, eps, scale, shift):
    batch, rows, channels = x.shape
    out = torch.empty_like(x)
    block_c = triton.next_power_of_2(channels)
    block_s = min(max(ELEMENTS // block_c, 1), triton.next_power_of_2(rows))
    _layer_norm_film_kernel[triton.cdiv(rows, block_s), batch](
        x,
        weight,
        bias,
        scale,
        shift,
        out,
        rows,
        channels,
        eps,
        *x.stride(),
        *((0, 0) if scale is None else scale.stride()),
        *((0, 0) if shift is None else shift.stride()),
        *out.stride(),
        BLOCK_S=block_s,
        BLOCK_C=block_c,
        num_warps=min(max(block_s * block_c // 512, 1), 16),
    )
    return out


def _cpu(x, weight, bias, eps, scale, shift):
    return torch.empty_like(x).copy_(layer_norm_film_ref(x, weight, bias, eps, scale=scale, shift=shift))


_layer_norm_film = triton_op(
    "layer_norm_film",
    "(Tensor x, Tensor? weight, Tensor? bias, float eps, Tensor? scale, Tensor? shift) -> Tensor",
    cuda=_launch,
    cpu=_cpu,
    fake=lambda x, *_: torch.empty_like(x),
)


def layer_norm_film(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float = 1e-5,
    *,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
) -> Tensor:
    """The normalized x, times `scale` and plus `shift`. Forward only.

    Args:
        x: ``[B, S, C]`` of any strides, float32, bfloat16 or float16 (on the CPU also float64); C at most 8192.
        weight: ``[C]``, contiguous, or None for 1.
        bias: ``[C]``, contiguous, or None for 0.
        eps: added to the variance.
        scale: ``[B, C]``, the whole factor: 1 is already added. `scale` and `shift` are None without FiLM.
        shift: ``[B, C]``.

    Returns:
        ``[B, S, C]`` in the dtype and layout of x. The kernel does all arithmetic in float32.

    Raises:
        GBCIError: a shape, dtype, device or layout is not as above.
    """
    if x.dim() != 3 or not 0 < x.shape[2] <= MAX_CHANNELS:
        raise GBCIError(f"x is {list(x.shape)}; expected [B, S, C] with C from 1 to {MAX_CHANNELS}")
    if x.dtype not in DTYPES and not (x.is_cpu and x.dtype == torch.float64):
        raise GBCIError(f"x is {x.dtype}; expected float32, bfloat16 or float16")
    if (scale is None) != (shift is None):
        raise GBCIError("scale and shift come together; expected both or neither")
    batch, _, channels = x.shape
    shapes = {"weight": (channels,), "bias": (channels,), "scale": (batch, channels), "shift": (batch, channels)}
    for name, tensor in (("weight", weight), ("bias", bias), ("scale", scale), ("shift", shift)):
        if tensor is None:
            continue
        if tensor.shape != shapes[name] or not tensor.is_floating_point():
            expected = f"{list(shapes[name])} of a floating dtype"
            raise GBCIError(f"{name} is {tensor.dtype} {list(tensor.shape)}; expected {expected}")
        if tensor.device != x.device:
            raise GBCIError(f"{name} is on {tensor.device}; expected {x.device} like x")
        if tensor.dim() == 1 and not tensor.is_contiguous():
            raise GBCIError(f"{name} has stride {tensor.stride(0)}; expected it contiguous")
    return _layer_norm_film(x, weight, bias, eps, scale, shift)
