"""cross_attention against float64 over shapes, dtypes and lengths; torch.library's contracts; rejections; its PTX."""

import re

import pytest
import torch

from gbci_fast.errors import GBCIError
from gbci_fast.ops import cross_attention as module
from gbci_fast.ops._triton import INTERPRETED
from gbci_fast.ops.cross_attention import cross_attention, cross_attention_ref, kernel_refusals

# B, S, C, heads, N, head_dim
SHAPES = {
    "minimal": (1, 1, 1, 1, 1, 1),
    "odd": (3, 7, 45, 3, 70, 5),
    "sampler": (2, 18, 96, 3, 33, 32),
    "padded heads": (2, 17, 80, 2, 20, 40),
}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TENSORS = ("x", "norm_weight", "norm_bias", "wq", "key", "value", "wo", "bo")


def problem(shape, dtype=torch.float32, *, device="cpu", film=True, ragged=True):
    """Arguments of `cross_attention`. In a ragged batch, the first sample has no keys and the last has all."""
    generator = torch.Generator().manual_seed(sum(shape))
    batch, rows, channels, heads, keys, head_dim = shape
    inner = heads * head_dim

    def normal(*size, spread=1.0):
        return (spread * torch.randn(*size, generator=generator, dtype=torch.float64)).to(dtype).to(device)

    context = (batch, keys, heads, head_dim)  # as a linear layer leaves it
    args = (
        normal(batch, rows, channels), normal(channels), normal(channels),
        normal(inner, channels, spread=channels**-0.5),
        normal(*context).transpose(1, 2), normal(*context).transpose(1, 2),
        normal(channels, inner, spread=inner**-0.5), normal(channels),
    )  # fmt: skip
    options = {"eps": 1e-5, "softmax_scale": head_dim**-0.5}
    if ragged:
        lengths = torch.linspace(0, keys, batch) if batch > 1 else torch.tensor([keys])
        options["kv_lengths"] = lengths.to(torch.int32).to(device)
    if film:
        options |= {"scale": normal(batch, channels), "shift": normal(batch, channels)}
    return args, options


@pytest.mark.parametrize("given", ["plain", "film", "ragged", "both"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_is_as_exact_as_eager(shape, dtype, given, device, assert_as_exact_as_eager):
    film, ragged = given in ("film", "both"), given in ("ragged", "both")
    args, options = problem(shape, dtype, device=device, film=film, ragged=ragged)
    assert_as_exact_as_eager(cross_attention, cross_attention_ref, args, options)


def test_without_affine_norm_and_biases(device, assert_as_exact_as_eager):
    args, options = problem(SHAPES["odd"], device=device)
    given = dict(zip(TENSORS, args, strict=True)) | {"norm_weight": None, "norm_bias": None, "bo": None}
    assert_as_exact_as_eager(cross_attention, cross_attention_ref, given.values(), options)


def test_what_lies_behind_the_keys_is_not_read(device):
    args, options = problem(SHAPES["odd"], device=device)
    expected = cross_attention(*args, **options)
    key, value = args[4].clone(), args[5].clone()
    for sample, length in enumerate(options["kv_lengths"].tolist()):
        key[sample, :, length:], value[sample, :, length:] = 1e4, 1e4
    ours = cross_attention(*args[:4], key, value, *args[6:], **options)
    assert torch.equal(ours, expected)
    args = dict(zip(TENSORS, args, strict=True))
    torch.testing.assert_close(ours[0], args["x"][0] + args["bo"])  # a sample without keys


def test_a_key_that_dominates_is_all_that_is_gathered(device, assert_as_exact_as_eager):
    """Scores far apart, the largest in the first, in a middle or in the last block: tests the online softmax."""
    for place in (0, 40, 69):
        args, options = problem((1, 5, 32, 1, 70, 32), device=device, film=False, ragged=False)
        x, norm_weight, norm_bias, wq, key, value, wo, bo = args
        q = torch.nn.functional.layer_norm(x, (32,), norm_weight, norm_bias, 1e-5) @ wq.T
        key[0, 0, place] = 200 * q[0, 0] / q[0, 0].norm()
        ours = cross_attention(*args, **options)
        torch.testing.assert_close(ours[0, 0], x[0, 0] + wo @ value[0, 0, place] + bo, rtol=1e-4, atol=1e-4)
        assert_as_exact_as_eager(cross_attention, cross_attention_ref, args, options)


def test_strides_are_read_and_x_can_be_overwritten(device):
    args, options = problem(SHAPES["odd"], device=device)
    expected = cross_attention(*args, **options)
    x = args[0].transpose(1, 2).contiguous().transpose(1, 2)
    wq, wo = (weight.T.contiguous().T for weight in (args[3], args[6]))
    table = torch.cat([options["scale"], options["shift"]], 1)
    options["scale"], options["shift"] = table.chunk(2, 1)
    ours = cross_attention(x, *args[1:3], wq, *args[4:6], wo, args[7], **options, out=x)
    assert ours is x
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)


def test_what_runs_on_the_cpu(monkeypatch):
    """The reference; in the interpreter the kernel, so that the tests above test the kernel there."""
    launches = []

    class Recorded:
        def __getitem__(self, grid):
            return lambda *args, **options: launches.append(grid)

    monkeypatch.setattr(module, "_cross_attention_kernel", Recorded())
    args, options = problem(SHAPES["odd"])
    cross_attention(*args, **options)
    assert len(launches) == INTERPRETED
    args, options = problem((1, 3, 8, 2, 4, 160))  # too wide for the kernel
    torch.testing.assert_close(cross_attention(*args, **options), cross_attention_ref(*args, **options))
    assert len(launches) == INTERPRETED


def test_every_refusal_is_explained(monkeypatch):
    monkeypatch.setattr(module, "triton", object())
    takes = "the cross-attention kernel takes"
    for channels, heads, head_dim in (
        (128, 4, 32),
        (192, 6, 32),
        (320, 8, 40),
        (320, 4, 80),
        (512, 4, 128),
        (64, 4, 16),
    ):
        assert kernel_refusals(channels, heads, head_dim, torch.bfloat16) == []
    assert kernel_refusals(192, 6, 32, torch.float32) == []
    assert kernel_refusals(1280, 8, 160, torch.float16) == [
        f"it is 1280 wide; {takes} at most 512 in torch.float16",
        f"head_dim is 160; {takes} at most 128 in torch.float16",
    ]
    assert kernel_refusals(640, 8, 80, torch.bfloat16) == [f"it is 640 wide; {takes} at most 512 in torch.bfloat16"]
    assert kernel_refusals(64, 16, 64, torch.bfloat16) == [f"it is 1024 wide; {takes} at most 512 in torch.bfloat16"]
    assert kernel_refusals(320, 8, 40, torch.float32) == [
        f"it is 320 wide; {takes} at most 192 in torch.float32",
        f"head_dim is 40; {takes} at most 32 in torch.float32",
    ]
    reason = f"it is in torch.float64; {takes} float32, bfloat16 and float16"
    assert kernel_refusals(64, 2, 32, torch.float64) == [reason]
    monkeypatch.setattr(module, "triton", None)
    assert kernel_refusals(64, 2, 32, torch.float32) == ["triton is not installed: pip install triton"]


@pytest.mark.parametrize("given", [False, True], ids=["plain", "both"])
def test_operator_contracts(given):
    args, options = problem(SHAPES["odd"], film=given, ragged=given)
    names = ("eps", "softmax_scale", "kv_lengths", "scale", "shift")
    given = (*args, *(options.get(name) for name in names), torch.empty_like(args[0]))
    torch.library.opcheck(torch.ops.gbci_fast.cross_attention.default, given)


def test_compiles_as_one_graph(device):
    args, options = problem(SHAPES["odd"], device=device)
    compiled = torch.compile(cross_attention, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*args, **options), cross_attention(*args, **options))


