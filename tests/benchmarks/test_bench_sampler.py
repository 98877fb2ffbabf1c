"""A row of the sampler's benchmark fails where its runtime is broken: the benchmark itself, run as users run it."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "bench_sampler.py"
BROKEN_RUNTIME = '''
"""Adds 5 % of noise to what the fused UNet says."""

import torch

from gbci_fast.fast.runtimes.fused import FusedDenoiser

sound = FusedDenoiser.__call__


def broken(self, *arguments):
    outputs = sound(self, *arguments)
    return tuple(output + 0.05 * output.std() * torch.randn_like(output) for output in outputs)


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


@pytest.mark.parametrize(
    ("verdict", "stands"),
    [
        (None, False),
        ({"weights": "ours", "tiers": {"approximate": {"holds": True}}}, True),
        ({"weights": "ours", "tiers": {"approximate": {"holds": False}}}, False),
        ({"weights": "ours", "tiers": {"exact": {"holds": True}}}, False),
        ({"weights": "others", "tiers": {"approximate": {"holds": True}}}, False),
    ],
)
def test_held_out_lesions_decide_for_the_same_weights_alone(tmp_path, monkeypatch, verdict, stands):
    spec = importlib.util.spec_from_file_location("bench_sampler", BENCHMARK)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "bench_sampler", module)  # its dataclass looks itself up
    spec.loader.exec_module(module)
    path = tmp_path / "parity_real.json"
    if verdict is not None:
        path.write_text(json.dumps({"settings": {"weights_sha256": verdict["weights"]}, "tiers": verdict["tiers"]}))
    assert module.no_worse_on_held_out("approximate", "ours", path) is stands
    assert not module.no_worse_on_held_out("few_step", "ours", path)
    if verdict is not None:
        tiers = {"few_step" if name == "approximate" else name: found for name, found in verdict["tiers"].items()}
        path.write_text(json.dumps({"settings": {"weights_sha256": verdict["weights"]}, "tiers": tiers}))
    assert module.no_worse_on_held_out("few_step", "ours", path) is stands
