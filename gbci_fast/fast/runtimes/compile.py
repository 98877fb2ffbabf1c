"""`torch.compile` of the fused UNet's step, or of the stock UNet where "fused" cannot run it.

A new batch or image size compiles; a new template, mask, attribute, report, seed or step does not. The context is
padded to a multiple of `CONTEXT_MULTIPLE` tokens, by at least one token, so that its length seldom changes and there is
always a padding mask. Kernels for any batch size take many times as long to compile, and are no faster.
"""

import functools
import shutil
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from torch import Tensor
from torch.utils._pytree import tree_map_only

from gbci_fast.errors import GBCIError
from gbci_fast.fast.modules.blocks import fused_refusals
from gbci_fast.fast.runtimes.eager import EagerDenoiser
from gbci_fast.fast.runtimes.fused import FusedDenoiser
from gbci_fast.model.conditioning import Conditioning
from gbci_fast.ops._triton import triton

CONTEXT_MULTIPLE = 64
SHAPES = 64  # combinations of sizes that are compiled; one more is an error
# Before torch 2.13, only the thread that captured a CUDA graph of torch.compile could replay it (pytorch#123177).
GRAPHS_IN_ANY_THREAD = torch.__version__ >= (2, 13)


def need_compiler(device: torch.device) -> None:
    """Raises GBCIError: there is no C++ compiler or, for a GPU, no Triton."""
    from torch._inductor import config

    if device.type == "cuda" and triton is None:
        raise GBCIError("the compile runtime needs triton, which is not installed: pip install triton")
    names = [name for name in config.cpp.cxx if name]
    if not any(map(shutil.which, names)):
        raise GBCIError(f"the compile runtime needs a C++ compiler; none of {', '.join(names)} is on the PATH")


def compiled(
    function: Callable,
    device: torch.device,
    fullgraph: bool = True,
    backend: str | Callable = "inductor",
    graphs: bool = True,
) -> Callable:
    """`function` compiled for each combination of its tensors' sizes; on a GPU with tuned kernels.

    Args:
        function: takes tensors on `device`.
        fullgraph, backend: options of `torch.compile`.
        graphs: whether each call is a CUDA graph of its own. Only on a GPU, and with a torch whose graphs any thread
            may replay. Calls without graphs of their own can be recorded as part of another graph.

    Raises:
        GBCIError: there is no C++ compiler or, for a GPU, no Triton. The returned function raises it for too many
            sizes.
    """
    options: dict[str, Any] = {"fullgraph": fullgraph, "dynamic": False, "backend": backend}
    if backend == "inductor":
        need_compiler(device)
        options["mode"] = _mode(device, graphs)
    graph = torch.compile(function, **options)

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        limit = torch._dynamo.config.patch(recompile_limit=SHAPES, fail_on_recompile_limit_hit=True)
        try:
            with limit:
                if options.get("mode") != "max-autotune":
                    return graph(*args, **kwargs)
                torch.compiler.cudagraph_mark_step_begin()
                # The next replay overwrites this output, which a multistep solver may still need.
                return tree_map_only(Tensor, torch.clone, graph(*args, **kwargs))
        except torch._dynamo.exc.FailOnRecompileLimitHit as error:
            sizes = f"{SHAPES} combinations of batch and image sizes"
            raise GBCIError(f"the compile runtime has compiled for {sizes}; choose the fused runtime") from error

    return call


def _mode(device: torch.device, graphs: bool) -> str:
    if device.type != "cuda":
        return "default"
    return "max-autotune" if graphs and GRAPHS_IN_ANY_THREAD else "max-autotune-no-cudagraphs"


class CompiledDenoiser:
    """See `gbci_fast.fast.denoiser.Denoiser`. The fused UNet has no CUDA graphs of its own: the whole loop is recorded.

    Raises:
        GBCIError: there is no C++ compiler or, for a GPU, no Triton.
    """

    def __init__(self, unet: UNet2DConditionModel, backend: str | Callable = "inductor"):
        fused = not fused_refusals(unet)
        self._denoiser = FusedDenoiser(unet) if fused else EagerDenoiser(unet)
        options: dict[str, Any] = {"fullgraph": fused, "backend": backend, "graphs": not fused}
        self._denoiser.compile(functools.partial(compiled, device=unet.device, **options))
        self.dtype = unet.dtype

    def prepare(self, conditioning: Conditioning, null: Conditioning, constant: Tensor, timesteps: Tensor) -> Any:
        tokens, token_mask, pooled = conditioning.tokens, conditioning.token_mask, conditioning.pooled
        padding = CONTEXT_MULTIPLE - tokens.shape[1] % CONTEXT_MULTIPLE
        padded = Conditioning(F.pad(tokens, (0, 0, 0, padding)), F.pad(token_mask, (0, padding)), pooled)
        vars(padded)["padded"] = True  # known here; reading the mask would wait for the device
        return self._denoiser.prepare(padded, null, constant, timesteps)

    def __call__(self, latents: Tensor, step: int, state: Any, guided: bool) -> Tensor | tuple[Tensor, Tensor]:
        return self._denoiser(latents, step, state, guided)
