"""cross_attention at the shapes of the UNet's and of Stable Diffusion's transformers, against eager PyTorch,
torch.compile, and separate kernels with each attention backend that runs on the device, such as xformers.

Bytes are those of the tokens, keys, values and weights, read or written once. FLOPs are those of the projections and
the attention.
"""

import pytest
import torch
import torch.nn.functional as F

from gbci_fast.ops.attention import BACKENDS, attention, backend_refusals
from gbci_fast.ops.cross_attention import cross_attention, cross_attention_ref, kernel_refusals

# tokens, channels, heads, head_dim, context
SHAPES = {"unet_28": (784, 128, 4, 32, 208), "unet_14": (196, 192, 6, 32, 208), "sd_32": (1024, 320, 8, 40, 77)}


def separately(backend, x, norm_weight, norm_bias, wq, key, value, wo, bo, *, eps, softmax_scale):
    """Separate kernels for the norm, each projection, the attention and the residual."""
    q = F.linear(F.layer_norm(x, x.shape[-1:], norm_weight, norm_bias, eps), wq)
    q = q.unflatten(-1, (key.shape[1], -1)).transpose(1, 2)
    attended = attention(q, key, value, softmax_scale=softmax_scale, backend=backend)
    return x + F.linear(attended.transpose(1, 2).flatten(2), wo, bo)


@pytest.mark.parametrize("batch", [1, 8, 64])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("row", ["eager", "compile", *BACKENDS, "ours"])
def bench_cross_attention(measure, benchmark, device, row, shape, batch):
    """Runs in bfloat16. On the CPU, where `ours` is the reference, only a batch of 1 without torch.compile."""
    if device.type == "cpu" and (batch > 1 or row == "compile"):
        pytest.skip("a batch of 1 is enough of a reference that is measured against itself")
    tokens, channels, heads, head_dim, context = SHAPES[shape]
    inner = heads * head_dim
    generator = torch.Generator().manual_seed(0)

    def normal(*size, spread=1.0):
        return spread * torch.randn(*size, generator=generator).to(device, torch.bfloat16)

    args = (
        normal(batch, tokens, channels), normal(channels), normal(channels),
        normal(inner, channels, spread=channels**-0.5), normal(batch, context, heads, head_dim).transpose(1, 2),
        normal(batch, context, heads, head_dim).transpose(1, 2), normal(channels, inner, spread=inner**-0.5),
        normal(channels),
    )  # fmt: skip
    options = {"eps": 1e-5, "softmax_scale": head_dim**-0.5}
    if row in BACKENDS:
        q = args[0].new_empty(batch, tokens, heads, head_dim).transpose(1, 2)
        if reasons := backend_refusals(row, q, *args[4:6]):
            pytest.skip("; ".join(reasons))
    if device.type == "cuda":
        assert kernel_refusals(channels, heads, head_dim, torch.bfloat16) == []
    compiled = torch.compile(cross_attention_ref, mode="max-autotune-no-cudagraphs", dynamic=False)
    functions = {
        "eager": lambda: cross_attention_ref(*args, **options),
        "compile": lambda: compiled(*args, **options),
        **{name: lambda name=name: separately(name, *args, **options) for name in BACKENDS},
        "ours": lambda: cross_attention(*args, **options),
    }
    exact = cross_attention_ref(*(part.double() for part in args), **options)
    error, own = ((functions[name]() - exact).abs().max() for name in (row, "eager"))
    assert error <= 2 * own + 2**-8 * exact.abs().max()
    measure(functions[row], num_bytes=args[0].nbytes + sum(part.nbytes for part in args))
    flops = 4 * batch * tokens * inner * (channels + context)
    benchmark.extra_info["flops"] = flops
    if benchmark.enabled:
        benchmark.extra_info["tflop_per_s"] = flops / benchmark.stats.stats.median / 1e12
