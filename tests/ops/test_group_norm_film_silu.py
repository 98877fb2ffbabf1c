"""group_norm_film_silu against float64 over shapes, dtypes, layouts; torch.library's contracts; rejections; its PTX."""

import re

import pytest
import torch

from gbci_fast.errors import GBCIError
from gbci_fast.ops import group_norm_film_silu as module
from gbci_fast.ops._triton import INTERPRETED
from gbci_fast.ops.group_norm_film_silu import group_norm_film_silu, group_norm_film_silu_ref

SHAPES = {  # and the number of groups
    "minimal": ((1, 1, 1, 1), 1),
    "odd": ((3, 45, 5, 7), 15),
    "one group": ((2, 6, 3, 5), 1),
    "sampler": ((2, 96, 14, 14), 32),
    "split": ((2, 10, 33, 63), 2),  # more than a program keeps, and a number of pixels that no block size divides
}
LAYOUTS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
OPTIONS = {
    "plain": {"affine": False, "silu": False},
    "silu": {},
    "film": {"halves": 1},
    "shared film": {"halves": 2},
}


def problem(case, dtype, layout, *, affine=True, halves=0, silu=True, device="cpu", offset=0.0):
    """Arguments of `group_norm_film_silu`; x has the mean `offset`, FiLM has `halves` rows per sample."""
    shape, num_groups = SHAPES[case] if isinstance(case, str) else case
    generator = torch.Generator().manual_seed(sum(shape))

    def normal(*size):
        return torch.randn(*size, generator=generator, dtype=torch.float64).to(dtype).to(device)

    weight, bias = (normal(shape[1]), normal(shape[1])) if affine else (None, None)
    table = normal(shape[0] * halves, 2 * shape[1])
    scale, shift = table.chunk(2, 1) if halves else (None, None)  # as they come out of a table
    options = {"scale": scale, "shift": shift, "silu": silu}
    x = (normal(*shape) + offset).contiguous(memory_format=layout)
    return (x, num_groups, weight, bias, 1e-5), options


def double(value):
    return value.double() if isinstance(value, torch.Tensor) else value


@pytest.fixture
def assert_exact(assert_as_exact_as_eager):
    """`assert_exact(args, options)`: each result is as exact as eager PyTorch's, in the layout of x."""

    def check(args, options):
        ours = assert_as_exact_as_eager(group_norm_film_silu, group_norm_film_silu_ref, args, options)
        assert ours.stride()[1:] == args[0].stride()[1:]

    return check


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("case", SHAPES)
def test_is_as_exact_as_eager(case, layout, options, device, assert_exact):
    assert_exact(*problem(case, torch.float32, layout, **OPTIONS[options], device=device))


@pytest.mark.parametrize("options", ["silu", "shared film"])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("case", SHAPES)
def test_is_as_exact_as_eager_in_16_bits(case, dtype, layout, options, device, assert_exact):
    assert_exact(*problem(case, dtype, layout, **OPTIONS[options], device=device))


@pytest.mark.parametrize("case", ["odd", "split"])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_a_large_mean_costs_no_digits(case, layout, device):
    """E[x^2] - E[x]^2 would be noise here: next to 2^24, float32 does not resolve a variance of 1."""
    (x, *rest), options = problem(case, torch.float32, layout, halves=1, device=device)
    offset = 2.0**12
    x = (x + offset) - offset  # what float32 holds of it beside the offset
    expected = group_norm_film_silu_ref(*map(double, (x, *rest)), **{k: double(v) for k, v in options.items()})
    ours = group_norm_film_silu(x + offset, *rest, **options)
    assert (ours - expected).abs().max() < 1e-3 * expected.abs().max()


def test_a_group_that_is_constant(device):
    """Its variance is exactly 0, not a negative rounding error, which has no root."""
    for case in ("odd", "split"):
        (x, *rest), options = problem(case, torch.float32, torch.channels_last, device=device, silu=False)
        ours = group_norm_film_silu(torch.full_like(x, 1000.1), *rest, **options)
        assert (ours - rest[2][:, None, None]).abs().max() < 0.5  # the rounding of 1000.1, divided by sqrt(eps)


def test_a_batch_in_slices(device, monkeypatch):
    """The batch in slices, as for a batch that does not fit the cache."""
    args, options = problem("split", torch.float32, torch.channels_last, **OPTIONS["shared film"], device=device)
    whole = group_norm_film_silu(*args, **options)
    monkeypatch.setattr(module, "CACHED_BYTES", 1)
    monkeypatch.setattr(module, "_launches_are_cheap", lambda: True)
    assert torch.equal(group_norm_film_silu(*args, **options), whole)


