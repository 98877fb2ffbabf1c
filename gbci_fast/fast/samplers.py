"""Samplers: each is one function, and equals the diffusers scheduler that it is registered for.

A sampler turns the tables of a scheduler whose timesteps are set into the coefficients of `blend_step`, in float64 and
once per trajectory; `gbci_fast.fast.sampling.run` applies them. It never calls ``scheduler.step``. A new sampler is one
function under `sampler_of`. An option of a scheduler that its sampler does not reproduce is refused by name.

The symbols, in every docstring here::

    x = alpha x_0 + sigma epsilon     latents at a noise level; alpha^2 + sigma^2 = 1, or alpha = 1 for Euler
    lambda = log(alpha / sigma)       half the log signal-to-noise ratio; infinite at the end
    s, t                              the levels before and after a step; h = lambda_t - lambda_s
    r                                 the level before s; h_r = lambda_s - lambda_r
    D_s                               the estimate of x_0 from the model's output at level s; epsilon likewise
    z                                 fresh standard normal noise
"""

import copy
import functools
import inspect
import math
from collections.abc import Callable, Collection, Hashable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Protocol, Unpack

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
from gbci_fast.fast.levels import (
    CLEAN,
    Level,
    denoised_from,
    epsilon_from,
    exploding,
    multistep_levels,
    preserving,
    sigmas_from,
    timesteps_from,
)
from gbci_fast.fast.sampling import ModelCall, SampleOptions, run
from gbci_fast.ops.blend_step import StepCoefficients


class Sampler(Protocol):
    """A function of `sampler_of`."""

    def __call__(
        self,
        denoise: ModelCall,
        latents: Tensor,
        scheduler: Any,
        *,
        begin_index: int | None = None,
        **options: Any,
    ) -> Tensor:
        """The latents after the last step; the given ones stay as they are.

        Args:
            denoise: the model.
            latents: ``[B, C, H, W]``: noise times ``scheduler.init_noise_sigma``, or from ``scheduler.add_noise``.
            scheduler: of the class that the sampler is registered for, after ``set_timesteps``.
            begin_index: where in ``scheduler.timesteps`` to start; by default ``scheduler.begin_index``, or 0.
            options: those of `SampleOptions`, and `eta` where the sampler takes it.

        Raises:
            GBCIError: the scheduler is of another class, has no timesteps, or has an option that is not reproduced; or
                a sampler that adds noise gets neither seeds nor noise.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class _Registration:
    sampler: Sampler
    options: Mapping[str, Collection[Any] | None]
    adds_noise: bool
    takes_eta: bool


_REGISTERED: dict[type[SchedulerMixin], _Registration] = {}
PREDICTIONS = ("epsilon", "v_prediction", "sample")
ANY = None
"""Stands for all values of a scheduler's option."""
# Options that only shape the scheduler's tables, which every sampler reads.
_TABLE_OPTIONS = {
    "num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "rescale_betas_zero_snr",
    "timestep_spacing", "timestep_type", "steps_offset", "original_inference_steps", "interpolation_type",
    "use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas", "sigma_min", "sigma_max",
    "final_sigmas_type", "lambda_min_clipped", "set_alpha_to_one",
}  # fmt: skip
# Options that act only together with another option, which is refused.
_IDLE_OPTIONS = {"dynamic_thresholding_ratio", "sample_max_value", "flow_shift", "time_shift_type"}


