"""A bare UNet of Stable Diffusion's structure at a fifth of its widths: four steps on one context, as in a pipeline."""

import statistics
import time

import pytest
import torch
from diffusers import UNet2DConditionModel

from gbci_fast import accelerate

TIMESTEPS = (901, 601, 301, 1)
CONFIG = {
    "in_channels": 9, "block_out_channels": (64, 128, 256, 256), "attention_head_dim": 8, "cross_attention_dim": 768,
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def bench_fast_unet(benchmark, device, dtype):
    """Times ours, and the stock UNet before each round, so that other load on the machine affects both alike."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(**CONFIG).eval().to(device)
    eager = accelerate(unet, runtime="eager", dtype=dtype)
    ours = accelerate(unet, runtime="fused", dtype=dtype)
    context = torch.randn(2, 77, 768, device=device, dtype=dtype)
    latents = torch.randn(2, 9, 32, 32, device=device, dtype=dtype)
    times: dict[str, list[float]] = {"eager": [], "ours": []}

    with torch.no_grad():
        reference = unet(latents.float(), 501, context.float()).sample
        errors = [(model(latents, 501, context).sample - reference).square().mean().sqrt() for model in (ours, eager)]
    bound = 1e-5 * reference.abs().max() if dtype == torch.float32 else 1.5 * errors[1]
    assert errors[0] <= bound, "not within its tier"

    @torch.no_grad()
    def sample(row, model, tokens):
        start = time.perf_counter()
        for timestep in TIMESTEPS:
            model(latents, timestep, tokens)
        if device.type == "cuda":
            torch.cuda.synchronize()
        times[row].append(time.perf_counter() - start)

    def before():
        tokens = context.clone()  # as of a new prompt, for which nothing is cached
        sample("eager", eager, tokens)
        return ("ours", ours, tokens), {}

    benchmark.pedantic(sample, setup=before, rounds=5, warmup_rounds=1)
    ratios = [a / b for a, b in zip(times["eager"][1:], times["ours"][1:], strict=True)]
    benchmark.extra_info.update(device=device.type, dtype=str(dtype), batch=2, steps=len(TIMESTEPS))
    if benchmark.enabled:
        benchmark.extra_info["times_faster_than_eager"] = statistics.median(ratios)
