"""TensorBoard curves of a run."""

import sys

import pytest
import torch
from torch import nn

from gbci_fast.errors import GBCIError
from gbci_fast.training.loop import LoopConfig, learning_rate_at, train

CPU = torch.device("cpu")
CONFIG = LoopConfig(steps=3, batch_size=2, warmup=2, learning_rate=0.05, precision="fp32", tensorboard=True)


class Constant:
    """Its loss is the square of one parameter, which starts at 2: a gradient of 4."""

    def __init__(self):
        self.module = nn.ParameterList([nn.Parameter(torch.tensor(2.0))])

    def loss(self, batch_size, generator):
        return self.module[0].square()

    def sample_sheet(self, path): ...

    def export(self, folder): ...


def test_loss_norm_and_rate_are_written_at_every_step(tmp_path):
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    train(Constant(), CONFIG, tmp_path / "run", resume=False, device=CPU)
    events = event_accumulator.EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    curves = {name: events.Scalars(name) for name in ("loss", "gradient_norm", "learning_rate")}
    assert [point.step for point in curves["loss"]] == [1, 2, 3]
    assert curves["loss"][0].value == pytest.approx(4.0)
    assert curves["gradient_norm"][0].value == pytest.approx(4.0)
    rates = [point.value for point in curves["learning_rate"]]
    assert rates == pytest.approx([learning_rate_at(CONFIG, step) for step in range(3)])


def test_without_the_package_nothing_is_trained(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(GBCIError, match=r"tensorboard is not installed: pip install 'gbci_fast\[train\]'"):
        train(Constant(), CONFIG, tmp_path / "run", resume=False, device=CPU)
    assert not (tmp_path / "run" / "state.pt").exists()
