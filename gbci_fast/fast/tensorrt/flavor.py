"""The two flavors of TensorRT, for data centers and for RTX; one code path serves both.

============ ========================================= ======================================
flavor       installed by                              builds
============ ========================================= ======================================
tensorrt     ``pip install tensorrt``                  for the GPU of this machine
tensorrt-rtx ``pip install 'gbci_fast[tensorrt-rtx]'`` for named compute capabilities, no GPU
============ ========================================= ======================================
"""

import functools
import importlib
import importlib.util
import re
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch

from gbci_fast.errors import GBCIError, one_line

GENERIC = "generic"
"""In place of a compute capability: the engine is for those that the flavor's builder chooses by default."""


@dataclass(frozen=True)
class Record:
    """A line of TensorRT's log: "INTERNAL_ERROR", "ERROR", "WARNING", "INFO" or "VERBOSE", and its text."""

    severity: str
    text: str


@dataclass(frozen=True, kw_only=True)
class Flavor:
    """One of TensorRT's distributions.

    Attributes:
        name: as on the command line.
        modules: names of the Python modules that may hold it; the first installed one is used.
        least: the oldest version that is known to work here.
        install: the command that installs it.
        needs_gpu: whether its builder only works on a machine with a GPU.
    """

    name: str
    modules: tuple[str, ...]
    least: tuple[int, ...]
    install: str
    needs_gpu: bool

    def load(self) -> ModuleType:
        """The Python module.

        Raises:
            GBCIError: it is not installed, is too old, or cannot be loaded.
        """
        installed = [name for name in self.modules if importlib.util.find_spec(name) is not None]
        if not installed:
            raise GBCIError(f"{self.name} is not installed: {self.install}")
        try:
            module = importlib.import_module(installed[0])
        except (ImportError, OSError, RuntimeError) as error:  # a library is missing, or for another platform
            reason = " ".join(str(error).split())
            raise GBCIError(f"{self.name} cannot be loaded ({reason}); install it again: {self.install}") from error
        found = tuple(map(int, re.findall(r"\d+", module.__version__)))
        if found < self.least:
            least = ".".join(map(str, self.least))
            raise GBCIError(f"{self.name} is {module.__version__}; expected {least} or later: {self.install}")
        return module

    @property
    def version(self) -> str:
        """The installed version. Raises GBCIError as `load` does."""
        return self.load().__version__

    def capabilities(self) -> tuple[str, ...]:
        """The compute capabilities, such as "8.6", that can be asked for; none if it builds for this machine's GPU.

        Raises:
            GBCIError: as `load` does.
        """
        members = getattr(getattr(self.load(), "ComputeCapability", None), "__members__", ())
        if self.needs_gpu:
            return ()
        numbers = (int(name.removeprefix("SM")) for name in members if name.startswith("SM"))
        return tuple(f"{number // 10}.{number % 10}" for number in sorted(numbers))

    def target(self, device: torch.device) -> str:
        """What to build for to run on a GPU: its compute capability, or `GENERIC` if the builder does not name that."""
        capability = "{}.{}".format(*torch.cuda.get_device_capability(device))
        return capability if self.needs_gpu or capability in self.capabilities() else GENERIC

    def refusals(self, device: torch.device) -> list[str]:
        """Why engines of this flavor cannot run on a device; empty if no reason is known."""
        try:
            self.load()
        except GBCIError as error:
            return [str(error)]
        return [] if device.type == "cuda" else [f"{self.name} runs on NVIDIA GPUs alone; device is {device.type}"]

    @property
    def logger(self) -> "Logger":
        """The one logger of the flavor's module: TensorRT keeps the first logger that it is given."""
        return _logger(self.load())


class Logger:
    """Passes TensorRT's log records to all open `capture` blocks."""

    def __init__(self, module: ModuleType):
        self._listeners = listeners = []

        class Forwarder(module.ILogger):
            def __init__(self) -> None:
                module.ILogger.__init__(self)

            def log(self, severity: Any, text: str) -> None:
                record = Record(severity.name, text)
                for records in tuple(listeners):
                    records.append(record)

        self.native = Forwarder()

    @contextmanager
    def capture(self) -> Iterator[list[Record]]:
        """A list that gets every record logged inside the block, by any thread."""
        records: list[Record] = []
        self._listeners.append(records)
        try:
            yield records
        finally:
            # By identity: the lists of two listeners may be equal.
            self._listeners[:] = [other for other in self._listeners if other is not records]


@functools.cache
def _logger(module: ModuleType) -> Logger:
    return Logger(module)


def errors(records: Sequence[Record]) -> str:
    """The errors among the records, on one line; a sentence of its own if there are none."""
    texts = [record.text for record in records if record.severity in ("INTERNAL_ERROR", "ERROR")]
    return one_line("; ".join(" ".join(text.split()) for text in texts)) or "it says no reason"


def on(device: torch.device | None) -> AbstractContextManager[Any]:
    """Makes a GPU the current device of this thread; without effect for None or a CPU."""
    return torch.cuda.device(device) if device is not None and device.type == "cuda" else nullcontext()


FLAVORS = {
    flavor.name: flavor
    for flavor in (
        Flavor(
            name="tensorrt",
            modules=("tensorrt",),
            least=(10, 13),
            install="pip install tensorrt",
            needs_gpu=True,
        ),
        Flavor(
            name="tensorrt-rtx",
            modules=("tensorrt_rtx_bindings", "tensorrt_rtx"),
            least=(1, 4),
            install="pip install 'gbci_fast[tensorrt-rtx]'",
            needs_gpu=False,
        ),
    )
}
"""The flavors by name, in the order in which they are tried."""


def pick_flavor(name: str, device: torch.device | None) -> Flavor:
    """The named flavor, or the first usable one if that is "auto".

    Args:
        name: "auto" or a key of `FLAVORS`.
        device: where its engines will run; None if they are only built.

    Raises:
        GBCIError: no flavor is usable; the sentence gives the reason for each.
    """
    if name != "auto" and name not in FLAVORS:
        raise GBCIError(f"flavor is {name!r}; expected one of auto, {', '.join(FLAVORS)}")
    reasons: list[str] = []
    for flavor in FLAVORS.values() if name == "auto" else (FLAVORS[name],):
        refusals = _cannot_build(flavor) if device is None else flavor.refusals(device)
        if not refusals:
            return flavor
        reasons += refusals
    raise GBCIError("; ".join(reasons))


def _cannot_build(flavor: Flavor) -> list[str]:
    try:
        flavor.load()
    except GBCIError as error:
        return [str(error)]
    if flavor.needs_gpu and not torch.cuda.is_available():
        return [f"{flavor.name} builds for the GPU that is there, and torch finds none; take tensorrt-rtx"]
    return []
