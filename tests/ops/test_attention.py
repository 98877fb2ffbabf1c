"""attention against float64 by every backend; the backends' order; refusals; torch.library's contracts; its PTX."""

import functools
import re
import sys
import types

import pytest
import torch
import torch.nn.functional as F

from gbci_fast.errors import GBCIError
from gbci_fast.ops import attention as module
from gbci_fast.ops._triton import INTERPRETED
from gbci_fast.ops.attention import BACKENDS, ORDER, attention, attention_ref, backend_refusals

# B, heads, S, N, head_dim
SHAPES = {
    "minimal": (1, 1, 1, 1, 1),
    "odd": (3, 3, 7, 71, 5),
    "sampler": (2, 4, 49, 49, 32),
    "padded heads": (2, 2, 17, 20, 40),
}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def problem(shape, dtype=torch.float32, *, device="cpu", ragged=False):
    """q, k, v with the strides of linear layers' outputs, and kv_lengths. The first sample of a ragged batch has 0."""
    batch, heads, queries, keys, head_dim = shape
    generator = torch.Generator().manual_seed(sum(shape))
    q, k, v = (
        torch.randn(batch, rows, heads, head_dim, generator=generator).to(dtype).to(device).transpose(1, 2)
        for rows in (queries, keys, keys)
    )
    lengths = torch.linspace(0, keys, batch) if batch > 1 else torch.tensor([keys])
    return (q, k, v), lengths.to(torch.int32).to(device) if ragged else None


@pytest.mark.parametrize("backend", [None, *BACKENDS])
@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_is_as_exact_as_eager(shape, dtype, ragged, backend, device, assert_as_exact_as_eager):
    tensors, lengths = problem(shape, dtype, device=device, ragged=ragged)
    if backend is not None and (reasons := backend_refusals(backend, *tensors, lengths)):
        with pytest.raises(GBCIError, match=re.escape(f"attention cannot run by {backend}: {reasons[0]}")):
            attention(*tensors, kv_lengths=lengths, backend=backend)
        return
    op = functools.partial(attention, backend=backend)
    ours = assert_as_exact_as_eager(op, attention_ref, tensors, {"kv_lengths": lengths})
    assert ours.transpose(1, 2).is_contiguous()


def test_the_reference_is_pytorch_s():
    (q, k, v), _ = problem(SHAPES["odd"], torch.float64)
    for scale in (None, 0.3):
        expected = F.scaled_dot_product_attention(q, k, v, scale=scale)
        torch.testing.assert_close(attention_ref(q, k, v, softmax_scale=scale), expected)
        torch.testing.assert_close(attention(q, k, v, softmax_scale=scale), expected)


@pytest.mark.parametrize("backend", ["sdpa_flash", "sdpa_math", *(["triton"] if INTERPRETED else [])])
def test_what_lies_behind_the_keys_is_not_read(backend):
    (q, k, v), lengths = problem(SHAPES["odd"], ragged=True)
    expected = attention(q, k, v, kv_lengths=lengths, backend=backend)
    for sample, length in enumerate(lengths.tolist()):
        k[sample, :, length:], v[sample, :, length:] = 1e4, 1e4
    assert torch.equal(attention(q, k, v, kv_lengths=lengths, backend=backend), expected)
    assert expected[0].abs().max() == 0  # a sample without keys
    torch.testing.assert_close(expected[1], attention(q, k[:, :, :35], v[:, :, :35])[1])


def test_on_the_cpu_every_refusal_is_explained():
    tensors, lengths = problem(SHAPES["odd"], ragged=True)
    for backend in BACKENDS:
        here = backend in ("sdpa_flash", "sdpa_math") or (backend == "triton" and INTERPRETED)
        expected = [] if here else [f"{backend} needs an NVIDIA GPU, and q is on cpu"]
        assert backend_refusals(backend, *tensors) == backend_refusals(backend, *tensors, lengths) == expected
    with pytest.raises(GBCIError, match="backend is 'flash'; expected one of sdpa_flash, sdpa_efficient, "):
        backend_refusals("flash", *tensors)


class Pretended(torch.Tensor):
    """A tensor that claims to be on a GPU."""

    is_cuda = True
    is_cpu = False


@pytest.mark.skipif(INTERPRETED, reason="the kernel runs on the CPU")
def test_on_a_gpu_every_refusal_is_explained(monkeypatch):
    tensors, lengths = problem(SHAPES["sampler"], ragged=True)
    tensors = [part.as_subclass(Pretended) for part in tensors]
    for backend in ("sdpa_flash", "sdpa_cudnn", "xformers"):
        sentence = f"{backend} is called without a mask, and kv_lengths needs one"
        assert backend_refusals(backend, *tensors, lengths) == [sentence]
    assert backend_refusals("sdpa_flash", *tensors) == ["sdpa_flash takes bfloat16 and float16, and q is torch.float32"]
    monkeypatch.setitem(sys.modules, "xformers", None)
    assert backend_refusals("xformers", *tensors) == ["xformers is not installed: pip install xformers"]
    assert backend_refusals("triton", *tensors, lengths) == []
    assert backend_refusals("triton", tensors[0].double(), *tensors[1:]) == [
        "triton takes float32, bfloat16 and float16, and q is torch.float64"
    ]
    wide = torch.zeros(1, 1, 2, 160).as_subclass(Pretended)
    assert backend_refusals("triton", wide, wide, wide) == ["triton takes a head_dim of at most 128, and it is 160"]
    half = [part.half() for part in tensors]

    def refuses(params, debug):
        if debug:
            module.warnings.warn("its sentence\nand a location", stacklevel=1)
        return False

    monkeypatch.setattr(torch.backends.cuda, "can_use_flash_attention", refuses)
    assert backend_refusals("sdpa_flash", *half) == ["sdpa_flash: its sentence"]
    monkeypatch.setattr(torch.backends.cuda, "can_use_flash_attention", lambda params, debug: True)
    assert backend_refusals("sdpa_flash", *half) == []


