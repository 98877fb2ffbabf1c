"""Samplers as functions of a denoiser: each equals the diffusers scheduler of its name, one pass between model calls.

A sampler turns the tables of a scheduler whose timesteps are set into the coefficients of `blend_step`, in float64 and
once per trajectory; it never calls ``scheduler.step``. The symbols::

    x = alpha x_0 + sigma epsilon     latents at a noise level; alpha^2 + sigma^2 = 1, but for Euler alpha = 1
    lambda = log(alpha / sigma)       half the log signal-to-noise ratio; infinite at the end
    m                                 what the model puts out: epsilon, v = alpha epsilon - sigma x_0, or x_0
    s, t                              the levels before and after a step; h = lambda_t - lambda_s

What diffusers can do and this module does not is refused by name, never approximated.
"""

import copy
import inspect
import math
from collections.abc import Callable, Hashable
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, NamedTuple, TypedDict, Unpack

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
from torch import Tensor

from gbci_fast.errors import GBCIError
from gbci_fast.ops.blend_step import StepCoefficients, blend_step

Denoiser = Callable[[Tensor, int], Tensor | tuple[Tensor, Tensor]]
"""(latents ``[B, C, H, W]``, scaled as ``scheduler.scale_model_input`` does, and the step's index, from 0) -> the
model's output, or (conditional, unconditional) to have them combined. The input is overwritten after the call."""


@dataclass(kw_only=True)
class KnownRegion:
    """What lies outside the mask. Its fields are read at every step, so that a callback may replace them.

    Attributes:
        latents: noise-free, ``[B, C, H, W]``; put back after each step, at the level of the schedule's next timestep.
        noise: initial noise, ``[B, C, H, W]``, that brings them there.
        weight: ``[B, 1, H, W]``, float32 (float64 beside float64 latents): 1 is the sampler's, 0 is known.
    """

    latents: Tensor
    noise: Tensor
    weight: Tensor


class SampleOptions(TypedDict, total=False):
    """Keywords of every sampler.

    Attributes:
        begin_index: where in ``scheduler.timesteps`` to start; by default the scheduler's own ``begin_index``, or 0.
        guidance_scale: w, or a function that is asked for it at every step; by default 1. It matters where the denoiser
            returns a pair.
        guidance_rescale: phi in [0, 1] (Lin et al. 2024, section 3.4); by default 0.
        known: the region to keep.
        seeds: int64 ``[B]`` (`gbci_fast.model.noise.seed_tensor`): the solver's noise is drawn in the kernel, as stream
            1 of each seed at the step's index. Or
        noise: a function from the step's index to noise drawn beforehand, asked in those steps in which diffusers draws
            some, whether it adds it or not: so a generator goes on alike.
        model_dtype: of the denoiser's input and output; by default that of the latents.
        callback: called after each step with its index and the latents. They are live: clone them to keep them. Latents
            that it returns replace them.
        interrupted: asked before each step; True ends the trajectory there.
    """

    begin_index: int | None
    guidance_scale: float | Callable[[], float]
    guidance_rescale: float
    known: KnownRegion | None
    seeds: Tensor | None
    noise: Callable[[int], Tensor] | None
    model_dtype: torch.dtype | None
    callback: Callable[[int, Tensor], Tensor | None] | None
    interrupted: Callable[[], bool] | None


Sampler = Callable[..., Tensor]
"""(denoise, latents, scheduler, **`SampleOptions`) -> the latents after the last step; the given ones stay as they are.

They start as noise times ``scheduler.init_noise_sigma``, or as ``scheduler.add_noise`` makes them. Raises `GBCIError`
for an option of the scheduler that is not reproduced, and for a stochastic solver without noise."""

