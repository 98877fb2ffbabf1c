"""Samplers against the diffusers schedulers that they reproduce, over full trajectories of a toy denoiser.

``pytest tests/fast/test_sampling.py -k errors -s`` prints a table of the trajectory errors.
"""

import math
import sys
import types

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    LCMScheduler,
    UniPCMultistepScheduler,
)

from gbci_fast.fast import sampling
from gbci_fast.fast.samplers import sample_ddim, sample_unipc, sampler_for
from gbci_fast.fast.sampling import KnownRegion
from gbci_fast.ops.blend_step import blend_step, blend_step_ref

# diffusers' own, of its schedulers under NumPy 2
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

SHAPE = (2, 4, 6, 5)
BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
COSINE = {"beta_schedule": "squaredcos_cap_v2"}
EPSILON, V, X0 = ({"prediction_type": kind} for kind in ("epsilon", "v_prediction", "sample"))
LEADING, TRAILING, LINSPACE = ({"timestep_spacing": kind} for kind in ("leading", "trailing", "linspace"))
ZERO_SNR = {"rescale_betas_zero_snr": True, **V, **TRAILING}
SIGMA_MIN = {"final_sigmas_type": "sigma_min"}
KARRAS, EXPONENTIAL, BETA, LU = (
    {f"use_{kind}": True} for kind in ("karras_sigmas", "exponential_sigmas", "beta_sigmas", "lu_lambdas")
)
SCHEDULERS = {
    "ddim": DDIMScheduler,
    "euler": EulerDiscreteScheduler,
    "euler_ancestral": EulerAncestralDiscreteScheduler,
    "dpmpp_2m": DPMSolverMultistepScheduler,
    "unipc": UniPCMultistepScheduler,
    "lcm": LCMScheduler,
}
COMMON = {
    "epsilon": EPSILON,
    "v": V,
    "leading": {**LEADING, **V, "steps_offset": 1},
    "trailing": {**TRAILING, **EPSILON},
    "linspace": {**LINSPACE, **V},
    "linear": {"beta_schedule": "linear", "beta_start": 0.0001, "beta_end": 0.02},
    "zero_snr": ZERO_SNR,
}
MULTISTEP = {
    "x0": X0,
    "karras": {**KARRAS, **V},
    "exponential": {**EXPONENTIAL, **V},
    "beta": {**BETA, **V},
    "sigma_min": {**SIGMA_MIN, **TRAILING, **V},
    "karras_sigma_min": {**KARRAS, **SIGMA_MIN, **V},
    "order_1": {"solver_order": 1, **V},
    "last_steps_of_order_2": {"lower_order_final": False, **SIGMA_MIN, **V},
}
OPTIONS = {
    "ddim": {
        **COMMON,
        "x0": X0,
        "clip": {"clip_sample": True, "clip_sample_range": 0.7, **EPSILON},
        "clip_v": {"clip_sample": True, **V},
        "final_alpha": {"set_alpha_to_one": False, **V},
        "cosine": {**COSINE, **V},
        "eta": {"eta": 0.5, **V},
        "eta_1": {"eta": 1.0, **EPSILON, **LEADING},
        "eta_1_clip": {"eta": 1.0, "clip_sample": True, **X0, **TRAILING},
    },
    "euler": {
        **COMMON,
        "x0": X0,
        "karras": {**KARRAS, **V},
        "exponential": {**EXPONENTIAL, **EPSILON},
        "beta": {**BETA, **V},
        "sigma_min": {**SIGMA_MIN, **V},
        "log_linear": {"interpolation_type": "log_linear", **V},
        "continuous": {"timestep_type": "continuous", **V},
        "bounds": {**KARRAS, "sigma_min": 0.1, "sigma_max": 10.0, **V},
    },
    "euler_ancestral": COMMON,
    "dpmpp_2m": {
        **COMMON,
        **MULTISTEP,
        "heun": {"solver_type": "heun", **V},
        "heun_sigma_min": {"solver_type": "heun", "lower_order_final": False, **SIGMA_MIN, **EPSILON},
        "lu": {**LU, **V},
        "euler_at_final": {"euler_at_final": True, **SIGMA_MIN, **V},
        "lambda_min": {**COSINE, "lambda_min_clipped": -5.1, **V},
    },
    "unipc": {
        **COMMON,
        **MULTISTEP,
        "bh1": {"solver_type": "bh1", **SIGMA_MIN, **V},
        "bh1_epsilon": {"solver_type": "bh1", "lower_order_final": False, **SIGMA_MIN, **EPSILON},
        "order_1_last_of_order_1": {"solver_order": 1, "lower_order_final": False},
        "no_corrector_at_0": {"disable_corrector": [0], **V},
        "corrector_now_and_then": {"disable_corrector": [0, 1, 3, 4, 9], **EPSILON},
    },
    "lcm": {
        "epsilon": EPSILON,
        "v": V,
        "x0": X0,
        "clip": {"clip_sample": True, "clip_sample_range": 0.7, **EPSILON},
        "scaling": {"timestep_scaling": 0.01, **V},
        "origin": {"original_inference_steps": 100, **V},
        "zero_snr": {"rescale_betas_zero_snr": True, **V},
    },
}
TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-5}
CASES = [
    pytest.param(solver, name, dtype, id=f"{solver}-{name}-{str(dtype)[6:]}")
    for solver, options in OPTIONS.items()
    for name in options
    for dtype in TOLERANCES
    # In float32 diffusers is inexact for this case: see test_euler_keeps_its_digits_at_zero_snr.
    if not (solver.startswith("euler") and name == "zero_snr" and dtype == torch.float32)
]


