"""Second stage: UNet and condition encoder, trained on a bank of latents."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from torch import Tensor, nn

from gbci_fast.attributes import Attributes
from gbci_fast.jobs.files import replace_folder
from gbci_fast.model.conditioning import ConditionEncoder, Conditioning
from gbci_fast.model.pipeline import GBCIPipeline
from gbci_fast.training.bank import LatentBank
from gbci_fast.training.settings import LDMConfig
from gbci_fast.training.sheets import save_sheet


def build_unet(config: LDMConfig, vae: AutoencoderKL, sample_size: int) -> UNet2DConditionModel:
    """An inpainting UNet with FiLM, and attention at all but the finest level; 9 input channels for 4 latent ones."""
    channels, latent = config.block_out_channels, vae.config.latent_channels
    attended = len(channels) - 1
    return UNet2DConditionModel(
        sample_size=sample_size,
        in_channels=2 * latent + 1,
        out_channels=latent,
        down_block_types=("DownBlock2D",) + ("CrossAttnDownBlock2D",) * attended,
        up_block_types=("CrossAttnUpBlock2D",) * attended + ("UpBlock2D",),
        block_out_channels=channels,
        layers_per_block=config.layers_per_block,
        cross_attention_dim=config.context_dim,
        # diffusers reads attention_head_dim as the number of heads.
        attention_head_dim=tuple(width // config.head_dim for width in channels),
        class_embed_type="projection",
        projection_class_embeddings_input_dim=config.pooled_dim,
        resnet_time_scale_shift="scale_shift",
        norm_num_groups=min(32, channels[0] // 2),
    )


def build_scheduler(beta_end: float = LDMConfig.beta_end) -> DDIMScheduler:
    """A DDIM scheduler with v-prediction (Salimans and Ho 2022) and the scaled-linear schedule; trailing timesteps.

    The last timestep must be almost pure noise (Lin et al. 2024). If some of the image is left in it, a model learns to
    read a large lesion's brightness from the image, which is missing in sampling. The image's amplitude is 0.006 with
    the `beta_end` of 0.025, and 0.07 with Stable Diffusion's 0.012. With a schedule rescaled to zero amplitude, the
    Euler sampler would start at 4096 standard deviations, and DDIM would be undefined at eta 1.
    """
    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=beta_end,
        prediction_type="v_prediction",
        clip_sample=False,
        timestep_spacing="trailing",
    )


def build_pipeline(config: LDMConfig, vae: AutoencoderKL, image_size: int) -> GBCIPipeline:
    """A pipeline of a trained autoencoder with a new UNet and conditioner; `image_size` is in pixels."""
    factor = 2 ** (len(vae.config.block_out_channels) - 1)
    conditioner = ConditionEncoder(
        image_size=image_size,
        width=config.context_dim,
        depth=config.vit_depth,
        report_depth=config.report_depth,
        head_dim=config.head_dim,
        pooled_dim=config.pooled_dim,
        attributes=config.attributes,
    )
    return GBCIPipeline(
        vae=vae,
        unet=build_unet(config, vae, image_size // factor),
        scheduler=build_scheduler(config.beta_end),
        conditioner=conditioner,
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class Drawn:
    """One batch.

    Attributes:
        picks: int [B], rows of the bank.
        rng: the generator for further random choices of the batch.
        latents, masked_latents: float32 [B, 4, c, c], crops.
        cells: float32 [B, 1, c, c], crops of the masks.
    """

    picks: np.ndarray
    rng: np.random.Generator
    latents: Tensor
    masked_latents: Tensor
    cells: Tensor


class LDMTask:
    """v-prediction loss with a larger weight inside the mask.

    The loss is weighted by the signal-to-noise ratio, cut at an upper bound (min-SNR, Hang et al. 2023) and at a lower
    bound (truncated SNR, Salimans and Ho 2022). Timesteps from 700 on decide the appearance of a large lesion. With the
    lower bound they have 38 % of the weight; without it, they would have less than 1 %.
    """

    def __init__(self, pipe: GBCIPipeline, bank: LatentBank, config: LDMConfig, device: torch.device):
        self.pipe, self.bank, self.config, self.device = pipe, bank, config, device
        self.module = nn.ModuleDict({"unet": pipe.unet, "conditioner": pipe.conditioner})
        self.alphas_cumprod = pipe.scheduler.alphas_cumprod.to(device)

    def draw(self, batch_size: int, generator: torch.Generator) -> Drawn:
        """A batch of random latent crops around the bank's masks; a function of the generator's state."""
        rng = np.random.default_rng(int(torch.randint(2**62, (1,), generator=generator)))
        picks = rng.integers(len(self.bank), size=batch_size)
        side = int(rng.choice(self.config.latent_crops))
        crops = [self.window(int(i), side, rng) for i in picks]
        bank = self.bank
        z, zm, cells = (
            cut(part[picks], crops).to(self.device) for part in (bank.latents, bank.masked_latents, bank.cells)
        )
        return Drawn(picks=picks, rng=rng, latents=z, masked_latents=zm, cells=cells)

    def loss(self, batch_size: int, generator: torch.Generator) -> Tensor:
        """The loss of a batch of random latent crops around the masks."""
        drawn = self.draw(batch_size, generator)
        z, zm, cells = drawn.latents, drawn.masked_latents, drawn.cells
        t = torch.randint(len(self.alphas_cumprod), (batch_size,), generator=generator).to(self.device)
        noise = torch.randn(z.shape, generator=generator).to(self.device)
        alpha = self.alphas_cumprod[t].view(-1, 1, 1, 1)
        noisy = alpha.sqrt() * z + (1 - alpha).sqrt() * noise
        target = alpha.sqrt() * noise - (1 - alpha).sqrt() * z
        condition = self.condition(drawn.picks, drawn.rng)
        predicted = self.module["unet"](
            torch.cat([noisy, cells, zm], 1),
            t,
            encoder_hidden_states=condition.tokens,
            encoder_attention_mask=condition.token_mask,
            class_labels=condition.pooled,
        ).sample.float()
        weight = 1 + self.config.roi_weight * cells
        error = ((predicted - target).square() * weight).sum((1, 2, 3)) / (weight.sum((1, 2, 3)) * z.shape[1])
        snr = (alpha / (1 - alpha)).flatten()
        return (error * snr.clamp(self.config.least_snr, self.config.most_snr) / (snr + 1)).mean()

    def sample_sheet(self, path: Path) -> None:
        """Writes a PNG of six pairs of the bank: masked image, synthesis in 10 steps, decoded original."""
        self.write_sheet(path, num_inference_steps=10)

    @torch.no_grad()
    def write_sheet(self, path: Path, **call: Any) -> None:
        """Writes the sheet of `sample_sheet`; `call` holds keyword arguments of the pipeline's call."""
        picks = [i * len(self.bank) // 6 for i in range(6)] if len(self.bank) >= 6 else list(range(len(self.bank)))
        original = self.pipe.decode_latents(self.bank.latents[picks].float().to(self.device))
        masks = self.bank.masks[picks][:, None].float()
        self.pipe.set_progress_bar_config(disable=True)
        synthetic = self.pipe(
            original,
            masks,
            attributes=[self.bank.attributes[i] for i in picks],
            report=[self.bank.reports[i] for i in picks],
            **call,
            seed=0,
            output_type="pt",
        ).images
        rows = (original.cpu() * (1 - masks), synthetic.cpu(), original.cpu())
        save_sheet(path, [row[:, 0] for row in rows])

    def export(self, folder: Path) -> None:
        """Writes the whole pipeline to ``pipeline/``, in the layout of diffusers."""
        replace_folder(folder / "pipeline", self.pipe.save_pretrained)

    def window(self, index: int, side: int, rng: np.random.Generator) -> tuple[slice, slice]:
        """The crop of a row's latent."""
        return random_window(self.bank.cells[index], side, rng)

    def condition(self, picks: np.ndarray, rng: np.random.Generator) -> Conditioning:
        """The condition of the rows `picks`: attributes and reports are dropped at random, some samples are null."""
        encoder = self.pipe.conditioner
        attributes, reports = drop(self.bank, picks, self.config, rng)
        full = condition(encoder, self.bank, picks, attributes, reports)
        null = encoder.null(len(picks), full.tokens.shape[1])
        chosen = torch.from_numpy(rng.random(len(picks)) < self.config.null_probability).to(self.device)
        return Conditioning(
            torch.where(chosen[:, None, None], null.tokens, full.tokens),
            full.token_mask | chosen[:, None],
            torch.where(chosen[:, None], null.pooled, full.pooled),
        )


def random_window(cells: Tensor, size: int, rng: np.random.Generator) -> tuple[slice, slice]:
    """A random square window of side `size`, or the whole latent if smaller.

    In 9 of 10 cases, the window holds a random cell of the mask, `cells` [1, h, w].
    """
    side = cells.shape[-1]
    size = min(size, side)
    covered = cells[0].nonzero().numpy()
    if len(covered) and rng.random() < 0.9:
        center = covered[int(rng.integers(len(covered)))]
        low = center - rng.integers(size // 4, size - size // 4, size=2)
    else:
        low = rng.integers(0, side - size + 1, size=2)
    y, x = np.clip(low, 0, side - size)
    return slice(int(y), int(y) + size), slice(int(x), int(x) + size)


def cut(rows: Tensor, windows: Sequence[tuple[slice, slice]]) -> Tensor:
    """The window of each row of [B, C, h, w], float32 [B, C, c, c]."""
    return torch.stack([row[:, y, x].float() for row, (y, x) in zip(rows, windows, strict=True)])


def condition(
    encoder: ConditionEncoder,
    bank: LatentBank,
    picks: np.ndarray,
    attributes: Sequence[Attributes],
    reports: Sequence[str | None],
) -> Conditioning:
    """The condition of the rows `picks` of a bank, with the given descriptions."""
    mask = bank.masks[picks][:, None].float().to(encoder.device)
    masked = (bank.masked_pixels[picks][:, None].float().to(encoder.device) / 127.5 - 1) * (1 - mask)
    return encoder(masked, mask, attributes, reports)


def drop(
    bank: LatentBank, picks: np.ndarray, config: LDMConfig, rng: np.random.Generator
) -> tuple[list[Attributes], list[str | None]]:
    """The descriptions of the rows `picks`; each attribute and report is left out with the probability in `config`."""
    attributes = []
    for row in picks:
        known = bank.attributes[row].to_mapping()
        unknown = {name: None for name in known if rng.random() < config.attribute_dropout}
        attributes.append(replace(bank.attributes[row], **unknown))
    return attributes, [None if rng.random() < config.report_dropout else bank.reports[row] for row in picks]
