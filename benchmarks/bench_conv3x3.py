"""conv3x3 against oneDNN's convolution; GFLOP/s count the multiplications and additions of the definition."""

import pytest
import torch

from gbci_fast.ops.conv3x3 import conv3x3, conv3x3_ref, conv3x3_weight

SHAPES = {  # batch, channels in, out, size
    "unet_56": (16, 64, 64, 56),
    "unet_28": (16, 128, 128, 28),
    "unet_14": (16, 192, 192, 14),
    "unet_14_joined": (16, 384, 192, 14),
    "vae_224": (2, 32, 32, 224),
    "vae_56": (2, 128, 128, 56),
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("row", ["eager", "ours"])
def bench_conv3x3(measure, device, row, shape):
    if device.type != "cpu":
        pytest.skip("is for the CPU")
    batch, channels, out_channels, size = SHAPES[shape]
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, channels, size, size, generator=generator)
    weight = torch.randn(out_channels, channels, 3, 3, generator=generator) / channels**0.5
    bias, filters = torch.randn(out_channels, generator=generator), conv3x3_weight(weight)
    num_flops = 2 * 9 * batch * channels * out_channels * size**2
    if row == "eager":
        measure(lambda: conv3x3_ref(x, weight, bias), num_flops=num_flops)
    else:
        measure(lambda: conv3x3(x, filters, bias, out_channels), num_flops=num_flops)
