"""The compiled UNet: the same function, compiled once for all inputs of a size, and refused without a compiler."""

import functools
import shutil

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel

from gbci_fast.errors import GBCIError
from gbci_fast.fast.accelerate import accelerate
from gbci_fast.fast.modules.blocks import Resnet, Transformer
from gbci_fast.fast.runtimes import compile as module
from gbci_fast.fast.runtimes.compile import CompiledDenoiser, compiled
from gbci_fast.fast.runtimes.eager import EagerDenoiser
from gbci_fast.model.conditioning import Conditioning

CONFIG = {
    "in_channels": 9, "out_channels": 4, "block_out_channels": (16, 32), "layers_per_block": 1, "norm_num_groups": 8,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"), "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": (1, 2), "cross_attention_dim": 24, "class_embed_type": "projection",
    "projection_class_embeddings_input_dim": 10, "resnet_time_scale_shift": "scale_shift",
}  # fmt: skip


class Counting:
    """A backend that runs the graph without changes, and counts compilations."""

    def __init__(self):
        self.graphs = 0

    def __call__(self, graph, _):
        self.graphs += 1
        return graph.forward


def unet(dtype=torch.float64, **changes):
    torch.manual_seed(0)
    return torch.nn.Module.to(UNet2DConditionModel(**CONFIG | changes), dtype).eval()


@torch.no_grad()
def outputs(denoiser, seed, batch=2, tokens=7, padded=False, steps=(999, 20)):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64).to(denoiser.dtype)  # noqa: E731
    token_mask = torch.ones(batch, tokens, dtype=torch.bool)
    if padded:
        token_mask[0, tokens // 2 :] = False
    conditioning = Conditioning(draw(batch, tokens, 24), token_mask, draw(batch, 10))
    null = Conditioning(draw(1, 1, 24), torch.ones(1, 1, dtype=torch.bool), draw(1, 10))
    state = denoiser.prepare(conditioning, null, draw(batch, 5, 8, 8), torch.tensor(steps))
    return torch.stack([torch.cat(denoiser(draw(batch, 4, 8, 8), step, state, True)) for step in range(len(steps))])


def relative(ours, reference):
    return ((ours - reference).abs().max() / reference.abs().max()).item()


@pytest.mark.parametrize("changes", [{}, {"time_embedding_act_fn": "silu"}], ids=["fused", "stock"])
def test_what_a_user_varies_is_compiled_once(changes):
    model, counting = unet(**changes), Counting()
    ours, reference = CompiledDenoiser(model, backend=counting), EagerDenoiser(model)
    for seed, options in enumerate(({}, {"padded": True}, {"tokens": 40}, {"steps": (7, 5, 3)}, {"tokens": 63})):
        assert relative(outputs(ours, seed, **options), outputs(reference, seed, **options)) < 1e-12
    assert counting.graphs == 1


def test_more_sizes_than_dynamo_s_own_limit_are_compiled():
    counting = Counting()
    doubled = compiled(lambda x: 2 * x, torch.device("cpu"), backend=counting)
    for _ in range(2):
        for size in range(1, 13):
            assert torch.equal(doubled(torch.ones(size)), torch.full((size,), 2.0))
    assert counting.graphs == 12


def test_inductor_rounds_as_float32_does():
    """One block of each kind: a whole UNet would take the C++ compiler a minute."""
    torch.manual_seed(0)
    resnet = ResnetBlock2D(in_channels=16, temb_channels=8, groups=8, time_embedding_norm="scale_shift")
    transformer = Transformer2DModel(2, 8, in_channels=16, norm_num_groups=8, cross_attention_dim=12)
    first, second = Resnet(resnet.eval()), Transformer(transformer.eval())

    def blocks(x, embedding, tokens):
        contexts = [block.context(tokens, None, None) for block in second.blocks]
        return second(first(x, first.table(embedding)), iter(contexts), False)

    given = torch.randn(2, 16, 8, 8), torch.randn(2, 8), torch.randn(2, 5, 12)
    with torch.no_grad():
        assert relative(compiled(blocks, torch.device("cpu"))(*given), blocks(*given)) < 1e-5


def test_a_bare_unet_is_compiled_too(monkeypatch):
    model, counting = unet(torch.float32, class_embed_type=None), Counting()
    monkeypatch.setattr("gbci_fast.fast.unet.compiled", functools.partial(compiled, backend=counting))
    fast = accelerate(model, runtime="compile", tier="exact")
    sample, context = torch.randn(2, 9, 8, 8), torch.randn(2, 7, 24)
    with torch.no_grad():
        for timestep in (999, 501, 20):
            context = context * 1.1
            assert relative(fast(sample, timestep, context).sample, model(sample, timestep, context).sample) < 1e-5
    assert counting.graphs == 1
    assert fast.describe().startswith("runtime compile, tier exact, float32\n8 of 8 ResnetBlock2D fused\n")


def test_a_hook_after_compiling_is_called(monkeypatch):
    model, called = unet(torch.float32, class_embed_type=None), []
    monkeypatch.setattr("gbci_fast.fast.unet.compiled", functools.partial(compiled, backend=Counting()))
    fast = accelerate(model, runtime="compile", tier="exact")
    given = torch.randn(2, 9, 8, 8), 999, torch.randn(2, 7, 24)
    with torch.no_grad():
        before = fast(*given).sample
        fast.mid_block.resnets[0].register_forward_hook(torch.compiler.disable(lambda *_: called.append(1)))
        assert relative(fast(*given).sample, before) < 1e-5
    assert called == [1]
    assert "stock mid_block.resnets.0: it has hooks" in fast.describe()


def test_cuda_graphs_of_its_own_where_any_thread_may_replay_them(monkeypatch):
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    for newer, mode in ((True, "max-autotune"), (False, "max-autotune-no-cudagraphs")):
        monkeypatch.setattr(module, "GRAPHS_IN_ANY_THREAD", newer)
        assert [module._mode(cuda, True), module._mode(cuda, False), module._mode(cpu, True)] == [
            mode, "max-autotune-no-cudagraphs", "default",
        ]  # fmt: skip


def test_without_a_compiler_it_is_refused(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda _: None)
    sentence = r"the compile runtime needs a C\+\+ compiler; none of .*g\+\+.* is on the PATH"
    with pytest.raises(GBCIError, match=sentence):
        accelerate(unet(torch.float32), runtime="compile")
    with pytest.raises(GBCIError, match=sentence):
        CompiledDenoiser(unet())
