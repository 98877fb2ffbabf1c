"""accelerate(unet): the stock UNet's forward for any config, with fused blocks where possible, otherwise stock."""

import copy
import inspect
import logging
import re
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from accelerate import cpu_offload
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from diffusers import UNet2DConditionModel
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput
from torch import nn

from gbci_fast.errors import GBCIError
from gbci_fast.fast import decision
from gbci_fast.fast.accelerate import accelerate
from gbci_fast.fast.decision import Decision
from gbci_fast.fast.unet import BLOCKS, FastBlock, FastTransformer, FastUNet

DOWN, CROSS_DOWN, UP, CROSS_UP = "DownBlock2D", "CrossAttnDownBlock2D", "UpBlock2D", "CrossAttnUpBlock2D"
BASE = {
    "block_out_channels": (32, 64), "layers_per_block": 1, "norm_num_groups": 8, "attention_head_dim": (2, 4),
    "cross_attention_dim": 24, "down_block_types": (CROSS_DOWN, DOWN), "up_block_types": (UP, CROSS_UP),
}  # fmt: skip
EVERYWHERE = {"down_block_types": (CROSS_DOWN,) * 2, "up_block_types": (CROSS_UP,) * 2}
FUSED = {
    "stable diffusion": {},
    "inpainting": {"in_channels": 9},
    "two layers": {"layers_per_block": 2},
    "head_dim 40 and 80": {"block_out_channels": (80, 160), "attention_head_dim": 2, **EVERYWHERE},
    "head_dim 64 and 160": {"block_out_channels": (64, 160), "attention_head_dim": 1, **EVERYWHERE},
    "linear projections": {"use_linear_projection": True},
    "several transformer blocks": {"transformer_layers_per_block": (1, 2), **EVERYWHERE},
    "attention nowhere but in the middle": {"down_block_types": (DOWN,) * 2, "up_block_types": (UP,) * 2},
    "film": {"resnet_time_scale_shift": "scale_shift"},
    "classes": {"num_class_embeds": 5},
    "classes that are concatenated": {
        "class_embed_type": "projection", "projection_class_embeddings_input_dim": 6, "class_embeddings_concat": True,
    },
    "a guidance embedding": {"time_cond_proj_dim": 10},
    "size and crop, as in SDXL": {
        "addition_embed_type": "text_time", "addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 68,
    },
    "a projected context": {"encoder_hid_dim": 24},
    "no middle block": {"mid_block_type": None},
    "a middle block without context": {"mid_block_type": "UNetMidBlock2D"},
    "upcast attention": {"upcast_attention": True},
    "centered input, fourier features": {"center_input_sample": True, "time_embedding_type": "fourier"},
}  # fmt: skip
# ... and what `describe` says of them.
STOCK = {
    "only cross-attention": (
        {"only_cross_attention": (True, False)},
        "stock down_blocks.0.attentions.0: transformer_blocks.0.only_cross_attention is True",
    ),
    "self-attention blocks": (
        {"down_block_types": (CROSS_DOWN, "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", CROSS_UP)},
        "stock down_blocks.1 is a AttnDownBlock2D",
    ),
    "simple cross-attention": (
        {
            "down_block_types": (DOWN, "SimpleCrossAttnDownBlock2D"), "attention_head_dim": 8,
            "up_block_types": ("SimpleCrossAttnUpBlock2D", UP), "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
        },
        "stock mid_block is a UNetMidBlock2DSimpleCrossAttn",
    ),
    "resnets that resample": (
        {
            "down_block_types": ("ResnetDownsampleBlock2D", CROSS_DOWN),
            "up_block_types": (CROSS_UP, "ResnetUpsampleBlock2D"),
        },
        "stock down_blocks.0.downsamplers.0: downsample is a Downsample2D",
    ),
    "gates": ({"attention_type": "gated"}, "stock down_blocks.0.attentions.0: transformer_blocks.0.fuser is a Gated"),
    "another activation": ({"act_fn": "gelu"}, "stock mid_block.resnets.0: nonlinearity is a GELU"),
}  # fmt: skip
NOTHING = {
    "act_fn": "gelu", "block_out_channels": (32,), "mid_block_type": None, "attention_head_dim": 2,
    "down_block_types": (DOWN,), "up_block_types": (UP,),
}  # fmt: skip


def unet(dtype=torch.float64, **changes):
    torch.manual_seed(0)
    model = nn.Module.to(UNet2DConditionModel(**BASE | changes), dtype).eval()
    for parameter in model.parameters():  # zero biases and unit gains would hide missing terms
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    return model


