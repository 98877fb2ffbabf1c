"""Distillation: the low-rank student, its loss against known functions, a run and what it leaves."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from gbci_fast.cli import main
from gbci_fast.errors import GBCIError
from gbci_fast.pipeline import GBCIPipeline
from gbci_fast.training.bank import BANK_FILE, build_bank
from gbci_fast.training.data import augment
from gbci_fast.training.distill import (
    DistillConfig,
    DistillTask,
    low_rank_change,
    paint_states,
    train_distill,
    with_low_rank,
)
from gbci_fast.training.ldm import LDMConfig, build_pipeline
from gbci_fast.training.stages import ldm_preset, vae_preset
from gbci_fast.training.vae import build_vae

SIZE = 64
SAMPLING = LDMConfig(latent_crop=8)
CONFIG = DistillConfig(rank=4, solver_steps=8)


@pytest.fixture
def teacher():
    torch.manual_seed(0)
    return build_pipeline(ldm_preset("tiny")[0], build_vae(vae_preset("tiny")[0]), SIZE)


@pytest.fixture
def bank(teacher, images):
    made = build_bank(teacher, images[:4], 1, 0)
    return replace(made, states=paint_states(teacher, made, CONFIG, seed=3))


@pytest.fixture
def task(teacher, bank):
    return DistillTask(teacher, bank, SAMPLING, CONFIG, torch.device("cpu"))


def call(unet, seed=0):
    generator = torch.Generator().manual_seed(seed)
    sizes = {"sample": (2, 9, 8, 8), "encoder_hidden_states": (2, 3, unet.config.cross_attention_dim)}
    given = {name: torch.randn(size, generator=generator) for name, size in sizes.items()}
    labels = torch.randn(2, unet.config.projection_class_embeddings_input_dim, generator=generator)
    with torch.no_grad():
        return unet(**given, timestep=torch.tensor([3, 500]), class_labels=labels).sample


def disturb(student):
    for name, parameter in student.named_parameters():
        if name.endswith(".up"):
            parameter.data.normal_(0, 0.1)


class TestLowRank:
    def test_the_student_starts_as_the_teacher(self, teacher):
        student = with_low_rank(teacher.unet, rank=4)
        torch.testing.assert_close(call(student), call(teacher.unet), rtol=0, atol=0)

    def test_the_change_makes_a_stock_unet_the_same_function(self, teacher):
        student = with_low_rank(teacher.unet, rank=4)
        disturb(student)
        change = low_rank_change(student, DistillConfig(rank=4, guidance=2.5))
        assert (change.config.guidance_scale, change.config.steps) == (2.5, 4)
        assert change.dtype == torch.float16
        stock = change.apply_to(teacher.unet)
        assert set(stock.state_dict()) == set(teacher.unet.state_dict())
        assert not torch.allclose(call(stock), call(teacher.unet), atol=1e-3)
        torch.testing.assert_close(call(stock), call(student), rtol=0, atol=5e-3)  # float16

    def test_only_the_change_learns(self, task):
        task.loss(2, torch.Generator().manual_seed(0)).backward()
        moved = {name for name, part in task.module.named_parameters() if part.grad is not None and part.grad.any()}
        assert moved
        assert all(name.endswith((".up", ".down")) for name in moved)


class TestTrajectories:
    def test_they_are_what_the_pipeline_paints(self, teacher, images, bank):
        """At every student's timestep, and of every row alone: the pipeline sees the image, the bank its latents."""
        teacher.set_progress_bar_config(disable=True)
        for row in range(2):
            seen = []

            def keep(pipe, step, timestep, tensors, seen=seen):
                # The bank's latents are rounded to float16; the pipeline has to start from the same.
                seen.append(tensors["latents"])

            rng = np.random.default_rng((0, row, 0))
            pixels = augment(images[row], rng).image / np.float32(65535)
            teacher(
                pixels,
                bank.masks[row].numpy().astype(np.float32),
                bank.attributes[row],
                bank.reports[row],
                num_inference_steps=8,
                guidance_scale=3.0,
                seed=3 + row,
                output_type="latent",
                callback_on_step_end=keep,
            )
            assert bank.states.shape[1:] == (5, 4, 16, 16)
            for state, painted in zip(bank.states[row, 1:], seen[1::2], strict=True):
                error = (state - painted[0]).square().mean().sqrt() / painted.std()
                assert error < 0.01
            assert (bank.states[row, -1] - seen[0][0]).square().mean().sqrt() > 0.1

    def test_they_do_not_depend_on_the_batch(self, teacher, bank):
        again = paint_states(teacher, bank, CONFIG, seed=3, batch_size=3)
        torch.testing.assert_close(again, bank.states, rtol=0, atol=1e-4)
        assert not torch.allclose(paint_states(teacher, bank, CONFIG, seed=4), bank.states, atol=0.1)

    def test_guidance_is_the_teachers(self, teacher, bank):
        plain = paint_states(teacher, bank, replace(CONFIG, guidance=1.0), seed=3)
        assert not torch.allclose(plain, bank.states, atol=1e-3)


