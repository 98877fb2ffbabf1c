"""The CUDA and Triton operators' tests under NVIDIA's compute-sanitizer, on a machine with a GPU.

    python tests/sanitize_cuda.py memcheck|racecheck [options of pytest]

Shows first on a deliberate fault that the tool would speak up. Of every test function at most `CASES` cases run, evenly
spread: under the tools a kernel takes up to a hundred times as long.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
CASES = 8
SELECTED = "not graph and not one_launch"
ERROR = 86  # exit status of a program in which the tool has found something

# Writes behind an allocation; reads what a neighboring thread writes, with no barrier between.
FAULTS = r"""
#include <cstring>
__global__ void memcheck(int* out) { out[threadIdx.x + 32] = 1; }
__global__ void racecheck(int* out) {
  __shared__ int shared[256];
  shared[threadIdx.x] = threadIdx.x;
  out[threadIdx.x] = shared[255 - threadIdx.x];
}
int main(int, char** argv) {
  const bool race = std::strcmp(argv[1], "racecheck") == 0;
  int* out = nullptr;
  if (cudaMalloc(&out, (race ? 256 : 32) * sizeof(int)) != cudaSuccess) return 1;
  race ? racecheck<<<1, 256>>>(out) : memcheck<<<1, 32>>>(out);
  cudaDeviceSynchronize();
  return 0;
}
"""
TOLD = {"memcheck": "Invalid __global__ write", "racecheck": "hazard"}


@pytest.hookimpl(trylast=True)  # of those that pytest has selected
def pytest_collection_modifyitems(config, items):
    """As a plugin of pytest: leaves `CASES` of every test function's cases."""
    functions = defaultdict(list)
    for item in items:
        functions[item.nodeid.partition("[")[0]].append(item)
    kept = [spread(cases) for cases in functions.values()]
    items[:] = [item for cases in kept for item in cases]


def spread(cases: list) -> list:
    """`CASES` of them, evenly spread; all where there are not so many."""
    count = min(CASES, len(cases))
    return [cases[i * len(cases) // count] for i in range(count)]


def find(name: str) -> str:
    """A program of the CUDA toolkit: in CUDA_HOME or on PATH."""
    home = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"))
    path = os.pathsep.join([str(home / "bin"), str(home / "compute-sanitizer"), os.environ.get("PATH", "")])
    found = shutil.which(name, path=path)
    if found is None:
        sys.exit(f"{name} is neither in {home} nor on PATH; it comes with the CUDA toolkit")
    return found


def build_faults(folder: Path) -> Path:
    source = folder / "faults.cu"
    source.write_text(FAULTS)
    subprocess.run([find("nvcc"), "-o", source.with_suffix(""), source], check=True)
    return source.with_suffix("")


def main() -> int:
    if len(sys.argv) < 2 or sys.argv[1] not in TOLD:
        print(f"the tool is {' '.join(sys.argv[1:2])!r}; expected {' or '.join(TOLD)}", file=sys.stderr)
        return 2
    tool, *options = sys.argv[1:]
    sanitizer = [find("compute-sanitizer"), "--tool", tool, "--error-exitcode", str(ERROR)]
    with tempfile.TemporaryDirectory() as folder:
        faulty = [*sanitizer, build_faults(Path(folder)), tool]
        done = subprocess.run(faulty, capture_output=True, text=True)
    if done.returncode != ERROR or TOLD[tool] not in done.stdout:
        sys.exit(f"a deliberate fault was not reported by {tool}:\n{done.stdout}{done.stderr}")
    print(f"reported on purpose by {tool}: {done.stdout.strip().splitlines()[-1]}", flush=True)
    env = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]),
        # Every tensor an allocation of its own, or accesses beyond one land in torch's cache. Graphs need that cache;
        # and another test asks a profiler and that cache how many launches and allocations there were.
        "PYTORCH_NO_CUDA_MEMORY_CACHING": "1",
    }
    tests = [sys.executable, "-m", "pytest", "-p", "sanitize_cuda", "tests/ops", "-m", "gpu", "-k", SELECTED, "-q"]
    return subprocess.run([*sanitizer, *tests, *options], cwd=ROOT, env=env).returncode


if __name__ == "__main__":
    sys.exit(main())
