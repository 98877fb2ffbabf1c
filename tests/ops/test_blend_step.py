"""blend_step against its definition over shapes, dtypes, solvers and layouts; torch.library's contracts; rejections."""

import functools
import itertools
import re
from dataclasses import astuple

import pytest
import torch

from gbci_fast.model.noise import seed_tensor
from gbci_fast.ops.blend_step import StepCoefficients, blend_step, blend_step_ref

SHAPES = {
    "minimal": (1, 1, 1, 1),
    "odd": (3, 3, 7, 11),
    "sampler": (2, 4, 56, 56),
    "wide": (2, 18, 20, 13),  # many channels, and a number of positions that no block size divides
}
DTYPES = {  # of the state, of the model
    "fp32": (torch.float32, torch.float32),
    "fp32-bf16": (torch.float32, torch.bfloat16),
    "fp32-fp16": (torch.float32, torch.float16),
    "bf16": (torch.bfloat16, torch.bfloat16),
    "fp16": (torch.float16, torch.float16),
    "fp64": (torch.float64, torch.float64),
}

# One step from alpha 0.6, sigma 0.8 to 0.8, 0.6 (Euler: sigma 2 to 1.5), with every kind of term that a solver has.
EPSILON = {"denoised_from_latents": 1 / 0.6, "denoised_from_output": -0.8 / 0.6}
VELOCITY = {"denoised_from_latents": 0.6, "denoised_from_output": -0.8}
SAMPLE = {"denoised_from_latents": 0.0, "denoised_from_output": 1.0}
KNOWN = {"known_from_latents": 0.8, "known_from_noise": 0.6}
SOLVERS = {
    "ddim": StepCoefficients(**EPSILON, **KNOWN, next_from_denoised=0.8, next_from_output=0.6),
    "ddim_eta": StepCoefficients(
        **VELOCITY, **KNOWN, next_from_corrected=0.4, next_from_output=0.3, next_from_denoised=0.8, next_from_noise=0.35
    ),
    "euler": StepCoefficients(
        denoised_from_latents=1.0, denoised_from_output=-2.0, next_from_corrected=1.0, next_from_output=-0.5,
        known_from_noise=1.5, input_from_latents=0.55,
    ),
    "dpmpp_2m": StepCoefficients(
        **SAMPLE, **KNOWN, next_from_corrected=0.75, next_from_denoised=0.5, next_from_older=-0.15
    ),
    "unipc": StepCoefficients(
        **EPSILON, **KNOWN, corrected_from_corrected=0.9, corrected_from_previous=0.3, corrected_from_older=-0.1,
        corrected_from_denoised=0.15, next_from_corrected=0.75, next_from_denoised=0.5, next_from_previous=-0.2,
    ),
    "lcm": StepCoefficients(**EPSILON, **KNOWN, next_from_denoised=0.8, next_from_noise=0.6),
    "last": StepCoefficients(**EPSILON, next_from_denoised=1.0),
}  # fmt: skip
CLIPPED = ("ddim", "lcm")
GUIDANCE = {
    "absent": {},
    "broadcast": {"guidance_scale": 3.0},
    "full": {"guidance_scale": 3.0},
    "rescaled": {"guidance_scale": 5.0, "guidance_rescale": 0.7},
}


def channel_slice(tensor, memory_format):
    """The same values as a slice of a wider tensor of that format, from channel 3 on."""
    batch, channels, height, width = tensor.shape
    wider = torch.full((batch, channels + 5, height, width), torch.nan, dtype=tensor.dtype)
    part = wider.contiguous(memory_format=memory_format)[:, 3 : 3 + channels]
    return part.copy_(tensor)


LAYOUTS = {
    "nchw": lambda tensor: tensor.clone(memory_format=torch.contiguous_format),
    "channels_last": lambda tensor: tensor.clone(memory_format=torch.channels_last),
    "channel_slice": lambda tensor: channel_slice(tensor, torch.contiguous_format),
    "channels_last_slice": lambda tensor: channel_slice(tensor, torch.channels_last),
}


