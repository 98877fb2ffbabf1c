"""A stock AutoencoderKL whose pairs of group norm and SiLU run as one operator, `group_norm_film_silu`.

PyTorch passes over memory twice or more, and on a GPU copies a channels-last image to normalize it.
"""

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from diffusers.models.autoencoders.vae import Decoder, Encoder
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn

from gbci_fast.fast.modules.blocks import fuses_norms
from gbci_fast.fast.modules.convolution import shared_copy
from gbci_fast.ops.group_norm_film_silu import MAX_GROUP, group_norm_film_silu


class NormSiLU(nn.GroupNorm):
    """A group norm and SiLU. It shares the parameters of a group norm. Under autograd PyTorch's two operators run."""

    def __init__(self, norm: nn.GroupNorm):
        super().__init__(norm.num_groups, norm.num_channels, norm.eps, norm.affine, device="meta")
        self.weight, self.bias = norm.weight, norm.bias
        self.train(norm.training)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C, H, W]."""
        dense = x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last)
        if torch.is_grad_enabled() or not dense or not fuses_norms(x):
            return F.silu(super().forward(x))
        return group_norm_film_silu(x, self.num_groups, self.weight, self.bias, self.eps)


def with_fused_norms(vae: AutoencoderKL) -> AutoencoderKL:
    """A copy of an autoencoder that shares its parameters; only pairs of group norm and SiLU are replaced."""
    vae = shared_copy(vae)
    for part in list(vae.modules()):
        resnet = type(part) is ResnetBlock2D and part.time_emb_proj is None
        if resnet and _alike(part.nonlinearity, part.norm1, part.norm2):
            part.norm1, part.norm2, part.nonlinearity = NormSiLU(part.norm1), NormSiLU(part.norm2), nn.Identity()
        elif type(part) in (Encoder, Decoder) and _alike(part.conv_act, part.conv_norm_out):
            part.conv_norm_out, part.conv_act = NormSiLU(part.conv_norm_out), nn.Identity()
    return vae


def _alike(activation: nn.Module, *norms: nn.Module) -> bool:
    """Whether the modules are SiLU and plain group norms, without hooks."""
    return type(activation) is nn.SiLU and all(
        type(norm) is nn.GroupNorm
        and norm.num_channels // norm.num_groups <= MAX_GROUP
        and not (norm._forward_hooks or norm._forward_pre_hooks)
        for norm in norms
    )
