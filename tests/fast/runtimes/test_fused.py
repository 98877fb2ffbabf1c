"""The fused UNet against the stock UNet: algebra in float64, rounding in float32; and refusals."""

import copy
import re

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch.utils._python_dispatch import TorchDispatchMode

from gbci_fast.errors import GBCIError
from gbci_fast.fast.modules import blocks
from gbci_fast.fast.modules.blocks import fused_refusals
from gbci_fast.fast.runtimes.eager import EagerDenoiser
from gbci_fast.fast.runtimes.fused import FusedDenoiser
from gbci_fast.model.conditioning import Conditioning
from gbci_fast.ops import cross_attention
from gbci_fast.ops._triton import INTERPRETED

TIMESTEPS = torch.tensor([999, 501, 20])
CONFIG = {
    "in_channels": 9, "out_channels": 4, "block_out_channels": (32, 64), "layers_per_block": 1, "norm_num_groups": 16,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"), "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": (2, 4), "cross_attention_dim": 24, "class_embed_type": "projection",
    "projection_class_embeddings_input_dim": 40, "resnet_time_scale_shift": "scale_shift",
}  # fmt: skip
VARIANTS = {
    "film": {},
    "time added, as in Stable Diffusion": {"resnet_time_scale_shift": "default"},
    "two layers": {"layers_per_block": 2},
    "linear projections": {"use_linear_projection": True},
    "two transformer layers": {"transformer_layers_per_block": 2},
    "attention everywhere": {
        "down_block_types": ("CrossAttnDownBlock2D",) * 2, "up_block_types": ("CrossAttnUpBlock2D",) * 2,
    },
    "scaled residuals": {"mid_block_scale_factor": 1.5},
    "another kernel": {"conv_in_kernel": 5},
}  # fmt: skip


def unet(dtype=torch.float64, **changes):
    torch.manual_seed(0)
    model = torch.nn.Module.to(UNet2DConditionModel(**CONFIG | changes), dtype).eval()
    for parameter in model.parameters():  # zero biases and unit gains would hide missing terms
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    return model


def inputs(batch, dtype=torch.float64, padded=True, size=12):
    generator = torch.Generator().manual_seed(1)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)  # noqa: E731
    token_mask = torch.ones(batch, 7, dtype=torch.bool)
    if padded:
        token_mask[0, 4:] = False
    conditioning = Conditioning(draw(batch, 7, 24), token_mask, draw(batch, 40))
    null = Conditioning(draw(1, 1, 24), torch.ones(1, 1, dtype=torch.bool), draw(1, 40))
    return draw(batch, 4, size, size), (conditioning, null, draw(batch, 5, size, size), TIMESTEPS)


def outputs(denoiser, batch, guided, steps=3, **options):
    latents, given = inputs(batch, denoiser.dtype, **options)
    with torch.no_grad():
        state = denoiser.prepare(*given)
        parts = [denoiser(latents, step, state, guided) for step in range(steps)]
    return [torch.cat(part) for part in parts] if guided else parts


def relative(ours, reference):
    return max(((a - b).abs().max() / b.abs().max()).item() for a, b in zip(ours, reference, strict=True))