def fast_of(model, runtime="fused"):
    how = Decision(runtime=runtime, tier="exact", dtype=model.dtype)
    return FastUNet.of(model, how, model.device, torch.contiguous_format)


def inputs(model, batch=2, size=16, **changes):
    generator = torch.Generator().manual_seed(1)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64).to(model.dtype)  # noqa: E731
    config, given = model.config, {}
    if config.num_class_embeds:
        given["class_labels"] = torch.tensor([1, 4])
    if config.class_embed_type:
        given["class_labels"] = draw(batch, 6)
    if config.time_cond_proj_dim:
        given["timestep_cond"] = draw(batch, 10)
    if config.addition_embed_type:
        given["added_cond_kwargs"] = {"text_embeds": draw(batch, 20), "time_ids": draw(batch, 6)}
    context = draw(batch, 7, 24)
    return {
        "sample": draw(batch, config.in_channels, size, size), "timestep": 501, "encoder_hidden_states": context,
        **given, **changes,
    }  # fmt: skip


@torch.no_grad()
def run(model, given):
    return model(**given).sample


def relative(ours, reference):
    return ((ours - reference).abs().max() / reference.abs().max()).item()


def stock(fast):
    return [part for part in fast.modules() if type(part) in BLOCKS]


@pytest.mark.parametrize("changes", FUSED.values(), ids=FUSED)
def test_equals_the_stock_unet_in_float64(changes):
    model = unet(**changes)
    fast, given = fast_of(model), inputs(model)
    assert fast.num_fused
    assert not stock(fast)
    assert not fast.stock_reasons
    for timestep in (501, 20.5, torch.tensor(7)):  # the second time with keys and values of the first
        given["timestep"] = timestep
        assert relative(run(fast, given), run(model, given)) < 1e-12
    assert not fast._declined


@pytest.mark.parametrize(("changes", "said"), STOCK.values(), ids=STOCK)
def test_what_is_not_reproduced_stays_stock_and_is_said(changes, said):
    model = unet(**changes)
    fast, given = fast_of(model), inputs(model)
    assert said in fast.describe()
    assert relative(run(fast, given), run(model, given)) < 1e-12
    assert fast.num_fused  # the other blocks stay fused


def test_a_unet_of_foreign_blocks_alone_is_left_to_eager():
    model = unet(
        torch.float32, block_out_channels=(32, 32, 64, 64), mid_block_type=None, attention_head_dim=32, act_fn="gelu",
        down_block_types=("KDownBlock2D", *("KCrossAttnDownBlock2D",) * 3), norm_num_groups=None,
        up_block_types=(*("KCrossAttnUpBlock2D",) * 3, "KUpBlock2D"), time_embedding_type="fourier",
    )  # fmt: skip
    fast = accelerate(model, tier="exact")
    assert fast.describe().startswith("runtime eager, tier exact, float32\n0 of 0 ResnetBlock2D fused\n")
    assert "stock down_blocks.0 is a KDownBlock2D" in fast.describe()
    given = inputs(model)
    assert torch.equal(run(fast, given), run(model, given))


MASK = torch.tensor([[1, 1, 1, 1, 0, 0, 0], [1, 0, 1, 0, 1, 1, 1]], dtype=torch.bool)
CALLS = {
    "padded": ({"encoder_attention_mask": MASK}, None),
    "a mask of weights": ({"encoder_attention_mask": MASK * 0.9997}, None),
    "self-attention masked": (
        {"attention_mask": torch.arange(256).expand(2, -1) < 200}, "calls where there is an attention_mask"
    ),
    "odd sizes": ({"size": 13}, "Upsample2D in calls where the image does not double in size"),
    "cross_attention_kwargs": (
        {"cross_attention_kwargs": {"unknown": 1}}, "calls where there are cross_attention_kwargs"
    ),
    "an empty context": ({"encoder_hidden_states": None}, "where encoder_hidden_states is not [batch, tokens, width]"),
}  # fmt: skip


@pytest.mark.parametrize(("changes", "said"), CALLS.values(), ids=CALLS)
def test_calls_that_ask_for_more(changes, said, caplog):
    # One level, so that all self-attention is over 16 x 16 tokens; and a context as wide as the image's tokens.
    model = unet(mid_block_type=None, cross_attention_dim=32 if "encoder_hidden_states" in changes else 24)
    fast, given = fast_of(model), inputs(model, **changes)
    with caplog.at_level(logging.WARNING, "gbci_fast.fast.unet"):
        for _ in range(2):
            assert relative(run(fast, given), run(model, given)) < 1e-12
    assert list(fast._declined) == [record.message for record in caplog.records if record.name.startswith("gbci_fast")]
    assert len(fast._declined) == (said is not None)
    assert said is None or said in fast.describe()


