"""Distillation: the low-rank student, its loss against known functions, a run and what it leaves."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from gbci_fast.cli import main
from gbci_fast.errors import GBCIError
from gbci_fast.model.pipeline import GBCIPipeline
from gbci_fast.training.bank import BANK_FILE, build_bank
from gbci_fast.training.data import augment
from gbci_fast.training.distill import (
    DistillConfig,
    DistillTask,
    conditions,
    low_rank_change,
    paint_trajectories,
    train_distill,
    with_low_rank,
)
from gbci_fast.training.ldm import LDMConfig

SIZE = 64
SAMPLING = LDMConfig()
CONFIG = DistillConfig(rank=4, solver_steps=8, latent_crop=8)


@pytest.fixture
def teacher(tiny_pipeline):
    return tiny_pipeline(SIZE)


@pytest.fixture
def bank(teacher, images):
    made = build_bank(teacher, images[:4], 1, 0)
    return paint_trajectories(teacher, made, CONFIG, seed=3)


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
        """At every student's timestep: the pipeline sees the image itself, the bank its latents in float16."""
        teacher.set_progress_bar_config(disable=True)
        whole = paint_trajectories(teacher, bank, replace(CONFIG, latent_crop=16, guidance=3.0), seed=3)
        assert whole.states.shape == (4, 5, 4, 16, 16)

        def distance(row, **changes):
            """Largest RMS distance of the states to what the pipeline is at, over what it is at."""
            seen = []
            pixels = augment(images[row], np.random.default_rng((0, row, 0))).image / np.float32(65535)
            given = {"attributes": bank.attributes[row], "report": bank.reports[row], "guidance_scale": 3.0}
            teacher(
                pixels,
                bank.masks[row].numpy().astype(np.float32),
                num_inference_steps=8,
                seed=3 + row,
                output_type="latent",
                callback_on_step_end=lambda pipe, step, t, tensors: seen.append(tensors["latents"][0]) or {},
                **(given | changes),
            )
            pairs = zip(whole.states[row, 1:], seen[1::2], strict=True)
            return max(((state - painted).square().mean().sqrt() / painted.std()).item() for state, painted in pairs)

        for row in range(2):
            assert distance(row) < 0.003
            assert distance(row, attributes=None, report=None) > 0.006
            assert distance(row, guidance_scale=1.0) > 0.006

    def test_they_do_not_depend_on_the_batch(self, teacher, bank):
        again, other = (paint_trajectories(teacher, bank, CONFIG, seed=seed, batch_size=3) for seed in (3, 4))
        torch.testing.assert_close(again.states, bank.states, rtol=0, atol=1e-4)
        assert torch.equal(again.corners, bank.corners)
        assert not torch.allclose(other.states, bank.states, atol=0.1)


class _Straight(torch.nn.Module):
    """The velocity with which a DDIM step of the student lands on the bank's next state.

    Clean latents under the mask are `off` away.
    """

    def __init__(self, task, off=0.0):
        super().__init__()
        self.task, self.off, self.told = task, off, []

    def forward(self, sample, timesteps, class_labels, **_):
        bank, scheduler = self.task.bank, self.task.pipe.scheduler
        found = []
        for given, timestep, told in zip(sample, timesteps, class_labels, strict=True):
            leap = scheduler.timesteps.tolist().index(int(timestep))
            apart = (bank.states[:, leap] - given[:4]).abs().amax((1, 2, 3))
            row = int(apart.argmin())
            assert apart[row] == 0
            y, x = bank.corners[row]
            for part, channels in ((bank.cells, given[4:5]), (bank.masked_latents, given[5:])):
                assert torch.equal(part[row, :, y : y + 8, x : x + 8].float(), channels)
            self.told.append((row, told))
            # A step is linear in the velocity: its results for 0 and 1 give the velocity that leads to the state.
            zero, one = (
                scheduler.step(torch.full_like(given[:4], v), timestep, given[:4]).prev_sample for v in (0.0, 1.0)
            )
            exact = (bank.states[row, leap + 1] - zero) / (one - zero)
            found.append(exact + self.off * given[4:5] / (1 - scheduler.alphas_cumprod[timestep]).sqrt())
        return type("Output", (), {"sample": torch.stack(found)})


class TestLoss:
    def test_a_student_that_lands_where_the_teacher_does_has_none(self, task):
        unet = task.module["unet"] = _Straight(task)
        assert task.loss(8, torch.Generator().manual_seed(1)).item() < 1e-3
        assert len({row for row, _ in unet.told}) > 1
        for row, told in unet.told:
            expected = conditions(task.teacher, task.bank, np.array([row])).pooled[0]
            torch.testing.assert_close(told, expected)

    def test_another_answer_has_its_distance_heavier_under_the_mask(self, task):
        task.module["unet"] = _Straight(task, off=0.5)
        drawn = task.draw(8, torch.Generator().manual_seed(1))
        covered = drawn.cells.mean((1, 2, 3))
        share = (1 + SAMPLING.roi_weight) * covered / (1 + SAMPLING.roi_weight * covered)
        distance = (0.5**2 + CONFIG.huber**2) ** 0.5 - CONFIG.huber
        expected = (share * distance).mean().item()
        assert task.loss(8, torch.Generator().manual_seed(1)).item() == pytest.approx(expected, rel=0.01)

    def test_a_batch_is_a_function_of_the_seed(self, task):
        losses = [task.loss(4, torch.Generator().manual_seed(seed)).item() for seed in (5, 5, 6)]
        assert losses[0] == losses[1] != losses[2]


class TestRun:
    def test_a_run_resumes_and_leaves_a_pipeline_for_few_steps(self, teacher, phantom_root, tmp_path, capsys):
        teacher.save_pretrained(tmp_path / "teacher")
        arguments = ["train", "distill", "--data", str(phantom_root), "--teacher", str(tmp_path / "teacher")]
        arguments += ["--output", str(tmp_path / "run"), "--preset", "tiny", "--latent-crop", "8", "--steps", "3"]
        assert main([*arguments, "--rank", "2"]) == 0
        painted = (tmp_path / "run" / BANK_FILE).stat().st_mtime_ns
        assert main([*arguments, "--rank", "2"]) == 1
        assert "pass --resume" in capsys.readouterr().err
        assert main([*arguments, "--rank", "3", "--resume"]) == 1
        assert "rank 2, not 3" in capsys.readouterr().err
        assert main([*arguments, "--rank", "2", "--resume"]) == 0
        assert (tmp_path / "run" / BANK_FILE).stat().st_mtime_ns == painted
        assert main([*arguments, "--rank", "2", "--solver-steps", "20", "--resume"]) == 1
        assert "solver_steps 8, not 20" in capsys.readouterr().err
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
        for steps in (10, 24, 2000):
            with pytest.raises(
                GBCIError, match=f"solver_steps is {steps}; expected a multiple of the student's 4 that"
            ):
                train_distill(
                    [phantom_root], tmp_path / "run", teacher=tmp_path / "teacher", solver_steps=steps, **given
                )
        with pytest.raises(GBCIError, match=r"guidance is 0.5; expected at least 1"):
            train_distill([phantom_root], tmp_path / "run", teacher=tmp_path / "teacher", guidance=0.5, **given)
