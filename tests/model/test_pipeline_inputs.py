"""Inputs that the eager pipeline takes and refuses, its outputs, and the bit-exact background."""

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image

from gbci_fast.attributes import Attributes
from gbci_fast.errors import GBCIError
from gbci_fast.model.conditioning import ConditionEncoder
from gbci_fast.model.pipeline import GBCIPipeline


@pytest.fixture(scope="module")
def pipe(tiny_pipeline):
    return tiny_pipeline(shared=True)


@pytest.fixture(scope="module")
def gray():
    """Random 16-bit gray values, [64, 64]."""
    return np.random.default_rng(0).integers(0, 2**16, (64, 64), dtype=np.uint16)


@pytest.fixture(scope="module")
def mask():
    painted = np.zeros((64, 64), bool)
    painted[20:41, 10:35] = True
    return painted


def paint(pipe, image, mask, **options):
    options = {"num_inference_steps": 1, "seed": 0} | options
    return pipe(image, mask, **options).images


@pytest.mark.parametrize("depth", [8, 16])
@pytest.mark.parametrize("form", ["pil", "np"])
def test_native_depth_and_background_bits(pipe, gray, mask, depth, form):
    values = (gray >> 8).astype(np.uint8) if depth == 8 else gray
    given_image = Image.fromarray(values) if form == "pil" else values
    (painted,) = paint(pipe, given_image, mask)
    assert painted.mode == ("L" if depth == 8 else "I;16")
    result = np.asarray(painted)
    assert result.dtype == values.dtype
    assert np.array_equal(result[~mask], values[~mask])
    assert (result[mask] != values[mask]).mean() > 0.9


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    mask=hnp.arrays(bool, (32, 32)),
    values=hnp.arrays(np.uint16, (32, 32), elements=st.integers(0, 2**16 - 1)),
    wide=st.booleans(),
)
def test_background_keeps_its_bits_under_any_mask(pipe, mask, values, wide):
    values = values if wide else (values >> 8).astype(np.uint8)
    (painted,) = paint(pipe, values, mask)
    assert np.array_equal(np.asarray(painted)[~mask], values[~mask])
    as_float = (values / 65535).astype(np.float32)
    painted = paint(pipe, as_float, mask, output_type="np")
    assert np.array_equal(painted[0, ~mask, 0], as_float[~mask])


def test_paste_back_can_be_turned_off(pipe, gray, mask):
    decoded = paint(pipe, gray, mask, paste_back=False, output_type="np")[0, ..., 0]
    assert np.abs(decoded - gray / 65535)[~mask].mean() > 0.01
    pasted = paint(pipe, gray, mask, output_type="np")[0, ..., 0]
    core = np.zeros_like(mask)
    core[22:39, 12:33] = True  # beyond the feather of two pixels
    assert np.array_equal(decoded[core], pasted[core])


def test_output_types_agree(pipe, gray, mask):
    tensor = paint(pipe, gray, mask, output_type="pt")
    assert tensor.shape == (1, 1, 64, 64)
    array = paint(pipe, gray, mask, output_type="np")
    assert array.shape == (1, 64, 64, 1)
    assert array.dtype == np.float32
    assert np.array_equal(array[0, ..., 0], tensor[0, 0].numpy())
    (pil,) = paint(pipe, gray, mask, output_type="pil")
    assert np.array_equal(np.asarray(pil), np.round(array[0, ..., 0] * 65535))
    latents = paint(pipe, gray, mask, output_type="latent")
    assert latents.shape == (1, 4, 16, 16)
    decoded = paint(pipe, gray, mask, output_type="pt", paste_back=False)
    assert torch.equal(pipe.decode_latents(latents), decoded)


def test_return_dict_off_gives_a_tuple(pipe, gray, mask):
    result = pipe(gray, mask, num_inference_steps=1, seed=0, output_type="pt", return_dict=False)
    assert isinstance(result, tuple)
    assert torch.equal(result[0], paint(pipe, gray, mask, output_type="pt"))