def test_a_wrong_mask_fails_as_in_the_stock_unet():
    model = unet()
    given = inputs(model, encoder_attention_mask=torch.ones(2, 5, dtype=torch.bool))
    for made in (model, fast_of(model)):
        with pytest.raises(RuntimeError):
            run(made, given)


def test_residuals_of_a_controlnet_and_of_an_adapter_are_added():
    model = unet()
    fast, given = fast_of(model), inputs(model)
    plain = run(model, given)
    down = [torch.randn(2, *shape, dtype=torch.float64) for shape in ((32, 16, 16),) * 2 + ((32, 8, 8), (64, 8, 8))]
    middle = torch.randn(2, 64, 8, 8, dtype=torch.float64)
    control = {"down_block_additional_residuals": tuple(down), "mid_block_additional_residual": middle}
    for more in (control, {"down_intrablock_additional_residuals": [down[1], down[3]]}):
        ours, reference = (run(made, given | copy.deepcopy(more)) for made in (fast, model))
        assert relative(ours, reference) < 1e-12
        assert relative(reference, plain) > 1e-3


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("padded", [True, False])
def test_exact_is_eager_to_float32_rounding(layout, padded):
    model = unet(torch.float32, layers_per_block=2).to(memory_format=layout)
    given = inputs(model, encoder_attention_mask=MASK if padded else None)
    assert relative(run(accelerate(model, tier="exact"), given), run(model, given)) < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_tolerance_is_within_its_bound(dtype):
    model = unet(torch.float32)
    given = inputs(model)
    reference = run(model, given)
    fast, narrow = accelerate(model, dtype=dtype), accelerate(model, runtime="eager", dtype=dtype)
    assert not narrow.num_fused
    errors = [(run(made, inputs(made)) - reference).square().mean().sqrt() for made in (fast, narrow)]
    assert 0 < errors[0] <= 1.5 * errors[1]


def test_a_context_that_is_written_to_or_exchanged_is_seen():
    model = unet()
    fast, given = fast_of(model), inputs(model)
    calls = []
    for part in fast.modules():
        if isinstance(part, FastTransformer):
            function = part.contexts.function
            part.contexts.function = lambda tokens, function=function: calls.append(1) or function(tokens)
    transformers = sum(isinstance(part, FastTransformer) for part in fast.modules())
    context = given["encoder_hidden_states"]
    original = context.clone()
    first = run(fast, given)
    run(fast, given)
    assert len(calls) == transformers  # computed once
    context[:, 2] *= 2
    changed = run(fast, given)
    assert relative(changed, run(model, given)) < 1e-12
    assert relative(changed, first) > 1e-3
    context.copy_(original)
    assert torch.equal(run(fast, given), first)
    assert len(calls) == 3 * transformers
    for _ in range(3):  # a new tensor each time, perhaps at the address of the last
        given["encoder_hidden_states"] = torch.randn_like(original)
        assert relative(run(fast, given), run(model, given)) < 1e-12


def test_what_a_call_under_autocast_derives_is_in_full_precision():
    model = unet().float()  # float64 is left as it is
    fast, given = fast_of(model), inputs(model)
    with torch.no_grad():
        for made in (model, fast):
            made.get_parameter("up_blocks.0.upsamplers.0.conv.weight").mul_(2)
            made.get_parameter("mid_block.attentions.0.proj_in.weight").mul_(2)
    with torch.autocast("cpu", torch.bfloat16):
        run(fast, given)
    assert not stock(fast)
    assert relative(run(fast, given), run(model, given)) < 1e-5


def test_threads_with_a_context_each_do_not_mix_them():
    model = unet()
    fast = copy.deepcopy(fast_of(model))
    given = [inputs(model, encoder_hidden_states=torch.randn(2, 7, 24, dtype=torch.float64)) for _ in range(4)]
    with ThreadPoolExecutor(4) as pool:
        outputs = list(pool.map(lambda index: run(fast, given[index % 4]), range(16)))
    references = [run(model, each) for each in given]
    assert relative(references[0], references[1]) > 1e-3
    assert max(relative(ours, references[index % 4]) for index, ours in enumerate(outputs)) < 1e-12


