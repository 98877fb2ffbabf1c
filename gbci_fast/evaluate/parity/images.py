"""Checks that a faster path paints what the eager pipeline paints, within the bounds of its tier
(`gbci_fast.fast.accelerate`).

Bounds apply to the worst image, inside its mask grown by `ROI_GROWTH` pixels: most of an inpainted image is a copy, so
that figures of the whole image say little. All tiers are compared with the eager float32 pipeline. The rounding that
`tolerance` may add is measured on the eager pipeline in the same dtype.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gbci_fast.errors import GBCIError
from gbci_fast.evaluate.metrics import ROI_GROWTH, fidelity, grow
from gbci_fast.model.pipeline import GBCIPipeline

RMS_FLOOR = 1 / 65535  # one step of a 16-bit image, the least that can be written
EXACT_LATENTS = 1e-5  # error relative to the image's largest latent
TOLERANCE_PSNR, TOLERANCE_SSIM = 40.0, 0.99  # or, if lower, the eager pipeline's own in that dtype minus a margin
PSNR_MARGIN, SSIM_MARGIN, RMS_FACTOR = 1.0, 0.005, 1.5
APPROXIMATE_PSNR, APPROXIMATE_SSIM = 30.0, 0.90


@dataclass(frozen=True, kw_only=True)
class Output:
    """A pipeline's output: `images`, float [B, 1, H, W] in [0, 1], and, if requested, `latents` [B, 4, h, w]."""

    images: Tensor
    latents: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class Distance:
    """The distance of one image to the eager float32 image, inside the grown mask: PSNR in dB, SSIM and RMS error."""

    psnr: float
    ssim: float
    rms: float


@dataclass(frozen=True, kw_only=True)
class Gate:
    """A bound on the worst image's `value`: a lower bound if `at_least`, else an upper bound. NaN never passes."""

    name: str
    value: float
    bound: float
    at_least: bool

    @property
    def holds(self) -> bool:
        return self.value >= self.bound if self.at_least else self.value <= self.bound

    def __str__(self) -> str:
        return f"{self.name} {self.value:.4g} ({'at least' if self.at_least else 'at most'} {self.bound:.4g})"


@dataclass(frozen=True, kw_only=True)
class Parity:
    """The verdict on one batch.

    Attributes:
        tier: name of the tier whose gates were applied.
        distances: of every image, in the order of the batch.
        own: distances of the eager pipeline in the narrow dtype, or empty.
        gates: the tier's bounds.
    """

    tier: str
    distances: tuple[Distance, ...]
    own: tuple[Distance, ...]
    gates: tuple[Gate, ...]

    @property
    def holds(self) -> bool:
        return not self.violated

    @property
    def violated(self) -> tuple[Gate, ...]:
        return tuple(gate for gate in self.gates if not gate.holds)

    @property
    def worst(self) -> Distance:
        """The worst value of each figure, possibly from different images."""
        return worst(self.distances)

    def sentence(self) -> str:
        """One line for users: whether the tier holds, and the figures that show it."""
        verdict = "holds" if self.holds else "is violated"
        shown = ", ".join(map(str, self.violated or self.gates))
        return f"tier {self.tier} {verdict} on {len(self.distances)} images: {shown}"