def test_latents_are_the_scaled_mode(pipe, gray):
    pixels = torch.from_numpy(gray / 32767.5 - 1).float()[None, None]
    moments = pipe.vae.encode(pixels).latent_dist
    assert torch.equal(pipe.encode_image(pixels), moments.mean * pipe.vae.config.scaling_factor)


def test_a_gray_mask_is_a_hard_mask(pipe, gray, mask):
    hard = paint(pipe, gray, mask.astype(np.float32), output_type="pt")
    assert torch.equal(paint(pipe, gray, mask * np.float32(0.6), output_type="pt"), hard)
    assert torch.equal(paint(pipe, gray, mask * np.uint8(200) + np.uint8(20), output_type="pt"), hard)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int64])
def test_a_mask_of_zeros_and_ones_is_painted(pipe, gray, mask, dtype):
    hard = paint(pipe, gray, mask, output_type="pt")
    for form in (mask.astype(dtype), torch.from_numpy(mask.astype(dtype)), list(mask.astype(dtype)[None])):
        assert torch.equal(paint(pipe, gray, form, output_type="pt"), hard)


def test_descriptions_come_as_mappings_or_attributes(pipe, gray, mask):
    mapping = {"finding_categories": ["Mass"], "breast_birads": "BI-RADS 4"}
    described = Attributes(finding_categories=("Mass",), breast_birads=4)
    first, second, nothing = (
        paint(pipe, gray, mask, attributes=attributes, output_type="latent")
        for attributes in (mapping, [described], None)
    )
    assert torch.equal(first, second)
    assert not torch.equal(first, nothing)


def test_height_and_width_resize_first(pipe, gray, mask):
    result = paint(pipe, gray, mask, height=32, width=48, output_type="np")
    assert result.shape == (1, 32, 48, 1)
    # a mask of another size fits after resizing
    result = paint(pipe, gray, mask[::2, ::2], height=64, width=64)
    assert np.array_equal(np.asarray(result[0])[~mask & _away(mask)], gray[~mask & _away(mask)])


def _away(mask):
    """The pixels that are two pixels or more away from the mask."""
    grown = mask.copy()
    for axis in (0, 1):
        grown |= np.roll(grown, 2, axis) | np.roll(grown, -2, axis)
    return ~grown


def test_an_empty_mask_gives_the_input_back(pipe, gray):
    (painted,) = paint(pipe, gray, np.zeros((64, 64), bool))
    assert np.array_equal(np.asarray(painted), gray)


