"""The eager reference end to end (encode, sample, decode, composite): what every faster path is held against."""

import pytest
import torch

from gbci_fast.pipeline import GBCIPipeline

SIZE = 224
STEPS = 4


@pytest.fixture(scope="module")
def pipe() -> GBCIPipeline:
    """The packaged checkpoint."""
    pipe = GBCIPipeline.from_pretrained()
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize("batch", [1, 8])
def bench_sampler_eager(benchmark, pipe, device, batch):
    pipe.to(device)
    images = torch.rand(batch, 1, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    masks = torch.zeros(1, 1, SIZE, SIZE)
    masks[..., 100:118, 60:78] = 1  # a lesion of median size

    def sample():
        pipe(
            images,
            masks,
            {"finding_categories": ["Mass"]},
            num_inference_steps=STEPS,
            seed=list(range(batch)),
            output_type="pt",
        )

    benchmark.pedantic(sample, rounds=3, warmup_rounds=1)
    benchmark.extra_info.update(device=device.type, batch=batch, steps=STEPS, dtype="fp32", guidance=3.0)
    if benchmark.enabled:
        benchmark.extra_info["images_per_s"] = batch / benchmark.stats.stats.median
