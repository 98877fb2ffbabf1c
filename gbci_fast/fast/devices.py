"""Facts about a device: whether it has bfloat16 units, and which memory format is fastest on it."""

import functools
import platform
from pathlib import Path

import torch

from gbci_fast.errors import GBCIError


def as_device(name: torch.device | str) -> torch.device:
    """The PyTorch device with a name.

    Raises:
        GBCIError: PyTorch knows no such device, or the device is "meta", which cannot compute.
    """
    try:
        device = torch.device(name)
    except (RuntimeError, TypeError):
        device = None
    if device is None or device.type == "meta":
        raise GBCIError(f"device is {str(name)!r}; expected cpu or cuda")
    return device


def fastest_layout(device: torch.device, dtype: torch.dtype) -> torch.memory_format:
    """The memory format in which convolutions are fastest.

    On a CPU (oneDNN), bfloat16 is faster in channels-last and float32 in contiguous format. cuDNN is faster in
    channels-last.
    """
    wide_cpu = device.type == "cpu" and dtype == torch.float32
    return torch.contiguous_format if wide_cpu else torch.channels_last


def has_bfloat16_units(device: torch.device) -> bool:
    """Whether bfloat16 is faster than float32 on a device.

    On a device without units for bfloat16 PyTorch converts to float32 and back, which is many times slower. Two CPUs
    with the AVX-512 instructions for bfloat16 were measured: AMD's multiplies twice as fast as in float32; Intel's,
    where AMX is missing or hidden from a virtual machine, multiplies 0.55 times as fast.
    """
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return torch.cpu._is_amx_tile_supported() or (torch.cpu._is_avx512_bf16_supported() and not _is_intel())


@functools.cache
def _is_intel() -> bool:
    """Whether the operating system names Intel as the maker of the CPU."""
    try:
        return "GenuineIntel" in Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace")
    except OSError:  # not Linux
        return "GenuineIntel" in platform.processor()
