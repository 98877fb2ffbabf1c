"""`accelerate`: the same pipeline, faster, and within a stated distance of the eager one's images.

=========== ============================================================================================
tier        what may differ from eager at the same seed, scheduler and steps
=========== ============================================================================================
exact       float32 rounding: latents by at most 1e-5 of the largest; one step of Euler, which starts at 167 standard
            deviations, by 4e-5
tolerance   the rounding of a narrower dtype: an RMS error at most 1.5 times that of eager in this dtype
approximate also what the model sees: the latents around the mask alone (`gbci_fast.fast.windows`); and, for few steps,
            the model: the checkpoint's few-step weights (`gbci_fast.model.few_step`)
=========== ============================================================================================
"""

import copy
import functools
import inspect
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn, ParamSpec, TypeVar, overload

import torch
from diffusers import SchedulerMixin, UNet2DConditionModel
from torch import Tensor, nn

from gbci_fast.attributes import Attributes
from gbci_fast.choices import RUNTIMES, TIERS
from gbci_fast.errors import GBCIError
from gbci_fast.fast import windows
from gbci_fast.fast.denoiser import Denoiser
from gbci_fast.fast.graph import BUCKETS, TOKENS, CudaRecorder, LoopGraphs, Recorder
from gbci_fast.fast.modules.adapters import adapter_notes, merged
from gbci_fast.fast.modules.autoencoder import with_fused_norms
from gbci_fast.fast.modules.blocks import cross_attention_notes, has_other_forward, why_not
from gbci_fast.fast.modules.convolution import with_filtered_convolutions
from gbci_fast.fast.runtimes.compile import CompiledDenoiser, need_compiler
from gbci_fast.fast.runtimes.eager import EagerDenoiser
from gbci_fast.fast.runtimes.fused import FusedDenoiser
from gbci_fast.fast.sampling import KnownRegion, adds_noise, on_host, sample_ddim, sampler_for, tables
from gbci_fast.fast.tensorrt.denoiser import EngineAutoencoder, TensorRTDenoiser, tensorrt_note, why_not_tensorrt
from gbci_fast.fast.unet import FastUNet
from gbci_fast.fast.watch import Watch, same_weights, still
from gbci_fast.model.arguments import check_argument_types
from gbci_fast.model.conditioning import Conditioning
from gbci_fast.model.devices import has_bfloat16_units, without_autocast
from gbci_fast.model.few_step import FewStepLoRA, few_step_scheduler
from gbci_fast.model.masks import feather_latent_mask
from gbci_fast.model.noise import seed_tensor
from gbci_fast.model.pipeline import LATENT_FEATHER, GBCIPipeline, Trajectory
from gbci_fast.model.turns import in_turn
from gbci_fast.ops._triton import triton
from gbci_fast.ops.blend_step import blend_step  # noqa: F401  registers the operator that is asked for below

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
AUTO = ("fused", "eager")
"""What "auto" tries in turn, the fastest first as far as measured: "tensorrt" has been measured nowhere yet."""
Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")
_SIGNATURE = inspect.signature(GBCIPipeline.__call__)
_BUILDERS = {
    "eager": EagerDenoiser, "fused": FusedDenoiser, "compile": CompiledDenoiser, "tensorrt": TensorRTDenoiser,
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What `accelerate` decided.

    Attributes:
        runtime: what executes the UNet.
        tier: the bound on the difference to eager.
        dtype: of UNet and VAE.
        notes: why it is not faster still, one sentence each.
        asked: the runtime that was asked for.
    """

    runtime: str
    tier: str
    dtype: torch.dtype
    notes: tuple[str, ...] = ()
    asked: str = "auto"

    def __str__(self) -> str:
        lines = [f"runtime {self.runtime}, tier {self.tier}, {str(self.dtype).removeprefix('torch.')}", *self.notes]
        return "\n".join(lines)


def _called_as(call: Callable[Arguments, Result]) -> Callable[[Callable[..., Any]], Callable[Arguments, Result]]:
    """`functools.wraps`, with the signature of `call` for type checkers, too."""
    return functools.wraps(call)


class FastPipeline(GBCIPipeline):
    """A `GBCIPipeline` with another denoising loop; `accelerate` makes it.

    Attributes:
        eager: the pipeline it was made from.
        plan: how it runs.

    Its modules are copies of `eager`'s: what is done to one pipeline does not reach the other. What changes in its own
    modules counts from the next step on, as in any pipeline: a UNet of which weights, parts, processors, hooks (as of
    offloading) or adapters changed since the last call is looked at again, and the plan may change. Calls from several
    threads take turns.

    With a `few_step` component, calls that it covers go to the student, with its own scheduler; a callback gets the
    student's pipeline.
    """

    eager: GBCIPipeline
    plan: Plan
    _sources: tuple[
        Watch, ...
    ] = ()  # as they were accelerated: the student is made of the eager UNet until one changes
    _planned_for: Watch | None = None
    _built: tuple[Denoiser, LoopGraphs | None] | None = None
    _student: tuple[list[Watch], "FastPipeline"] | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Without what belongs to one pipeline alone, and is made anew."""
        anew = ("_sources", "_planned_for", "_built", "_student")
        state = {name: value for name, value in vars(self).items() if name not in anew}
        return state | {"_as_accelerated": self._is_as_accelerated()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        as_accelerated = state.pop("_as_accelerated")
        vars(self).update(state)
        if as_accelerated:
            self._watch_sources()

    @in_turn
    @_called_as(GBCIPipeline.__call__)
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        call = _SIGNATURE.bind(self, *args, **kwargs)
        call.apply_defaults()
        check_argument_types(call.arguments)
        if self.uses_few_step(*(call.arguments[name] for name in ("num_inference_steps", "guidance_scale", "eta"))):
            student = self._student_here()
            student.set_progress_bar_config(**getattr(self, "_progress_bar_config", {}))
            call.arguments |= {"self": student, "guidance_scale": 1.0}
            return FastPipeline.__call__(*call.args, **call.kwargs)
        sampler_for(self.scheduler)  # it may have been exchanged
        return super().__call__(*args, **kwargs)

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

    def uses_few_step(self, num_inference_steps: int, guidance_scale: float, eta: float = 0.0) -> bool:
        """Whether such a call goes to the few-step student."""
        return self.few_step is not None and self.few_step.covers(num_inference_steps, guidance_scale, eta)

    def scheduler_for(self, num_inference_steps: int, guidance_scale: float, eta: float = 0.0) -> SchedulerMixin:
        """The scheduler that such a call is sampled with: this pipeline's, or the student's."""
        if self.uses_few_step(num_inference_steps, guidance_scale, eta):
            return few_step_scheduler(self.eager.scheduler)
        return self.scheduler

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> None:
        """Saves the eager pipeline, with this one's scheduler: how it runs is no part of a checkpoint.

        Raises:
            GBCIError: a module has other weights than the eager pipeline's.
        """
        for name in ("vae", "unet", "conditioner", "few_step"):
            ours, theirs = getattr(self, name), getattr(self.eager, name)
            if ours is not None and not same_weights(ours, theirs):
                change = f"the {name} has other weights than that of the eager pipeline, which is what would be saved"
                raise GBCIError(f"{change}; change the eager pipeline and save that")
        eager = GBCIPipeline(**{**self.eager.components, "scheduler": self.scheduler})
        eager.save_pretrained(save_directory, **kwargs)

    def encode_condition(
        self,
        masked_pixels: Tensor,
        mask: Tensor,
        attributes: Sequence[Attributes],
        report: Sequence[str | None],
        report_embeds: Tensor | None = None,
        report_mask: Tensor | None = None,
    ) -> Conditioning:
        """As the eager pipeline's; where loops are recorded, with reports padded, so that few lengths are met."""
        conditioning = super().encode_condition(masked_pixels, mask, attributes, report, report_embeds, report_mask)
        has_report = report_embeds is not None or any(report)
        return conditioning.pad(TOKENS) if has_report and self._denoiser_here()[1] is not None else conditioning

    def encode_image(self, pixels: Tensor) -> Tensor:
        """As the eager pipeline's; an image that neighbors in the batch share is encoded once for them."""
        differs = (pixels[1:] != pixels[:-1]).flatten(1).any(1)
        first = torch.cat([differs.new_ones(1), differs])
        return super().encode_image(pixels[first])[first.cumsum(0) - 1]

    def _denoise(self, run: Trajectory) -> Tensor:
        # Without a known region, nothing would be known outside of windows.
        if self.plan.tier != "approximate" or not run.known_region:
            with self.progress_bar(total=len(run.timesteps)) as progress:
                return self._sample(run, progress.update)
        parts = windows.split(run, stride=2 ** (len(self.unet.config.block_out_channels) - 1))
        with self.progress_bar(total=len(parts) * len(run.timesteps)) as progress:
            sampled = [self._sample(part, progress.update) for part in parts]
        latents = run.image_latents.clone()  # as they are now: a callback may have changed them
        for part, inside in zip(parts, sampled, strict=True):
            part.group.paste(inside, latents)
        return latents

    def _sample(self, run: Trajectory, on_step: Callable[[], Any]) -> Tensor:
        denoiser, graphs = self._denoiser_here()
        null = self.conditioner.null(1)
        if isinstance(run, windows.Part):
            noise: dict[str, Any] = {"noise": run.draw}
        elif run.seeds is not None:
            noise = {"seeds": seed_tensor(run.seeds, run.latents.device)}
        else:
            noise = {"noise": lambda step: windows.draw_noise(run, step)}
        drawn_outside = "noise" in noise and adds_noise(self.scheduler, run.eta)
        if graphs is None or run.callback is not None or drawn_outside or len(run.latents) > BUCKETS[-1]:
            return self._loop(run, denoiser, null, self.scheduler, noise, on_step)
        latents = self._replay(graphs, run, denoiser, null, {} if "noise" in noise else noise)
        for _ in range(len(run.timesteps)):
            on_step()
        return latents

    def _loop(
        self,
        run: Trajectory,
        denoiser: Denoiser,
        null: Conditioning,
        scheduler: SchedulerMixin,
        noise: dict[str, Any],
        on_step: Callable[[], Any],
    ) -> Tensor:
        """All steps. Without a callback it never waits for the device, if the scheduler's tables are not there."""
        sampler = sampler_for(scheduler)
        constant = torch.cat([run.mask_latents, run.masked_image_latents], 1)
        state = denoiser.prepare(run.conditioning, null, constant, run.timesteps)
        known = None
        if run.known_region:
            weight = feather_latent_mask(run.mask_latents, LATENT_FEATHER)
            known = KnownRegion(latents=run.image_latents, noise=run.noise, weight=weight)

        def after(step: int, latents: Tensor) -> Tensor | None:
            nonlocal denoiser, state
            on_step()
            if run.callback is None:
                return None
            changed = run.call_back(self, step, latents.clone())  # a callback may keep what it gets
            if (now := self._denoiser_here()[0]) is not denoiser:  # it may have changed the UNet
                denoiser, state = now, now.prepare(run.conditioning, null, constant, run.timesteps)
            if known is not None:
                known.latents, known.noise = run.image_latents, run.noise
            return changed

        return sampler(
            lambda latents, step: denoiser(latents, step, state, self.do_classifier_free_guidance),
            run.latents,
            scheduler,
            begin_index=len(scheduler.timesteps) - len(run.timesteps),
            guidance_scale=lambda: self.guidance_scale,
            known=known,
            model_dtype=denoiser.dtype,
            callback=after,
            interrupted=lambda: self.interrupt,
            **noise,
            **({"eta": run.eta} if sampler is sample_ddim else {}),
        )

    def _replay(
        self, graphs: LoopGraphs, run: Trajectory, denoiser: Denoiser, null: Conditioning, seeds: dict[str, Tensor]
    ) -> Tensor:
        """`_loop` from a recording, made if there is none yet."""
        scheduler = on_host(self.scheduler)  # a sampler reads the tables, and a recording must not wait for that
        names = ("latents", "noise", "image_latents", "masked_image_latents", "mask_latents")
        batched = {name: getattr(run, name) for name in names} | run.conditioning.tensors() | seeds
        shared = {f"null_{name}": part for name, part in null.tensors().items()} | {"timesteps": run.timesteps}

        def loop(given: Mapping[str, Tensor]) -> Tensor:
            changes: dict[str, Any] = {name: given[name] for name in (*names, "timesteps")}
            conditioning = run.conditioning.within(given)
            nothing = Conditioning(**{name: given[f"null_{name}"] for name in null.tensors()})
            drawn = {name: given[name] for name in seeds}
            same = replace(run, conditioning=conditioning, **changes)
            return self._loop(same, denoiser, nothing, scheduler, drawn, lambda: None)

        baked = tables(scheduler), len(run.timesteps), self.guidance_scale, run.eta, run.known_region
        kind = self.unet.device.type
        autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        return graphs((*baked, autocast, run.conditioning.padded), loop, batched, shared)

    def _student_here(self) -> "FastPipeline":
        """Made when it is first needed, and again when the UNet changed; VAE and conditioner are this pipeline's."""
        parts = [self.unet, self.few_step]
        if self._student is None or not still(self._student[0], parts):
            pipe, device = self.eager, self._execution_device
            if not self._is_as_accelerated():
                pipe = GBCIPipeline(**{**self.components, "scheduler": self.eager.scheduler})
            student = accelerate(pipe.few_step_pipeline(), self.plan.asked, self.plan.tier, self.unet.dtype, device)
            self._student = [Watch(part, values=True) for part in parts], student
        student = self._student[1]
        student.vae, student.conditioner = self.vae, self.conditioner
        return student

    def _watch_sources(self) -> None:
        parts = (self.eager.unet, self.eager.few_step, self.unet, self.few_step)
        self._sources = tuple(Watch(part, values=True) for part in parts if part is not None)

    def _is_as_accelerated(self) -> bool:
        parts = (self.eager.unet, self.eager.few_step, self.unet, self.few_step)
        return bool(self._sources) and still(self._sources, [part for part in parts if part is not None])

    def _denoiser_here(self) -> tuple[Denoiser, LoopGraphs | None]:
        """Built when they are first needed, and again when the UNet was changed, moved, exchanged or hooked."""
        if self._planned_for is None or not still([self._planned_for], [self.unet]):
            plan = _plan(self, self.plan.asked, self.plan.tier, self.unet.dtype, self._execution_device)
            self.plan = _with_student(plan, self.few_step)
            self._planned_for, self._built = Watch(self.unet, values=True), None
        if self._built is None:
            with without_autocast(self.unet.device):  # of the call: what is built outlives it
                unet = merged(self.unet)
                recorder = _recorder(self.plan.runtime, unet)
                graphs = None if recorder is None else LoopGraphs(recorder)
                self._built = _BUILDERS[self.plan.runtime](unet), graphs
        return self._built


@overload
def accelerate(
    pipe: GBCIPipeline,
    runtime: str = "auto",
    tier: str = "tolerance",
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    few_step: bool = True,
) -> FastPipeline: ...
@overload
def accelerate(
    pipe: UNet2DConditionModel,
    runtime: str = "auto",
    tier: str = "tolerance",
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    few_step: bool = True,
) -> FastUNet: ...
def accelerate(
    pipe: GBCIPipeline | UNet2DConditionModel,
    runtime: str = "auto",
    tier: str = "tolerance",
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    few_step: bool = True,
) -> FastPipeline | FastUNet:
    """A pipeline with the same call and, within `tier`, the same images; `pipe` stays as it is.

    Args:
        pipe: the eager pipeline; or the stock UNet of any diffusers pipeline, of which a UNet with the same forward is
            made, block by block (see `gbci_fast.fast.unet.FastUNet`).
        runtime: "fused" computes once what does not change from step to step; "compile" is that under `torch.compile`
            (or the stock UNet, where the fused runtime cannot run it), which takes its time at the first call and
            whenever batch or image size are new; "tensorrt" runs the core of "fused", and the decoder, as engines of
            TensorRT, which are built at the first call with a new batch or image size and then kept in the user's
            cache; "eager" calls the stock UNet; "auto" is the first of `AUTO` that can run this UNet.
        tier: "exact", "tolerance" or "approximate", the largest difference to the eager pipeline that a technique may
            make.
        dtype: of UNet and VAE; by default the narrowest that the tier and the device are good for.
        device: by default where `pipe` is.
        few_step: whether tier "approximate" may use the few-step weights that `pipe` carries.

    Raises:
        GBCIError: an unknown runtime or tier, a dtype that the tier excludes, a runtime that cannot run this UNet, a
            device that the extension was not built for, or a scheduler (or an option of it) that no sampler reproduces.
    """
    for name, value, known in (("runtime", runtime, RUNTIMES), ("tier", tier, TIERS)):
        if value not in known:
            raise GBCIError(f"{name} is {value!r}; expected one of {', '.join(known)}")
    if isinstance(pipe, UNet2DConditionModel):
        return _accelerate_unet(pipe, runtime, tier, dtype, _device(pipe.device if device is None else device))
    if not isinstance(pipe, GBCIPipeline):
        raise GBCIError(f"pipe is a {type(pipe).__name__}; expected a GBCIPipeline or a UNet2DConditionModel")
    sampler_for(pipe.scheduler)
    device = _device(pipe.device if device is None else device)
    change = copy.deepcopy(pipe.few_step).to(device) if few_step and pipe.few_step and tier == "approximate" else None
    plan = _with_student(_plan(pipe, runtime, tier, dtype, device), change)
    dtypes = {"vae": plan.dtype, "unet": plan.dtype, "conditioner": pipe.conditioner.dtype}
    # Not by diffusers' own `to`, which logs a warning when it casts.
    parts: dict[str, Any] = {
        name: nn.Module.to(copy.deepcopy(getattr(pipe, name)), device, part, memory_format=_layout(device, plan.dtype))
        for name, part in dtypes.items()
    }
    if device.type == "cpu" and plan.dtype == torch.float32:
        parts["vae"] = with_filtered_convolutions(parts["vae"])
    of = EngineAutoencoder.of if plan.runtime == "tensorrt" else with_fused_norms
    parts["vae"] = of(parts["vae"])
    fast = FastPipeline(**parts, scheduler=copy.deepcopy(pipe.scheduler), few_step=change)
    fast.eager, fast.plan, fast._planned_for = pipe, plan, Watch(fast.unet, values=True)
    if change is not None:
        fast._watch_sources()
    fast.set_progress_bar_config(**getattr(pipe, "_progress_bar_config", {}))
    return fast


def _accelerate_unet(
    unet: UNet2DConditionModel, runtime: str, tier: str, dtype: torch.dtype | None, device: torch.device
) -> FastUNet:
    if type(unet) is not UNet2DConditionModel:
        raise GBCIError(f"the UNet is a {type(unet).__name__}; expected a UNet2DConditionModel itself")
    if has_other_forward(unet):
        raise GBCIError("the UNet's forward was replaced, by offloading for example; accelerate it before that")
    if runtime == "tensorrt":
        raise GBCIError("the tensorrt runtime runs whole pipelines, not a UNet alone; take fused or compile")
    dtype, notes = _dtype(unet.dtype, tier, dtype, device)
    if tier == "approximate":
        notes.append("nothing is approximated: a UNet alone has no mask to put a window around")
    wanted = "fused" if runtime == "auto" else runtime
    plan = Plan(runtime=wanted, tier=tier, dtype=dtype, notes=tuple(notes), asked=runtime)
    fast = FastUNet.of(unet, plan, device, _layout(device, dtype))
    if wanted == "fused" and not fast.num_fused:
        if runtime == "fused":
            raise GBCIError(f"the fused runtime cannot run any block of this UNet: {'; '.join(fast.stock_reasons)}")
        fast.plan = replace(plan, runtime="eager")
    return fast


def _device(name: torch.device | str) -> torch.device:
    try:
        device = torch.device(name)
    except (RuntimeError, TypeError):
        device = None
    if device is None or device.type == "meta":
        raise GBCIError(f"device is {str(name)!r}; expected cpu or cuda")
    return device


def _layout(device: torch.device, dtype: torch.dtype) -> torch.memory_format:
    """oneDNN is faster in bfloat16 with channels last and in float32 without; cuDNN likes channels last."""
    wide_cpu = device.type == "cpu" and dtype == torch.float32
    return torch.contiguous_format if wide_cpu else torch.channels_last


def _plan(pipe: GBCIPipeline, runtime: str, tier: str, dtype: torch.dtype | None, device: torch.device) -> Plan:
    if not torch._C._dispatch_has_kernel_for_dispatch_key("gbci_fast::blend_step", device.type.upper()):
        unbuilt = f"gbci_fast was built without kernels for {device.type}"
        raise GBCIError(f"{unbuilt}; install nvcc and build it again, or take the CPU")
    if tier == "exact" and device.type == "cuda":
        for name in ("cuda.matmul", "cudnn"):
            if operator.attrgetter(name)(torch.backends).allow_tf32:
                raise GBCIError(f"tier 'exact' needs float32; set torch.backends.{name}.allow_tf32 = False")
    dtype, notes = _dtype(pipe.unet.dtype, tier, dtype, device)
    notes += adapter_notes(pipe.unet)
    asked, reasons = runtime, why_not(merged(pipe.unet))
    if runtime == "auto":
        for runtime in AUTO:
            refusals = _refusals(runtime, reasons, tier, device)
            if not refusals:
                break
            notes += [f"not the {runtime} runtime: {reason}" for reason in refusals]
    elif refusals := _refusals(runtime, reasons, tier, device):
        what = "run this UNet" if reasons else "be used"
        raise GBCIError(f"the {runtime} runtime cannot {what}: {'; '.join(refusals)}")
    if runtime == "compile":
        need_compiler(device)
        notes += [f"compiles the stock UNet: {reason}" for reason in reasons]
    if runtime == "tensorrt":
        notes.append(tensorrt_note(device))
    if runtime == "fused" and device.type == "cuda":
        notes += cross_attention_notes(pipe.unet, dtype)
    if runtime == "fused" and device.type == "cuda" and triton is None:
        notes.append("norms and feed-forwards run in PyTorch, because triton is not installed")
    if tier == "approximate":
        notes.append(windows.NOTE)
    return Plan(runtime=runtime, tier=tier, dtype=dtype, notes=tuple(notes), asked=asked)


def _with_student(plan: Plan, change: FewStepLoRA | None) -> Plan:
    return plan if change is None else replace(plan, notes=(*plan.notes, change.note()))


def _refusals(runtime: str, reasons: list[str], tier: str, device: torch.device) -> list[str]:
    """Why a runtime cannot run a UNet of which the fused one says these `reasons`."""
    if runtime == "tensorrt":
        narrow = ["tier 'exact' excludes it; take tier 'tolerance', or the fused runtime"] if tier == "exact" else []
        return [*narrow, *reasons, *why_not_tensorrt(device)]
    return reasons if runtime == "fused" else []


def _dtype(
    given: torch.dtype, tier: str, dtype: torch.dtype | None, device: torch.device
) -> tuple[torch.dtype, list[str]]:
    """Of a UNet that has dtype `given`, the one to run in; and notes for the plan."""
    notes = []
    if dtype is None:
        dtype = given
        if tier != "exact" and dtype == torch.float32:
            if has_bfloat16_units(device):
                dtype = torch.bfloat16
            else:
                notes.append(f"float32, because this {device.type.upper()} is no faster in bfloat16")
    if dtype not in DTYPES:
        raise GBCIError(f"dtype is {dtype}; expected {', '.join(map(str, DTYPES))}")
    if tier == "exact" and not dtype == given == torch.float32:
        raise GBCIError(f"dtype is {dtype} with tier 'exact'; expected torch.float32 of a float32 pipeline")
    return dtype, notes


def _recorder(runtime: str, unet: UNet2DConditionModel) -> Recorder | None:
    """What records whole loops. The stock UNet asks for values of its inputs, which cannot be recorded."""
    recordable = unet.device.type == "cuda" and runtime != "eager" and not why_not(unet)
    return CudaRecorder(unet.device) if recordable else None
