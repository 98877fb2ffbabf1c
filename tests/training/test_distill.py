"""Distillation: the low-rank student, its loss against known functions, a run and what it leaves."""

import numpy as np
import pytest
import torch

from gbci_fast.cli import main
from gbci_fast.errors import GBCIError
from gbci_fast.pipeline import GBCIPipeline
from gbci_fast.training.distill import (
    DistillConfig,
    DistillTask,
    low_rank_change,
    train_distill,
    with_low_rank,
)
from gbci_fast.training.ldm import LDMConfig, build_bank, build_pipeline
from gbci_fast.training.stages import ldm_preset, vae_preset
from gbci_fast.training.vae import build_vae

SIZE = 64
SAMPLING = LDMConfig(variants=1, latent_crop=8)


@pytest.fixture
def teacher():
    torch.manual_seed(0)
    return build_pipeline(ldm_preset("tiny")[0], build_vae(vae_preset("tiny")[0]), SIZE)


@pytest.fixture
def task(teacher, images):
    bank = build_bank(teacher, images[:4], 1, 0)
    return DistillTask(teacher, bank, SAMPLING, DistillConfig(rank=4), torch.device("cpu"))


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
        change = low_rank_change(student, DistillConfig(rank=4, guidance=2.5, solver_steps=25))
        assert (change.config.guidance_scale, change.config.solver_steps) == (2.5, 25)
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


class _Ideal(torch.nn.Module):
    """The velocity that leads every noisy latent to ``clean(timesteps)``."""

    def __init__(self, task, clean):
        super().__init__()
        self.alphas, self.clean = task.alphas_cumprod, clean

    def forward(self, sample, timesteps, **_):
        alpha = self.alphas[timesteps].view(-1, 1, 1, 1)
        latents = sample[:, :4]
        velocity = (alpha.sqrt() * latents - self.clean(timesteps).view(-1, 1, 1, 1)) / (1 - alpha).sqrt()
        return type("Output", (), {"sample": velocity})


class TestLoss:
    def test_one_answer_along_the_trajectory_has_none(self, task):
        ideal = _Ideal(task, lambda timesteps: 0.3 + 0.0 * timesteps)
        task.module["unet"], task.teacher.unet = ideal, ideal
        assert task.loss(8, torch.Generator().manual_seed(1)).item() < 1e-3

    def test_another_answer_at_the_next_timestep_has_one(self, task):
        task.teacher.unet = _Ideal(task, lambda timesteps: 0.3 + 0.0 * timesteps)
        task.module["unet"] = _Ideal(task, lambda timesteps: 1.0 - 2.0 * (timesteps // 20 % 2))
        # Two apart: a pseudo-Huber loss of about 2 - 0.1.
        assert task.loss(8, torch.Generator().manual_seed(1)).item() > 1

    def test_guidance_is_the_teachers(self, task, monkeypatch):
        seen = []
        stock = task.teacher.unet.forward
        monkeypatch.setattr(task.teacher.unet, "forward", lambda *a, **k: seen.append(k) or stock(*a, **k))
        task.loss(2, torch.Generator().manual_seed(0))
        tokens = [call["encoder_hidden_states"] for call in seen]
        null = task.module["conditioner"].null(2, tokens[0].shape[1]).tokens
        assert len(tokens) == 2
        assert [torch.equal(part, null) for part in tokens] == [True, False]

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
        assert "solver_steps 50, not 20" in capsys.readouterr().err
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
        with pytest.raises(GBCIError, match=r"guidance is 0.5; expected at least 1"):
            train_distill([phantom_root], tmp_path / "run", teacher=tmp_path / "teacher", guidance=0.5, **given)
