"""A small ONNX file, and the stand-in for TensorRT."""

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))  # so that flavors can import the stand-in by name


@pytest.fixture
def fake():
    """The stand-in, as the only flavor; see fake_tensorrt.py."""
    pytest.importorskip("onnxruntime", reason="the stand-in for TensorRT runs ONNX files")
    import fake_tensorrt

    with fake_tensorrt.installed():
        yield fake_tensorrt


def write_onnx(path: Path, weight: float = 1.0, operator: str = "Relu", dtype: str = "FLOAT") -> Path:
    """``y [2, 4, 8, 8] = operator(conv(x [2, 3, 8, 8]))`` in float32 or another type, and z = x cast to float32."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    kind = getattr(TensorProto, dtype)
    weights = np.full((4, 3, 3, 3), weight, helper.tensor_dtype_to_np_dtype(kind))
    shapes = [("x", kind, [2, 3, 8, 8]), ("y", kind, [2, 4, 8, 8]), ("z", TensorProto.FLOAT, [2, 3, 8, 8])]
    x, y, z = (helper.make_tensor_value_info(*shape) for shape in shapes)
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["h"], name="conv", pads=[1, 1, 1, 1]),
        helper.make_node(operator, ["h"], ["y"], name="last"),
        helper.make_node("Cast", ["x"], ["z"], name="island", to=TensorProto.FLOAT),
    ]
    graph = helper.make_graph(nodes, "small", [x], [y, z], [numpy_helper.from_array(weights, "w")])
    opset = [helper.make_opsetid("", 20)]
    onnx.save(helper.make_model(graph, opset_imports=opset, ir_version=10), path)
    return path


@pytest.fixture
def small(tmp_path) -> Path:
    """The file of `write_onnx`."""
    return write_onnx(tmp_path / "small.onnx")


@pytest.fixture
def onnx_writer():
    """`write_onnx` itself."""
    return write_onnx
