"""Group normalization of an image, FiLM (Perez et al. 2018) and SiLU.

Equivalent to ``F.silu(F.group_norm(x, ...) * scale + shift)``. Faster because it passes over memory once if a program
can keep its groups in registers, and otherwise twice: once for the statistics and once for the rest. Inside a recorded
graph, the two passes go over slices of the batch that the cache still holds the second time. (Outside a graph,
launching slices would cost more than it saves.) For a channels-last image, a program takes several groups, to read
neighboring bytes of each pixel.

No variance is a difference of large numbers: it is computed about the mean in registers, or by Welford's update and the
combination of Chan et al. 1979. On the CPU, the compiled extension does the same, in two passes over pieces that fit
its cache. Forward only.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from gbci_fast.errors import GBCIError
from gbci_fast.ops import load_extension
from gbci_fast.ops._triton import DTYPES, INTERPRETED, jit, tl, triton, triton_op

load_extension()
MAX_GROUP = 8192  # channels
# The numbers below are estimates, not measured on a GPU.
IN_REGISTERS = 16384  # elements that one program keeps, 32 per thread
# Bytes that a program which keeps its groups reads of a channels-last pixel: the first for which all pixels fit. A
# sector of memory is 32 bytes. With fewer channels more programs run at once: some load while others store.
RUNS = (32, 16)
SPLIT_RUN = 128  # bytes of a pixel that a program reads where pixels are split over programs
SPLIT_ELEMENTS = 4096  # elements of one turn of such a program's loop
MAX_SPLITS = 32
CACHED_BYTES = 24 << 20  # of slices that are read twice: half of the H200's second-level cache
MAX_GRID = 65535  # CUDA's limit of the last axis


def group_norm_film_silu_ref(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float = 1e-5,
    *,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    silu: bool = True,
) -> Tensor:
    """`group_norm_film_silu` in plain PyTorch."""
    y = torch.group_norm(x, num_groups, weight, bias, eps)
    if scale is not None:
        scale, shift = (part.unflatten(0, (-1, len(x)))[..., None, None] for part in (scale, shift))
        y = torch.addcmul(shift, y, scale).flatten(0, 1)
    return F.silu(y) if silu else y


@jit
def _over_groups(
    v,  # [BLOCK_C]
    GROUPS: tl.constexpr,
    CHANNELS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """[BLOCK_C]: for each channel, the sum of v over its group, for groups of any size."""
    if GROUPS == 1:
        return tl.zeros([BLOCK_C], tl.float32) + tl.sum(v, 0)
    group = tl.arange(0, BLOCK_C) // CHANNELS
    return tl.sum(tl.where(group[:, None] == group[None, :], v[None, :], 0.0), 1)


@jit
def _store(
    out_ptr,
    offsets,  # [BLOCK_P, BLOCK_C]
    mask,
    normalized,  # [BLOCK_P, BLOCK_C]
    weight_ptr,
    bias_ptr,
    scale_ptr,
    shift_ptr,
    c,  # [BLOCK_C]
    in_tile,
    row,  # of the FiLM
    scale_stride,
    shift_stride,
    SILU: tl.constexpr,
):
    """Applies weight, bias, FiLM (all as one multiplication and one addition) and SiLU, and stores the result."""
    gain, offset = tl.full(c.shape, 1.0, tl.float32), tl.zeros(c.shape, tl.float32)
    if weight_ptr is not None:
        gain = tl.load(weight_ptr + c, in_tile, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        offset = tl.load(bias_ptr + c, in_tile, other=0.0).to(tl.float32)
    if scale_ptr is not None:
        scale = tl.load(scale_ptr + row * scale_stride + c, in_tile, other=0.0).to(tl.float32)
        shift = tl.load(shift_ptr + row * shift_stride + c, in_tile, other=0.0).to(tl.float32)
        gain, offset = gain * scale, offset * scale + shift
    y = normalized * gain[None, :] + offset[None, :]
    if SILU:
        y = y * tl.sigmoid(y)
    tl.store(out_ptr + offsets, y.to(out_ptr.dtype.element_ty), mask)


@jit
def _tile(
    num_channels,
    num_pixels,
    CHANNELS_LAST: tl.constexpr,
    USED: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """The program's channels c [BLOCK_C], a mask of the used ones [BLOCK_C], and the strides of channel and pixel."""
    in_tile = tl.arange(0, BLOCK_C) < USED
    c = tl.program_id(0) * USED + tl.arange(0, BLOCK_C)
    if CHANNELS_LAST:
        return c, in_tile, 1, num_channels
    return c, in_tile, num_pixels, 1


