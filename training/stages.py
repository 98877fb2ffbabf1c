"""Presets, and the two entry points the command line calls."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from gbci_fast.errors import GBCIError
from gbci_fast.training.data import load_images
from gbci_fast.training.loop import LoopConfig, train
from gbci_fast.training.vae import VAEConfig, VAETask


def vae_preset(name: str) -> tuple[VAEConfig, LoopConfig]:
    """`tiny` trains in seconds on a CPU (for tests); `base` is the shipped shape."""
    if name == "tiny":
        config = VAEConfig(block_out_channels=(16, 16, 32), norm_num_groups=8, crop=64)
        loop = LoopConfig(steps=60, batch_size=4, learning_rate=2e-3, warmup=10, ema_decay=0.9, precision="fp32")
        return config, loop
    return VAEConfig(), LoopConfig(steps=8000, batch_size=8, learning_rate=5e-4, ema_decay=0.998)


def train_vae(
    roots: Sequence[Path],
    output: Path,
    *,
    preset: str,
    overrides: Mapping[str, Any],
    resume: bool,
    device: str = "auto",
) -> None:
    """Trains the autoencoder on the training split of `roots`; ``output/vae`` holds the averaged weights."""
    config, loop = vae_preset(preset)
    loop = replace(loop, **overrides)
    place = pick_device(device)
    images = load_images(roots, "training")
    torch.manual_seed(loop.seed)
    train(VAETask(images, config, place), loop, output, resume=resume, device=place)


def pick_device(name: str) -> torch.device:
    """ "auto" takes CUDA where there is one; asking for what is absent is an error."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name.split(":")[0] not in ("cpu", "cuda") or (name.startswith("cuda") and not torch.cuda.is_available()):
        raise GBCIError(f"device is {name!r}; expected 'auto', 'cpu', or 'cuda' on a machine that has it")
    return torch.device(name)
