"""A faster copy of any stock `UNet2DConditionModel`, with the same forward.

A `FastUNet` is a copy of a UNet. Its stock forward still runs, so that every argument keeps its meaning. The blocks of
the types in `BLOCKS` call the fused blocks of `gbci_fast.fast.modules.blocks`. A block that the fused ones do not
reproduce stays stock, and `describe` says so.
"""

import copy
import functools
import inspect
import logging
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.downsampling import Downsample2D
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.models.unets.unet_2d_blocks import (
    CrossAttnDownBlock2D,
    CrossAttnUpBlock2D,
    DownBlock2D,
    UNetMidBlock2D,
    UNetMidBlock2DCrossAttn,
    UpBlock2D,
)
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from gbci_fast.fast.decision import Decision
from gbci_fast.fast.modules.adapters import adapter_notes, is_adapter, merged
from gbci_fast.fast.modules.blocks import (
    Context,
    Resnet,
    Transformer,
    Upsample,
    cross_attention_notes,
    has_other_forward,
    unsupported,
)
from gbci_fast.fast.runtimes.compile import compiled
from gbci_fast.fast.watch import Watch
from gbci_fast.model.devices import without_autocast

logger = logging.getLogger(__name__)
_ARGUMENTS = tuple(inspect.signature(UNet2DConditionModel.forward).parameters)[3:]  # after self, sample, timestep
_REFRESHING = threading.Lock()


class LastValue:
    """A function of one tensor that keeps its last value while the tensor is the same object and not written to.

    The value is not kept for a tensor made under `torch.inference_mode`, which does not count its changes; with
    gradients or autocast enabled; or while a graph is traced or captured, because the graph sees other values later.
    """

    def __init__(self, function: Callable[[Tensor], Any]):
        self.function = function
        self.last: tuple[Tensor, int, Any] | None = None  # keeps the tensor alive, so that its id stays unique

    def __call__(self, tensor: Tensor) -> Any:
        recorded = torch.compiler.is_compiling() or (tensor.is_cuda and torch.cuda.is_current_stream_capturing())
        if recorded or tensor.is_inference() or not_plain_inference(tensor):
            return self.function(tensor)
        last = self.last  # read once: another thread may replace it
        if last is None or last[0] is not tensor or last[1] != tensor._version:
            last = self.last = tensor, tensor._version, self.function(tensor)
        return last[2]

    def __getstate__(self) -> dict[str, Any]:
        return {"function": self.function, "last": None}


def not_plain_inference(x: Tensor) -> str | None:
    """Why a call on x must use the stock forward now; None if it need not."""
    if torch.is_grad_enabled():
        return "gradients are enabled; call it under torch.no_grad()"
    if torch.is_autocast_enabled(x.device.type):
        return "autocast is enabled"
    return None


class FastBlock(nn.Module):
    """A stock block that became a fused one, in place: same parameters, names, hooks and forward.

    Attributes:
        stock: the class of the stock block.
        fused: the block of `gbci_fast.fast.modules.blocks`. None where hooks were put on the fused block: the hooks
            keep this class's forward, which then runs the stock forward.
        declined: why calls went to the stock forward, each reason once; one dictionary for the whole UNet.
    """

    stock: type[nn.Module]
    fused: Any
    declined: dict[str, None]
    _unwatched = ("declined",)

    def declines(self, reason: str | None) -> bool:
        """Whether a call goes to the stock forward; a `reason` for it is reported once per UNet."""
        if reason is not None and not torch.compiler.is_compiling():
            reason = f"stock {self.stock.__name__} in calls where {reason}"
            if reason not in self.declined:
                self.declined[reason] = None
                logger.warning(reason)
        return reason is not None or self.fused is None

    def _apply(self, *args: Any, **kwargs: Any) -> nn.Module:
        # Cast or moved: values derived from the weights are invalid. The stock forward runs until they are renewed.
        to_stock(self)
        return nn.Module._apply(self, *args, **kwargs)


