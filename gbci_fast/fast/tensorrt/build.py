"""Builds a serialized engine from an ONNX file.

Networks are strongly typed: every tensor has the type that the ONNX file gives it; the builder chooses no types.
"""

import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, ModuleType
from typing import Any

import torch

from gbci_fast.errors import GBCIError
from gbci_fast.fast.tensorrt.flavor import GENERIC, Flavor, Record, errors, on

Progress = Callable[[str, int, int], None]
"""Called with (name of a phase, number of its steps that are done, number of its steps), from any thread."""
TORCH_DTYPES = {
    "FLOAT": "float32", "HALF": "float16", "BF16": "bfloat16", "INT8": "int8", "INT32": "int32", "INT64": "int64",
    "UINT8": "uint8", "BOOL": "bool",
}  # fmt: skip
"""TensorRT's name of a type -> PyTorch's."""
_MEMORY = ("out of memory", "outofmemory", "memoryallocation", "bad_alloc", "insufficient memory")
_BUILDING = threading.Lock()  # a builder takes all cores and most of the memory


@dataclass(frozen=True, kw_only=True)
class Layer:
    """A layer of the typed network, and the type of each of its output tensors."""

    kind: str
    name: str
    dtypes: dict[str, str]


@dataclass(frozen=True, kw_only=True)
class Built:
    """An engine and the record of its build.

    Attributes:
        engine: its serialized bytes.
        seconds: duration of the build, without parsing.
        log: everything that TensorRT logged.
        layers: layers of the parsed network. (The engine's own layers can only be read on a GPU.)
        inputs: the type of each input.
    """

    engine: bytes
    seconds: float
    log: tuple[Record, ...]
    layers: tuple[Layer, ...]
    inputs: dict[str, str]

    @property
    def dtypes(self) -> dict[str, str]:
        """The type of every tensor of the network, by name."""
        return {**self.inputs, **{name: dtype for layer in self.layers for name, dtype in layer.dtypes.items()}}


def build(
    onnx: Path,
    flavor: Flavor,
    *,
    capabilities: Sequence[str] = (),
    device: torch.device | None = None,
    on_progress: Progress | None = None,
) -> Built:
    """Builds the engine of an ONNX file.

    Args:
        onnx: one file with static shapes.
        flavor: the flavor whose builder is used.
        capabilities: compute capabilities that the engine is for, such as "8.6"; none, or `GENERIC`, leaves the choice
            to the builder.
        device: the GPU to build on; None on a machine without one.
        on_progress: see `Progress`.

    Raises:
        GBCIError: `flavor` cannot be used or has no such compute capability, an operator is not supported, memory runs
            out, or the builder fails otherwise.
        KeyboardInterrupt: the build was interrupted; the builder has stopped.
    """
    module = flavor.load()
    named = [capability for capability in capabilities if capability != GENERIC]
    _check_capabilities(flavor, named)
    monitor = _monitor(module, on_progress)
    outcome: list[Built | BaseException] = []

    def work() -> None:
        try:
            with on(device):
                outcome.append(_build(module, onnx, flavor, named, monitor))
        except BaseException as error:  # raised again in the caller's thread
            outcome.append(error)

    # The builder runs in a thread of its own, because no exception may pass through it.
    thread = threading.Thread(target=work, name="TensorRT builder")
    with _interrupts_to(monitor.stop):
        thread.start()
        thread.join()
    (result,) = outcome
    if monitor.stopped is not None:
        raise monitor.stopped
    if isinstance(result, BaseException):
        raise result
    return result


@contextmanager
def _interrupts_to(stop: Callable[[BaseException], None]) -> Iterator[None]:
    """In the main thread, calls `stop` with the KeyboardInterrupt of a signal's handler instead of raising it."""

    def without_raising(handler: Callable[[int, FrameType | None], Any]) -> Callable[[int, FrameType | None], None]:
        def handle(number: int, frame: FrameType | None) -> None:
            try:
                handler(number, frame)
            except KeyboardInterrupt as interrupt:
                stop(interrupt)

        return handle

    here = threading.current_thread() is threading.main_thread()
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM) if here}
    raising = {number: handler for number, handler in handlers.items() if callable(handler)}
    for number, handler in raising.items():
        signal.signal(number, without_raising(handler))
    try:
        yield
    finally:
        for number, handler in raising.items():
            signal.signal(number, handler)


