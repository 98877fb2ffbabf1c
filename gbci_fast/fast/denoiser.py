"""The interface between samplers and runtimes: how a UNet is called, whichever runtime executes it."""

from typing import Any, Protocol

import torch
from torch import Tensor

from gbci_fast.model.conditioning import Conditioning


class Denoiser(Protocol):
    """Model output as a function of (latents, step), for one batch of conditions.

    Attributes:
        dtype: of the latents that it takes and the output that it gives.
    """

    dtype: torch.dtype

    def prepare(self, conditioning: Conditioning, null: Conditioning, constant: Tensor, timesteps: Tensor) -> Any:
        """What does not depend on the latents, computed once per call of the pipeline; `__call__` gets it as `state`.

        Args:
            conditioning: of B images.
            null: the unconditional condition, of one image and one token.
            constant: [B, 5, h, w], the mask and the latents of the masked image.
            timesteps: [T].
        """
        ...

    def __call__(self, latents: Tensor, step: int, state: Any, guided: bool) -> Tensor | tuple[Tensor, Tensor]:
        """[B, 4, h, w] at ``timesteps[step]`` -> the model's output, or (conditional, unconditional) if `guided`."""
        ...