@pytest.mark.parametrize(("case", "kernels"), [("odd", ["one_pass"]), ("split", ["statistics", "apply"])])
def test_what_runs_on_the_cpu(monkeypatch, case, kernels):
    """No kernel; in the interpreter the kernels, so that the tests above test the kernels there."""
    launched = []

    class Recorded:
        def __init__(self, name):
            self.name = name

        def __getitem__(self, grid):
            return lambda *args, **options: launched.append(self.name)

    for name in ("one_pass", "statistics", "apply"):
        monkeypatch.setattr(module, f"_{name}_kernel", Recorded(name))
    args, options = problem(case, torch.float32, torch.channels_last)
    group_norm_film_silu(*args, **options)
    assert launched == (kernels if INTERPRETED else [])


@pytest.mark.parametrize(("options", "layout"), [("plain", "nchw"), ("film", "nhwc"), ("shared film", "nhwc")])
def test_operator_contracts(options, layout):
    args, options = problem("odd", torch.float32, LAYOUTS[layout], **OPTIONS[options])
    torch.library.opcheck(torch.ops.gbci_fast.group_norm_film_silu.default, (*args, *options.values()))


def test_compiles_as_one_graph(device):
    args, options = problem("odd", torch.float32, torch.channels_last, **OPTIONS["shared film"], device=device)
    compiled = torch.compile(group_norm_film_silu, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*args, **options), group_norm_film_silu(*args, **options))


def test_it_is_forward_only(device):
    (x, *rest), options = problem("odd", torch.float32, torch.channels_last, device=device)
    out = group_norm_film_silu(x.requires_grad_(), *rest, **options)
    with pytest.raises(RuntimeError, match=r"backward through gbci_fast\.group_norm_film_silu"):
        out.sum().backward()


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("options", ["film", "shared film"])
def test_keeps_everything_in_registers(ptxas, dtype, options):
    """At the widths and sizes of the UNet's levels and of the VAE."""
    sizes = ((64, 56), (128, 28), (192, 28), (192, 14), (384, 14), (32, 224))
    for channels, side in sizes:
        case = (2, channels, side, side), 32
        args, given = problem(case, dtype, torch.channels_last, **OPTIONS[options], device="meta")
        module._launch(*args, *given.values())
    names = {kernel.metadata.name for kernel in ptxas.compiled.values()}
    assert names == {"_one_pass_kernel", "_statistics_kernel", "_apply_kernel"}
    ptxas.assert_no_spills(kernels=len(sizes))


X, ROW = torch.zeros(2, 8, 3, 3), torch.zeros(2, 8)
REJECTIONS = [
    ({"x": ROW}, "x is [2, 8]; expected [B, C, H, W], not empty"),
    ({"x": X[:0]}, "x is [0, 8, 3, 3]; expected [B, C, H, W], not empty"),
    ({"x": X.int()}, "x is torch.int32; expected float32, bfloat16 or float16"),
    ({"num_groups": 3}, "num_groups is 3; expected to divide 8 into at most 8192 each"),
    ({"num_groups": 0}, "num_groups is 0; expected to divide 8 into at most 8192 each"),
    ({"x": X.transpose(2, 3)}, "x has strides (72, 9, 1, 3); expected it contiguous or channels-last"),
    ({"scale": ROW}, "scale and shift come together; expected both or neither"),
    ({"scale": ROW, "shift": ROW[:1]}, "scale is [2, 8] and shift [1, 8]; expected both [k 2, 8]"),
    ({"scale": ROW[:1], "shift": ROW[:1]}, "scale is [1, 8] and shift [1, 8]; expected both [k 2, 8]"),
    ({"scale": ROW[0], "shift": ROW}, "scale is [8]; expected [k 2, 8]"),
    ({"weight": ROW[0, :7]}, "weight is [7]; expected [8]"),
    (
        {"bias": torch.zeros(16)[::2]},
        "bias is torch.float32 on cpu with strides (2,); "
        "expected a floating dtype on cpu like x, and contiguous channels",
    ),
]


@pytest.mark.parametrize(("changed", "sentence"), REJECTIONS)
def test_bad_arguments_are_named(changed, sentence):
    with pytest.raises(GBCIError, match=re.escape(sentence)):
        group_norm_film_silu(**{"x": X, "num_groups": 4, "weight": None, "bias": None} | changed)
