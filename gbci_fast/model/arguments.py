"""The arguments of a pipeline's call: checked, read and broadcast to one batch.

A wrong argument is one sentence, and no traceback from deep inside torch.
"""

import inspect
import math
import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import LCMScheduler, SchedulerMixin
from torch import Tensor

from gbci_fast.attributes import Attributes
from gbci_fast.errors import GBCIError, InputWarning
from gbci_fast.model.images import ImageInput, to_mask, to_tensor

OUTPUT_TYPES = ("pil", "np", "pt", "latent")
MAX_SIDE = 8192  # pixels that an image may be resized to


def check_argument_types(given: Mapping[str, Any]) -> None:
    """Checks the types of the arguments of ``GBCIPipeline.__call__`` that are neither images nor attributes, by name.

    Raises:
        GBCIError: names the first argument of a wrong type, its value, and what was expected.
    """
    for name in ("num_inference_steps", "num_images_per_prompt"):
        _require(name, given[name], _is_whole(given[name]), "a whole number")
    for name in ("height", "width"):
        value = given[name]
        valid = value is None or (_is_whole(value) and value <= MAX_SIDE)
        _require(name, value, valid, f"a whole number up to {MAX_SIDE}, or None")
    for name in ("strength", "guidance_scale", "eta"):
        _require(name, given[name], isinstance(given[name], Real) and not isinstance(given[name], bool), "a number")
    for name, axes in (("latents", 4), ("report_embeds", 3), ("report_mask", 2)):
        _check_tensor(name, given[name], axes)
    report, seed, generator = given["report"], given["seed"], given["generator"]
    _require("report", report, report is None or _is_list_of(object, report, or_one=str), "text, texts or None")
    _require("seed", seed, seed is None or _is_list_of(Integral, seed), "a whole number, one per image, or None")
    _require(
        "generator",
        generator,
        generator is None or (_is_list_of(torch.Generator, generator) and not isinstance(generator, tuple)),
        "a torch.Generator, a list of them, or None",
    )
    names = given["callback_on_step_end_tensor_inputs"]
    valid = _is_list_of(str, names) and not isinstance(names, str)
    _require("callback_on_step_end_tensor_inputs", names, valid, "a list of names")


def check_argument_ranges(given: Mapping[str, Any], callback_tensors: Collection[str]) -> None:
    """Checks the values of arguments of ``GBCIPipeline.__call__`` that have the right types, by name.

    Args:
        given: argument name -> value.
        callback_tensors: names that a callback may ask for.

    Raises:
        GBCIError: names the first argument that is out of range, its value, and what was expected.
    """
    expected: dict[str, tuple[bool, str]] = {
        "strength": (0 < given["strength"] <= 1, "more than 0 and at most 1"),
        "num_inference_steps": (given["num_inference_steps"] >= 1, "at least 1"),
        "num_images_per_prompt": (given["num_images_per_prompt"] >= 1, "at least 1"),
        "guidance_scale": (math.isfinite(given["guidance_scale"]), "a finite number"),
        "eta": (0 <= given["eta"] <= 1, "0 to 1"),
        "output_type": (given["output_type"] in OUTPUT_TYPES, f"one of {', '.join(OUTPUT_TYPES)}"),
    }
    for name, (valid, what) in expected.items():
        if not valid:
            raise GBCIError(f"{name} is {given[name]!r}; expected {what}")
    for name in given["callback_on_step_end_tensor_inputs"]:
        if name not in callback_tensors:
            raise GBCIError(f"callback_on_step_end_tensor_inputs has {name!r}; expected {', '.join(callback_tensors)}")


def read_images(
    image: ImageInput, mask_image: ImageInput, height: int | None, width: int | None, stride: int
) -> tuple[Tensor, Tensor, int]:
    """Image and mask as tensors of one size, resized to `height` x `width` where these are given.

    Args:
        image, mask_image: as in ``GBCIPipeline.__call__``.
        height, width: in pixels; None keeps the image's own.
        stride: pixels by which the sides must be divisible.

    Returns:
        pixels: [A, 1, H, W] in [0, 1].
        mask: [M, 1, H, W] of zeros and ones.
        depth: largest value of the image's integer type, 255 or 65535.

    Raises:
        GBCIError: an image or mask that cannot be read, sizes that differ, or a side that `stride` does not divide.
    """
    pixels, depth = to_tensor(image, "image")
    pixels, mask = _resized(pixels, to_mask(mask_image, "mask_image"), height, width)
    if pixels.shape[-2:] != mask.shape[-2:]:
        raise GBCIError(f"mask_image is {_size(mask)} but image is {_size(pixels)}; expected the same size")
    if pixels.shape[-1] % stride or pixels.shape[-2] % stride:
        raise GBCIError(f"image is {_size(pixels)}; expected sides divisible by {stride}")
    return pixels, mask, depth


@dataclass(frozen=True, kw_only=True)
class PipelineInputs:
    """Images and descriptions of one call, B of each.

    Attributes:
        pixels: [B, 1, H, W] in [0, 1].
        mask: [B, 1, H, W] of zeros and ones; 1 = synthesize.
        attributes, report: lists of B.
        report_embeds, report_mask: [B, M, W] and bool [B, M], or None.
    """

    pixels: Tensor
    mask: Tensor
    attributes: list[Attributes]
    report: list[str | None]
    report_embeds: Tensor | None
    report_mask: Tensor | None


