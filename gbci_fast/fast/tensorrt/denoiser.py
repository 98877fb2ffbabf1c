"""The core of the fused UNet, and the VAE's decoder, as TensorRT engines.

Everything that `gbci_fast.fast.runtimes.fused` computes once per call stays in PyTorch. An engine has static shapes: a
batch is padded to the next of `BATCH_SIZES`, a context to a multiple of `TOKEN_MULTIPLE`. Each pair of sizes has an
engine of its own, which is built at its first use and then kept (`gbci_fast.fast.tensorrt.cache`).
"""

import logging
from dataclasses import dataclass, replace
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.models.autoencoders.vae import DecoderOutput
from torch import Tensor

from gbci_fast.errors import GBCIError
from gbci_fast.fast import export
from gbci_fast.fast.graph import BATCH_SIZES, TOKEN_MULTIPLE, padded_size
from gbci_fast.fast.modules.blocks import foreign
from gbci_fast.fast.modules.convolution import shared_copy
from gbci_fast.fast.runtimes.fused import FusedDenoiser, _rows
from gbci_fast.fast.tensorrt.cache import EngineCache
from gbci_fast.fast.tensorrt.flavor import FLAVORS, pick_flavor
from gbci_fast.fast.tensorrt.run import ALIGNMENT
from gbci_fast.fast.tensorrt.store import Engines, decoder_recipe, digest, unet_recipe
from gbci_fast.fast.watch import Watch
from gbci_fast.model.conditioning import Conditioning

logger = logging.getLogger(__name__)
DECODED = 16
"""Images that a decoder decodes at a time. More images are not faster, but take more memory."""


def tensorrt_refusals(device: torch.device) -> list[str]:
    """Why no flavor of TensorRT runs on a device, one sentence each; empty if a flavor is usable."""
    refusals = [flavor.refusals(device) for flavor in FLAVORS.values()]
    return [] if not all(refusals) else [reason for reasons in refusals for reason in reasons]


def tensorrt_note(device: torch.device) -> str:
    """Which TensorRT runs on a device. Raises GBCIError where `tensorrt_refusals` has reasons."""
    flavor = pick_flavor("auto", device)
    return f"engines of {flavor.name} {flavor.version}"


@dataclass(kw_only=True)
class _State:
    fused: Any
    batch: int  # number of images
    size: int  # batch size of the engine
    tokens: int


class TensorRTDenoiser:
    """See `gbci_fast.fast.denoiser.Denoiser`.

    Args:
        unet: on the GPU, in the dtype to run in.
        engines: the source of its engines; by default the first usable flavor, with the user's cache.

    Raises:
        GBCIError: no flavor can be used here, or the fused runtime cannot run this UNet.
    """

    def __init__(self, unet: UNet2DConditionModel, engines: Engines | None = None):
        self._fused = FusedDenoiser(unet)
        self._unet, self.dtype = unet, unet.dtype
        self._engines = engines or Engines(pick_flavor("auto", unet.device), EngineCache())
        self._weights = digest(unet)

    def prepare(self, conditioning: Conditioning, null: Conditioning, constant: Tensor, timesteps: Tensor) -> _State:
        batch, size = len(constant), _engine_batch(len(constant))
        conditioning = conditioning.pad(TOKEN_MULTIPLE)
        conditioning = Conditioning(**{name: _filled(part, size) for name, part in conditioning.tensors().items()})
        # Engines always take lengths, so the context counts as padded; reading the mask would wait for the device.
        vars(conditioning)["padded"] = True
        state = self._fused.prepare(conditioning, null, _filled(constant, size), timesteps)
        contexts = [
            replace(context, key=context.key.contiguous(), value=context.value.contiguous())
            for context in state.contexts
        ]
        state = replace(state, first=state.first.contiguous(), contexts=contexts)
        return _State(fused=state, batch=batch, size=size, tokens=conditioning.tokens.shape[1])

    def __call__(self, latents: Tensor, step: int, state: _State, guided: bool) -> Tensor | tuple[Tensor, Tensor]:
        height, width = latents.shape[-2:]
        shapes = export.Bucket(batch=state.size, height=height, width=width, tokens=state.tokens, guided=guided)
        engine = self._engines(shapes, lambda: unet_recipe(self._unet, shapes, self._weights), latents.device)
        latents = _filled(latents.contiguous(), state.size)
        films = [_aligned(_rows(table[step], state.size, guided)) for table in state.fused.tables]
        outputs = engine(export.unet_inputs(latents, films, state.fused, shapes))
        parts = tuple(outputs[name][: state.batch] for name in ("conditional", "unconditional") if name in outputs)
        return parts if guided else parts[0]


