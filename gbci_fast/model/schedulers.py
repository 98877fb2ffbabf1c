"""Checks which of diffusers' schedulers the pipeline can use, and sets their timesteps."""

import inspect

import torch
from diffusers import SchedulerMixin

from gbci_fast.errors import GBCIError

NEEDED = (
    "set_timesteps", "scale_model_input", "step", "add_noise", "init_noise_sigma", "order", "alphas_cumprod",
)  # fmt: skip
GIVEN = 3  # number of arguments passed to each step: model output, timestep, sample


def check_scheduler(scheduler: SchedulerMixin) -> None:
    """Checks that the pipeline can use a scheduler.

    Raises:
        GBCIError: the scheduler is for another kind of model.
    """
    missing = [name for name in NEEDED if not hasattr(scheduler, name)]
    if missing:
        raise _refusal(scheduler, f"it has no {', '.join(missing)}")
    more = list(inspect.signature(scheduler.step).parameters.values())[GIVEN:]
    wanted = [one.name for one in more if one.default is one.empty and one.kind == one.POSITIONAL_OR_KEYWORD]
    if wanted:
        raise _refusal(scheduler, f"its steps also need {', '.join(wanted)}")


def set_timesteps(scheduler: SchedulerMixin, num_inference_steps: int, device: torch.device) -> None:
    """Sets ``scheduler.timesteps``, and checks that they descend to a timestep of at least 0.

    Raises:
        GBCIError: the scheduler does not support this number of steps, or its timesteps ascend or are negative.
    """
    name = type(scheduler).__name__
    try:
        scheduler.set_timesteps(num_inference_steps, device=device)
    except ValueError as error:  # more steps than the scheduler has
        raise GBCIError(f"num_inference_steps {num_inference_steps} does not suit {name}: {error}") from error
    except Exception as error:  # a scheduler for another kind of model, which needs more arguments
        raise _refusal(scheduler, f"set_timesteps fails, {type(error).__name__}: {error}") from error
    first, last = scheduler.timesteps[0].item(), scheduler.timesteps[-1].item()
    if first < last:
        raise _refusal(scheduler, "its timesteps ascend, to noise")
    if last < 0:  # a rounding error of trailing spacing; as an index, -1 would be the noisiest timestep
        raise GBCIError(
            f"num_inference_steps {num_inference_steps} takes {name} to timestep {last:g}; expected another number"
        )


def _refusal(scheduler: SchedulerMixin, reason: str) -> GBCIError:
    name = type(scheduler).__name__
    return GBCIError(
        f"scheduler is a {name}, which inpainting cannot drive: {reason}; expected one such as DDIMScheduler, "
        "EulerDiscreteScheduler, DPMSolverMultistepScheduler, UniPCMultistepScheduler or LCMScheduler"
    )