def test_without_triton_it_says_what_to_install(monkeypatch):
    tensors = [part.as_subclass(Pretended) for part in problem(SHAPES["odd"])[0]]
    monkeypatch.setattr(module, "triton", None)
    assert backend_refusals("triton", *tensors) == ["triton is not installed: pip install triton"]


def test_xformers_takes_what_one_of_its_kernels_takes(monkeypatch):
    def kernel(name, reasons):
        return types.SimpleNamespace(NAME=name, not_supported_reasons=lambda inputs: reasons)

    fmha = types.SimpleNamespace(Inputs=lambda **tensors: tensors, ALL_FW_OPS=[])
    monkeypatch.setitem(sys.modules, "xformers", types.ModuleType("xformers"))
    monkeypatch.setitem(sys.modules, "xformers.ops", types.SimpleNamespace(fmha=fmha))
    tensors = [part.as_subclass(Pretended) for part in problem(SHAPES["sampler"])[0]]
    fmha.ALL_FW_OPS = [kernel("one", ["too wide", "too new"]), kernel("two", ["not built"])]
    assert backend_refusals("xformers", *tensors) == ["xformers' one: too wide; too new", "xformers' two: not built"]
    fmha.ALL_FW_OPS.append(kernel("three", []))
    assert backend_refusals("xformers", *tensors) == []


def test_the_table_names_backends_and_ends_with_one_that_never_refuses():
    assert {"cpu", "cuda"} <= set(ORDER)
    for rows in ORDER.values():
        assert rows[-1][0] == float("inf")
        assert [keys for keys, _ in rows] == sorted(keys for keys, _ in rows)
        for _, order in rows:
            assert set(order) <= set(BACKENDS)
            assert order[-1] == "sdpa_math"


def test_the_table_chooses(monkeypatch):
    (q, k, v), _ = problem(SHAPES["odd"])
    rows = ((70, ("sdpa_flash", "sdpa_math")), (float("inf"), ("xformers", "sdpa_math", "sdpa_flash")))
    monkeypatch.setitem(ORDER, "cpu", rows)
    assert module._chosen(q, k, v, None) == "sdpa_math"  # xformers refuses the CPU
    assert module._chosen(q, k[:, :, 1:], v[:, :, 1:], None) == "sdpa_flash"


@pytest.mark.parametrize("ragged", [False, True])
def test_operator_contracts(ragged):
    tensors, lengths = problem(SHAPES["odd"], ragged=ragged)
    torch.library.opcheck(torch.ops.gbci_fast.attention.default, (*tensors, None, lengths, None))


def test_compiles_as_one_graph(device):
    tensors, _ = problem(SHAPES["odd"], device=device)
    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*tensors), attention(*tensors))


def test_it_is_forward_only(device):
    (q, k, v), _ = problem(SHAPES["odd"], device=device)
    out = attention(q.requires_grad_(), k, v)
    with pytest.raises(RuntimeError, match=r"backward through gbci_fast\.attention"):
        out.sum().backward()


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_keeps_everything_in_registers(ptxas, dtype):
    """Every tile size, with and without lengths. 16-bit products run on tensor cores; float32 never becomes TF32."""
    for head_dim in (32, 40, 128):
        q, k, v = (part.to("meta") for part in problem((2, 4, 196, 196, head_dim), dtype)[0])
        for lengths in (None, torch.zeros(2, dtype=torch.int32, device="meta")):
            module._launch(q, k, v, head_dim**-0.5, lengths)
    ptx = "".join(kernel.asm["ptx"] for kernel in ptxas.compiled.values())
    assert ("mma" in ptx) == (dtype != torch.float32)
    assert "tf32" not in ptx
    ptxas.assert_no_spills(kernels=6)


Q = torch.zeros(2, 1, 3, 4)
REJECTIONS = [
    ({"q": Q[0]}, "got q [1, 3, 4], k [2, 1, 3, 4], v [2, 1, 3, 4]; expected q [B, heads, S, head_dim] and k and v"),
    ({"k": Q[:, :, 1:]}, "got q [2, 1, 3, 4], k [2, 1, 2, 4], v [2, 1, 3, 4]; expected q"),
    ({"q": Q[:, :, :0]}, "q is [2, 1, 0, 4] and k [2, 1, 3, 4]; expected no axis of length 0"),
    ({"v": Q.half()}, "v is torch.float16; expected float32, bfloat16 or float16, and q's"),
    ({"q": Q.int(), "k": Q.int(), "v": Q.int()}, "q is torch.int32; expected float32, bfloat16 or float16, and q's"),
    ({"k": Q.to("meta")}, "k is on meta; expected cpu like q"),
    ({"kv_lengths": torch.ones(2)}, "kv_lengths is torch.float32 [2]; expected torch.int32 [2]"),
    ({"backend": "xformers"}, "attention cannot run by xformers: xformers needs an NVIDIA GPU, and q is on cpu"),
    ({"backend": "best"}, "backend is 'best'; expected one of sdpa_flash, "),
]


@pytest.mark.parametrize(("changed", "sentence"), REJECTIONS)
def test_bad_arguments_are_named(changed, sentence):
    with pytest.raises(GBCIError, match=re.escape(sentence)):
        attention(**{"q": Q, "k": Q, "v": Q} | changed)
