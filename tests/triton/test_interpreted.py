"""The tests of the Triton operators once more, each in a process in which Triton interprets the kernels on the CPU;
and there the whole UNet that is made of them.

In a process of its own, because Triton reads TRITON_INTERPRET as it is imported and then compiles nothing.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
OPERATORS = sorted(p.stem for p in (ROOT / "kernels/ops").glob("[!_]*.py") if "\n@jit\n" in p.read_text())
FUSED = "tests/fast/runtimes/test_fused.py::test_where_triton_interprets_them_the_fused_operators_run"
# What concerns the operator's registration, whatever it runs.
SAME_THERE = "not test_operator_contracts and not test_compiles_as_one_graph and not test_bad_arguments"


@pytest.mark.parametrize("test", [*(f"tests/ops/test_{name}.py" for name in OPERATORS), FUSED])
def test_passes_when_triton_interprets_it(test):
    pytest.importorskip("triton")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-m", "not gpu", "-k", SAME_THERE, test],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, f"{done.stdout[-6000:]}{done.stderr[-2000:]}"
