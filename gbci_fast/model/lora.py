"""LoRA adapters of a pipeline's UNet, loaded and set by the methods that the pipelines of diffusers have."""

import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from diffusers import UNet2DConditionModel
from diffusers.loaders import StableDiffusionLoraLoaderMixin
from diffusers.loaders.lora_base import LoraBaseMixin
from diffusers.utils import USE_PEFT_BACKEND, convert_unet_state_dict_to_peft
from torch import Tensor, nn

from gbci_fast.errors import GBCIError

SUFFIX = ".safetensors"
OPTIONS = (
    "weight_name", "subfolder", "revision", "cache_dir", "token", "force_download", "local_files_only", "proxies",
    "unet_config", "use_safetensors",
)  # fmt: skip


def is_adapter(module: nn.Module) -> bool:
    """Whether a module is a stock layer with adapters beside it. Without PEFT loaded there is none."""
    tuners = sys.modules.get("peft.tuners.tuners_utils")
    return tuners is not None and isinstance(module, tuners.BaseTunerLayer)


class UNetLoRALoader(LoraBaseMixin):
    """`load_lora_weights` for a pipeline with a `unet` and no text encoder.

    As in diffusers: `set_adapters`, `enable_lora`, `disable_lora`, `delete_adapters`, `get_active_adapters`,
    `get_list_adapters`, `fuse_lora`, `unfuse_lora`, `unload_lora_weights`.
    """

    _lora_loadable_modules = ("unet",)
    unet_name = "unet"
    unet: UNet2DConditionModel

    def load_lora_weights(
        self,
        pretrained_model_name_or_path_or_dict: str | Path | dict[str, Tensor],
        adapter_name: str | None = None,
        **kwargs: Any,
    ) -> None:
        """Adds an adapter to the UNet and makes it the active one.

        Args:
            pretrained_model_name_or_path_or_dict: a ``.safetensors`` file, a folder with one, the name of a repository,
                or the tensors; in the format of diffusers, PEFT or kohya.
            adapter_name: to call it by; by default "default_0", "default_1" and so on.
            kwargs: any of `OPTIONS`, as of diffusers; `use_safetensors` can only be true.

        Raises:
            GBCIError: PEFT or transformers are not installed; an option is unknown; the file is no safetensors file, or
                not readable; it changes layers that this UNet lacks or has in another shape, or a text encoder; the
                name is taken. The UNet is as it was then.
        """
        if not USE_PEFT_BACKEND:
            raise GBCIError("load_lora_weights needs peft and transformers: pip install 'gbci_fast[lora]'")
        if unknown := [name for name in kwargs if name not in OPTIONS]:
            raise GBCIError(f"load_lora_weights has no option {unknown[0]!r}; expected any of {', '.join(OPTIONS)}")
        if kwargs.get("use_safetensors") is False:
            raise GBCIError(f"use_safetensors is False; expected True, as files other than {SUFFIX} can run code")
        given = pretrained_model_name_or_path_or_dict
        source = "the LoRA" if isinstance(given, dict) else str(given)
        tensors, alphas, metadata = _read(given, source, kwargs)
        _check(self.unet, tensors, source)
        before = set(getattr(self.unet, "peft_config", {}))
        if adapter_name in before:
            raise GBCIError(f"adapter_name is {adapter_name!r}, which the UNet already has; expected another name")
        active = {part: list(part.active_adapters) for part in self.unet.modules() if is_adapter(part)}
        try:
            self.unet.load_lora_adapter(
                tensors,
                prefix="unet",
                network_alphas=alphas,
                adapter_name=adapter_name,
                metadata=metadata,
                _pipeline=self,
            )
            _check_scales(self.unet)
        except Exception as error:  # of PEFT, which takes patterns, ranks and alphas from the file as they are
            _take_back(self.unet, before, active)
            raise GBCIError(f"{source} cannot be loaded: {' '.join(str(error).split())}") from error
        self.unet.train(self.unet.training)  # new layers too, of which some drop out in training

    def fuse_lora(
        self,
        components: Sequence[str] = ("unet",),
        lora_scale: float = 1.0,
        safe_fusing: bool = False,
        adapter_names: list[str] | None = None,
    ) -> None:
        """Adds the adapters to the UNet's weights: all active ones, or those that are named, times a scale."""
        super().fuse_lora(list(components), lora_scale, safe_fusing, adapter_names)

    def unfuse_lora(self, components: Sequence[str] = ("unet",)) -> None:
        """Takes the adapters out of the UNet's weights again."""
        super().unfuse_lora(list(components))

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> None:
        """Saves the pipeline.

        Raises:
            GBCIError: the UNet has adapters, or layers made for some that were deleted since: its layers have other
                names then, and loading would not find them.
        """
        if names := ", ".join(getattr(self.unet, "peft_config", {})):
            way = "fuse_lora() and unload_lora_weights() before, or unet.save_lora_adapter() for the adapter alone"
            raise GBCIError(f"the UNet has adapters ({names}), which a checkpoint does not hold; expected {way}")
        if any(map(is_adapter, self.unet.modules())):
            reason = "the UNet's layers are still those of adapters that were deleted"
            raise GBCIError(f"{reason}, which a checkpoint does not hold; expected unload_lora_weights() before")
        super().save_pretrained(save_directory, **kwargs)


