"""The one place that imports Triton; where it is not installed, a kernel stays a plain function that nobody calls.

An operator's file takes `jit`, `tl` and `triton` from here, begins with ``from __future__ import annotations`` (so that
``tl.constexpr`` in a kernel's signature is not evaluated), and registers itself with `triton_op`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ModuleNotFoundError as error:
    if error.name != "triton":
        raise
    triton = tl = None

INTERPRETED = triton is not None and triton.knobs.runtime.interpret
"""Triton runs its kernels in Python, on CPU tensors: TRITON_INTERPRET=1 was set when the process began."""

_INTERPRETED = triton and tl.constexpr(INTERPRETED)  # as a kernel may read it

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""What the kernels read and write; they add up in float32."""


def jit(kernel: Callable) -> Callable:
    """`triton.jit` where there is Triton."""
    return kernel if triton is None else triton.jit(kernel)


@jit
def dot(
    a,  # [M, K]
    b,  # [K, N]
    acc,  # [M, N], float32
):
    """acc + a b with float32 sums, and no float32 factor rounded to TF32."""
    if _INTERPRETED:  # which would multiply the integers that it stores bfloat16 as
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


def use_triton(x: Tensor) -> bool:
    """Whether an operator runs its Triton kernel on tensors like this one."""
    where = x.is_cpu if INTERPRETED else x.is_cuda and triton is not None
    return where and x.dtype in DTYPES


def architecture() -> int:
    """Of the current device, as in sm_90: the key of a table of tile sizes. 0 in the interpreter."""
    return 0 if INTERPRETED else triton.runtime.driver.active.get_current_target().arch


def triton_op(
    name: str, schema: str, *, cpu: Callable, cuda: Callable, fake: Callable, mutates_args: Sequence[str] = ()
) -> Callable:
    """Registers ``torch.ops.gbci_fast.<name>``, forward only: a backward pass through it raises a RuntimeError.

    `cuda` launches the kernel; it also runs on the CPU where Triton interprets, instead of `cpu`, the reference. All
    three take the arguments of `schema` by position.
    """

    def on_its_device(*args: Any) -> Any:
        with torch.cuda.device_of(args[0]):  # Triton launches on the current device
            return cuda(*args)

    here = cuda if INTERPRETED else cpu
    op = torch.library.custom_op(
        f"gbci_fast::{name}", here, mutates_args=mutates_args, device_types="cpu", schema=schema
    )
    op.register_kernel("cuda", on_its_device)
    op.register_fake(fake)
    return op
