"""The eager reference: a plain diffusers inpainting pipeline that paints a described lesion where the mask is.

This file is the specification of the sampler. It uses stock parts, calls ``scheduler.step``, blends in PyTorch, and
never touches the compiled extension or a custom kernel.
"""

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers import AutoencoderKL, DiffusionPipeline, LCMScheduler, SchedulerMixin, UNet2DConditionModel
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from gbci_fast.attributes import Attributes
from gbci_fast.choices import GUIDANCE_SCALE, STEPS
from gbci_fast.errors import GBCIError
from gbci_fast.model.arguments import (
    broadcast_inputs,
    check_argument_ranges,
    check_argument_types,
    read_images,
    seeds_per_image,
    warn_of_ignored,
)
from gbci_fast.model.conditioning import ConditionEncoder, Conditioning
from gbci_fast.model.few_step import FewStepLoRA, few_step_scheduler
from gbci_fast.model.images import ImageInput, from_tensor
from gbci_fast.model.lora import UNetLoRALoader
from gbci_fast.model.masks import composite, feather_latent_mask, latent_mask
from gbci_fast.model.noise import STREAM_INITIAL, STREAM_SCHEDULER, seeded_normal
from gbci_fast.model.pipeline_folder import load_checked
from gbci_fast.model.schedulers import check_scheduler, set_timesteps
from gbci_fast.model.turns import in_turn

PACKAGED_WEIGHTS = Path(__file__).parents[1] / "weights" / "default"
PIXEL_FEATHER = 2  # pixels inside the mask's edge
LATENT_FEATHER = 1  # latent cells outside it


@dataclass
class GBCIPipelineOutput(BaseOutput):
    """`images`: list of PIL images, float array [B, H, W, 1], float tensor [B, 1, H, W], or latents."""

    images: Any


