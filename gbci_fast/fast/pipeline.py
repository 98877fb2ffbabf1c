"""The accelerated pipeline: a `GBCIPipeline` with another denoising loop. `gbci_fast.accelerate` makes it."""

import copy
import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn, ParamSpec, TypeVar

import torch
from diffusers import SchedulerMixin, UNet2DConditionModel
from torch import Tensor, nn

from gbci_fast.attributes import Attributes
from gbci_fast.errors import GBCIError
from gbci_fast.fast import windows
from gbci_fast.fast.decision import Decision, decide
from gbci_fast.fast.denoiser import Denoiser
from gbci_fast.fast.devices import fastest_layout
from gbci_fast.fast.graph import BATCH_SIZES, TOKEN_MULTIPLE, CudaRecorder, LoopGraphs, Recorder
from gbci_fast.fast.modules.adapters import merged
from gbci_fast.fast.modules.autoencoder import with_fused_norms
from gbci_fast.fast.modules.blocks import fused_refusals
from gbci_fast.fast.modules.convolution import with_filtered_convolutions
from gbci_fast.fast.runtimes.compile import CompiledDenoiser
from gbci_fast.fast.runtimes.eager import EagerDenoiser
from gbci_fast.fast.runtimes.fused import FusedDenoiser
from gbci_fast.fast.samplers import adds_noise, on_host, sampler_for, tables, takes_eta
from gbci_fast.fast.sampling import KnownRegion
from gbci_fast.fast.tensorrt.denoiser import EngineAutoencoder, TensorRTDenoiser
from gbci_fast.fast.watch import Watch, same_weights, still
from gbci_fast.model.arguments import check_argument_types
from gbci_fast.model.conditioning import Conditioning
from gbci_fast.model.devices import without_autocast
from gbci_fast.model.few_step import FewStepLoRA, few_step_scheduler
from gbci_fast.model.masks import feather_latent_mask
from gbci_fast.model.noise import seed_tensor
from gbci_fast.model.pipeline import LATENT_FEATHER, GBCIPipeline, Trajectory
from gbci_fast.model.turns import in_turn

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")
_SIGNATURE = inspect.signature(GBCIPipeline.__call__)
_BUILDERS: dict[str, Callable[[UNet2DConditionModel], Denoiser]] = {
    "eager": EagerDenoiser, "fused": FusedDenoiser, "compile": CompiledDenoiser, "tensorrt": TensorRTDenoiser,
}  # fmt: skip


def _called_as(call: Callable[Arguments, Result]) -> Callable[[Callable[..., Any]], Callable[Arguments, Result]]:
    """`functools.wraps`, with the signature of `call` for type checkers, too."""
    return functools.wraps(call)


