"""First stage: the autoencoder, trained on random crops inside the breast."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor

from gbci_fast.data.fields import FieldOfView, to_unit
from gbci_fast.jobs.files import replace_folder
from gbci_fast.training.sheets import save_sheet

WIDEST = 4.0  # spread of the latents in the direction in which they spread most, over that in any other


@dataclass(frozen=True, kw_only=True)
class VAEConfig:
    """Widths of the autoencoder and weights of its loss terms."""

    block_out_channels: tuple[int, ...] = (32, 64, 112)
    layers_per_block: int = 1
    latent_channels: int = 4
    norm_num_groups: int = 16
    crop: int = 96
    lesion_crops: float = 0.5
    edge_weight: float = 0.5
    kl_weight: float = 1e-6
    decoder_only: bool = False


def build_vae(config: VAEConfig) -> AutoencoderKL:
    """One channel, stride 2^(levels - 1), no attention: the decoder stays local, so that windows can be decoded."""
    levels = len(config.block_out_channels)
    return AutoencoderKL(
        in_channels=1,
        out_channels=1,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=config.block_out_channels,
        layers_per_block=config.layers_per_block,
        latent_channels=config.latent_channels,
        norm_num_groups=config.norm_num_groups,
        sample_size=224,
        mid_block_add_attention=False,
    )


class VAETask:
    """Loss: L1 + L2 of pixels, L1 of their horizontal and vertical differences, and a faint KL term.

    With `decoder_only` the latents stay as they are, and so a diffusion model that was trained on them stays valid.
    """

    def __init__(self, images: Sequence[FieldOfView], config: VAEConfig, device: torch.device):
        self.images, self.config, self.device = images, config, device
        self.module: AutoencoderKL = build_vae(config).to(device)  # `balance` may come before the loop
        if config.decoder_only:
            for part in (self.module.encoder, self.module.quant_conv):
                part.requires_grad_(False)

    def loss(self, batch_size: int, generator: torch.Generator) -> Tensor:
        """One batch of crops [B, 1, c, c] in [-1, 1]."""
        x = self._crops(batch_size, generator).to(self.device)
        posterior = self.module.encode(x).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=generator).to(self.device)
        decoded = self.module.decode(posterior.mean + posterior.std * noise).sample.float()
        pixel = (decoded - x).abs().mean() + 2.0 * (decoded - x).square().mean()
        edge = sum((decoded.diff(dim=d) - x.diff(dim=d)).abs().mean() for d in (-1, -2))
        kl = posterior.kl().mean() / x[0].numel()
        return pixel + self.config.edge_weight * edge + self.config.kl_weight * kl

    def sample_sheet(self, path: Path) -> None:
        """Eight training images above their reconstructions."""
        picks = [self.images[i] for i in range(0, len(self.images), max(1, len(self.images) // 8))][:8]
        x = torch.stack([to_unit(item.image) for item in picks])[:, None].to(self.device)
        with torch.no_grad():
            y = self.module.decode(self.module.encode(x * 2 - 1).latent_dist.mode()).sample / 2 + 0.5
        save_sheet(path, [x[:, 0].cpu(), y[:, 0].float().cpu()])

    @torch.no_grad()
    def export(self, folder: Path) -> None:
        """Writes ``vae/``: its latents balanced, their own mean and spread as `shift_factor` and `scaling_factor`."""
        if not self.config.decoder_only:
            self.balance()
            values = self._breast_latents()
            self.module.register_to_config(shift_factor=values.mean().item(), scaling_factor=1 / values.std().item())
        replace_folder(folder / "vae", self.module.save_pretrained)

    @torch.no_grad()
    def balance(self) -> None:
        """Spreads the latents: in no direction less than 1 / `WIDEST` of how far they spread in the widest.

        Reconstruction alone leaves that open: all channels may carry the gray level, and what tells them apart be less
        than the noise at which a sampler stops. A change of basis inside the two 1x1 convolutions around the latents
        mends it, and decodes to the same pixels. The posterior's own spread starts anew, at 1 % of the narrowest.
        """
        values = self._breast_latents()
        mean, covariance = values.mean(0), torch.cov(values.T)
        eigenvalues, axes = torch.linalg.eigh(covariance)
        spread = eigenvalues.clamp(min=0).sqrt()
        spread = spread.clamp(min=1e-3 * spread.max().item())  # a dead direction is not blown up to a live one
        wanted = spread.clamp(min=spread.max().item() / WIDEST)
        gain, count = wanted / spread, len(mean)
        before, after = self.module.quant_conv, self.module.post_quant_conv
        assert before is not None, "build_vae makes both"
        assert after is not None
        assert before.bias is not None
        assert after.bias is not None
        weight, bias = before.weight[:count, :, 0, 0].double(), before.bias[:count].double()
        spreading, back = (axes * gain) @ axes.T, (axes / gain) @ axes.T
        before.weight[:count, :, 0, 0] = (spreading @ weight).to(before.weight.dtype)
        before.bias[:count] = (spreading @ (bias - mean)).to(before.bias.dtype)
        before.weight[count:] = 0.0
        before.bias[count:] = 2 * math.log(0.01 * wanted.min().item())
        weight = after.weight[:, :, 0, 0].double()
        after.bias += (weight @ mean).to(after.bias.dtype)
        after.weight[:, :, 0, 0] = (weight @ back).to(after.weight.dtype)

    def _breast_latents(self) -> Tensor:
        """float64 [N, C]: the posterior's means in the breasts of 32 images; air is one constant vector."""
        picks = self.images[:: max(1, len(self.images) // 32)][:32]
        x = torch.stack([to_unit(item.image) for item in picks])[:, None].to(self.device) * 2 - 1
        latents = torch.cat([self.module.encode(part).latent_dist.mode() for part in x.split(8)]).double()
        inside = torch.stack([torch.from_numpy(item.breast) for item in picks])[:, None].float().to(self.device)
        height, width = latents.shape[-2:]
        inside = torch.nn.functional.adaptive_avg_pool2d(inside, (height, width))[:, 0] > 0.5
        return latents.movedim(1, -1)[inside]

    def _crops(self, batch_size: int, generator: torch.Generator) -> Tensor:
        """Random crops, centered on a breast pixel; half of them on a lesion pixel where the image has one."""
        rng = np.random.default_rng(int(torch.randint(2**62, (1,), generator=generator)))
        size, out = self.config.crop, []
        for _ in range(batch_size):
            item = self.images[int(rng.integers(len(self.images)))]
            use_lesion = item.lesions and rng.random() < self.config.lesion_crops
            ys, xs = np.nonzero(item.any_lesion if use_lesion else item.breast)
            pick = int(rng.integers(len(ys)))
            limit = item.image.shape[0] - size
            y = int(np.clip(ys[pick] - size // 2 + rng.integers(-size // 4, size // 4 + 1), 0, limit))
            x = int(np.clip(xs[pick] - size // 2 + rng.integers(-size // 4, size // 4 + 1), 0, limit))
            crop = to_unit(item.image[y : y + size, x : x + size])
            crop = crop.flip(int(rng.integers(2))) if rng.random() < 0.5 else crop
            gamma, gain = float(np.exp(rng.uniform(-0.2, 0.2))), float(rng.uniform(0.85, 1.1))
            out.append((gain * crop**gamma).clamp(0, 1))
        return torch.stack(out)[:, None] * 2 - 1
