"""What runs on this machine, and why the rest does not: the facts that `gbci-fast doctor` prints.

The facts come from trials, not from a table. Operators are found in their package and looked up in PyTorch's
dispatcher. Runtimes, tiers and dtypes are tried on the packaged checkpoint with `accelerate`; its error sentences are
the reasons.
"""

import importlib
import importlib.metadata
import importlib.util
import os
import pkgutil
import platform
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from types import ModuleType
from typing import TYPE_CHECKING, Any

from gbci_fast import __version__
from gbci_fast.choices import RUNTIMES, TIERS
from gbci_fast.errors import GBCIError, one_line

if TYPE_CHECKING:
    from gbci_fast.fast.tensorrt.flavor import Flavor
    from gbci_fast.model.pipeline import GBCIPipeline

PACKAGES = ("torch", "diffusers", "accelerate", "triton", "xformers", "onnx", "onnxruntime", "numpy", "pydicom")
DTYPE_NAMES = ("float32", "bfloat16", "float16")


@dataclass(kw_only=True)
class Usability:
    """Whether an operator, runtime or tier can be used on a device. `reasons` says why not; empty if it can."""

    name: str
    device: str
    reasons: list[str] = field(default_factory=list)

    @property
    def usable(self) -> bool:
        """Whether there is no reason against it."""
        return not self.reasons


@dataclass(kw_only=True)
class Report:
    """What `examine` found.

    Attributes:
        versions: version of each package; None if it is not installed.
        cpu: architecture, cores, threads, instruction sets, and whether its bfloat16 units are worth using.
        gpus: name, compute capability and memory in GiB of each GPU.
        no_gpu: why PyTorch finds no GPU; empty if it finds one.
        checkpoint: why the eager pipeline cannot load and sample the packaged checkpoint; empty if it can.
        choice: what `accelerate` decides for the packaged checkpoint by default, with its notes; or why it fails.
        ops, runtimes, tiers: each once per device. A flavor of TensorRT has a name such as "tensorrt, tensorrt-rtx", a
            tier a name such as "tolerance, bfloat16".
    """

    versions: dict[str, str | None]
    cpu: dict[str, Any]
    gpus: list[dict[str, Any]]
    no_gpu: list[str]
    checkpoint: list[str]
    choice: list[str]
    ops: list[Usability]
    runtimes: list[Usability]
    tiers: list[Usability]

    @property
    def eager_works(self) -> bool:
        """Whether the eager pipeline loads and samples. Everything else is only needed for speed."""
        return not self.checkpoint

    def to_json(self) -> dict[str, Any]:
        """As JSON values."""
        values = asdict(self)
        for kind in ("ops", "runtimes", "tiers"):
            values[kind] = [{**usability, "usable": not usability["reasons"]} for usability in values[kind]]
        return {**values, "eager_works": self.eager_works}


def examine() -> Report:
    """Examines this machine. It takes some seconds, most of them for imports.

    Raises:
        GBCIError: torch is not installed. Any other missing package is reported.
    """
    if _version("torch") is None:
        raise GBCIError("torch is not installed: pip install torch")
    no_gpu, gpus, pipe, choice = _try(_require_gpu), [], [], []
    if not no_gpu:
        gpus = _gpus()
    checkpoint = _try(lambda: pipe.append(_load()))
    devices = {"cpu": [], "cuda": no_gpu}
    if not checkpoint:
        problems = _try(lambda: choice.extend(_choice(pipe[0], "cpu" if no_gpu else "cuda")))
        choice = problems or choice
    return Report(
        versions={
            "gbci_fast": __version__,
            "python": platform.python_version(),
            **{package: _version(package) for package in PACKAGES},
            **{name: _flavor_version(flavor) for name, flavor in _flavors().items()},
        },
        cpu=_cpu(),
        gpus=gpus,
        no_gpu=no_gpu,
        checkpoint=checkpoint,
        choice=choice or ["nothing: the packaged checkpoint does not load"],
        ops=[one for name in _ops() for d, no in devices.items() for one in _op_usability(name, d, no)],
        runtimes=[
            Usability(name=name, device=d, reasons=no or checkpoint or _accelerates(pipe[0], runtime=name, device=d))
            for name in RUNTIMES
            if name != "auto"
            for d, no in devices.items()
        ]
        + _flavor_usability(devices),
        tiers=[
            Usability(
                name=f"{tier}, {dtype}",
                device=d,
                reasons=no or checkpoint or _accelerates(pipe[0], tier=tier, dtype=dtype, device=d),
            )
            for tier in TIERS
            for dtype in DTYPE_NAMES
            for d, no in devices.items()
        ],
    )


def _try(action: Callable[[], Any]) -> list[str]:
    """Why `action` fails, in one sentence; empty if it succeeds."""
    try:
        action()
    except Exception as error:  # any error is part of the report
        return [one_line(" ".join(str(error).split())) or type(error).__name__]
    return []


def _version(package: str) -> str | None:
    if importlib.util.find_spec(package) is None:
        return None
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:  # a module of a distribution with another name
        return getattr(importlib.import_module(package), "__version__", "of unknown version")


def _flavors() -> "dict[str, Flavor]":
    """The flavors of TensorRT, by name."""
    from gbci_fast.fast.tensorrt.flavor import FLAVORS

    return FLAVORS


def _flavor_version(flavor: "Flavor") -> str | None:
    if not any(importlib.util.find_spec(module) for module in flavor.modules):
        return None
    try:
        return flavor.version
    except GBCIError:
        return "of unknown version"


