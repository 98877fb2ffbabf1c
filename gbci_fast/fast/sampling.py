"""The loop that all samplers share, how it calls a model, and the options of a sampler.

`gbci_fast.fast.samplers` has the samplers, and defines the symbols that are used here.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypedDict

import torch
from diffusers import SchedulerMixin
from torch import Tensor

from gbci_fast.errors import GBCIError
from gbci_fast.fast.levels import CLEAN, Level
from gbci_fast.ops.blend_step import StepCoefficients, blend_step

ModelCall = Callable[[Tensor, int], Tensor | tuple[Tensor, Tensor]]
"""(latents ``[B, C, H, W]``, scaled as ``scheduler.scale_model_input`` does; the step's index, from 0) -> the model's
output, or (conditional, unconditional) for the loop to combine. The input is overwritten after the call."""


@dataclass(kw_only=True)
class KnownRegion:
    """The region outside the mask. The loop reads the fields at every step, so a callback may replace them.

    Attributes:
        latents: noise-free, ``[B, C, H, W]``; put back after each step, at the level of the schedule's next timestep.
        noise: initial noise, ``[B, C, H, W]``, which brings `latents` to that level.
        weight: ``[B, 1, H, W]``, float32 (float64 for float64 latents): 1 keeps the sampler's latents, 0
            puts the known ones back.
    """

    latents: Tensor
    noise: Tensor
    weight: Tensor


class SampleOptions(TypedDict, total=False):
    """Keywords of every sampler.

    Attributes:
        guidance_scale: w, or a function that returns w and is called at every step; by default 1. Without effect where
            the model call returns one output.
        guidance_rescale: phi in [0, 1] (Lin et al. 2024, section 3.4); by default 0.
        known: the region to keep.
        seeds: int64 ``[B]`` (`gbci_fast.model.noise.seed_tensor`). The noise of a step is drawn in the kernel, as
            stream 1 of each seed at the step's index. Excludes `noise`.
        noise: a function of the step's index that returns the noise of that step. It is called in the steps in which
            diffusers draws noise, also where diffusers discards it, so that a generator advances as in diffusers.
        model_dtype: of the model's input and output; by default the dtype of the latents.
        callback: called after each step with its index and the latents. The next step overwrites these latents: clone
            them to keep them. Latents that the callback returns replace them.
        interrupted: called before each step; True ends the trajectory there.
    """

    guidance_scale: float | Callable[[], float]
    guidance_rescale: float
    known: KnownRegion | None
    seeds: Tensor | None
    noise: Callable[[int], Tensor] | None
    model_dtype: torch.dtype | None
    callback: Callable[[int, Tensor], Tensor | None] | None
    interrupted: Callable[[], bool] | None


@torch.no_grad()
def run(
    denoise: ModelCall,
    latents: Tensor,
    scheduler: SchedulerMixin,
    levels: list[Level],
    steps: list[StepCoefficients],
    *,
    clip: float | None = None,
    draws_unused: bool = True,
    guidance_scale: float | Callable[[], float] = 1.0,
    guidance_rescale: float = 0.0,
    known: KnownRegion | None = None,
    seeds: Tensor | None = None,
    noise: Callable[[int], Tensor] | None = None,
    model_dtype: torch.dtype | None = None,
    callback: Callable[[int, Tensor], Tensor | None] | None = None,
    interrupted: Callable[[], bool] | None = None,
) -> Tensor:
    """The loop of every sampler: call the model, then `blend_step`, which also makes the model's next input.

    Args:
        denoise: the model.
        latents: ``[B, C, H, W]`` at the first level; left as they are.
        scheduler: the scheduler whose steps these are; error messages name it.
        levels: the level of each step's input; levels beyond are not read. After a step, the known region is noised to
            the next step's level; after the last step, it is noise-free.
        steps: coefficients of each step.
        clip: bound of x_0 on both sides, or None.
        draws_unused: whether `noise` is also called in steps that do not add it, if any step does.
        guidance_scale, guidance_rescale, known, seeds, noise, model_dtype, callback, interrupted: see `SampleOptions`.

    Returns:
        New latents ``[B, C, H, W]``.

    Raises:
        GBCIError: steps that add noise get neither seeds nor noise, or both are given.
    """
    if seeds is not None and noise is not None:
        raise GBCIError("seeds and noise were both given; expected one of them")
    if seeds is None and noise is None and any(step.next_from_noise != 0 for step in steps):
        raise GBCIError(f"{type(scheduler).__name__} adds noise in its steps; expected seeds or noise")
    draws = draws_unused and any(step.next_from_noise != 0 for step in steps)
    latents = latents.clone()
    model_input = latents
    scaled = model_dtype not in (None, latents.dtype) or levels[0].scale != 1
    if scaled:
        model_input = torch.empty_like(latents, dtype=model_dtype).copy_(levels[0].scale * latents)
    # Results of earlier steps, for solvers that read them. In a first step their coefficients are 0: none is read.
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
            noise(i)  # discarded, so that the generator advances as in diffusers
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