def sampler_of(
    kind: type[SchedulerMixin], *, adds_noise: bool = False, **options: Collection[Any] | None
) -> Callable[[Callable[..., Tensor]], Sampler]:
    """Registers a function as the sampler of a scheduler class.

    The function is called after the scheduler was checked, with its `begin_index` resolved to an int.

    Args:
        kind: the scheduler's class.
        adds_noise: whether every trajectory draws noise. A trajectory with ``eta > 0`` always does.
        options: option of the scheduler -> the values that the function reproduces, or `ANY`. For an option that is not
            named, only diffusers' default is reproduced, unless the option only shapes the scheduler's tables.
    """

    def register(sample: Callable[..., Tensor]) -> Sampler:
        @functools.wraps(sample)
        def sampler(
            denoise: ModelCall,
            latents: Tensor,
            scheduler: Any,
            *,
            begin_index: int | None = None,
            **given: Any,
        ) -> Tensor:
            return sample(
                denoise, latents, scheduler, begin_index=_checked_begin(scheduler, kind, begin_index), **given
            )

        takes_eta = "eta" in inspect.signature(sample).parameters
        _REGISTERED[kind] = _Registration(sampler=sampler, options=options, adds_noise=adds_noise, takes_eta=takes_eta)
        return sampler

    return register


@sampler_of(DDIMScheduler, prediction_type=PREDICTIONS, clip_sample=ANY, clip_sample_range=ANY)
def sample_ddim(
    denoise: ModelCall,
    latents: Tensor,
    scheduler: DDIMScheduler,
    *,
    begin_index: int,
    eta: float = 0.0,
    **options: Unpack[SampleOptions],
) -> Tensor:
    """DDIM (Song, Meng and Ermon 2021, "Denoising diffusion implicit models", eq. 12 and 16). See `Sampler`.

    With a = alpha_s^2 and a_next = alpha_t^2, which are the paper's alphas::

        x_t = sqrt(a_next) D_s + sqrt(1 - a_next - deviation^2) epsilon + deviation z
        deviation = eta sqrt((1 - a_next) / (1 - a)) sqrt(1 - a / a_next)

    Args:
        eta: 0 to 1; 0 is deterministic, and 1 has the deviation of DDPM.
    """
    if not 0 <= eta <= 1:
        raise GBCIError(f"eta is {eta!r}; expected 0 to 1")
    timesteps, alpha_bar = timesteps_from(scheduler, begin_index), scheduler.alphas_cumprod.tolist()
    # diffusers steps by this stride. The schedule's next timestep may differ by one (trailing spacing) or by many
    # (linspace). The known region goes to the schedule's next timestep.
    stride = scheduler.config.num_train_timesteps // scheduler.num_inference_steps
    levels, steps = [preserving(alpha_bar[t]) for t in timesteps], []
    for t, level in zip(timesteps, levels, strict=True):
        a, a_next = alpha_bar[t], alpha_bar[t - stride] if t >= stride else float(scheduler.final_alpha_cumprod)
        deviation = eta * math.sqrt((1 - a_next) / (1 - a) * (1 - a / a_next))
        direction = math.sqrt(max(1 - a_next - deviation**2, 0.0))
        from_latents, from_output = epsilon_from(scheduler, level)
        steps.append(
            StepCoefficients(
                **denoised_from(scheduler, level),
                next_from_denoised=math.sqrt(a_next),
                next_from_corrected=direction * from_latents,
                next_from_output=direction * from_output,
                next_from_noise=deviation,
            )
        )
    return run(denoise, latents, scheduler, levels, steps, clip=_clip(scheduler), **options)


@sampler_of(EulerDiscreteScheduler, prediction_type=PREDICTIONS)
def sample_euler(
    denoise: ModelCall,
    latents: Tensor,
    scheduler: EulerDiscreteScheduler,
    *,
    begin_index: int,
    **options: Unpack[SampleOptions],
) -> Tensor:
    """Euler's method on dx = epsilon dsigma (Karras et al. 2022, "Elucidating the design space", eq. 1 and 3).

    Without churn::

        x_t = x_s + (sigma_t - sigma_s) epsilon

    See `Sampler`.
    """
    levels = [exploding(sigma) for sigma in sigmas_from(scheduler, begin_index)]
    steps = [_euler_step(scheduler, s, t.sigma) for s, t in pairwise(levels)]
    return run(denoise, latents, scheduler, levels, steps, **options)