class FastResnet(FastBlock, ResnetBlock2D):
    stock = ResnetBlock2D

    def forward(self, input_tensor: Tensor, temb: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        reason = not_plain_inference(input_tensor)
        if self.declines(reason):
            return super().forward(input_tensor, temb, *args, **kwargs)
        return self.fused(input_tensor, self.fused.table(temb))


class FastTransformer(FastBlock, Transformer2DModel):
    stock = Transformer2DModel
    contexts: LastValue

    def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None, **options: Any) -> Any:
        reason = not_plain_inference(hidden_states)
        reason = reason or _not_plain_attention(hidden_states, encoder_hidden_states, options)
        if self.declines(reason):
            return super().forward(hidden_states, encoder_hidden_states, **options)
        contexts: list[Context] = self.contexts(encoder_hidden_states)
        bias = options.get("encoder_attention_mask")  # [B, 1, N], 0 or -10000
        if bias is not None:
            contexts = [replace(context, bias=bias[:, None]) for context in contexts]
        out = self.fused(hidden_states, iter(contexts), False)
        return Transformer2DModelOutput(sample=out) if options.get("return_dict", True) else (out,)


class FastUpsample(FastBlock, Upsample2D):
    stock = Upsample2D

    def forward(self, hidden_states: Tensor, output_size: Any = None, *args: Any, **kwargs: Any) -> Tensor:
        reason = not_plain_inference(hidden_states)
        if output_size is not None and tuple(output_size) != tuple(2 * side for side in hidden_states.shape[-2:]):
            reason = "the image does not double in size"
        if self.declines(reason):
            return super().forward(hidden_states, output_size, *args, **kwargs)
        return self.fused(hidden_states)


# Stock block -> the class that it becomes, and the fused block which that class calls.
BLOCKS: dict[type[nn.Module], tuple[type[FastBlock], type]] = {
    ResnetBlock2D: (FastResnet, Resnet),
    Transformer2DModel: (FastTransformer, Transformer),
    Upsample2D: (FastUpsample, Upsample),
}


def _not_plain_attention(x: Tensor, context: Any, options: dict[str, Any]) -> str | None:
    """Why a call of a transformer is more than attention to one context per sample; None if it is not."""
    if options.get("cross_attention_kwargs"):
        return "there are cross_attention_kwargs"
    if options.get("attention_mask") is not None:
        return "there is an attention_mask"
    if not isinstance(context, Tensor) or context.ndim != 3 or len(context) != len(x):
        return "encoder_hidden_states is not [batch, tokens, width]"
    bias = options.get("encoder_attention_mask")
    if bias is not None and bias.shape != (len(x), 1, context.shape[1]):
        return "encoder_attention_mask is not [batch, tokens]"
    return None


def to_stock(part: nn.Module) -> None:
    """Turns a fused block back into the stock block, in place; leaves any other part as it is."""
    if isinstance(part, FastBlock):
        part.fused = None
        if not has_other_forward(part):
            vars(part).pop("forward", None)
            part.__class__ = part.stock


def to_fast(part: nn.Module, plain: nn.Module, declined: dict[str, None]) -> None:
    """Turns a stock block into a fused one, in place.

    Args:
        part: the stock block.
        plain: the same block with its adapters merged; `unsupported` is empty for it.
        declined: see `FastBlock`.
    """
    kind, fused = BLOCKS[type(part)]
    vars(part).pop("forward", None)  # the stock forward, which removed hooks left in the instance
    part.fused, part.declined = fused(plain), declined
    if kind is FastTransformer:
        part.contexts = LastValue(functools.partial(_contexts, part.fused))
    part.__class__ = kind


def _is_fused(part: nn.Module) -> bool:
    return isinstance(part, FastBlock) and part.fused is not None


def _contexts(fused: Transformer, tokens: Tensor) -> list[Context]:
    return [block.context(tokens, None, None) for block in fused.blocks]


def _project(unet: UNet2DConditionModel, tokens: Tensor) -> Tensor:
    return unet.encoder_hid_proj(tokens)


def _cast(unet: "FastUNet", tensor: Tensor) -> Tensor:
    return tensor.to(unet.compute_dtype) if tensor.is_floating_point() else tensor


# Blocks whose forward only calls their parts and concatenates.
_CONCATENATING = (
    nn.ModuleList, DownBlock2D, CrossAttnDownBlock2D, UNetMidBlock2D, UNetMidBlock2DCrossAttn, CrossAttnUpBlock2D,
    UpBlock2D, Downsample2D, nn.Conv2d,
)  # fmt: skip


