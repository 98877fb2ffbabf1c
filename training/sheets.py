"""Contact sheets of gray images."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from gbci_fast.jobs.files import atomically


def save_sheet(path: Path, rows: Sequence[torch.Tensor]) -> None:
    """Writes rows of images, each float [N, H, W] in [0, 1], as one gray PNG with gaps of two pixels."""
    lines = []
    for row in rows:
        tiles = [np.pad(tile.clamp(0, 1).numpy(), 1) for tile in row]
        lines.append(np.concatenate(tiles, axis=1))
    sheet = (np.concatenate(lines, axis=0) * 255).round().astype(np.uint8)
    atomically(path, lambda temporary: Image.fromarray(sheet).save(temporary, format="PNG"))
