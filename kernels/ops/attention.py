"""Scaled dot-product attention by one of several kernels, chosen from a table; a refusal is explained.

Equivalent to ``softmax(softmax_scale * q k^T) v`` over the first `kv_lengths` keys, see `attention_ref`. The backends
are PyTorch's, xformers' and "triton", the kernel below; none is the fastest everywhere. PyTorch's backends are called
as operators: `torch.nn.attention.sdpa_kernel` would switch the whole process, and so every other thread. The kernel
below reads no key beyond `kv_lengths`; the other backends need a mask for that, or refuse. Forward only.
"""

from __future__ import annotations

import math
import warnings

import torch
from torch import Tensor

from gbci_fast.errors import GBCIError
from gbci_fast.ops._triton import DTYPES, dot, jit, tl, triton, use_triton

BACKENDS = ("sdpa_flash", "sdpa_efficient", "sdpa_cudnn", "sdpa_math", "xformers", "triton")

# By architecture, rows of (largest number of keys, backends in order of preference). The first row with enough keys is
# used, and in this row the first backend that does not refuse. benchmarks/bench_attention.py prints a machine's order.
# "cpu": measured with 2 threads, batch 1 to 16, 4 and 6 heads of 32, 196 to 784 tokens: sdpa_math takes 1.4 to 9 times
# as long as sdpa_flash, in float32 and in bfloat16.
# "cuda": not measured on any GPU; PyTorch's own order, with xformers and "triton" before the slow backends.
ORDER: dict[str, tuple[tuple[float, tuple[str, ...]], ...]] = {
    "cpu": ((math.inf, ("sdpa_flash", "sdpa_math")),),
    "cuda": ((math.inf, ("sdpa_flash", "sdpa_efficient", "xformers", "triton", "sdpa_cudnn", "sdpa_math")),),
}

# For "triton", by bytes of an element and largest head_dim: (BLOCK_M, BLOCK_N, num_warps, num_stages). These are the
# largest tiles found whose registers do not spill on sm_80 and sm_90; not timed. Tensor cores do not multiply float32
# in full precision.
TILES = {
    2: {32: (128, 64, 4, 3), 64: (128, 64, 8, 3), 128: (128, 64, 8, 2)},
    4: {32: (32, 32, 4, 2), 64: (16, 32, 4, 2), 128: (16, 16, 4, 2)},
}
MAX_HEAD_DIM = 128  # for "triton"


def attention_ref(
    q: Tensor, k: Tensor, v: Tensor, *, softmax_scale: float | None = None, kv_lengths: Tensor | None = None
) -> Tensor:
    """`attention` in plain PyTorch."""
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    scores = scale * q @ k.transpose(-1, -2)
    if kv_lengths is not None:
        scores = scores + _bias(kv_lengths, k)
    return scores.softmax(-1).nan_to_num(0.0) @ v  # 0 instead of 0/0 where there are no keys


