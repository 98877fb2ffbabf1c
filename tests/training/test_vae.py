"""First stage: what it crops, what it exports."""

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from diffusers.models.attention_processor import Attention
from PIL import Image

from gbci_fast.data.fields import to_unit
from gbci_fast.training.stages import vae_preset
from gbci_fast.training.vae import WIDEST, VAEConfig, VAETask, build_vae

CPU = torch.device("cpu")


@pytest.fixture
def task(images):
    torch.manual_seed(0)
    return VAETask(images, VAEConfig(block_out_channels=(16, 16, 32), norm_num_groups=8, crop=32), CPU)


def test_shape_of_the_base_preset():
    with torch.device("meta"):
        vae = build_vae(vae_preset("base")[0])
        latents = vae.encode(torch.empty(1, 1, 224, 224)).latent_dist.mode()
    assert latents.shape == (1, 4, 56, 56)
    # The decoder is to stay local, so that windows of the latent can be decoded.
    assert [module for module in vae.modules() if isinstance(module, Attention)] == []


def test_the_autoencoder_is_where_it_is_trained(images):
    """`train_vae` balances initial weights before the loop, which would otherwise move the module to the device."""
    task = VAETask(images, VAEConfig(block_out_channels=(16,), norm_num_groups=8), torch.device("meta"))
    assert {parameter.device.type for parameter in task.module.parameters()} == {"meta"}


def test_loss_follows_its_generator(task):
    losses = [task.loss(3, torch.Generator().manual_seed(seed)).item() for seed in (1, 1, 2)]
    assert losses[0] == losses[1] != losses[2]


def test_crops_lie_in_the_breast(task):
    crops = task._crops(64, torch.Generator().manual_seed(0))
    assert crops.shape == (64, 1, 32, 32)
    assert crops.min() == -1  # air, in some of them
    assert crops.max() <= 1
    # every crop's center half holds breast: bright, after all augmentation
    assert (crops[:, :, 8:24, 8:24].amax((1, 2, 3)) > -0.95).all()


def test_half_of_the_crops_hold_a_lesion(images):
    """Marks lesions white and the rest gray, and counts the crops that show white in the middle."""
    marked = [
        type(item)(**{**vars(item), "image": np.where(item.any_lesion, 65535, 20000).astype(np.uint16)})
        for item in images
        if item.lesions
    ]
    task = VAETask(marked, VAEConfig(block_out_channels=(16,), norm_num_groups=8, crop=32, lesion_crops=1.0), CPU)
    crops = task._crops(64, torch.Generator().manual_seed(0))
    assert (crops.amax((1, 2, 3)) > 0.6).all()


def test_export_normalizes_the_breasts_latents(task, images, tmp_path):
    task.module.eval()
    task.export(tmp_path)
    vae = AutoencoderKL.from_pretrained(tmp_path / "vae")
    assert [path.name for path in tmp_path.iterdir()] == ["vae"]
    x = torch.stack([to_unit(item.image) for item in images])[:, None] * 2 - 1
    with torch.no_grad():
        latents = (vae.encode(x).latent_dist.mode() - vae.config.shift_factor) * vae.config.scaling_factor
    inside = torch.stack([torch.from_numpy(item.breast[2::4, 2::4].copy()) for item in images])
    values = latents.movedim(1, -1)[inside]
    assert abs(values.mean().item()) < 0.05
    assert values.std().item() == pytest.approx(1, abs=0.05)


@torch.no_grad()
def test_balancing_spreads_the_latents_and_changes_no_pixel(task, images):
    vae = task.module.eval()
    # All channels carry the gray level, and hardly anything else: what training may end in.
    mean = vae.quant_conv.weight[0].clone()
    generator = torch.Generator().manual_seed(0)
    for channel, extra in enumerate((0.0, 0.2, 0.1, 0.15)):
        vae.quant_conv.weight[channel] = mean + extra * torch.randn(mean.shape, generator=generator)
    x = torch.stack([to_unit(item.image) for item in images])[:, None] * 2 - 1
    before = vae.decode(vae.encode(x).latent_dist.mode()).sample
    assert torch.corrcoef(task._breast_latents().T).abs().min() > 0.7
    for _ in range(2):  # the second time it changes nothing
        task.balance()
        torch.testing.assert_close(vae.decode(vae.encode(x).latent_dist.mode()).sample, before, rtol=1e-3, atol=1e-4)
        values = task._breast_latents()
        spread = torch.linalg.eigvalsh(torch.cov(values.T)).sqrt()
        assert spread.max() / spread.min() == pytest.approx(WIDEST, rel=1e-3)
        assert values.mean(0).abs().max() < 1e-3 * spread.min()
        noise = vae.encode(x).latent_dist.std.unique()
        assert noise.tolist() == pytest.approx([0.01 * spread.min().item()], rel=1e-3)
        weights = [vae.quant_conv.weight.clone(), vae.post_quant_conv.weight.clone()]
    task.balance()
    for weight, part in zip(weights, (vae.quant_conv, vae.post_quant_conv), strict=True):
        torch.testing.assert_close(part.weight, weight, rtol=1e-4, atol=1e-5)


def test_a_decoder_alone_leaves_the_latents(images, tmp_path):
    torch.manual_seed(0)
    config = VAEConfig(block_out_channels=(16, 16, 32), norm_num_groups=8, crop=32, decoder_only=True)
    task = VAETask(images, config, CPU)
    task.module.register_to_config(shift_factor=0.25, scaling_factor=1.5)
    task.loss(2, torch.Generator().manual_seed(0)).backward()
    learning = {name.split(".")[0] for name, part in task.module.named_parameters() if part.grad is not None}
    assert learning == {"decoder", "post_quant_conv"}
    task.export(tmp_path)
    kept = AutoencoderKL.from_pretrained(tmp_path / "vae").config
    assert (kept.shift_factor, kept.scaling_factor) == (0.25, 1.5)


def test_export_replaces_itself(task, tmp_path):
    for _ in range(2):
        task.export(tmp_path)
    assert sorted(path.name for path in (tmp_path / "vae").iterdir()) == [
        "config.json", "diffusion_pytorch_model.safetensors",
    ]  # fmt: skip


def test_sample_sheet(task, images, tmp_path):
    task.sample_sheet(tmp_path / "sheet.png")
    columns = min(8, len(range(0, len(images), max(1, len(images) // 8))))
    sheet = np.asarray(Image.open(tmp_path / "sheet.png"))
    assert sheet.shape == (2 * 66, columns * 66)
    assert np.array_equal(sheet[1:65, 1:65], (to_unit(images[0].image) * 255).round().numpy())