class _Straight(torch.nn.Module):
    """The velocity with which a DDIM step of the student lands on the bank's next state, less ``off`` clean latents."""

    def __init__(self, task, off=0.0):
        super().__init__()
        self.task, self.off = task, off

    def forward(self, sample, timesteps, **_):
        states, scheduler = self.task.bank.states, self.task.pipe.scheduler
        found = []
        for latents, timestep in zip(sample[:, :4], timesteps, strict=True):
            leap = scheduler.timesteps.tolist().index(int(timestep))
            row = (states[:, leap] - latents).flatten(1).abs().amax(1).argmin()
            alpha = scheduler.alphas_cumprod[timestep]
            # A step is linear in the velocity: from where it lands with 0 and with 1, what lands on the state.
            zero, one = (scheduler.step(torch.full_like(latents, v), timestep, latents).prev_sample for v in (0.0, 1.0))
            found.append((states[row, leap + 1] - zero) / (one - zero) + self.off / (1 - alpha).sqrt())
        return type("Output", (), {"sample": torch.stack(found)})


class TestLoss:
    @pytest.fixture
    def whole(self, teacher, bank):
        return DistillTask(teacher, bank, LDMConfig(latent_crop=16), CONFIG, torch.device("cpu"))

    def test_a_student_that_lands_where_the_teacher_does_has_none(self, whole):
        whole.module["unet"] = _Straight(whole)
        assert whole.loss(8, torch.Generator().manual_seed(1)).item() < 1e-3

    def test_another_answer_has_its_distance(self, whole):
        whole.module["unet"] = _Straight(whole, off=0.5)
        expected = (0.5**2 + CONFIG.huber**2) ** 0.5 - CONFIG.huber
        assert whole.loss(8, torch.Generator().manual_seed(1)).item() == pytest.approx(expected, abs=1e-2)

    def test_a_batch_is_a_function_of_the_seed(self, task):
        losses = [task.loss(4, torch.Generator().manual_seed(seed)).item() for seed in (5, 5, 6)]
        assert losses[0] == losses[1] != losses[2]


class TestRun:
    def test_a_run_resumes_and_leaves_a_pipeline_for_few_steps(self, teacher, phantom_root, tmp_path, capsys):
        teacher.save_pretrained(tmp_path / "teacher")
        arguments = ["train", "distill", "--data", str(phantom_root), "--teacher", str(tmp_path / "teacher")]
        arguments += ["--output", str(tmp_path / "run"), "--preset", "tiny", "--latent-crop", "8", "--steps", "3"]
        assert main([*arguments, "--rank", "2"]) == 0
        assert main([*arguments, "--rank", "2"]) == 1
        assert "pass --resume" in capsys.readouterr().err
        assert main([*arguments, "--rank", "3", "--resume"]) == 1
        assert "rank 2, not 3" in capsys.readouterr().err
        assert main([*arguments, "--rank", "2", "--resume"]) == 0
        assert main([*arguments, "--rank", "2", "--solver-steps", "20", "--resume"]) == 1
        assert "solver_steps 8, not 20" in capsys.readouterr().err
        assert (tmp_path / "run" / BANK_FILE).is_file()
        pipe = GBCIPipeline.from_pretrained(tmp_path / "run" / "pipeline")
        kept = teacher.unet.state_dict()
        assert all(torch.equal(value, kept[name]) for name, value in pipe.unet.state_dict().items())
        assert pipe.few_step.get_submodule("conv_in").up.shape == (32, 2)
        student = pipe.few_step_pipeline()
        student.set_progress_bar_config(disable=True)
        image, mask = np.full((SIZE, SIZE), 0.5, np.float32), np.zeros((SIZE, SIZE), np.float32)
        mask[20:40, 20:40] = 1
        out = student(image, mask, num_inference_steps=4, guidance_scale=1.0, seed=0, output_type="np").images
        assert np.isfinite(out).all()

    def test_what_cannot_be_distilled_is_one_sentence(self, teacher, phantom_root, tmp_path):
        teacher.scheduler.register_to_config(prediction_type="epsilon")
        teacher.save_pretrained(tmp_path / "teacher")
        given = {"preset": "tiny", "overrides": {}, "resume": False}
        with pytest.raises(GBCIError, match="predicts epsilon; expected v_prediction"):
            train_distill([phantom_root], tmp_path / "run", teacher=tmp_path / "teacher", **given)
        with pytest.raises(GBCIError, match="rank is 0; expected at least 1"):
            train_distill([phantom_root], tmp_path / "run", teacher=tmp_path / "teacher", rank=0, **given)
        with pytest.raises(GBCIError, match="solver_steps is 10; expected a multiple of 4, the student's"):
            train_distill([phantom_root], tmp_path / "run", teacher=tmp_path / "teacher", solver_steps=10, **given)
        with pytest.raises(GBCIError, match=r"guidance is 0.5; expected at least 1"):
            train_distill([phantom_root], tmp_path / "run", teacher=tmp_path / "teacher", guidance=0.5, **given)
