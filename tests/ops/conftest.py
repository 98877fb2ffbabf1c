"""Fixtures that test the Triton operators in three ways. An operator needs a file in kernels/ops and a test file here.

* Every test with the fixture `device` runs on the CPU, and on a GPU if there is one.
* tests/triton/test_interpreted.py runs the operator's test file again in a process where Triton interprets kernels on
  CPU tensors. There "cpu" tests the kernel; here "cpu" tests the reference.
* Under the fixture `ptxas` a launch only compiles. Call the operator's launch function with tensors on "meta", for
  every shape with other tile sizes, and then `ptxas.assert_no_spills()`.
"""

import re
import subprocess
from pathlib import Path

import pytest
import torch

from gbci_fast.ops._triton import INTERPRETED, triton

# Allowed error beyond twice eager's own error, relative to the largest value.
FLOORS = {torch.float32: 2**-21, torch.bfloat16: 2**-8, torch.float16: 2**-11, torch.float64: 2**-44}

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, needs_cuda])])
def device(request) -> str:
    """Where the operator runs."""
    return request.param


def _double(value):
    if isinstance(value, dict):
        return {name: _double(part) for name, part in value.items()}
    return value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def _named(outputs) -> dict:
    if isinstance(outputs, torch.Tensor):
        outputs = (outputs,)
    return outputs if isinstance(outputs, dict) else dict(enumerate(outputs))


@pytest.fixture(scope="session")
def assert_as_exact_as_eager():
    """`assert_as_exact_as_eager(op, reference, args, options={})`; returns the result of `op`.

    The error to the float64 result must be at most twice that of eager PyTorch in the same dtype, plus the dtype's
    floor. NaN must be where the float64 result has NaN. `op` and `reference` return a tensor, a tuple or a dictionary.
    """

    def check(op, reference, args, options=None):
        options = options or {}
        found = op(*args, **options)
        exact = _named(reference(*map(_double, args), **_double(options)))
        eager = _named(reference(*args, **options))
        assert _named(found).keys() == eager.keys()
        for name, ours in _named(found).items():
            assert (ours.dtype, ours.shape) == (eager[name].dtype, exact[name].shape)
            torch.testing.assert_close(ours.isnan(), exact[name].isnan(), msg=f"{name}: NaN elsewhere")
            scale = exact[name].nan_to_num().abs().max()
            error, own = ((part - exact[name]).nan_to_num().abs().max() for part in (ours, eager[name]))
            assert error <= 2 * own + FLOORS[ours.dtype] * scale, f"{name}: error {error:.3g}, eager's own {own:.3g}"
        return found

    return check


class Ptxas:
    """Replaces Triton's driver and launch: a launched kernel is only compiled for `arch`, and kept."""

    def __init__(self, arch: int, folder: Path):
        self.arch, self.folder, self.launches, self.compiled = arch, folder, 0, {}

    def get_current_device(self) -> str:
        return f"sm_{self.arch}"  # a key of Triton's cache, different from that of a real device 0

    def get_current_stream(self, device: str) -> int:
        return 0

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.arch, 32)

    def launch(self, run, kernel, *args, warmup, **options):
        compiled = run(kernel, *args, warmup=True, **options)
        self.launches += 1
        self.compiled[compiled.hash] = compiled
        return compiled

    def report(self, compiled) -> str:
        """ptxas's report on a kernel: registers, stack and spills."""
        from triton import knobs

        ptx = self.folder / f"{compiled.hash}.ptx"
        ptx.write_text(compiled.asm["ptx"])
        target = re.search(r"^\.target (\w+)", compiled.asm["ptx"], re.MULTILINE)[1]
        command = [
            knobs.nvidia.ptxas.path,
            "-v",
            f"--gpu-name={target}",
            str(ptx),
            "-o",
            str(ptx.with_suffix(".cubin")),
        ]
        return subprocess.run(command, capture_output=True, text=True, check=True).stderr

    def assert_no_spills(self, *, kernels: int = 1) -> None:
        """At least `kernels` kernels (equal ones count, too) were launched, and none of them spills registers."""
        assert self.launches >= kernels
        for compiled in self.compiled.values():
            report = self.report(compiled)
            assert "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads" in report, (
                f"{compiled.metadata.name} for sm_{self.arch} with {compiled.metadata.num_warps} warps:\n{report}"
            )


@pytest.fixture(params=[80, 90], ids=["sm_80", "sm_90"])
def ptxas(request, monkeypatch, tmp_path) -> Ptxas:
    """Compiles launched kernels without a GPU, see `Ptxas`."""
    if triton is None:
        pytest.skip("needs triton")
    if INTERPRETED:
        pytest.skip("Triton compiles nothing while it interprets")
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    stand_in, run = Ptxas(request.param, tmp_path), JITFunction.run
    monkeypatch.setattr(JITFunction, "run", lambda kernel, *a, **options: stand_in.launch(run, kernel, *a, **options))
    monkeypatch.setattr(driver, "_active", stand_in)
    return stand_in