def test_inference_tensors_are_never_remembered():
    model = unet()
    fast = fast_of(model)
    with torch.inference_mode():
        given = inputs(model)
        for factor in (1, 2):
            given["encoder_hidden_states"].mul_(factor)
            assert relative(run(fast, given), run(model, given)) < 1e-12


def test_the_unet_stays_as_it_is():
    model = unet(torch.float32)
    given = inputs(model)
    before, weights = run(model, given), copy.deepcopy(model.state_dict())
    for options in ({"tier": "exact"}, {"dtype": torch.bfloat16}):
        fast = accelerate(model, **options)
        run(fast, inputs(fast))
        fast.to(torch.float16).to("meta")
    assert not any(isinstance(part, FastBlock) for part in model.modules())
    assert model.dtype == torch.float32
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert torch.equal(run(model, given), before)
    exact = accelerate(model, tier="exact")
    pairs = zip(model.parameters(), exact.parameters(), strict=True)
    assert all(ours.data_ptr() != theirs.data_ptr() for ours, theirs in pairs)
    with torch.no_grad():
        [weight.zero_() for weight in exact.parameters()]
    assert torch.equal(run(model, given), before)


def test_it_passes_for_the_stock_unet():
    model = unet()
    fast, given = fast_of(model), inputs(model)
    assert isinstance(fast, UNet2DConditionModel)
    assert inspect.signature(fast.forward) == inspect.signature(model.forward)
    assert (fast.config, fast.dtype, fast.device) == (model.config, model.dtype, model.device)
    assert fast.state_dict().keys() == model.state_dict().keys()
    with torch.no_grad():
        as_tuple, as_output = fast(*given.values(), return_dict=False), fast(*given.values())
    assert type(as_tuple) is tuple
    assert type(as_output) is UNet2DConditionOutput
    assert torch.equal(as_tuple[0], as_output.sample)


def test_weights_that_change_are_seen():
    model, other = unet(), unet(cross_attention_dim=24)
    for parameter in other.parameters():
        parameter.data.mul_(1.1)
    fast, given = fast_of(model), inputs(model)
    run(fast, given)
    fast.load_state_dict(other.state_dict())
    assert relative(run(fast, given), run(other, given)) < 1e-12
    fast.load_state_dict(unet().state_dict(), assign=True)
    assert relative(run(fast, given), run(unet(), given)) < 1e-12
    with torch.no_grad():
        fast.mid_block.attentions[0].transformer_blocks[0].attn1.to_v.weight.mul_(2)
    changed = unet()
    changed.mid_block.attentions[0].transformer_blocks[0].attn1.to_v.weight.data.mul_(2)
    assert relative(run(fast, given), run(changed, given)) < 1e-12
    fast.float().double()
    assert 0 < relative(run(fast, given), run(changed, given)) < 1e-5


def test_parts_that_change_are_seen():
    model = unet()
    fast, given = fast_of(model), inputs(model)
    plain = run(fast, given)
    fast.set_attention_slice(1)
    assert torch.allclose(run(fast, given), plain, rtol=0, atol=1e-9)
    assert "attn1.processor is a SlicedAttnProcessor" in fast.describe()
    fast.set_default_attn_processor()
    assert torch.equal(run(fast, given), plain)
    assert not fast.stock_reasons
    seen = []
    fast.mid_block.attentions[0].transformer_blocks[0].attn1.to_q.register_forward_hook(lambda *_: seen.append(1))
    run(fast, given)
    assert seen
    assert "stock mid_block.attentions.0: transformer_blocks.0.attn1.to_q has hooks" in fast.describe()
    fast.mid_block.resnets[0].conv1 = nn.Conv2d(64, 64, 3, padding=1, bias=False, dtype=torch.float64)
    assert relative(run(fast, given), plain) > 1e-3
    fast.enable_freeu(0.9, 0.2, 1.2, 1.4)
    model.mid_block.resnets[0].conv1 = fast.mid_block.resnets[0].conv1
    model.enable_freeu(0.9, 0.2, 1.2, 1.4)
    assert relative(run(fast, given), run(model, given)) < 1e-9


