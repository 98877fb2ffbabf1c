"""conv3x3 against the convolution in float64; torch.library's contracts; rejections; the module that uses it."""

import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from gbci_fast.fast.modules.convolution import FilteredConv2d, filtered, with_filtered_convolutions
from gbci_fast.ops.conv3x3 import conv3x3, conv3x3_ref, conv3x3_weight

SHAPES = {  # batch, channels in, out, height, width
    "minimal": (1, 1, 1, 1, 1),
    "column": (2, 3, 8, 9, 1),
    "odd": (3, 5, 13, 7, 11),
    "one block": (1, 2, 8, 8, 24),  # 48 tiles
    "one tile more": (1, 2, 9, 2, 98),
    "wide": (1, 3, 4, 3, 301),  # a row of tiles over several blocks
    "sampler": (4, 64, 64, 56, 56),
    "deep": (2, 192, 128, 14, 14),
}
needs_vectors = pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"),
    reason="needs AVX2, without which it does not pay",
)


def problem(batch, channels, out_channels, height, width, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, channels, height, width, generator=generator)
    weight = torch.randn(out_channels, channels, 3, 3, generator=generator) / channels**0.5
    return x, weight, torch.randn(out_channels, generator=generator)


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_is_as_exact_as_eager(shape, with_bias):
    x, weight, bias = problem(*shape)
    bias = bias if with_bias else None
    exact = conv3x3_ref(x.double(), weight.double(), None if bias is None else bias.double())
    ours = conv3x3(x, conv3x3_weight(weight), bias, len(weight))
    # The sums have as many products, in another order, and values up to four times as large.
    floor = 1e-6 * exact.abs().max()
    assert (ours - exact).abs().max() <= 2 * (conv3x3_ref(x, weight, bias) - exact).abs().max() + floor
    assert ours.is_contiguous()


def test_every_weight_reaches_its_place():
    x, weight, _ = problem(*SHAPES["odd"])
    for tap in range(9):
        one = torch.zeros_like(weight)
        one.flatten(2)[..., tap] = weight.flatten(2)[..., tap]
        torch.testing.assert_close(conv3x3(x, conv3x3_weight(one), None, len(one)), conv3x3_ref(x, one))


def test_samples_and_threads_do_not_matter():
    x, weight, bias = problem(*SHAPES["sampler"])
    filters, threads = conv3x3_weight(weight), torch.get_num_threads()
    together = conv3x3(x, filters, bias, len(weight))
    try:
        torch.set_num_threads(1)
        assert torch.equal(conv3x3(x, filters, bias, len(weight)), together)
    finally:
        torch.set_num_threads(threads)
    permutation = torch.tensor([2, 0, 3, 1])
    assert torch.equal(conv3x3(x[permutation], filters, bias, len(weight)), together[permutation])


def test_a_value_that_is_not_finite_stays_near():
    x, weight, bias = problem(*SHAPES["sampler"])
    clean = conv3x3(x, conv3x3_weight(weight), bias, len(weight))
    x[1, :, 20, 31] = torch.nan
    changed = (conv3x3(x, conv3x3_weight(weight), bias, len(weight)) != clean).any(1)
    ys, xs = changed[1].nonzero(as_tuple=True)
    assert changed.sum() == changed[1].sum() == 9
    assert (ys.min(), ys.max(), xs.min(), xs.max()) == (19, 21, 30, 32)


