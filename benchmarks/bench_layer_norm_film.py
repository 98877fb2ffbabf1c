"""layer_norm_film against eager PyTorch, torch.compile and a copy of as many bytes, at the shapes of the UNet's
transformers.

Bytes are those of the tokens read and written once, so the ratio to the copy is the share of the bandwidth.
"""

import pytest
import torch

from gbci_fast.ops.layer_norm_film import layer_norm_film, layer_norm_film_ref

SHAPES = {"unet_28": (64, 784, 128), "unet_14": (64, 196, 192)}  # batch under guidance, tokens, channels


@pytest.mark.parametrize("film", [False, True], ids=["plain", "film"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("row", ["eager", "compile", "copy", "ours"])
def bench_layer_norm_film(measure, device, row, shape, film):
    """Runs in bfloat16."""
    if device.type == "cpu":
        pytest.skip("on the CPU the operator is its reference")
    batch, tokens, channels = SHAPES[shape]
    generator = torch.Generator().manual_seed(0)

    def normal(*size):
        return torch.randn(*size, generator=generator).to(device, torch.bfloat16)

    args = normal(batch, tokens, channels), normal(channels), normal(channels)
    options = {"scale": normal(batch, channels), "shift": normal(batch, channels)} if film else {}
    out = torch.empty_like(args[0])
    compiled = torch.compile(layer_norm_film_ref, mode="max-autotune-no-cudagraphs", dynamic=False)
    functions = {
        "eager": lambda: layer_norm_film_ref(*args, **options),
        "compile": lambda: compiled(*args, **options),
        "copy": lambda: out.copy_(args[0]),
        "ours": lambda: layer_norm_film(*args, **options),
    }
    exact = layer_norm_film_ref(*(part.double() for part in args), **{k: v.double() for k, v in options.items()})
    ours, own = ((functions[name]() - exact).abs().max() for name in ("ours", "eager"))
    assert ours <= 2 * own + 2**-8 * exact.abs().max()
    measure(functions[row], num_bytes=2 * out.nbytes)