class Float64Torch(types.ModuleType):
    """The module torch, except that `torch.float32` is float64."""

    def __getattr__(self, name):
        return torch.float64 if name == "float32" else getattr(torch, name)


@pytest.fixture
def make(monkeypatch):
    """``make(solver, config, steps, dtype)``: a scheduler with timesteps that computes in `dtype`.

    diffusers computes in float32: its tables are float32, some step functions cast the sample to float32, and tensors
    made from Python numbers have torch's default dtype. For a float64 reference, the same tables are cast to float64,
    and the default dtype and the `torch.float32` of the scheduler's module are set to float64. The reference then
    differs from our sampler only in the order of operations.
    """

    def made(solver, config, steps, dtype):
        module = sys.modules[SCHEDULERS[solver].__module__]
        monkeypatch.setattr(module, "torch", torch)
        torch.set_default_dtype(torch.float32)
        config = {**BETAS, **({"clip_sample": False} if solver == "ddim" else {}), **config}
        scheduler = SCHEDULERS[solver](**{option: value for option, value in config.items() if option != "eta"})
        scheduler.set_timesteps(steps)
        if dtype == torch.float64:
            for table in ("alphas_cumprod", "final_alpha_cumprod", "sigmas"):
                if hasattr(scheduler, table):
                    setattr(scheduler, table, getattr(scheduler, table).double())
            monkeypatch.setattr(module, "torch", Float64Torch("torch"))
            torch.set_default_dtype(torch.float64)
        return scheduler

    yield made
    torch.set_default_dtype(torch.float32)


def toy(latents, t):
    """A nonlinear function of latents ``[B, 4, H, W]`` and timestep, in their dtype."""
    weights = torch.linspace(-0.6, 0.7, 16, dtype=torch.float64).sin().reshape(4, 4).to(latents)
    mixed = torch.einsum("oc,bchw->bohw", weights, latents) + 0.3 * latents.roll(1, -1)
    return torch.tanh(mixed + math.cos(0.003 * float(t)))


