"""The UNet, with everything that does not depend on the latents computed before the step loop.

Once per call it computes the keys and values of every cross-attention layer, the FiLM rows of every ResNet block for
all timesteps, and the convolution of the constant input channels. The two halves of a guided batch are equal up to the
first FiLM, so that part runs once for both. The cross-attention of the null context is a constant.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from gbci_fast.errors import GBCIError
from gbci_fast.fast.modules.blocks import Context, Resnet, Transformer, Upsample, fused_refusals, group_norm
from gbci_fast.model.conditioning import Conditioning


@dataclass(kw_only=True)
class _State:
    """`first` [B, C, h, w]; a table [T, 1 + B, 2C] per ResNet block, the null condition first; a context per layer."""

    first: Tensor
    tables: list[Tensor]
    contexts: list[Context]


class _Stage:
    """The ResNet blocks of a UNet block, each followed by a transformer if the UNet block has any."""

    def __init__(self, block: nn.Module):
        self.resnets = [Resnet(part) for part in block.resnets]
        self.transformers = [Transformer(part) for part in getattr(block, "attentions", None) or ()]
        self.downsamplers = getattr(block, "downsamplers", None) or ()
        self.upsamplers = [Upsample(part) for part in getattr(block, "upsamplers", None) or ()]


class FusedDenoiser:
    """See `gbci_fast.fast.denoiser.Denoiser`. It shares the UNet's weights.

    Raises:
        GBCIError: the fused blocks do not reproduce a part of the UNet; the sentence names the part.
    """

    def __init__(self, unet: UNet2DConditionModel):
        reasons = fused_refusals(unet)
        if reasons:
            raise GBCIError(f"the fused runtime cannot run this UNet: {'; '.join(reasons)}")
        self._unet = unet
        self.dtype = unet.dtype
        self._down = [_Stage(block) for block in unet.down_blocks]
        self._middle = _Stage(unet.mid_block)
        self._up = [_Stage(block) for block in unet.up_blocks]
        stages = [*self._down, self._middle, *self._up]
        self._resnets = [resnet for stage in stages for resnet in stage.resnets]
        self._layers = [layer for stage in stages for part in stage.transformers for layer in part.blocks]
        channels = unet.config.out_channels
        self._conv_in = unet.conv_in.weight[:, :channels].contiguous(memory_format=_format(unet))
        self._conv_in_constant = unet.conv_in.weight[:, channels:].contiguous(memory_format=_format(unet))

    def prepare(self, conditioning: Conditioning, null: Conditioning, constant: Tensor, timesteps: Tensor) -> _State:
        unet, dtype = self._unet, self.dtype
        constant = constant.to(dtype).contiguous(memory_format=_format(unet))
        pooled = torch.cat([null.pooled, conditioning.pooled]).to(dtype)
        time = unet.time_embedding(unet.time_proj(timesteps).to(dtype))
        embedding = time[:, None] + unet.class_embedding(pooled)  # [T, 1 + B, E]
        tokens, kv_lengths, bias = conditioning.tokens.to(dtype), None, None
        if conditioning.padded:
            tokens, kv_lengths = _padding_last(tokens, conditioning.token_mask)
            padding = torch.arange(tokens.shape[1], device=tokens.device) >= kv_lengths[:, None]
            bias = (padding.to(dtype) * -10000.0)[:, None, None]
        return _State(
            first=F.conv2d(constant, self._conv_in_constant, unet.conv_in.bias, padding=unet.conv_in.padding),
            tables=[resnet.table(embedding) for resnet in self._resnets],
            contexts=[layer.context(tokens, null.tokens[0, 0].to(dtype), bias, kv_lengths) for layer in self._layers],
        )

    def __call__(self, latents: Tensor, step: int, state: _State, guided: bool) -> Tensor | tuple[Tensor, Tensor]:
        rows = [_rows(table[step], len(latents), guided) for table in state.tables]
        return self._forward(latents, rows, state.first, state.contexts, guided)

    def compile(self, compiler: Callable[[Callable], Callable]) -> None:
        """Compiles the step, for this denoiser alone."""
        self._forward = compiler(self._forward)

    def _forward(
        self, latents: Tensor, table: list[Tensor], first: Tensor, layers: list[Context], guided: bool
    ) -> Tensor | tuple[Tensor, Tensor]:
        unet, rows, contexts = self._unet, iter(table), iter(layers)
        latents = latents.contiguous(memory_format=_format(unet))
        x = F.conv2d(latents, self._conv_in, padding=unet.conv_in.padding).add_(first)
        skips = [x]
        for stage in self._down:
            for i, resnet in enumerate(stage.resnets):
                x = resnet(x, next(rows))
                if stage.transformers:
                    x = stage.transformers[i](x, contexts, guided)
                skips.append(x)
            for downsampler in stage.downsamplers:
                x = downsampler(x)
                skips.append(x)
        x = self._middle.resnets[0](x, next(rows))
        for resnet, transformer in zip(self._middle.resnets[1:], self._middle.transformers, strict=True):
            x = resnet(transformer(x, contexts, guided), next(rows))
        for stage in self._up:
            for i, resnet in enumerate(stage.resnets):
                skip = skips.pop()
                if len(skip) < len(x):  # the input's skip connection is shared by both halves
                    skip = torch.cat([skip, skip])  # not by `repeat`, which forgets the memory format
                x = resnet(torch.cat([x, skip], 1), next(rows))
                if stage.transformers:
                    x = stage.transformers[i](x, contexts, guided)
            for upsampler in stage.upsamplers:
                x = upsampler(x)
        output = unet.conv_out(group_norm(unet.conv_norm_out, x))
        return tuple(reversed(output.chunk(2))) if guided else output


def _padding_last(tokens: Tensor, token_mask: Tensor) -> tuple[Tensor, Tensor]:
    """Moves valid tokens to the front (attention ignores order); returns tokens [B, N, D] and their count [B].

    A sample that is all padding keeps all its tokens: an equal bias on all scores does not change their softmax.
    """
    counts = token_mask | ~token_mask.any(1, keepdim=True)
    order = counts.to(torch.uint8).argsort(dim=1, descending=True, stable=True)
    return tokens.gather(1, order[..., None].expand_as(tokens)), counts.sum(1, dtype=torch.int32)


def _rows(table: Tensor, batch: int, guided: bool) -> Tensor:
    """[1 + B, C] -> one row per sample; the first half of a guided batch gets the null condition's row."""
    return torch.cat([table[:1].expand(batch, -1), table[1:]]) if guided else table[1:]


def _format(unet: UNet2DConditionModel) -> torch.memory_format:
    channels_last = unet.conv_out.weight.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if channels_last else torch.contiguous_format