def _bias(kv_lengths: Tensor, k: Tensor) -> Tensor:
    """[B, 1, 1, N] in the dtype of k, -inf for keys beyond the length; rows begin at multiples of 16 elements."""
    keys = k.shape[2]
    padded = torch.arange(-(-keys // 16) * 16, device=k.device) >= kv_lengths[:, None]
    return torch.zeros(padded.shape, dtype=k.dtype, device=k.device).masked_fill_(padded, -math.inf)[
        :, None, None, :keys
    ]


@jit
def _attention_kernel(
    q_ptr,  # [B, H, S, D]
    k_ptr,  # [B, H, N, D]
    v_ptr,  # [B, H, N, D]
    kv_lengths_ptr,  # [B] or None
    out_ptr,  # [B, H, S, D]
    num_heads,  # H
    num_queries,  # S
    num_keys,  # N
    scale_log2,  # softmax_scale / log 2
    kv_lengths_stride,
    q_stride_b,
    q_stride_h,
    q_stride_s,
    q_stride_d,
    k_stride_b,
    k_stride_h,
    k_stride_n,
    k_stride_d,
    v_stride_b,
    v_stride_h,
    v_stride_n,
    v_stride_d,
    out_stride_b,
    out_stride_h,
    out_stride_s,
    out_stride_d,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """BLOCK_M queries of one head, over the keys in blocks with an online softmax (FlashAttention-2, Dao 2023)."""
    tiles = tl.cdiv(num_queries, BLOCK_M)
    head = tl.program_id(0) // tiles  # programs that run together read the same keys
    b, h = (head // num_heads).to(tl.int64), head % num_heads  # a batch may hold more than 2^31 elements
    s = (tl.program_id(0) % tiles * BLOCK_M + tl.arange(0, BLOCK_M))[:, None]
    d = tl.arange(0, BLOCK_D)
    in_head = d < HEAD_DIM
    length = num_keys
    if kv_lengths_ptr is not None:
        length = tl.minimum(tl.load(kv_lengths_ptr + b * kv_lengths_stride), num_keys)
    keys = k_ptr + b * k_stride_b + h * k_stride_h + d[:, None] * k_stride_d
    values = v_ptr + b * v_stride_b + h * v_stride_h + d[None, :] * v_stride_d
    inside = (s < num_queries) & in_head[None, :]
    q_pointers = q_ptr + b * q_stride_b + h * q_stride_h + s * q_stride_s + d[None, :] * q_stride_d
    q = tl.load(q_pointers, inside, other=0.0)

    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    o = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for start in range(0, length, BLOCK_N):  # every block holds a valid key, so `top` is finite
        n = start + tl.arange(0, BLOCK_N)
        k = tl.load(keys + n[None, :] * k_stride_n, in_head[:, None] & (n < length)[None, :], other=0.0)
        scores = dot(q, k, tl.zeros([BLOCK_M, BLOCK_N], tl.float32)) * scale_log2
        scores = tl.where((n < length)[None, :], scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 1))
        p = tl.exp2(scores - new_top[:, None])
        decay = tl.exp2(top - new_top)
        total = total * decay + tl.sum(p, 1)
        v = tl.load(values + n[:, None] * v_stride_n, (n < length)[:, None] & in_head[None, :], other=0.0)
        o = dot(p.to(v.dtype), v, o * decay[:, None])
        top = new_top

    o = o / tl.where(total == 0, 1.0, total)[:, None]  # 0 without keys
    out_pointers = out_ptr + b * out_stride_b + h * out_stride_h + s * out_stride_s + d[None, :] * out_stride_d
    tl.store(out_pointers, o.to(out_ptr.dtype.element_ty), inside)


def _launch(q, k, v, softmax_scale, kv_lengths):
    batch, heads, queries, head_dim = q.shape
    out = _output(q, v)
    tiles = TILES[q.element_size()]
    block_m, block_n, num_warps, num_stages = next(tile for largest, tile in tiles.items() if head_dim <= largest)
    with torch.cuda.device_of(q):  # Triton launches on the current device
        _attention_kernel[(triton.cdiv(queries, block_m) * heads * batch,)](
            q,
            k,
            v,
            kv_lengths,
            out,
            heads,
            queries,
            k.shape[2],
            softmax_scale / math.log(2),
            0 if kv_lengths is None else kv_lengths.stride(0),
            *q.stride(),
            *k.stride(),
            *v.stride(),
            *out.stride(),
            HEAD_DIM=head_dim,
            BLOCK_M=block_m,
            BLOCK_N=block_n,
            BLOCK_D=max(16, triton.next_power_of_2(head_dim)),  # tl.dot needs a length of at least 16
            num_warps=num_warps,
            num_stages=num_stages,
        )
    return out


def _output(q: Tensor, v: Tensor) -> Tensor:
    """An empty [B, heads, S, head_dim] whose memory is [B, S, heads, head_dim]."""
    return q.new_empty(q.shape[0], q.shape[2], q.shape[1], v.shape[3]).transpose(1, 2)


def backend_refusals(backend: str, q: Tensor, k: Tensor, v: Tensor, kv_lengths: Tensor | None = None) -> list[str]:
    """Why a backend cannot run `attention` on these tensors, one sentence each; empty if it can.

    Raises:
        GBCIError: the backend is unknown.
    """
    if backend not in BACKENDS:
        raise GBCIError(f"backend is {backend!r}; expected one of {', '.join(BACKENDS)}")
    if backend == "sdpa_math" or (backend == "sdpa_flash" and q.is_cpu):
        return []
    if backend == "triton":
        return _triton_refuses(q)
    if not q.is_cuda:
        return [f"{backend} needs an NVIDIA GPU, and q is on {q.device}"]
    if kv_lengths is not None and backend in ("sdpa_flash", "sdpa_cudnn", "xformers"):
        return [f"{backend} is called without a mask, and kv_lengths needs one"]
    if backend == "xformers":
        return _xformers_refuses(q, k, v)
    if q.dtype == torch.float32 and backend != "sdpa_efficient":
        return [f"{backend} takes bfloat16 and float16, and q is {q.dtype}"]
    if backend == "sdpa_flash" and q.shape[-1] % 8 != 0:  # PyTorch pads before the check; the operator does not
        return [f"sdpa_flash takes a head_dim divisible by 8, and it is {q.shape[-1]}"]
    return _torch_refuses(backend, q, k, v, kv_lengths)


def _triton_refuses(q: Tensor) -> list[str]:
    if triton is None:
        return ["triton is not installed: pip install triton"]
    if q.dtype not in DTYPES:
        return [f"triton takes float32, bfloat16 and float16, and q is {q.dtype}"]
    if not use_triton(q):
        return [f"triton needs an NVIDIA GPU, and q is on {q.device}"]
    if q.shape[-1] > MAX_HEAD_DIM:
        return [f"triton takes a head_dim of at most {MAX_HEAD_DIM}, and it is {q.shape[-1]}"]
    return []


def _torch_refuses(backend: str, q: Tensor, k: Tensor, v: Tensor, kv_lengths: Tensor | None) -> list[str]:
    """PyTorch's own reasons, which it gives as warnings."""
    can_use = {
        "sdpa_flash": torch.backends.cuda.can_use_flash_attention,
        "sdpa_efficient": torch.backends.cuda.can_use_efficient_attention,
        "sdpa_cudnn": torch.backends.cuda.can_use_cudnn_attention,
    }[backend]
    bias = None if kv_lengths is None else _bias(kv_lengths, k).expand(*q.shape[:3], -1)
    params = torch.backends.cuda.SDPAParams(q, k, v, bias, 0.0, False, False)
    if can_use(params, False):
        return []
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        can_use(params, True)
    sentences = [f"{backend}: {str(warning.message).splitlines()[0]}" for warning in said]
    return sentences or [
        f"{backend}: PyTorch refuses q {list(q.shape)} in {q.dtype} on {q.device} and does not say why"
    ]


def _xformers_refuses(q: Tensor, k: Tensor, v: Tensor) -> list[str]:
    """xformers' own reasons; empty if one of its kernels takes the tensors."""
    try:
        from xformers.ops import fmha
    except ImportError as error:
        if (error.name or "").partition(".")[0] != "xformers":
            return [f"xformers cannot be imported: {error}"]
        return ["xformers is not installed: pip install xformers"]
    q, k, v = (part.transpose(1, 2) for part in (q, k, v))
    inputs = fmha.Inputs(query=q, key=k, value=v)
    refusals = {kernel.NAME: kernel.not_supported_reasons(inputs) for kernel in fmha.ALL_FW_OPS}
    if not all(refusals.values()):
        return []
    return [f"xformers' {name}: {'; '.join(reasons)}" for name, reasons in refusals.items()]


def _chosen(q: Tensor, k: Tensor, v: Tensor, kv_lengths: Tensor | None) -> str:
    order = next(order for most_keys, order in ORDER[order_key(q.device)] if k.shape[2] <= most_keys)
    # sdpa_math, the last of each order, refuses nothing.
    return next(backend for backend in order if not backend_refusals(backend, q, k, v, kv_lengths))


def order_key(device: torch.device) -> str:
    """The key of `ORDER` for a device: such as "sm_90" where that has rows of its own, else "cuda" or "cpu"."""
    if device.type != "cuda":
        return "cpu"
    name = "sm_{}{}".format(*torch.cuda.get_device_capability(device))
    return name if name in ORDER else "cuda"


def _run(q, k, v, softmax_scale, kv_lengths, backend):
    aten, scale = torch.ops.aten, softmax_scale
    backend = _chosen(q, k, v, kv_lengths) if backend is None else backend
    if backend == "triton":
        return _launch(q, k, v, q.shape[-1] ** -0.5 if scale is None else scale, kv_lengths)
    bias = None if kv_lengths is None else _bias(kv_lengths, k)
    if backend == "xformers":
        from xformers.ops import memory_efficient_attention

        out = memory_efficient_attention(*(part.transpose(1, 2) for part in (q, k, v)), scale=scale).transpose(1, 2)
    elif backend == "sdpa_math":
        out = aten._scaled_dot_product_attention_math(q, k, v, bias, scale=scale)[0]
    elif backend == "sdpa_efficient":
        bias = None if bias is None else bias.expand(*q.shape[:3], -1)
        out = aten._scaled_dot_product_efficient_attention(q, k, v, bias, False, scale=scale)[0]
    elif backend == "sdpa_cudnn":
        out = aten._scaled_dot_product_cudnn_attention(q, k, v, None, False, scale=scale)[0]
    elif q.is_cpu:
        out = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, attn_mask=bias, scale=scale)[0]
    else:
        out = aten._scaled_dot_product_flash_attention(q, k, v, scale=scale)[0]
    if kv_lengths is not None:  # backends differ where a sample has no keys
        out = out.masked_fill((kv_lengths == 0)[:, None, None, None], 0.0)
    return out.transpose(1, 2).contiguous().transpose(1, 2)


_attention = torch.library.custom_op(
    "gbci_fast::attention",
    _run,
    mutates_args=(),
    device_types=("cpu", "cuda"),
    schema="(Tensor q, Tensor k, Tensor v, float? softmax_scale, Tensor? kv_lengths, str? backend) -> Tensor",
)


@_attention.register_fake
def _(q, k, v, *_):
    return _output(q, v)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    softmax_scale: float | None = None,
    kv_lengths: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Every query's mean of the values, weighted by the softmax of its scores. Forward only.

    Args:
        q: ``[B, heads, S, head_dim]`` of any strides. q, k and v have one dtype: float32, bfloat16 or float16 (on the
            CPU also float64).
        k: ``[B, heads, N, head_dim]``.
        v: ``[B, heads, N, head_dim]``.
        softmax_scale: factor on the scores; by default ``head_dim ** -0.5``.
        kv_lengths: int32 ``[B]``, the number of valid keys of each sample; further keys are padding. A sample without
            keys gets 0.
        backend: one of `BACKENDS`; by default the first of `ORDER` that does not refuse.

    Returns:
        ``[B, heads, S, head_dim]`` whose memory is ``[B, S, heads, head_dim]``, as an output projection reads it.

    Raises:
        GBCIError: a shape, dtype or device is not as above, or the backend refuses; the sentence says why.
    """
    if not (q.dim() == k.dim() == 4 and k.shape == v.shape and q.shape[:2] == k.shape[:2] and q.shape[3] == k.shape[3]):
        shapes = ", ".join(f"{name} {list(part.shape)}" for name, part in (("q", q), ("k", k), ("v", v)))
        raise GBCIError(f"got {shapes}; expected q [B, heads, S, head_dim] and k and v [B, heads, N, head_dim]")
    if 0 in q.shape or k.shape[2] == 0:
        raise GBCIError(f"q is {list(q.shape)} and k {list(k.shape)}; expected no axis of length 0")
    dtypes = (torch.float32, torch.bfloat16, torch.float16, *((torch.float64,) if q.is_cpu else ()))
    for name, part in (("q", q), ("k", k), ("v", v)):
        if part.dtype != q.dtype or part.dtype not in dtypes:
            raise GBCIError(f"{name} is {part.dtype}; expected float32, bfloat16 or float16, and q's")
        if part.device != q.device:
            raise GBCIError(f"{name} is on {part.device}; expected {q.device} like q")
    if kv_lengths is not None and (kv_lengths.dtype != torch.int32 or kv_lengths.shape != q.shape[:1]):
        got = f"{kv_lengths.dtype} {list(kv_lengths.shape)}"
        raise GBCIError(f"kv_lengths is {got}; expected torch.int32 [{q.shape[0]}]")
    if kv_lengths is not None and kv_lengths.device != q.device:
        raise GBCIError(f"kv_lengths is on {kv_lengths.device}; expected {q.device} like q")
    if backend is not None:
        reasons = backend_refusals(backend, q, k, v, kv_lengths)
        if reasons:
            raise GBCIError(f"attention cannot run by {backend}: {'; '.join(reasons)}")
    return _attention(q, k, v, softmax_scale, kv_lengths, backend)