class GBCIPipeline(UNetLoRALoader, DiffusionPipeline):
    """Paints lesions into mammograms by latent diffusion.

    Args:
        vae: one-channel autoencoder; latents are ``(mode - shift_factor) * scaling_factor``.
        unet: 9 input channels (noisy latents 4, mask 1, latents of the masked image 4), 4 output channels.
        scheduler: DDIM, Euler, DPM-Solver++ 2M, UniPC or LCM; others that diffusers' inpainting can drive also work.
        conditioner: tokens and FiLM vector of the masked image, the attributes and the report.
        few_step: a change of the UNet's weights for sampling in a few steps. This pipeline does not use it:
            `few_step_pipeline` and tier "approximate" of `gbci_fast.accelerate` do.

    LoRA adapters of the UNet are loaded, set, fused and unloaded as in diffusers: see `gbci_fast.model.lora`.

    Calls from several threads take turns, also those of pipelines that share a scheduler. A callback runs within its
    call, and does not wait for other threads.
    """

    model_cpu_offload_seq = "conditioner->unet->vae"
    _optional_components: ClassVar = ["few_step"]
    _exclude_from_cpu_offload: ClassVar = ["few_step"]
    _callback_tensor_inputs = ("latents", "noise", "image_latents")

    def __init__(
        self,
        vae: AutoencoderKL,
        unet: UNet2DConditionModel,
        scheduler: SchedulerMixin,
        conditioner: ConditionEncoder,
        few_step: FewStepLoRA | None = None,
    ):
        super().__init__()
        self.register_modules(vae=vae, unet=unet, scheduler=scheduler, conditioner=conditioner, few_step=few_step)
        self.vae_scale_factor = 2 ** (len(vae.config.block_out_channels) - 1)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path | None = None, **kwargs: Any) -> "GBCIPipeline":
        """Loads a pipeline folder; without a path, the checkpoint that ships with the package.

        Args:
            pretrained_model_name_or_path: of ``save_pretrained``, or a repository on the Hugging Face Hub.
            kwargs: as of any diffusers pipeline, without `custom_pipeline`.

        Raises:
            GBCIError: the folder names classes other than those of `gbci_fast.model.pipeline_folder`, before any is
                imported; or it is damaged.
        """
        return load_checked(cls, pretrained_model_name_or_path or PACKAGED_WEIGHTS, super().from_pretrained, kwargs)

    def few_step_pipeline(self) -> "GBCIPipeline":
        """The few-step student as a pipeline, to be called with ``few_step.config.steps`` and ``guidance_scale=1``.

        Raises:
            GBCIError: the checkpoint has no few-step weights.
        """
        if self.few_step is None:
            raise GBCIError("this pipeline has no few_step component; `gbci-fast train distill` makes one")
        student = GBCIPipeline(
            vae=self.vae,
            unet=self.few_step.apply_to(self.unet),
            scheduler=few_step_scheduler(self.scheduler),
            conditioner=self.conditioner,
        )
        student.set_progress_bar_config(**getattr(self, "_progress_bar_config", {}))
        return student

    @property
    def stride(self) -> int:
        """Pixels by which the sides of an image must be divisible."""
        stride = self.vae_scale_factor * 2 ** (len(self.unet.config.block_out_channels) - 1)
        return math.lcm(stride, self.conditioner.config.patch_size)

    @property
    def guidance_scale(self) -> float:
        """w of ``null + w * (conditional - null)``; a callback may set ``pipe._guidance_scale`` for the next steps."""
        return self._guidance_scale

    @property
    def do_classifier_free_guidance(self) -> bool:
        """Guidance runs a second, unconditional half of the batch."""
        return self._guidance_scale > 1

    @property
    def num_timesteps(self) -> int:
        """Denoising steps of the call under way (after `strength`)."""
        return self._num_timesteps

    @property
    def interrupt(self) -> bool:
        """Set ``pipe._interrupt = True`` in a callback to skip the remaining steps."""
        return self._interrupt

    @in_turn
    @torch.no_grad()
    def __call__(
        self,
        image: ImageInput,
        mask_image: ImageInput,
        attributes: Attributes | Mapping[str, Any] | Sequence[Attributes | Mapping[str, Any]] | None = None,
        report: str | Sequence[str | None] | None = None,
        height: int | None = None,
        width: int | None = None,
        strength: float = 1.0,
        num_inference_steps: int = STEPS,
        guidance_scale: float = GUIDANCE_SCALE,
        eta: float = 0.0,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        seed: int | Sequence[int] | None = None,
        latents: Tensor | None = None,
        report_embeds: Tensor | None = None,
        report_mask: Tensor | None = None,
        known_region: bool = True,
        paste_back: bool = True,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable | PipelineCallback | MultiPipelineCallbacks | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> GBCIPipelineOutput | tuple:
        """Synthesizes the masked region of every image.

        `image`, `mask_image`, `attributes` and `report` broadcast from one to the batch size B.

        Args:
            image: gray PIL (8 or 16 bit), array or tensor in [0, 1], H x W divisible by the model's stride.
            mask_image: the same H x W; 1 = synthesize. A float mask counts above 0.5, an integer mask above half of its
                largest value: 0 and 1, 0 and 255, and 16 bits mean the same.
            attributes: `Attributes`, or mappings with their field names; absent fields are unknown. Those that the
                checkpoint does not know (`conditioner.ignores`) have no effect; an `InputWarning` names them.
            report: free text, or None.
            height, width: resize image and mask to this first.
            strength: 1 starts from pure noise; less keeps that much of the original under the mask.
            num_inference_steps: scheduler steps for ``strength=1``.
            guidance_scale: classifier-free guidance (Ho and Salimans 2022); at most 1 turns it off.
            eta: DDIM's stochasticity, 0 to 1.
            num_images_per_prompt: variants per element of the batch.
            generator: torch generator, or one per output image, drawing as diffusers does. Excludes `seed`.
            seed: Philox seed per output image, or one for the first (the next take seed + 1, ...); an image's noise
                is a function of its seed alone. Excludes `generator`.
            latents: initial noise [B * num_images_per_prompt, 4, h, w] instead of a drawn one.
            report_embeds: states [B, M, W] of an external text encoder, for conditioners built for one.
            report_mask: bool [B, M]; False marks padding.
            known_region: after each step put the re-noised original back outside the mask.
            paste_back: composite into the input, so that pixels outside the mask keep their bits.
            output_type: "pil", "np", "pt" or "latent".
            return_dict: False returns a tuple.
            callback_on_step_end: called as ``f(pipe, step, timestep, tensors)`` and may return changed tensors.
            callback_on_step_end_tensor_inputs: names out of ``_callback_tensor_inputs``.

        Raises:
            GBCIError: an argument out of range, or a scheduler that inpainting cannot drive; the sentence names it.
        """
        check_argument_types(locals())
        check_scheduler(self.scheduler)
        if isinstance(callback_on_step_end, PipelineCallback | MultiPipelineCallbacks):
            callback_on_step_end_tensor_inputs = callback_on_step_end.tensor_inputs
        pixels, mask, depth = read_images(image, mask_image, height, width, self.stride)
        check_argument_ranges(locals(), self._callback_tensor_inputs)
        self._guidance_scale, self._interrupt = guidance_scale, False
        device = self._execution_device
        given = broadcast_inputs(pixels, mask, attributes, report, report_embeds, report_mask, device)
        warn_of_ignored(given.attributes, self.conditioner.ignores)
        total = len(given.pixels) * num_images_per_prompt
        seeds = seeds_per_image(seed, generator, total, self.scheduler)

        # 1. Condition and encode once per (image, mask).
        masked_pixels = (given.pixels * 2 - 1) * (1 - given.mask)
        conditioning = self.encode_condition(
            masked_pixels, given.mask, given.attributes, given.report, given.report_embeds, given.report_mask
        ).repeat_interleave(num_images_per_prompt)
        image_latents = self.encode_image(given.pixels * 2 - 1)
        masked_image_latents = self.encode_image(masked_pixels)
        mask_latents = latent_mask(given.mask, self.vae_scale_factor)
        image_latents, masked_image_latents, mask_latents = (
            part.repeat_interleave(num_images_per_prompt, 0)
            for part in (image_latents, masked_image_latents, mask_latents)
        )

        # 2. Timesteps and initial latents.
        timesteps = self._timesteps(num_inference_steps, strength, device)
        noise = self._initial_noise(latents, image_latents, seeds, generator)
        if strength == 1.0:
            latents = noise * self.scheduler.init_noise_sigma
        else:
            latents = self.scheduler.add_noise(image_latents, noise, timesteps[:1].expand(total))

        # 3. Denoise.
        latents = self._denoise(
            Trajectory(
                latents=latents,
                noise=noise,
                image_latents=image_latents,
                masked_image_latents=masked_image_latents,
                mask_latents=mask_latents,
                conditioning=conditioning,
                timesteps=timesteps,
                eta=eta,
                generator=generator,
                seeds=seeds,
                known_region=known_region,
                callback=callback_on_step_end,
                callback_inputs=callback_on_step_end_tensor_inputs,
            )
        )

        # 4. Decode and composite.
        images = latents
        if output_type != "latent":
            synthetic = self.decode_latents(latents)
            if paste_back:
                originals, masks = (
                    part.repeat_interleave(num_images_per_prompt, 0) for part in (given.pixels, given.mask)
                )
                synthetic = composite(originals, synthetic, masks, PIXEL_FEATHER)
            images = from_tensor(synthetic, output_type, depth)
        self.maybe_free_model_hooks()
        return GBCIPipelineOutput(images=images) if return_dict else (images,)

    def encode_condition(
        self,
        masked_pixels: Tensor,
        mask: Tensor,
        attributes: Sequence[Attributes],
        report: Sequence[str | None],
        report_embeds: Tensor | None = None,
        report_mask: Tensor | None = None,
    ) -> Conditioning:
        """Runs the conditioner on [B, 1, H, W] pixels in [-1, 1] (0 under the mask) and the mask."""
        dtype = self.conditioner.dtype
        return self.conditioner(masked_pixels.to(dtype), mask.to(dtype), attributes, report, report_embeds, report_mask)

    def encode_image(self, pixels: Tensor) -> Tensor:
        """Scaled latents, float32 [B, 4, H / f, W / f], of pixels in [-1, 1]; the posterior's mode."""
        mode = self.vae.encode(pixels.to(self.vae.dtype)).latent_dist.mode().float()
        return (mode - (self.vae.config.shift_factor or 0.0)) * self.vae.config.scaling_factor

    def decode_latents(self, latents: Tensor) -> Tensor:
        """Pixels, float32 [B, 1, H, W] in [0, 1], of scaled latents."""
        unscaled = latents / self.vae.config.scaling_factor + (self.vae.config.shift_factor or 0.0)
        return (self.vae.decode(unscaled.to(self.vae.dtype)).sample.float() / 2 + 0.5).clamp(0, 1)

    def _denoise(self, run: "Trajectory") -> Tensor:
        """The latents after the last step."""
        latents = run.latents
        constant = torch.cat([run.mask_latents, run.masked_image_latents], 1)
        blend_weight = feather_latent_mask(run.mask_latents, LATENT_FEATHER)
        denoise = self._denoiser(run.conditioning, constant)
        with self.progress_bar(total=len(run.timesteps)) as progress:
            for i, t in enumerate(run.timesteps):
                if self.interrupt:
                    continue
                model_output = denoise(self.scheduler.scale_model_input(latents, t), t)
                t_next = run.timesteps[i + 1] if i + 1 < len(run.timesteps) else None
                latents = self._step(model_output, t, t_next, latents, i, run.eta, run.generator, run.seeds)
                if run.known_region:
                    known = run.image_latents
                    if t_next is not None:
                        known = self.scheduler.add_noise(known, run.noise, t_next.expand(len(known)))
                    latents = torch.lerp(known, latents, blend_weight)
                latents = run.call_back(self, i, latents)
                progress.update()
        return latents

    def _denoiser(self, conditioning: Conditioning, constant: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
        """Guided model output as a function of (scaled latents, t): one forward of 2 B, as diffusers does."""
        dtype = self.unet.dtype
        padded = conditioning.padded
        null = self.conditioner.null(*conditioning.tokens.shape[:2])
        both, both_constant = Conditioning.cat([null, conditioning]), torch.cat([constant, constant])

        def predict(latents: Tensor, t: Tensor, constant: Tensor, condition: Conditioning) -> Tensor:
            return self.unet(
                torch.cat([latents, constant], 1).to(dtype),
                t,
                encoder_hidden_states=condition.tokens.to(dtype),
                encoder_attention_mask=condition.token_mask if padded else None,
                class_labels=condition.pooled.to(dtype),
                return_dict=False,
            )[0].float()

        def denoise(latents: Tensor, t: Tensor) -> Tensor:
            if not self.do_classifier_free_guidance:
                return predict(latents, t, constant, conditioning)
            unconditional, conditional = predict(torch.cat([latents, latents]), t, both_constant, both).chunk(2)
            return unconditional + self.guidance_scale * (conditional - unconditional)

        return denoise

    def _step(
        self,
        model_output: Tensor,
        t: Tensor,
        t_next: Tensor | None,
        latents: Tensor,
        index: int,
        eta: float,
        generator: torch.Generator | list[torch.Generator] | None,
        seeds: list[int] | None,
    ) -> Tensor:
        """``scheduler.step``; with seeds, its noise is stream 1 of each sample's own Philox sequence."""
        accepted = inspect.signature(self.scheduler.step).parameters
        extra: dict[str, Any] = {"eta": eta} if "eta" in accepted else {}
        if seeds is None:
            if "generator" in accepted:
                extra["generator"] = generator
            return self.scheduler.step(model_output, t, latents, **extra, return_dict=False)[0]
        noise = seeded_normal(seeds, latents.shape[1:], step=index, stream=STREAM_SCHEDULER, device=latents.device)
        if isinstance(self.scheduler, LCMScheduler):
            # Its step() noises the denoised sample with a generator: the same formula with our noise.
            unused = torch.Generator(latents.device)
            denoised = self.scheduler.step(model_output, t, latents, generator=unused).denoised
            return denoised if t_next is None else self.scheduler.add_noise(denoised, noise, t_next.expand(len(seeds)))
        if "variance_noise" in accepted:
            extra["variance_noise"] = noise
        return self.scheduler.step(model_output, t, latents, **extra, return_dict=False)[0]

    def _timesteps(self, num_inference_steps: int, strength: float, device: torch.device) -> Tensor:
        """The last `strength` share of the scheduler's timesteps."""
        set_timesteps(self.scheduler, num_inference_steps, device)
        start = num_inference_steps - min(int(num_inference_steps * strength), num_inference_steps)
        timesteps = self.scheduler.timesteps[start * self.scheduler.order :]
        if len(timesteps) == 0:
            raise GBCIError(f"strength {strength} of {num_inference_steps} steps leaves none; expected at least one")
        if hasattr(self.scheduler, "set_begin_index"):
            self.scheduler.set_begin_index(start * self.scheduler.order)
        self._num_timesteps = len(timesteps)
        return timesteps

    def _initial_noise(
        self,
        latents: Tensor | None,
        like: Tensor,
        seeds: list[int] | None,
        generator: torch.Generator | list[torch.Generator] | None,
    ) -> Tensor:
        if latents is not None:
            if latents.shape != like.shape:
                raise GBCIError(f"latents has shape {list(latents.shape)}; expected {list(like.shape)}")
            return latents.to(like)
        if seeds is not None:
            return seeded_normal(seeds, like.shape[1:], stream=STREAM_INITIAL, device=like.device)
        return randn_tensor(like.shape, generator=generator, device=like.device, dtype=like.dtype)


@dataclass(kw_only=True)
class Trajectory:
    """What a sampler starts from, for B images.

    Attributes:
        latents: [B, 4, h, w] at the level of the first timestep.
        noise: [B, 4, h, w], the initial noise, which also noises the known region.
        image_latents, masked_image_latents: [B, 4, h, w].
        mask_latents: [B, 1, h, w].
        conditioning: of the masked image, the attributes and the report.
        timesteps: those still to take.
        eta, generator, seeds, known_region: as in the call.
        callback, callback_inputs: the call's ``callback_on_step_end`` and the names that it gets.
    """

    latents: Tensor
    noise: Tensor
    image_latents: Tensor
    masked_image_latents: Tensor
    mask_latents: Tensor
    conditioning: Conditioning
    timesteps: Tensor
    eta: float
    generator: torch.Generator | list[torch.Generator] | None
    seeds: list[int] | None
    known_region: bool
    callback: Callable | None
    callback_inputs: Sequence[str]

    def call_back(self, pipe: GBCIPipeline, step: int, latents: Tensor) -> Tensor:
        """Calls the callback with the latents after a step, takes what it changed, and returns the latents."""
        if self.callback is None:
            return latents
        scope = {"latents": latents, "noise": self.noise, "image_latents": self.image_latents}
        given = {name: scope[name] for name in self.callback_inputs}
        scope |= self.callback(pipe, step, self.timesteps[step], given) or {}
        self.noise, self.image_latents = scope["noise"], scope["image_latents"]
        return scope["latents"]
