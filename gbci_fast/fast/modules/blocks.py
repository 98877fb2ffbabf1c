"""The blocks of a stock UNet2DConditionModel, with everything that does not depend on the latents computed beforehand.

A block is built from a diffusers module and shares its weights. It is called with rows of a table instead of a timestep
embedding, and with keys and values instead of a context. A guided batch holds the unconditional half first.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from diffusers.models.activations import GEGLU
from diffusers.models.attention import BasicTransformerBlock, FeedForward
from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0
from diffusers.models.downsampling import Downsample2D
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.models.unets.unet_2d_blocks import (
    CrossAttnDownBlock2D,
    CrossAttnUpBlock2D,
    DownBlock2D,
    UNetMidBlock2DCrossAttn,
    UpBlock2D,
)
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn

from gbci_fast.fast.modules.adapters import is_adapter
from gbci_fast.fast.modules.convolution import filtered
from gbci_fast.ops._triton import DTYPES, use_triton
from gbci_fast.ops.attention import attention
from gbci_fast.ops.cross_attention import cross_attention, kernel_refusals
from gbci_fast.ops.geglu import geglu
from gbci_fast.ops.group_norm_film_silu import group_norm_film_silu
from gbci_fast.ops.layer_norm_film import layer_norm_film


@dataclass(kw_only=True)
class Context:
    """What one cross-attention layer computes before the first step.

    Attributes:
        key, value: ``[B, heads, N, head_dim]`` of the conditional context.
        bias: ``[B, 1, 1, N]``, -10000 where the context is padding, or None.
        kv_lengths: int32 ``[B]``, the number of valid tokens where all padding is at the end; or None.
        null: ``[C]``, the layer's output for the null context, or None where no batch will be guided. All tokens of the
            null context are equal, so the weighted mean of their values does not depend on the query.
    """

    key: Tensor
    value: Tensor
    bias: Tensor | None
    kv_lengths: Tensor | None
    null: Tensor | None


class Resnet:
    """`ResnetBlock2D` without up- or downsampling. A table holds its FiLM (or bias) rows of all timesteps."""

    def __init__(self, block: ResnetBlock2D):
        self.block = block
        self.conv1, self.conv2 = filtered(block.conv1), filtered(block.conv2)
        self.scale_shift = block.time_embedding_norm == "scale_shift"

    def table(self, embedding: Tensor) -> Tensor:
        """Time embeddings [..., E] -> scale and shift [..., 2C] (or bias [..., C])."""
        block = self.block
        table = block.time_emb_proj(embedding if block.skip_time_act else block.nonlinearity(embedding))
        if self.scale_shift:  # 1 + scale, here instead of at every step
            table[..., : block.out_channels] += 1
        return table

    def __call__(self, x: Tensor, row: Tensor) -> Tensor:
        """x [B or 2B, C, H, W] -> [R, C', H, W], with one of the R rows per sample of the output.

        If R is twice the number of samples, both halves of a guided batch are still equal, and everything before the
        FiLM is computed once for both.
        """
        block, halves = self.block, len(row) // len(x)
        h = self.conv1(group_norm(block.norm1, x))
        if self.scale_shift:
            h = group_norm(block.norm2, h, film=row)
        else:
            h = group_norm(block.norm2, (h + row.view(halves, len(x), -1, 1, 1)).flatten(0, 1))
        h = self.conv2(h)
        if block.conv_shortcut is not None:
            x = block.conv_shortcut(x)
        h.view(halves, *x.shape).add_(x)
        return h if block.output_scale_factor == 1 else h.div_(block.output_scale_factor)


class Transformer:
    """`Transformer2DModel` on continuous input with `BasicTransformerBlock`s."""

    def __init__(self, module: Transformer2DModel):
        self.module = module
        self.blocks = [TransformerBlock(block) for block in module.transformer_blocks]

    def __call__(self, x: Tensor, contexts: Iterator[Context], guided: bool) -> Tensor:
        """x [B or 2B, C, H, W] -> the same shape. Takes one context per block from `contexts`."""
        module, (height, width) = self.module, x.shape[-2:]
        tokens = group_norm(module.norm, x, silu=False).flatten(2).transpose(1, 2)  # [B, H W, C]
        tokens = F.linear(tokens, module.proj_in.weight.flatten(1), module.proj_in.bias)
        for block in self.blocks:
            tokens = block(tokens, next(contexts), guided)
        out = F.linear(tokens, module.proj_out.weight.flatten(1), module.proj_out.bias)
        return x + out.transpose(1, 2).unflatten(2, (height, width))


class TransformerBlock:
    """`BasicTransformerBlock` with layer norms, self-attention, cross-attention and a feed-forward."""

    def __init__(self, block: BasicTransformerBlock):
        self.block = block
        self_attention = block.attn1
        self.qkv = torch.cat([part.weight for part in (self_attention.to_q, self_attention.to_k, self_attention.to_v)])
        biases = [part.bias for part in (self_attention.to_q, self_attention.to_k, self_attention.to_v)]
        self.qkv_bias = None if biases[0] is None else torch.cat(biases)

    def context(
        self, tokens: Tensor, null: Tensor | None, bias: Tensor | None = None, kv_lengths: Tensor | None = None
    ) -> Context:
        """The context of tokens [B, N, D]; `null` [D] is the null context's token, or None if no batch is guided."""
        cross = self.block.attn2
        key, value = (_heads(part(tokens), cross.heads) for part in (cross.to_k, cross.to_v))
        constant = None if null is None else cross.to_out[0](cross.to_v(null))
        return Context(key=key, value=value, bias=bias, kv_lengths=kv_lengths, null=constant)

    def __call__(self, x: Tensor, context: Context, guided: bool) -> Tensor:
        """x [B or 2B, S, C] -> the same shape."""
        block = self.block
        q, k, v = F.linear(_layer_norm(block.norm1, x), self.qkv, self.qkv_bias).chunk(3, -1)
        x = x + block.attn1.to_out[0](_attention(q, k, v, block.attn1))
        conditional = x
        if guided:
            unconditional, conditional = x.chunk(2)
            unconditional += context.null
        _cross_attend(block, conditional, context)
        return x + _feed_forward(block.ff, _layer_norm(block.norm3, x))


class Upsample:
    """`Upsample2D`: nearest-neighbor doubling and a 3 x 3 convolution, as four 2 x 2 convolutions of the small image.

    An output pixel depends on two rows and two columns of the small image. Taps on the same pixel are added
    beforehand, which leaves 4 of 9 products.
    """

    def __init__(self, module: Upsample2D):
        self.bias, weight = module.conv.bias, module.conv.weight
        # Output row 2 y sees rows y - 1, y, y of the small image, and row 2 y + 1 rows y, y, y + 1.
        fold = weight.new_tensor([[[1, 0, 0], [0, 1, 1]], [[1, 1, 0], [0, 0, 1]]])  # [phase, small tap, tap]
        folded = torch.einsum("pac, qbd, oicd -> pqoiab", fold, fold, weight)
        self.channels_last = weight.is_contiguous(memory_format=torch.channels_last)
        memory_format = torch.channels_last if self.channels_last else torch.contiguous_format
        self.weights = [[folded[p, q].contiguous(memory_format=memory_format) for q in range(2)] for p in range(2)]

    def __call__(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C', 2H, 2W]."""
        batch, _, height, width = x.shape
        channels = len(self.weights[0][0])
        if self.channels_last:
            out = x.new_empty(batch, height, 2, width, 2, channels).movedim(-1, 1)
        else:
            out = x.new_empty(batch, channels, height, 2, width, 2)
        padded = F.pad(x, (1, 1, 1, 1))
        for p in range(2):
            for q in range(2):
                window = padded[..., p : p + height + 1, q : q + width + 1]
                out[:, :, :, p, :, q] = F.conv2d(window, self.weights[p][q], self.bias)
        return out.flatten(4, 5).flatten(2, 3)


def fuses_norms(x: Tensor) -> bool:
    """Whether `group_norm_film_silu` is faster on an image like x than PyTorch's three operators."""
    # Inductor fuses PyTorch's three operators into one loop, but cannot fuse an operator of the compiled extension.
    return use_triton(x) or (x.is_cpu and x.dtype in DTYPES and not torch.compiler.is_compiling())


def group_norm(norm: nn.GroupNorm, x: Tensor, film: Tensor | None = None, silu: bool = True) -> Tensor:
    """Group norm of x [B, C, H, W], then scale and shift from the rows of film [B or 2B, 2C], then SiLU."""
    if fuses_norms(x):
        scale, shift = (None, None) if film is None else film.chunk(2, 1)
        return group_norm_film_silu(
            x, norm.num_groups, norm.weight, norm.bias, norm.eps, scale=scale, shift=shift, silu=silu
        )
    h = norm(x)
    if film is not None:
        scale, shift = film.view(-1, len(x), film.shape[1], 1, 1).chunk(2, 2)
        h = torch.addcmul(shift, h, scale).flatten(0, 1)
    return F.silu(h, inplace=True) if silu else h


def _layer_norm(norm: nn.LayerNorm, x: Tensor) -> Tensor:
    """x [B, S, C]."""
    return layer_norm_film(x, norm.weight, norm.bias, norm.eps) if use_triton(x) else norm(x)


def _feed_forward(module: FeedForward, x: Tensor) -> Tensor:
    """x [B, S, C]. Float32 products are left to the vendor's library: tensor cores do not multiply float32."""
    if not use_triton(x) or x.dtype == torch.float32:
        return module(x)
    activation, *rest = module.net
    h = geglu(x, activation.proj.weight, activation.proj.bias)
    for part in rest:
        h = part(h)
    return h


def fused_refusals(unet: UNet2DConditionModel) -> list[str]:
    """Why a UNet cannot be built of these blocks, one sentence each; empty if it can."""
    reasons = unsupported(unet)
    embedded = unet.config.class_embed_type in ("projection", "simple_projection", "identity")
    if not embedded or unet.config.class_embeddings_concat:
        reasons.append("it has no class embedding of vectors that is added")
    if unet.mid_block is None:
        reasons.append("it has no middle block")
    for option in _ABSENT:
        if unet.config[option]:
            reasons.append(f"{option} is {unet.config[option]!r}")
    return reasons


def has_other_forward(module: nn.Module) -> bool:
    """Whether a module's `forward` is replaced, as offloading does."""
    return "forward" in vars(module) and getattr(module.forward, "__func__", None) is not type(module).forward


def unsupported(part: nn.Module) -> list[str]:
    """Which parts of a module tree the blocks above do not reproduce, one sentence each; empty if they all are."""
    reasons = []
    adapters = [f"{name}." for name, module in part.named_modules() if is_adapter(module)]
    for name, module in part.named_modules():
        if name.startswith(tuple(adapters)):
            continue  # the layer that holds it has a reason already
        if module._forward_hooks or module._forward_pre_hooks or has_other_forward(module):
            reasons.append(f"{name or 'it'} has hooks")
        if isinstance(module, nn.Dropout) and module.training and module.p > 0:
            reasons.append(f"{name} drops out")
        if any(getattr(module, factor, None) is not None for factor in ("s1", "s2", "b1", "b2")):
            reasons.append(f"{name} has FreeU factors")
        expected = _EXPECTED.get(type(module))
        if expected is None:
            if is_adapter(module):
                reasons.append(f"{name or 'it'} has an adapter that is not merged")
            elif type(module) not in _PLAIN and not isinstance(module, UNet2DConditionModel):
                reasons.append(f"{name} is a {type(module).__name__}")
            continue
        if isinstance(module, Attention) and type(module.processor) not in _PROCESSORS:
            reasons.append(f"{name}.processor is a {type(module.processor).__name__}")
        for attribute, values in expected.items():
            value = getattr(module, attribute)
            if not any(value is one or value == one for one in values):
                found = f"a {type(value).__name__}" if isinstance(value, nn.Module) else repr(value)
                reasons.append(f"{name}.{attribute} is {found}".lstrip("."))
    return reasons


def foreign(part: nn.Module) -> list[str]:
    """What in a module tree (an autoencoder, say) differs from diffusers' stock parts; empty if nothing does."""
    reasons = []
    for name, module in part.named_modules():
        if module._forward_hooks or module._forward_pre_hooks or has_other_forward(module):
            reasons.append(f"{name or 'it'} has hooks")
        if type(module).__module__.split(".")[0] not in ("torch", "diffusers", "gbci_fast"):
            reasons.append(f"{name} is a {type(module).__name__}")
        if isinstance(module, Attention) and type(module.processor) not in _PROCESSORS:
            reasons.append(f"{name}.processor is a {type(module.processor).__name__}")
    return reasons


def cross_attention_notes(part: nn.Module, dtype: torch.dtype) -> list[str]:
    """How many cross-attention layers run without the kernel on CUDA, and why; empty if all use the kernel."""
    layers = [block.attn2 for block in part.modules() if isinstance(block, BasicTransformerBlock)]
    if dtype == torch.float32:
        reasons = Counter({"no tensor core multiplies float32 in its full precision": len(layers)})
    else:
        reasons = Counter(
            reason
            for layer in layers
            for reason in kernel_refusals(layer.query_dim, layer.heads, layer.inner_dim // layer.heads, dtype)
        )
    return [
        f"cross-attention by SDPA and GEMMs in {count} of {len(layers)} layers: {reason}"
        for reason, count in reasons.items()
        if count
    ]


# Options of the UNet that must be unset: the runtime does not implement them.
_ABSENT = (
    "addition_embed_type", "encoder_hid_dim_type", "time_embedding_act_fn", "time_cond_proj_dim", "center_input_sample",
)  # fmt: skip
# Attribute values that the blocks above reproduce; then modules that are called unchanged, or only hold other modules.
_EXPECTED: dict[type[nn.Module], dict[str, tuple]] = {
    ResnetBlock2D: {
        "time_embedding_norm": ("default", "scale_shift"), "upsample": (None,), "downsample": (None,),
    },
    Transformer2DModel: {"is_input_continuous": (True,)},
    BasicTransformerBlock: {
        "norm_type": ("layer_norm",), "pos_embed": (None,), "_chunk_size": (None,), "only_cross_attention": (False,),
    },
    Attention: {
        "spatial_norm": (None,), "group_norm": (None,), "norm_q": (None,), "norm_k": (None,), "norm_cross": (None,),
        "residual_connection": (False,), "rescale_output_factor": (1.0,),
    },
    Upsample2D: {"norm": (None,), "use_conv": (True,), "use_conv_transpose": (False,), "interpolate": (True,)},
}  # fmt: skip
_PLAIN = (
    nn.Conv2d, nn.Linear, nn.GroupNorm, nn.LayerNorm, nn.SiLU, nn.Dropout, nn.ModuleList, nn.Identity,
    Downsample2D, FeedForward, GEGLU, Timesteps, TimestepEmbedding,
    DownBlock2D, CrossAttnDownBlock2D, UNetMidBlock2DCrossAttn, CrossAttnUpBlock2D, UpBlock2D,
)  # fmt: skip


_PROCESSORS = (AttnProcessor, AttnProcessor2_0)  # both compute softmax(q k / sqrt(d)) v


def _heads(x: Tensor, heads: int) -> Tensor:
    """[B, S, heads * d] -> [B, heads, S, d]."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def _attention(q: Tensor, k: Tensor, v: Tensor, module: Attention) -> Tensor:
    """[B, S, C] each -> [B, S, C]."""
    q, k, v = (_heads(part, module.heads) for part in (q, k, v))
    if use_triton(q):
        out = attention(q, k, v, softmax_scale=module.scale)
    else:
        out = F.scaled_dot_product_attention(q, k, v, scale=module.scale)
    return out.transpose(1, 2).flatten(2)


def _cross_attend(block: BasicTransformerBlock, x: Tensor, context: Context) -> None:
    """Adds the cross-attention's output to x [B, S, C]. Float32 products are left to the vendor's library."""
    norm, cross, out = block.norm2, block.attn2, block.attn2.to_out[0]
    lengths_known = context.bias is None or context.kv_lengths is not None
    if use_triton(x) and x.dtype != torch.float32 and lengths_known and cross.to_q.bias is None:
        cross_attention(
            x, norm.weight, norm.bias, cross.to_q.weight, context.key, context.value, out.weight, out.bias,
            eps=norm.eps, softmax_scale=cross.scale, kv_lengths=context.kv_lengths, out=x,
        )  # fmt: skip
        return
    q = _heads(cross.to_q(_layer_norm(norm, x)), cross.heads)
    attended = F.scaled_dot_product_attention(q, context.key, context.value, context.bias, scale=cross.scale)
    x += out(attended.transpose(1, 2).flatten(2))