def problem(shape, dtypes, solver, guidance="full", *, known=True):
    """Arguments of `blend_step`, every tensor NCHW and of normal values; `noise` and `seeds` are left to the caller."""
    generator = torch.Generator().manual_seed(sum(shape))
    state, model = dtypes

    def normal(dtype, *, batch=shape[0]):
        return torch.randn(batch, *shape[1:], generator=generator, dtype=torch.float64).to(dtype)

    arguments = {
        "latents": normal(state),
        "conditional": normal(model),
        "coefficients": SOLVERS[solver],
        "clip": 1.0 if solver in CLIPPED else None,
        "previous": normal(state),
        "denoised": normal(state),
        "corrected": normal(state),
        "model_input": normal(model),
        "step": 7,
        **GUIDANCE[guidance],
    }
    if guidance != "absent":
        arguments["unconditional"] = normal(model, batch=1 if guidance == "broadcast" else shape[0])
    if known:
        weight = torch.rand(shape[0], 1, *shape[2:], generator=generator, dtype=torch.float64)
        real = torch.float64 if state == torch.float64 else torch.float32
        arguments |= {
            "known": normal(state), "known_noise": normal(state), "weight": (2 * weight - 0.5).clamp(0, 1).to(real),
        }  # fmt: skip
    return arguments


def with_seeds(arguments):
    return arguments | {"seeds": seed_tensor(2**63 + i for i in range(len(arguments["latents"])))}


STATE = ("latents", "previous", "denoised", "corrected", "noise", "known", "known_noise")
MODEL = ("conditional", "unconditional", "model_input")


def converted(arguments, convert_state, convert_model=None, names=STATE + MODEL):
    """The arguments with their state tensors and model tensors converted."""
    converts = dict.fromkeys(STATE, convert_state) | dict.fromkeys(MODEL, convert_model or convert_state)
    return arguments | {
        name: converts[name](arguments[name]) for name in names if isinstance(arguments.get(name), torch.Tensor)
    }


def outputs(function, arguments):
    """Everything that the step computes. The arguments keep their values, except `out`."""
    kept = {
        name: arguments[name].clone(memory_format=torch.preserve_format) if name in arguments else None
        for name in ("denoised", "corrected", "model_input")
    }
    result = {"out": function(**arguments).clone()}
    for name, values in kept.items():
        if values is not None:
            result[name] = arguments[name].clone()
            arguments[name].copy_(values)
    return result


@pytest.fixture
def assert_exact(assert_as_exact_as_eager):
    """`assert_exact(arguments)`: every output of the step is as exact as eager PyTorch's."""
    ours, reference = (functools.partial(outputs, step) for step in (blend_step, blend_step_ref))
    return lambda arguments: assert_as_exact_as_eager(ours, reference, (arguments,))


