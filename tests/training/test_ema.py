"""The moving average, by hand."""

import pytest
import torch
from torch import nn

from gbci_fast.training.ema import EMA


def test_update_and_copy():
    module = nn.Linear(1, 1)
    with torch.no_grad():
        module.weight.fill_(0.0)
        module.bias.fill_(8.0)
    ema = EMA(module, decay=0.5)
    with torch.no_grad():
        module.weight.fill_(10.0)
    ema.update(module, step=0)  # decay (1 + 0) / (10 + 0)
    assert ema.shadow["weight"].item() == pytest.approx(9.0)
    ema.update(module, step=8)  # 9 / 18, the ceiling
    assert ema.shadow["weight"].item() == pytest.approx(9.5)
    ema.update(module, step=1000)  # 1001 / 1010 is above the ceiling
    assert ema.shadow["weight"].item() == pytest.approx(9.75)
    assert ema.shadow["bias"].item() == 8.0
    assert module.weight.item() == 10.0
    ema.copy_to(module)
    assert module.weight.item() == pytest.approx(9.75)


def test_a_constant_is_its_own_average():
    module = nn.Linear(3, 3)
    ema = EMA(module, decay=0.999)
    for step in range(50):
        ema.update(module, step)
    assert all(torch.equal(ema.shadow[name], value) for name, value in module.named_parameters())