def _check_capabilities(flavor: Flavor, capabilities: Sequence[str]) -> None:
    if flavor.needs_gpu and capabilities:
        here = "{}.{}".format(*torch.cuda.get_device_capability()) if torch.cuda.is_available() else "none"
        if list(capabilities) != [here]:
            asked = ", ".join(capabilities)
            raise GBCIError(
                f"{flavor.name} builds for the GPU that is there (compute capability {here}), not for {asked}; take "
                f"tensorrt-rtx, or build on such a GPU"
            )
    known = flavor.capabilities()
    for capability in capabilities:
        if known and capability not in known:
            raise GBCIError(
                f"{flavor.name} {flavor.version} does not build for compute capability {capability}; "
                f"expected some of {', '.join(known)}, or none for an engine that names none"
            )


def _build(module: ModuleType, onnx: Path, flavor: Flavor, capabilities: Sequence[str], monitor: Any) -> Built:
    with _BUILDING, flavor.logger.capture() as log:
        try:
            builder = module.Builder(flavor.logger.native)
        except TypeError as error:  # the native constructor returned null
            raise GBCIError(
                f"{flavor.name} has no builder here: {errors(log)}; is there a GPU, and its driver?"
            ) from error
        typed = getattr(module.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)  # absent where it is the default
        network = builder.create_network(0 if typed is None else 1 << int(typed))
        parser = module.OnnxParser(network, flavor.logger.native)  # holds the weights until they are built in
        if not parser.parse_from_file(str(onnx)):
            raise GBCIError(f"{flavor.name} cannot take {onnx.name}: {_refusal(parser)}; choose the fused runtime")
        config = builder.create_builder_config()
        config.clear_flag(module.BuilderFlag.TF32)  # float32 products are not rounded to TF32
        if capabilities and not flavor.needs_gpu:
            config.num_compute_capabilities = len(capabilities)
            for i, capability in enumerate(capabilities):
                member = getattr(module.ComputeCapability, f"SM{capability.replace('.', '')}")
                config.set_compute_capability(member, i)
        config.progress_monitor = monitor
        start = time.perf_counter()
        memory = builder.build_serialized_network(network, config)
        seconds = time.perf_counter() - start
        if memory is None and monitor.stopped is None:
            raise GBCIError(_failure(flavor, onnx, errors(log)))
        engine = b"" if memory is None else bytes(memory)
        layers = tuple(_layer(network.get_layer(i)) for i in range(network.num_layers))
        inputs = {
            tensor.name: TORCH_DTYPES[tensor.dtype.name] for tensor in map(network.get_input, range(network.num_inputs))
        }
    return Built(engine=engine, seconds=seconds, log=tuple(log), layers=layers, inputs=inputs)


def _layer(layer: Any) -> Layer:
    outputs = [layer.get_output(i) for i in range(layer.num_outputs)]
    # Types that PyTorch lacks keep TensorRT's names.
    dtypes = {tensor.name: TORCH_DTYPES.get(tensor.dtype.name, tensor.dtype.name) for tensor in outputs}
    return Layer(kind=layer.type.name, name=layer.name, dtypes=dtypes)


def _refusal(parser: Any) -> str:
    """Why a file was not parsed: the unsupported operators, or the parser's other errors."""
    reasons = {}
    for error in map(parser.get_error, range(parser.num_errors)):
        if error.node_operator():
            reasons[f"no operator {error.node_operator()} as node {error.node_name()} needs it"] = None
        else:
            reasons[" ".join(error.desc().split())] = None
    return "; ".join(reasons) or "it says no reason"


def _failure(flavor: Flavor, onnx: Path, reason: str) -> str:
    if any(sign in reason.lower() for sign in _MEMORY):
        return (
            f"{flavor.name} ran out of memory while it built {onnx.name}; free some, or take a smaller batch: {reason}"
        )
    return f"{flavor.name} cannot build {onnx.name}: {reason}"


def _monitor(module: ModuleType, on_progress: Progress | None) -> Any:
    """An `IProgressMonitor` that reports steps, and stops the builder after a call of `stop`."""

    class Monitor(module.IProgressMonitor):
        def __init__(self) -> None:
            module.IProgressMonitor.__init__(self)
            self.stopped: BaseException | None = None
            self._steps: dict[str, int] = {}

        def stop(self, error: BaseException) -> None:
            self.stopped = error

        def phase_start(self, name: str, parent: str | None, steps: int) -> None:
            self._steps[name] = steps
            self._report(name, 0)

        def step_complete(self, name: str, step: int) -> bool:
            self._report(name, step + 1)
            return self.stopped is None

        def phase_finish(self, name: str) -> None:
            self._report(name, self._steps[name])

        def _report(self, name: str, done: int) -> None:
            try:
                if on_progress is not None and self.stopped is None:
                    on_progress(name, done, self._steps[name])
            except BaseException as error:  # none may pass through the builder
                self.stop(error)

    return Monitor()
