"""blend_step on CUDA: the bits of the CPU in every layout; one launch on the current stream; CUDA graphs."""

from dataclasses import replace

import pytest
import torch

from gbci_fast.model.noise import seed_tensor
from gbci_fast.ops.blend_step import StepCoefficients, blend_step, blend_step_ref

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

DEVICE = torch.device("cuda")
SHAPES = {
    "minimal": (1, 1, 1, 1),
    "odd": (3, 3, 7, 11),  # neither positions nor channels come in fours
    "odd_channels": (2, 3, 6, 6),
    "sampler": (5, 4, 56, 56),
    "wide": (2, 12, 10, 14),
}
DTYPES = {  # of the state, of the model
    "fp32": (torch.float32, torch.float32),
    "fp32-bf16": (torch.float32, torch.bfloat16),
    "fp32-fp16": (torch.float32, torch.float16),
    "bf16": (torch.bfloat16, torch.bfloat16),
    "fp16": (torch.float16, torch.float16),
}
DDIM = StepCoefficients(
    denoised_from_latents=1 / 0.6, denoised_from_output=-0.8 / 0.6, next_from_denoised=0.8, next_from_output=0.6,
    known_from_latents=0.8, known_from_noise=0.6,
)  # fmt: skip
STEPS = {
    "ddim": DDIM,
    "ddim_eta": replace(DDIM, next_from_output=0.5, next_from_noise=0.3),
    "every term": StepCoefficients(
        denoised_from_latents=1.1, denoised_from_output=-0.4, corrected_from_corrected=0.9,
        corrected_from_previous=0.3, corrected_from_older=-0.1, corrected_from_denoised=0.15, next_from_corrected=0.75,
        next_from_output=-0.2, next_from_denoised=0.5, next_from_previous=-0.25, next_from_older=0.05,
        next_from_noise=0.35, known_from_latents=0.9, known_from_noise=0.45, input_from_latents=0.55,
    ),
}  # fmt: skip
STATE = ("latents", "previous", "denoised", "corrected", "noise", "known", "known_noise", "out")
MODEL = ("conditional", "unconditional", "model_input")


def problem(shape, dtypes, coefficients):
    """Arguments of `blend_step` on the CPU, with every tensor that a step may have; NCHW, normal values."""
    generator = torch.Generator().manual_seed(sum(shape))
    dtype = dict.fromkeys(STATE, dtypes[0]) | dict.fromkeys(MODEL, dtypes[1])
    arguments = {name: torch.randn(shape, generator=generator).to(dtype[name]) for name in dtype if name != "noise"}
    weight = torch.rand(shape[0], 1, *shape[2:], generator=generator)
    return arguments | {
        "coefficients": coefficients,
        "guidance_scale": 3.0,
        "clip": 1.5,
        "seeds": seed_tensor(2**63 + i for i in range(shape[0])),
        "step": 7,
        "weight": (2 * weight - 0.5).clamp(0, 1),
    }


def channel_slice(tensor, memory_format=torch.contiguous_format):
    """The same values as channels of a wider tensor, whose other channels are NaN."""
    batch, channels, *sides = tensor.shape
    wider = tensor.new_full((batch, channels + 5, *sides), torch.nan).contiguous(memory_format=memory_format)
    return wider[:, 3 : 3 + channels].copy_(tensor)


def misaligned(tensor):
    """The same values, one element past an aligned address."""
    memory = tensor.new_empty(tensor.numel() + 1)[1:]
    return memory.view(tensor.shape).copy_(tensor)


def channels_last(tensor):
    return tensor.clone(memory_format=torch.channels_last)


LAYOUTS = {  # of the state, of the model
    "nchw": (torch.clone, torch.clone),
    "channels_last": (channels_last, channels_last),
    "channels_last model": (torch.clone, channels_last),
    "channels_last state": (channels_last, torch.clone),
    "slice": (channel_slice, torch.clone),
    "channels_last slice": (channels_last, lambda tensor: channel_slice(tensor, torch.channels_last)),
    "misaligned": (misaligned, misaligned),
}


