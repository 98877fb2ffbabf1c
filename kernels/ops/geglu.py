"""GEGLU (Shazeer 2020): two linear maps of one input, the first times the GELU of the second.

Equivalent to ``hidden * F.gelu(gate)`` with ``hidden, gate = F.linear(x, weight, bias).chunk(2, -1)``, the exact GELU.
Faster because a program multiplies x with the same rows of both halves of the weight: the activation ends the matrix
product, and the doubled width is never written to memory. Forward only.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from gbci_fast.errors import GBCIError
from gbci_fast.ops._triton import DTYPES, architecture, dot, jit, tl, triton, triton_op

# Tile sizes by architecture and bytes of an element: BLOCK_M, BLOCK_N (of each half), BLOCK_K, warps, stages.
# They fill the tensor cores' tiles, and registers do not spill; not timed yet.
TILES = {
    (80, 2): (128, 64, 32, 8, 4),
    (90, 2): (128, 128, 64, 8, 3),
}
DEFAULT_TILE = (64, 64, 32, 8, 3)  # for other architectures, and for float32, which tensor cores do not multiply
GROUP_M = 8  # rows of tiles that share columns of the weight in the cache


def geglu_ref(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`geglu` in plain PyTorch."""
    hidden, gate = F.linear(x, weight, bias).chunk(2, -1)
    return hidden * F.gelu(gate)


@jit
def _geglu_kernel(
    x_ptr,  # [M, K]
    weight_ptr,  # [2 N, K]
    bias_ptr,  # [2 N] or None
    out_ptr,  # [M, N]
    M,
    N,
    K,
    x_stride_m,
    x_stride_k,
    weight_stride_n,
    weight_stride_k,
    GROUP_M: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """A tile [BLOCK_M, BLOCK_N] of the result: two products with the same rows of x."""
    # Tiles in columns of GROUP_M: programs that run together read the same weights and few rows of x.
    program, across = tl.program_id(0), tl.cdiv(N, BLOCK_N)
    first = program // (GROUP_M * across) * GROUP_M
    size = tl.minimum(tl.cdiv(M, BLOCK_M) - first, GROUP_M)
    tile_m, tile_n = first + program % (GROUP_M * across) % size, program % (GROUP_M * across) // size
    m = (tile_m * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)  # x may hold more than 2^31 elements
    n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    x_ptrs = x_ptr + m[:, None] * x_stride_m + k[None, :] * x_stride_k
    hidden_ptrs = weight_ptr + k[:, None] * weight_stride_k + n[None, :] * weight_stride_n
    gate_ptrs = hidden_ptrs + N * weight_stride_n

    hidden = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    gate = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, K, BLOCK_K):
        inside = k < K - start
        weight_mask = inside[:, None] & (n < N)[None, :]
        x = tl.load(x_ptrs, (m < M)[:, None] & inside[None, :], other=0.0)
        hidden = dot(x, tl.load(hidden_ptrs, weight_mask, other=0.0), hidden)
        gate = dot(x, tl.load(gate_ptrs, weight_mask, other=0.0), gate)
        x_ptrs += BLOCK_K * x_stride_k
        hidden_ptrs += BLOCK_K * weight_stride_k
        gate_ptrs += BLOCK_K * weight_stride_k

    if bias_ptr is not None:
        hidden += tl.load(bias_ptr + n, n < N, other=0.0).to(tl.float32)[None, :]
        gate += tl.load(bias_ptr + N + n, n < N, other=0.0).to(tl.float32)[None, :]
    y = hidden * (0.5 * gate * (1.0 + tl.math.erf(gate * 0.7071067811865476)))
    out_ptrs = out_ptr + m[:, None] * N + n[None, :]
    tl.store(out_ptrs, y.to(out_ptr.dtype.element_ty), (m < M)[:, None] & (n < N)[None, :])


def _launch(x, weight, bias):
    out = x.new_empty((*x.shape[:-1], len(weight) // 2))
    rows = x.flatten(0, -2)
    (M, K), N = rows.shape, out.shape[-1]
    block_m, block_n, block_k, warps, stages = TILES.get((architecture(), x.element_size()), DEFAULT_TILE)
    _geglu_kernel[(triton.cdiv(M, block_m) * triton.cdiv(N, block_n),)](
        rows,
        weight,
        bias,
        out,
        M,
        N,
        K,
        *rows.stride(),
        *weight.stride(),
        GROUP_M=GROUP_M,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        BLOCK_K=block_k,
        num_warps=warps,
        num_stages=stages,
    )
    return out


_geglu = triton_op(
    "geglu",
    "(Tensor x, Tensor weight, Tensor? bias) -> Tensor",
    cuda=_launch,
    cpu=geglu_ref,
    fake=lambda x, weight, bias: x.new_empty((*x.shape[:-1], weight.shape[0] // 2)),
)


def geglu(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``(x W_1^T + b_1) * gelu(x W_2^T + b_2)``, in the order of diffusers' GEGLU. Forward only.

    Args:
        x: ``[..., K]``, float32, bfloat16 or float16 (on the CPU also float64).
        weight: ``[2 N, K]`` in the dtype of x, the rows of W_1 and then those of W_2.
        bias: ``[2 N]`` in the dtype of x, contiguous, b_1 and then b_2; or None.

    Returns:
        ``[..., N]`` in the dtype of x. The kernel computes sums and GELU in float32, and does not round float32 factors
        to TF32.

    Raises:
        GBCIError: a shape, dtype, device or layout is not as above.
    """
    if x.dim() < 2 or x.numel() == 0:
        raise GBCIError(f"x is {list(x.shape)}; expected [..., K], not empty")
    if x.dtype not in DTYPES and not (x.is_cpu and x.dtype == torch.float64):
        raise GBCIError(f"x is {x.dtype}; expected float32, bfloat16 or float16")
    if weight.dim() != 2 or weight.shape[1] != x.shape[-1] or len(weight) % 2 != 0 or len(weight) == 0:
        raise GBCIError(f"weight is {list(weight.shape)}; expected [2 N, {x.shape[-1]}]")
    if bias is not None and (bias.shape != (len(weight),) or not bias.is_contiguous()):
        got = f"bias is {list(bias.shape)} with strides {bias.stride()}"
        raise GBCIError(f"{got}; expected [{len(weight)}], contiguous")
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and (tensor.dtype, tensor.device) != (x.dtype, x.device):
            raise GBCIError(f"{name} is {tensor.dtype} on {tensor.device}; expected {x.dtype} on {x.device} like x")
    return _geglu(x, weight, bias)
