"""The step between two UNet calls: blend_step against the eager pipeline, and against a copy of as many bytes.

`eager` is the code of `gbci_fast.model.pipeline` with diffusers' scheduler, including noise by torch.randn. `ours` runs
in place, as in the samplers. Its time depends on which coefficients are 0, not on their values. Bytes are those that
`ours` must move: each tensor that the coefficients need is read once, each result written once. `memcpy` reads half as
many bytes and writes as many.
"""

from dataclasses import dataclass, field

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    LCMScheduler,
    SchedulerMixin,
    UniPCMultistepScheduler,
)

from gbci_fast.model.noise import seed_tensor
from gbci_fast.model.pipeline import PACKAGED_WEIGHTS
from gbci_fast.ops.blend_step import StepCoefficients, blend_step

BATCHES = [64, 256, 1024] if torch.cuda.is_available() else [64, 256]  # the largest moves at least 256 MB
GUIDANCE_SCALE = 3.0
NUM_STEPS = 20
INDEX = 5  # of the measured step; by then a multistep solver has its full history
VELOCITY = {"denoised_from_latents": 0.6, "denoised_from_output": -0.8}
KNOWN = {"known_from_latents": 0.8, "known_from_noise": 0.6}
DDIM = {**VELOCITY, **KNOWN, "next_from_corrected": 0.48, "next_from_output": 0.36, "next_from_denoised": 0.8}
EULER = {
    "denoised_from_latents": 0.0, "denoised_from_output": 0.0, "next_from_corrected": 0.8, "next_from_output": -0.4,
    "known_from_noise": 1.5, "input_from_latents": 0.55,
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Solver:
    """A diffusers scheduler, its options of ``step``, and coefficients that give `blend_step` the same work."""

    scheduler: type[SchedulerMixin]
    coefficients: StepCoefficients
    options: dict = field(default_factory=dict)

    @property
    def scales_input(self) -> bool:
        return self.coefficients.input_from_latents != 1


SOLVERS = {
    "ddim": Solver(scheduler=DDIMScheduler, coefficients=StepCoefficients(**DDIM)),
    "euler": Solver(scheduler=EulerDiscreteScheduler, coefficients=StepCoefficients(**EULER)),
    "dpmpp_2m": Solver(
        scheduler=DPMSolverMultistepScheduler,
        coefficients=StepCoefficients(
            **VELOCITY, **KNOWN, next_from_corrected=0.75, next_from_denoised=0.35, next_from_older=-0.1
        ),
    ),
    "unipc": Solver(
        scheduler=UniPCMultistepScheduler,
        coefficients=StepCoefficients(
            **VELOCITY, **KNOWN, corrected_from_corrected=0.7, corrected_from_previous=0.2, corrected_from_older=-0.1,
            corrected_from_denoised=0.15, next_from_corrected=0.7, next_from_denoised=0.4, next_from_previous=-0.2,
        ),
    ),
    "ddim_eta": Solver(
        scheduler=DDIMScheduler, coefficients=StepCoefficients(**DDIM, next_from_noise=0.3), options={"eta": 1.0}
    ),
    "euler_ancestral": Solver(
        scheduler=EulerAncestralDiscreteScheduler, coefficients=StepCoefficients(**EULER, next_from_noise=0.3)
    ),
    "lcm": Solver(
        scheduler=LCMScheduler,
        coefficients=StepCoefficients(
            **VELOCITY, **KNOWN, next_from_corrected=0.01, next_from_denoised=0.8, next_from_noise=0.6
        ),
    ),
}  # fmt: skip


def eager_step(solver, tensors, model_dtype):
    """A function that repeats step `INDEX` of the eager pipeline at each call."""
    scheduler = solver.scheduler.from_pretrained(PACKAGED_WEIGHTS, subfolder="scheduler")
    latents, output = tensors["latents"], tensors["output"]
    scheduler.set_timesteps(NUM_STEPS, device=latents.device)
    scheduler.set_begin_index(0) if hasattr(scheduler, "set_begin_index") else None
    timesteps = scheduler.timesteps
    for t in timesteps[:INDEX]:
        scheduler.step(output[: len(latents)].float(), t, latents, **solver.options)

    def step():
        scheduler._step_index = INDEX
        t, t_next = timesteps[INDEX : INDEX + 2]
        unconditional, conditional = output.float().chunk(2)
        guided = unconditional + GUIDANCE_SCALE * (conditional - unconditional)
        result = scheduler.step(guided, t, latents, **solver.options, return_dict=False)[0]
        known = scheduler.add_noise(tensors["known"], tensors["known_noise"], t_next.expand(len(latents)))
        result = torch.lerp(known, result, tensors["weight"])
        return scheduler.scale_model_input(result, t_next).to(model_dtype)

    return step


def fused_step(solver, tensors, model_dtype):
    """A function that does the same with `blend_step`, in place, and the bytes that it must move."""
    a, latents = solver.coefficients, tensors["latents"].clone()
    unconditional, conditional = tensors["output"].chunk(2)
    arguments = {name: tensors[name] for name in ("known", "known_noise", "weight")}
    read = [latents, unconditional, conditional, *arguments.values()]
    written = [latents]
    if solver.scales_input or model_dtype != latents.dtype:
        arguments["model_input"] = torch.empty_like(latents, dtype=model_dtype)
        written.append(arguments["model_input"])
    state = {
        "previous": a.corrected_from_previous or a.next_from_previous,
        "denoised": a.corrected_from_older or a.next_from_older,
        "corrected": a.corrected_from_corrected,
    }
    for name, coefficient in state.items():
        if coefficient != 0:
            arguments[name] = torch.randn_like(latents)
            read.append(arguments[name])
            written += [arguments[name]] if name != "previous" else []
    if a.next_from_noise != 0:
        arguments["seeds"] = seed_tensor(range(len(latents)), latents.device)

    def step():
        blend_step(
            latents, conditional, unconditional, coefficients=a, guidance_scale=GUIDANCE_SCALE, step=INDEX,
            out=latents, **arguments,
        )  # fmt: skip

    return step, sum(tensor.nbytes for tensor in read + written)


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("row", ["eager", "memcpy", "ours"])
def bench_blend_step(measure, device, row, solver, dtype, batch):
    if batch == 1024 and device.type == "cpu":
        pytest.skip("is for a GPU's bandwidth")
    shape = (batch, 4, 56, 56)
    generator = torch.Generator(device).manual_seed(0)

    def normal(*size):
        return torch.randn(*size, generator=generator, device=device)

    tensors = {name: normal(*shape) for name in ("latents", "known", "known_noise")}
    tensors |= {"output": normal(2 * batch, *shape[1:]).to(dtype), "weight": normal(batch, 1, 56, 56).clamp(0, 1)}
    solver = SOLVERS[solver]
    ours, num_bytes = fused_step(solver, tensors, dtype)
    if row == "ours":
        measure(ours, num_bytes=num_bytes)
    elif row == "eager":
        measure(eager_step(solver, tensors, dtype), num_bytes=num_bytes)
    else:
        source = torch.ones(num_bytes // 8, device=device)
        target = torch.empty_like(source)
        measure(lambda: target.copy_(source), num_bytes=num_bytes)
