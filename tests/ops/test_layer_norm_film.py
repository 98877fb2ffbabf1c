"""layer_norm_film against float64 over shapes, dtypes and layouts; torch.library's contracts; rejections; its PTX."""

import re

import pytest
import torch

from gbci_fast.errors import GBCIError
from gbci_fast.ops import layer_norm_film as module
from gbci_fast.ops._triton import INTERPRETED
from gbci_fast.ops.layer_norm_film import layer_norm_film, layer_norm_film_ref

SHAPES = {"minimal": (1, 1, 1), "odd": (3, 7, 45), "sampler": (2, 49, 192), "wide": (1, 3, 1280)}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FILM = {"plain": 0, "affine": 2, "film": 4}  # how many of weight, bias, scale and shift are given


def problem(shape, dtype, tensors=4, *, device="cpu", offset=0.0):
    """Arguments of `layer_norm_film`: x [B, S, C] with mean `offset`, and the first of weight, bias, scale, shift."""
    generator = torch.Generator().manual_seed(sum(shape))
    batch, _, channels = shape

    def normal(*size):
        return torch.randn(*size, generator=generator, dtype=torch.float64).to(dtype).to(device)

    given = [normal(channels), normal(channels), normal(batch, channels), normal(batch, channels)][:tensors]
    weight, bias, scale, shift = [*given, None, None, None, None][:4]
    return (normal(*shape) + offset, weight, bias, 1e-5), {"scale": scale, "shift": shift}


@pytest.mark.parametrize("tensors", FILM.values(), ids=FILM)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_is_as_exact_as_eager(shape, dtype, tensors, device, assert_as_exact_as_eager):
    args, options = problem(shape, dtype, tensors, device=device)
    ours = assert_as_exact_as_eager(layer_norm_film, layer_norm_film_ref, args, options)
    assert ours.stride() == args[0].stride()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_large_mean_costs_no_digits(dtype, device, assert_as_exact_as_eager):
    given = problem(SHAPES["odd"], dtype, device=device, offset=1000.0)
    assert_as_exact_as_eager(layer_norm_film, layer_norm_film_ref, *given)


def test_strides_are_read_and_kept(device):
    """Tokens of an NCHW image, and FiLM rows of a table: neither is contiguous."""
    (x, *rest), options = problem(SHAPES["odd"], torch.float32, device=device)
    expected = layer_norm_film(x, *rest, **options)
    transposed = x.transpose(1, 2).contiguous().transpose(1, 2)
    table = torch.cat([options["scale"], options["shift"]], 1)
    scale, shift = table.chunk(2, 1)
    ours = layer_norm_film(transposed, *rest, scale=scale, shift=shift)
    assert ours.stride() == transposed.stride()
    torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-6)


def test_what_runs_on_the_cpu(monkeypatch):
    """The reference; in the interpreter the kernel, so that the tests above test the kernel there."""
    launches = []

    class Recorded:
        def __getitem__(self, grid):
            return lambda *args, **options: launches.append(grid)

    monkeypatch.setattr(module, "_layer_norm_film_kernel", Recorded())
    args, options = problem(SHAPES["odd"], torch.float32)
    layer_norm_film(*args, **options)
    assert len(launches) == INTERPRETED


@pytest.mark.parametrize("tensors", FILM.values(), ids=FILM)
def test_operator_contracts(tensors):
    args, options = problem(SHAPES["odd"], torch.float32, tensors)
    torch.library.opcheck(torch.ops.gbci_fast.layer_norm_film.default, (*args, *options.values()))


def test_compiles_as_one_graph(device):
    args, options = problem(SHAPES["odd"], torch.float32, device=device)
    compiled = torch.compile(layer_norm_film, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*args, **options), layer_norm_film(*args, **options))


def test_it_is_forward_only(device):
    (x, *rest), options = problem(SHAPES["odd"], torch.float32, device=device)
    out = layer_norm_film(x.requires_grad_(), *rest, **options)
    with pytest.raises(RuntimeError, match=r"backward through gbci_fast\.layer_norm_film"):
        out.sum().backward()


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_keeps_everything_in_registers(ptxas, dtype):
    for channels in (45, 192, 1280, module.MAX_CHANNELS):
        args, options = problem((2, 196, channels), dtype, device="meta")
        module._launch(*args, *options.values())
    ptxas.assert_no_spills(kernels=4)


X, ROW = torch.zeros(2, 3, 8), torch.zeros(2, 8)
REJECTIONS = [
    ({"x": ROW}, "x is [2, 8]; expected [B, S, C] with C from 1 to 8192"),
    ({"x": torch.zeros(1, 1, 0)}, "x is [1, 1, 0]; expected [B, S, C] with C from 1 to 8192"),
    ({"x": X.int()}, "x is torch.int32; expected float32, bfloat16 or float16"),
    ({"scale": ROW}, "scale and shift come together; expected both or neither"),
    ({"scale": ROW, "shift": ROW[:1]}, "shift is torch.float32 [1, 8]; expected [2, 8] of a floating dtype"),
    ({"weight": torch.zeros(7)}, "weight is torch.float32 [7]; expected [8] of a floating dtype"),
    ({"bias": torch.zeros(8).int()}, "bias is torch.int32 [8]; expected [8] of a floating dtype"),
    ({"bias": torch.zeros(16)[::2]}, "bias has stride 2; expected it contiguous"),
    ({"bias": torch.zeros(8, device="meta")}, "bias is on meta; expected cpu like x"),
]


@pytest.mark.parametrize(("changed", "sentence"), REJECTIONS)
def test_bad_arguments_are_named(changed, sentence):
    with pytest.raises(GBCIError, match=re.escape(sentence)):
        layer_norm_film(**{"x": X, "weight": None, "bias": None} | changed)