@jit
def _one_pass_kernel(
    x_ptr,  # [B, C, P], P pixels, channels-last or not, as out
    weight_ptr,  # [C] or None
    bias_ptr,  # [C] or None
    scale_ptr,  # [HALVES B, C] or None
    shift_ptr,  # [HALVES B, C] or None
    out_ptr,  # [HALVES B, C, P]
    num_samples,  # B
    num_channels,  # C
    num_pixels,  # P
    scale_stride,
    shift_stride,
    eps,
    HALVES: tl.constexpr,
    GROUPS: tl.constexpr,  # per program
    CHANNELS: tl.constexpr,  # per group
    CHANNELS_LAST: tl.constexpr,
    SILU: tl.constexpr,
    BLOCK_P: tl.constexpr,  # at least P
    BLOCK_C: tl.constexpr,
):
    """GROUPS groups of one sample, kept in registers."""
    b = tl.program_id(1).to(tl.int64)  # a batch may hold more than 2^31 elements
    c, in_tile, stride_c, stride_p = _tile(num_channels, num_pixels, CHANNELS_LAST, GROUPS * CHANNELS, BLOCK_C)
    p = tl.arange(0, BLOCK_P)
    mask = (p < num_pixels)[:, None] & in_tile[None, :]
    offsets = p[:, None] * stride_p + c[None, :] * stride_c
    sample = num_pixels * num_channels

    base = b * sample
    h = tl.load(x_ptr + base + offsets, mask, other=0.0).to(tl.float32)
    count = num_pixels * CHANNELS
    mean = _over_groups(tl.sum(h, 0), GROUPS, CHANNELS, BLOCK_C) / count
    h = tl.where(mask, h - mean[None, :], 0.0)
    variance = _over_groups(tl.sum(h * h, 0), GROUPS, CHANNELS, BLOCK_C) / count
    h = h * tl.rsqrt(variance + eps)[None, :]
    for half in tl.static_range(HALVES):
        row = half * num_samples + b
        _store(
            out_ptr, row * sample + offsets, mask, h, weight_ptr, bias_ptr, scale_ptr, shift_ptr, c, in_tile, row,
            scale_stride, shift_stride, SILU,
        )  # fmt: skip


