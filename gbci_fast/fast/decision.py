"""What `gbci_fast.accelerate` decides before it builds a pipeline: the runtime, the dtype, and the reasons for both."""

import operator
from dataclasses import dataclass

import torch
from diffusers import UNet2DConditionModel

from gbci_fast.errors import GBCIError
from gbci_fast.fast import windows
from gbci_fast.fast.devices import has_bfloat16_units
from gbci_fast.fast.modules.adapters import adapter_notes, merged
from gbci_fast.fast.modules.blocks import cross_attention_notes, fused_refusals, has_other_forward
from gbci_fast.fast.runtimes.compile import need_compiler
from gbci_fast.fast.tensorrt.denoiser import tensorrt_note, tensorrt_refusals
from gbci_fast.model.few_step import FewStepLoRA
from gbci_fast.model.pipeline import GBCIPipeline
from gbci_fast.ops._triton import triton
from gbci_fast.ops.blend_step import blend_step  # noqa: F401  registers the operator that `decide` asks for

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
AUTO = ("fused", "eager")
"""The runtimes that "auto" tries, the fastest measured one first. "tensorrt" has been measured nowhere yet."""


@dataclass(frozen=True, kw_only=True)
class Decision:
    """How an accelerated pipeline or UNet runs.

    Attributes:
        runtime: what executes the UNet.
        tier: the bound on the difference to eager.
        dtype: of UNet and VAE.
        notes: why a faster option was not used, and which techniques were; one sentence each.
        asked: the runtime that was asked for.
    """

    runtime: str
    tier: str
    dtype: torch.dtype
    notes: tuple[str, ...] = ()
    asked: str = "auto"

    def __str__(self) -> str:
        lines = [f"runtime {self.runtime}, tier {self.tier}, {str(self.dtype).removeprefix('torch.')}", *self.notes]
        return "\n".join(lines)


def decide(
    pipe: GBCIPipeline,
    runtime: str,
    tier: str,
    dtype: torch.dtype | None,
    device: torch.device,
    few_step: FewStepLoRA | None = None,
) -> Decision:
    """How a pipeline is to run on a device.

    Args:
        pipe: the eager pipeline, whose UNet is examined.
        runtime, tier, dtype: as in `gbci_fast.accelerate`.
        device: where the UNet is to run.
        few_step: the few-step weights that the pipeline may use.

    Raises:
        GBCIError: the runtime cannot run this UNet, the tier excludes the dtype, or the extension has no kernels for
            the device.
    """
    if not torch._C._dispatch_has_kernel_for_dispatch_key("gbci_fast::blend_step", device.type.upper()):
        unbuilt = f"gbci_fast was built without kernels for {device.type}"
        raise GBCIError(f"{unbuilt}; install nvcc and build it again, or take the CPU")
    if tier == "exact" and device.type == "cuda":
        for name in ("cuda.matmul", "cudnn"):
            if operator.attrgetter(name)(torch.backends).allow_tf32:
                raise GBCIError(f"tier 'exact' needs float32; set torch.backends.{name}.allow_tf32 = False")
    dtype, notes = _dtype(pipe.unet.dtype, tier, dtype, device)
    notes += adapter_notes(pipe.unet)
    asked, reasons = runtime, fused_refusals(merged(pipe.unet))
    if runtime == "auto":
        for runtime in AUTO:
            refusals = _runtime_refusals(runtime, reasons, tier, device)
            if not refusals:
                break
            notes += [f"not the {runtime} runtime: {reason}" for reason in refusals]
    elif refusals := _runtime_refusals(runtime, reasons, tier, device):
        what = "run this UNet" if reasons else "be used"
        raise GBCIError(f"the {runtime} runtime cannot {what}: {'; '.join(refusals)}")
    if runtime == "compile":
        need_compiler(device)
        notes += [f"compiles the stock UNet: {reason}" for reason in reasons]
    if runtime == "tensorrt":
        notes.append(tensorrt_note(device))
    if runtime == "fused" and device.type == "cuda":
        notes += cross_attention_notes(pipe.unet, dtype)
    if runtime == "fused" and device.type == "cuda" and triton is None:
        notes.append("norms and feed-forwards run in PyTorch, because triton is not installed")
    if tier == "approximate":
        notes.append(windows.NOTE)
    if few_step is not None:
        notes.append(few_step.note())
    return Decision(runtime=runtime, tier=tier, dtype=dtype, notes=tuple(notes), asked=asked)


def decide_unet(
    unet: UNet2DConditionModel, runtime: str, tier: str, dtype: torch.dtype | None, device: torch.device
) -> Decision:
    """How a UNet without its pipeline is to run on a device; the arguments are those of `gbci_fast.accelerate`.

    Raises:
        GBCIError: the UNet is of a subclass or has hooks, the runtime needs a whole pipeline, or the tier excludes the
            dtype.
    """
    if type(unet) is not UNet2DConditionModel:
        raise GBCIError(f"the UNet is a {type(unet).__name__}; expected a UNet2DConditionModel itself")
    if has_other_forward(unet):
        raise GBCIError("the UNet's forward was replaced, by offloading for example; accelerate it before that")
    if runtime == "tensorrt":
        raise GBCIError("the tensorrt runtime runs whole pipelines, not a UNet alone; take fused or compile")
    dtype, notes = _dtype(unet.dtype, tier, dtype, device)
    if tier == "approximate":
        notes.append("nothing is approximated: a UNet alone has no mask to put a window around")
    wanted = "fused" if runtime == "auto" else runtime
    return Decision(runtime=wanted, tier=tier, dtype=dtype, notes=tuple(notes), asked=runtime)


def _runtime_refusals(runtime: str, reasons: list[str], tier: str, device: torch.device) -> list[str]:
    """Why a runtime cannot run a UNet; `reasons` are why the fused runtime cannot."""
    if runtime == "tensorrt":
        narrow = ["tier 'exact' excludes it; take tier 'tolerance', or the fused runtime"] if tier == "exact" else []
        return [*narrow, *reasons, *tensorrt_refusals(device)]
    return reasons if runtime == "fused" else []


def _dtype(
    given: torch.dtype, tier: str, dtype: torch.dtype | None, device: torch.device
) -> tuple[torch.dtype, list[str]]:
    """The dtype that a UNet of dtype `given` runs in, and notes for the decision."""
    notes = []
    if dtype is None:
        dtype = given
        if tier != "exact" and dtype == torch.float32:
            if has_bfloat16_units(device):
                dtype = torch.bfloat16
            else:
                notes.append(f"float32, because this {device.type.upper()} is no faster in bfloat16")
    if dtype not in _DTYPES:
        raise GBCIError(f"dtype is {dtype}; expected {', '.join(map(str, _DTYPES))}")
    if tier == "exact" and not dtype == given == torch.float32:
        raise GBCIError(f"dtype is {dtype} with tier 'exact'; expected torch.float32 of a float32 pipeline")
    return dtype, notes
