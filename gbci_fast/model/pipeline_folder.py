"""Checks of a pipeline folder: its files before loading, and the loaded components afterwards, by a trial run."""

import copy
import importlib
import inspect
import json
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import diffusers
import huggingface_hub
import torch
from diffusers import SchedulerMixin
from diffusers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFETENSORS_WEIGHTS_NAME, _add_variant
from safetensors import safe_open

from gbci_fast.errors import GBCIError

if TYPE_CHECKING:
    from gbci_fast.model.pipeline import GBCIPipeline

REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")
FILES = ["*.json", "*.safetensors"]  # the files to download from a repository
HUB = ("revision", "token", "cache_dir", "local_files_only", "force_download")  # options of the download
INDEX = "model_index.json"
PIPELINE = "GBCIPipeline"
# The module names are part of the format, wherever the classes are defined. A scheduler may be any of diffusers'.
CLASSES = {
    "vae": ("diffusers", "AutoencoderKL"),
    "unet": ("diffusers", "UNet2DConditionModel"),
    "conditioner": ("gbci_fast.conditioning", "ConditionEncoder"),
    "few_step": ("gbci_fast.few_step", "FewStepLoRA"),
}
OPTIONAL = ("few_step",)
SCHEDULER = "scheduler"
CODE = ("auto_map", "custom_pipeline", "custom_pipelines", "quantization_config")  # keys that name code to import
LATER = ("attributes",)  # keys of configs that older checkpoints lack; the default says what those are
LARGEST = 2**16  # limit of sizes in a config: a component is built before other checks can find the damage
FLOATS = ("F64", "F32", "F16", "BF16")
TRIAL_STEPS = 4  # every scheduler supports these, unless its limit is as low: then one step
LIMITS = ("num_train_timesteps", "original_inference_steps")  # config keys that limit a scheduler's steps


def refusal(folder: str | Path, reason: object) -> GBCIError:
    """The error for every damaged or foreign folder."""
    return GBCIError(f"{folder} cannot be loaded as a pipeline: {' '.join(str(reason).split())}")


def load_checked(
    kind: "type[GBCIPipeline]", source: str | Path, load: "Callable[..., GBCIPipeline]", options: Mapping[str, Any]
) -> "GBCIPipeline":
    """Loads a pipeline with all checks; the implementation of ``GBCIPipeline.from_pretrained``.

    Args:
        kind: class of the pipeline.
        source: a folder, or a repository on the Hugging Face Hub.
        load: ``DiffusionPipeline.from_pretrained``.
        options: keyword arguments of `load`.

    Raises:
        GBCIError: a `custom_pipeline` is given, the source cannot be loaded, or `check_folder` or `check_loaded` fails.
    """
    if options.get("custom_pipeline") is not None:
        raise GBCIError(f"custom_pipeline is {options['custom_pipeline']!r}; a {PIPELINE} runs no other's code")
    given = [name for name in options if name in (*CLASSES, SCHEDULER)]
    try:
        folder = Path(source)
        if not folder.is_dir() and isinstance(source, str) and REPOSITORY.fullmatch(source):
            # diffusers' own `download` would import classes that an index names before the index can be checked.
            hub = {name: options[name] for name in HUB if name in options}
            folder = Path(huggingface_hub.snapshot_download(source, allow_patterns=FILES, **hub))
        check_folder(folder, given, kind.__name__)
        pipe = load(folder, **options)
    except GBCIError:
        raise
    except Exception as error:  # diffusers, safetensors and torch raise a dozen types for a damaged folder
        raise refusal(source, error) from error
    # Weights that are mapped from a file may be unaligned in memory, and matrix products then round differently. Copies
    # are aligned, so that the same weights give the same bits, however they were stored.
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            for parameter in part.parameters():
                parameter.data = parameter.data.clone()
    check_loaded(pipe, folder, given, options.get("variant"))
    return pipe


