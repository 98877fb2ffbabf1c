"""Processes that train together, on two Gloo processes of the CPU, and the curves they leave."""

import os
import subprocess
import sys

import pytest
import torch

from gbci_fast.errors import GBCIError
from gbci_fast.training.loop import STATE_FILE, LoopConfig, train
from gbci_fast.training.ranks import joined, rank_device

PROGRAM = """
import os, signal, sys
from pathlib import Path
import torch
from torch import nn
from gbci_fast.training.loop import LoopConfig, train

class Line:
    def __init__(self):
        torch.manual_seed(3)
        self.module = nn.ModuleList([nn.Linear(2, 1), nn.Linear(2, 1), nn.Linear(2, 1)])
        self.calls = 0

    def loss(self, batch_size, generator):
        self.calls += 1
        if len(sys.argv) > 2 and os.environ.get("RANK") == "1" and self.calls == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        x = torch.randn(batch_size, 2, generator=generator)
        # The second layer is used by some micro-batches alone, the third by none.
        part = self.module[0](x) + (self.module[1](x) if x[0, 0] > 0 else 0)
        return (part - x.sum(1, keepdim=True)).square().mean()

    def sample_sheet(self, path):
        path.write_text(os.environ.get("RANK", "0"))

    def export(self, folder):
        with (folder / "exports").open("a") as file:
            file.write(os.environ.get("RANK", "0"))

config = LoopConfig(steps=4, batch_size=4, accumulate=4, warmup=2, learning_rate=0.05, precision="fp32", save_every=2)
train(Line(), config, Path(sys.argv[1]), resume=False, device=torch.device("cpu"))
print("threads", [Path(task, "comm").read_text().strip() for task in Path("/proc/self/task").iterdir()])
"""


def start(folder, processes, *more):
    program = folder / "program.py"
    program.write_text(PROGRAM)
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(processes)] if processes > 1 else []
    command = [sys.executable, *launcher, str(program), str(folder / f"run{processes}"), *more]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment, check=False)
    return done, folder / f"run{processes}"


def stored(folder):
    return torch.load(folder / STATE_FILE, weights_only=True)


class TestTwoProcesses:
    def test_they_train_what_one_does(self, tmp_path):
        states = {}
        for processes in (1, 2):
            done, folder = start(tmp_path, processes)
            assert done.returncode == 0, done.stderr
            states[processes] = stored(folder)
            assert (folder / "exports").read_text() == "00"  # the first process alone, at both saves
            assert done.stdout.count("/4  loss") == 2
            assert done.stdout.count("threads") == processes
            assert "gloo" not in done.stdout  # the group's threads could abort an interpreter that is ending
        one, two = states[1], states[2]
        assert one["step"] == two["step"] == 4
        for part in ("module", "ema"):
            for name, value in one[part].items():
                torch.testing.assert_close(two[part][name], value, rtol=1e-5, atol=1e-6)
        # A parameter that no micro-batch used has no moments, with one process or two.
        assert one["optimizer"]["state"].keys() == two["optimizer"]["state"].keys() == {0, 1, 2, 3}

    def test_a_signal_to_one_stops_all_after_a_whole_step(self, tmp_path):
        done, folder = start(tmp_path, 2, "stop")
        assert done.returncode != 0
        assert stored(folder)["step"] == 1


class TestSharing:
    def test_micro_batches_must_be_shared_evenly(self, tmp_path, monkeypatch):
        import gbci_fast.training.loop as loop
        from gbci_fast.training.ranks import Ranks

        class Three:
            def __enter__(self):
                return Ranks(0, 3, torch.device("cpu"))

            def __exit__(self, *_):
                return None

        monkeypatch.setattr(loop, "joined", lambda device: Three())
        config = LoopConfig(steps=1, batch_size=1, accumulate=4)
        with pytest.raises(GBCIError, match="accumulate is 4; expected a multiple of the 3 processes"):
            train(None, config, tmp_path / "run", resume=False, device=torch.device("cpu"))

    def test_one_process_needs_no_group(self):
        with joined(torch.device("cpu")) as ranks:
            assert (ranks.rank, ranks.size, ranks.first, ranks.any(True), ranks.sum(2.5)) == (0, 1, True, True, 2.5)
        assert not torch.distributed.is_initialized()

    def test_a_cpu_has_no_index(self, monkeypatch):
        monkeypatch.setenv("LOCAL_RANK", "1")
        assert rank_device("cpu") == torch.device("cpu")