PREDICTIONS = ("epsilon", "v_prediction", "sample")
CHOICES: dict[type[SchedulerMixin], dict[str, tuple[Any, ...]]] = {
    DDIMScheduler: {"prediction_type": PREDICTIONS},
    EulerDiscreteScheduler: {"prediction_type": PREDICTIONS},
    EulerAncestralDiscreteScheduler: {"prediction_type": PREDICTIONS[:2]},
    DPMSolverMultistepScheduler: {
        "prediction_type": PREDICTIONS, "solver_order": (1, 2), "solver_type": ("midpoint", "heun"),
    },
    UniPCMultistepScheduler: {
        "prediction_type": PREDICTIONS, "solver_order": (1, 2), "solver_type": ("bh1", "bh2"),
    },
    LCMScheduler: {"prediction_type": PREDICTIONS},
}  # fmt: skip
"""What a scheduler's options may be, where its sampler reproduces more than diffusers' default."""
# Options that shape the tables alone, that are read below, or that act only beside one that is refused. Any other must
# be one of the choices, or the default.
FREE_OPTIONS = {
    "num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "rescale_betas_zero_snr",
    "timestep_spacing", "timestep_type", "steps_offset", "original_inference_steps", "interpolation_type",
    "use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas", "sigma_min", "sigma_max",
    "final_sigmas_type", "lambda_min_clipped", "set_alpha_to_one",
    "clip_sample", "clip_sample_range", "lower_order_final", "euler_at_final", "disable_corrector", "timestep_scaling",
    "dynamic_thresholding_ratio", "sample_max_value", "flow_shift", "time_shift_type",
}  # fmt: skip


def sample_ddim(
    denoise: Denoiser,
    latents: Tensor,
    scheduler: DDIMScheduler,
    *,
    eta: float = 0.0,
    **options: Unpack[SampleOptions],
) -> Tensor:
    """DDIM (Song, Meng and Ermon 2021): eq. 12, its sigma being eq. 16, `eta` times that of DDPM. See `Sampler`."""
    begin = _begin(scheduler, DDIMScheduler, options)
    if not 0 <= eta <= 1:
        raise GBCIError(f"eta is {eta!r}; expected 0 to 1")
    config, timesteps, alpha_bar = scheduler.config, _timesteps(scheduler, begin), scheduler.alphas_cumprod.tolist()
    # diffusers steps by this stride, not to the schedule's next timestep, from which that may lead one off (trailing)
    # or many (linspace); the known region does go to the schedule's next.
    stride = config.num_train_timesteps // scheduler.num_inference_steps
    levels, steps = [_preserving(alpha_bar[t]) for t in timesteps], []
    for t, level in zip(timesteps, levels, strict=True):
        a, a_next = alpha_bar[t], alpha_bar[t - stride] if t >= stride else float(scheduler.final_alpha_cumprod)
        deviation = eta * math.sqrt((1 - a_next) / (1 - a) * (1 - a / a_next))
        direction = math.sqrt(max(1 - a_next - deviation**2, 0.0))
        from_latents, from_output = _epsilon(scheduler, level)
        steps.append(
            StepCoefficients(
                **_denoised(scheduler, level),
                next_from_denoised=math.sqrt(a_next),
                next_from_corrected=direction * from_latents,
                next_from_output=direction * from_output,
                next_from_noise=deviation,
            )
        )
    return _run(denoise, latents, scheduler, levels, steps, clip=_clip(scheduler), **options)


def sample_euler(
    denoise: Denoiser, latents: Tensor, scheduler: EulerDiscreteScheduler, **options: Unpack[SampleOptions]
) -> Tensor:
    """Euler's method on dx = epsilon dsigma (Karras et al. 2022, eq. 1 and 3), without churn. See `Sampler`."""
    begin = _begin(scheduler, EulerDiscreteScheduler, options)
    levels = [_exploding(sigma) for sigma in _sigmas(scheduler, begin)]
    steps = [_euler_step(scheduler, s, t.sigma) for s, t in pairwise(levels)]
    return _run(denoise, latents, scheduler, levels, steps, **options)


def sample_euler_ancestral(
    denoise: Denoiser, latents: Tensor, scheduler: EulerAncestralDiscreteScheduler, **options: Unpack[SampleOptions]
) -> Tensor:
    """Ancestral sampling (Song et al. 2021, "Score-based generative modeling", eq. 47). See `Sampler`."""
    begin = _begin(scheduler, EulerAncestralDiscreteScheduler, options)
    levels, steps = [_exploding(sigma) for sigma in _sigmas(scheduler, begin)], []
    for s, t in pairwise(levels):
        sigma_down = t.sigma**2 / s.sigma
        steps.append(_euler_step(scheduler, s, sigma_down, noise=math.sqrt(t.sigma**2 - sigma_down**2)))
    return _run(denoise, latents, scheduler, levels, steps, **options)


