"""Noise per sample: Philox4x32-10 followed by Box-Muller. This is the definition, in plain NumPy.

A normal is a pure function of (seed, element, step, stream), so a sample's noise depends neither on its batch nor on
the device. Let ``e`` be the flat index of an element in ``[C, H, W]`` order, and ``x0 .. x3`` the four words that
Philox returns for

    key     = (seed mod 2^32, seed div 2^32)
    counter = (e div 4, step, stream, 0)

With ``u(x) = (x div 2^8) 2^-24``, elements ``4 (e div 4) + 0 .. 3`` of the sample are

    n0 = r cos(2 pi u(x1)),   n1 = r sin(2 pi u(x1)),   r = sqrt(-2 log(u(x0) + 2^-24))

and n2, n3 likewise from ``x2, x3``. Both uniforms are exact in float32, so single-precision kernels differ from this
module only by the rounding of log, sqrt and sincos. ``|n| <= sqrt(48 log 2) = 5.77``.

Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011; Box and Muller, 1958.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from gbci_fast.errors import GBCIError

STREAM_INITIAL = 0
"""Counter word of the initial noise of a trajectory."""
STREAM_SCHEDULER = 1
"""Counter word of the noise that a stochastic scheduler adds at each step."""

_MULTIPLIERS = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_WEYL = np.uint64(0x9E3779B9), np.uint64(0xBB67AE85)
_LOW = np.uint64(0xFFFFFFFF)
_HALF = np.uint64(32)


def philox4x32(counter: np.ndarray, key: np.ndarray) -> np.ndarray:
    """Philox4x32 with 10 rounds.

    Args:
        counter: uint32 ``[..., 4]``.
        key: uint32 ``[..., 2]``; its leading axes broadcast against the counter's.

    Returns:
        uint32 ``[..., 4]``.
    """
    # 32-bit words in 64-bit integers: a product is one multiplication, and its halves are a shift and a mask.
    c0, c1, c2, c3 = np.moveaxis(np.asarray(counter, np.uint64), -1, 0)
    k0, k1 = np.moveaxis(np.asarray(key, np.uint64), -1, 0)
    for _ in range(10):
        product0, product1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            (product1 >> _HALF) ^ c1 ^ k0,
            product1 & _LOW,
            (product0 >> _HALF) ^ c3 ^ k1,
            product0 & _LOW,
        )
        k0, k1 = (k0 + _WEYL[0]) & _LOW, (k1 + _WEYL[1]) & _LOW
    return np.stack(np.broadcast_arrays(c0, c1, c2, c3), axis=-1).astype(np.uint32)


def seeded_normal(
    seeds: Sequence[int],
    shape: Sequence[int],
    *,
    step: int = 0,
    stream: int = STREAM_INITIAL,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Standard normals, one independent sample per seed; computed in float64 on the CPU and rounded once to `dtype`.

    Args:
        seeds: one integer in ``[0, 2^64)`` per sample.
        shape: shape of a sample, without the batch axis; up to ``2^34`` elements.
        step: index of the sampling step, in ``[0, 2^32)``.
        stream: purpose of the noise, in ``[0, 2^32)``: `STREAM_INITIAL` or `STREAM_SCHEDULER`.
        dtype: a floating-point type.
        device: of the result.

    Returns:
        Tensor ``[len(seeds), *shape]``.

    Raises:
        GBCIError: a seed, the step or the stream is out of range, or a sample has too many elements.
    """
    keys = _seed_array(seeds)
    keys = np.stack((keys & _LOW, keys >> _HALF), axis=-1)[:, None]
    elements = math.prod(shape)
    if elements > 2**34:
        raise GBCIError(f"a sample of shape {tuple(shape)} has more elements than noise is defined for (2^34)")

    counters = np.zeros((-(-elements // 4), 4), np.uint64)
    counters[:, 0] = np.arange(len(counters), dtype=np.uint64)
    counters[:, 1], counters[:, 2] = _checked(step, "step", 32), _checked(stream, "stream", 32)
    normals = _box_muller(philox4x32(counters, keys)).reshape(len(keys), 4 * len(counters))[:, :elements]
    return torch.from_numpy(normals).reshape(len(keys), *shape).to(device=device, dtype=dtype)


def seed_tensor(seeds: Sequence[int], device: torch.device | str = "cpu") -> Tensor:
    """Seeds as operators take them: int64 ``[len(seeds)]`` with the bits of the unsigned 64-bit seeds.

    Raises:
        GBCIError: a seed is not an integer in ``[0, 2^64)``.
    """
    return torch.from_numpy(_seed_array(seeds).view(np.int64)).to(device)


def _seed_array(seeds: Sequence[int]) -> np.ndarray:
    return np.array([_checked(seed, "seed", 64) for seed in seeds], np.uint64)


def _checked(value: int, name: str, bits: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or not 0 <= value < 2**bits:
        raise GBCIError(f"{name} {value!r} is not an integer from 0 to 2^{bits} - 1")
    return int(value)


def _box_muller(words: np.ndarray) -> np.ndarray:
    """Standard normals, float64 ``[..., 4]``, from words, uint32 ``[..., 4]``."""
    uniform = (words >> np.uint32(8)) * 2.0**-24
    radius = np.sqrt(-2.0 * np.log(uniform[..., 0::2] + 2.0**-24))
    angle = 2.0 * np.pi * uniform[..., 1::2]
    return np.stack((radius * np.cos(angle), radius * np.sin(angle)), axis=-1).reshape(words.shape)
