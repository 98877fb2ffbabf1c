"""attention with every backend at the shapes of the UNet's self-attention, to check `gbci_fast.ops.attention.ORDER`.

The summary has a line per shape with every backend's time as a multiple of the table's choice. A value below 1 means
that the table should have another order for this architecture; the stored rows name the architecture.
"""

import pytest
import torch

from gbci_fast.ops.attention import BACKENDS, attention, attention_ref, backend_refusals, order_key

# heads, tokens, head_dim
SHAPES = {"unet_28": (4, 784, 32), "unet_14": (6, 196, 32), "sd_32": (8, 1024, 40)}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@pytest.mark.parametrize("batch", [1, 8, 64])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("row", [*BACKENDS, "ours"])
def bench_attention(measure, benchmark, device, row, shape, dtype, batch):
    """`ours` is the table's choice. On the CPU, the batch is at most 8, and 1 for Stable Diffusion's shape."""
    if device.type == "cpu" and batch > (8 if shape.startswith("unet") else 1):
        pytest.skip("takes seconds on a CPU, and is no different from a smaller batch")
    heads, tokens, head_dim = SHAPES[shape]
    generator = torch.Generator().manual_seed(0)
    packed = torch.randn(batch, tokens, 3, heads, head_dim, generator=generator).to(device, DTYPES[dtype])
    q, k, v = packed.permute(2, 0, 3, 1, 4)  # as one linear layer leaves them
    if row in BACKENDS and (reasons := backend_refusals(row, q, k, v)):
        pytest.skip("; ".join(reasons))
    backend = row if row in BACKENDS else None
    exact = attention_ref(*(part[:1].double() for part in (q, k, v)))
    error, own = ((result - exact).abs().max() for result in (
        attention(q[:1], k[:1], v[:1], backend=backend), attention_ref(q[:1], k[:1], v[:1]),
    ))  # fmt: skip
    assert error <= 2 * own + {"fp32": 2**-21, "bf16": 2**-8}[dtype] * exact.abs().max()
    measure(lambda: attention(q, k, v, backend=backend), num_bytes=packed.nbytes + q.nbytes)
    flops = 4 * batch * heads * tokens**2 * head_dim
    benchmark.extra_info.update(flops=flops, architecture=order_key(device))
    if benchmark.enabled:
        benchmark.extra_info["tflop_per_s"] = flops / benchmark.stats.stats.median / 1e12
