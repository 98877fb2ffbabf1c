"""One guided UNet forward of the packaged checkpoint, as in a step of the sampler, by runtime.

Rows:
    `matmul`: a square matrix product, whose rate serves as a ceiling.
    `eager`: the stock UNet on both halves of the batch.
    `compile`: the same with ``torch.compile`` (max-autotune and channels last on a GPU).
    `tensorrt`: that runtime's engine.
    `ours`: the fused runtime.

`tensorrt` and `ours` must stay within the rounding of their tier. FLOPs of all rows are those of the stock forward, so
that operations which `ours` saves count as speed.
"""

import copy
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from gbci_fast.attributes import Attributes
from gbci_fast.evaluate.parity.images import EXACT_LATENTS, RMS_FACTOR
from gbci_fast.fast.denoiser import Denoiser
from gbci_fast.fast.devices import has_bfloat16_units
from gbci_fast.fast.runtimes.eager import EagerDenoiser
from gbci_fast.fast.runtimes.fused import FusedDenoiser
from gbci_fast.fast.tensorrt.denoiser import TensorRTDenoiser, tensorrt_refusals
from gbci_fast.model.conditioning import Conditioning
from gbci_fast.model.pipeline import GBCIPipeline

BATCHES = {"cpu": (8,), "cuda": (8, 32, 128, 256)}
CELLS = 56  # side of the latents
MATMUL = {"cpu": 2048, "cuda": 8192}  # side of the matrices
TIMESTEPS = torch.tensor([999, 501])
STEP = 1
TENSORRT_FLOOR = 1e-5  # allowed error relative to the output's RMS; eager float32 has no rounding to compare with
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@pytest.fixture(scope="module")
def stock() -> GBCIPipeline:
    """The packaged checkpoint on the CPU, float32."""
    return GBCIPipeline.from_pretrained()


def inputs(stock: GBCIPipeline, batch: int, device: torch.device) -> tuple[Tensor, tuple]:
    """Latents, and the arguments of ``prepare``; the context has the length that the pipeline gives it."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device)

    null = stock.conditioner.null(1)
    side = CELLS * stock.vae_scale_factor
    blank = torch.zeros(1, 1, side, side)
    tokens = stock.encode_condition(blank, blank, [Attributes()], [None]).tokens.shape[1]
    conditioning = Conditioning(
        normal(batch, tokens, null.tokens.shape[-1]),
        torch.ones(batch, tokens, dtype=torch.bool, device=device),
        normal(batch, null.pooled.shape[-1]),
    )
    null = Conditioning(*(part.to(device) for part in (null.tokens, null.token_mask, null.pooled)))
    return normal(batch, 4, CELLS, CELLS), (conditioning, null, normal(batch, 5, CELLS, CELLS), TIMESTEPS.to(device))


def denoiser(row: str, stock: GBCIPipeline, dtype: torch.dtype, device: torch.device) -> Denoiser:
    """A denoiser with its own copy of the UNet; rows other than `eager` have the device's fastest memory layout."""
    unet = nn.Module.to(copy.deepcopy(stock.unet), device, dtype)
    if row != "eager" and (dtype != torch.float32 or device.type == "cuda"):
        unet = unet.to(memory_format=torch.channels_last)
    if row == "compile":
        unet.compile(mode="max-autotune" if device.type == "cuda" else "default", dynamic=False)
    return {"ours": FusedDenoiser, "tensorrt": TensorRTDenoiser}.get(row, EagerDenoiser)(unet)


def forward(made: Denoiser, latents: Tensor, state) -> Tensor:
    """Both halves of a guided forward, float32 [2 B, 4, h, w]."""
    return torch.cat(made(latents.to(made.dtype), STEP, state, True)).float()


@pytest.mark.parametrize("batch", sorted({batch for batches in BATCHES.values() for batch in batches}))
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("row", ["matmul", "eager", "compile", "tensorrt", "ours"])
@torch.no_grad()
def bench_unet(measure, benchmark, stock, full_float32, skip_slow_builds, device, batch, dtype, row):
    if batch not in BATCHES[device.type]:
        pytest.skip("is for a GPU's throughput")
    if DTYPES[dtype] == torch.bfloat16 and not has_bfloat16_units(device):
        pytest.skip(f"this {device.type} is no faster in bfloat16: no runtime would choose it")
    benchmark.extra_info.update(batch=batch, dtype=dtype, row=row, threads=torch.get_num_threads())
    if row == "tensorrt" and (refusals := tensorrt_refusals(device)):
        pytest.skip("; ".join(refusals))
    if row == "matmul":
        side = MATMUL[device.type]
        a, b = (torch.randn(side, side, device=device, dtype=DTYPES[dtype]) for _ in range(2))
        measure(lambda: a @ b, num_flops=2 * side**3)
        return
    latents, given = inputs(stock, batch, device)
    made = denoiser(row, stock, DTYPES[dtype], device)
    state = made.prepare(*given)
    if row in ("ours", "tensorrt"):
        check(made, state, stock, latents, given, device)
    measure(partial(made, latents.to(made.dtype), STEP, state, True), num_flops=batch * flops_per_image(stock))


def check(made: Denoiser, state, stock: GBCIPipeline, latents: Tensor, given: tuple, device: torch.device) -> None:
    """Asserts that the forward is as close to the eager float32 forward as its tier requires."""
    outputs = []
    for dtype in (torch.float32, made.dtype):
        eager = denoiser("eager", stock, dtype, device)
        outputs.append(forward(eager, latents, eager.prepare(*given)))
    reference, narrow = outputs
    ours = forward(made, latents, state)
    if made.dtype == torch.float32 and isinstance(made, FusedDenoiser):
        assert (ours - reference).abs().max() <= EXACT_LATENTS * reference.abs().max()
    else:
        assert rms(ours - reference) <= max(RMS_FACTOR * rms(narrow - reference), TENSORRT_FLOOR * rms(reference))


def rms(x: Tensor) -> float:
    return x.square().mean().sqrt().item()


def flops_per_image(stock: GBCIPipeline) -> int:
    """FLOPs of the stock UNet's guided forward by PyTorch's count: convolutions, linear layers and attention."""
    latents, given = inputs(stock, 1, torch.device("cpu"))
    eager = EagerDenoiser(stock.unet)
    state = eager.prepare(*given)
    with FlopCounterMode(display=False) as counter:
        eager(latents, STEP, state, True)
    return counter.get_total_flops()
