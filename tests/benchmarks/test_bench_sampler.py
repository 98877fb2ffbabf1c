"""A row of the sampler's benchmark fails where its runtime is broken: the benchmark itself, run as users run it."""

import os
import subprocess
import sys
from pathlib import Path

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "bench_sampler.py"
BROKEN_RUNTIME = '''
"""Adds 1 % of noise to what the fused UNet says."""

import torch

from gbci_fast.runtimes.fused import FusedDenoiser

sound = FusedDenoiser.__call__


def broken(self, *arguments):
    outputs = sound(self, *arguments)
    return tuple(output + 0.01 * output.std() * torch.randn_like(output) for output in outputs)


FusedDenoiser.__call__ = broken
'''


def run(folder: Path, *options: str) -> subprocess.CompletedProcess:
    """The rows of both gated tiers, once and untimed."""
    rows = [f"{BENCHMARK}::bench_sampler[1-4-{tier}-cpu]" for tier in ("exact", "tolerance")]
    command = [sys.executable, "-m", "pytest", *rows, "--benchmark-disable", "-q", "-p", "no:cacheprovider", *options]
    path = os.pathsep.join([str(folder), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]).rstrip(os.pathsep)
    environment = os.environ | {"PYTHONPATH": path}
    return subprocess.run(command, cwd=BENCHMARK.parents[1], env=environment, capture_output=True, text=True)


def test_a_sound_runtime_passes(tmp_path):
    done = run(tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 passed" in done.stdout


def test_a_broken_runtime_fails(tmp_path):
    (tmp_path / "broken_runtime.py").write_text(BROKEN_RUNTIME)
    done = run(tmp_path, "-p", "broken_runtime")
    assert done.returncode == 1, done.stdout + done.stderr
    assert "2 failed" in done.stdout
    assert "AssertionError: tier exact is violated on 1 images: latents' largest relative error" in done.stdout
    assert "AssertionError: tier tolerance is violated on 1 images: RoI" in done.stdout