@sampler_of(EulerAncestralDiscreteScheduler, adds_noise=True, prediction_type=("epsilon", "v_prediction"))
def sample_euler_ancestral(
    denoise: ModelCall,
    latents: Tensor,
    scheduler: EulerAncestralDiscreteScheduler,
    *,
    begin_index: int,
    **options: Unpack[SampleOptions],
) -> Tensor:
    """Ancestral sampling (Song et al. 2021, "Score-based generative modeling", eq. 47). See `Sampler`.

    The paper's score is -epsilon / sigma_s::

        x_t = x_s + (sigma_down - sigma_s) epsilon + sqrt(sigma_t^2 - sigma_down^2) z
        sigma_down = sigma_t^2 / sigma_s
    """
    levels, steps = [exploding(sigma) for sigma in sigmas_from(scheduler, begin_index)], []
    for s, t in pairwise(levels):
        sigma_down = t.sigma**2 / s.sigma
        steps.append(_euler_step(scheduler, s, sigma_down, noise=math.sqrt(t.sigma**2 - sigma_down**2)))
    return run(denoise, latents, scheduler, levels, steps, **options)


@sampler_of(
    DPMSolverMultistepScheduler,
    prediction_type=PREDICTIONS,
    solver_order=(1, 2),
    solver_type=("midpoint", "heun"),
    lower_order_final=ANY,
    euler_at_final=ANY,
)
def sample_dpmpp_2m(
    denoise: ModelCall,
    latents: Tensor,
    scheduler: DPMSolverMultistepScheduler,
    *,
    begin_index: int,
    **options: Unpack[SampleOptions],
) -> Tensor:
    """DPM-Solver++(2M) (Lu et al. 2022, "DPM-Solver++", Algorithm 2); DDIM where the order is 1. See `Sampler`.

    With phi = exp(-h) - 1::

        x_t = (sigma_t / sigma_s) x_s - alpha_t phi D_s + alpha_t second (D_s - D_r)
        second = -phi h / (2 h_r)   for the "midpoint" solver, which is the paper's
               = (phi + h) / h_r    for the "heun" solver of diffusers
               = 0                  in steps of order 1: the first, and the last where the scheduler asks for it
    """
    config, count = scheduler.config, len(scheduler.timesteps) - begin_index
    few = config.lower_order_final and len(scheduler.timesteps) < 15
    first_order_final = config.euler_at_final or config.final_sigmas_type == "zero" or few
    levels, steps, h_r = multistep_levels(scheduler, begin_index), [], 0.0
    for i, (s, t) in enumerate(pairwise(levels)):
        h = t.half_log_snr - s.half_log_snr
        phi = math.expm1(-h)  # -1 where h is infinite
        second = 0.0
        if config.solver_order == 2 and i > 0 and not (first_order_final and i == count - 1):
            second = (-0.5 * phi * h if config.solver_type == "midpoint" else phi + h) / h_r
        h_r = h
        steps.append(
            StepCoefficients(
                **denoised_from(scheduler, s),
                next_from_corrected=t.sigma / s.sigma,
                next_from_denoised=t.alpha * (second - phi),
                next_from_older=-t.alpha * second,
            )
        )
    return run(denoise, latents, scheduler, levels, steps, **options)