@jit
def _statistics_kernel(
    x_ptr,  # [B, C, P]
    statistics_ptr,  # [B, splits, C / CHANNELS, 2]: mean, and sum of squares about it
    num_channels,  # C
    num_pixels,  # P
    span,  # pixels of a split, a multiple of BLOCK_P
    GROUPS: tl.constexpr,
    CHANNELS: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """The statistics of GROUPS groups of one sample, over the pixels of one split."""
    split, b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    c, in_tile, stride_c, stride_p = _tile(num_channels, num_pixels, CHANNELS_LAST, GROUPS * CHANNELS, BLOCK_C)
    base = b * num_pixels * num_channels
    # Each lane has a mean of its own (Welford 1962), so that the loop reduces nothing.
    count = tl.zeros([BLOCK_P], tl.float32)
    mean = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    squares = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    for start in range(0, span, BLOCK_P):
        p = split * span + start + tl.arange(0, BLOCK_P)
        mask = (p < num_pixels)[:, None] & in_tile[None, :]
        offsets = p[:, None] * stride_p + c[None, :] * stride_c
        h = tl.load(x_ptr + base + offsets, mask, other=0.0).to(tl.float32)
        count += (p < num_pixels).to(tl.float32)
        delta = tl.where(mask, h - mean, 0.0)
        mean += delta / tl.maximum(count, 1.0)[:, None]
        squares += delta * (h - mean)

    # Chan et al. 1979: the lanes' sums of squares, moved from the lanes' means to the group's mean.
    total = _over_groups(tl.sum(mean * count[:, None], 0), GROUPS, CHANNELS, BLOCK_C)
    group_mean = total / (tl.sum(count, 0) * CHANNELS)
    apart = tl.where(in_tile[None, :], mean - group_mean[None, :], 0.0)
    squares += count[:, None] * apart * apart
    group_squares = _over_groups(tl.sum(squares, 0), GROUPS, CHANNELS, BLOCK_C)
    row = (b * tl.num_programs(1) + split) * (num_channels // CHANNELS) + c // CHANNELS
    first = in_tile & (c % CHANNELS == 0)
    tl.store(statistics_ptr + 2 * row, group_mean, first)
    tl.store(statistics_ptr + 2 * row + 1, group_squares, first)


@jit
def _apply_kernel(
    x_ptr,  # [B, C, P]
    statistics_ptr,  # [B, splits, C / CHANNELS, 2]
    weight_ptr,  # [C] or None
    bias_ptr,  # [C] or None
    scale_ptr,  # [HALVES B, C] or None
    shift_ptr,  # [HALVES B, C] or None
    out_ptr,  # [HALVES B, C, P]
    num_samples,  # B
    num_channels,  # C
    num_pixels,  # P
    num_splits,
    span,  # pixels of a split, a multiple of BLOCK_P
    scale_stride,
    shift_stride,
    eps,
    HALVES: tl.constexpr,
    GROUPS: tl.constexpr,
    CHANNELS: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    SILU: tl.constexpr,
    SPLITS: tl.constexpr,  # at least num_splits
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Normalizes GROUPS groups of one sample in one split, for one of the halves."""
    split, b = tl.program_id(1), (tl.program_id(2) // HALVES).to(tl.int64)
    c, in_tile, stride_c, stride_p = _tile(num_channels, num_pixels, CHANNELS_LAST, GROUPS * CHANNELS, BLOCK_C)
    s = tl.arange(0, SPLITS)
    count = CHANNELS * tl.minimum(tl.maximum(num_pixels - s * span, 0), span).to(tl.float32)
    row = (b * num_splits + s)[:, None] * (num_channels // CHANNELS) + (c // CHANNELS)[None, :]
    known = (s < num_splits)[:, None] & in_tile[None, :]
    means = tl.load(statistics_ptr + 2 * row, known, other=0.0)
    squares = tl.load(statistics_ptr + 2 * row + 1, known, other=0.0)
    mean = tl.sum(means * count[:, None], 0) / (num_pixels * CHANNELS)
    apart = means - mean[None, :]
    variance = tl.sum(squares + count[:, None] * apart * apart, 0) / (num_pixels * CHANNELS)
    rstd = tl.rsqrt(variance + eps)

    sample = num_pixels * num_channels
    film = (tl.program_id(2) % HALVES) * num_samples + b
    for start in range(0, span, BLOCK_P):
        p = split * span + start + tl.arange(0, BLOCK_P)
        mask = (p < num_pixels)[:, None] & in_tile[None, :]
        offsets = p[:, None] * stride_p + c[None, :] * stride_c
        h = tl.load(x_ptr + b * sample + offsets, mask, other=0.0).to(tl.float32)
        h = (h - mean[None, :]) * rstd[None, :]
        _store(
            out_ptr, film * sample + offsets, mask, h, weight_ptr, bias_ptr, scale_ptr, shift_ptr, c, in_tile, film,
            scale_stride, shift_stride, SILU,
        )  # fmt: skip


def _output(x: Tensor, halves: int) -> Tensor:
    memory_format = torch.contiguous_format if x.is_contiguous() else torch.channels_last
    shape = (halves * x.shape[0], *x.shape[1:])
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=memory_format)


def _groups_per_run(run: int, x: Tensor, num_groups: int) -> int:
    """How many groups fill `run` bytes of a channels-last pixel, as far as they divide `num_groups`; otherwise 1."""
    groups, group_bytes = 1, x.shape[1] // num_groups * x.element_size()
    while not x.is_contiguous() and groups * group_bytes < run and num_groups % (2 * groups) == 0:
        groups *= 2
    return groups


def _launches_are_cheap() -> bool:
    """True inside a graph's capture. Otherwise Python launches a slice's kernels more slowly than they run."""
    return INTERPRETED or (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing())


def _launch(x, num_groups, weight, bias, eps, scale, shift, silu):
    batch, channels, pixels = *x.shape[:2], x.shape[2] * x.shape[3]
    halves = 1 if scale is None else len(scale) // batch
    out = _output(x, halves)
    options = {"CHANNELS": channels // num_groups, "CHANNELS_LAST": not x.is_contiguous()}
    last = {"HALVES": halves, "SILU": silu}
    strides = (0, 0) if scale is None else (scale.stride(0), shift.stride(0))

    block_p = triton.next_power_of_2(pixels)
    for groups in (_groups_per_run(run, x, num_groups) for run in RUNS):
        block_c = triton.next_power_of_2(groups * options["CHANNELS"])
        if block_p * block_c <= IN_REGISTERS:
            options |= {"GROUPS": groups, "BLOCK_P": block_p, "BLOCK_C": block_c}
            _one_pass_kernel[num_groups // groups, batch](
                x, weight, bias, scale, shift, out, batch, channels, pixels, *strides, eps,
                num_warps=min(max(block_p * block_c // 1024, 1), 16), **last, **options,
            )  # fmt: skip
            return out

    groups = _groups_per_run(SPLIT_RUN, x, num_groups)
    block_c = triton.next_power_of_2(groups * options["CHANNELS"])
    block_p = max(SPLIT_ELEMENTS // block_c, 1)
    options |= {"GROUPS": groups, "BLOCK_P": block_p, "BLOCK_C": block_c, "num_warps": 8}
    turns = triton.cdiv(pixels, block_p)
    span = block_p * triton.cdiv(turns, min(triton.cdiv(turns, 4), MAX_SPLITS))
    splits = triton.cdiv(pixels, span)
    last["SPLITS"] = triton.next_power_of_2(splits)
    statistics = x.new_empty((batch, splits, num_groups, 2), dtype=torch.float32)
    size = min(batch, MAX_GRID // halves)
    if _launches_are_cheap():
        size = min(size, max(CACHED_BYTES // (channels * pixels * x.element_size()), 1))
    for first in range(0, batch, size):
        # Views from sample `first` on. The second half of FiLM and result is still `batch` rows after the first half.
        x_, statistics_, scale_, shift_, out_ = (
            None if tensor is None else tensor[first:] for tensor in (x, statistics, scale, shift, out)
        )
        samples = min(size, batch - first)
        _statistics_kernel[num_groups // groups, splits, samples](x_, statistics_, channels, pixels, span, **options)
        _apply_kernel[num_groups // groups, splits, samples * halves](
            x_, statistics_, weight, bias, scale_, shift_, out_, batch, channels, pixels, splits, span, *strides, eps,
            **last, **options,
        )  # fmt: skip
    return out


def _cpu(x, num_groups, weight, bias, eps, scale, shift, silu):
    """The compiled extension, if all tensors have one dtype of `DTYPES`; otherwise the reference."""
    parts = [part for part in (weight, bias, scale, shift) if part is not None]
    if x.dtype in DTYPES and all(part.dtype == x.dtype for part in parts):
        out = _output(x, 1 if scale is None else len(scale) // len(x))
        if scale is not None:
            scale, shift = scale.contiguous(), shift.contiguous()
        torch.ops.gbci_fast.group_norm_film_silu_out(x, num_groups, weight, bias, eps, scale, shift, silu, out)
        return out
    y = group_norm_film_silu_ref(x, num_groups, weight, bias, eps, scale=scale, shift=shift, silu=silu)
    return _output(x, len(y) // len(x)).copy_(y)


def _fake(x, num_groups, weight, bias, eps, scale, shift, silu):
    return _output(x, 1 if scale is None else scale.shape[0] // x.shape[0])


_group_norm_film_silu = triton_op(
    "group_norm_film_silu",
    "(Tensor x, int num_groups, Tensor? weight, Tensor? bias, float eps, Tensor? scale, Tensor? shift, "
    "bool silu) -> Tensor",
    cuda=_launch,
    cpu=_cpu,
    fake=_fake,
)


def group_norm_film_silu(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float = 1e-5,
    *,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    silu: bool = True,
) -> Tensor:
    """SiLU of the normalized x, times `scale` and plus `shift`. Forward only.

    Args:
        x: ``[B, C, H, W]``, contiguous or channels-last, float32, bfloat16 or float16 (on the CPU also float64).
        num_groups: divides C into groups of at most 8192 channels.
        weight: ``[C]``, contiguous, or None for 1.
        bias: ``[C]``, contiguous, or None for 0.
        eps: added to the variance.
        scale: ``[B, C]`` or ``[k B, C]``, the whole factor: 1 is already added. With k B rows the result has k B
            samples, and row ``i B + b`` applies to sample b of x. `scale` and `shift` are None without FiLM.
        shift: of the shape of `scale`. In both, the channels of a row are contiguous.
        silu: whether SiLU is applied at the end.

    Returns:
        ``[B, C, H, W]`` or ``[k B, C, H, W]`` in the dtype and layout of x.

    Raises:
        GBCIError: a shape, dtype, device or layout is not as above.
    """
    _check(x, num_groups, weight, bias, scale, shift)
    return _group_norm_film_silu(x, num_groups, weight, bias, eps, scale, shift, silu)


def _check(x, num_groups, weight, bias, scale, shift):
    if x.dim() != 4 or x.numel() == 0:
        raise GBCIError(f"x is {list(x.shape)}; expected [B, C, H, W], not empty")
    batch, channels = x.shape[:2]
    if math.prod(x.shape[1:]) >= 2**31:
        raise GBCIError(f"x is {list(x.shape)}; expected fewer than 2^31 elements per sample")
    if x.dtype not in DTYPES and not (x.is_cpu and x.dtype == torch.float64):
        raise GBCIError(f"x is {x.dtype}; expected float32, bfloat16 or float16")
    if num_groups < 1 or channels % num_groups != 0 or channels // num_groups > MAX_GROUP:
        raise GBCIError(f"num_groups is {num_groups}; expected to divide {channels} into at most {MAX_GROUP} each")
    if not (x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last)):
        raise GBCIError(f"x has strides {x.stride()}; expected it contiguous or channels-last")
    if (scale is None) != (shift is None):
        raise GBCIError("scale and shift come together; expected both or neither")
    for name, tensor in (("weight", weight), ("bias", bias), ("scale", scale), ("shift", shift)):
        if tensor is None:
            continue
        if tensor.shape[-1:] != (channels,) or tensor.dim() != (2 if tensor is scale or tensor is shift else 1):
            expected = f"[{channels}]" if tensor is weight or tensor is bias else f"[k {batch}, {channels}]"
            raise GBCIError(f"{name} is {list(tensor.shape)}; expected {expected}")
        if not tensor.is_floating_point() or tensor.device != x.device or tensor.stride(-1) != 1:
            got = f"{name} is {tensor.dtype} on {tensor.device} with strides {tensor.stride()}"
            raise GBCIError(f"{got}; expected a floating dtype on {x.device} like x, and contiguous channels")
    if scale is not None and (len(scale) % batch != 0 or len(scale) == 0 or len(scale) != len(shift)):
        got = f"scale is {list(scale.shape)} and shift {list(shift.shape)}"
        raise GBCIError(f"{got}; expected both [k {batch}, {channels}]")
