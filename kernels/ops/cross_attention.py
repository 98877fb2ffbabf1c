"""A whole cross-attention layer: norm, query projection, attention over cached keys and values, output, residual.

Equivalent to ``x + to_out(attend(to_q(layer_norm_film(x)), key, value))``, see `cross_attention_ref`. Faster because x
is read once and the result written once: a program owns BLOCK_M tokens, and keeps them on chip from norm to residual.
For each head, the program projects queries, runs over the context in blocks of BLOCK_N with an online softmax (Milakov
and Gimelshein 2018; Dao et al. 2022), and adds the head's share of the output projection to an accumulator that starts
at x + bias. Queries, scores and heads are never written to memory. Channels lie in any number of tiles of BLOCK_C, so
that widths of 192 or 320 are not padded to powers of 2. Forward only.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from gbci_fast.errors import GBCIError
from gbci_fast.ops._triton import DTYPES, dot, jit, tl, triton, triton_op
from gbci_fast.ops.layer_norm_film import layer_norm_film_ref


def cross_attention_ref(
    x: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    wq: Tensor,
    key: Tensor,
    value: Tensor,
    wo: Tensor,
    bo: Tensor | None,
    *,
    eps: float,
    softmax_scale: float,
    kv_lengths: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """`cross_attention` in plain PyTorch."""
    normed = layer_norm_film_ref(x, norm_weight, norm_bias, eps, scale=scale, shift=shift)
    q = F.linear(normed, wq).unflatten(-1, (key.shape[1], -1)).transpose(1, 2)
    mask = None
    if kv_lengths is not None:
        mask = (torch.arange(key.shape[2], device=x.device) < kv_lengths[:, None])[:, None, None]
    attended = F.scaled_dot_product_attention(q, key, value, mask, scale=softmax_scale)
    return torch.add(x, F.linear(attended.transpose(1, 2).flatten(2), wo, bo), out=out)


@jit
def _cross_attention_kernel(
    x_ptr,  # [B, S, C]
    norm_weight_ptr,  # [C] or None
    norm_bias_ptr,  # [C] or None
    scale_ptr,  # [B, C] or None
    shift_ptr,  # [B, C] or None
    wq_ptr,  # [H D, C]
    key_ptr,  # [B, H, N, D]
    value_ptr,  # [B, H, N, D]
    kv_lengths_ptr,  # [B] or None
    wo_ptr,  # [C, H D]
    bo_ptr,  # [C] or None
    out_ptr,  # [B, S, C], may be x
    num_rows,  # S
    num_keys,  # N
    eps,
    scale_log2,  # softmax_scale / log 2
    x_stride_b,
    x_stride_s,
    x_stride_c,
    scale_stride_b,
    scale_stride_c,
    shift_stride_b,
    shift_stride_c,
    wq_stride_o,
    wq_stride_i,
    key_stride_b,
    key_stride_h,
    key_stride_n,
    key_stride_d,
    value_stride_b,
    value_stride_h,
    value_stride_n,
    value_stride_d,
    wo_stride_o,
    wo_stride_i,
    out_stride_b,
    out_stride_s,
    out_stride_c,
    CHANNELS: tl.constexpr,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TILES: tl.constexpr,  # of channels
):
    """BLOCK_M tokens of one sample, all channels and heads."""
    b = tl.program_id(1).to(tl.int64)  # a batch may hold more than 2^31 elements
    s = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M))[:, None]
    in_tile = tl.arange(0, BLOCK_C)
    d = tl.arange(0, BLOCK_D)
    in_head = d < HEAD_DIM
    dtype = wq_ptr.dtype.element_ty
    length = num_keys
    if kv_lengths_ptr is not None:
        length = tl.minimum(tl.load(kv_lengths_ptr + b), num_keys)

    # Tuples of tiles [BLOCK_M, BLOCK_C], unrolled: registers cannot be indexed.
    x = ()
    mean = tl.zeros([BLOCK_M], tl.float32)
    for tile in tl.static_range(TILES):
        c = tile * BLOCK_C + in_tile
        x_pointers = x_ptr + b * x_stride_b + s * x_stride_s + c[None, :] * x_stride_c
        x += (tl.load(x_pointers, (s < num_rows) & (c < CHANNELS)[None, :], other=0.0).to(tl.float32),)
        mean += tl.sum(x[tile], 1) / CHANNELS
    variance = tl.zeros([BLOCK_M], tl.float32)
    for tile in tl.static_range(TILES):
        centered = tl.where((tile * BLOCK_C + in_tile < CHANNELS)[None, :], x[tile] - mean[:, None], 0.0)
        variance += tl.sum(centered * centered, 1) / CHANNELS
    rstd = tl.rsqrt(variance + eps)

    normed = ()
    acc = ()
    for tile in tl.static_range(TILES):
        c = tile * BLOCK_C + in_tile
        inside = c < CHANNELS
        gain, offset = tl.full([BLOCK_C], 1.0, tl.float32), tl.zeros([BLOCK_C], tl.float32)
        bias = tl.zeros([BLOCK_C], tl.float32)
        if norm_weight_ptr is not None:
            gain = tl.load(norm_weight_ptr + c, inside, other=0.0).to(tl.float32)
        if norm_bias_ptr is not None:
            offset = tl.load(norm_bias_ptr + c, inside, other=0.0).to(tl.float32)
        if scale_ptr is not None:
            scale = tl.load(scale_ptr + b * scale_stride_b + c * scale_stride_c, inside, other=0.0).to(tl.float32)
            shift = tl.load(shift_ptr + b * shift_stride_b + c * shift_stride_c, inside, other=0.0).to(tl.float32)
            gain, offset = gain * scale, offset * scale + shift
        if bo_ptr is not None:
            bias = tl.load(bo_ptr + c, inside, other=0.0).to(tl.float32)
        gain = tl.where(inside, gain, 0.0)  # beyond the channels 0: a product could overflow there
        y = (x[tile] - mean[:, None]) * rstd[:, None] * gain[None, :] + offset[None, :]
        normed += (y.to(dtype),)  # weights beyond the channels are 0
        acc += (x[tile] + bias[None, :],)

    for head in tl.range(0, HEADS, disable_licm=True):  # hoisted addresses would cost a tile's registers
        i = head * HEAD_DIM + d
        q = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        for tile in tl.static_range(TILES):
            c = tile * BLOCK_C + in_tile
            wq_pointers = wq_ptr + c[:, None] * wq_stride_i + i[None, :] * wq_stride_o
            wq = tl.load(wq_pointers, (c < CHANNELS)[:, None] & in_head[None, :], other=0.0)
            q = dot(normed[tile], wq, q)
        q = q.to(dtype)

        keys = key_ptr + b * key_stride_b + head * key_stride_h
        values = value_ptr + b * value_stride_b + head * value_stride_h
        top = tl.full([BLOCK_M], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
        o = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        for start in range(0, length, BLOCK_N):  # every block holds a valid key, so `top` is finite
            n = start + tl.arange(0, BLOCK_N)
            k_pointers = keys + d[:, None] * key_stride_d + n[None, :] * key_stride_n
            k = tl.load(k_pointers, in_head[:, None] & (n < length)[None, :], other=0.0)
            scores = dot(q, k, tl.zeros([BLOCK_M, BLOCK_N], tl.float32)) * scale_log2
            scores = tl.where((n < length)[None, :], scores, float("-inf"))
            new_top = tl.maximum(top, tl.max(scores, 1))
            p = tl.exp2(scores - new_top[:, None])
            decay = tl.exp2(top - new_top)
            total = total * decay + tl.sum(p, 1)
            v_pointers = values + n[:, None] * value_stride_n + d[None, :] * value_stride_d
            v = tl.load(v_pointers, (n < length)[:, None] & in_head[None, :], other=0.0)
            o = dot(p.to(dtype), v, o * decay[:, None])
            top = new_top
        o = (o / tl.where(total == 0, 1.0, total)[:, None]).to(dtype)  # 0 without keys

        added = ()
        for tile in tl.static_range(TILES):
            c = tile * BLOCK_C + in_tile
            wo_pointers = wo_ptr + i[:, None] * wo_stride_i + c[None, :] * wo_stride_o
            wo = tl.load(wo_pointers, in_head[:, None] & (c < CHANNELS)[None, :], other=0.0)
            added += (dot(o, wo, acc[tile]),)
        acc = added

    for tile in tl.static_range(TILES):
        c = tile * BLOCK_C + in_tile
        out_pointers = out_ptr + b * out_stride_b + s * out_stride_s + c[None, :] * out_stride_c
        tl.store(out_pointers, acc[tile].to(out_ptr.dtype.element_ty), (s < num_rows) & (c < CHANNELS)[None, :])


# By bytes of an element and (largest width, largest head_dim): (BLOCK_M, BLOCK_N, BLOCK_C, num_warps, num_stages).
# The first row that is large enough is used. Not timed yet: these are the largest tiles found whose registers do not
# spill on sm_80 and sm_90. The accumulator and the normed x take most registers, BLOCK_M rows of all channels each, so
# wider layers get fewer rows. Hopper's wgmma takes 64 rows on 4 warps. Tensor cores do not multiply float32 in full
# precision, so float32 has few rows, and only narrow layers.
CONFIGS = {
    2: {
        (192, 32): (64, 64, 64, 4, 2),
        (320, 64): (32, 64, 64, 4, 2),
        (512, 64): (32, 64, 64, 8, 1),
        (512, 128): (16, 64, 64, 4, 1),
    },
    4: {
        (128, 32): (16, 16, 16, 4, 1),
        (192, 32): (16, 32, 32, 4, 1),
    },
}


def _config(dtype: torch.dtype, width: int, head_dim: int) -> tuple[int, int, int, int, int]:
    configs = CONFIGS[dtype.itemsize].items()
    return next(config for (max_width, max_head), config in configs if width <= max_width and head_dim <= max_head)


def kernel_refusals(channels: int, heads: int, head_dim: int, dtype: torch.dtype) -> list[str]:
    """Why the kernel cannot run a layer of this size on CUDA, so that SDPA and GEMMs do; empty if the kernel can."""
    reasons = []
    if triton is None:
        reasons.append("triton is not installed: pip install triton")
    if dtype not in DTYPES:
        return [*reasons, f"it is in {dtype}; the cross-attention kernel takes float32, bfloat16 and float16"]
    width, (max_width, max_head) = max(channels, heads * head_dim), list(CONFIGS[dtype.itemsize])[-1]
    if width > max_width:
        reasons.append(f"it is {width} wide; the cross-attention kernel takes at most {max_width} in {dtype}")
    if head_dim > max_head:
        reasons.append(f"head_dim is {head_dim}; the cross-attention kernel takes at most {max_head} in {dtype}")
    return reasons


def _cpu(x, norm_weight, norm_bias, wq, key, value, wo, bo, eps, softmax_scale, kv_lengths, scale, shift, out):
    cross_attention_ref(
        x, norm_weight, norm_bias, wq, key, value, wo, bo,
        eps=eps, softmax_scale=softmax_scale, kv_lengths=kv_lengths, scale=scale, shift=shift, out=out,
    )  # fmt: skip


def _cuda(x, norm_weight, norm_bias, wq, key, value, wo, bo, eps, softmax_scale, kv_lengths, scale, shift, out):
    batch, rows, channels = x.shape
    _, heads, num_keys, head_dim = key.shape
    if kernel_refusals(channels, heads, head_dim, x.dtype):
        _cpu(x, norm_weight, norm_bias, wq, key, value, wo, bo, eps, softmax_scale, kv_lengths, scale, shift, out)
        return
    block_d = max(16, triton.next_power_of_2(head_dim))  # tl.dot needs a length of at least 16
    block_m, block_n, block_c, num_warps, num_stages = _config(x.dtype, max(channels, heads * head_dim), head_dim)
    _cross_attention_kernel[triton.cdiv(rows, block_m), batch](
        x,
        norm_weight,
        norm_bias,
        scale,
        shift,
        wq,
        key,
        value,
        kv_lengths,
        wo,
        bo,
        out,
        rows,
        num_keys,
        eps,
        softmax_scale / math.log(2),
        *x.stride(),
        *((0, 0) if scale is None else scale.stride()),
        *((0, 0) if shift is None else shift.stride()),
        *wq.stride(),
        *key.stride(),
        *value.stride(),
        *wo.stride(),
        *out.stride(),
        CHANNELS=channels,
        HEADS=heads,
        HEAD_DIM=head_dim,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        BLOCK_C=block_c,
        BLOCK_D=block_d,
        TILES=triton.cdiv(channels, block_c),
        num_warps=num_warps,
        num_stages=num_stages,
    )


_cross_attention = triton_op(
    "cross_attention",
    "(Tensor x, Tensor? norm_weight, Tensor? norm_bias, Tensor wq, Tensor key, Tensor value, Tensor wo, Tensor? bo, "
    "float eps, float softmax_scale, Tensor? kv_lengths, Tensor? scale, Tensor? shift, Tensor(a!) out) -> ()",
    cpu=_cpu,
    cuda=_cuda,
    fake=lambda *_: None,
    mutates_args=("out",),
)


def cross_attention(
    x: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    wq: Tensor,
    key: Tensor,
    value: Tensor,
    wo: Tensor,
    bo: Tensor | None,
    *,
    eps: float,
    softmax_scale: float,
    kv_lengths: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """x plus the cross-attention of its tokens to a context. Forward only; on CUDA it does not synchronize.

    On CUDA, layers that `kernel_refusals` refuses run as `cross_attention_ref`.

    Args:
        x: ``[B, S, C]``, float32, bfloat16 or float16 (on the CPU also float64). Every tensor except `kv_lengths` has
            the dtype of x. Products of float32 are float32, not TensorFloat-32.
        norm_weight: ``[C]``, contiguous, or None for 1.
        norm_bias: ``[C]``, contiguous, or None for 0.
        wq: ``[H D, C]``, the query projection.
        key: ``[B, H, N, D]``, of any strides.
        value: ``[B, H, N, D]``.
        wo: ``[C, H D]``, the output projection.
        bo: ``[C]``, contiguous, or None for 0.
        eps: added to the variance of the norm.
        softmax_scale: factor on the scores.
        kv_lengths: int32 ``[B]``, contiguous, the number of valid keys of each sample; further keys are padding. For a
            sample without keys, only `bo` is added.
        scale: ``[B, C]``, FiLM's whole factor on the normed x: 1 is already added. `scale` and `shift` are None
            without FiLM.
        shift: ``[B, C]``.
        out: the output tensor; may be `x`. A new tensor by default.

    Returns:
        `out`, ``[B, S, C]``.

    Raises:
        GBCIError: a shape, dtype, device or layout is not as above, or a gradient would be needed.
    """
    _check(x, norm_weight, norm_bias, wq, key, value, wo, bo, kv_lengths, scale, shift, out)
    out = torch.empty_like(x) if out is None else out
    _cross_attention(
        x, norm_weight, norm_bias, wq, key, value, wo, bo, eps, softmax_scale, kv_lengths, scale, shift, out
    )
    return out


def _check(x, norm_weight, norm_bias, wq, key, value, wo, bo, kv_lengths, scale, shift, out) -> None:
    if x.dim() != 3 or x.shape[2] == 0:
        raise GBCIError(f"x is {list(x.shape)}; expected [B, S, C]")
    if x.dtype not in DTYPES and not (x.is_cpu and x.dtype == torch.float64):
        raise GBCIError(f"x is {x.dtype}; expected float32, bfloat16 or float16")
    batch, _, channels = x.shape
    if key.dim() != 4 or key.shape[0] != batch or 0 in key.shape[1:]:
        raise GBCIError(f"key is {list(key.shape)}; expected [{batch}, heads, N, head_dim], none of them 0")
    if (scale is None) != (shift is None):
        raise GBCIError("scale and shift come together; expected both or neither")
    inner = key.shape[1] * key.shape[3]
    vector, film = (channels,), (batch, channels)
    expected = {
        "x": (x, x.shape), "norm_weight": (norm_weight, vector), "norm_bias": (norm_bias, vector),
        "wq": (wq, (inner, channels)),
        "key": (key, key.shape), "value": (value, key.shape), "wo": (wo, (channels, inner)), "bo": (bo, vector),
        "kv_lengths": (kv_lengths, (batch,)), "scale": (scale, film), "shift": (shift, film), "out": (out, x.shape),
    }  # fmt: skip
    for name, (tensor, shape) in expected.items():
        if tensor is None:
            continue
        dtype = torch.int32 if name == "kv_lengths" else x.dtype
        if tensor.shape != shape or tensor.dtype != dtype:
            raise GBCIError(f"{name} is {tensor.dtype} {list(tensor.shape)}; expected {dtype} {list(shape)}")
        if tensor.device != x.device:
            raise GBCIError(f"{name} is on {tensor.device}; expected {x.device} like x")
        if tensor.dim() == 1 and not tensor.is_contiguous():
            raise GBCIError(f"{name} has stride {tensor.stride(0)}; expected it contiguous")
        if tensor.requires_grad and torch.is_grad_enabled():
            raise GBCIError(f"cross_attention is forward only and {name} requires a gradient; use torch.no_grad()")
