"""`gbci_fast.accelerate`: a faster copy of a pipeline. Its images stay within a stated bound of the eager images.

=========== ============================================================================================
tier        what may differ from eager at the same seed, scheduler and steps
=========== ============================================================================================
exact       float32 rounding: latents differ by at most 1e-5 of the largest latent. One step of Euler, which starts at
            167 standard deviations, differs by at most 4e-5.
tolerance   the rounding of a narrower dtype: the RMS error is at most 1.5 times that of eager in this dtype
approximate also the model's input: only the latents around the mask (`gbci_fast.fast.windows`). With few steps also the
            model: the checkpoint's few-step weights (`gbci_fast.model.few_step`).
=========== ============================================================================================
"""

from dataclasses import replace
from typing import overload

import torch
from diffusers import UNet2DConditionModel

from gbci_fast.choices import RUNTIME, RUNTIMES, TIER, TIERS
from gbci_fast.errors import GBCIError
from gbci_fast.fast.decision import decide, decide_unet
from gbci_fast.fast.devices import as_device, fastest_layout
from gbci_fast.fast.pipeline import FastPipeline
from gbci_fast.fast.samplers import sampler_for
from gbci_fast.fast.unet import FastUNet
from gbci_fast.model.pipeline import GBCIPipeline


@overload
def accelerate(
    pipe: GBCIPipeline,
    runtime: str = ...,
    tier: str = ...,
    dtype: torch.dtype | None = ...,
    device: torch.device | str | None = ...,
    few_step: bool = ...,
) -> FastPipeline: ...
@overload
def accelerate(
    pipe: UNet2DConditionModel,
    runtime: str = ...,
    tier: str = ...,
    dtype: torch.dtype | None = ...,
    device: torch.device | str | None = ...,
    few_step: bool = ...,
) -> FastUNet: ...
def accelerate(
    pipe: GBCIPipeline | UNet2DConditionModel,
    runtime: str = RUNTIME,
    tier: str = TIER,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    few_step: bool = True,
) -> FastPipeline | FastUNet:
    """Returns a faster copy of a pipeline or UNet, which is called like the original.

    The images are those of `pipe` within the bound of `tier`. `pipe` itself stays as it is. (Hugging Face's package
    `accelerate` is unrelated.)

    Args:
        pipe: the eager pipeline; or the stock UNet of any diffusers pipeline, which becomes a UNet with the same
            forward, block by block (see `gbci_fast.fast.unet.FastUNet`).
        runtime: what executes the UNet. "fused" computes once what does not change from step to step. "compile" is
            "fused" under `torch.compile`, or the stock UNet where "fused" cannot run it; it compiles at the first call
            with a new batch or image size. "tensorrt" runs the core of "fused" and the decoder as TensorRT engines,
            which are built at the first call with a new batch or image size and kept in the user's cache. "eager" calls
            the stock UNet. "auto" is the first runtime of `gbci_fast.fast.decision.AUTO` that can run this UNet.
        tier: "exact", "tolerance" or "approximate": the largest difference to the eager pipeline that is allowed.
        dtype: of UNet and VAE; by default bfloat16 where the tier allows it and the device is faster in it, else the
            dtype of `pipe`.
        device: by default the device of `pipe`.
        few_step: whether tier "approximate" may use the few-step weights that `pipe` carries.

    Raises:
        GBCIError: an unknown runtime or tier, a dtype that the tier excludes, a runtime that cannot run this UNet, a
            device that the extension was not built for, or a scheduler (or scheduler option) that no sampler
            reproduces.
    """
    for name, value, known in (("runtime", runtime, RUNTIMES), ("tier", tier, TIERS)):
        if value not in known:
            raise GBCIError(f"{name} is {value!r}; expected one of {', '.join(known)}")
    if isinstance(pipe, UNet2DConditionModel):
        return _accelerate_unet(pipe, runtime, tier, dtype, as_device(pipe.device if device is None else device))
    if not isinstance(pipe, GBCIPipeline):
        raise GBCIError(f"pipe is a {type(pipe).__name__}; expected a GBCIPipeline or a UNet2DConditionModel")
    sampler_for(pipe.scheduler)
    device = as_device(pipe.device if device is None else device)
    change = pipe.few_step if few_step and tier == "approximate" else None
    return FastPipeline.of(pipe, decide(pipe, runtime, tier, dtype, device, change), device, change)


def _accelerate_unet(
    unet: UNet2DConditionModel, runtime: str, tier: str, dtype: torch.dtype | None, device: torch.device
) -> FastUNet:
    decision = decide_unet(unet, runtime, tier, dtype, device)
    fast = FastUNet.of(unet, decision, device, fastest_layout(device, decision.dtype))
    if decision.runtime == "fused" and not fast.num_fused:
        if runtime == "fused":
            raise GBCIError(f"the fused runtime cannot run any block of this UNet: {'; '.join(fast.stock_reasons)}")
        fast.decision = replace(decision, runtime="eager")
    return fast
