"""Second stage: the bank of latents, what the loss sees of it, exact resume of the real task."""

import os
import signal
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from gbci_fast.errors import GBCIError
from gbci_fast.model.masks import latent_mask
from gbci_fast.model.pipeline import GBCIPipeline
from gbci_fast.training.bank import BANK_FILE, build_bank, kept_bank
from gbci_fast.training.ldm import LDMConfig, LDMTask, build_scheduler, drop
from gbci_fast.training.loop import STATE_FILE, LoopConfig, train
from gbci_fast.training.stages import ldm_preset

CPU = torch.device("cpu")
CONFIG = replace(ldm_preset("tiny")[0], latent_crops=(8,), variants=2)


@pytest.fixture(scope="session")
def fresh_pipe(tiny_pipeline):
    """Called: an untrained pipeline, whose autoencoder stays as it is."""

    def make():
        made = tiny_pipeline()
        made.vae.requires_grad_(False)
        return made

    return make


@pytest.fixture(scope="module")
def bank(fresh_pipe, images):
    return build_bank(fresh_pipe(), images, CONFIG.variants, seed=5)


@pytest.fixture
def task(fresh_pipe, bank):
    return LDMTask(fresh_pipe(), bank, CONFIG, CPU)


def test_bank_is_a_function_of_its_seed(fresh_pipe, bank, images):
    again, other = (build_bank(fresh_pipe(), images, CONFIG.variants, seed=seed) for seed in (5, 6))
    for name in ("latents", "masked_latents", "cells", "masked_pixels", "masks"):
        assert torch.equal(getattr(again, name), getattr(bank, name)), name
        assert not torch.equal(getattr(other, name), getattr(bank, name)), name
    assert (again.attributes, again.reports) == (bank.attributes, bank.reports)


def test_bank_entries_do_not_depend_on_how_many_there_are(fresh_pipe, bank, images):
    """The first variant of every image is the same when more are asked for."""
    short = build_bank(fresh_pipe(), images, 1, seed=5)
    n = len(images)
    assert len(short) == n == len(bank) // 2
    assert torch.equal(short.masks, bank.masks[:n])
    assert torch.equal(short.masked_pixels, bank.masked_pixels[:n])
    assert not torch.equal(bank.masks[:n], bank.masks[n:])


def test_bank_of_fewer_pairs_leaves_no_image_behind(fresh_pipe, bank, images):
    for limit in (len(images) - 1, len(images) + 2, 2 * len(images)):
        some = build_bank(fresh_pipe(), images, CONFIG.variants, seed=5, limit=limit)
        rows = [next(i for i, mask in enumerate(bank.masks) if torch.equal(mask, found)) for found in some.masks]
        assert len(set(rows)) == len(rows) == limit
        counts = np.bincount([row % len(images) for row in rows], minlength=len(images))
        assert counts.max() - counts.min() <= 1


def test_bank_is_kept(bank, tmp_path):
    made = []

    def make():
        made.append(bank)
        return bank

    origin = {"seed": 5, "channels": (8, 16)}
    bank = replace(bank, states=torch.randn(len(bank), 3, 4, 16, 16))
    assert kept_bank(tmp_path, origin, make) is bank
    again = kept_bank(tmp_path, origin, make)
    assert len(made) == 1
    for name in ("latents", "masked_latents", "cells", "masked_pixels", "masks", "states"):
        assert torch.equal(getattr(again, name), getattr(bank, name)), name
    assert (again.attributes, again.reports) == (bank.attributes, bank.reports)
    assert kept_bank(tmp_path, origin | {"seed": 6}, make) is bank
    (tmp_path / BANK_FILE).write_bytes(b"junk")
    with pytest.raises(GBCIError, match=r"bank.pt is damaged \(\w+\); delete it"):
        kept_bank(tmp_path, origin, make)


def test_two_do_not_make_one_bank(bank, tmp_path):
    def make():
        with pytest.raises(GBCIError, match="is in use by another run"):
            kept_bank(tmp_path / "run", {"seed": 5}, lambda: pytest.fail("made twice"))
        return bank

    assert kept_bank(tmp_path / "run", {"seed": 5}, make) is bank
    assert [path.name for path in (tmp_path / "run").iterdir()] == [BANK_FILE]


def test_bank_is_consistent(bank):
    count = len(bank)
    assert bank.latents.shape == bank.masked_latents.shape == (count, 4, 16, 16)
    assert bank.latents.dtype == torch.float16
    assert torch.equal(bank.cells.float(), latent_mask(bank.masks[:, None].float(), 4))
    # under the mask the image is middle gray, as the pipeline makes it
    assert (bank.masked_pixels[bank.masks] == 128).all()
    differs = (bank.latents - bank.masked_latents).abs().amax((1, 2, 3)) > 0
    assert differs.all()