def check_folder(folder: Path, given: Collection[str] = (), kind: str = PIPELINE) -> None:
    """Checks index and configs without importing anything that they name.

    Args:
        folder: written by ``save_pretrained``.
        given: components that are not loaded from the folder.
        kind: name of the pipeline's class, which the index may have instead of `PIPELINE`.

    Raises:
        GBCIError: the index names another pipeline, an unknown component, or a class that is neither this package's nor
            diffusers'; a config names code, has wrong values or is not a JSON object; the folder holds code.
    """
    if not folder.is_dir():
        raise refusal(folder, "it is not a folder")
    index = _read_json(folder, Path(INDEX))
    if index.get("_class_name") not in (PIPELINE, kind):
        raise refusal(folder, f"{INDEX} names the pipeline {index.get('_class_name')!r}; expected {PIPELINE!r}")
    _check_keys(folder, INDEX, index)
    for name, value in index.items():
        if not name.startswith("_") and name not in given:
            _check_class(folder, name, value)
    for name in (*CLASSES, SCHEDULER):
        if name in given or (name in OPTIONAL and index.get(name) in (None, [None, None])):
            continue
        if name not in index:
            raise refusal(folder, f"{INDEX} names no {name}")
        config = Path(name, "scheduler_config.json" if name == SCHEDULER else "config.json")
        values = _read_json(folder, config)
        _check_keys(folder, config, values, sizes=int if name == SCHEDULER else (int, float))
        part = values.get("_class_name", index[name][1])
        if name != SCHEDULER and part != index[name][1]:
            raise refusal(folder, f"{config} is of a {part!r}; expected {index[name][1]!r}")
        _check_values(folder, config, values, _class_of(name, index[name][1]))
        for code in sorted((folder / name).glob("*.py")):
            raise refusal(folder, f"{code.relative_to(folder)} is code; expected weights and configs alone")


def check_loaded(pipe: "GBCIPipeline", folder: Path, given: Collection[str] = (), variant: str | None = None) -> None:
    """Compares the loaded weights with the files, and runs the pipeline once on an image of the smallest size.

    diffusers only warns of missing weights and leaves them random.

    Args:
        pipe: loaded from `folder`.
        folder, given: as for `check_folder`.
        variant: of the weights' file names, such as "fp16"; None = no variant.

    Raises:
        GBCIError: a tensor is missing, unknown, of an integer type or not finite; the components do not fit together.
    """
    for name, part in pipe.components.items():
        if isinstance(part, torch.nn.Module) and name not in given:
            _check_tensors(folder, name, set(part.state_dict()), variant)
            for tensor, values in part.state_dict().items():
                if not values.isfinite().all():
                    raise refusal(folder, f"{tensor} of {name} holds NaN or infinity")
    if any(part is None for name, part in pipe.components.items() if name not in OPTIONAL):
        return  # the caller passed None for a component
    try:
        image = _trial(pipe)
    except Exception as error:  # wrong values in a config raise many types
        raise refusal(folder, f"its parts do not run together, {type(error).__name__}: {error}") from error
    if not image.isfinite().all():
        raise refusal(folder, "its images are NaN or infinite")


