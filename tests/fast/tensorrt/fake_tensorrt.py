"""The part of TensorRT's Python API that the project uses, with onnxruntime on the CPU in place of engines.

A serialized engine is b"fake" and the ONNX file. Tensors are read and written through their addresses, as in TensorRT.
"""

import ctypes
import enum
import math
from contextlib import contextmanager
from typing import ClassVar

import numpy as np
import onnxruntime

from gbci_fast.fast.tensorrt import flavor

__version__ = "10.13.0"
TYPES = {"tensor(float)": ("FLOAT", np.float32), "tensor(int32)": ("INT32", np.int32)}
MAGIC = b"fake"


class Severity(enum.IntEnum):
    INTERNAL_ERROR = 0
    ERROR = 1
    INFO = 3


class ILogger:
    Severity = Severity


class IProgressMonitor:
    pass


class BuilderFlag(enum.IntEnum):
    TF32 = 2


class NetworkDefinitionCreationFlag(enum.IntEnum):
    STRONGLY_TYPED = 1


class ComputeCapability(enum.IntEnum):
    NONE = 0
    CURRENT = 1
    SM80 = 80
    SM86 = 86
    SM120 = 120


class DataType(enum.IntEnum):
    FLOAT = 0
    HALF = 1
    INT32 = 3
    FP8 = 7


class TensorIOMode(enum.IntEnum):
    NONE = 0
    INPUT = 1
    OUTPUT = 2


class ExecutionContextAllocationStrategy(enum.IntEnum):
    STATIC = 0
    USER_MANAGED = 2


class EngineValidity(enum.IntEnum):
    VALID = 0
    INVALID = 2


class EngineInvalidityDiagnostics(enum.IntEnum):
    VERSION_MISMATCH = 1
    UNSUPPORTED_CC = 2
    OLD_CUDA_DRIVER = 4


class Behavior:
    """The failures of the stand-in; tests set them."""

    no_builder = False
    build_error: str | None = None
    validity = (EngineValidity.VALID, 0)
    load_error: str | None = None
    no_context = False
    refused_address: str | None = None
    run_error: str | None = None
    built: ClassVar[list[bytes]] = []


class Config:
    def __init__(self):
        self.on, self.capabilities = {BuilderFlag.TF32}, {}

    def set_flag(self, flag):
        self.on.add(flag)

    def clear_flag(self, flag):
        self.on.discard(flag)

    def set_compute_capability(self, capability, index):
        self.capabilities[index] = capability
        return True


class Tensor:
    def __init__(self, name, dtype):
        self.name, self.dtype = name, dtype


class Layer:
    name, type, num_outputs = "a layer", ComputeCapability.NONE, 1

    def get_output(self, index):
        return Tensor("a tensor", DataType.FP8)


class Network:
    num_layers = num_inputs = 1
    onnx = b""

    def get_input(self, index):
        return Tensor("latents", DataType.FLOAT)

    def get_layer(self, index):
        return Layer()


class Builder:
    def __init__(self, logger):
        if Behavior.no_builder:
            logger.log(Severity.ERROR, "no driver")
            raise TypeError("factory function returned nullptr")
        self.logger = logger

    def create_network(self, flags):
        assert flags == 1 << NetworkDefinitionCreationFlag.STRONGLY_TYPED
        return Network()

    def create_builder_config(self):
        return Config()

    def build_serialized_network(self, network, config):
        assert BuilderFlag.TF32 not in config.on
        monitor = config.progress_monitor
        monitor.phase_start("building", None, 2)
        go_on = monitor.step_complete("building", 0) and monitor.step_complete("building", 1)
        monitor.phase_finish("building")
        if Behavior.build_error is not None:
            self.logger.log(Severity.ERROR, Behavior.build_error)
        if Behavior.build_error is not None or not go_on:
            return None
        Behavior.built.append(network.onnx)
        self.logger.log(Severity.INFO, "built")
        return MAGIC + network.onnx


class OnnxParser:
    num_errors = 0

    def __init__(self, network, logger):
        self.network = network

    def parse_from_file(self, path):
        with open(path, "rb") as file:  # noqa: PTH123  takes a string, like TensorRT's
            self.network.onnx = file.read()
        return True


class Engine:
    device_memory_size_v2 = 512

    def __init__(self, onnx, logger):
        self.onnx, self.logger = onnx, logger
        self.session = onnxruntime.InferenceSession(onnx, providers=["CPUExecutionProvider"])
        self.tensors = {
            node.name: (mode, node)
            for mode, nodes in (("INPUT", self.session.get_inputs()), ("OUTPUT", self.session.get_outputs()))
            for node in nodes
        }
        self.num_io_tensors = len(self.tensors)

    def get_tensor_name(self, index):
        return list(self.tensors)[index]

    def get_tensor_dtype(self, name):
        return DataType[TYPES[self.tensors[name][1].type][0]]

    def get_tensor_shape(self, name):
        return self.tensors[name][1].shape

    def get_tensor_mode(self, name):
        return TensorIOMode[self.tensors[name][0]]

    def create_execution_context(self, strategy):
        assert strategy == ExecutionContextAllocationStrategy.USER_MANAGED
        return None if Behavior.no_context else Context(self)


class Context:
    def __init__(self, engine):
        self.engine, self.addresses, self.memory = engine, {}, None

    def set_device_memory(self, address, size):
        assert size == self.engine.device_memory_size_v2
        self.memory = address

    def set_tensor_address(self, name, address):
        self.addresses[name] = address
        return name != Behavior.refused_address

    def _array(self, name):
        node = self.engine.tensors[name][1]
        dtype = np.dtype(TYPES[node.type][1])
        size = math.prod(node.shape) * dtype.itemsize
        return np.frombuffer((ctypes.c_char * size).from_address(self.addresses[name]), dtype).reshape(node.shape)

    def execute_async_v3(self, stream):
        assert self.memory
        if Behavior.run_error is not None:
            self.engine.logger.log(Severity.ERROR, Behavior.run_error)
            return False
        modes = self.engine.tensors.items()
        given = {name: self._array(name) for name, (mode, _) in modes if mode == "INPUT"}
        names = [name for name, (mode, _) in modes if mode == "OUTPUT"]
        for name, value in zip(names, self.engine.session.run(names, given), strict=True):
            self._array(name)[...] = value
        return True


class Runtime:
    def __init__(self, logger):
        self.logger = logger

    def get_engine_validity(self, serialized):
        return Behavior.validity

    def deserialize_cuda_engine(self, serialized):
        if Behavior.load_error is not None or not serialized.startswith(MAGIC):
            self.logger.log(Severity.ERROR, Behavior.load_error or "wrong magic")
            return None
        return Engine(serialized.removeprefix(MAGIC), self.logger)


class FakeFlavor(flavor.Flavor):
    """The flavor of this module, which runs on the CPU."""

    def refusals(self, device):
        return []

    def target(self, device):
        return "8.6"


@contextmanager
def installed():
    """Makes the stand-in the only flavor, with no engine built and no failure set."""
    fake = FakeFlavor(name="fake", modules=(__name__,), least=(10, 13), install="pip install fake", needs_gpu=False)
    before = flavor.FLAVORS.copy(), dict(vars(Behavior))  # a copy keeps the order, in which flavors are tried
    flavor.FLAVORS.clear()
    flavor.FLAVORS["fake"] = fake
    Behavior.built = []
    try:
        yield
    finally:
        flavor.FLAVORS.clear()
        flavor.FLAVORS.update(before[0])
        for name, value in before[1].items():
            if not name.startswith("_"):
                setattr(Behavior, name, value)
