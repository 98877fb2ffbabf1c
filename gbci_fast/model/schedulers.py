"""Which schedulers of diffusers an inpainting pipeline can drive, and their timesteps."""

import inspect

import torch
from diffusers import SchedulerMixin

from gbci_fast.errors import GBCIError

NEEDED = (
    "set_timesteps", "scale_model_input", "step", "add_noise", "init_noise_sigma", "order", "alphas_cumprod",
)  # fmt: skip
GIVEN = 3  # arguments of each step: model output, timestep, sample


def check_scheduler(scheduler: SchedulerMixin) -> None:
    """Raises GBCIError where inpainting cannot drive the scheduler, because it is for another kind of model."""
    missing = [name for name in NEEDED if not hasattr(scheduler, name)]
    if missing:
        raise _refusal(scheduler, f"it has no {', '.join(missing)}")
    more = list(inspect.signature(scheduler.step).parameters.values())[GIVEN:]
    wanted = [one.name for one in more if one.default is one.empty and one.kind == one.POSITIONAL_OR_KEYWORD]
    if wanted:
        raise _refusal(scheduler, f"its steps also need {', '.join(wanted)}")


def set_timesteps(scheduler: SchedulerMixin, num_inference_steps: int, device: torch.device) -> None:
    """Sets ``scheduler.timesteps``, which descend to 0 or more.

    Raises:
        GBCIError: the scheduler does not take this number of steps, or its timesteps ascend.
    """
    name = type(scheduler).__name__
    try:
        scheduler.set_timesteps(num_inference_steps, device=device)
    except ValueError as error:  # more steps than the scheduler was made for
        raise GBCIError(f"num_inference_steps {num_inference_steps} does not suit {name}: {error}") from error
    except Exception as error:  # of a scheduler for another kind of model, which needs more arguments
        raise _refusal(scheduler, f"set_timesteps fails, {type(error).__name__}: {error}") from error
    first, last = scheduler.timesteps[0].item(), scheduler.timesteps[-1].item()
    if first < last:
        raise _refusal(scheduler, "its timesteps ascend, to noise")
    if last < 0:  # trailing spacing, by a rounding error; -1 would be read as the noisiest
        raise GBCIError(
            f"num_inference_steps {num_inference_steps} takes {name} to timestep {last:g}; expected another number"
        )


def _refusal(scheduler: SchedulerMixin, reason: str) -> GBCIError:
    name = type(scheduler).__name__
    return GBCIError(
        f"scheduler is a {name}, which inpainting cannot drive: {reason}; expected one such as DDIMScheduler, "
        "EulerDiscreteScheduler, DPMSolverMultistepScheduler, UniPCMultistepScheduler or LCMScheduler"
    )