def _trial(pipe: "GBCIPipeline") -> torch.Tensor:
    trial = type(pipe)(**{**pipe.components, "scheduler": copy.deepcopy(pipe.scheduler)})
    trial.set_progress_bar_config(disable=True)
    side = trial.stride
    mask = torch.zeros(1, 1, side, side)
    mask[..., : side // 2] = 1
    generator = torch.Generator().manual_seed(0)
    report = None if pipe.conditioner.config.report_width is not None else "mass"
    limits = [trial.scheduler.config.get(name) for name in LIMITS]
    steps = TRIAL_STEPS if all(limit is None or limit > TRIAL_STEPS for limit in limits) else 1
    options = {"num_inference_steps": steps, "generator": generator, "report": report, "output_type": "pt"}
    return trial(torch.full_like(mask, 0.5), mask, paste_back=False, **options).images


def _read_json(folder: Path, name: Path) -> dict[str, Any]:
    try:
        values = json.loads((folder / name).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise refusal(folder, f"it has no {name}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise refusal(folder, f"{name} cannot be read: {error}") from error
    if not isinstance(values, dict):
        raise refusal(folder, f"{name} holds a {type(values).__name__}; expected an object")
    return values


def _check_keys(
    folder: Path, name: object, values: Mapping[str, Any], sizes: type | tuple[type, ...] = (int, float)
) -> None:
    """Checks that no key names code, and that no value of the types `sizes` exceeds `LARGEST`.

    Schedulers' floats are not checked, since some are infinite by design.
    """
    for key, value in _entries(values):
        if key in CODE:
            raise refusal(folder, f"{name} has {key!r}, which names code to import")
        if isinstance(value, sizes) and not abs(value) <= LARGEST:
            raise refusal(folder, f"{name} has {key} {value}; expected at most {LARGEST}")


def _entries(values: object, key: str = "") -> Iterator[tuple[str, object]]:
    """Yields every key and value at any depth; the entries of a list have the list's key."""
    yield key, values
    if isinstance(values, Mapping):
        for name, value in values.items():
            yield from _entries(value, str(name))
    elif isinstance(values, list):
        for value in values:
            yield from _entries(value, key)


def _check_class(folder: Path, name: str, value: object) -> None:
    if name not in CLASSES and name != SCHEDULER:
        raise refusal(folder, f"{INDEX} names the component {name!r}; expected {', '.join([*CLASSES, SCHEDULER])}")
    if name in OPTIONAL and value in (None, [None, None]):
        return
    pair = isinstance(value, list) and len(value) == 2 and all(isinstance(part, str) for part in value)
    if name == SCHEDULER:
        kind = getattr(diffusers, value[1], None) if pair and value[0] == "diffusers" else None
        valid, expected = isinstance(kind, type) and issubclass(kind, SchedulerMixin), "a scheduler of diffusers"
    else:
        valid, expected = pair and tuple(value) == CLASSES[name], ".".join(CLASSES[name])
    if not valid:
        shown = ".".join(value) if pair else repr(value)
        raise refusal(folder, f"{INDEX} names {shown} as {name}; expected {expected}")


def _class_of(name: str, kind: str) -> type:
    """A component's class; `_check_class` has accepted it."""
    return getattr(diffusers if name == SCHEDULER else importlib.import_module(CLASSES[name][0]), kind)


def _check_values(folder: Path, name: Path, values: Mapping[str, Any], kind: type) -> None:
    """Checks that a config's values have the types of the class's defaults, and that no key is missing.

    Keys may be missing where another version of diffusers wrote the config.
    """
    whole = values.get("_diffusers_version", diffusers.__version__) == diffusers.__version__
    for key, parameter in inspect.signature(kind).parameters.items():
        if parameter.kind != parameter.POSITIONAL_OR_KEYWORD:
            continue
        if key not in values and whole and key not in LATER:  # the default may not be this model's value
            raise refusal(folder, f"{name} lacks {key!r}")
        value = values.get(key, parameter.default)
        for one in value if isinstance(value, list | tuple) else [value]:
            if not _is_like(one, parameter.default):
                raise refusal(folder, f"{name} has {key} {value!r}; expected a value like {parameter.default!r}")


def _is_like(value: object, default: object) -> bool:
    """Whether a config's value has the type of the default."""
    if isinstance(default, bool):
        return isinstance(value, bool)
    if isinstance(default, int | float):
        return isinstance(value, int | float | None) and not isinstance(value, bool)
    return True


def _check_tensors(folder: Path, name: str, known: set[str], variant: str | None) -> None:
    """Checks that a component's safetensors files hold floats of exactly the names `known`.

    A component without safetensors files passes: it may have files of another format.
    """
    whole = _add_variant(SAFETENSORS_WEIGHTS_NAME, variant)
    index = folder / name / _add_variant(SAFE_WEIGHTS_INDEX_NAME, variant)
    files = [whole] if (folder / name / whole).is_file() else []
    if index.is_file():
        files = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    found = set()
    for path in (folder / name / file for file in files):
        with safe_open(path, "pt") as file:
            for tensor in file.keys():  # noqa: SIM118  not iterable before safetensors 0.5
                dtype = file.get_slice(tensor).get_dtype()
                if dtype not in FLOATS:
                    raise refusal(folder, f"{name}/{path.name} holds {tensor} as {dtype}; expected {', '.join(FLOATS)}")
                found.add(tensor)
    if not files and not index.is_file():
        return
    for tensors, what in ((known - found, "lacks"), (found - known, "holds the unknown")):
        if tensors:
            raise refusal(folder, f"{name} {what} {min(tensors)} (and {len(tensors) - 1} more of its {len(known)})")
