"""Compiles the CUDA sources without linking, and prints ptxas's report: registers, stack and spills of every kernel.

    python csrc/check_cuda.py

Needs nvcc, but neither a GPU nor a CUDA torch, so that a broken kernel fails on any machine with nvcc, before it
reaches a user's GPU machine.
"""

import runpy
import subprocess
from pathlib import Path

from setuptools.modified import newer_group
from torch.utils.cpp_extension import COMMON_NVCC_FLAGS, include_paths

ROOT = Path(__file__).resolve().parents[1]
BUILD = runpy.run_path(str(ROOT / "setup.py"))  # for the flags of the extension; builds nothing
CUDA_SOURCES = [ROOT / source for source in BUILD["sources"](".cu")]


def report_path(source: Path) -> Path:
    """The file that keeps the report on a source."""
    return ROOT / "build" / "cuda_check" / f"{source.stem}.log"


def ptxas_report(source: Path) -> str:
    """Compiles one CUDA source if the source, a header or a flag has changed. Returns ptxas's report.

    Raises:
        SystemExit: nvcc is missing, or the source does not compile.
    """
    report = report_path(source)
    headers = [str(ROOT / header) for header in BUILD["sources"](".h")]
    if newer_group([str(source), *headers, str(ROOT / "setup.py")], str(report)):
        nvcc = BUILD["find_nvcc"]()
        if nvcc is None:
            raise SystemExit("check_cuda.py needs nvcc: it is neither on PATH nor in CUDA_HOME")
        report.parent.mkdir(parents=True, exist_ok=True)
        report.unlink(missing_ok=True)
        includes = [f"-I{path}" for path in (ROOT / "csrc", *include_paths())]
        flags = [*COMMON_NVCC_FLAGS, *BUILD["NVCC_FLAGS"], "-Xptxas=-v", *includes]
        command = [nvcc, "-c", *flags, str(source), "-o", str(report.with_suffix(".o"))]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            raise SystemExit(f"{done.stdout}{done.stderr}gbci_fast: {source} does not compile")
        report.write_text(done.stderr)
    return report.read_text()


if __name__ == "__main__":
    for path in CUDA_SOURCES:
        print(f"{path.relative_to(ROOT)}\n{ptxas_report(path)}", end="")
