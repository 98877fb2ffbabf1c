"""Building engines with TensorRT-RTX, which needs no GPU, where it is installed; and the errors of failed builds."""

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from gbci_fast.errors import GBCIError
from gbci_fast.fast.tensorrt.build import Layer, build
from gbci_fast.fast.tensorrt.flavor import FLAVORS, GENERIC, Record

CPU = torch.device("cpu")


@pytest.fixture
def rtx():
    pytest.importorskip("tensorrt_rtx_bindings")
    return FLAVORS["tensorrt-rtx"]


def is_whole(engine):
    """Whether an engine is complete: TensorRT-RTX writes a tag first, and the engine's size in bytes 16 to 24."""
    return engine[:4] == b"vtrt" and int.from_bytes(engine[16:24], "little") == len(engine)


@pytest.mark.parametrize("dtype", ["FLOAT", "FLOAT16", "BFLOAT16"])
def test_an_engine_is_built_without_a_gpu_and_keeps_its_types(rtx, tmp_path, onnx_writer, dtype):
    small = onnx_writer(tmp_path / "small.onnx", dtype=dtype)
    steps = []
    made = build(small, rtx, capabilities=("8.0", "8.6"), on_progress=lambda *step: steps.append(step))
    assert is_whole(made.engine)
    assert made.seconds > 0
    assert {record.severity for record in made.log} <= {"INFO", "VERBOSE"}
    expected = {"FLOAT": "float32", "FLOAT16": "float16", "BFLOAT16": "bfloat16"}[dtype]
    assert made.dtypes == {"x": expected, "h": expected, "y": expected, "z": "float32"} | {
        name: kind for name, kind in made.dtypes.items() if name not in "xyzh"
    }
    assert Layer(kind="CONVOLUTION", name="conv", dtypes={"h": expected}) in made.layers
    assert ("Building engine", 6, 6) in steps
    assert all(0 <= done <= total for _, done, total in steps)


def test_capabilities_make_other_engines(rtx, small):
    engines = {build(small, rtx, capabilities=named).engine for named in ((), ("8.0",), ("8.0", "8.6"), ("12.0",))}
    assert len(engines) == 4
    assert all(map(is_whole, engines))
    assert is_whole(build(small, rtx, capabilities=(GENERIC,)).engine)


def test_an_unknown_capability_is_refused(rtx, small):
    with pytest.raises(
        GBCIError, match=r"tensorrt-rtx .* does not build for compute capability 9.9; expected some of 7.5, 8.0"
    ):
        build(small, rtx, capabilities=("9.9",))


def test_an_unsupported_operator_is_named(rtx, tmp_path, onnx_writer):
    other = onnx_writer(tmp_path / "other.onnx", operator="Det")
    expected = "tensorrt-rtx cannot take other.onnx: no operator Det as node last needs it; choose the fused runtime"
    with pytest.raises(GBCIError) as refused:
        build(other, rtx)
    assert str(refused.value) == expected


def test_a_file_that_is_no_onnx_is_refused(rtx, tmp_path):
    (tmp_path / "no.onnx").write_bytes(b"junk")
    with pytest.raises(GBCIError, match=r"tensorrt-rtx cannot take no.onnx: .*Failed to parse the ONNX model"):
        build(tmp_path / "no.onnx", rtx)


def test_a_progress_callback_s_error_ends_the_build(rtx, small):
    def on_progress(*step):
        raise OSError("the terminal is gone")

    with pytest.raises(OSError, match="the terminal is gone"):
        build(small, rtx, on_progress=on_progress)
    assert is_whole(build(small, rtx).engine)


def test_ctrl_c_ends_the_build(rtx, small):
    """Ctrl-C interrupts the main thread between two steps of the builder's thread. The next build works."""
    seen = []

    def on_progress(name, done, total):
        if name == "Building engine" and not seen:
            seen.append(threading.current_thread())
            os.kill(os.getpid(), signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            build(small, rtx, on_progress=on_progress)
    finally:
        signal.signal(signal.SIGINT, before)
    assert seen[0] is not threading.main_thread()
    assert not any(thread.name == "TensorRT builder" for thread in threading.enumerate())
    assert is_whole(build(small, rtx).engine)


def test_ctrl_c_leaves_a_process_with_its_status_and_no_file(rtx, small, tmp_path):
    code = f"""
import os, signal, sys
from pathlib import Path
from gbci_fast.fast.tensorrt.build import build
from gbci_fast.fast.tensorrt.cache import EngineCache
from gbci_fast.fast.tensorrt.flavor import FLAVORS
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_cache import KEY
signal.signal(signal.SIGINT, signal.default_int_handler)  # which a job in the background does not inherit
sent = []  # one Ctrl-C; a signal at every step could reach the interpreter as it ends
stop = lambda *step: sent or sent.append(os.kill(os.getpid(), signal.SIGINT))
try:
    make = lambda: build(Path({str(small)!r}), FLAVORS["tensorrt-rtx"], on_progress=stop).engine
    EngineCache(Path({str(tmp_path)!r})).get_or_build(KEY, make)
except KeyboardInterrupt:
    sys.exit(130)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 130, done.stderr
    assert not list(tmp_path.glob("*.engine")) + list(tmp_path.glob("*.tmp"))


def test_layers_and_log_are_reported(fake, small):
    made = build(small, FLAVORS["fake"], device=CPU)
    assert made.layers == (Layer(kind="NONE", name="a layer", dtypes={"a tensor": "FP8"}),)
    assert Record("INFO", "built") in made.log


@pytest.mark.parametrize(
    "reason", ["[virtualMemoryBuffer.cpp] OutOfMemory (no error)", "CUDA error: out of memory", "std::bad_alloc"]
)
def test_running_out_of_memory_is_said(fake, small, reason):
    fake.Behavior.build_error = reason
    expected = f"fake ran out of memory while it built small.onnx; free some, or take a smaller batch: {reason}"
    with pytest.raises(GBCIError) as refused:
        build(small, FLAVORS["fake"])
    assert str(refused.value) == expected


def test_any_other_failure_is_passed_on(fake, small):
    fake.Behavior.build_error = "something\n  else"
    with pytest.raises(GBCIError, match=r"^fake cannot build small.onnx: something else$"):
        build(small, FLAVORS["fake"])


def test_a_builder_without_a_driver_is_said(fake, small):
    fake.Behavior.no_builder = True
    with pytest.raises(GBCIError, match=r"fake has no builder here: no driver; is there a GPU, and its driver?"):
        build(small, FLAVORS["fake"])


def test_the_one_for_data_centers_builds_for_no_other_gpu(fake, small, monkeypatch):
    flavor = fake.FakeFlavor(**{**vars(FLAVORS["fake"]), "needs_gpu": True})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    assert build(small, flavor, capabilities=("9.0",)).engine
    with pytest.raises(
        GBCIError, match=r"fake builds for the GPU that is there \(compute capability 9.0\), not for 8.6"
    ):
        build(small, flavor, capabilities=("8.6",))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(GBCIError, match=r"\(compute capability none\), not for 9.0; take tensorrt-rtx"):
        build(small, flavor, capabilities=("9.0",))
