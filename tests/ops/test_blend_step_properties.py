"""Properties of blend_step for any coefficients, shapes, dtypes and layouts."""

import math
from dataclasses import fields, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gbci_fast.model.noise import seed_tensor
from gbci_fast.ops.blend_step import StepCoefficients, blend_step

PROPERTIES = settings(derandomize=True, deadline=None, max_examples=60)
STATES = {torch.float32: torch.float32, torch.bfloat16: torch.float32, torch.float64: torch.float64}
READ = ("latents", "conditional", "unconditional", "previous", "known", "known_noise", "weight", "seeds")
WRITTEN = ("denoised", "corrected", "model_input")

coefficient = st.one_of(st.just(0.0), st.just(1.0), st.floats(-2, 2, width=32))
coefficients = st.builds(StepCoefficients, **{field.name: coefficient for field in fields(StepCoefficients)})
shapes = st.tuples(st.integers(1, 4), st.integers(1, 6), st.integers(1, 40), st.integers(1, 40))


@st.composite
def problems(draw, *, known=True):
    """Random arguments of `blend_step`, all that it takes."""
    shape, state = draw(shapes), draw(st.sampled_from(list(STATES)))
    model = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16])) if state == torch.float32 else state
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))

    def normal(dtype, *size):
        return torch.randn(size, generator=generator, dtype=torch.float64).to(dtype)

    def layout(tensor):
        return tensor.contiguous(memory_format=draw(st.sampled_from([torch.contiguous_format, torch.channels_last])))

    arguments = {name: layout(normal(state, *shape)) for name in ("latents", "previous", "denoised", "corrected")}
    arguments |= {name: layout(normal(model, *shape)) for name in ("conditional", "model_input")}
    if draw(st.booleans()):
        arguments["unconditional"] = layout(normal(model, *shape))
    if known:
        arguments |= {name: layout(normal(state, *shape)) for name in ("known", "known_noise")}
        arguments["weight"] = normal(STATES[state], shape[0], 1, *shape[2:]).clamp(0, 1)
    return arguments | {
        "coefficients": draw(coefficients),
        "clip": draw(st.sampled_from([None, 0.5])),
        "guidance_scale": draw(st.floats(0, 8)),
        # A sample of one element has no standard deviation.
        "guidance_rescale": draw(st.sampled_from([0.0, 0.7])) if math.prod(shape[1:]) > 1 else 0.0,
        "seeds": seed_tensor(draw(st.integers(0, 2**64 - 1)) for _ in range(shape[0])),
        "step": draw(st.integers(0, 2**32 - 1)),
    }


def outputs(arguments):
    """The outputs of the step. The arguments keep their values."""
    written = {name: arguments[name].clone() for name in WRITTEN}
    return {"out": blend_step(**(arguments | written)), **written}


def assert_same_bits(left, right):
    for name, values in left.items():
        torch.testing.assert_close(values, right[name], rtol=0, atol=0, equal_nan=True, msg=name)


@PROPERTIES
@given(problems())
def test_weight_0_gives_the_known_latents_at_their_noise_level(arguments):
    arguments["weight"] = torch.zeros_like(arguments["weight"])
    a, real = arguments["coefficients"], arguments["weight"].dtype
    known = a.known_from_latents * arguments["known"].to(real) + a.known_from_noise * arguments["known_noise"].to(real)
    assert_same_bits({"out": known.to(arguments["latents"].dtype)}, outputs(arguments))


@PROPERTIES
@given(problems())
def test_weight_1_gives_the_sampler_without_a_known_region(arguments):
    arguments["weight"] = torch.ones_like(arguments["weight"])
    absent = {"known": None, "known_noise": None, "weight": None}
    assert_same_bits(outputs(arguments), outputs(arguments | absent))


@PROPERTIES
@given(problems(), st.randoms(use_true_random=False))
def test_permuting_the_batch_permutes_the_output(arguments, random):
    order = list(range(len(arguments["latents"])))
    random.shuffle(order)
    permuted = {name: value[order] if isinstance(value, torch.Tensor) else value for name, value in arguments.items()}
    assert_same_bits({name: value[order] for name, value in outputs(arguments).items()}, outputs(permuted))


@PROPERTIES
@given(problems())
def test_a_batch_of_one_is_the_row_of_the_batch(arguments):
    last = {name: value[-1:] if isinstance(value, torch.Tensor) else value for name, value in arguments.items()}
    assert_same_bits({name: value[-1:] for name, value in outputs(arguments).items()}, outputs(last))


@PROPERTIES
@given(problems(), st.lists(st.sampled_from(["nchw", "channels_last", "slice"]), min_size=14, max_size=14))
def test_layouts_do_not_change_a_bit(arguments, layouts):
    def converted(tensor, layout):
        if layout == "slice":  # of channels-last memory, beside other channels
            wider = torch.cat([tensor, tensor, tensor], 1).contiguous(memory_format=torch.channels_last)
            return wider[:, tensor.shape[1] : 2 * tensor.shape[1]]
        formats = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}
        return tensor.clone(memory_format=formats[layout])

    tensors = [name for name in READ[:-1] + WRITTEN if name in arguments]
    strided = {name: converted(arguments[name], layout) for name, layout in zip(tensors, layouts, strict=False)}
    results = {"out": blend_step(**(arguments | strided)), **{name: strided[name] for name in WRITTEN}}
    assert_same_bits(results, outputs(arguments))


@pytest.mark.parametrize("rescale", [0.0, 0.7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_number_of_threads_does_not_change_a_bit(dtype, rescale):
    shape, generator = (12, 4, 61, 59), torch.Generator().manual_seed(0)
    arguments = {name: torch.randn(shape, dtype=dtype, generator=generator) for name in (*READ[:-2], *WRITTEN)}
    arguments["weight"] = torch.rand(12, 1, 61, 59, dtype=dtype, generator=generator)
    arguments["seeds"] = seed_tensor(range(12))
    arguments |= {"guidance_scale": 4.0, "guidance_rescale": rescale}
    arguments["coefficients"] = StepCoefficients(**{field.name: 0.7 for field in fields(StepCoefficients)})
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            results.append(outputs(arguments))
    finally:
        torch.set_num_threads(threads)
    assert_same_bits(results[0], results[1])
    assert_same_bits(results[0], results[2])


COEFFICIENTS_OF = {
    ("conditional", "unconditional"): ("denoised_from_output", "next_from_output"),
    ("previous",): ("corrected_from_previous", "next_from_previous"),
    ("denoised",): ("corrected_from_older", "next_from_older"),
    ("corrected",): ("corrected_from_corrected",),
    ("noise",): ("next_from_noise",),
    ("known",): ("known_from_latents",),
    ("known_noise",): ("known_from_noise",),
}


@PROPERTIES
@given(problems(), st.sampled_from(list(COEFFICIENTS_OF)))
def test_a_coefficient_of_0_is_a_tensor_of_zeros_that_is_not_read(arguments, names):
    # One coefficient of the corrector stays: without any, z would be `latents`.
    arguments["coefficients"] = replace(arguments["coefficients"], corrected_from_denoised=0.5)
    zeroed = replace(arguments["coefficients"], **dict.fromkeys(COEFFICIENTS_OF[names], 0.0))
    arguments |= {"noise": arguments["latents"], "seeds": None, "guidance_rescale": 0.0}
    zeros, garbage = (
        {name: torch.full_like(arguments[name], value) for name in names if name in arguments}
        for value in (0.0, torch.nan)
    )
    assert_same_bits(outputs(arguments | garbage | {"coefficients": zeroed}), outputs(arguments | zeros))
