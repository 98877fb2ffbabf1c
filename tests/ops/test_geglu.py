"""geglu against float64 over shapes and dtypes; torch.library's contracts; rejections; its PTX."""

import re

import pytest
import torch
from diffusers.models.activations import GEGLU

from gbci_fast.errors import GBCIError
from gbci_fast.ops import geglu as module
from gbci_fast.ops._triton import INTERPRETED
from gbci_fast.ops.geglu import geglu, geglu_ref

SHAPES = {  # of x, and N
    "minimal": ((1, 1), 1),
    "odd": ((3, 5, 45), 37),
    "sampler": ((2, 49, 128), 512),
    "several tiles": ((2, 70, 40), 130),
}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def problem(case, dtype, bias=True, *, device="cpu"):
    """Arguments of `geglu`, such that the outputs are of order 1."""
    shape, features = SHAPES[case] if isinstance(case, str) else case
    generator = torch.Generator().manual_seed(sum(shape))

    def normal(*size):
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    weight = normal(2 * features, shape[-1]) / shape[-1] ** 0.5
    given = (normal(*shape), weight, normal(2 * features) if bias else None)
    return [part if part is None else part.to(dtype).to(device) for part in given]


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", SHAPES)
def test_is_as_exact_as_eager(case, dtype, bias, device, assert_as_exact_as_eager):
    args = problem(case, dtype, bias, device=device)
    assert assert_as_exact_as_eager(geglu, geglu_ref, args).stride() == geglu_ref(*args).stride()


def test_is_that_of_diffusers(device):
    stock = GEGLU(45, 37).to(device)
    x = torch.randn(3, 5, 45, generator=torch.Generator().manual_seed(0)).to(device)
    with torch.no_grad():
        torch.testing.assert_close(geglu(x, stock.proj.weight, stock.proj.bias), stock(x))


def test_strides_are_read(device):
    x, weight, bias = problem("odd", torch.float32, device=device)
    expected = geglu(x, weight, bias)
    transposed = x.transpose(1, 2).contiguous().transpose(1, 2)
    torch.testing.assert_close(geglu(transposed, weight.t().contiguous().t(), bias), expected)


def test_what_runs_on_the_cpu(monkeypatch):
    """The reference; in the interpreter the kernel, so that the tests above test the kernel there."""
    launches = []

    class Recorded:
        def __getitem__(self, grid):
            return lambda *args, **options: launches.append(grid)

    monkeypatch.setattr(module, "_geglu_kernel", Recorded())
    geglu(*problem("odd", torch.float32))
    assert len(launches) == INTERPRETED


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_operator_contracts(bias):
    torch.library.opcheck(torch.ops.gbci_fast.geglu.default, tuple(problem("odd", torch.float32, bias)))


def test_compiles_as_one_graph(device):
    args = problem("odd", torch.float32, device=device)
    compiled = torch.compile(geglu, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*args), geglu(*args))


def test_it_is_forward_only(device):
    x, weight, bias = problem("odd", torch.float32, device=device)
    out = geglu(x.requires_grad_(), weight, bias)
    with pytest.raises(RuntimeError, match=r"backward through gbci_fast\.geglu"):
        out.sum().backward()


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_keeps_everything_in_registers(ptxas, dtype):
    """At the widths of the UNet's transformers. 16-bit products run on tensor cores; float32 never becomes TF32."""
    for channels in (128, 192, 320):
        module._launch(*problem(((2, 196, channels), 4 * channels), dtype, device="meta"))
    ptx = "".join(kernel.asm["ptx"] for kernel in ptxas.compiled.values())
    assert ("mma" in ptx) == (dtype != torch.float32)
    assert "tf32" not in ptx
    ptxas.assert_no_spills()


X, WEIGHT = torch.zeros(2, 3, 8), torch.zeros(6, 8)
REJECTIONS = [
    ({"x": X[0, 0]}, "x is [8]; expected [..., K], not empty"),
    ({"x": X[:0]}, "x is [0, 3, 8]; expected [..., K], not empty"),
    ({"x": X.int()}, "x is torch.int32; expected float32, bfloat16 or float16"),
    ({"weight": WEIGHT[:5]}, "weight is [5, 8]; expected [2 N, 8]"),
    ({"weight": WEIGHT[:, :7]}, "weight is [6, 7]; expected [2 N, 8]"),
    ({"weight": WEIGHT.half()}, "weight is torch.float16 on cpu; expected torch.float32 on cpu like x"),
    ({"bias": torch.zeros(3)}, "bias is [3] with strides (1,); expected [6], contiguous"),
    ({"bias": torch.zeros(12)[::2]}, "bias is [6] with strides (2,); expected [6], contiguous"),
    ({"bias": torch.zeros(6, device="meta")}, "bias is torch.float32 on meta; expected torch.float32 on cpu like x"),
]


@pytest.mark.parametrize(("changed", "sentence"), REJECTIONS)
def test_bad_arguments_are_named(changed, sentence):
    with pytest.raises(GBCIError, match=re.escape(sentence)):
        geglu(**{"x": X, "weight": WEIGHT} | changed)