@sampler_of(
    UniPCMultistepScheduler,
    prediction_type=PREDICTIONS,
    solver_order=(1, 2),
    solver_type=("bh1", "bh2"),
    lower_order_final=ANY,
    disable_corrector=ANY,
)
def sample_unipc(
    denoise: ModelCall,
    latents: Tensor,
    scheduler: UniPCMultistepScheduler,
    *,
    begin_index: int,
    **options: Unpack[SampleOptions],
) -> Tensor:
    """UniPC (Zhao et al. 2023, "UniPC", Algorithms 1 and 2, with data prediction). See `Sampler`.

    UniP predicts x_t. At the next step, when D_t is known, UniC corrects x_t, and UniP steps on from the corrected x_t.
    With phi = exp(-h) - 1, and B(h) = phi for "bh2" or -h for "bh1"::

        x_t = (sigma_t / sigma_s) x_s - alpha_t phi D_s + alpha_t B(h) / 2 (h / h_r) (D_r - D_s)                (UniP)
        x_t = (sigma_t / sigma_s) x_s - alpha_t phi D_s - alpha_t B(h) (new (D_t - D_s) + older (D_r - D_s))    (UniC)

    Here x_s is the corrected one, and `_unic_weights` gives the weights `new` and `older`. In steps of order 1 the
    terms with D_r are absent and new = 1/2.
    """
    config, count = scheduler.config, len(scheduler.timesteps) - begin_index
    levels, steps, order = multistep_levels(scheduler, begin_index), [], 0
    h = [t.half_log_snr - s.half_log_snr for s, t in pairwise(levels)]
    phi = [math.expm1(-width) for width in h]  # -1 where h is infinite
    b = phi if config.solver_type == "bh2" else [-width for width in h]  # B(h)
    for i, (s, t) in enumerate(pairwise(levels)):
        corrector = {}
        if i > 0 and begin_index + i - 1 not in scheduler.disable_corrector:  # of the order of the step before
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
                **denoised_from(scheduler, s),
                **corrector,
                next_from_corrected=t.sigma / s.sigma,
                next_from_denoised=-t.alpha * phi[i] - second,
                next_from_previous=second,
            )
        )
    return run(denoise, latents, scheduler, levels, steps, **options)


@sampler_of(
    LCMScheduler,
    adds_noise=True,
    prediction_type=PREDICTIONS,
    clip_sample=ANY,
    clip_sample_range=ANY,
    timestep_scaling=ANY,
)
def sample_lcm(
    denoise: ModelCall,
    latents: Tensor,
    scheduler: LCMScheduler,
    *,
    begin_index: int,
    **options: Unpack[SampleOptions],
) -> Tensor:
    """Multistep latent consistency sampling (Luo et al. 2023, "Latent consistency models", Algorithm 3 with eq. 9).

    With c_skip and c_out of the scaled timestep, which make the last step near 0 the identity::

        x_t = alpha_t (c_skip x_s + c_out D_s) + sigma_t z

    See `Sampler`.
    """
    timesteps, alpha_bar, sigma_data = timesteps_from(scheduler, begin_index), scheduler.alphas_cumprod.tolist(), 0.5
    levels, steps = [*(preserving(alpha_bar[t]) for t in timesteps), CLEAN], []
    for timestep, (s, t) in zip(timesteps, pairwise(levels), strict=True):
        scaled = timestep * scheduler.config.timestep_scaling
        c_skip = sigma_data**2 / (scaled**2 + sigma_data**2)
        c_out = scaled / math.hypot(scaled, sigma_data)
        steps.append(
            StepCoefficients(
                **denoised_from(scheduler, s),
                next_from_corrected=t.alpha * c_skip,
                next_from_denoised=t.alpha * c_out,
                next_from_noise=t.sigma,
            )
        )
    return run(denoise, latents, scheduler, levels, steps, clip=_clip(scheduler), draws_unused=False, **options)


def sampler_for(scheduler: SchedulerMixin) -> Sampler:
    """The sampler that equals `scheduler`, looked up by its exact class: a subclass may step differently.

    Raises:
        GBCIError: no sampler is registered for the class, or it does not reproduce an option of the scheduler.
    """
    if type(scheduler) not in _REGISTERED:
        known = ", ".join(kind.__name__ for kind in _REGISTERED)
        raise GBCIError(f"scheduler is a {type(scheduler).__name__}; expected one of {known}")
    _check_options(scheduler, type(scheduler))
    return _REGISTERED[type(scheduler)].sampler