def broadcast_inputs(
    pixels: Tensor,
    mask: Tensor,
    attributes: Attributes | Mapping[str, Any] | Sequence[Attributes | Mapping[str, Any] | None] | None,
    report: str | Sequence[str | None] | None,
    report_embeds: Tensor | None,
    report_mask: Tensor | None,
    device: torch.device,
) -> PipelineInputs:
    """Arguments of ``GBCIPipeline.__call__``, of which each has 1 or B entries, as B of each on `device`.

    Raises:
        GBCIError: an argument has another number of entries, or a description cannot be read.
    """
    given = {
        "image": pixels,
        "mask_image": mask,
        "attributes": as_attributes(attributes),
        "report": [report] if report is None or isinstance(report, str) else list(report),
        "report_embeds": report_embeds,
        "report_mask": report_mask,
    }
    sizes = {name: len(part) for name, part in given.items() if part is not None}
    largest = max(sizes.values())
    for name, size in sizes.items():
        if size not in (1, largest):
            raise GBCIError(f"{name} has {size} entries; expected 1 or {largest}")
    images = {"pixels": given.pop("image"), "mask": given.pop("mask_image")}
    return PipelineInputs(**{name: _broadcast(part, largest, device) for name, part in (images | given).items()})


def as_attributes(
    given: Attributes | Mapping[str, Any] | Sequence[Attributes | Mapping[str, Any] | None] | None,
) -> list[Attributes]:
    """One `Attributes` per description; None and absent fields are unknown.

    Raises:
        GBCIError: a mapping with a field or value that `Attributes` does not have.
    """
    out = []
    for item in given if isinstance(given, list | tuple) else [given]:
        if item is None:
            item = Attributes()
        out.append(item if isinstance(item, Attributes) else Attributes.from_mapping(item))
    return out


def warn_of_ignored(attributes: Sequence[Attributes], ignores: Sequence[str]) -> None:
    """Warns (`InputWarning`) if a description states attributes that the checkpoint does not know.

    Args:
        attributes: the descriptions of a call.
        ignores: names of the attributes that the checkpoint does not know.
    """
    told = [name for name in ignores if any(getattr(each, name) is not None for each in attributes)]
    if told:
        warnings.warn(f"this checkpoint does not know {', '.join(told)}, and ignores it", InputWarning, stacklevel=2)


def seeds_per_image(
    seed: int | Sequence[int] | None,
    generator: torch.Generator | list[torch.Generator] | None,
    total: int,
    scheduler: SchedulerMixin,
) -> list[int] | None:
    """One seed for each of `total` output images, or None where torch generators (or nobody) decide.

    Raises:
        GBCIError: seeds or generators of another number, both of them, or a seed for a scheduler that takes its noise
            from a torch generator alone.
    """
    if isinstance(generator, list) and len(generator) != total:
        raise GBCIError(f"generator has {len(generator)} entries; expected one per output image, {total}")
    if seed is None:
        return None
    if generator is not None:
        raise GBCIError("generator and seed were both given; expected one of them")
    accepted = inspect.signature(scheduler.step).parameters
    # With `s_churn`, which stays 0 here, a scheduler is deterministic.
    takes_noise = {"variance_noise", "s_churn"} & set(accepted) or isinstance(scheduler, LCMScheduler)
    if "generator" in accepted and not takes_noise:
        name = type(scheduler).__name__
        raise GBCIError(f"{name} takes its noise from a torch generator alone; pass generator instead of seed")
    if not isinstance(seed, Sequence):
        return [int(seed) + i for i in range(total)]  # in Python's integers: NumPy's wrap around
    if len(seed) != total:
        raise GBCIError(f"seed has {len(seed)} entries; expected one per output image, {total}")
    return [int(one) for one in seed]


def _resized(pixels: Tensor, mask: Tensor, height: int | None, width: int | None) -> tuple[Tensor, Tensor]:
    size = tuple(pixels.shape[-2:][i] if side is None else side for i, side in enumerate((height, width)))
    if min(size) < 1:
        raise GBCIError(f"height and width are {size[0]} and {size[1]}; expected at least 1")
    if size != pixels.shape[-2:]:
        pixels = F.interpolate(pixels, size, mode="bilinear", antialias=True)
    if size != mask.shape[-2:] and (height or width):
        mask = F.interpolate(mask, size, mode="nearest")
    return pixels, mask


def _size(tensor: Tensor) -> str:
    return f"{tensor.shape[-1]}x{tensor.shape[-2]}"


def _broadcast(part: Tensor | Sequence | None, size: int, device: torch.device) -> Any:
    """`part` with `size` entries: its one entry repeated, or all of them. Tensors go to `device`."""
    if part is None:
        return None
    if isinstance(part, Tensor):
        return part.to(device).expand(size, *part.shape[1:])
    return list(part) * (size // len(part))


def _check_tensor(name: str, value: Any, axes: int) -> None:
    _require(name, value, value is None or isinstance(value, Tensor), "a tensor or None")
    if value is None:
        return
    if value.ndim != axes or len(value) == 0:
        raise GBCIError(f"{name} has shape {list(value.shape)}; expected {axes} axes and at least one entry")
    if not value.isfinite().all():
        raise GBCIError(f"{name} holds NaN or infinity; expected finite values")


def _is_whole(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _is_list_of(kind: type, value: Any, or_one: type | None = None) -> bool:
    """One of `or_one` (`kind` by default), or a sequence of `kind`; a truth value is no number."""
    items = value if isinstance(value, Sequence) and not isinstance(value, str | bytes) else None
    if items is None:
        return isinstance(value, or_one or kind) and not isinstance(value, bool)
    return all(isinstance(item, kind) and not isinstance(item, bool) for item in items)


def _require(name: str, value: Any, valid: bool, expected: str) -> None:
    if not valid:
        shown = repr(value) if isinstance(value, str | Real | list | dict | None) else f"a {type(value).__name__}"
        raise GBCIError(f"{name} is {shown if len(shown) < 100 else shown[:100] + ' ...'}; expected {expected}")