def draw(count, dtype, seed=0):
    """Normals ``[count, *SHAPE]``."""
    return torch.randn(count, *SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.fixture
def step_through(monkeypatch):
    """The same trajectory by ``scheduler.step``, with noise that is drawn beforehand."""

    def stepped(scheduler, latents, noise, begin=0, eta=None):
        draws = iter(noise)
        module = sys.modules[type(scheduler).__module__]
        monkeypatch.setattr(module, "randn_tensor", lambda *args, **options: next(draws), raising=False)
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(begin)
        for t in scheduler.timesteps[begin:]:
            output = toy(scheduler.scale_model_input(latents, t), t)
            extra = {} if eta is None else {"eta": eta}
            latents = scheduler.step(output, t, latents, **extra).prev_sample
        return latents

    return stepped


def relative(ours, reference):
    assert ours.dtype == reference.dtype
    return ((ours - reference).abs().max() / reference.abs().max()).item()


def compare(make, step_through, solver, config, steps, dtype, begin=0):
    """The largest difference to the scheduler's trajectory, as a share of its largest latent."""
    scheduler = make(solver, config, steps, dtype)
    initial, *noise = draw(1 + len(scheduler.timesteps), dtype)
    latents = initial * scheduler.init_noise_sigma
    extra = {"eta": config["eta"]} if "eta" in config else {}
    timesteps = scheduler.timesteps[begin:]
    ours = sampler_for(scheduler)(
        lambda x, i: toy(x, timesteps[i]), latents, scheduler, begin_index=begin, noise=noise.__getitem__, **extra
    )
    reference = step_through(scheduler, latents, noise, begin, **extra)
    assert reference.isfinite().all()
    return relative(ours, reference)


@pytest.mark.parametrize(("solver", "name", "dtype"), CASES)
def test_equals_the_scheduler(make, step_through, solver, name, dtype):
    for steps in (1, 2, 3, 5, 14, 15, 20, 50):
        error = compare(make, step_through, solver, OPTIONS[solver][name], steps, dtype)
        assert error <= TOLERANCES[dtype], steps


@pytest.mark.parametrize("dtype", TOLERANCES, ids=["float64", "float32"])
@pytest.mark.parametrize("solver", SCHEDULERS)
def test_equals_the_scheduler_from_half_way(make, step_through, solver, dtype):
    names = {"v", "karras", "sigma_min", "eta", "bh1", "heun", "corrector_now_and_then"} & set(OPTIONS[solver])
    for name in names:
        for steps in (2, 3, 5, 20):
            error = compare(make, step_through, solver, OPTIONS[solver][name], steps, dtype, begin=steps // 2)
            assert error <= TOLERANCES[dtype], (name, steps)


@pytest.mark.parametrize("solver", ["euler", "euler_ancestral"])
def test_euler_keeps_its_digits_at_zero_snr(make, step_through, solver):
    """The first sigma is 4096. diffusers takes x - sigma (x - x_0) / sigma for x_0; our coefficients cancel exactly."""
    results = []
    for dtype in (torch.float64, torch.float32):
        scheduler = make(solver, ZERO_SNR, 2, dtype)
        initial, *noise = draw(3, dtype)
        latents = initial * scheduler.init_noise_sigma
        ours = sampler_for(scheduler)(
            lambda x, i, t=scheduler.timesteps: toy(x, t[i]), latents, scheduler, noise=noise.__getitem__
        )
        results += [ours.double(), step_through(scheduler, latents, noise).double()]
    exact, exact_scheduler, ours, theirs = results
    assert relative(exact, exact_scheduler) <= 1e-9
    assert relative(ours, exact) <= 1e-6
    assert relative(theirs, exact) > 1e-5


def test_the_last_step_of_unipc_bh1_is_finite(make):
    """B(h) is infinite in the last step, and diffusers multiplies it by 0."""
    scheduler, bh2 = (make("unipc", {"solver_type": kind, **V}, 1, torch.float64) for kind in ("bh1", "bh2"))
    latents, t = draw(1, torch.float64)[0], scheduler.timesteps[0]
    assert scheduler.step(latents, t, latents).prev_sample.isnan().all()
    results = [sample_unipc(lambda x, i: toy(x, t), latents, each) for each in (scheduler, bh2)]
    assert results[0].isfinite().all()
    assert torch.equal(*results)


def test_ddim_of_the_noise_of_ddpm_is_finite_at_zero_snr(make):
    """1 - alpha_bar - sigma^2 is 0 at zero SNR. diffusers takes the root of its rounding error, perhaps below 0."""
    for steps in (3, 7, 50):
        scheduler = make("ddim", ZERO_SNR, steps, torch.float32)
        latents, *noise = draw(1 + steps, torch.float32)
        t = scheduler.timesteps
        ours = sample_ddim(lambda x, i, t=t: toy(x, t[i]), latents, scheduler, eta=1.0, noise=noise.__getitem__)
        assert ours.isfinite().all()


@pytest.mark.parametrize("solver", SCHEDULERS)
def test_equals_a_loop_with_guidance_and_known_region(make, solver, step_through, monkeypatch):
    """The loop of `gbci_fast.model.pipeline` in float64, from a middle step on; by the operator and its reference."""
    steps, begin, scale = 9, 3, 2.5
    config = {**V, **({} if solver == "lcm" else TRAILING)}
    scheduler = make(solver, config, steps, torch.float64)
    latents, image_latents, initial, *noise = draw(3 + steps, torch.float64)
    weight = torch.rand(2, 1, 6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    weight[:, :, :2], weight[:, :, 4:] = 0, 1
    timesteps = scheduler.timesteps[begin:]
    extra = {"eta": 0.7} if solver == "ddim" else {}
    latents = latents * scheduler.init_noise_sigma if solver.startswith("euler") else latents

    def both(x, t):
        return toy(x, t), toy(0.8 * x.flip(1), t)

    if solver != "ddim":
        scheduler.set_begin_index(begin)
    known = KnownRegion(latents=image_latents, noise=initial, weight=weight)
    options = {"noise": noise.__getitem__, "guidance_scale": scale, "known": known, **extra}
    if solver == "ddim":
        options["begin_index"] = begin
    ours = []
    for function in (blend_step, blend_step_ref):
        monkeypatch.setattr(sampling, "blend_step", function)
        ours.append(sampler_for(scheduler)(lambda x, i: both(x, timesteps[i]), latents, scheduler, **options))

    draws = iter(noise)
    monkeypatch.setattr(
        sys.modules[type(scheduler).__module__], "randn_tensor", lambda *args, **options: next(draws), raising=False
    )
    for i, t in enumerate(timesteps):
        conditional, unconditional = both(scheduler.scale_model_input(latents, t), t)
        output = unconditional + scale * (conditional - unconditional)
        latents = scheduler.step(output, t, latents, **extra).prev_sample
        region = image_latents
        if i + 1 < len(timesteps):
            region = scheduler.add_noise(image_latents, initial, timesteps[i + 1].expand(2))
        latents = torch.lerp(region, latents, weight)
    for result in ours:
        assert relative(result, latents) <= 1e-9
        assert torch.equal(result[:, :, :2], image_latents[:, :, :2])


def test_trajectory_errors(make, step_through):
    """Prints the table: 20 steps of v-prediction with trailing timesteps; errors as shares of the largest latent."""
    print(f"\n{'20 steps':16}" + "".join(f"{str(dtype)[6:]:>9}" for dtype in TOLERANCES))
    for solver in SCHEDULERS:
        config = {**V, **({} if solver == "lcm" else TRAILING), **({"eta": 1.0} if solver == "ddim" else {})}
        errors = {dtype: compare(make, step_through, solver, config, 20, dtype) for dtype in TOLERANCES}
        print(f"{solver:16}" + "".join(f"{error:9.1e}" for error in errors.values()))
        assert errors[torch.float64] <= 1e-12
        assert errors[torch.float32] <= 2e-6
