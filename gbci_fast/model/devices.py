"""Where to compute."""

from contextlib import AbstractContextManager, nullcontext

import torch

from gbci_fast.errors import GBCIError


def pick_device(name: str) -> torch.device:
    """The device of that name; "auto" takes CUDA where there is one.

    Raises:
        GBCIError: an unknown device, or CUDA on a machine without it.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name.split(":")[0] not in ("cpu", "cuda") or (name.startswith("cuda") and not torch.cuda.is_available()):
        raise GBCIError(f"device is {name!r}; expected 'auto', 'cpu', or 'cuda' on a machine that has it")
    return torch.device(name)


def without_autocast(device: torch.device) -> AbstractContextManager:
    """Turns autocast off, for tensors that are derived during a call and outlive it.

    Offloaded modules are on device "meta", which has no autocast.
    """
    return nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)
