"""Where to compute."""

import functools
import platform
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch

from gbci_fast.errors import GBCIError


def pick_device(name: str) -> torch.device:
    """ "auto" takes CUDA where there is one.

    Raises:
        GBCIError: an unknown device, or CUDA on a machine without it.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name.split(":")[0] not in ("cpu", "cuda") or (name.startswith("cuda") and not torch.cuda.is_available()):
        raise GBCIError(f"device is {name!r}; expected 'auto', 'cpu', or 'cuda' on a machine that has it")
    return torch.device(name)


def has_bfloat16_units(device: torch.device) -> bool:
    """Whether bfloat16 is faster there than float32.

    Without units for it PyTorch converts to and fro, and is many times slower. Of two AVX-512 CPUs with bfloat16
    instructions, AMD's multiplies in it twice as fast as in float32, and Intel's, where AMX is missing or not let
    through to a virtual machine, 0.55 times as fast.
    """
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return torch.cpu._is_amx_tile_supported() or (torch.cpu._is_avx512_bf16_supported() and not _is_intel())


@functools.cache
def _is_intel() -> bool:
    """Whether the operating system says that its CPU is Intel's."""
    try:
        return "GenuineIntel" in Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace")
    except OSError:  # not Linux
        return "GenuineIntel" in platform.processor()


def without_autocast(device: torch.device) -> AbstractContextManager:
    """For what is derived during a call and outlives it. Offloaded modules are on "meta", which has no autocast."""
    return nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)
