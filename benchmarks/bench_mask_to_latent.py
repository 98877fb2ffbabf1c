"""mask_to_latent against the functions of gbci_fast.model.masks and a bounding box in PyTorch.

Bytes are those of the mask read and of the two planes written.
"""

import pytest
import torch

from gbci_fast.model.masks import feather_latent_mask, latent_mask
from gbci_fast.ops.mask_to_latent import mask_to_latent

SIZE, FACTOR = 224, 4
HALO = 2


def eager(mask):
    """`mask_to_latent` for a whole batch at once, without a loop over its samples."""
    cells = latent_mask(mask.float(), FACTOR)
    weight = feather_latent_mask(cells, 1)
    edges = []
    for axis in (2, 1):
        inside = (weight[:, 0] > 0).any(3 - axis).byte()  # [B, cells along the axis]
        size = inside.shape[1]
        first = (inside.argmax(1) - HALO).clamp(min=0)
        last = (size - inside.flip(1).argmax(1) + HALO).clamp(max=size)
        edges.append(torch.stack([first, last]) * inside.any(1))
    (xmin, xmax), (ymin, ymax) = edges
    return cells, weight, torch.stack([xmin, ymin, xmax, ymax], 1)


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32], ids=["bool", "float32"])
@pytest.mark.parametrize("batch", [1, 64])
@pytest.mark.parametrize("row", ["eager", "ours"])
def bench_mask_to_latent(measure, device, row, batch, dtype):
    mask = torch.zeros(batch, 1, SIZE, SIZE, dtype=dtype, device=device)
    mask[..., 100:118, 60:78] = 1  # a lesion of median size
    functions = {"eager": lambda: eager(mask), "ours": lambda: mask_to_latent(mask, FACTOR, feather=1, halo=HALO)}
    assert all(map(torch.equal, functions["ours"](), eager(mask)))
    cells = batch * (SIZE // FACTOR) ** 2
    measure(functions[row], num_bytes=mask.numel() * mask.element_size() + 8 * cells)
