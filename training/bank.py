"""The training data of the diffusion stages: latents of (image, mask) pairs, encoded once and kept on disk."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gbci_fast.attributes import Attributes
from gbci_fast.data.fields import FieldOfView, to_unit
from gbci_fast.errors import GBCIError
from gbci_fast.jobs.files import atomically, locked
from gbci_fast.model.masks import latent_mask
from gbci_fast.model.pipeline import GBCIPipeline
from gbci_fast.training.data import augment, draw_mask
from gbci_fast.training.progress import counting
from gbci_fast.training.ranks import is_first

BANK_FILE = "bank.pt"
ENCODED = 16  # pairs encoded together
BANK_FORMAT = 3  # to be raised when a change of the code changes the bank of an equal origin


@dataclass(frozen=True, kw_only=True)
class LatentBank:
    """M encoded (image, mask) pairs, from which batches are drawn.

    Attributes:
        latents, masked_latents: float16 [M, 4, h, w], scaled.
        cells: uint8 [M, 1, h, w], the mask at latent resolution.
        masked_pixels: uint8 [M, S, S], the masked image, 0 to 255.
        masks: bool [M, S, S].
        attributes, reports: M descriptions of what is under the mask.
        states: float32 [M, K + 1, 4, c, c], for distillation: windows of the teacher's latents, from noise to clean.
        corners: int64 [M, 2], the windows' first cells (y, x).
    """

    latents: Tensor
    masked_latents: Tensor
    cells: Tensor
    masked_pixels: Tensor
    masks: Tensor
    attributes: list[Attributes]
    reports: list[str | None]
    states: Tensor | None = None
    corners: Tensor | None = None

    def __len__(self) -> int:
        return len(self.attributes)


@torch.no_grad()
def build_bank(
    pipe: GBCIPipeline,
    images: Sequence[FieldOfView],
    variants: int,
    seed: int,
    precision: str = "fp32",
    limit: int | None = None,
) -> LatentBank:
    """Augments every image `variants` times, draws a mask each time, and encodes the image with and without the mask.

    Args:
        pipe: its autoencoder encodes.
        images: fields of view.
        variants: pairs per image.
        seed: of augmentation and masks.
        precision: "fp32" or "bf16".
        limit: largest number of pairs, spread evenly over the images; None = no limit.
    """
    device, factor = pipe.vae.device, pipe.vae_scale_factor
    if precision == "bf16":  # 1.4 times as fast in bf16 on a CPU; the UNet would be slower
        pipe.vae.to(memory_format=torch.channels_last)
    jobs = [(index, variant) for variant in range(variants) for index in range(len(images))]
    if limit is not None and limit < len(jobs):
        whole, rest = divmod(limit, len(images))
        chosen = np.random.default_rng(seed).permutation(len(images))[:rest]
        jobs = jobs[: whole * len(images)] + [(int(index), whole) for index in np.sort(chosen)]
    columns: dict[str, list[Tensor]] = {name: [] for name in ("z", "zm", "cells", "pixels", "masks")}
    attributes: list[Attributes] = []
    reports: list[str | None] = []
    batches = [jobs[i : i + ENCODED] for i in range(0, len(jobs), ENCODED)]
    with counting("encoding latents", len(batches)) as advance:
        for batch in batches:
            pixels, masks = [], []
            for index, variant in batch:
                rng = np.random.default_rng((seed, index, variant))
                item = augment(images[index], rng)
                mask, described, report = draw_mask(item, rng)
                pixels.append(to_unit(item.image))
                masks.append(torch.from_numpy(np.ascontiguousarray(mask)))
                attributes.append(described)
                reports.append(report)
            x = torch.stack(pixels)[:, None].to(device) * 2 - 1
            m = torch.stack(masks)[:, None].to(device)
            masked = x * ~m
            with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
                columns["z"].append(pipe.encode_image(x).half().cpu())
                columns["zm"].append(pipe.encode_image(masked).half().cpu())
            columns["cells"].append(latent_mask(m.float(), factor).byte().cpu())
            columns["pixels"].append(((masked[:, 0] + 1) * 127.5).round().byte().cpu())
            columns["masks"].append(m[:, 0].cpu())
            advance()
    tensors = {name: torch.cat(parts) for name, parts in columns.items()}
    return LatentBank(
        latents=tensors["z"],
        masked_latents=tensors["zm"],
        cells=tensors["cells"],
        masked_pixels=tensors["pixels"],
        masks=tensors["masks"],
        attributes=attributes,
        reports=reports,
    )


def kept_bank(folder: Path, origin: Mapping[str, Any], make: Callable[[], LatentBank]) -> LatentBank:
    """The bank of `BANK_FILE` in `folder` if its origin is the same; else ``make()``, which takes minutes, and is kept.

    Args:
        folder: of the training run.
        origin: everything that decides the bank, as values that torch can save.
        make: builds the bank.

    Raises:
        GBCIError: the file is damaged, or another run is making a bank in `folder`.
    """
    path, origin = folder / BANK_FILE, {"format": BANK_FORMAT, **origin}
    if path.exists():
        try:
            kept = torch.load(path, weights_only=True, mmap=True)
            if kept.pop("origin") == origin:
                kept["attributes"] = [Attributes.from_mapping(mapping) for mapping in kept["attributes"]]
                return LatentBank(**kept)
            del kept
        except (MemoryError, OSError):
            raise
        except Exception as error:  # torch raises half a dozen types for a damaged file
            raise GBCIError(f"{path} is damaged ({type(error).__name__}); delete it") from error
    if not is_first():
        return make()
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder):
        bank = make()
        parts = {field.name: getattr(bank, field.name) for field in fields(bank)}
        attributes = [attributes.to_mapping() for attributes in bank.attributes]
        kept = parts | {"attributes": attributes, "origin": origin}
        atomically(path, lambda temporary: torch.save(kept, temporary))
    return bank