def test_contracts():
    x, weight, bias = problem(*SHAPES["odd"])
    filters = conv3x3_weight(weight)
    torch.library.opcheck(torch.ops.gbci_fast.conv3x3_weight.default, (weight,))
    torch.library.opcheck(torch.ops.gbci_fast.conv3x3.default, (x, filters, bias, len(weight)))
    compiled = torch.compile(lambda *args: conv3x3(*args) * 2, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x, filters, bias, len(weight)), 2 * conv3x3(x, filters, bias, len(weight)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": torch.zeros(1, 4, 5, 5).double()}, "x must be contiguous Float [B, C, H, W] and not empty, got Double"),
        ({"x": torch.zeros(4, 5, 5)}, "x must be contiguous Float [B, C, H, W] and not empty, got Float [4, 5, 5]"),
        ({"x": torch.zeros(0, 4, 5, 5)}, "and not empty, got Float [0, 4, 5, 5]"),
        (
            {"x": torch.zeros(1, 3, 5, 5)},
            "conv3x3_weight's for 3 channels in and 9 out, got [16, 2, 4, 8]",
        ),
        ({"out_channels": 17}, "weight must be conv3x3_weight's for 4 channels in and 17 out"),
        ({"out_channels": 0}, "weight must be conv3x3_weight's for 4 channels in and 0 out"),
        ({"bias": torch.zeros(8)}, "bias must be contiguous Float [9]"),
    ],
)
def test_rejects(changes, message):
    x, weight = torch.zeros(1, 4, 5, 5), conv3x3_weight(torch.zeros(9, 4, 3, 3))
    arguments = {"x": x, "weight": weight, "bias": None, "out_channels": 9} | changes
    with pytest.raises(RuntimeError, match=re.escape(message)):
        conv3x3(**arguments)


@pytest.mark.parametrize("weight", [torch.zeros(8, 4, 5, 5), torch.zeros(8, 4, 3, 3).double(), torch.zeros(8, 4, 9)])
def test_rejects_a_weight(weight):
    with pytest.raises(RuntimeError, match=r"weight must be contiguous Float \[K, C, 3, 3\], got"):
        conv3x3_weight(weight)


@needs_vectors
@torch.no_grad()
def test_the_module_follows_its_weight():
    conv = nn.Conv2d(16, 24, 3, padding=1)
    ours, x = filtered(conv), torch.randn(2, 16, 9, 9)
    assert type(ours) is FilteredConv2d
    assert ours.weight is conv.weight
    torch.testing.assert_close(ours(x), conv(x))
    conv.weight.mul_(2)
    torch.testing.assert_close(ours(x), conv(x))
    channels_last = x.contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(ours(channels_last), conv(x))
    ours.to(torch.bfloat16)
    assert torch.equal(ours(x.bfloat16()), F.conv2d(x.bfloat16(), ours.weight, ours.bias, padding=1))


@torch.inference_mode()
def test_a_weight_that_does_not_count_its_changes_stays():
    conv = nn.Conv2d(16, 16, 3, padding=1)
    assert filtered(conv) is conv


@needs_vectors
def test_the_module_keeps_gradients():
    ours = filtered(nn.Conv2d(16, 16, 3, padding=1))
    ours(torch.randn(1, 16, 4, 4)).sum().backward()
    assert ours.weight.grad is not None


@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv2d(16, 16, 1), nn.Conv2d(16, 16, 3), nn.Conv2d(16, 16, 3, padding=1, stride=2),
        nn.Conv2d(16, 16, 3, padding=2, dilation=2), nn.Conv2d(16, 16, 3, padding=1, groups=2),
        nn.Conv2d(16, 16, 3, padding=1, padding_mode="reflect"), nn.Conv2d(16, 16, 3, padding=1).double(),
        nn.Conv2d(4, 16, 3, padding=1),
    ],
    ids=["1x1", "no padding", "stride", "dilation", "groups", "reflect", "double", "few channels"],
)  # fmt: skip
def test_other_convolutions_stay(conv):
    assert filtered(conv) is conv


@needs_vectors
@torch.no_grad()
def test_a_copy_shares_its_parameters():
    module = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.Sequential(nn.GroupNorm(4, 16), nn.Conv2d(16, 16, 3, padding=1))
    )
    ours, x = with_filtered_convolutions(module), torch.randn(1, 1, 8, 8)
    assert [type(part) for part in module[1]] == [nn.GroupNorm, nn.Conv2d]
    assert [type(part) for part in ours[1]] == [nn.GroupNorm, FilteredConv2d]
    assert {name: id(p) for name, p in ours.named_parameters()} == {
        name: id(p) for name, p in module.named_parameters()
    }
    torch.testing.assert_close(ours(x), module(x))
