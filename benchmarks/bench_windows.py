"""Windowed denoising end to end (encode, sample, decode, composite): how the cost depends on the lesion's size.

Each row is tier "approximate" on a square lesion of the given side in pixels. The row "whole" is tier "tolerance",
whose cost a lesion of the image's size should match. Rows hold images per second and the window's side. Only `--full`
runs them.
"""

import pytest
import torch

from gbci_fast.fast import windows
from gbci_fast.fast.accelerate import accelerate
from gbci_fast.model.masks import latent_mask
from gbci_fast.model.pipeline import GBCIPipeline

SIZE, BATCH, STEPS = 224, 8, 20
MEDIAN = 17  # median side in pixels of a lesion of VinDr-Mammo
LESIONS = (8, MEDIAN, 32, 56, 96, 224)


@pytest.fixture(scope="module")
def pipe() -> GBCIPipeline:
    """The packaged checkpoint."""
    pipe = GBCIPipeline.from_pretrained()
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize("lesion", ["whole", *LESIONS])
def bench_windows(request, benchmark, pipe, device, lesion):
    if not request.config.getoption("full"):
        pytest.skip("is left to --full")
    whole = lesion == "whole"
    fast = accelerate(pipe, tier="tolerance" if whole else "approximate", device=device)
    images = torch.rand(BATCH, 1, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    masks = torch.zeros(1, 1, SIZE, SIZE)
    side = MEDIAN if whole else lesion
    start = (SIZE - side) // 2
    masks[..., start : start + side, start : start + side] = 1
    [group] = windows.choose(latent_mask(masks, fast.vae_scale_factor), windows.HALO, stride=4)

    def sample():
        fast(images, masks, {"finding_categories": ["Mass"]}, num_inference_steps=STEPS, seed=0, output_type="pt")
        if device.type == "cuda":
            torch.cuda.synchronize()

    benchmark.pedantic(sample, rounds=3, warmup_rounds=1)
    window = fast.unet.config.sample_size if whole else group.height
    dtype = str(fast.decision.dtype).removeprefix("torch.")
    benchmark.extra_info.update(device=device.type, batch=BATCH, steps=STEPS, dtype=dtype, window=window)
    if benchmark.enabled:
        benchmark.extra_info["images_per_s"] = BATCH / benchmark.stats.stats.median