def test_it_is_forward_only(device):
    args, options = problem(SHAPES["odd"], device=device)
    args[3].requires_grad_()
    sentence = "cross_attention is forward only and wq requires a gradient; use torch.no_grad()"
    with pytest.raises(GBCIError, match=re.escape(sentence)):
        cross_attention(*args, **options)
    with torch.no_grad():
        cross_attention(*args, **options)


# Every row of the table, at its largest layer and at those of the checkpoint and of Stable Diffusion.
LAYERS = {
    torch.bfloat16: [(192, 6, 32), (320, 8, 40), (512, 8, 64), (320, 4, 80), (512, 4, 128)],
    torch.float32: [(128, 4, 32), (192, 6, 32)],
}


@pytest.mark.parametrize("dtype", LAYERS, ids=str)
def test_keeps_everything_in_registers(ptxas, dtype):
    for channels, heads, head_dim in LAYERS[dtype]:
        args, options = problem((2, 196, channels, heads, 208, head_dim), dtype, device="meta")
        module._cuda(*args, *options.values(), torch.empty_like(args[0]))
    ptxas.assert_no_spills(kernels=len(LAYERS[dtype]))


X, WEIGHT, CONTEXT = torch.zeros(2, 3, 8), torch.zeros(8, 8), torch.zeros(2, 2, 5, 4)
REJECTIONS = [
    ({"x": WEIGHT}, "x is [8, 8]; expected [B, S, C]"),
    ({"x": X.int()}, "x is torch.int32; expected float32, bfloat16 or float16"),
    ({"key": CONTEXT[:1]}, "key is [1, 2, 5, 4]; expected [2, heads, N, head_dim], none of them 0"),
    ({"key": CONTEXT[:, :, :0]}, "key is [2, 2, 0, 4]; expected [2, heads, N, head_dim], none of them 0"),
    ({"value": CONTEXT[:, :, 1:]}, "value is torch.float32 [2, 2, 4, 4]; expected torch.float32 [2, 2, 5, 4]"),
    ({"wq": WEIGHT[1:]}, "wq is torch.float32 [7, 8]; expected torch.float32 [8, 8]"),
    ({"wo": WEIGHT.half()}, "wo is torch.float16 [8, 8]; expected torch.float32 [8, 8]"),
    ({"scale": X[:, 0]}, "scale and shift come together; expected both or neither"),
    ({"scale": X[:, 0], "shift": X[0]}, "shift is torch.float32 [3, 8]; expected torch.float32 [2, 8]"),
    ({"kv_lengths": torch.ones(2).long()}, "kv_lengths is torch.int64 [2]; expected torch.int32 [2]"),
    ({"bo": torch.zeros(16)[::2]}, "bo has stride 2; expected it contiguous"),
    ({"bo": torch.zeros(8, device="meta")}, "bo is on meta; expected cpu like x"),
    ({"out": X[:1]}, "out is torch.float32 [1, 3, 8]; expected torch.float32 [2, 3, 8]"),
]


@pytest.mark.parametrize(("changed", "sentence"), REJECTIONS)
def test_bad_arguments_are_named(changed, sentence):
    given = {
        "x": X, "norm_weight": None, "norm_bias": None, "wq": WEIGHT, "key": CONTEXT, "value": CONTEXT, "wo": WEIGHT,
        "bo": None, "eps": 1e-5, "softmax_scale": 0.5,
    } | changed  # fmt: skip
    with pytest.raises(GBCIError, match=re.escape(sentence)):
        cross_attention(**given)