@pytest.mark.parametrize("guided", [True, False])
@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_equals_the_stock_unet_in_float64(changes, guided):
    model = unet(**changes)
    ours, reference = (outputs(make(model), 2, guided) for make in (FusedDenoiser, EagerDenoiser))
    assert ours[0].shape == (4 if guided else 2, 4, 12, 12)
    assert relative(ours, reference) < 1e-12


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("padded", [True, False])
def test_equals_it_in_float32_to_rounding(layout, padded):
    model = unet(torch.float32).to(memory_format=layout)
    ours, reference = (outputs(make(model), 3, True, padded=padded) for make in (FusedDenoiser, EagerDenoiser))
    assert relative(ours, reference) < 5e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_where_triton_interprets_them_the_fused_operators_run(dtype):
    """Without the interpreter the CPU has one fused operator. The result is as near to float64 as the stock UNet's."""

    names = set()

    class Operators(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function.namespace == "gbci_fast":
                names.add(function._opname)
            return function(*args, **kwargs or {})

    model = unet(dtype).to(memory_format=torch.channels_last)
    exact = torch.cat(outputs(EagerDenoiser(copy.deepcopy(model).double()), 1, True, steps=1, size=8))
    with Operators():
        ours = torch.cat(outputs(FusedDenoiser(model), 1, True, steps=1, size=8))
    everywhere, narrow = {"group_norm_film_silu", "layer_norm_film", "attention"}, {"geglu", "cross_attention"}
    expected = everywhere | narrow if dtype == torch.bfloat16 else everywhere
    assert names & (everywhere | narrow) == (expected if INTERPRETED else {"group_norm_film_silu"})
    eager = torch.cat(outputs(EagerDenoiser(model), 1, True, steps=1, size=8))
    error, own = ((result - exact).square().mean().sqrt() for result in (ours, eager))
    assert 0 < error <= 1.5 * own


@pytest.mark.parametrize("operators", [False, True])
def test_padding_may_be_anywhere(operators, monkeypatch):
    """Padding in front, and a sample that is all padding; by `kv_lengths` if the operators run, otherwise by a bias."""
    if operators:
        monkeypatch.setattr(blocks, "use_triton", lambda x: True)
    latents, (conditioning, *given) = inputs(3)
    token_mask = torch.ones(3, 7, dtype=torch.bool)
    token_mask[0, [0, 3, 4]], token_mask[1, 5:], token_mask[2] = False, False, False
    conditioning = Conditioning(conditioning.tokens, token_mask, conditioning.pooled)
    model = unet()
    with torch.no_grad():
        ours, reference = (
            denoiser(latents, 1, denoiser.prepare(conditioning, *given), True)
            for denoiser in (FusedDenoiser(model), EagerDenoiser(model))
        )
    assert relative(ours, reference) < 1e-11


def test_cross_attention_without_its_kernel_is_said(monkeypatch):
    monkeypatch.setattr(cross_attention, "triton", object())
    model = unet(torch.float32, attention_head_dim=(1, 2), block_out_channels=(160, 640))
    sentence = "cross-attention by SDPA and GEMMs in 4 of 4 layers: "
    assert blocks.cross_attention_notes(model, torch.float32) == [
        f"{sentence}no tensor core multiplies float32 in its full precision"
    ]
    assert blocks.cross_attention_notes(model, torch.float16) == [
        f"{sentence}it is 640 wide; the cross-attention kernel takes at most 512 in torch.float16",
        f"{sentence}head_dim is 320; the cross-attention kernel takes at most 128 in torch.float16",
    ]
    assert blocks.cross_attention_notes(unet(), torch.float16) == []


def test_guidance_may_be_switched_between_steps():
    """A callback may set the guidance scale: one state serves steps with and without guidance."""
    denoiser = FusedDenoiser(unet())
    latents, given = inputs(2)
    with torch.no_grad():
        state = denoiser.prepare(*given)
        conditional, _ = denoiser(latents, 1, state, True)
        assert relative([denoiser(latents, 1, state, False)], [conditional]) < 1e-12


def test_the_unet_and_the_state_stay_as_they_are():
    model = unet()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    denoiser = FusedDenoiser(model)
    latents, given = inputs(2)
    kept = latents.clone()
    with torch.no_grad():
        state = denoiser.prepare(*given)
        first, again = (torch.cat(denoiser(latents, 0, state, True)) for _ in range(2))
    assert torch.equal(first, again)
    assert torch.equal(latents, kept)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_what_it_cannot_run_is_named():
    model = unet(down_block_types=("AttnDownBlock2D", "CrossAttnDownBlock2D"))
    assert "down_blocks.0 is a AttnDownBlock2D" in fused_refusals(model)
    sentence = "the fused runtime cannot run this UNet: down_blocks.0 is a AttnDownBlock2D; "
    with pytest.raises(GBCIError, match=re.escape(sentence)):
        FusedDenoiser(model)
    for kind in (None, "timestep"):
        assert fused_refusals(unet(class_embed_type=kind)) == ["it has no class embedding of vectors that is added"]
    assert fused_refusals(unet(mid_block_type=None)) == ["it has no middle block"]
    assert fused_refusals(unet(time_embedding_act_fn="silu")) == ["time_embedding_act_fn is 'silu'"]
    assert fused_refusals(unet(center_input_sample=True)) == ["center_input_sample is True"]
    assert "mid_block.resnets.0.nonlinearity is a GELU" in fused_refusals(unet(act_fn="gelu"))
    sliced = unet()
    sliced.set_attention_slice(1)
    assert fused_refusals(sliced)[0].endswith(".attn1.processor is a SlicedAttnProcessor")
    free = unet()
    free.enable_freeu(0.9, 0.2, 1.2, 1.4)
    assert fused_refusals(free) == ["up_blocks.0 has FreeU factors", "up_blocks.1 has FreeU factors"]
    hooked = unet()
    hooked.mid_block.register_forward_hook(lambda *_: None)
    assert fused_refusals(hooked) == ["mid_block has hooks"]
    assert fused_refusals(unet(dropout=0.5)) == []
    assert "mid_block.resnets.0.dropout drops out" in fused_refusals(unet(dropout=0.5).train())
    assert fused_refusals(unet()) == []
