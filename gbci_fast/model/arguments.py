"""The arguments of a pipeline's call: a wrong one is one sentence, not a traceback from deep inside torch."""

from collections.abc import Mapping, Sequence
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

from gbci_fast.attributes import Attributes
from gbci_fast.errors import GBCIError

MAX_SIDE = 8192  # pixels that an image may be resized to


def check_argument_types(given: Mapping[str, Any]) -> None:
    """Looks at those of ``GBCIPipeline.__call__`` that are not images or attributes, by name.

    Raises:
        GBCIError: names the first that cannot be, its value, and what was expected.
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


def described(attributes: Attributes | Mapping | Sequence | None) -> list[Attributes]:
    """One `Attributes` per description; what is unknown says so."""
    items = attributes if isinstance(attributes, list | tuple) else [attributes]
    out = []
    for item in items:
        if item is None:
            item = Attributes()
        out.append(item if isinstance(item, Attributes) else Attributes.from_mapping(item))
    return out


def broadcast_size(inputs: Mapping[str, Tensor | Sequence | None]) -> int:
    """The common length of `inputs`; GBCIError where one is neither 1 nor that."""
    sizes = {name: len(part) for name, part in inputs.items() if part is not None}
    largest = max(sizes.values())
    for name, size in sizes.items():
        if size not in (1, largest):
            raise GBCIError(f"{name} has {size} entries; expected 1 or {largest}")
    return largest


def broadcast(part: Tensor | Sequence | None, size: int, device: torch.device) -> Any:
    """`part` on `device`, its one entry or all of them, `size` entries in all."""
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
