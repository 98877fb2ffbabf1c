"""The only module that imports Triton. Where Triton is missing, a kernel is a plain function that nobody calls.

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
"""Whether Triton runs kernels in Python, on CPU tensors: TRITON_INTERPRET=1 was set when the process began."""

_INTERPRETED = triton and tl.constexpr(INTERPRETED)  # a kernel can only read a constexpr

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""The dtypes that the kernels read and write. The kernels accumulate in float32."""


def jit(kernel: Callable) -> Callable:
    """`triton.jit` where there is Triton."""
    return kernel if triton is None else triton.jit(kernel)


@jit
def dot(
    a,  # [M, K]
    b,  # [K, N]
    acc,  # [M, N], float32
):
    """acc + a b [M, N], summed in float32. Float32 factors are not rounded to TF32."""
    if _INTERPRETED:  # the interpreter stores bfloat16 as integers, and would multiply those
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


def use_triton(x: Tensor) -> bool:
    """Whether an operator runs its Triton kernel on tensors of x's device and dtype."""
    where = x.is_cpu if INTERPRETED else x.is_cuda and triton is not None
    return where and x.dtype in DTYPES


def architecture() -> int:
    """The number of the current device's architecture, such as 90 for sm_90; 0 in the interpreter."""
    return 0 if INTERPRETED else triton.runtime.driver.active.get_current_target().arch


def triton_op(
    name: str, schema: str, *, cpu: Callable, cuda: Callable, fake: Callable, mutates_args: Sequence[str] = ()
) -> Callable:
    """Registers ``torch.ops.gbci_fast.<name>``, forward only: a backward pass through it raises a RuntimeError.

    Args:
        name: of the operator.
        schema: of the operator, without the name. `cpu`, `cuda` and `fake` take its arguments by position.
        cpu: the CPU implementation, usually the reference.
        cuda: launches the kernel. In the interpreter it replaces `cpu`.
        fake: the outputs' shapes and dtypes, for tracing.
        mutates_args: names of the arguments that the operator writes to.
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
