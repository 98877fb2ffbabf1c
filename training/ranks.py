"""Processes that ``torchrun`` starts to train one model together; a single process has the same interface.

Each process takes its share of an optimizer step's micro-batches. Gradients are summed, so the processes' weights stay
equal, and the result is that of a single process up to the rounding of a sum.
"""

import importlib
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed
from torch import Tensor, nn

from gbci_fast.model.devices import pick_device


class Ranks:
    """One of `size` processes; `rank` counts from 0."""

    def __init__(self, rank: int, size: int, device: torch.device):
        self.rank, self.size, self.device = rank, size, device

    @property
    def first(self) -> bool:
        """Whether this process writes and prints."""
        return self.rank == 0

    def any(self, flag: bool) -> bool:
        """Whether any process calls this with True; all must call it."""
        return self.sum(float(flag)) > 0

    def sum(self, value: float) -> float:
        """The sum of `value` over all processes, in float64; all must call it."""
        if self.size == 1:
            return value
        total = torch.tensor(value, dtype=torch.float64, device=self.device)
        torch.distributed.all_reduce(total)
        return total.item()

    def sum_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Replaces every gradient by its sum over all processes; stays None where no process has a gradient."""
        if self.size == 1:
            return
        had = torch.tensor([float(part.grad is not None) for part in parameters], device=self.device)
        torch.distributed.all_reduce(had)
        used = [part for part, count in zip(parameters, had.tolist(), strict=True) if count]
        flat = torch.cat([_gradient(part).flatten() for part in used])
        torch.distributed.all_reduce(flat)
        for part, grad in zip(used, flat.split([part.numel() for part in used]), strict=True):
            part.grad = grad.view_as(part).to(part.dtype).clone()


def _gradient(parameter: nn.Parameter) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


@contextmanager
def joined(device: torch.device) -> Iterator[Ranks]:
    """Joins the process group that ``torchrun`` started, over NCCL on CUDA and Gloo on a CPU."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield Ranks(0, 1, device)
        return
    # This module's functions bind the current group as a default argument. If it were imported after the group is made
    # (by an optimizer), it would keep the group's threads alive after `destroy_process_group`, and these can abort the
    # interpreter at exit.
    importlib.import_module("torch.distributed.nn.functional")
    torch.distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield Ranks(torch.distributed.get_rank(), size, device)
    finally:
        torch.distributed.destroy_process_group()


def is_first() -> bool:
    """Whether this process writes and prints; works outside of `joined`, too."""
    return os.environ.get("RANK", "0") == "0"


def rank_device(name: str) -> torch.device:
    """The device of a name, as `pick_device`; with several CUDA devices, each process under ``torchrun`` has its own.

    Raises:
        GBCIError: as for `pick_device`.
    """
    device = pick_device(name)
    if device.type == "cuda" and device.index is None and "LOCAL_RANK" in os.environ:
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)  # for NCCL, and for kernels without an explicit device
    return device