def test_bank_encodes_as_the_pipeline_does(fresh_pipe, bank):
    pixels = bank.masked_pixels[:, None].float() / 127.5 - 1
    pixels[bank.masks[:, None]] = 0
    encoded = fresh_pipe().encode_image(pixels)
    error = (encoded - bank.masked_latents.float()).abs().mean() / encoded.std()
    assert error < 0.02  # 8-bit pixels here, bf16 arithmetic there


def test_crops_hold_the_mask(task):
    rng = np.random.default_rng(0)
    hits = 0
    for i in range(len(task.bank)):
        for _ in range(20):
            y, x = task.window(i, 8, rng)
            assert y.stop - y.start == x.stop - x.start == 8
            assert min(y.start, x.start) >= 0
            assert max(y.stop, x.stop) <= 16
            hits += bool(task.bank.cells[i, 0, y, x].any())
    assert hits > 0.85 * 20 * len(task.bank)


def test_a_crop_of_the_whole_latent_is_the_latent(task):
    assert task.window(0, 16, np.random.default_rng(0)) == (slice(0, 16), slice(0, 16))


def test_each_batch_takes_one_of_the_sides(fresh_pipe, bank):
    task = LDMTask(fresh_pipe(), bank, replace(CONFIG, latent_crops=(8, 12, 16)), CPU)
    shapes = [task.draw(3, torch.Generator().manual_seed(seed)).latents.shape for seed in range(40)]
    assert set(shapes) == {(3, 4, side, side) for side in (8, 12, 16)}


