"""Noise levels of a scheduler's tables, and the conversion of a model's output to x_0 or epsilon at a level.

The symbols are those of `gbci_fast.fast.samplers`.
"""

import math
from itertools import pairwise
from typing import NamedTuple

from diffusers import SchedulerMixin

from gbci_fast.errors import GBCIError


class Level(NamedTuple):
    """A noise level: ``x = alpha x_0 + sigma epsilon``. The model's input is x times `scale`."""

    alpha: float
    sigma: float
    scale: float = 1.0

    @property
    def half_log_snr(self) -> float:
        """Lambda; infinite at `CLEAN`."""
        return math.log(self.alpha / self.sigma) if self.sigma > 0 else math.inf


CLEAN = Level(1.0, 0.0)
"""The level of images, after the last step."""


def preserving(alpha_bar: float) -> Level:
    """A level of a variance-preserving process, alpha^2 = `alpha_bar`; the model's input is x itself."""
    return Level(math.sqrt(alpha_bar), math.sqrt(1 - alpha_bar))


def exploding(sigma: float) -> Level:
    """A level of a variance-exploding process, alpha = 1; the model's input is x scaled to the variance of images."""
    return Level(1.0, sigma, 1 / math.hypot(1.0, sigma))


def multistep_levels(scheduler: SchedulerMixin, begin: int) -> list[Level]:
    """Variance-preserving levels from index `begin` on, of a scheduler whose table holds sigma / alpha.

    Raises:
        GBCIError: lambda does not increase in a step before the last.
    """
    ratios = sigmas_from(scheduler, begin)
    for s, t in pairwise(ratios[:-1]):
        if not t < s:
            raise GBCIError(f"{type(scheduler).__name__} has sigma {t} after {s}; expected less, as of fewer timesteps")
    return [Level(1 / math.hypot(1.0, ratio), ratio / math.hypot(1.0, ratio)) for ratio in ratios]


def sigmas_from(scheduler: SchedulerMixin, begin: int) -> list[float]:
    """The scheduler's sigmas from index `begin` on: one per timestep, and the last level.

    Euler's log-linear table is longer; the scheduler never reaches its other entries.
    """
    return scheduler.sigmas.tolist()[begin : len(scheduler.timesteps) + 1]


def timesteps_from(scheduler: SchedulerMixin, begin: int) -> list[int]:
    """The scheduler's timesteps from index `begin` on.

    Raises:
        GBCIError: a timestep that the noise schedule does not have.
    """
    timesteps, last = scheduler.timesteps.tolist(), len(scheduler.alphas_cumprod) - 1
    if not all(0 <= t <= last for t in timesteps):  # trailing spacing of 61 steps ends at -1
        name, first = type(scheduler).__name__, timesteps[0]
        raise GBCIError(f"{name} has timesteps from {first} to {timesteps[-1]}; expected them within {last} to 0")
    return timesteps[begin:]


def denoised_from(scheduler: SchedulerMixin, level: Level) -> dict[str, float]:
    """Coefficients of x_0 as a sum of latents and model output (Salimans and Ho 2022, appendix D).

    Raises:
        GBCIError: the model predicts epsilon, and the level holds no image (alpha = 0).
    """
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


def epsilon_from(scheduler: SchedulerMixin, level: Level) -> tuple[float, float]:
    """Coefficients of epsilon for (latents, model output). As in diffusers, clipping x_0 does not change epsilon."""
    (alpha, sigma, scale), kind = level, scheduler.config.prediction_type
    if kind == "epsilon":
        return 0.0, 1.0
    if kind == "v_prediction":
        return sigma * scale**2, alpha * scale
    return 1 / sigma, -alpha / sigma