def _flavor_usability(devices: dict[str, list[str]]) -> list[Usability]:
    """The usability of each flavor of TensorRT; the tensorrt runtime takes the first usable one."""
    import torch

    return [
        Usability(name=f"tensorrt, {name}", device=d, reasons=[*no, *flavor.refusals(torch.device(d))])
        for name, flavor in _flavors().items()
        for d, no in devices.items()
    ]


def _cpu() -> dict[str, Any]:
    import torch

    from gbci_fast.fast.devices import has_bfloat16_units

    sets = [
        name
        for name, has in (
            ("AVX2", torch.cpu._is_avx2_supported),
            ("AVX-512", torch.cpu._is_avx512_supported),
            ("AVX-512 BF16", torch.cpu._is_avx512_bf16_supported),
            ("AMX", torch.cpu._is_amx_tile_supported),
        )
        if has()
    ]
    # The instruction sets for which csrc/common/instruction_sets.h compiles kernels; it chooses at run time.
    extension = next((name for name in ("AVX-512", "AVX2") if name in sets), "the baseline")
    return {
        "machine": platform.machine(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "instruction_sets": sets,
        "extension_uses": extension,
        "bfloat16_units": has_bfloat16_units(torch.device("cpu")),
    }


def _require_gpu() -> None:
    import torch

    if torch.cuda.is_available():
        return
    why = "was built without CUDA"
    if torch.version.cuda is not None:
        why = f"was built for CUDA {torch.version.cuda}: {'; '.join(_try(torch.cuda.init))}"
    raise RuntimeError(f"needs an NVIDIA GPU: torch finds none (torch {torch.__version__} {why})")


def _gpus() -> list[dict[str, Any]]:
    import torch

    found = map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
    return [
        {"name": gpu.name, "capability": f"{gpu.major}.{gpu.minor}", "memory_gib": round(gpu.total_memory / 2**30, 1)}
        for gpu in found
    ]


def _ops() -> list[str]:
    """Names of the operators: the public modules of `gbci_fast.ops`."""
    import gbci_fast.ops

    return [module.name for module in pkgutil.iter_modules(gbci_fast.ops.__path__) if not module.name.startswith("_")]


def _op_usability(name: str, device: str, no_device: Sequence[str]) -> list[Usability]:
    """The usability of an operator, and of each backend that it chooses among."""
    reasons = _op(name, device, no_device)
    out = [Usability(name=name, device=device, reasons=reasons)]
    module = sys.modules.get(f"gbci_fast.ops.{name}")
    for backend in getattr(module, "BACKENDS", ()):
        missing = [f"{backend} is not installed: pip install {backend}"] if backend in _missing() else []
        refusals = [*reasons, *missing] or _backend_refusals(module, backend, device)
        out.append(Usability(name=f"{name}, {backend}", device=device, reasons=refusals))
    return out


def _backend_refusals(module: ModuleType, backend: str, device: str) -> list[str]:
    """Why a backend refuses queries, keys and values of the packaged checkpoint's shapes; empty if it takes them."""
    import torch

    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    q = torch.zeros(2, 4, 196, 32, device=device, dtype=dtype)
    return module.backend_refusals(backend, q, q, q)


def _missing() -> list[str]:
    return [package for package in PACKAGES if _version(package) is None]


def _op(name: str, device: str, no_device: Sequence[str] = ()) -> list[str]:
    """Why an operator cannot be used on a device; `no_device` says why the device itself is missing."""
    import torch

    failed = _try(lambda: importlib.import_module(f"gbci_fast.ops.{name}"))
    if failed:
        return failed
    reasons, module = list(no_device), importlib.import_module(f"gbci_fast.ops.{name}")
    if device == "cuda" and hasattr(module, "triton_op") and _version("triton") is None:
        reasons.append("triton is not installed: pip install triton")
    if device not in getattr(module, "DEVICES", (device,)):
        reasons.append(f"is for {' and '.join(module.DEVICES)} alone: nothing asks for it on {device}")
    # An operator that is not registered is written in terms of other operators, and runs where they run.
    built = torch._C._dispatch_has_kernel_for_dispatch_key
    if not reasons and hasattr(torch.ops.gbci_fast, name) and not built(f"gbci_fast::{name}", device.upper()):
        reasons.append(f"gbci_fast was built without kernels for {device}: install nvcc and build it again")
    return reasons


def _load() -> "GBCIPipeline":
    """The packaged checkpoint, and proof that the eager pipeline samples: one step of one small image."""
    import torch

    from gbci_fast.model.checkpoint import load_pipeline
    from gbci_fast.model.pipeline import PACKAGED_WEIGHTS

    pipe, mask = load_pipeline(PACKAGED_WEIGHTS), torch.zeros(1, 1, 224, 224)
    mask[..., 96:128, 96:128] = 1
    image = pipe(torch.full_like(mask, 0.5), mask, num_inference_steps=1, seed=0, output_type="pt").images
    if not image.isfinite().all():
        raise RuntimeError("the packaged checkpoint samples NaN or infinity")
    return pipe


def _choice(pipe: "GBCIPipeline", device: str) -> list[str]:
    from gbci_fast.fast.accelerate import accelerate

    return [f"on {device}: {line}" for line in accelerate(pipe, device=device).describe().splitlines()]


def _accelerates(pipe: "GBCIPipeline", *, dtype: str | None = None, **options: str) -> list[str]:
    """Why `accelerate` refuses these options."""

    def attempt() -> None:
        import torch

        from gbci_fast.fast.accelerate import accelerate

        accelerate(pipe, dtype=getattr(torch, dtype) if dtype else None, **options)

    return _try(attempt)