GENERATOR = torch.Generator()
REFUSED = {
    "other-mask-size": (
        {"mask_image": np.zeros((32, 64), bool)},
        "mask_image is 64x32 but image is 64x64; expected the same size",
    ),
    "stride": (
        {"image": np.zeros((64, 40), np.uint8), "mask_image": np.zeros((64, 40), bool)},
        "image is 40x64; expected sides divisible by 16",
    ),
    "color": ({"image": Image.new("RGB", (64, 64))}, "image has PIL mode 'RGB'; expected a gray image (L or I;16)"),
    "nan": (
        {"image": np.full((64, 64), np.nan)},
        "image has values from nan to nan; expected [0, 1]",
    ),
    "batches": (
        {"image": np.zeros((2, 64, 64, 1)), "mask_image": np.zeros((3, 64, 64, 1))},
        "image has 2 entries; expected 1 or 3",
    ),
    "descriptions": (
        {"image": np.zeros((2, 64, 64, 1)), "attributes": [{}, {}, {}]},
        "image has 2 entries; expected 1 or 3",
    ),
    "no-descriptions": ({"attributes": []}, "attributes has 0 entries; expected 1 or 1"),
    "description": ({"attributes": 5}, "attributes hold 5; expected Attributes or a mapping"),
    "attribute": (
        {"attributes": {"view_position": "XCC"}},
        "view_position is 'XCC'; expected one of CC, MLO",
    ),
    "report": ({"report": [7]}, "report holds 7; expected text or None"),
    "report-embeds": (
        {"report_embeds": torch.zeros(1, 3, 8)},
        "report_embeds was given; this checkpoint has the built-in report encoder, pass report=",
    ),
    "no-strength": ({"strength": 0.0}, "strength is 0.0; expected more than 0 and at most 1"),
    "strength": ({"strength": 1.5}, "strength is 1.5; expected more than 0 and at most 1"),
    "strength-too-small": (
        {"strength": 0.05, "num_inference_steps": 10},
        "strength 0.05 of 10 steps leaves none; expected at least one",
    ),
    "steps": ({"num_inference_steps": 0}, "num_inference_steps is 0; expected at least 1"),
    "variants": ({"num_images_per_prompt": 0}, "num_images_per_prompt is 0; expected at least 1"),
    "guidance": ({"guidance_scale": float("nan")}, "guidance_scale is nan; expected a finite number"),
    "eta": ({"eta": -0.1}, "eta is -0.1; expected 0 to 1"),
    "output-type": ({"output_type": "jpeg"}, "output_type is 'jpeg'; expected one of pil, np, pt, latent"),
    "height": ({"height": 0}, "height and width are 0 and 64; expected at least 1"),
    "both-noises": ({"generator": GENERATOR}, "generator and seed were both given; expected one of them"),
    "generators": (
        {"seed": None, "generator": [GENERATOR] * 3},
        "generator has 3 entries; expected one per output image, 1",
    ),
    "seeds": (
        {"seed": [1, 2], "num_images_per_prompt": 3},
        "seed has 2 entries; expected one per output image, 3",
    ),
    "generator-tuple": (
        {"seed": None, "generator": (GENERATOR,)},
        "generator is a tuple; expected a torch.Generator, a list of them, or None",
    ),
    "numpy-seed": (
        {"seed": np.uint64(2**64 - 1), "num_images_per_prompt": 2},
        f"seed {2**64} is not an integer from 0 to 2^64 - 1",
    ),
    "callback-inputs": (
        {"callback_on_step_end_tensor_inputs": None},
        "callback_on_step_end_tensor_inputs is None; expected a list of names",
    ),
    "negative-seed": ({"seed": -1}, "seed -1 is not an integer from 0 to 2^64 - 1"),
    "latents": (
        {"latents": torch.zeros(1, 4, 8, 8)},
        "latents has shape [1, 4, 8, 8]; expected [1, 4, 16, 16]",
    ),
    "callback": (
        {"callback_on_step_end": print, "callback_on_step_end_tensor_inputs": ["prompt_embeds"]},
        "callback_on_step_end_tensor_inputs has 'prompt_embeds'; expected latents, noise, image_latents",
    ),
}


@pytest.mark.parametrize(("options", "sentence"), REFUSED.values(), ids=REFUSED)
def test_refused(pipe, mask, options, sentence):
    given_options = {"image": np.zeros((64, 64), np.uint8), "mask_image": mask, "num_inference_steps": 1, "seed": 0}
    with pytest.raises(GBCIError) as raised:
        pipe(**given_options | options)
    assert str(raised.value) == sentence


def test_more_steps_than_the_scheduler_has(pipe, gray, mask):
    with pytest.raises(GBCIError, match=r"^num_inference_steps 1001 does not suit DDIMScheduler: "):
        paint(pipe, gray, mask, num_inference_steps=1001)


def test_external_encoder_refuses_text(pipe, gray, mask):
    encoder = ConditionEncoder(image_size=64, width=64, depth=1, pooled_dim=64, report_width=8)
    external = GBCIPipeline(**{**pipe.components, "conditioner": encoder})
    for options, sentence in (
        ({"report": "mass"}, "report was given; this checkpoint has an external text encoder, pass report_embeds="),
        ({"report_embeds": torch.zeros(1, 3, 9)}, "report_embeds has shape [1, 3, 9]; expected [B, M, 8]"),
        (
            {"report_embeds": torch.zeros(1, 3, 8), "report_mask": torch.ones(1, 2)},
            "report_mask has shape [1, 2]; expected [1, 3]",
        ),
    ):
        with pytest.raises(GBCIError) as raised:
            paint(external, gray, mask, **options)
        assert str(raised.value) == sentence