def _unknown(unet: UNet2DConditionModel) -> Iterator[str]:
    """The parts of the down, middle and up blocks for which there is no fused block."""
    parts = [(name, part) for name, part in unet.named_children() if name in ("down_blocks", "mid_block", "up_blocks")]
    while parts:
        name, part = parts.pop(0)
        if type(part) in _CONCATENATING:
            parts += [(f"{name}.{child_name}", child) for child_name, child in part.named_children()]
        elif is_adapter(part):
            yield f"{name} has an adapter"
        elif not isinstance(part, tuple(BLOCKS)):
            yield f"{name} is a {type(part).__name__}"


@dataclass
class _Derived:
    """The state that `FastUNet.refresh` examined last. Copies are empty, because they belong to another UNet."""

    watch: Watch | None = None
    scale: float = 1.0

    def __reduce__(self) -> tuple[Any, ...]:
        return _Derived, ()

    def outdated(self, scale: float) -> bool:
        return self.watch is None or scale != self.scale or self.watch.changed()


class FastUNet(UNet2DConditionModel):
    """A `UNet2DConditionModel` with the same forward, config and state dict; `gbci_fast.accelerate` makes it.

    Attributes:
        decision: the runtime, tier and dtype that were decided for it, and why.
        stock_reasons: which blocks keep the stock forward, and why.

    A `FastUNet` shares nothing with the UNet that it was made from. Until the copy is cast, its `dtype` is that UNet's.
    Arguments are cast to the dtype of the weights (`compute_dtype`), and the output has the dtype of `sample`.

    Keys and values of the context are computed again when `encoder_hidden_states` is another tensor, or was written to.
    Values derived from weights, processors and adapters are derived again when these were moved, exchanged, set or
    written to. On a GPU, writing through ``.data`` leaves no trace: call `refresh` afterwards. Adapters of PEFT become
    part of the fused blocks' weights. With gradients enabled, all blocks are stock. Several threads may call one
    `FastUNet`, each with its own context, as long as the UNet does not change meanwhile.
    """

    decision: Decision
    stock_reasons: list[str]
    _unwatched = ("_declined",)

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> UNet2DConditionModel:
        """Returns a stock UNet: a checkpoint does not say how the UNet runs."""
        return UNet2DConditionModel.from_pretrained(*args, **kwargs)

    @classmethod
    def of(
        cls, unet: UNet2DConditionModel, decision: Decision, device: torch.device, layout: torch.memory_format
    ) -> "FastUNet":
        """A copy of `unet` on `device`, in `layout`, that runs as decided. See `gbci_fast.accelerate`."""
        twin = nn.Module.to(copy.deepcopy(unet), device, decision.dtype, memory_format=layout)
        twin.__class__ = cls
        vars(twin).pop("forward", None)  # the stock forward, which removed hooks left in the instance
        twin.decision, twin._declined, twin._called_in, twin._derived = decision, {}, unet.dtype, _Derived()
        twin._projected = LastValue(functools.partial(_project, twin))
        twin._context = LastValue(functools.partial(_cast, twin))
        twin.refresh()
        return twin

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of arguments and output, as a pipeline sees it."""
        return self._called_in

    @property
    def compute_dtype(self) -> torch.dtype:
        """The dtype of the weights."""
        return self.conv_in.weight.dtype

    def _apply(self, fn: Callable[[Tensor], Tensor], *args: Any, **kwargs: Any) -> nn.Module:
        self._called_in = fn(torch.empty(0, dtype=self._called_in)).dtype  # a cast changes the call dtype
        return super()._apply(fn, *args, **kwargs)

    @property
    def num_fused(self) -> int:
        """Number of fused blocks."""
        return sum(_is_fused(part) for part in self.modules())

    @functools.wraps(UNet2DConditionModel.forward)
    def forward(self, sample: Tensor, timestep: Tensor | float, *args: Any, **kwargs: Any) -> Any:
        scale = (kwargs.get("cross_attention_kwargs") or {}).get("scale", 1.0)  # of adapters
        if not torch.compiler.is_compiling() and self._derived.outdated(scale):
            with _REFRESHING:  # several threads may make the first call
                if self._derived.outdated(scale):
                    self.refresh(scale)
        given = sample.dtype
        if given == self.compute_dtype or torch.is_autocast_enabled(sample.device.type):
            return self._run(sample, timestep, *args, **kwargs)
        args = [self._in_compute_dtype(name, value) for name, value in zip(_ARGUMENTS, args, strict=False)]
        kwargs = {name: self._in_compute_dtype(name, value) for name, value in kwargs.items()}
        output = self._run(sample.to(self.compute_dtype), timestep, *args, **kwargs)
        if isinstance(output, tuple):
            return (output[0].to(given), *output[1:])
        output.sample = output.sample.to(given)
        return output

    def _run(self, sample: Tensor, timestep: Tensor | float, *args: Any, **kwargs: Any) -> Any:
        if self._compiled is None:
            return super().forward(sample, timestep, *args, **kwargs)
        if not isinstance(timestep, Tensor):  # a number would be a constant of the graph
            dtype = torch.float64 if isinstance(timestep, float) else torch.int64
            timestep = torch.tensor(timestep, dtype=dtype, device=sample.device)
        return self._compiled(self, sample, timestep, *args, **kwargs)

    def _in_compute_dtype(self, name: str, value: Any) -> Any:
        """An argument of `forward` in the dtype of the weights. Numbers that are embedded stay, to be cast later."""
        if name == "class_labels" and self.config.class_embed_type == "timestep":
            return value
        if name == "encoder_hidden_states" and isinstance(value, Tensor):
            return self._context(value)  # the same result for the same tensor, see `LastValue`
        if name == "added_cond_kwargs" and value is not None:
            return {
                key: part if key == "time_ids" else self._in_compute_dtype(key, part) for key, part in value.items()
            }
        return tree_map_only(Tensor, functools.partial(_cast, self), value)

    @torch.no_grad()
    def refresh(self, scale: float = 1.0) -> None:
        """Examines all blocks again, and renews the values derived from their weights.

        Args:
            scale: of adapters, as in ``cross_attention_kwargs={"scale": ...}`` of the calls that follow.
        """
        parts, reasons = [], []
        for name, part in self.named_modules():
            to_stock(part)
            if type(part) in BLOCKS or isinstance(part, FastBlock):
                parts.append((name, part))
        if self.decision.runtime != "eager":
            for name, part in parts:
                with without_autocast(self.device):  # derived values outlive the call's autocast
                    plain = merged(part, scale)
                    against = ["it has hooks"] if isinstance(part, FastBlock) else unsupported(plain)
                    if against:
                        reasons.append(f"{name}: {'; '.join(against)}")
                    else:
                        to_fast(part, plain, self._declined)
            reasons += _unknown(self)
        self.stock_reasons = reasons
        self._compiled = None
        if self.decision.runtime == "compile":
            self._compiled = compiled(UNet2DConditionModel.forward, self.device, fullgraph=not reasons)
        self._projected.last = self._context.last = None
        self._derived.watch, self._derived.scale = Watch(self), scale

    def describe(self) -> str:
        """What runs here, and why a faster option does not; one line each."""
        lines = [str(replace(self.decision, dtype=self.compute_dtype))]
        for kind in BLOCKS:
            parts = [part for part in self.modules() if isinstance(part, kind)]
            lines.append(f"{sum(map(_is_fused, parts))} of {len(parts)} {kind.__name__} fused")
        if self._compiled is not None:
            lines.append("keys and values of the context are computed in every call, within the graph")
        if self.device.type == "cuda":
            lines += cross_attention_notes(self, self.compute_dtype)
        lines += adapter_notes(self)
        return "\n".join([*lines, *(f"stock {reason}" for reason in self.stock_reasons), *self._declined])

    def process_encoder_hidden_states(self, encoder_hidden_states: Any, added_cond_kwargs: Any) -> Any:
        """As in the stock UNet. A projection that depends only on the context is computed once per context."""
        if self.config.encoder_hid_dim_type != "text_proj":
            return super().process_encoder_hidden_states(encoder_hidden_states, added_cond_kwargs)
        return self._projected(encoder_hidden_states)

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> None:
        """Saves the weights, in `compute_dtype`, as a stock `UNet2DConditionModel`."""
        twin = copy.copy(self)
        twin.__class__ = UNet2DConditionModel
        twin.save_pretrained(save_directory, **kwargs)
