"""accelerate(unet) for UNets shaped like public models, called by diffusers' pipelines, in the original's dtype."""

import itertools

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    EulerDiscreteScheduler,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from gbci_fast.fast import decision
from gbci_fast.fast.accelerate import accelerate

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")  # diffusers' own
WIDTH, TOKENS = 32, 7
CROSS_DOWN, CROSS_UP = "CrossAttnDownBlock2D", "CrossAttnUpBlock2D"
LEVELS = {
    "block_out_channels": (32, 64, 64, 64), "layers_per_block": 2, "norm_num_groups": 8, "attention_head_dim": 8,
    "cross_attention_dim": WIDTH, "down_block_types": (*(CROSS_DOWN,) * 3, "DownBlock2D"),
    "up_block_types": ("UpBlock2D", *(CROSS_UP,) * 3), "sample_size": 16,
}  # fmt: skip
SHAPES = {  # as in their config.json, at reduced width
    "SD 1.5": LEVELS,
    "SD 1.5 inpainting": LEVELS | {"in_channels": 9},
    "SD 2.1": LEVELS | {"attention_head_dim": (4, 8, 8, 8), "use_linear_projection": True, "upcast_attention": True},
    "SDXL": {
        "block_out_channels": (32, 64, 64), "layers_per_block": 2, "norm_num_groups": 8, "cross_attention_dim": WIDTH,
        "attention_head_dim": (4, 8, 8), "transformer_layers_per_block": (1, 2, 4), "use_linear_projection": True,
        "down_block_types": ("DownBlock2D", CROSS_DOWN, CROSS_DOWN), "sample_size": 16,
        "up_block_types": (CROSS_UP, CROSS_UP, "UpBlock2D"), "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": WIDTH + 6 * 8,
    },
}  # fmt: skip
# The error that each dtype may add, of the call and of the weights, relative to the largest value.
BOUNDS = {torch.float32: 1e-5, torch.bfloat16: 0.1, torch.float16: 0.01}


def unet(shape, dtype=torch.float32):
    torch.manual_seed(0)
    model = UNet2DConditionModel(**SHAPES[shape]).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.05 * torch.randn_like(weight))
    return nn.Module.to(model, dtype)


def inputs(model, dtype):
    generator = torch.Generator().manual_seed(1)
    draw = lambda *shape: torch.randn(*shape, generator=generator).to(dtype)  # noqa: E731
    given = {"encoder_hidden_states": draw(2, TOKENS, WIDTH)}
    if model.config.addition_embed_type:
        times = torch.tensor([[1021.0, 1019, 3, 5, 1023, 1017]] * 2, dtype=dtype)
        given["added_cond_kwargs"] = {"text_embeds": draw(2, WIDTH), "time_ids": times}
    return (draw(2, model.config.in_channels, 16, 16), 5), given


def relative(ours, reference):
    return ((ours.float() - reference.float()).abs().max() / reference.float().abs().max()).item()


PAIRS = list(itertools.product(BOUNDS, repeat=2))  # of dtypes
FEW = [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32), (torch.float16, torch.float16)]


@pytest.mark.parametrize(
    ("shape", "outside", "inside"),
    [(shape, *pair) for shape in SHAPES for pair in (PAIRS if shape == "SD 1.5" else FEW)],
    ids=str,
)
@torch.no_grad()
def test_the_same_call_has_the_same_dtypes(shape, outside, inside):
    reference_model = unet(shape)
    model = unet(shape, outside)
    args, kwargs = inputs(model, outside)
    fast = accelerate(model, dtype=inside)
    assert (fast.dtype, fast.compute_dtype) == (outside, inside)
    ours, as_tuple = fast(*args, **kwargs).sample, fast(*args, **kwargs, return_dict=False)
    assert ours.dtype == as_tuple[0].dtype == model(*args, **kwargs).sample.dtype == outside
    args, kwargs = inputs(reference_model, torch.float32)
    assert relative(ours, reference_model(*args, **kwargs).sample) < BOUNDS[outside] + BOUNDS[inside]
    assert not fast._declined
    assert not fast.stock_reasons


@pytest.mark.parametrize("units", [True, False])
@torch.no_grad()
def test_the_default_takes_the_call_of_the_original(units, monkeypatch):
    monkeypatch.setattr(decision, "has_bfloat16_units", lambda _: units)
    model = unet("SD 1.5")
    (x, t), kwargs = inputs(model, torch.float32)
    fast = accelerate(model)
    assert fast.compute_dtype == (torch.bfloat16 if units else torch.float32)
    ours, reference = fast(x, t, kwargs["encoder_hidden_states"]), model(x, t, kwargs["encoder_hidden_states"])
    assert ours.sample.dtype == torch.float32
    assert relative(ours.sample, reference.sample) < BOUNDS[torch.bfloat16]


@torch.no_grad()
def test_keys_and_values_are_kept_for_a_context_that_is_cast():
    model = unet("SD 1.5")
    (x, t), kwargs = inputs(model, torch.float32)
    fast, casts, context = accelerate(model, dtype=torch.bfloat16), [], kwargs["encoder_hidden_states"]
    function = fast._context.function
    fast._context.function = lambda tensor: casts.append(1) or function(tensor)
    first = fast(x, t, context).sample
    assert torch.equal(fast(x, t, encoder_hidden_states=context).sample, first)
    assert len(casts) == 1
    context.mul_(2)
    assert not torch.equal(fast(x, t, context).sample, first)
    assert len(casts) == 2


