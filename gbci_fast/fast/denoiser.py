"""The interface between samplers and runtimes: how a UNet is called, whichever runtime executes it."""

from typing import Any, Protocol

import torch
from torch import Tensor

from gbci_fast.model.conditioning import Conditioning


class Denoiser(Protocol):
    """Model output as a function of (latents, step), for one batch of conditions.

    Attributes:
        dtype: of its input latents and its output.
    """

    dtype: torch.dtype

    def prepare(self, conditioning: Conditioning, null: Conditioning, constant: Tensor, timesteps: Tensor) -> Any:
        """Computes, once per call of the pipeline, everything that does not depend on the latents.

        Args:
            conditioning: of B images.
            null: the unconditional condition, of one image and one token.
            constant: [B, 5, h, w], the mask and the latents of the masked image.
            timesteps: [T].

        Returns:
            The `state` that `__call__` takes.
        """
        ...

    def __call__(self, latents: Tensor, step: int, state: Any, guided: bool) -> Tensor | tuple[Tensor, Tensor]:
        """Latents [B, 4, h, w] at ``timesteps[step]`` -> the output, or (conditional, unconditional) if `guided`."""
        ...