def moved(arguments, device, layouts=LAYOUTS["nchw"]):
    """The arguments on a device, in a layout; the originals stay as they are."""
    state, model = layouts
    place = dict.fromkeys(STATE, state) | dict.fromkeys(MODEL, model)
    return {
        name: place.get(name, torch.clone)(value.to(device)) if isinstance(value, torch.Tensor) else value
        for name, value in arguments.items()
    }


def outputs(arguments, device, layouts=LAYOUTS["nchw"], function=blend_step):
    """Everything that a step writes, back on the CPU."""
    there = moved(arguments, device, layouts)
    assert function(**there) is there["out"]
    return {name: there[name].cpu() for name in ("out", "denoised", "corrected", "model_input")}


def assert_same_bits(ours, expected):
    for name, values in ours.items():
        torch.testing.assert_close(values, expected[name], rtol=0, atol=0, equal_nan=True, msg=name)


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("dtypes", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_gives_the_bits_of_the_cpu(shape, dtypes, step):
    arguments = problem(shape, dtypes, STEPS[step])
    expected = outputs(arguments, "cpu")
    for layouts in LAYOUTS.values():
        assert_same_bits(outputs(arguments, DEVICE, layouts), expected)


@pytest.mark.parametrize("absent", ["unconditional", "clip", "known", "model_input", "denoised", "seeds"])
@pytest.mark.parametrize("layouts", [LAYOUTS["nchw"], LAYOUTS["channels_last"]], ids=["nchw", "channels_last"])
def test_gives_the_bits_of_the_cpu_without(layouts, absent):
    arguments = problem(SHAPES["sampler"], DTYPES["fp32-bf16"], STEPS["ddim_eta"]) | {absent: None}
    if absent == "known":
        arguments["weight"] = None
    if absent == "seeds":
        arguments["noise"] = arguments["previous"].flip(0)
    written = [name for name in ("out", "denoised", "corrected", "model_input") if arguments[name] is not None]
    ours, expected = moved(arguments, DEVICE, layouts), moved(arguments, "cpu")
    blend_step(**ours), blend_step(**expected)
    assert_same_bits({name: ours[name].cpu() for name in written}, expected)


@pytest.mark.parametrize("dtypes", DTYPES.values(), ids=DTYPES)
def test_equals_the_reference(dtypes):
    arguments = problem(SHAPES["sampler"], dtypes, STEPS["every term"])
    ours = outputs(arguments, DEVICE, LAYOUTS["channels_last"])
    for name, expected in outputs(arguments, "cpu", function=blend_step_ref).items():
        # More than a unit in the last place, for the noise's tolerance and torch.lerp's contraction.
        torch.testing.assert_close(ours[name], expected, rtol=2 * torch.finfo(expected.dtype).eps, atol=4e-6)


@pytest.mark.parametrize("layouts", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("shape", [SHAPES["odd"], SHAPES["sampler"], (2, 4, 96, 112)], ids=str)
def test_rescaled_guidance_is_that_of_the_cpu(shape, layouts):
    arguments = problem(shape, DTYPES["fp32"], STEPS["ddim_eta"]) | {"guidance_rescale": 0.7}
    expected = outputs(arguments, "cpu")
    ours = outputs(arguments, DEVICE, layouts)
    for name, values in ours.items():  # the factor may differ by the rounding of its sums
        torch.testing.assert_close(values, expected[name], rtol=4e-7, atol=2e-6)
    assert_same_bits(outputs(arguments, DEVICE, layouts), ours)


def test_a_batch_longer_than_a_grid():
    arguments = problem((65537, 1, 2, 2), DTYPES["fp32"], STEPS["ddim_eta"])
    assert_same_bits(outputs(arguments, DEVICE), outputs(arguments, "cpu"))


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("layouts", LAYOUTS.values(), ids=LAYOUTS)
def test_expanded_tensors_and_in_place(layouts, step):
    arguments = problem(SHAPES["sampler"], DTYPES["bf16"], STEPS[step])
    for name in ("unconditional", "known", "weight"):
        arguments[name] = arguments[name][:1].expand_as(arguments[name])
    expected = outputs(arguments, "cpu")
    there = moved(arguments, DEVICE, layouts)
    for name in ("unconditional", "known", "weight"):
        there[name] = there[name][:1].expand_as(there[name])
    there["unconditional"] = there["unconditional"][:1]
    there["out"] = there["latents"]
    assert blend_step(**there) is there["latents"]
    assert_same_bits({name: there[name].cpu() for name in expected}, expected)


def test_what_lies_beside_a_written_slice_is_left_alone():
    arguments = problem(SHAPES["sampler"], DTYPES["fp32"], STEPS["every term"])
    there = moved(arguments, DEVICE, LAYOUTS["slice"])
    blend_step(**there)
    for name in ("out", "denoised", "corrected"):
        wider = there[name]._base
        assert wider.isnan().sum() == wider.numel() - there[name].numel()


def test_float64_and_tensors_elsewhere_are_refused():
    arguments = problem(SHAPES["odd"], DTYPES["fp32"], DDIM)
    there = moved(arguments, DEVICE)
    double = {name: there[name].double() for name in ("latents", "conditional")}
    with pytest.raises(RuntimeError, match=r"latents must be Float, BFloat16 or Half on cuda:0, got Double$"):
        blend_step(**double, coefficients=DDIM)
    with pytest.raises(RuntimeError, match=r"known must be on cuda:0 like latents, got cpu$"):
        blend_step(**there | {"known": arguments["known"]})
    with pytest.raises(RuntimeError, match=r"seeds must be on cuda:0 like latents, got cpu$"):
        blend_step(**there | {"seeds": arguments["seeds"]})


@pytest.mark.parametrize("rescale", [0.0, 0.7])
def test_a_graph_holds_it(rescale):
    """Replayed with other latents, seeds and masks in the same buffers."""
    arguments = problem(SHAPES["sampler"], DTYPES["fp32"], STEPS["every term"]) | {"guidance_rescale": rescale}
    tolerance = {"rtol": 4e-7, "atol": 2e-6} if rescale else {"rtol": 0, "atol": 0}
    static = moved(arguments, DEVICE, LAYOUTS["channels_last"])

    def step():
        blend_step(**static)

    step()  # the first launch loads the module, which a capture forbids
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for repeat in range(3):
        fresh = moved(arguments, DEVICE)
        fresh["latents"] = fresh["latents"].roll(repeat, 0)
        fresh["weight"] = fresh["weight"].roll(repeat, 0)
        fresh["seeds"] = fresh["seeds"] + repeat
        for name, value in fresh.items():
            if isinstance(value, torch.Tensor):
                static[name].copy_(value)
        graph.replay()
        blend_step(**fresh)
        for name in ("out", "denoised", "corrected", "model_input"):
            torch.testing.assert_close(static[name], fresh[name], **tolerance)


def test_runs_on_the_current_stream():
    arguments = problem(SHAPES["sampler"], DTYPES["fp32"], STEPS["ddim_eta"])
    there = moved(arguments, DEVICE)
    latents = there["latents"].clone()
    there["latents"].zero_()
    blend_step(**moved(arguments, DEVICE))  # loads the module, which waits for every stream
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)  # cycles: a launch on another stream would now run ahead, and read zeros
        there["latents"].copy_(latents)
        blend_step(**there)
    stream.synchronize()
    assert torch.equal(there["out"].cpu(), outputs(arguments, "cpu")["out"])


@pytest.mark.parametrize("rescale", [0.0, 0.7])
@pytest.mark.parametrize("layouts", LAYOUTS.values(), ids=LAYOUTS)
def test_is_one_launch_and_allocates_nothing(layouts, rescale):
    there = moved(problem(SHAPES["sampler"], DTYPES["fp32"], STEPS["every term"]), DEVICE, layouts)
    there["guidance_rescale"] = rescale
    blend_step(**there)
    torch.cuda.synchronize()
    allocations = torch.cuda.memory_stats()["allocation.all.allocated"]
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        blend_step(**there)
        torch.cuda.synchronize()
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == allocations
    on_device = [event.name for event in profiler.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    assert len(on_device) == 1, on_device
    assert "blend_step" in on_device[0]
