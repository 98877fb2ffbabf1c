"""Runs an engine on a GPU, with PyTorch's tensors as inputs and outputs."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gbci_fast.errors import GBCIError
from gbci_fast.fast.tensorrt.build import TORCH_DTYPES
from gbci_fast.fast.tensorrt.flavor import Flavor, errors, on

ALIGNMENT = 256
"""Bytes: the address of an input or an output on a GPU must be divisible by this."""


@dataclass(frozen=True)
class Binding:
    """The shape and dtype of an input or an output, which must be contiguous."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    def __str__(self) -> str:
        return f"{list(self.shape)} {str(self.dtype).removeprefix('torch.')}"


class Engine:
    """A deserialized engine and the memory that it works in, which PyTorch allocates.

    Args:
        serialized: as `gbci_fast.fast.tensorrt.build.build` makes it.
        flavor: the flavor that built it, in the same version.
        device: the GPU.

    Attributes:
        inputs, outputs: a `Binding` for each name.

    Calls share the working memory, so they must not overlap: use one stream, or streams that wait for each other.

    Raises:
        GBCIError: the engine cannot run here; the sentence says why.
    """

    def __init__(self, serialized: bytes, flavor: Flavor, device: torch.device):
        self._flavor = flavor
        module = flavor.load()
        with on(device), flavor.logger.capture() as log:
            self._engine = deserialize(serialized, flavor)
            self._context = self._engine.create_execution_context(
                module.ExecutionContextAllocationStrategy.USER_MANAGED
            )
            if self._context is None:
                raise GBCIError(f"{flavor.name} cannot run an engine on {device}: {errors(log)}")
            size = self._engine.device_memory_size_v2
            with torch.inference_mode(False):
                self._memory = torch.empty(size, dtype=torch.uint8, device=device)
            self.device = self._memory.device  # with its number
            if size:
                self._context.set_device_memory(self._memory.data_ptr(), size)
        self.inputs: dict[str, Binding] = {}
        self.outputs: dict[str, Binding] = {}
        for name in map(self._engine.get_tensor_name, range(self._engine.num_io_tensors)):
            dtype = getattr(torch, TORCH_DTYPES[self._engine.get_tensor_dtype(name).name])
            binding = Binding(tuple(self._engine.get_tensor_shape(name)), dtype)
            is_input = self._engine.get_tensor_mode(name) == module.TensorIOMode.INPUT
            (self.inputs if is_input else self.outputs)[name] = binding

    def __call__(self, inputs: Mapping[str, Tensor], outputs: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """Enqueues the engine on the current stream, without copies; also inside the capture of a CUDA graph.

        Args:
            inputs: all of `self.inputs`. They must stay unchanged until the stream has run the engine.
            outputs: tensors to write to; new tensors by default.

        Returns:
            {name: output}.

        Raises:
            GBCIError: a tensor is missing, or has another shape, dtype, device or layout than the engine's; or the
                engine fails.
        """
        if outputs is None:
            outputs = {
                name: torch.empty(b.shape, dtype=b.dtype, device=self.device) for name, b in self.outputs.items()
            }
        for kind, bindings, given in (("input", self.inputs, inputs), ("output", self.outputs, outputs)):
            if bindings.keys() != given.keys():
                odd = ", ".join(sorted(bindings.keys() ^ given.keys()))
                raise GBCIError(f"the engine's {kind}s are {', '.join(bindings)}; given or missing by mistake: {odd}")
            for name, binding in bindings.items():
                self._bind(f"the engine's {kind} {name}", name, binding, given[name])
        with on(self.device), self._flavor.logger.capture() as log:
            if not self._context.execute_async_v3(_stream(self.device)):
                raise GBCIError(f"{self._flavor.name} failed to run an engine: {errors(log)}")
        return dict(outputs)

    def _bind(self, what: str, name: str, binding: Binding, tensor: Tensor) -> None:
        if tensor.device != self.device:
            raise GBCIError(f"{what} is on {tensor.device}; expected {self.device}")
        given = Binding(tuple(tensor.shape), tensor.dtype)
        if given != binding:
            raise GBCIError(f"{what} is {given}; expected {binding}")
        if not tensor.is_contiguous():
            raise GBCIError(f"{what} has strides {list(tensor.stride())}; expected contiguous")
        if tensor.is_cuda and tensor.data_ptr() % ALIGNMENT:
            raise GBCIError(f"{what} is at {tensor.data_ptr():#x}; expected an address that {ALIGNMENT} divides")
        if not self._context.set_tensor_address(name, tensor.data_ptr()):
            raise GBCIError(f"{what} at {tensor.data_ptr():#x} is refused by {self._flavor.name}")


def deserialize(serialized: bytes, flavor: Flavor) -> Any:
    """The engine of serialized bytes, on the current GPU.

    Raises:
        GBCIError: the engine is of another version or for another GPU, or the driver is missing or too old.
    """
    module = flavor.load()
    remedy = "build it on this machine, or choose the fused runtime"
    with flavor.logger.capture() as log:
        runtime = module.Runtime(flavor.logger.native)
        if hasattr(runtime, "get_engine_validity"):
            validity, bits = runtime.get_engine_validity(serialized)
            if validity == module.EngineValidity.INVALID:
                members = module.EngineInvalidityDiagnostics.__members__.items()
                reasons = [name.lower().replace("_", " ") for name, member in members if bits & int(member)]
                why = ", ".join(reasons) or errors(log)
                raise GBCIError(f"{flavor.name} {flavor.version} cannot run the engine here ({why}); {remedy}")
        engine = runtime.deserialize_cuda_engine(serialized)
        if engine is None:
            raise GBCIError(f"{flavor.name} {flavor.version} cannot load the engine here ({errors(log)}); {remedy}")
    return engine


def _stream(device: torch.device) -> int:
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