def assert_same_bits(left, right):
    assert left.keys() == right.keys()
    for name, values in left.items():
        torch.testing.assert_close(values, right[name], rtol=0, atol=0, equal_nan=True, msg=name)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("dtypes", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.filterwarnings("ignore:std:UserWarning")  # of a sample of one element: NaN, here as there
def test_is_as_exact_as_eager(shape, dtypes, solver, assert_exact):
    for guidance in GUIDANCE:
        assert_exact(with_seeds(problem(shape, dtypes, solver, guidance)))


@pytest.mark.parametrize("dtypes", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("solver", SOLVERS)
def test_noise_of_the_caller(solver, dtypes, assert_exact):
    noise = torch.randn(SHAPES["odd"], generator=torch.Generator().manual_seed(9))
    assert_exact(problem(SHAPES["odd"], dtypes, solver) | {"noise": noise.to(dtypes[0])})


@pytest.mark.parametrize("guidance", ["absent", "broadcast", "full"])
@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("dtypes", DTYPES.values(), ids=DTYPES)
def test_rounds_as_the_reference(dtypes, solver, guidance):
    """Bit for bit, without drawn noise and without torch.lerp, which contracts: the order of operations is the same."""
    arguments = problem(SHAPES["odd"], dtypes, solver, guidance, known=False)
    arguments["noise"] = arguments["previous"].flip(0)
    assert_same_bits(outputs(blend_step, arguments), outputs(blend_step_ref, arguments))


@pytest.mark.parametrize("guidance", ["full", "rescaled"])
@pytest.mark.parametrize("dtypes", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("shape", ["odd", "sampler", "wide"])
def test_layouts_give_the_same_bits(shape, dtypes, guidance):
    plain = with_seeds(problem(SHAPES[shape], dtypes, "unipc", guidance))
    expected = outputs(blend_step, plain)
    for state_layout, model_layout in itertools.product(LAYOUTS.values(), repeat=2):
        strided = converted(plain, state_layout, model_layout)
        strided["out"] = state_layout(torch.zeros_like(plain["latents"]))
        assert_same_bits(outputs(blend_step, strided), expected)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_expanded_tensors_are_read_by_their_strides(shape):
    plain = with_seeds(problem(shape, DTYPES["fp32"], "ddim_eta"))
    expanded = dict(plain)
    for name in ("latents", "conditional", "unconditional", "known", "known_noise", "weight"):
        expanded[name] = plain[name][:1].expand_as(plain[name])
        plain[name] = expanded[name].clone(memory_format=torch.contiguous_format)
    assert_same_bits(outputs(blend_step, expanded), outputs(blend_step, plain))
    level = torch.full((), 0.25).expand_as(plain["weight"])  # stride 0 along every axis
    assert_same_bits(
        outputs(blend_step, plain | {"weight": level}), outputs(blend_step, plain | {"weight": level.clone()})
    )


def test_what_lies_beside_a_written_slice_is_left_alone():
    arguments = with_seeds(problem(SHAPES["odd"], DTYPES["fp32"], "unipc"))
    arguments |= {"out": channel_slice(arguments["latents"], torch.channels_last)}
    blend_step(**arguments)
    beside = arguments["out"]._base
    assert beside.isnan().sum() == beside.numel() - arguments["out"].numel()


@pytest.mark.parametrize("dtypes", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("solver", SOLVERS)
def test_in_place(solver, dtypes):
    plain = with_seeds(problem(SHAPES["sampler"], dtypes, solver))
    expected = outputs(blend_step, plain)
    for layout in LAYOUTS.values():
        arguments = converted(plain, layout)
        assert blend_step(**arguments, out=arguments["latents"]) is arguments["latents"]
        assert torch.equal(arguments["latents"], expected["out"])


@pytest.mark.parametrize("dtypes", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("solver", SOLVERS)
def test_a_term_whose_coefficient_is_0_is_not_read(solver, dtypes):
    arguments = problem(SHAPES["odd"], dtypes, solver)
    arguments["noise"] = arguments["previous"].flip(0)
    a = arguments["coefficients"]
    unread = {
        "latents": a.denoised_from_latents == 0 and (a.has_corrector or a.next_from_corrected == 0),
        "conditional": a.denoised_from_output == 0 and a.next_from_output == 0,
        "unconditional": a.denoised_from_output == 0 and a.next_from_output == 0,
        "previous": a.corrected_from_previous == 0 and a.next_from_previous == 0,
        "denoised": a.corrected_from_older == 0 and a.next_from_older == 0,
        "corrected": a.corrected_from_corrected == 0,
        "noise": a.next_from_noise == 0,
        "known": a.known_from_latents == 0,
        "known_noise": a.known_from_noise == 0,
    }
    garbage = {name: torch.full_like(arguments[name], torch.nan) for name, skipped in unread.items() if skipped}
    assert_same_bits(outputs(blend_step, arguments | garbage), outputs(blend_step, arguments))


def test_a_sum_that_nothing_needs_reads_nothing():
    """The denoised sample and z have coefficients, but are neither written nor part of the next latents."""
    latents, garbage = torch.ones(1, 1, 2, 2), torch.full((1, 1, 2, 2), torch.nan)
    a = StepCoefficients(
        denoised_from_latents=1, denoised_from_output=1, corrected_from_previous=1, next_from_noise=2.0
    )
    out = blend_step(garbage, garbage, garbage, coefficients=a, previous=garbage, noise=latents)
    assert torch.equal(out, 2 * latents)
    zero = blend_step(garbage, garbage, coefficients=StepCoefficients(denoised_from_latents=0, denoised_from_output=0))
    assert torch.equal(zero, torch.zeros_like(latents))


def test_a_nan_of_the_model_stays_one():
    arguments = problem(SHAPES["odd"], DTYPES["fp32"], "ddim", "absent", known=False)
    arguments["conditional"][1, 2, 3, 4] = torch.nan
    out = blend_step(**arguments)
    assert out[1, 2, 3, 4].isnan()
    assert out.isnan().sum() == 1
    arguments |= {"unconditional": torch.zeros_like(out), "guidance_rescale": 0.5}
    assert torch.equal(blend_step(**arguments).isnan().flatten(1).all(1), torch.tensor([False, True, False]))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_numbers_are_converted_as_torch_does(dtype, layout):
    """Every 16-bit number to float32; and back: those floats, the midpoints between them, and their neighbors."""
    shape, unused = (1, 4, 128, 128), {"denoised_from_latents": 0.0, "denoised_from_output": 0.0}
    every = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype).view(shape)
    conditional, out = every.contiguous(memory_format=layout), torch.empty(shape)
    blend_step(out, conditional, coefficients=StepCoefficients(**unused, next_from_output=1.0), out=out)
    torch.testing.assert_close(out, every.float(), rtol=0, atol=0, equal_nan=True)

    halfway = (out.flatten() + out.flatten().roll(-1)).view(shape) / 2
    for numbers in (out, halfway):
        for offset in (-1, 0, 1):
            beside = (numbers.view(torch.int32) + offset).view(torch.float32)
            narrow = torch.empty_like(conditional)
            a = StepCoefficients(**unused, next_from_corrected=1.0)
            blend_step(beside, conditional, coefficients=a, model_input=narrow)
            torch.testing.assert_close(narrow, beside.to(dtype), rtol=0, atol=0, equal_nan=True)


# An argument list in the operator's own order.
def operator_arguments(arguments, **changes):
    arguments = {"out": torch.empty_like(arguments["latents"])} | arguments | changes
    optional = (
        "unconditional", "previous", "denoised", "corrected", "noise", "seeds", "known", "known_noise", "weight",
        "model_input",
    )  # fmt: skip
    coefficients = arguments["coefficients"]
    return (
        arguments["latents"], arguments["conditional"], *(arguments.get(name) for name in optional), arguments["out"],
        list(astuple(coefficients)) if isinstance(coefficients, StepCoefficients) else coefficients,
        arguments.get("clip"), arguments.get("guidance_scale", 1.0), arguments.get("guidance_rescale", 0.0),
        arguments.get("step", 0), arguments.get("stream", 1),
    )  # fmt: skip


@pytest.mark.parametrize("solver", SOLVERS)
def test_opcheck(solver):
    arguments = with_seeds(problem(SHAPES["odd"], DTYPES["fp32-bf16"], solver))
    torch.library.opcheck(torch.ops.gbci_fast.blend_step.default, operator_arguments(arguments))


def two_steps(latents, conditional, unconditional, denoised, known, known_noise, weight, seeds, in_place):
    """A sampler's inner loop."""
    for step, solver in enumerate(("ddim_eta", "dpmpp_2m")):
        latents = blend_step(
            latents * 1.0 if step == 0 else latents, conditional, unconditional, coefficients=SOLVERS[solver],
            guidance_scale=2.0, denoised=denoised, seeds=seeds, step=step, known=known, known_noise=known_noise,
            weight=weight, out=latents if in_place and step else None,
        )  # fmt: skip
    return latents, denoised + 1


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("in_place", [False, True], ids=["new", "in_place"])
def test_compiles_without_graph_breaks(in_place, backend):
    torch._dynamo.reset()
    arguments = with_seeds(problem(SHAPES["odd"], DTYPES["fp32-bf16"], "dpmpp_2m"))
    names = ("latents", "conditional", "unconditional", "denoised", "known", "known_noise", "weight", "seeds")

    def run(function):
        results = function(*(arguments[name].clone() for name in names), in_place)
        return dict(zip(("latents", "denoised"), results, strict=True))

    assert_same_bits(run(torch.compile(two_steps, fullgraph=True, backend=backend)), run(two_steps))


ODD = SHAPES["odd"]
STATE_DTYPES = "latents must be a Float, BFloat16, Half or Double tensor [B, C, H, W], got "
LAYOUT = " must be NCHW, channels-last or a slice of their channels, so that H and W flatten; got shape "
REJECTIONS = {
    "dtype": ({"latents": torch.ones(ODD).int()}, STATE_DTYPES + "Int [3, 3, 7, 11]"),
    "axes": ({"latents": torch.ones(3, 7, 11)}, STATE_DTYPES + "Float [3, 7, 11]"),
    "empty batch": ({"latents": torch.ones(0, 3, 7, 11)}, "latents must not be empty, got [0, 3, 7, 11]"),
    "model's dtype": (
        {"conditional": torch.ones(ODD).double()},
        "conditional must be Float, BFloat16 or Half beside Float latents, got Double",
    ),
    "model's dtype beside bfloat16": (
        {"latents": torch.ones(ODD).bfloat16()},
        "conditional must be BFloat16 like latents, got Float",
    ),
    "two model dtypes": (
        {"unconditional": torch.ones(ODD).bfloat16()},
        "unconditional must be Float like conditional, got BFloat16",
    ),
    "model_input's dtype": (
        {"model_input": torch.ones(ODD).half()},
        "model_input must be Float like conditional, got Half",
    ),
    "state's dtype": ({"known": torch.ones(ODD).half()}, "known must be Float like latents, got Half"),
    "weight's dtype": ({"weight": torch.ones(3, 1, 7, 11).double()}, "weight must be Float, got Double"),
    "device": ({"known": torch.ones(ODD, device="meta")}, "tensors must be on cpu like latents, got one on meta"),
    "shape": ({"previous": torch.ones(3, 3, 11, 7)}, "previous must have shape [3, 3, 7, 11], got [3, 3, 11, 7]"),
    "shape of conditional": (
        {"conditional": torch.ones(1, 3, 7, 11)},
        "conditional must have shape [3, 3, 7, 11], got [1, 3, 7, 11]",
    ),
    "shape of unconditional": (
        {"unconditional": torch.ones(2, 3, 7, 11)},
        "unconditional must have shape [3, 3, 7, 11] or [1, 3, 7, 11], got [2, 3, 7, 11]",
    ),
    "shape of weight": ({"weight": torch.ones(ODD)}, "weight must have shape [3, 1, 7, 11], got [3, 3, 7, 11]"),
    "shape of out": ({"out": torch.ones(3, 3, 77)}, "out must have shape [3, 3, 7, 11], got [3, 3, 77]"),
    "layout": (
        {"known_noise": torch.ones(3, 3, 11, 7).mT},
        "known_noise" + LAYOUT + "[3, 3, 7, 11] with strides [231, 77, 1, 7]",
    ),
    "layout of a crop": (
        {"out": torch.ones(3, 3, 7, 12)[..., 1:]},
        "out" + LAYOUT + "[3, 3, 7, 11] with strides [252, 84, 12, 1]",
    ),
    "expanded output": (
        {"denoised": torch.ones(1, 3, 7, 11).expand(ODD)},
        "denoised is written and must not be expanded; got shape [3, 3, 7, 11] with strides [0, 77, 11, 1]",
    ),
    "seeds' dtype": ({"seeds": torch.ones(3)}, "seeds must be a Long tensor [3], got Float [3]"),
    "seeds' shape": ({"seeds": torch.ones(2, dtype=torch.long)}, "seeds must be a Long tensor [3], got Long [2]"),
    "noise and seeds": ({"noise": torch.ones(ODD)}, "noise and seeds were both given; expected one of them"),
    "known alone": ({"weight": None}, "known was given without weight; expected both"),
    "weight alone": ({"known": None}, "weight was given without known; expected both"),
    "no noise": ({"seeds": None}, "noise or seeds must be given where next_from_noise is not 0, got 0.35"),
    "no known_noise": ({"known_noise": None}, "known_noise must be given where known_from_noise is not 0, got 0.6"),
    "no previous": (
        {"coefficients": SOLVERS["unipc"], "previous": None},
        "previous must be given where corrected_from_previous is not 0, got 0.3",
    ),
    "no denoised": (
        {"coefficients": SOLVERS["dpmpp_2m"], "denoised": None},
        "denoised must be given where next_from_older is not 0, got -0.15",
    ),
    "no corrected": (
        {"coefficients": SOLVERS["unipc"], "corrected": None},
        "corrected must be given where corrected_from_corrected is not 0, got 0.9",
    ),
    "a coefficient too few": ({"coefficients": [0.0] * 14}, "coefficients must be 15 numbers, got 14"),
    "coefficient": (
        {"coefficients": [0.0] * 10 + [float("nan")] + [0.0] * 4},
        "next_from_older must be finite, got nan",
    ),
    "coefficient above float32": (
        {"coefficients": [1e39] + [0.0] * 14},
        "denoised_from_latents must be finite, got 1e+39",
    ),
    "guidance_scale": ({"guidance_scale": float("inf")}, "guidance_scale must be finite, got inf"),
    "guidance_rescale": ({"guidance_rescale": 1.5}, "guidance_rescale must be from 0 to 1, got 1.5"),
    "guidance_rescale NaN": ({"guidance_rescale": float("nan")}, "guidance_rescale must be from 0 to 1, got nan"),
    "clip": ({"clip": -1.0}, "clip must be finite and at least 0, got -1"),
    "clip NaN": ({"clip": float("nan")}, "clip must be finite and at least 0, got nan"),
    "step": ({"step": -1}, "step must be from 0 to 2^32 - 1, got -1"),
    "stream": ({"stream": 2**32}, "stream must be from 0 to 2^32 - 1, got 4294967296"),
}  # fmt: skip


@pytest.mark.parametrize(("position", "name"), enumerate(vars(SOLVERS["ddim"])))
def test_the_extension_calls_every_coefficient_by_its_name(position, name):
    coefficients = SOLVERS["ddim"].values()
    coefficients[position] = float("inf")
    arguments = operator_arguments(problem(ODD, DTYPES["fp32"], "ddim"), coefficients=coefficients)
    with pytest.raises(RuntimeError, match=f"{name} must be finite, got inf$"):
        torch.ops.gbci_fast.blend_step(*arguments)


@pytest.mark.parametrize(("changes", "message"), REJECTIONS.values(), ids=REJECTIONS)
def test_bad_arguments_are_named_and_nothing_is_written(changes, message):
    arguments = with_seeds(problem(ODD, DTYPES["fp32"], "ddim_eta"))
    out = torch.full(ODD, 5.0)
    arguments = operator_arguments(arguments, **({"out": out} | changes))
    with pytest.raises(RuntimeError, match=re.escape(message) + "$"):
        torch.ops.gbci_fast.blend_step(*arguments)
    assert (out == 5).all()
