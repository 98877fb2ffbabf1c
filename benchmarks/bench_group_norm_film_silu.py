"""group_norm_film_silu against eager PyTorch, torch.compile and a copy of as many bytes, at the shapes of the UNet's
levels and of the VAE.

Bytes are those of the image read and written once, so the ratio to the copy is the share of the bandwidth.
"""

import pytest
import torch

from gbci_fast.ops.group_norm_film_silu import group_norm_film_silu, group_norm_film_silu_ref

SHAPES = {  # batch with guidance, channels (of a level, or after a concatenation), side
    "unet_56": (64, 64, 56),
    "unet_56_up": (64, 192, 56),
    "unet_28": (64, 128, 28),
    "unet_14": (64, 192, 14),
    "unet_14_up": (64, 384, 14),
    "vae_224": (8, 32, 224),
    "vae_112": (8, 128, 112),
}


@pytest.mark.parametrize("layout", ["nhwc", "nchw"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("row", ["eager", "compile", "copy", "ours"])
def bench_group_norm_film_silu(measure, device, row, shape, layout):
    """Runs in bfloat16; on a CPU with a quarter of the batch."""
    batch, channels, side = SHAPES[shape]
    if device.type == "cpu":
        batch //= 4
        if row == "compile":
            pytest.skip("is for a GPU")
    generator = torch.Generator().manual_seed(0)

    def normal(*size):
        return torch.randn(*size, generator=generator).to(device, torch.bfloat16)

    memory_format = torch.channels_last if layout == "nhwc" else torch.contiguous_format
    x = normal(batch, channels, side, side).contiguous(memory_format=memory_format)
    weight, bias, scale, shift = normal(channels), normal(channels), normal(batch, channels), normal(batch, channels)
    args, film, out = (x, 32, weight, bias, 1e-5), {"scale": scale, "shift": shift}, torch.empty_like(x)
    compiled = torch.compile(group_norm_film_silu_ref, mode="max-autotune-no-cudagraphs", dynamic=False)
    functions = {
        "eager": lambda: group_norm_film_silu_ref(*args, **film),
        "compile": lambda: compiled(*args, **film),
        "copy": lambda: out.copy_(x),
        "ours": lambda: group_norm_film_silu(*args, **film),
    }
    exact = group_norm_film_silu_ref(
        *(a.double() if isinstance(a, torch.Tensor) else a for a in args),
        **{name: part.double() for name, part in film.items()},
    )
    ours, own = ((functions[name]() - exact).abs().max() for name in ("ours", "eager"))
    assert ours <= 2 * own + 2**-8 * exact.abs().max()
    measure(functions[row], num_bytes=2 * x.nbytes)