def test_loss_follows_its_generator_and_reaches_every_weight(fresh_pipe, bank):
    # the phantom states no ages
    aged = [replace(attributes, age=40.0 + i) for i, attributes in enumerate(bank.attributes)]
    task = LDMTask(fresh_pipe(), replace(bank, attributes=aged), CONFIG, CPU)
    losses = [task.loss(4, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)]
    assert losses[0].item() == losses[1].item() != losses[2].item()
    assert 0 < losses[0].item() < 10
    losses[0].backward()
    # A drawn batch may have no sample with a report, or none that is null; over a few batches everything learns.
    for seed in range(2, 8):
        task.loss(8, torch.Generator().manual_seed(seed)).backward()
    still = [name for name, p in task.module.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert still == []
    assert all(p.grad is None for p in task.pipe.vae.parameters())


def test_loss_of_a_perfect_prediction_is_zero(task, monkeypatch):
    """v-prediction: v = sqrt(alpha) noise - sqrt(1 - alpha) z, checked by giving the answer away."""
    given = {}

    class Oracle(torch.nn.Module):
        def forward(self, x, t, **condition):
            noisy, cells, _ = x.split([4, 1, 4], 1)
            assert set(cells.unique().tolist()) <= {0.0, 1.0}
            alpha = task.pipe.scheduler.alphas_cumprod[t].view(-1, 1, 1, 1)
            z = given["z"]
            noise = (noisy - alpha.sqrt() * z) / (1 - alpha).sqrt()
            return type("Output", (), {"sample": alpha.sqrt() * noise - (1 - alpha).sqrt() * z + given["error"]})

    task.module["unet"] = Oracle()
    original = task.window

    def recorded(index, side, rng):
        y, x = original(index, side, rng)
        given.setdefault("parts", []).append(task.bank.latents[index, :, y, x].float())
        given["z"] = torch.stack(given["parts"])
        return y, x

    monkeypatch.setattr(task, "window", recorded)
    given["error"] = 0.0
    assert task.loss(4, torch.Generator().manual_seed(0)).item() < 1e-4
    given.clear()
    given["error"] = 1.0
    # an error of 1 everywhere leaves the mean of the weights, whatever the mask
    loss = task.loss(4, torch.Generator().manual_seed(0)).item()
    generator = torch.Generator().manual_seed(0)
    torch.randint(2**62, (1,), generator=generator)
    alpha = task.pipe.scheduler.alphas_cumprod[torch.randint(1000, (4,), generator=generator)]
    snr = alpha / (1 - alpha)
    assert loss == pytest.approx((snr.clamp(1, 5) / (snr + 1)).mean().item(), rel=1e-3)


def test_null_contexts_are_drawn_and_whole(task):
    task.config = replace(CONFIG, null_probability=0.5)
    picks = np.arange(len(task.bank))
    condition = task.condition(picks, np.random.default_rng(0))
    null = (condition.tokens == task.pipe.conditioner.null_token).all((1, 2))
    assert 0.2 < null.float().mean() < 0.8
    assert (condition.pooled[null] == task.pipe.conditioner.null_pooled).all()
    assert condition.token_mask[null].all()


def test_attributes_and_reports_are_dropped_one_by_one(bank):
    rng = np.random.default_rng(0)
    row = next(i for i, item in enumerate(bank.attributes) if item.finding_birads is not None and bank.reports[i])
    attributes, reports = drop(bank, np.full(400, row), CONFIG, rng)
    kept = {name: sum(name in item.to_mapping() for item in attributes) for name in bank.attributes[row].to_mapping()}
    assert all(0.78 < count / 400 < 0.92 for count in kept.values())  # 0.85 are to stay
    assert set(reports) == {bank.reports[row], None}
    assert 0.62 < sum(report is not None for report in reports) / 400 < 0.78  # 0.7


def test_healthy_stays_healthy_or_becomes_unknown(bank):
    row = next(i for i, item in enumerate(bank.attributes) if item.finding_categories == ())
    attributes, _ = drop(bank, np.full(60, row), CONFIG, np.random.default_rng(0))
    assert {item.finding_categories for item in attributes} == {(), None}


def test_scheduler_starts_at_the_last_timestep():
    scheduler = build_scheduler()
    scheduler.set_timesteps(4)
    assert scheduler.timesteps.tolist() == [999, 749, 499, 249]
    assert scheduler.config.prediction_type == "v_prediction"


def test_the_last_timestep_holds_hardly_anything_of_the_image():
    scheduler = build_scheduler()
    noise = torch.randn(1, 4, 24, 24, generator=torch.Generator().manual_seed(0))
    last = scheduler.add_noise(torch.ones_like(noise), noise, torch.tensor([999]))
    # The mean of a lesion of 24 x 24 latents, one standard deviation off: far less than that of as much noise.
    assert (last - noise).mean().abs() < 0.2 / 24


@pytest.mark.parametrize(
    ("given", "complaint"),
    [
        ({"variants": 0}, "variants is 0; expected at least 1"),
        ({"latent_crops": (8, 0)}, "latent_crops are [8, 0]; expected one or more, each at least 1"),
        ({"latent_crops": ()}, "latent_crops are []; expected one or more, each at least 1"),
    ],
)
def test_configuration_is_checked(given, complaint):
    with pytest.raises(GBCIError) as raised:
        LDMConfig(**given)
    assert str(raised.value) == complaint


def test_resume_is_exact(fresh_pipe, bank, tmp_path):
    config = LoopConfig(steps=6, batch_size=2, warmup=2, learning_rate=1e-3, ema_decay=0.9, precision="fp32", seed=3)

    def run(folder, *, resume=False, stop_at=None):
        task = LDMTask(fresh_pipe(), bank, CONFIG, CPU)
        task.sample_sheet = lambda path: None
        if stop_at is not None:
            task.loss = _interrupted(task.loss, stop_at)
        return train(task, config, tmp_path / folder, resume=resume, device=CPU)

    run("straight")
    with pytest.raises(KeyboardInterrupt):
        run("cut", stop_at=3)
    run("cut", resume=True)
    first, second = (torch.load(tmp_path / name / STATE_FILE, weights_only=True) for name in ("straight", "cut"))
    for part in ("module", "ema"):
        assert [name for name in first[part] if not torch.equal(first[part][name], second[part][name])] == []
    for key, moments in first["optimizer"]["state"].items():
        assert all(torch.equal(value, second["optimizer"]["state"][key][name]) for name, value in moments.items())
    files = ("unet", "conditioner", "vae")
    for name in files:
        weights = [next((tmp_path / run / "pipeline" / name).glob("*.safetensors")) for run in ("straight", "cut")]
        assert weights[0].read_bytes() == weights[1].read_bytes()


def _interrupted(loss, call):
    """`loss`, sending SIGINT to this process during its `call`-th call."""
    count = 0

    def counted(*args):
        nonlocal count
        count += 1
        if count == call:
            os.kill(os.getpid(), signal.SIGINT)
        return loss(*args)

    return counted


def test_sheet_and_export(task, tmp_path):
    task.pipe.unet.eval()
    task.pipe.conditioner.eval()
    task.sample_sheet(tmp_path / "sheet.png")
    assert np.asarray(Image.open(tmp_path / "sheet.png")).shape == (3 * 66, 6 * 66)
    task.export(tmp_path)
    loaded = GBCIPipeline.from_pretrained(tmp_path / "pipeline")
    for name in ("unet", "conditioner", "vae"):
        ours, theirs = getattr(task.pipe, name).state_dict(), getattr(loaded, name).state_dict()
        assert all(torch.equal(value, theirs[key]) for key, value in ours.items())