def _check_scales(unet: UNet2DConditionModel) -> None:
    """Raises GBCIError: an adapter's alpha is no finite number."""
    for layer, part in unet.named_modules():
        if is_adapter(part):
            for name, scale in getattr(part, "scaling", {}).items():
                if not math.isfinite(scale):
                    raise GBCIError(f"{layer} has the scale {scale} for adapter {name}; expected a finite one")


def _take_back(unet: UNet2DConditionModel, before: set[str], active: dict[Any, list[str]]) -> None:
    """Undoes a load that failed at any point.

    Args:
        unet: perhaps with some of the new adapter's layers.
        before: the adapters that it had.
        active: those in use, of each layer with adapters.
    """
    if not active:
        unet.unload_lora()
        return
    for part in filter(is_adapter, unet.modules()):
        held = (*part.adapter_layer_names, *part.other_param_names)
        for name in {name for attribute in held for name in getattr(part, attribute)} - before:
            part.delete_adapter(name)
        part.set_adapter(active.get(part, []))
    for name in set(getattr(unet, "peft_config", {})) - before:
        del unet.peft_config[name]


def _read(
    given: str | Path | dict[str, Tensor], source: str, kwargs: dict[str, Any]
) -> tuple[dict[str, Tensor], dict[str, float] | None, dict[str, Any] | None]:
    """Tensors whose names begin with "unet.", alphas and metadata, if the file has any."""
    if not isinstance(given, dict):
        names = [kwargs.get("weight_name"), str(given) if Path(given).is_file() else None]
        for name in filter(None, names):
            if not name.endswith(SUFFIX):
                raise GBCIError(f"{name} is no {SUFFIX} file; expected one, as other files can run code")
    try:
        tensors, alphas, metadata = StableDiffusionLoraLoaderMixin.lora_state_dict(
            dict(given) if isinstance(given, dict) else str(given),
            **{**kwargs, "use_safetensors": True, "return_lora_metadata": True},
        )
    except Exception as error:  # of the hub, of safetensors, of a format that is unknown
        raise GBCIError(f"{source} cannot be read as a LoRA: {error}") from error
    if not any(name.startswith(("unet.", "text_encoder")) for name in tensors):
        tensors = {f"unet.{name}": tensor for name, tensor in tensors.items()}  # as `unet.save_lora_adapter` writes it
        metadata = None if metadata is None else {f"unet.{name}": value for name, value in metadata.items()}
    return tensors, alphas, metadata


def _check(unet: UNet2DConditionModel, tensors: dict[str, Tensor], source: str) -> None:
    """Raises GBCIError: the tensors are not those of an adapter for this UNet."""
    if not tensors:
        raise GBCIError(f"{source} has no tensors; expected those of a LoRA")
    for name in tensors:
        if not name.startswith("unet."):
            raise GBCIError(f"{source} changes {name}; expected changes of the UNet alone, as there is no text encoder")
    if any(".lokr_" in name for name in tensors):
        return  # another kind, which its own loader checks
    tensors = {name.removeprefix("unet."): tensor for name, tensor in tensors.items()}
    if not all(".lora_A." in name or ".lora_B." in name for name in tensors):
        tensors = convert_unet_state_dict_to_peft(tensors)
    for name, tensor in tensors.items():
        layer, _, part = name.rpartition(".lora_")
        if not layer:
            raise GBCIError(f"{source} has {name}; expected tensors of a LoRA, such as conv_in.lora_A.weight")
        try:
            weight = unet.get_submodule(layer).weight
        except AttributeError:
            raise GBCIError(f"{source} changes {layer}, which this UNet lacks") from None
        if not tensor.isfinite().all():
            raise GBCIError(f"{source} has {name} with values that are not finite; expected finite ones")
        if part in ("A.weight", "B.weight"):
            down, up = (tensors.get(f"{layer}.lora_{letter}.weight") for letter in "AB")
            if down is None or up is None or not _fit(down, up, weight):
                shapes = [None if factor is None else list(factor.shape) for factor in (down, up)]
                raise GBCIError(f"{source} changes {layer} by {shapes}; it is {list(weight.shape)} in this UNet")


def _fit(down: Tensor, up: Tensor, weight: Tensor) -> bool:
    """Whether [rank, columns, ...] and [rows, rank, ...] are factors of a layer's weight."""
    ranks = down.ndim == up.ndim == weight.ndim and len(down) == up.shape[1] > 0
    return ranks and (len(up), down.shape[1:]) == (len(weight), weight.shape[1:])
