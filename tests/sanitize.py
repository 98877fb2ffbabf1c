"""The operators' tests under the address and undefined-behavior sanitizers; `make sanitize`.

Builds a copy of the package in build/sanitize, shows on two deliberate faults that the sanitizers would speak up, and
runs tests/ops on it: the first bad access, overflow or misaligned load ends the run with a stack trace.

    python tests/sanitize.py [options of pytest]
"""

import os
import shlex
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BUILD = ROOT / "build" / "sanitize"
PACKAGE = BUILD / "lib"

# from_numpy takes NumPy's word for what lies in memory, so that seeds may lie outside it, or on an odd address.
FAULTS = {
    "AddressSanitizer: heap-buffer-overflow": "as_strided(np.zeros(4096, np.int64), shape=(4097,), strides=(8,))",
    "runtime error: load of misaligned address": "np.zeros(8 * 9, np.uint8)[1:65].view(np.int64)",
}
FAULTY = """
import numpy as np
from numpy.lib.stride_tricks import as_strided
from torch import from_numpy
from gbci_fast.ops.philox_normal import philox_normal
philox_normal(from_numpy({seeds}), (1,))
"""
RUN_TESTS = """
import sys
from pathlib import Path
import pytest
import torch
import gbci_fast._C as extension
assert Path(extension.__file__).is_relative_to(sys.argv[1]), f"{extension.__file__} is not the sanitized copy"
print(f"sanitized: {extension.__file__}", flush=True)
sys.exit(pytest.main(sys.argv[2:]))
"""


def build() -> None:
    command = [sys.executable, "setup.py", "-q", "build", "--build-base", BUILD, "--build-lib", PACKAGE]
    done = subprocess.run([*command, "build_ext", "--sanitize"], cwd=ROOT, capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(f"{done.stdout}{done.stderr}the sanitized build failed")


def environment() -> dict[str, str]:
    """The runtimes must come first in the process, and libstdc++ with them: they look for its `throw` as they start."""
    compiler = shlex.split(os.environ.get("CXX", "c++"))[0]
    runtimes = [
        subprocess.run(
            [compiler, f"-print-file-name={name}"], capture_output=True, text=True, check=True
        ).stdout.strip()
        for name in ("libasan.so", "libubsan.so", "libstdc++.so")
    ]
    return {
        **os.environ,
        "LD_PRELOAD": ":".join(runtimes),
        # Leaks are Python's and torch's own, at exit. An abort makes pytest print which test it was.
        "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=1",
        "UBSAN_OPTIONS": "print_stacktrace=1:abort_on_error=1",
        "PYTHONPATH": str(PACKAGE),
        "PYTHONSAFEPATH": "1",  # the working tree's own, unsanitized extension stays off sys.path
        "CUDA_VISIBLE_DEVICES": "",
    }


def main() -> int:
    build()
    env = environment()
    for message, seeds in FAULTS.items():
        done = subprocess.run(
            [sys.executable, "-c", FAULTY.format(seeds=seeds)], env=env, capture_output=True, text=True
        )
        if done.returncode == 0 or message not in done.stderr or "philox_normal.cpp" not in done.stderr:
            sys.exit(f"a deliberate fault was not reported as '{message}':\n{done.stderr}")
        print(f"reported on purpose: {message}", flush=True)
    # The sanitizers write to the process's own standard error, which pytest must leave alone.
    options = ["tests/ops", "-m", "not gpu", "--capture=sys", *sys.argv[1:]]
    tests = [sys.executable, "-c", RUN_TESTS, PACKAGE, *options]
    return subprocess.run(tests, env=env, cwd=ROOT).returncode


if __name__ == "__main__":
    sys.exit(main())
