"""Everything between two UNet calls of an inpainting sampler, in one pass over memory.

It computes guidance, the scheduler's update with its noise, the known region at the next noise level, the feathered
blend of update and known region, and the next model input. In the symbols of `blend_step`, per element::

    m         = u + w (c - u)                                     guidance (Ho and Salimans 2022, eq. 6)
    m         = m (phi std(c) / std(m) + 1 - phi)                 rescale (Lin et al. 2024, eq. 15 and 16)
    denoised' = clip(a_0 latents + a_1 m)                         x_0 from an epsilon-, v- or x_0-prediction
    z         = b_0 corrected + b_1 previous + b_2 denoised + b_3 denoised'        without a corrector: z = latents
    next      = c_0 z + c_1 m + c_2 denoised' + c_3 previous + c_4 denoised + c_5 noise
    k         = d_0 known + d_1 known_noise
    out       = lerp(k, next, weight)
    input     = e_0 out

Every solver here is linear in these terms; `StepCoefficients` holds the coefficients. A term whose coefficient is 0 is
not read.

Equivalent to: `blend_step_ref`, and with the coefficients of `gbci_fast.fast.samplers` to ``scheduler.step`` and the
blend of `gbci_fast.model.pipeline`. Faster because every tensor is read once and written once, where eager PyTorch
passes over memory for every operation, and because the noise is drawn in registers.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from gbci_fast.model.noise import STREAM_SCHEDULER
from gbci_fast.ops import load_extension
from gbci_fast.ops.philox_normal import philox_normal_ref

load_extension()


@dataclass(frozen=True, kw_only=True)
class StepCoefficients:
    """The coefficients of one step. ``x_from_y`` multiplies y in the sum for x; see the module's equations.

    If all four ``corrected_from_...`` are 0, there is no corrector, and z is `latents` itself.
    """

    denoised_from_latents: float
    denoised_from_output: float
    corrected_from_corrected: float = 0.0
    corrected_from_previous: float = 0.0
    corrected_from_older: float = 0.0
    corrected_from_denoised: float = 0.0
    next_from_corrected: float = 0.0
    next_from_output: float = 0.0
    next_from_denoised: float = 0.0
    next_from_previous: float = 0.0
    next_from_older: float = 0.0
    next_from_noise: float = 0.0
    known_from_latents: float = 1.0
    known_from_noise: float = 0.0
    input_from_latents: float = 1.0

    @property
    def has_corrector(self) -> bool:
        """Whether z is a sum of its own instead of `latents`."""
        return any(value for name, value in vars(self).items() if name.startswith("corrected_from_"))

    def values(self) -> list[float]:
        """The fields in their order, which is that of the operator's argument and of csrc/blend_step/blend_step.h."""
        return list(vars(self).values())  # dataclasses.astuple copies, slower than a small step