def sample_dpmpp_2m(
    denoise: Denoiser, latents: Tensor, scheduler: DPMSolverMultistepScheduler, **options: Unpack[SampleOptions]
) -> Tensor:
    """DPM-Solver++(2M) (Lu et al. 2022, "DPM-Solver++", Algorithm 2), or order 1, which is DDIM. See `Sampler`."""
    begin = _begin(scheduler, DPMSolverMultistepScheduler, options)
    config, count = scheduler.config, len(scheduler.timesteps) - begin
    few = config.lower_order_final and len(scheduler.timesteps) < 15
    first_order_final = config.euler_at_final or config.final_sigmas_type == "zero" or few
    levels, steps, h_before = _multistep_levels(scheduler, begin), [], 0.0
    for i, (s, t) in enumerate(pairwise(levels)):
        h = t.half_log_snr - s.half_log_snr
        phi = math.expm1(-h)  # -1 where h is infinite
        second = 0.0  # weight of r D_1, the new denoised sample minus the older one; r = h_before / h
        if config.solver_order == 2 and i > 0 and not (first_order_final and i == count - 1):
            second = (-0.5 * phi * h if config.solver_type == "midpoint" else phi + h) / h_before
        h_before = h
        steps.append(
            StepCoefficients(
                **_denoised(scheduler, s),
                next_from_corrected=t.sigma / s.sigma,
                next_from_denoised=t.alpha * (second - phi),
                next_from_older=-t.alpha * second,
            )
        )
    return _run(denoise, latents, scheduler, levels, steps, **options)


def sample_unipc(
    denoise: Denoiser, latents: Tensor, scheduler: UniPCMultistepScheduler, **options: Unpack[SampleOptions]
) -> Tensor:
    """UniPC (Zhao et al. 2023, Algorithms 1 and 2, with data prediction): UniC, then UniP. See `Sampler`."""
    begin = _begin(scheduler, UniPCMultistepScheduler, options)
    config, count = scheduler.config, len(scheduler.timesteps) - begin
    levels, steps, order = _multistep_levels(scheduler, begin), [], 0
    h = [t.half_log_snr - s.half_log_snr for s, t in pairwise(levels)]
    phi = [math.expm1(-width) for width in h]  # -1 where h is infinite
    b = phi if config.solver_type == "bh2" else [-width for width in h]  # B(h)
    for i, (s, t) in enumerate(pairwise(levels)):
        corrector = {}
        if i > 0 and begin + i - 1 not in scheduler.disable_corrector:  # of the order of the step that led here
            new, older = (0.5, 0.0) if order == 1 else _unic_weights(h[i - 2], h[i - 1], b[i - 1])
            corrector = {
                "corrected_from_corrected": s.sigma / levels[i - 1].sigma,
                "corrected_from_denoised": -s.alpha * b[i - 1] * new,
                "corrected_from_previous": s.alpha * (b[i - 1] * (new + older) - phi[i - 1]),
                "corrected_from_older": -s.alpha * b[i - 1] * older,
            }
        order = min(config.solver_order, i + 1, count - i if config.lower_order_final else i + 1)
        if order == 2 and t.sigma == 0:
            raise GBCIError(
                f"{type(scheduler).__name__} has lower_order_final False and final_sigmas_type 'zero', which makes its "
                "last step infinite; expected lower_order_final True or final_sigmas_type 'sigma_min'"
            )
        second = 0.5 * t.alpha * b[i] * h[i] / h[i - 1] if order == 2 else 0.0
        steps.append(
            StepCoefficients(
                **_denoised(scheduler, s),
                **corrector,
                next_from_corrected=t.sigma / s.sigma,
                next_from_denoised=-t.alpha * phi[i] - second,
                next_from_previous=second,
            )
        )
    return _run(denoise, latents, scheduler, levels, steps, **options)


