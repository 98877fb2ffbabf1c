"""`accelerate`: the same pipeline, faster, and within a stated distance of the eager one's images.

=========== ============================================================================================
tier        what may differ from eager at the same seed, scheduler and steps
=========== ============================================================================================
exact       float32 rounding: latents by at most 1e-5 of the largest
tolerance   the rounding of a narrower dtype: an RMS error at most 1.5 times that of eager in this dtype
=========== ============================================================================================
"""

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor, nn

from gbci_fast.choices import RUNTIMES, TIERS
from gbci_fast.denoiser import Denoiser
from gbci_fast.errors import GBCIError
from gbci_fast.masks import feather_latent_mask
from gbci_fast.noise import seed_tensor
from gbci_fast.ops.blend_step import blend_step  # noqa: F401  registers the operator that is asked for below
from gbci_fast.pipeline import LATENT_FEATHER, GBCIPipeline, Trajectory
from gbci_fast.runtimes.blocks import why_not
from gbci_fast.runtimes.eager import EagerDenoiser
from gbci_fast.runtimes.fused import FusedDenoiser
from gbci_fast.sampling import KnownRegion, sample_ddim, sampler_for

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_BUILDERS = {"eager": EagerDenoiser, "fused": FusedDenoiser}


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What `accelerate` decided.

    Attributes:
        runtime: what executes the UNet.
        tier: the bound on the difference to eager.
        dtype: of UNet and VAE.
        notes: why it is not faster still, one sentence each.
    """

    runtime: str
    tier: str
    dtype: torch.dtype
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        lines = [f"runtime {self.runtime}, tier {self.tier}, {str(self.dtype).removeprefix('torch.')}", *self.notes]
        return "\n".join(lines)


class FastPipeline(GBCIPipeline):
    """A `GBCIPipeline` with another denoising loop; `accelerate` makes it.

    Attributes:
        eager: the pipeline it was made from.
        plan: how it runs.

    Where dtype, layout and device are as they were, its modules are those of `eager`, and moving one pipeline moves
    both; else all are copies. Weights, hooks and the like that change after the first call are not seen: accelerate
    again. As any diffusers pipeline, it serves one call at a time.
    """

    eager: GBCIPipeline
    plan: Plan
    _built: tuple[Any, Denoiser] | None = None

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> NoReturn:
        """Raises GBCIError: `accelerate` makes these pipelines."""
        raise GBCIError("a FastPipeline is made by accelerate(GBCIPipeline.from_pretrained(...))")

    @classmethod
    def from_pipe(cls, *args: Any, **kwargs: Any) -> NoReturn:
        """Raises GBCIError: `accelerate` makes these pipelines."""
        raise GBCIError("a FastPipeline is made by accelerate(pipe)")

    def describe(self) -> str:
        """What runs here, and what does not and why."""
        return str(self.plan)

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> None:
        """Saves the eager pipeline, with this one's scheduler: how it runs is no part of a checkpoint."""
        eager = GBCIPipeline(**{**self.eager.components, "scheduler": self.scheduler})
        eager.save_pretrained(save_directory, **kwargs)

    def _denoise(self, run: Trajectory) -> Tensor:
        sampler, denoiser = sampler_for(self.scheduler), self._denoiser_here()
        constant = torch.cat([run.mask_latents, run.masked_image_latents], 1)
        state = denoiser.prepare(run.conditioning, self.conditioner.null(1), constant, run.timesteps)
        known = None
        if run.known_region:
            weight = feather_latent_mask(run.mask_latents, LATENT_FEATHER)
            known = KnownRegion(latents=run.image_latents, noise=run.noise, weight=weight)
        noise: dict[str, Any] = {"seeds": seed_tensor(run.seeds, run.latents.device)} if run.seeds is not None else {
            "noise": lambda _: randn_tensor(run.latents.shape, run.generator, run.latents.device, torch.float32)
        }  # fmt: skip

        with self.progress_bar(total=len(run.timesteps)) as progress:

            def after(step: int, latents: Tensor) -> Tensor | None:
                progress.update()
                if run.callback is None:
                    return None
                changed = run.call_back(self, step, latents.clone())  # a callback may keep what it gets
                if known is not None:
                    known.latents, known.noise = run.image_latents, run.noise
                return changed

            return sampler(
                lambda latents, step: denoiser(latents, step, state, self.do_classifier_free_guidance),
                run.latents,
                self.scheduler,
                begin_index=len(self.scheduler.timesteps) - len(run.timesteps),
                guidance_scale=lambda: self.guidance_scale,
                known=known,
                model_dtype=denoiser.dtype,
                callback=after,
                interrupted=lambda: self.interrupt,
                **noise,
                **({"eta": run.eta} if sampler is sample_ddim else {}),
            )

    def _denoiser_here(self) -> Denoiser:
        """Built when it is first needed, and again when the UNet was moved or exchanged."""
        key = id(self.unet), self.unet.device, self.unet.dtype
        if self._built is None or self._built[0] != key:
            self._built = key, _BUILDERS[self.plan.runtime](self.unet)
        return self._built[1]


