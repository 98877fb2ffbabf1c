"""The stock UNet, called as `gbci_fast.model.pipeline` calls it: both halves of a guided batch in one forward."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from gbci_fast.model.conditioning import Conditioning


@dataclass(kw_only=True)
class _State:
    conditional: Conditioning
    both: Conditioning
    constant: Tensor
    timesteps: Tensor


class EagerDenoiser:
    """See `gbci_fast.fast.denoiser.Denoiser`."""

    def __init__(self, unet: UNet2DConditionModel):
        self._unet = unet
        self.dtype = unet.dtype

    def compile(self, compiler: Callable[[Callable], Callable]) -> None:
        """Compiles the UNet's forward, for this denoiser alone."""
        self._unet = compiler(self._unet)

    def prepare(self, conditioning: Conditioning, null: Conditioning, constant: Tensor, timesteps: Tensor) -> _State:
        batch, tokens = conditioning.tokens.shape[:2]
        repeated = Conditioning(
            null.tokens.expand(batch, tokens, -1), null.token_mask.expand(batch, tokens), null.pooled.expand(batch, -1)
        )
        both = Conditioning.cat([repeated, conditioning])
        return _State(conditional=conditioning, both=both, constant=constant, timesteps=timesteps)

    def __call__(self, latents: Tensor, step: int, state: _State, guided: bool) -> Tensor | tuple[Tensor, Tensor]:
        condition = state.both if guided else state.conditional
        x = torch.cat([latents, state.constant.to(latents)], 1)
        output = self._unet(
            torch.cat([x, x]) if guided else x,
            state.timesteps[step],
            encoder_hidden_states=condition.tokens.to(self.dtype),
            encoder_attention_mask=condition.token_mask if condition.padded else None,
            class_labels=condition.pooled.to(self.dtype),
            return_dict=False,
        )[0]
        return tuple(reversed(output.chunk(2))) if guided else output
