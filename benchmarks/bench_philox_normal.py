"""philox_normal against torch's own generator and against the NumPy definition; bytes are those written.

torch draws on one thread, whatever the number of `threads` in the stored row.
"""

import math

import pytest
import torch

from gbci_fast.model.noise import seed_tensor
from gbci_fast.ops.philox_normal import philox_normal, philox_normal_ref

SHAPE = (4, 56, 56)  # one latent at 224x224


@pytest.mark.parametrize("batch", [1, 32, 256])
@pytest.mark.parametrize("row", ["eager", "reference", "ours"])
def bench_philox_normal(measure, benchmark, device, row, batch):
    seeds = seed_tensor(range(batch), device)
    functions = {
        "eager": lambda: torch.randn(batch, *SHAPE, device=device),
        "reference": lambda: philox_normal_ref(seeds, SHAPE),
        "ours": lambda: philox_normal(seeds, SHAPE),
    }
    normals = batch * math.prod(SHAPE)
    measure(functions[row], num_bytes=4 * normals)
    if benchmark.enabled:
        benchmark.extra_info["ns_per_normal"] = benchmark.stats.stats.median * 1e9 / normals
