"""The scorer's training: it learns from masked pixels only, and refuses data that it cannot use."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from gbci_fast.attributes import Attributes
from gbci_fast.cli import main
from gbci_fast.errors import GBCIError
from gbci_fast.evaluate.lesions import crop_lesions
from gbci_fast.evaluate.scorer import cut_windows, load_scorer
from gbci_fast.training.classifier import ClassifierConfig, ClassifierTask, choose_tasks, prepare_examples
from gbci_fast.training.loop import LoopConfig, train
from gbci_fast.training.stages import classifier_preset

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def lesions(square):
    """`lesions(count, seed=0)`: malignant ones are striped, benign ones flat; the background says nothing, and every
    second lesion is large."""

    def make(count, seed=0):
        rng, cases = np.random.default_rng(seed), []
        for i in range(count):
            malignant, side = bool(i % 2), (12, 30)[i // 2 % 2]
            case = square(side=side, patient=f"set/{i}")
            size = case.mask.shape
            stripes = 15000 * (np.arange(size[1]) // 2 % 2) if malignant else 0
            inside = np.broadcast_to(30000 + stripes, size)
            image = np.where(case.mask, inside, rng.integers(10000, 40000)) + rng.integers(-800, 800, size)
            birads = 5 if malignant else 2
            cases.append(
                replace(
                    case,
                    image=image.astype(np.uint16),
                    attributes=Attributes(finding_birads=birads, pathology="malignant" if malignant else "benign"),
                )
            )
        return cases

    return make


@pytest.fixture(scope="module")
def scorer(lesions, tmp_path_factory):
    config = replace(classifier_preset("tiny")[0], fewest=10)
    cases = lesions(40)
    scored = choose_tasks(cases, [], fewest=10, data="d", channels=config.channels)
    torch.manual_seed(0)
    task = ClassifierTask(prepare_examples(cases, scored), scored, config, CPU)
    loop = LoopConfig(steps=120, batch_size=16, learning_rate=5e-3, warmup=5, ema_decay=0.9, precision="fp32")
    folder = tmp_path_factory.mktemp("classifier")
    train(task, loop, folder, resume=False, device=CPU)
    return load_scorer(folder / "scorer")


class TestLearning:
    def test_a_planted_difference_is_found_in_other_lesions(self, lesions, scorer):
        assert scorer.config.tasks == ("birads_high", "malignancy", "size")
        cases = lesions(24, seed=1)
        found = scorer.predict(crop_lesions(cases), cut_windows(cases))
        for task, expected in {"malignancy": [0, 1], "size": [0, 0, 1, 1]}.items():
            truth = np.resize(expected, len(cases))
            assert ((found[task] > 0.5) == truth).mean() > 0.85, task

    def test_counts_are_in_the_config(self, scorer):
        assert scorer.config.counts["malignancy"] == {"real": [20, 20], "phantom": [0, 0]}
        assert scorer.config.median_diameter == pytest.approx((12 + 30) / np.sqrt(np.pi))


class TestTasks:
    def test_too_few_lesions_of_a_class_make_no_task_unless_phantoms_help(self, lesions):
        cases = [
            replace(case, attributes=replace(case.attributes, pathology="benign")) if i > 2 else case
            for i, case in enumerate(lesions(20))
        ]
        options = {"fewest": 5, "data": "", "channels": (8, 16)}
        assert "malignancy" not in choose_tasks(cases, [], **options).tasks
        helped = choose_tasks(cases, lesions(20), **options)
        assert helped.counts["malignancy"] == {"real": [19, 1], "phantom": [10, 10]}

    def test_none_at_all_is_one_sentence(self, lesions):
        with pytest.raises(GBCIError, match="no task has 30 lesions of both classes among 4; expected more data"):
            choose_tasks(lesions(4), [], fewest=30, data="", channels=(8, 16))


class TestLoss:
    @pytest.fixture
    def task(self, lesions):
        cases = lesions(8)
        scored = choose_tasks(cases, [], fewest=2, data="", channels=(8, 16))
        return ClassifierTask(prepare_examples(cases, scored), scored, ClassifierConfig(channels=(8, 16)), CPU)

    def test_unknown_truths_pull_at_nothing(self, task):
        task.examples.truths[:, :2] = torch.nan
        torch.manual_seed(0)
        task.loss(8, torch.Generator().manual_seed(0)).backward()
        assert task.module.roi_head.weight.grad.abs().max() == 0
        assert task.module.window_head.weight.grad.abs().max() > 0

    def test_a_batch_follows_from_its_generator(self, task):
        task.module.eval()
        one, two, three = (task.loss(8, torch.Generator().manual_seed(seed)).item() for seed in (0, 0, 1))
        assert one == two != three

    def test_augmented_masks_change_and_none_is_empty(self, task):
        masks = task.examples.masks[:, None] > 0.5
        found = task._jitter(masks, torch.Generator().manual_seed(0))
        assert found.any(-1).any(-1).all()
        assert len({int(a.sum()) - int(b.sum()) for a, b in zip(found, masks, strict=True)}) > 2

    def test_rotations_and_flips_keep_distances(self, task):
        grid = task._grid(16, 0.0, torch.Generator().manual_seed(0))
        across, down = grid[:, 0, 1] - grid[:, 0, 0], grid[:, 1, 0] - grid[:, 0, 0]
        torch.testing.assert_close(across.norm(dim=1), down.norm(dim=1))
        assert (across * down).sum(1).abs().max() < 1e-5


class TestCommand:
    def test_a_phantom_root_trains_and_resumes(self, phantom_root, tmp_path, capsys):
        command = ["train", "classifier", "--data", str(phantom_root), "--output", str(tmp_path / "run")]
        command += ["--preset", "tiny", "--batch-size", "4"]
        assert main([*command, "--steps", "2"]) == 0
        assert load_scorer(tmp_path / "run" / "scorer").config.fold == "-"
        assert main([*command, "--steps", "2"]) == 1
        assert "is not empty; pass --resume" in capsys.readouterr().err
        assert main([*command, "--steps", "2", "--resume"]) == 0