def takes_eta(scheduler: SchedulerMixin) -> bool:
    """Whether the sampler of this scheduler has an option `eta`."""
    return _REGISTERED[type(scheduler)].takes_eta


def adds_noise(scheduler: SchedulerMixin, eta: float) -> bool:
    """Whether the sampler of this scheduler draws noise."""
    registration = _REGISTERED[type(scheduler)]
    return registration.adds_noise or (registration.takes_eta and eta > 0)


def on_host(scheduler: SchedulerMixin) -> SchedulerMixin:
    """A copy of a scheduler with its tables (`timesteps` and, after `add_noise`, `alphas_cumprod`) on the CPU."""
    moved = copy.copy(scheduler)
    vars(moved).update({name: value.cpu() for name, value in vars(scheduler).items() if isinstance(value, Tensor)})
    return moved


def tables(scheduler: SchedulerMixin) -> Hashable:
    """Everything a sampler reads of a scheduler. Schedulers with equal results are sampled equally."""
    arrays = [scheduler.timesteps, scheduler.alphas_cumprod, getattr(scheduler, "sigmas", None)]
    options = sorted((name, repr(value)) for name, value in scheduler.config.items())
    return type(scheduler), *options, *(None if array is None else tuple(array.tolist()) for array in arrays)


def _check_options(scheduler: SchedulerMixin, kind: type[SchedulerMixin]) -> None:
    """Raises GBCIError for an option that is not reproduced.

    Only options of the class's signature are checked: a config that came from another scheduler keeps options that do
    not apply.
    """
    reproduced = _REGISTERED[kind].options
    for option, parameter in inspect.signature(kind.__init__).parameters.items():
        if option == "self" or option in _TABLE_OPTIONS | _IDLE_OPTIONS:
            continue
        expected = reproduced.get(option, (parameter.default,))
        if expected is not ANY and scheduler.config[option] not in expected:
            listed = " or ".join(map(repr, expected))
            raise GBCIError(f"{type(scheduler).__name__} has {option} {scheduler.config[option]!r}; expected {listed}")


def _checked_begin(scheduler: SchedulerMixin, kind: type[SchedulerMixin], begin: int | None) -> int:
    """Checks a scheduler's class, timesteps and options, and returns the index of its first timestep."""
    name = type(scheduler).__name__
    if not isinstance(scheduler, kind):
        raise GBCIError(f"scheduler is a {name}; expected {kind.__name__}")
    if scheduler.num_inference_steps is None:
        raise GBCIError(f"{name} has no timesteps; expected set_timesteps to be called first")
    _check_options(scheduler, kind)
    last = len(scheduler.timesteps) - 1
    if begin is None:
        begin = getattr(scheduler, "begin_index", None) or 0
    if not 0 <= begin <= last:
        raise GBCIError(f"begin_index is {begin!r}; expected 0 to {last}")
    return begin


def _clip(scheduler: SchedulerMixin) -> float | None:
    return scheduler.config.clip_sample_range if scheduler.config.clip_sample else None


def _euler_step(scheduler: SchedulerMixin, s: Level, sigma: float, noise: float = 0.0) -> StepCoefficients:
    from_latents, from_output = epsilon_from(scheduler, s)
    return StepCoefficients(
        denoised_from_latents=0.0,
        denoised_from_output=0.0,
        next_from_corrected=1 + (sigma - s.sigma) * from_latents,
        next_from_output=(sigma - s.sigma) * from_output,
        next_from_noise=noise,
    )


def _unic_weights(h_before: float, h: float, b: float) -> tuple[float, float]:
    """(rho_2, rho_1 / r_1) of UniC of order 2.

    They solve the linear system of Theorem 3.1 with the nodes r_1 = -h_before / h and r_2 = 1.
    """
    r = -h_before / h
    g = math.expm1(-h) / -h - 1
    first, second = g / b, 2 * (g / -h - 0.5) / b
    rho = (first - second) / (1 - r)
    return first - rho, rho / r
