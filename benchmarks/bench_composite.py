"""composite against the same in eager PyTorch, image by image where the windows have different sizes; bytes are those
of the native pixels read and written, of the weights and of the model images."""

import pytest
import torch
import torch.nn.functional as F

from gbci_fast.model.masks import feather_pixels
from gbci_fast.ops.composite import WHITE, composite

SIZE = 224


def eager_native(originals, weights, synthetic, template, affine):
    """A resampling grid per window, and a pass over memory per operation."""
    painted = []
    for i, (original, weight) in enumerate(zip(originals, weights, strict=True)):
        scale_x, offset_x, scale_y, offset_y = affine[i]
        y, x = (torch.arange(size, dtype=torch.float64, device=weight.device) + 0.5 for size in original.shape)
        y, x = (2 * (scale_y * y + offset_y) / SIZE - 1).float(), (2 * (scale_x * x + offset_x) / SIZE - 1).float()
        grid = torch.stack([x.expand(original.shape), y[:, None].expand(original.shape)], -1)[None]
        change = F.grid_sample(
            synthetic[i : i + 1] - template[i : i + 1],
            grid,
            mode="bicubic",
            padding_mode="border",
            align_corners=False,
        )
        white = WHITE[original.dtype]
        unit = (original.float() / white + weight * change[0, 0]).clamp(0, 1)
        levels = unit if white == 1 else (unit * white).round().to(original.dtype)
        painted.append(torch.where(weight == 0, original, levels))
    return painted


@pytest.mark.parametrize("dtype", [torch.uint16, torch.float32], ids=["uint16", "float32"])
@pytest.mark.parametrize("row", ["eager", "ours", "ours_flat"])
def bench_composite_native(measure, device, row, dtype):
    """32 lesions on a native grid 20 times as fine as the model's, where the change is painted.

    `ours` takes and gives a list of images, `ours_flat` their pixels one after the other.
    """
    generator = torch.Generator().manual_seed(0)
    sizes = torch.randint(360, 441, (32, 2), generator=generator).tolist()
    synthetic, template = torch.rand(2, 32, 1, SIZE, SIZE, generator=generator).to(device)
    originals, weights = [], []
    for height, width in sizes:
        y, x = (torch.linspace(-1, 1, side) for side in (height, width))
        depth = (1 - (y[:, None] ** 2 + x**2).sqrt()) * height / 2  # of an ellipse that fills its window
        weights.append((depth / 20).clamp(0, 1).to(device))
        unit = torch.rand(height, width, generator=generator)
        originals.append((unit * WHITE[dtype]).to(dtype).to(device))
    affine = [(0.05, 60.3, -0.05, 150.8)] * len(sizes)
    pixels, weight = (torch.cat([image.flatten() for image in images]) for images in (originals, weights))
    options = {"template": template, "affine": affine}
    functions = {
        "eager": lambda: eager_native(originals, weights, synthetic, template, affine),
        "ours": lambda: composite(originals, weights, synthetic, **options),
        "ours_flat": lambda: composite(pixels, weight, synthetic, sizes=sizes, **options),
    }
    for ours, eager in zip(functions["ours"](), functions["eager"](), strict=True):
        assert (ours.double() - eager.double()).abs().max() <= 1e-4 * WHITE[dtype]
    assert torch.equal(functions["ours_flat"](), torch.cat([image.flatten() for image in functions["ours"]()]))
    model_bytes = 2 * 4 * 23 * 23 * len(sizes)
    measure(functions[row], num_bytes=pixels.numel() * (4 + 2 * dtype.itemsize) + model_bytes)


@pytest.mark.parametrize("mask", ["lesion", "dense"])
@pytest.mark.parametrize("row", ["eager", "ours"])
def bench_composite_model(measure, device, row, mask):
    """A batch in model space, where the grids are one."""
    shape = (64, 1, SIZE, SIZE)
    generator = torch.Generator().manual_seed(0)
    originals, synthetic = torch.rand(2, *shape, generator=generator).to(device)
    masks = torch.zeros(shape)
    masks[..., 100:118, 60:78] = 1  # of median size
    weights = (feather_pixels(masks, 2) if mask == "lesion" else torch.rand(shape, generator=generator)).to(device)
    functions = {
        "eager": lambda: torch.where(weights == 0, originals, torch.lerp(originals, synthetic, weights)),
        "ours": lambda: composite(originals, weights, synthetic),
    }
    torch.testing.assert_close(functions["ours"](), functions["eager"](), rtol=0, atol=2e-7)
    read = int((weights > 0).sum())  # of the synthesis
    measure(functions[row], num_bytes=4 * (3 * originals.numel() + read))