def sample_lcm(denoise: Denoiser, latents: Tensor, scheduler: LCMScheduler, **options: Unpack[SampleOptions]) -> Tensor:
    """Multistep latent consistency sampling (Luo et al. 2023, Algorithm 3 with eq. 9). See `Sampler`."""
    begin = _begin(scheduler, LCMScheduler, options)
    timesteps, alpha_bar, sigma_data = _timesteps(scheduler, begin), scheduler.alphas_cumprod.tolist(), 0.5
    levels, steps = [*(_preserving(alpha_bar[t]) for t in timesteps), CLEAN], []
    for timestep, (s, t) in zip(timesteps, pairwise(levels), strict=True):
        scaled = timestep * scheduler.config.timestep_scaling
        c_skip = sigma_data**2 / (scaled**2 + sigma_data**2)
        c_out = scaled / math.hypot(scaled, sigma_data)
        steps.append(
            StepCoefficients(
                **_denoised(scheduler, s),
                next_from_corrected=t.alpha * c_skip,
                next_from_denoised=t.alpha * c_out,
                next_from_noise=t.sigma,
            )
        )
    return _run(denoise, latents, scheduler, levels, steps, clip=_clip(scheduler), **options)


SAMPLERS: dict[type[SchedulerMixin], Sampler] = {
    DDIMScheduler: sample_ddim,
    EulerDiscreteScheduler: sample_euler,
    EulerAncestralDiscreteScheduler: sample_euler_ancestral,
    DPMSolverMultistepScheduler: sample_dpmpp_2m,
    UniPCMultistepScheduler: sample_unipc,
    LCMScheduler: sample_lcm,
}


def sampler_for(scheduler: SchedulerMixin) -> Sampler:
    """The sampler that equals `scheduler`, by its very class: a subclass may step otherwise.

    Raises:
        GBCIError: there is none, or it does not reproduce an option of the scheduler.
    """
    if type(scheduler) not in SAMPLERS:
        known = ", ".join(kind.__name__ for kind in SAMPLERS)
        raise GBCIError(f"scheduler is a {type(scheduler).__name__}; expected one of {known}")
    _check_options(scheduler, type(scheduler))
    return SAMPLERS[type(scheduler)]


def adds_noise(scheduler: SchedulerMixin, eta: float) -> bool:
    """Whether the steps of its sampler draw any."""
    return isinstance(scheduler, EulerAncestralDiscreteScheduler | LCMScheduler) or (
        isinstance(scheduler, DDIMScheduler) and eta > 0
    )


def on_host(scheduler: SchedulerMixin) -> SchedulerMixin:
    """With the same tables on the CPU: `timesteps` and, after `add_noise`, `alphas_cumprod` are on the device."""
    moved = copy.copy(scheduler)
    vars(moved).update({name: value.cpu() for name, value in vars(scheduler).items() if isinstance(value, Tensor)})
    return moved


def tables(scheduler: SchedulerMixin) -> Hashable:
    """What a sampler reads of a scheduler: samplers of equal tables compute the same."""
    arrays = [scheduler.timesteps, scheduler.alphas_cumprod, getattr(scheduler, "sigmas", None)]
    options = sorted((name, repr(value)) for name, value in scheduler.config.items())
    return type(scheduler), *options, *(None if array is None else tuple(array.tolist()) for array in arrays)


def _check_options(scheduler: SchedulerMixin, kind: type[SchedulerMixin]) -> None:
    # Those of its signature: a config that came from another scheduler's keeps options that do not apply.
    for option, parameter in inspect.signature(kind.__init__).parameters.items():
        expected = CHOICES[kind].get(option, (parameter.default,))
        if option not in FREE_OPTIONS | {"self"} and scheduler.config[option] not in expected:
            listed = " or ".join(map(repr, expected))
            raise GBCIError(f"{type(scheduler).__name__} has {option} {scheduler.config[option]!r}; expected {listed}")


class _Level(NamedTuple):
    """A noise level: ``x = alpha x_0 + sigma epsilon``, which the model sees times `scale`."""

    alpha: float
    sigma: float
    scale: float = 1.0

    @property
    def half_log_snr(self) -> float:
        return math.log(self.alpha / self.sigma) if self.sigma > 0 else math.inf


