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

WIDEST = 4.0  # largest ratio of the latents' standard deviations along two directions


@dataclass(frozen=True, kw_only=True)
class VAEConfig:
    """Widths of the autoencoder, its training crops, and the weights of its loss terms.

    Attributes:
        crop: side of the training crops in pixels.
        lesion_crops: share of the crops around a lesion, where the image has one.
        decoder_only: keep the encoder unchanged.
    """

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
    """An autoencoder with one image channel, stride 2^(levels - 1) and no attention.

    Without attention the decoder is local, so that windows can be decoded separately.
    """
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
    """Loss: L1 + L2 of pixels, L1 of their horizontal and vertical differences, and a small KL term.

    With `decoder_only` the latents do not change, so a diffusion model that was trained on them stays valid.
    """

    def __init__(self, images: Sequence[FieldOfView], config: VAEConfig, device: torch.device):
        self.images, self.config, self.device = images, config, device
        self.module: AutoencoderKL = build_vae(config).to(device)  # `balance` may come before the loop
        if config.decoder_only:
            for part in (self.module.encoder, self.module.quant_conv):
                part.requires_grad_(False)

    def loss(self, batch_size: int, generator: torch.Generator) -> Tensor:
        """The loss of a batch of crops [B, 1, c, c] in [-1, 1]."""
        x = self._crops(batch_size, generator).to(self.device)
        posterior = self.module.encode(x).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=generator).to(self.device)
        decoded = self.module.decode(posterior.mean + posterior.std * noise).sample.float()
        pixel = (decoded - x).abs().mean() + 2.0 * (decoded - x).square().mean()
        edge = sum((decoded.diff(dim=d) - x.diff(dim=d)).abs().mean() for d in (-1, -2))
        kl = posterior.kl().mean() / x[0].numel()
        return pixel + self.config.edge_weight * edge + self.config.kl_weight * kl

    def sample_sheet(self, path: Path) -> None:
        """Writes a PNG of eight training images above their reconstructions."""
        picks = [self.images[i] for i in range(0, len(self.images), max(1, len(self.images) // 8))][:8]
        x = torch.stack([to_unit(item.image) for item in picks])[:, None].to(self.device)
        with torch.no_grad():
            y = self.module.decode(self.module.encode(x * 2 - 1).latent_dist.mode()).sample / 2 + 0.5
        save_sheet(path, [x[:, 0].cpu(), y[:, 0].float().cpu()])

    @torch.no_grad()
    def export(self, folder: Path) -> None:
        """Writes ``vae/`` with balanced latents, `shift_factor` and `scaling_factor`.

        The factors are the latents' mean and one over their standard deviation in breasts. With `decoder_only`, latents
        and factors are kept.
        """
        if not self.config.decoder_only:
            self.balance()
            values = self._breast_latents()
            self.module.register_to_config(shift_factor=values.mean().item(), scaling_factor=1 / values.std().item())
        replace_folder(folder / "vae", self.module.save_pretrained)

    @torch.no_grad()
    def balance(self) -> None:
        """Rescales the latents so that no direction's standard deviation is below 1 / `WIDEST` of the largest.

        Reconstruction alone does not ensure this: all channels may carry the gray level, and their differences may be
        smaller than the noise at which a sampler stops. The change of basis is made in the two 1x1 convolutions around
        the latents, so that the latents decode to the same pixels. The posterior's standard deviation is reset to 1 %
        of the smallest of the latents'.
        """
        values = self._breast_latents()
        mean, covariance = values.mean(0), torch.cov(values.T)
        eigenvalues, axes = torch.linalg.eigh(covariance)
        spread = eigenvalues.clamp(min=0).sqrt()
        spread = spread.clamp(min=1e-3 * spread.max().item())  # limits the gain of a direction without signal
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
        """The posterior's means in the breasts of up to 32 images, float64 [N, C]; air, a constant, is left out."""
        picks = self.images[:: max(1, len(self.images) // 32)][:32]
        x = torch.stack([to_unit(item.image) for item in picks])[:, None].to(self.device) * 2 - 1
        latents = torch.cat([self.module.encode(part).latent_dist.mode() for part in x.split(8)]).double()
        inside = torch.stack([torch.from_numpy(item.breast) for item in picks])[:, None].float().to(self.device)
        height, width = latents.shape[-2:]
        inside = torch.nn.functional.adaptive_avg_pool2d(inside, (height, width))[:, 0] > 0.5
        return latents.movedim(1, -1)[inside]

    def _crops(self, batch_size: int, generator: torch.Generator) -> Tensor:
        """Random augmented crops [B, 1, c, c] in [-1, 1] around pixels of breasts or, for `lesion_crops`, lesions."""
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