def parity(
    tier: str,
    candidate: Output,
    reference: Output,
    *,
    templates: Tensor,
    masks: Tensor,
    narrow: Output | None = None,
) -> Parity:
    """Compares one batch of a faster path with the eager pipeline's output for the same arguments.

    Args:
        tier: "exact" (needs both latents), "tolerance" (needs `narrow`) or "approximate".
        candidate: output of the faster path.
        reference: output of the eager pipeline in float32.
        templates: [B or 1, 1, H, W] in [0, 1], the images that were painted into.
        masks: [B or 1, 1, H, W], above 0.5 = synthesized; at least one pixel each.
        narrow: output of the eager pipeline in the candidate's dtype; for float32, `reference` itself.

    Raises:
        GBCIError: an unknown tier, or an output that the tier needs is missing.
    """
    batch = len(reference.images)
    templates, masks = (part.cpu().expand(batch, -1, -1, -1) for part in (templates, masks > 0.5))
    distances = measure(candidate.images, reference.images, masks)
    own = measure(narrow.images, reference.images, masks) if narrow is not None else ()
    changed = (candidate.images.cpu() != templates) & ~masks
    gates = [Gate(name="pixels changed outside the mask", value=int(changed.sum()), bound=0, at_least=False)]
    found = worst(distances)
    if tier == "exact":
        if candidate.latents is None or reference.latents is None:
            raise GBCIError("tier 'exact' is judged by latents; expected those of candidate and reference")
        error = latent_error(candidate.latents, reference.latents)
        gates.append(Gate(name="latents' largest relative error", value=error, bound=EXACT_LATENTS, at_least=False))
    elif tier == "tolerance":
        if narrow is None:
            raise GBCIError("tier 'tolerance' is judged by the eager pipeline's own rounding; expected narrow")
        rounding = worst(own)
        psnr, ssim = rounding.psnr - PSNR_MARGIN, rounding.ssim - SSIM_MARGIN
        rms = max(RMS_FACTOR * rounding.rms, RMS_FLOOR)
        gates += [
            Gate(name="RoI PSNR", value=found.psnr, bound=min(TOLERANCE_PSNR, psnr), at_least=True),
            Gate(name="RoI SSIM", value=found.ssim, bound=min(TOLERANCE_SSIM, ssim), at_least=True),
            Gate(name="RoI RMS error", value=found.rms, bound=rms, at_least=False),
        ]
    elif tier == "approximate":
        gates += [
            Gate(name="RoI PSNR", value=found.psnr, bound=APPROXIMATE_PSNR, at_least=True),
            Gate(name="RoI SSIM", value=found.ssim, bound=APPROXIMATE_SSIM, at_least=True),
        ]
    else:
        raise GBCIError(f"tier is {tier!r}; expected exact, tolerance or approximate")
    return Parity(tier=tier, distances=distances, own=own, gates=tuple(gates))


def reference_output(pipe: GBCIPipeline, **call: Any) -> Output:
    """The images and final latents of one call of the eager pipeline."""
    kept = {}

    def keep(pipe: GBCIPipeline, step: int, timestep: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        kept.update(tensors)
        return {}

    images = pipe(**call, output_type="pt", callback_on_step_end=keep).images
    return Output(images=images, latents=kept["latents"])


def candidate_output(pipe: GBCIPipeline, *, latents: bool = False, **call: Any) -> Output:
    """The images of a call as users make it, and with `latents` the latents of a second call.

    The latents are not collected by a callback, because a callback may change how the loop runs.

    Raises:
        GBCIError: `latents` is set and a generator is given, which draws other noise in the second call.
    """
    if latents and call.get("generator") is not None:
        raise GBCIError("latents need a second call, and a generator was given; expected seed, which draws alike")
    images = pipe(**call, output_type="pt").images
    return Output(images=images, latents=pipe(**call, output_type="latent").images if latents else None)


def narrowed(pipe: GBCIPipeline, dtype: torch.dtype) -> GBCIPipeline:
    """A copy of the eager pipeline with UNet and autoencoder in `dtype`, as `accelerate` converts them."""
    parts = dict(pipe.components)
    for name in ("unet", "vae"):
        parts[name] = nn.Module.to(copy.deepcopy(parts[name]), dtype)  # diffusers' own `to` logs a warning
    made = GBCIPipeline(**parts | {"scheduler": copy.deepcopy(pipe.scheduler)})
    made.set_progress_bar_config(disable=True)
    return made


def measure(images: Tensor, reference: Tensor, masks: Tensor) -> tuple[Distance, ...]:
    """The distance of every image [B, 1, H, W] to its reference, inside its grown mask (bool, same shape)."""
    return tuple(
        _distance(*parts) for parts in zip(_pixels(images), _pixels(reference), masks[:, 0].numpy(), strict=True)
    )


def worst(distances: Sequence[Distance]) -> Distance:
    """The lowest PSNR, the lowest SSIM and the largest RMS error; NaN propagates."""
    psnr, ssim, rms = np.array([(one.psnr, one.ssim, one.rms) for one in distances]).T
    return Distance(psnr=float(psnr.min()), ssim=float(ssim.min()), rms=float(rms.max()))


def latent_error(latents: Tensor, reference: Tensor) -> float:
    """The largest absolute difference relative to the image's largest latent, for the worst image."""
    latents, reference = (part.detach().cpu().double().flatten(1) for part in (latents, reference))
    return float(((latents - reference).abs().amax(1) / reference.abs().amax(1)).max())


def _pixels(images: Tensor) -> np.ndarray:
    return images[:, 0].detach().cpu().double().numpy()


def _distance(image: np.ndarray, reference: np.ndarray, mask: np.ndarray) -> Distance:
    region = grow(mask, ROI_GROWTH)
    scores = fidelity(reference, image, {"roi": region})["roi"]
    return Distance(**scores, rms=float(np.sqrt(np.square(image - reference)[region].mean())))
