"""Where to compute."""

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
    """Whether it multiplies bfloat16 itself; elsewhere PyTorch converts to and fro, and is many times slower."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