class EngineAutoencoder(AutoencoderKL):
    """A copy of an `AutoencoderKL` whose decoder runs as an engine; encoder and weights are shared.

    The stock decoder runs where tiling is enabled, and where the decoder has parts that an engine would lack.
    """

    engines: Engines
    weights: str | None
    _watch: Watch | None
    _foreign: list[str]
    _unwatched = ("weights", "_watch", "_foreign")

    @classmethod
    def of(cls, vae: AutoencoderKL, engines: Engines | None = None) -> "EngineAutoencoder":
        """A copy that shares the parameters of `vae`; `engines` as in `TensorRTDenoiser`."""
        twin = shared_copy(vae)
        twin.__class__ = cls
        twin.engines = engines or Engines(pick_flavor("auto", vae.device), EngineCache())
        twin.weights = twin._watch = None
        return twin

    def _decode(self, z: Tensor, return_dict: bool = True) -> DecoderOutput | tuple[Tensor]:
        """[B, 4, h, w] -> [B, 1, H, W]."""
        if self.use_tiling or self._foreign_here():
            return super()._decode(z, return_dict=return_dict)
        image = torch.cat([self._decode_batch(part) for part in z.split(DECODED)])
        return DecoderOutput(sample=image) if return_dict else (image,)

    def _decode_batch(self, z: Tensor) -> Tensor:
        shape = padded_size(len(z)), *z.shape[-2:]
        self.weights = self.weights or digest(self)
        engine = self.engines(shape, lambda: decoder_recipe(self, *shape, self.weights), z.device)
        return engine({"latents": _aligned(_filled(z.contiguous(), shape[0]))})["image"][: len(z)]

    def _foreign_here(self) -> list[str]:
        """Why the decoder cannot be an engine; empty if it can. If the decoder changed, its engines are dropped."""
        if self._watch is None or self._watch.changed():
            self.weights = None
            self.engines.clear()
            self._watch, self._foreign = Watch(self, values=True), foreign(self.decoder)
            for reason in self._foreign:
                logger.warning("the autoencoder decodes without an engine: %s", reason)
        return self._foreign

    def __getstate__(self) -> dict[str, Any]:
        """The state without members that a copy derives again."""
        return vars(self) | {"weights": None, "_watch": None}


def _engine_batch(batch: int) -> int:
    if batch > BATCH_SIZES[-1]:
        raise GBCIError(f"the batch has {batch} images; expected at most {BATCH_SIZES[-1]} with the tensorrt runtime")
    return padded_size(batch)


def _filled(tensor: Tensor, size: int) -> Tensor:
    """[B, ...] -> [size, ...], with the last sample repeated at the end; `tensor` itself if B is `size`."""
    missing = size - len(tensor)
    return torch.cat([tensor, tensor[-1:].expand(missing, *tensor.shape[1:])]) if missing else tensor


def _aligned(tensor: Tensor) -> Tensor:
    """`tensor`, or a copy at an address that an engine can read from (see `ALIGNMENT`)."""
    return tensor.clone() if tensor.data_ptr() % ALIGNMENT else tensor
