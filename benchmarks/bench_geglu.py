"""geglu against eager PyTorch and torch.compile, at the shapes of the UNet's feed-forward layers.

Rows have the rate of the matrix products in TFLOP/s. Bytes are those of the tokens, the weights and the result.
"""

import pytest
import torch

from gbci_fast.ops.geglu import geglu, geglu_ref

SHAPES = {"unet_28": (64, 784, 128), "unet_14": (64, 196, 192)}  # batch under guidance, tokens, channels


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("row", ["eager", "compile", "ours"])
def bench_geglu(measure, benchmark, device, row, shape):
    """Runs in bfloat16."""
    if device.type == "cpu":
        pytest.skip("on the CPU the operator is its reference")
    batch, tokens, channels = SHAPES[shape]
    features = 4 * channels
    generator = torch.Generator().manual_seed(0)

    def normal(*size):
        return torch.randn(*size, generator=generator).to(device, torch.bfloat16)

    x, weight, bias = normal(batch, tokens, channels), normal(2 * features, channels), normal(2 * features)
    weight /= channels**0.5
    compiled = torch.compile(geglu_ref, mode="max-autotune-no-cudagraphs", dynamic=False)
    functions = {
        "eager": lambda: geglu_ref(x, weight, bias),
        "compile": lambda: compiled(x, weight, bias),
        "ours": lambda: geglu(x, weight, bias),
    }
    exact = geglu_ref(x.double(), weight.double(), bias.double())
    ours, own = ((functions[name]() - exact).abs().max() for name in ("ours", "eager"))
    assert ours <= 2 * own + 2**-8 * exact.abs().max()
    measure(functions[row], num_bytes=x.nbytes + weight.nbytes + 2 * batch * tokens * features)
    if benchmark.enabled:
        flops = 2 * batch * tokens * channels * 2 * features
        benchmark.extra_info["tflop_per_s"] = flops / benchmark.stats.stats.median / 1e12