CLEAN = _Level(1.0, 0.0)


def _preserving(alpha_bar: float) -> _Level:
    return _Level(math.sqrt(alpha_bar), math.sqrt(1 - alpha_bar))


def _exploding(sigma: float) -> _Level:
    return _Level(1.0, sigma, 1 / math.hypot(1.0, sigma))


def _multistep_levels(scheduler: SchedulerMixin, begin: int) -> list[_Level]:
    """Variance preserving, from tables of sigma / alpha. All steps but the last must make lambda grow."""
    ratios = _sigmas(scheduler, begin)
    for s, t in pairwise(ratios[:-1]):
        if not t < s:
            raise GBCIError(f"{type(scheduler).__name__} has sigma {t} after {s}; expected less, as of fewer timesteps")
    return [_Level(1 / math.hypot(1.0, ratio), ratio / math.hypot(1.0, ratio)) for ratio in ratios]


def _sigmas(scheduler: SchedulerMixin, begin: int) -> list[float]:
    """One per timestep, and the last level; Euler's log-linear table is longer, and steps no further than here."""
    return scheduler.sigmas.tolist()[begin : len(scheduler.timesteps) + 1]


def _timesteps(scheduler: SchedulerMixin, begin: int) -> list[int]:
    timesteps, last = scheduler.timesteps.tolist(), len(scheduler.alphas_cumprod) - 1
    if not all(0 <= t <= last for t in timesteps):  # trailing spacing of 61 steps ends at -1
        name, first = type(scheduler).__name__, timesteps[0]
        raise GBCIError(f"{name} has timesteps from {first} to {timesteps[-1]}; expected them within {last} to 0")
    return timesteps[begin:]


def _clip(scheduler: SchedulerMixin) -> float | None:
    return scheduler.config.clip_sample_range if scheduler.config.clip_sample else None


def _denoised(scheduler: SchedulerMixin, level: _Level) -> dict[str, float]:
    """x_0 of latents and model output (Salimans and Ho 2022, appendix D)."""
    (alpha, sigma, scale), kind = level, scheduler.config.prediction_type
    if kind == "epsilon" and alpha == 0:
        raise GBCIError(
            f"{type(scheduler).__name__} has prediction_type 'epsilon', which tells nothing of the image where "
            "alphas_cumprod is 0; expected 'v_prediction' or 'sample'"
        )
    if kind == "epsilon":
        from_latents, from_output = 1 / alpha, -sigma / alpha
    elif kind == "v_prediction":
        from_latents, from_output = alpha * scale**2, -sigma * scale
    else:
        from_latents, from_output = 0.0, 1.0
    return {"denoised_from_latents": from_latents, "denoised_from_output": from_output}


def _epsilon(scheduler: SchedulerMixin, level: _Level) -> tuple[float, float]:
    """epsilon of latents and model output: the model's, whether or not x_0 is clipped, as diffusers has it."""
    (alpha, sigma, scale), kind = level, scheduler.config.prediction_type
    if kind == "epsilon":
        return 0.0, 1.0
    if kind == "v_prediction":
        return sigma * scale**2, alpha * scale
    return 1 / sigma, -alpha / sigma


def _euler_step(scheduler: SchedulerMixin, s: _Level, sigma: float, noise: float = 0.0) -> StepCoefficients:
    from_latents, from_output = _epsilon(scheduler, s)
    return StepCoefficients(
        denoised_from_latents=0.0,
        denoised_from_output=0.0,
        next_from_corrected=1 + (sigma - s.sigma) * from_latents,
        next_from_output=(sigma - s.sigma) * from_output,
        next_from_noise=noise,
    )


def _unic_weights(h_before: float, h: float, b: float) -> tuple[float, float]:
    """rho_2 and rho_1 / r_1 of UniC of order 2: Theorem 3.1's linear system, its nodes being r_1 and r_2 = 1."""
    r = -h_before / h
    g = math.expm1(-h) / -h - 1
    first, second = g / b, 2 * (g / -h - 0.5) / b
    rho = (first - second) / (1 - r)
    return first - rho, rho / r