def test_offloading_is_seen_and_its_end_too():
    model = unet()
    fast, given = fast_of(model), inputs(model)
    blocks, plain = fast.num_fused, run(fast, given)
    cpu_offload(fast, execution_device=torch.device("cpu"))
    assert torch.allclose(run(fast, given), plain, rtol=0, atol=1e-9)
    assert fast.num_fused == 0
    assert "stock mid_block.resnets.0: norm1 has hooks" in fast.describe()
    remove_hook_from_module(fast, recurse=True)
    assert torch.equal(run(fast, given), plain)
    add_hook_to_module(fast.mid_block.resnets[0], ModelHook())
    assert torch.allclose(run(fast, given), plain, rtol=0, atol=1e-9)
    assert fast.stock_reasons == ["mid_block.resnets.0: it has hooks"]
    remove_hook_from_module(fast.mid_block.resnets[0])
    assert torch.equal(run(fast, given), plain)
    assert fast.num_fused == blocks
    remove_hook_from_module(add_hook_to_module(model, ModelHook()))  # leaves a forward behind
    assert fast_of(model).forward.__func__ is FastUNet.forward


def test_dropout_and_gradients_are_the_stock_forward_s():
    model = unet(dropout=0.5)
    fast, given = fast_of(model), inputs(model)
    run(fast, given)
    assert relative(run(fast, given), run(model, given)) < 1e-12
    fast.train()
    assert relative(run(fast, given), run(model, given)) > 1e-3
    assert "resnets.0: dropout drops out" in fast.describe()
    fast.eval()
    fast(**given).sample.square().mean().backward()
    model(**given).sample.square().mean().backward()
    ours, reference = fast.conv_in.weight.grad, model.conv_in.weight.grad
    assert relative(ours, reference) < 1e-9
    assert "stock ResnetBlock2D in calls where gradients are enabled; call it under torch.no_grad()" in fast.describe()


def test_it_is_copied_and_saved(tmp_path):
    model = unet(torch.float32)
    fast = accelerate(model, tier="exact")
    given = inputs(model)
    first = run(fast, given)
    twin = copy.deepcopy(fast)
    assert torch.equal(run(twin, given), first)
    twin.conv_in.weight.data.zero_()
    assert torch.equal(run(fast, given), first)
    fast.save_pretrained(tmp_path)
    for cls in (UNet2DConditionModel, FastUNet):
        again = cls.from_pretrained(tmp_path)
        assert type(again) is UNet2DConditionModel
        assert torch.equal(run(again, given), run(model, given))
    torch.save(fast, tmp_path / "whole.pt")
    assert torch.equal(run(torch.load(tmp_path / "whole.pt", weights_only=False), given), first)


def test_the_decision_is_described(monkeypatch):
    monkeypatch.setattr(decision, "has_bfloat16_units", lambda _: True)
    model = unet(torch.float32)
    blocks = "8 of 8 ResnetBlock2D fused\n4 of 4 Transformer2DModel fused\n1 of 1 Upsample2D fused"
    assert accelerate(model).describe() == f"runtime fused, tier tolerance, bfloat16\n{blocks}"
    assert accelerate(model, tier="exact").describe() == f"runtime fused, tier exact, float32\n{blocks}"
    none = blocks.replace("8 of", "0 of").replace("4 of", "0 of").replace("1 of", "0 of")
    eager = accelerate(model, runtime="eager", tier="exact")
    assert eager.describe() == f"runtime eager, tier exact, float32\n{none}"
    assert torch.equal(run(eager, inputs(model)), run(model, inputs(model)))


def test_what_cannot_be_accelerated_is_refused_with_the_reason():
    nothing = unet(torch.float32, **NOTHING)
    sentence = "cannot run any block of this UNet: down_blocks.0.resnets.0: nonlinearity is a GELU; up_blocks.0"
    with pytest.raises(GBCIError, match=re.escape(sentence)):
        accelerate(nothing, runtime="fused")
    assert accelerate(nothing, tier="exact").describe().startswith("runtime eager, tier exact, float32\n")
    fast = accelerate(unet(torch.float32))
    with pytest.raises(GBCIError, match="the UNet is a FastUNet; expected a UNet2DConditionModel itself"):
        accelerate(fast)
    offloaded = unet(torch.float32)
    offloaded.forward = lambda *args, **kwargs: None
    with pytest.raises(GBCIError, match="the UNet's forward was replaced, by offloading for example"):
        accelerate(offloaded)
    with pytest.raises(GBCIError, match="pipe is a Linear; expected a GBCIPipeline or a UNet2DConditionModel"):
        accelerate(nn.Linear(1, 1))
    for options, sentence in (
        ({"tier": "exact", "dtype": torch.bfloat16}, "dtype is torch.bfloat16 with tier 'exact'"),
        ({"runtime": "magic"}, "runtime is 'magic'; expected one of auto, eager, fused, compile"),
    ):
        with pytest.raises(GBCIError, match=re.escape(sentence)):
            accelerate(unet(torch.float32), **options)
