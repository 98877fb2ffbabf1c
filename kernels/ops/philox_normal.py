"""Standard normals that depend only on (seed, element, step, stream), for a whole batch at once.

Equivalent to `gbci_fast.model.noise.seeded_normal`, which defines the numbers. The two differ by the float32 rounding
of log, sqrt and sincos, at most `RTOL` relative. The CPU and the CUDA kernel give the same bits.

Faster because counters need no state: every element is drawn in registers, on any number of threads, and written once.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from gbci_fast.model import noise
from gbci_fast.ops import load_extension

load_extension()

RTOL = 8 * 2**-24
"""Bound of the relative error in float32. In units of 2^-24, over all 2^24 arguments: the radius r is wrong by at most
2.63, cosine and sine by at most 2.43. Their product rounds once, and the reference rounds once: 7.1 in total."""


def philox_normal_ref(
    seeds: Tensor, shape: Sequence[int], *, step: int = 0, stream: int = 0, dtype: torch.dtype = torch.float32
) -> Tensor:
    """`philox_normal` by its definition `seeded_normal`, in NumPy on the CPU; result on the device of `seeds`."""
    unsigned = [seed % 2**64 for seed in seeds.tolist()]
    return noise.seeded_normal(unsigned, shape, step=step, stream=stream, dtype=dtype, device=seeds.device)


@torch.library.register_fake("gbci_fast::philox_normal")
def _(seeds, num_elements, step, stream):
    return seeds.new_empty((seeds.shape[0], num_elements), dtype=torch.float32)


def philox_normal(seeds: Tensor, shape: Sequence[int], *, step: int = 0, stream: int = 0) -> Tensor:
    """Standard normals, one independent sample per seed.

    Args:
        seeds: int64 ``[B]``, the bits of unsigned 64-bit seeds: see `gbci_fast.model.noise.seed_tensor`.
        shape: shape of a sample, without the batch axis; up to ``2^34`` elements.
        step: index of the sampling step, in ``[0, 2^32)``.
        stream: the purpose of the noise, in ``[0, 2^32)``: `noise.STREAM_INITIAL`, `noise.STREAM_SCHEDULER`, ...

    Returns:
        float32 ``[B, *shape]`` on the device of `seeds`.

    Raises:
        RuntimeError: `seeds` is not int64 ``[B]``, or another argument is out of range.
    """
    return torch.ops.gbci_fast.philox_normal(seeds, math.prod(shape), step, stream).view(seeds.shape[0], *shape)