class FastPipeline(GBCIPipeline):
    """A `GBCIPipeline` with another denoising loop; `accelerate` makes it.

    Attributes:
        eager: the pipeline it was made from.
        decision: the runtime, tier and dtype that were decided for it, and why.

    The modules are copies of the modules of `eager`: a change of one pipeline does not reach the other. A change of
    this pipeline's modules takes effect at the next step, as in any pipeline. Before each use the UNet is compared with
    its earlier state: where its weights, parts, processors, hooks (as of offloading) or adapters changed, the decision
    is made again. Calls from several threads take turns.

    With a `few_step` component, calls that the component covers go to the few-step student, which has its own
    scheduler; a callback then gets the student's pipeline.
    """

    eager: GBCIPipeline
    decision: Decision
    # The modules as they were accelerated. While they are unchanged, the student is made from the eager UNet.
    _sources: tuple[Watch, ...] = ()
    _decided_for: Watch | None = None
    _built: tuple[Denoiser, LoopGraphs | None] | None = None
    _student: tuple[list[Watch], "FastPipeline"] | None = None

    @classmethod
    def of(
        cls, pipe: GBCIPipeline, decision: Decision, device: torch.device, few_step: FewStepLoRA | None = None
    ) -> "FastPipeline":
        """A copy of `pipe` that runs as decided.

        Args:
            pipe: the eager pipeline.
            decision: of `gbci_fast.fast.decision.decide`, for this pipeline and device.
            device: where the copy goes.
            few_step: the few-step weights of `pipe`, if the copy may use them.
        """
        dtypes = {"vae": decision.dtype, "unet": decision.dtype, "conditioner": pipe.conditioner.dtype}
        layout = fastest_layout(device, decision.dtype)
        # `nn.Module.to`, because the `to` of diffusers logs a warning when it casts.
        parts: dict[str, Any] = {
            name: nn.Module.to(copy.deepcopy(getattr(pipe, name)), device, dtype, memory_format=layout)
            for name, dtype in dtypes.items()
        }
        if device.type == "cpu" and decision.dtype == torch.float32:
            parts["vae"] = with_filtered_convolutions(parts["vae"])
        with_fast_parts = EngineAutoencoder.of if decision.runtime == "tensorrt" else with_fused_norms
        parts["vae"] = with_fast_parts(parts["vae"])
        change = None if few_step is None else copy.deepcopy(few_step).to(device)
        fast = cls(**parts, scheduler=copy.deepcopy(pipe.scheduler), few_step=change)
        fast.eager, fast.decision, fast._decided_for = pipe, decision, Watch(fast.unet, values=True)
        if change is not None:
            fast._watch_sources()
        fast.set_progress_bar_config(**getattr(pipe, "_progress_bar_config", {}))
        return fast

    def __getstate__(self) -> dict[str, Any]:
        """The state without members that belong to this pipeline alone; a copy makes its own."""
        anew = ("_sources", "_decided_for", "_built", "_student")
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
        sampler_for(self.scheduler)  # raises if the scheduler was exchanged for an unknown one
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
        """What runs here, why a faster option does not, and what the checkpoint does not know; one line each."""
        ignores = self.conditioner.ignores
        return f"{self.decision}\nthe checkpoint ignores {', '.join(ignores)}" if ignores else str(self.decision)

    def uses_few_step(self, num_inference_steps: int, guidance_scale: float, eta: float = 0.0) -> bool:
        """Whether a call with these arguments goes to the few-step student."""
        return self.few_step is not None and self.few_step.covers(num_inference_steps, guidance_scale, eta)

    def scheduler_for(self, num_inference_steps: int, guidance_scale: float, eta: float = 0.0) -> SchedulerMixin:
        """The scheduler of a call with these arguments: this pipeline's, or the student's."""
        if self.uses_few_step(num_inference_steps, guidance_scale, eta):
            return few_step_scheduler(self.eager.scheduler)
        return self.scheduler

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> None:
        """Saves the eager pipeline, with this pipeline's scheduler. The runtime is not saved.

        Raises:
            GBCIError: the weights of a module differ from the eager pipeline's.
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
        """As in the eager pipeline. Where loops are recorded, reports are padded, to need fewer recordings."""
        conditioning = super().encode_condition(masked_pixels, mask, attributes, report, report_embeds, report_mask)
        has_report = report_embeds is not None or any(report)
        return conditioning.pad(TOKEN_MULTIPLE) if has_report and self._denoiser_here()[1] is not None else conditioning

    def encode_image(self, pixels: Tensor) -> Tensor:
        """As in the eager pipeline; equal images next to each other in the batch are encoded once."""
        differs = (pixels[1:] != pixels[:-1]).flatten(1).any(1)
        first = torch.cat([differs.new_ones(1), differs])
        return super().encode_image(pixels[first])[first.cumsum(0) - 1]

    def _denoise(self, run: Trajectory) -> Tensor:
        # Windows need the known region, which surrounds them in the result.
        if self.decision.tier != "approximate" or not run.known_region:
            with self.progress_bar(total=len(run.timesteps)) as progress:
                return self._sample(run, progress.update)
        parts = windows.split(run, stride=2 ** (len(self.unet.config.block_out_channels) - 1))
        with self.progress_bar(total=len(parts) * len(run.timesteps)) as progress:
            sampled = [self._sample(part, progress.update) for part in parts]
        latents = run.image_latents.clone()  # not those of the start: a callback may have changed them
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
        if graphs is None or run.callback is not None or drawn_outside or len(run.latents) > BATCH_SIZES[-1]:
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
        """All steps. Never waits for the device if there is no callback and the scheduler's tables are on the CPU."""
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
            changed = run.call_back(self, step, latents.clone())  # a callback may keep the latents
            if (now := self._denoiser_here()[0]) is not denoiser:  # the callback may have changed the UNet
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
            **({"eta": run.eta} if takes_eta(scheduler) else {}),
        )

    def _replay(
        self, graphs: LoopGraphs, run: Trajectory, denoiser: Denoiser, null: Conditioning, seeds: dict[str, Tensor]
    ) -> Tensor:
        """Replays `_loop` from a recording, which the first call with these constants and shapes makes."""
        scheduler = on_host(self.scheduler)  # a sampler reads the tables, and a recording must not wait for the device
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
        """The few-step student, made when it is first needed, and again when the UNet changed.

        Its VAE and conditioner are those of this pipeline.
        """
        parts = [self.unet, self.few_step]
        if self._student is None or not still(self._student[0], parts):
            pipe, device = self.eager, self._execution_device
            if not self._is_as_accelerated():
                pipe = GBCIPipeline(**{**self.components, "scheduler": self.eager.scheduler})
            student = pipe.few_step_pipeline()
            decision = decide(student, self.decision.asked, self.decision.tier, self.unet.dtype, device)
            self._student = [Watch(part, values=True) for part in parts], FastPipeline.of(student, decision, device)
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
        """The denoiser and the recordings of its loops.

        They are built when first needed, and again when the UNet was changed, moved, exchanged or hooked.
        """
        if self._decided_for is None or not still([self._decided_for], [self.unet]):
            asked, tier, device = self.decision.asked, self.decision.tier, self._execution_device
            self.decision = decide(self, asked, tier, self.unet.dtype, device, self.few_step)
            self._decided_for, self._built = Watch(self.unet, values=True), None
        if self._built is None:
            with without_autocast(self.unet.device):  # the denoiser outlives the call's autocast
                unet = merged(self.unet)
                recorder = _recorder(self.decision.runtime, unet)
                graphs = None if recorder is None else LoopGraphs(recorder)
                self._built = _BUILDERS[self.decision.runtime](unet), graphs
        return self._built


def _recorder(runtime: str, unet: UNet2DConditionModel) -> Recorder | None:
    """The recorder of whole loops, or None. The stock UNet is not recorded: it reads inputs' values on the CPU."""
    recordable = unet.device.type == "cuda" and runtime != "eager" and not fused_refusals(unet)
    return CudaRecorder(unet.device) if recordable else None
