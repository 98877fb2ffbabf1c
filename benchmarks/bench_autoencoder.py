"""The packaged autoencoder with each group norm and SiLU fused in one operator, against the stock autoencoder.

Whole images are encoded and decoded. Both rows have the memory layout and the convolutions that `accelerate` uses. The
error of `ours` against the stock float32 autoencoder must be about that of `eager`.
"""

import copy

import pytest
import torch
from torch import nn

from gbci_fast.fast.modules.autoencoder import with_fused_norms
from gbci_fast.fast.modules.convolution import with_filtered_convolutions
from gbci_fast.model.pipeline import GBCIPipeline

BATCHES = {"cpu": (8,), "cuda": (8, 256)}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@pytest.fixture(scope="module")
def stock() -> nn.Module:
    """The packaged autoencoder on the CPU, float32."""
    return GBCIPipeline.from_pretrained().vae


def run(vae: nn.Module, part: str, x: torch.Tensor) -> torch.Tensor:
    return vae.encode(x).latent_dist.mode() if part == "encode" else vae.decode(x).sample


@pytest.mark.parametrize("batch", sorted({batch for batches in BATCHES.values() for batch in batches}))
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("part", ["encode", "decode"])
@pytest.mark.parametrize("row", ["eager", "ours"])
@torch.no_grad()
def bench_autoencoder(measure, stock, full_float32, device, batch, dtype, part, row):
    if batch not in BATCHES[device.type]:
        pytest.skip("is for a GPU's throughput")
    wide_cpu = device.type == "cpu" and dtype == "fp32"
    layout = torch.contiguous_format if wide_cpu else torch.channels_last
    vae = nn.Module.to(copy.deepcopy(stock), device, DTYPES[dtype], memory_format=layout)
    vae = with_filtered_convolutions(vae) if wide_cpu else vae
    shape = (batch, 1, 224, 224) if part == "encode" else (batch, 4, 56, 56)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device, DTYPES[dtype])
    fused = with_fused_norms(vae)
    if row == "ours":
        exact = run(nn.Module.to(copy.deepcopy(stock), device), part, x.float())
        ours, own = ((run(one, part, x) - exact).square().mean().sqrt() for one in (fused, vae))
        assert ours <= 1.5 * own + 1e-5 * exact.abs().max()
    measure(lambda: run(fused if row == "ours" else vae, part, x))