@torch.no_grad()
def test_casting_it_changes_what_it_is_called_in():
    fast = accelerate(unet("SD 1.5"), dtype=torch.bfloat16)
    assert fast.dtype == torch.float32
    assert fast.to(memory_format=torch.contiguous_format).dtype == torch.float32
    assert fast.half().dtype == fast.compute_dtype == torch.float16
    assert fast.to(torch.bfloat16).dtype == torch.bfloat16


@torch.no_grad()
def test_residuals_are_cast_too():
    model = unet("SD 1.5")
    (x, t), kwargs = inputs(model, torch.float32)
    fast, shapes = accelerate(model, dtype=torch.bfloat16), []
    hooks = [model.conv_in.register_forward_hook(lambda *given: shapes.append(given[-1].shape))]
    for block in model.down_blocks:
        hooks.append(block.register_forward_hook(lambda *given: shapes.extend(x.shape for x in given[-1][1])))
    hooks.append(model.mid_block.register_forward_hook(lambda *given: shapes.append(given[-1].shape)))
    plain = model(x, t, **kwargs).sample
    for hook in hooks:
        hook.remove()
    *down, middle = [torch.randn(shape, generator=torch.Generator().manual_seed(3)) for shape in shapes]
    more = {"down_block_additional_residuals": tuple(down), "mid_block_additional_residual": middle}
    ours, reference = (made(x, t, **kwargs, **more).sample for made in (fast, model))
    assert ours.dtype == torch.float32
    assert relative(ours, reference) < BOUNDS[torch.bfloat16] < relative(reference, plain)


def autoencoder():
    torch.manual_seed(1)
    return AutoencoderKL(
        block_out_channels=(16, 16), norm_num_groups=8, latent_channels=4, sample_size=32,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    ).eval()  # fmt: skip


def text_encoder(kind):
    torch.manual_seed(2)
    config = CLIPTextConfig(
        vocab_size=100, hidden_size=WIDTH, intermediate_size=WIDTH, num_hidden_layers=1, num_attention_heads=2,
        projection_dim=WIDTH,
    )  # fmt: skip
    return kind(config).eval()


def text_to_image(model, texts):
    encoder = text_encoder(CLIPTextModel) if texts else None
    return StableDiffusionPipeline(
        vae=autoencoder(), text_encoder=encoder, tokenizer=None, unet=model, scheduler=DDIMScheduler(),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


def inpainting(model, texts):
    parts = text_to_image(model, texts).components
    return StableDiffusionInpaintPipeline(**parts, requires_safety_checker=False)


def extra_large(model, texts):
    encoders = [text_encoder(kind) if texts else None for kind in (CLIPTextModel, CLIPTextModelWithProjection)]
    return StableDiffusionXLPipeline(
        vae=autoencoder(), text_encoder=encoders[0], text_encoder_2=encoders[1], tokenizer=None, tokenizer_2=None,
        unet=model, scheduler=EulerDiscreteScheduler(), add_watermarker=False,
    )  # fmt: skip


PIPELINES = {
    "StableDiffusionPipeline": (text_to_image, "SD 1.5"),
    "StableDiffusionPipeline, 2.1": (text_to_image, "SD 2.1"),
    "StableDiffusionInpaintPipeline": (inpainting, "SD 1.5 inpainting"),
    "StableDiffusionInpaintPipeline, 4 channels": (inpainting, "SD 1.5"),
    "StableDiffusionXLPipeline": (extra_large, "SDXL"),
}


def paint(pipe):
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(3)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    given = {"prompt_embeds": draw(1, TOKENS, WIDTH), "negative_prompt_embeds": draw(1, TOKENS, WIDTH)}
    if isinstance(pipe, StableDiffusionXLPipeline):
        given |= {"pooled_prompt_embeds": draw(1, WIDTH), "negative_pooled_prompt_embeds": draw(1, WIDTH)}
    if isinstance(pipe, StableDiffusionInpaintPipeline):
        mask = torch.zeros(1, 1, 32, 32)
        mask[..., 8:20, 8:20] = 1
        given |= {"image": torch.rand(1, 3, 32, 32, generator=generator) * 2 - 1, "mask_image": mask}
    return pipe(
        **given, height=32, width=32, num_inference_steps=2, guidance_scale=3.0, output_type="pt", generator=generator
    ).images


@pytest.mark.parametrize("texts", [True, False], ids=["text encoder", "no text encoder"])
@pytest.mark.parametrize("name", PIPELINES)
def test_a_stock_pipeline_takes_it(name, texts):
    build, shape = PIPELINES[name]
    model = unet(shape)
    reference = paint(build(model, texts))
    for options, bound in (({"dtype": torch.bfloat16}, 0.1), ({"tier": "exact"}, 1e-4)):
        ours = paint(build(accelerate(model, **options), texts))
        assert ours.dtype == reference.dtype
        assert (ours - reference).abs().max() < bound