def _begin(scheduler: SchedulerMixin, kind: type[SchedulerMixin], options: dict[str, Any]) -> int:
    """Checks a scheduler's class, timesteps and options, and takes ``begin_index`` out of the sampler's."""
    name = type(scheduler).__name__
    if not isinstance(scheduler, kind):
        raise GBCIError(f"scheduler is a {name}; expected {kind.__name__}")
    if scheduler.num_inference_steps is None:
        raise GBCIError(f"{name} has no timesteps; expected set_timesteps to be called first")
    _check_options(scheduler, kind)
    begin, last = options.pop("begin_index", None), len(scheduler.timesteps) - 1
    if begin is None:
        begin = getattr(scheduler, "begin_index", None) or 0
    if not 0 <= begin <= last:
        raise GBCIError(f"begin_index is {begin!r}; expected 0 to {last}")
    return begin


@torch.no_grad()
def _run(
    denoise: Denoiser,
    latents: Tensor,
    scheduler: SchedulerMixin,
    levels: list[_Level],
    steps: list[StepCoefficients],
    *,
    clip: float | None = None,
    guidance_scale: float | Callable[[], float] = 1.0,
    guidance_rescale: float = 0.0,
    known: KnownRegion | None = None,
    seeds: Tensor | None = None,
    noise: Callable[[int], Tensor] | None = None,
    model_dtype: torch.dtype | None = None,
    callback: Callable[[int, Tensor], Tensor | None] | None = None,
    interrupted: Callable[[], bool] | None = None,
) -> Tensor:
    """Model, then `blend_step`, which also makes the model's next input; again and again."""
    if seeds is not None and noise is not None:
        raise GBCIError("seeds and noise were both given; expected one of them")
    if seeds is None and noise is None and any(step.next_from_noise != 0 for step in steps):
        raise GBCIError(f"{type(scheduler).__name__} adds noise in its steps; expected seeds or noise")
    draws = not isinstance(scheduler, LCMScheduler) and any(step.next_from_noise != 0 for step in steps)
    latents = latents.clone()
    model_input = latents
    scaled = model_dtype not in (None, latents.dtype) or levels[0].scale != 1
    if scaled:
        model_input = torch.empty_like(latents, dtype=model_dtype).copy_(levels[0].scale * latents)
    # What earlier steps found, for solvers that read it; a first step's coefficients of these are 0: nothing is read.
    corrected = torch.empty_like(latents) if any(step.has_corrector for step in steps) else None
    previous = denoised = None
    if any(step.next_from_previous != 0 or step.corrected_from_previous != 0 for step in steps):
        previous = torch.empty_like(latents)
    if previous is not None or any(step.next_from_older != 0 for step in steps):
        denoised = torch.empty_like(latents)

    for i, (step, t) in enumerate(zip(steps, [*levels[1 : len(steps)], CLEAN], strict=True)):
        if interrupted is not None and interrupted():
            break
        output = denoise(model_input, i)
        conditional, unconditional = (output, None) if isinstance(output, Tensor) else output
        more = {}
        if step.next_from_noise != 0:
            more = {"seeds": seeds, "step": i} if noise is None else {"noise": noise(i)}
        elif draws and noise is not None:
            noise(i)  # as diffusers does, and does not use it: the generator goes on alike
        if known is not None:
            more |= {"known": known.latents, "known_noise": known.noise, "weight": known.weight}
        blend_step(
            latents,
            conditional,
            unconditional,
            coefficients=replace(
                step, known_from_latents=t.alpha, known_from_noise=t.sigma, input_from_latents=t.scale
            ),
            clip=clip,
            guidance_scale=guidance_scale() if callable(guidance_scale) else guidance_scale,
            guidance_rescale=guidance_rescale,
            previous=previous,
            denoised=denoised,
            corrected=corrected,
            model_input=model_input if scaled and i + 1 < len(steps) else None,
            out=latents,
            **more,
        )
        if previous is not None:
            previous, denoised = denoised, previous
        changed = None if callback is None else callback(i, latents)
        if changed is not None:
            latents.copy_(changed)
            if scaled:
                model_input.copy_(t.scale * latents)
    return latents