def blend_step_ref(
    latents: Tensor,
    conditional: Tensor,
    unconditional: Tensor | None = None,
    *,
    coefficients: StepCoefficients,
    clip: float | None = None,
    guidance_scale: float = 1.0,
    guidance_rescale: float = 0.0,
    previous: Tensor | None = None,
    denoised: Tensor | None = None,
    corrected: Tensor | None = None,
    noise: Tensor | None = None,
    seeds: Tensor | None = None,
    step: int = 0,
    stream: int = STREAM_SCHEDULER,
    known: Tensor | None = None,
    known_noise: Tensor | None = None,
    weight: Tensor | None = None,
    model_input: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """`blend_step` in plain PyTorch, in float32 (float64 for float64 latents)."""
    real = torch.float64 if latents.dtype == torch.float64 else torch.float32
    a = coefficients

    def total(*terms: tuple[float, Tensor | None]) -> Tensor:
        """The sum of the terms whose coefficient is not 0, in their order; zeros if there are none."""
        parts = [factor * term.to(real) for factor, term in terms if factor != 0]
        return sum(parts[1:], parts[0]) if parts else torch.zeros_like(latents, dtype=real)

    m = conditional.to(real)
    if unconditional is not None:
        u = unconditional.to(real)
        m = u + guidance_scale * (m - u)
        if guidance_rescale != 0:
            spread = [part.std((1, 2, 3), keepdim=True) for part in (conditional.to(real), m)]
            m = m * (guidance_rescale * (spread[0] / spread[1]) + (1 - guidance_rescale))
    new = total((a.denoised_from_latents, latents), (a.denoised_from_output, m))
    if clip is not None:
        new = new.clamp(-clip, clip)
    z = latents.to(real)
    if a.has_corrector:
        z = total(
            (a.corrected_from_corrected, corrected),
            (a.corrected_from_previous, previous),
            (a.corrected_from_older, denoised),
            (a.corrected_from_denoised, new),
        )
    if a.next_from_noise != 0 and noise is None:
        noise = philox_normal_ref(seeds, latents.shape[1:], step=step, stream=stream, dtype=real)
    result = total(
        (a.next_from_corrected, z),
        (a.next_from_output, m),
        (a.next_from_denoised, new),
        (a.next_from_previous, previous),
        (a.next_from_older, denoised),
        (a.next_from_noise, noise),
    )
    if known is not None:
        k = total((a.known_from_latents, known), (a.known_from_noise, known_noise))
        result = torch.lerp(k, result, weight.to(real).expand_as(k))
    if denoised is not None:
        denoised.copy_(new)
    if corrected is not None:
        corrected.copy_(z)
    if model_input is not None:
        model_input.copy_(a.input_from_latents * result)
    return (torch.empty_like(latents) if out is None else out).copy_(result)


@torch.library.register_fake("gbci_fast::blend_step")
def _(latents, *arguments):
    for argument in arguments:
        if isinstance(argument, Tensor) and argument.device != latents.device:
            raise RuntimeError(f"tensors must be on {latents.device} like latents, got one on {argument.device}")


def blend_step(
    latents: Tensor,
    conditional: Tensor,
    unconditional: Tensor | None = None,
    *,
    coefficients: StepCoefficients,
    clip: float | None = None,
    guidance_scale: float = 1.0,
    guidance_rescale: float = 0.0,
    previous: Tensor | None = None,
    denoised: Tensor | None = None,
    corrected: Tensor | None = None,
    noise: Tensor | None = None,
    seeds: Tensor | None = None,
    step: int = 0,
    stream: int = STREAM_SCHEDULER,
    known: Tensor | None = None,
    known_noise: Tensor | None = None,
    weight: Tensor | None = None,
    model_input: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """The latents after one step.

    On CUDA the operator neither allocates (given `out`) nor synchronizes, so a CUDA graph can contain it.

    Tensors are ``[B, C, H, W]``, each NCHW or channels-last, also a slice of more channels or expanded from one.
    `latents` may be float32, bfloat16, float16 or, on the CPU, float64; the sums are float32 (float64 for float64).

    Args:
        latents: x_t.
        conditional: model output; the dtype of `latents`, or bfloat16 or float16 beside float32 latents.
        unconditional: model output of the null condition, ``[B or 1, C, H, W]``; None turns guidance off.
        coefficients: which solver, and where on its trajectory.
        clip: the denoised sample is clipped to ``[-clip, clip]``.
        guidance_scale: w.
        guidance_rescale: phi in [0, 1]. The unbiased standard deviations are taken over each sample of the batch.
        previous: denoised sample of the step before.
        denoised: *in and out*: read as an older denoised sample (from two steps before for a solver with `previous`,
            else from the step before), then overwritten with this step's denoised sample.
        corrected: *in and out*: z of the step before, overwritten with this step's z.
        noise: the scheduler's noise; excludes `seeds`.
        seeds: int64 ``[B]``: the noise is that of `philox_normal` at (`step`, `stream`), in any layout.
        step: the step's index, for `seeds`.
        stream: the purpose of the noise, for `seeds`.
        known: noise-free latents of the known region; None leaves the result unblended.
        known_noise: initial noise, which brings `known` to the next noise level.
        weight: float32 (float64 for float64) ``[B, 1, H, W]``, 1 for the sampler's result and 0 for `known`. Blends as
            `torch.lerp`, exactly at both ends.
        model_input: *out*: the next model input, in the model's dtype.
        out: the output tensor; may be `latents`. A new tensor by default.

    Returns:
        `out`.

    Raises:
        RuntimeError: a dtype, device, shape or layout is not as above, a coefficient is not finite, a tensor that the
            coefficients ask for is missing, or the batch is empty.
    """
    if out is None:
        out = torch.empty_like(latents)
    torch.ops.gbci_fast.blend_step(
        latents, conditional, unconditional, previous, denoised, corrected, noise, seeds, known, known_noise, weight,
        model_input, out, coefficients.values(), clip, guidance_scale, guidance_rescale, step, stream,
    )  # fmt: skip
    return out
