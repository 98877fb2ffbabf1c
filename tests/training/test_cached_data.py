"""Training from a cache is training from the images: the same items, latents, losses and weights."""

import numpy as np
import pytest
import torch

from gbci_fast.cli import main
from gbci_fast.data.prepare import prepare
from gbci_fast.data.settings import PrepareSettings
from gbci_fast.errors import GBCIError
from gbci_fast.jobs.folder import PROGRESS_FOLDER
from gbci_fast.training.bank import build_bank
from gbci_fast.training.data import load_images
from gbci_fast.training.stages import vae_preset
from gbci_fast.training.vae import VAETask


@pytest.fixture(scope="module")
def cache(phantom_root, tmp_path_factory):
    output = tmp_path_factory.mktemp("cached") / "cache"
    prepare([phantom_root], output, PrepareSettings(size=64), workers=2)
    return output


def equal(first, second):
    """Whether two fields of view are the same in everything."""
    assert np.array_equal(first.image, second.image)
    assert np.array_equal(first.breast, second.breast)
    assert (first.attributes, first.patient) == (second.attributes, second.patient)
    assert [lesion.attributes for lesion in first.lesions] == [lesion.attributes for lesion in second.lesions]
    assert [lesion.report for lesion in first.lesions] == [lesion.report for lesion in second.lesions]
    assert np.array_equal(first.any_lesion, second.any_lesion)
    return True


def test_the_same_items_in_the_same_order(images, cache):
    cached = load_images([cache], size=64)
    assert len(cached) == len(images)
    assert all(equal(*pair) for pair in zip(cached, images, strict=True))
    assert isinstance(cached[0].image.base, np.memmap)


def test_roots_and_caches_mix(images, cache, phantom_root):
    mixed = load_images([cache, phantom_root, cache], size=64)
    count = len(images)
    assert len(mixed) == 3 * count
    assert all(equal(mixed[part * count + i], images[i]) for part in range(3) for i in (0, count // 2, count - 1))
    assert equal(mixed[-1], images[-1])
    picked = mixed[:: count // 2]
    assert all(equal(item, mixed[i * (count // 2)]) for i, item in enumerate(picked))
    with pytest.raises(IndexError):
        mixed[3 * count]


def test_the_same_losses(images, cache):
    config = vae_preset("tiny")[0]
    losses = []
    for items in (images, load_images([cache], size=64)):
        torch.manual_seed(0)
        task = VAETask(items, config, torch.device("cpu"))
        losses.append([task.loss(2, torch.Generator().manual_seed(step)).item() for step in range(3)])
    assert losses[0] == losses[1]
    assert len(set(losses[0])) == 3


def test_the_same_latents(images, cache, tiny_pipeline):
    pipe = tiny_pipeline()
    straight, cached = (
        build_bank(pipe, items[:4], variants=1, seed=5) for items in (images, load_images([cache], size=64))
    )
    for name in ("latents", "masked_latents", "cells", "masked_pixels", "masks"):
        assert torch.equal(getattr(straight, name), getattr(cached, name))
    assert (straight.attributes, straight.reports) == (cached.attributes, cached.reports)


def test_the_command_line_trains_to_the_same_weights(phantom_root, tmp_path):
    assert main(["prepare", str(phantom_root), "--output", str(tmp_path / "cache")]) == 0
    for name, data in (("images", phantom_root), ("cached", tmp_path / "cache")):
        options = ("--data", data, "--output", tmp_path / name, "--preset", "tiny", "--steps", 2, "--batch-size", 1)
        assert main(["train", "vae", *map(str, options)]) == 0
    straight, cached = (
        tmp_path / name / "vae" / "diffusion_pytorch_model.safetensors" for name in ("images", "cached")
    )
    assert straight.read_bytes() == cached.read_bytes()


def test_caches_that_do_not_fit_are_refused(cache, tmp_path):
    with pytest.raises(GBCIError, match=r"is a cache of 64 pixels; expected 224: prepare it with --size 224$"):
        load_images([cache])
    (tmp_path / PROGRESS_FOLDER).mkdir()
    (tmp_path / PROGRESS_FOLDER / "pixels.npy").touch()
    with pytest.raises(GBCIError, match=r"is not finished; run `gbci-fast prepare` with the same arguments"):
        load_images([tmp_path], size=64)
