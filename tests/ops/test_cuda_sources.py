"""Every CUDA kernel compiles for Ampere and Hopper, within its registers. Needs nvcc, and no GPU."""

import re
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted((ROOT / "csrc").glob("*/*.cu"))
MAX_REGISTERS = 64
"""Per thread. A multiprocessor has 65,536: room for 1,024 threads, enough loads in flight to fill the memory bus."""

ENTRY = re.compile(
    r"entry function '(?P<kernel>\w+)' for '(?P<architecture>\w+)'.*?"
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?"
    r"Used (?P<registers>\d+) registers",
    re.DOTALL,
)
KERNEL = re.compile(r"__global__ void (?:__launch_bounds__\([^)]*\) )?(\w+)\(")


@pytest.fixture(autouse=True)
def without_sanitizers(monkeypatch):
    """Removes the libraries that `make sanitize` preloads: nvcc crashes with them."""
    monkeypatch.delenv("LD_PRELOAD", raising=False)


@pytest.fixture(scope="module")
def script():
    """The names that csrc/check_cuda.py defines; builds nothing."""
    names = runpy.run_path(str(ROOT / "csrc" / "check_cuda.py"))
    if names["BUILD"]["find_nvcc"]() is None:
        pytest.skip("needs nvcc")
    return names


def test_every_source_is_checked(script):
    assert script["CUDA_SOURCES"] == SOURCES


@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.stem)
def test_kernels_compile_without_spills(script, source):
    report = script["ptxas_report"](source)
    entries = [match.groupdict() for match in ENTRY.finditer(report)]
    assert len(entries) == report.count("entry function"), report
    code = source.read_text()
    kernels = KERNEL.findall(code)
    assert len(kernels) == code.count("__global__")
    for architecture in ("sm_80", "sm_90a"):
        compiled = [entry["kernel"] for entry in entries if entry["architecture"] == architecture]
        # A mangled name contains the kernel's name, after its length.
        missing = [name for name in kernels if not any(f"{len(name)}{name}" in mangled for mangled in compiled)]
        assert missing == [], architecture
    assert [entry for entry in entries if (entry["stack"], entry["stores"], entry["loads"]) != ("0", "0", "0")] == []
    assert [entry for entry in entries if int(entry["registers"]) > MAX_REGISTERS] == []


def test_a_kernel_is_compiled_again_only_after_a_change(script):
    source = SOURCES[0]
    script["ptxas_report"](source)
    report = script["report_path"](source)
    written = report.stat().st_mtime_ns
    assert script["ptxas_report"](source) == report.read_text()
    assert report.stat().st_mtime_ns == written