def accelerate(
    pipe: GBCIPipeline,
    runtime: str = "auto",
    tier: str = "tolerance",
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> FastPipeline:
    """A pipeline with the same call and, within `tier`, the same images; `pipe` stays as it is.

    Args:
        pipe: the eager pipeline.
        runtime: "fused" computes once what does not change from step to step; "eager" calls the stock UNet; "auto" is
            "fused" where that can run this UNet.
        tier: "exact" or "tolerance", the largest difference to the eager pipeline that a technique may make.
        dtype: of UNet and VAE; by default the narrowest that the tier and the device are good for.
        device: by default where `pipe` is.

    Raises:
        GBCIError: an unknown runtime or tier, a dtype that the tier excludes, a runtime that cannot run this UNet, a
            device that the extension was not built for, or a scheduler (or an option of it) that no sampler reproduces.
    """
    for name, value, known in (("runtime", runtime, RUNTIMES), ("tier", tier, TIERS)):
        if value not in known:
            raise GBCIError(f"{name} is {value!r}; expected one of {', '.join(known)}")
    sampler_for(pipe.scheduler)
    device = torch.device(device if device is not None else pipe.device)
    plan = _plan(pipe, runtime, tier, dtype, device)
    # oneDNN is faster in bfloat16 with channels last and in float32 without; cuDNN likes channels last.
    wide_cpu = device.type == "cpu" and plan.dtype == torch.float32
    layout = torch.contiguous_format if wide_cpu else torch.channels_last
    parts = {"vae": pipe.vae, "unet": pipe.unet, "conditioner": pipe.conditioner}
    dtypes = {"vae": plan.dtype, "unet": plan.dtype, "conditioner": pipe.conditioner.dtype}
    as_they_are = all(part.dtype == dtypes[name] and part.device == device for name, part in parts.items())
    if not (as_they_are and wide_cpu):
        # Not by diffusers' own `to`, which logs a warning when it casts.
        parts = {
            name: nn.Module.to(copy.deepcopy(part), device, dtypes[name], memory_format=layout)
            for name, part in parts.items()
        }
    fast = FastPipeline(**parts, scheduler=copy.deepcopy(pipe.scheduler))
    fast.eager, fast.plan = pipe, plan
    fast.set_progress_bar_config(**getattr(pipe, "_progress_bar_config", {}))
    return fast


def _plan(pipe: GBCIPipeline, runtime: str, tier: str, dtype: torch.dtype | None, device: torch.device) -> Plan:
    notes = []
    if not torch._C._dispatch_has_kernel_for_dispatch_key("gbci_fast::blend_step", device.type.upper()):
        raise GBCIError(f"gbci_fast was built without kernels for {device.type}; install nvcc and build it again")
    if dtype is None:
        dtype = pipe.unet.dtype
        if tier == "tolerance" and dtype == torch.float32:
            if _has_bfloat16_units(device):
                dtype = torch.bfloat16
            else:
                notes.append(f"float32, because this {device.type.upper()} has no bfloat16 units")
    if dtype not in DTYPES:
        raise GBCIError(f"dtype is {dtype}; expected {', '.join(map(str, DTYPES))}")
    if tier == "exact" and not dtype == pipe.unet.dtype == torch.float32:
        raise GBCIError(f"dtype is {dtype} with tier 'exact'; expected torch.float32 of a float32 pipeline")
    reasons = why_not(pipe.unet)
    if reasons and runtime == "fused":
        raise GBCIError(f"the fused runtime cannot run this UNet: {'; '.join(reasons)}")
    if runtime == "auto":
        runtime = "eager" if reasons else "fused"
        notes += [f"not the fused runtime: {reason}" for reason in reasons]
    return Plan(runtime=runtime, tier=tier, dtype=dtype, notes=tuple(notes))


def _has_bfloat16_units(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
