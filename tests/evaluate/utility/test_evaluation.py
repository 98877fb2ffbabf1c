"""Utility: planted data and nulls, equal compute, statistics against plain code, and that a stopped run goes on."""

import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.metrics import balanced_accuracy_score, roc_auc_score
from torch.optim.optimizer import register_optimizer_step_post_hook

from gbci_fast.data.folds import patient_fold
from gbci_fast.data.vindr import VinDr
from gbci_fast.errors import GBCIError
from gbci_fast.evaluate.painting import PaintSettings
from gbci_fast.evaluate.utility.evaluation import (
    ARMS,
    TRIVIAL,
    Painter,
    Run,
    UtilityData,
    UtilitySettings,
    evaluate_utility,
    phases_of,
    planned_runs,
    share_of_patients,
    summarize,
    train_arms,
)
from gbci_fast.evaluate.utility.figure import draw_figure
from gbci_fast.evaluate.utility.patch_classifier import (
    PatchClassifier,
    PatchSet,
    classify,
    fit_patch_classifier,
    flip,
    vary,
)
from gbci_fast.evaluate.utility.patches import PATCH_SIZE, Patches
from gbci_fast.phantom import generate_phantom

TINY = UtilitySettings(seeds=2, fractions=(50, 100), train_steps=3, train_batch=4, synthetic_count=3)


def patches(count, seed, lesion=False, patients=10):
    """Noise of any brightness, with or without a blob in the middle that random filters do not see."""
    rng = np.random.default_rng(seed)
    x = rng.uniform(0.2, 0.7, (count, 1, 1)) + rng.normal(0, 0.05, (count, PATCH_SIZE, PATCH_SIZE))
    if lesion:
        y, z = np.mgrid[:PATCH_SIZE, :PATCH_SIZE] - (PATCH_SIZE - 1) / 2
        x += 0.2 * np.exp(-(y**2 + z**2) / (2 * 5**2))
    return Patches(pixels=x.clip(0, 1).astype(np.float32), patients=tuple(f"p{i % patients}" for i in range(count)))


def planted(count, seed):
    return PatchSet(lesions=patches(count, seed, lesion=True), normal=patches(count, seed + 1))


@pytest.fixture(scope="module")
def data():
    trivial = {name: planted(30, 60 + 2 * i) for i, name in enumerate(TRIVIAL)}
    return UtilityData(real=planted(30, 0), synthetic=planted(30, 10), trivial=trivial, test=planted(30, 20))


def auc(logits, test):
    return roc_auc_score([1] * len(test.lesions) + [0] * len(test.normal), logits)


class TestPlantedData:
    def aucs(self, data, arm, seeds):
        settings = UtilitySettings(seeds=seeds, fractions=(100,), train_steps=36, train_batch=16)
        found = []
        for run in planned_runs(settings):
            if run.arm == arm:
                model = fit_patch_classifier(phases_of(run, data, settings), seed=run.seed, batch_size=16)
                found.append(auc(classify(model, data.test.lesions + data.test.normal), data.test))
        return np.array(found)

    def test_synthetic_lesions_that_are_like_real_ones_train_as_well(self, data):
        real, synthetic = self.aucs(data, "real", seeds=1), self.aucs(data, "synthetic", seeds=1)
        assert real.min() > 0.9
        assert np.abs(synthetic - real).max() < 0.1

    def test_synthetic_lesions_in_which_nothing_was_painted_train_nothing(self, data):
        nothing = PatchSet(lesions=patches(30, 30), normal=patches(30, 31))
        assert abs(self.aucs(replace(data, synthetic=nothing), "synthetic", seeds=2).mean() - 0.5) < 0.25

    def test_synthetic_lesions_help_where_the_real_ones_show_nothing(self, data):
        blind = replace(data, real=PatchSet(lesions=patches(8, 40), normal=patches(8, 41)))
        assert self.aucs(blind, "real_synthetic", seeds=1).min() > 0.8


class TestEqualCompute:
    def test_every_arm_takes_as_many_steps_over_as_many_patches(self, data, tmp_path, monkeypatch):
        counted = {"steps": 0, "patches": 0}
        forward = PatchClassifier.forward

        def counting(self, x):
            counted["patches"] += len(x) if self.training else 0
            return forward(self, x)

        monkeypatch.setattr(PatchClassifier, "forward", counting)
        hook = register_optimizer_step_post_hook(lambda *_: counted.update(steps=counted["steps"] + 1))
        seen = {}
        try:
            for run in planned_runs(replace(TINY, seeds=1)):
                counted.update(steps=0, patches=0)
                fit_patch_classifier(phases_of(run, data, TINY), seed=0, batch_size=TINY.train_batch)
                seen[run] = dict(counted)
        finally:
            hook.remove()
        assert {run.arm for run in seen} == set(ARMS)
        assert all(one == {"steps": 3, "patches": 12} for one in seen.values()), seen

    def test_arms_see_what_they_say(self, data):
        def lesions(arm):
            run = Run(arm=arm, fraction=None if arm in ("synthetic", *TRIVIAL) else 50, seed=0)
            return [(len(phase.data.lesions), len(phase.data.normal)) for phase in phases_of(run, data, TINY)]

        assert lesions("real") == lesions("augmented") == [(15, 15)]
        assert lesions("real_normal") == [(15, 45)]
        assert lesions("synthetic") == [(30, 30)]
        assert lesions("real_synthetic") == [(45, 45)]
        assert lesions("real_blob") == [(45, 45)]
        for arm in TRIVIAL:
            assert lesions(arm) == [(30, 30)]
            (phase,) = phases_of(Run(arm=arm, fraction=None, seed=0), data, TINY)
            assert phase.data is data.trivial[arm]
        for arm, augment in (("real", flip), ("augmented", vary)):
            assert phases_of(Run(arm=arm, fraction=50, seed=0), data, TINY)[0].augment is augment

    def test_shares_are_of_patients_and_nested(self, data):
        small, large = (share_of_patients(data.real, percent, seed=3) for percent in (20, 50))
        assert len({*small.lesions.patients}) == 2
        assert len({*large.lesions.patients}) == 5
        assert {*small.lesions.patients} < {*large.lesions.patients}
        assert {*small.lesions.patients} == {*small.normal.patients}
        others = [share_of_patients(data.real, 20, seed).lesions for seed in range(3)]
        assert any({*other.patients} != {*small.lesions.patients} for other in others)


class TestResuming:
    def test_kept_trainings_are_not_repeated_and_other_ones_are_not_taken(self, data, tmp_path, monkeypatch):
        calls = []

        def train(phases, *, seed, batch_size):
            calls.append(seed)
            return fit_patch_classifier(phases, seed=seed, batch_size=batch_size)

        monkeypatch.setattr("gbci_fast.evaluate.utility.evaluation.fit_patch_classifier", train)
        one = replace(TINY, seeds=1, fractions=(50,), train_steps=2)
        first = train_arms(data, one, folder=tmp_path)
        assert len(calls) == len(ARMS) == len(list(tmp_path.iterdir()))
        again = train_arms(data, replace(one, seeds=2), folder=tmp_path)
        assert calls[len(ARMS) :] == [1] * len(ARMS)  # the second seed alone
        for run, logits in first.items():
            np.testing.assert_array_equal(again[run], logits)
        calls.clear()
        train_arms(replace(data, synthetic=planted(5, 50)), one, folder=tmp_path)
        assert len(calls) == 3  # the arms that train on it: real_normal, real_synthetic and synthetic
        train_arms(data, replace(one, train_steps=3), folder=tmp_path)
        assert len(calls) == 3 + len(ARMS)

    def test_damaged_scores_are_named(self, data, tmp_path):
        one = replace(TINY, seeds=1, fractions=(50,), train_steps=2)
        train_arms(data, one, folder=tmp_path)
        path = next(tmp_path.iterdir())
        path.write_text("{")
        with pytest.raises(GBCIError, match=rf"{path.name} cannot be read as the scores of a training; remove it"):
            train_arms(data, one, folder=tmp_path)
        path.write_text('{"logits": [1, 2]}')
        with pytest.raises(GBCIError, match=r"holds scores of shape \(2,\); expected 60"):
            train_arms(data, one, folder=tmp_path)


class TestStatistics:
    def rows(self, scores, test, settings):
        return {(row["arm"], row["fraction"]): row for row in summarize(scores, test, settings)}

    def scores(self, test, settings, effect=1.0):
        rng = np.random.default_rng(1)
        truth = np.r_[np.ones(len(test.lesions)), np.zeros(len(test.normal))]
        return {run: effect * truth - 0.4 + rng.normal(size=len(truth)) for run in planned_runs(settings)}

    def test_means_are_those_of_scikit_learn(self, data):
        scores = self.scores(data.test, TINY)
        rows = self.rows(scores, data.test, TINY)
        labels = [1] * 30 + [0] * 30
        for (arm, fraction), row in rows.items():
            runs = [logits for run, logits in scores.items() if (run.arm, run.fraction) == (arm, fraction)]
            assert row["auc"]["mean"] == pytest.approx(np.mean([roc_auc_score(labels, one) for one in runs]))
            accuracy = np.mean([balanced_accuracy_score(labels, one > 0) for one in runs])
            assert row["balanced_accuracy"]["mean"] == pytest.approx(accuracy)
            assert row["auc"]["low"] < row["auc"]["mean"] < row["auc"]["high"]

    def test_equal_arms_differ_by_nothing_at_all(self, data):
        scores = self.scores(data.test, TINY)
        for run in scores:
            if run.arm == "real_blob":
                scores[run] = scores[Run(arm="real", fraction=run.fraction, seed=run.seed)]
        rows = self.rows(scores, data.test, TINY)
        difference = rows["real_blob", 50]["auc_difference"]
        assert [difference[key] for key in ("mean", "low", "high", "seed_sd")] == [0, 0, 0, 0]
        assert rows["real", 50]["auc_difference"] is rows["synthetic", None]["auc_difference"] is None

    def test_a_planted_gain_is_found(self, data):
        scores = self.scores(data.test, TINY)
        for run in scores:
            if run.arm == "augmented":
                scores[run] = scores[run] + np.r_[np.ones(30), np.zeros(30)] * 2
        assert self.rows(scores, data.test, TINY)["augmented", 100]["auc_difference"]["low"] > 0

    def test_patients_who_repeat_themselves_widen_the_interval(self):
        wide, narrow = [], []
        for patients, found in ((5, wide), (60, narrow)):
            lesions, normal = patches(60, 0, patients=patients), patches(60, 1, patients=patients)
            test = PatchSet(lesions=lesions, normal=normal)
            rng = np.random.default_rng(2)
            own = rng.normal(size=patients)
            patient = np.array([int(name[1:]) for name in lesions.patients + normal.patients])
            sign = np.r_[np.ones(60), -np.ones(60)]
            settings = replace(TINY, seeds=1)
            scores = {run: sign * own[patient] + 0.1 * rng.normal(size=120) for run in planned_runs(settings)}
            row = self.rows(scores, test, settings)["real", 100]["auc"]
            assert row["seed_sd"] is None
            found.append(row["high"] - row["low"])
        assert wide[0] > 2 * narrow[0]

    def test_a_single_patient_has_no_interval(self):
        test = PatchSet(lesions=patches(4, 0, patients=1), normal=patches(4, 1, patients=1))
        row = self.rows(self.scores(test, TINY), test, TINY)["real", 50]["auc"]
        assert row["low"] is row["high"] is None


class TestAugmentation:
    def test_varied_patches_stay_in_range_and_keep_the_middle(self):
        x = torch.from_numpy(patches(16, 0, lesion=True).pixels)[:, None]
        for augment in (flip, vary):
            y = augment(x, torch.Generator().manual_seed(0))
            assert y.shape == x.shape
            assert 0 <= y.min() <= y.max() <= 1
            middle, rim = y[:, 0, 28:36, 28:36].mean((1, 2)), y[:, 0, :8].mean((1, 2))
            assert (middle > rim).all()
            assert not torch.equal(x, y)


class TestSettings:
    @pytest.mark.parametrize(
        ("changes", "said"),
        [
            ({"seed": -1}, "seed is -1; expected at least 0"),
            ({"seeds": 0}, "seeds is 0; expected at least 1"),
            ({"train_steps": 1}, "train_steps is 1; expected at least 2"),
            ({"synthetic_count": 0}, "synthetic_count is 0; expected at least 1"),
            ({"limit": 0}, "limit is 0; expected at least 1"),
            ({"train_batch": 7}, "train_batch is 7; expected an even number"),
            ({"fractions": (50, 10)}, "fractions is '50,10'; expected ascending percentages up to 100"),
            ({"fractions": (0, 10)}, "fractions is '0,10'; expected ascending"),
            ({"fractions": (50, 101)}, "fractions is '50,101'; expected ascending"),
            ({"fractions": ()}, "fractions is ''; expected ascending"),
            ({"fractions": (float("nan"),)}, "fractions is 'nan'; expected ascending"),
        ],
    )
    def test_what_cannot_be_is_refused(self, changes, said):
        with pytest.raises(GBCIError, match=said):
            UtilitySettings(**changes)

    def test_a_set_of_one_kind_is_refused(self):
        with pytest.raises(GBCIError, match="the normal patches of a set are 0; expected at least 1"):
            PatchSet(lesions=patches(2, 0), normal=patches(0, 0))


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Six phantom studies of the training split; those with lesions are of three patients, one of each fold."""
    root = tmp_path_factory.mktemp("utility") / "phantom"
    generate_phantom(root, studies=6, seed=4, size=192)
    for table in root.glob("*.csv"):
        table.write_text(table.read_text().replace(",test,", ",training,"))
    return root


class TestFromFilesToFigure:
    def test_the_report_is_whole_and_the_figure_is_drawn(self, root, tmp_path, monkeypatch):
        def pipe(image, mask_image, **call):
            return type("Output", (), {"images": image.masked_fill(mask_image, 1)})

        monkeypatch.setattr(
            "gbci_fast.evaluate.utility.evaluation.reconstruct", lambda pipe, cases, _: [case.pixels for case in cases]
        )
        settings = replace(TINY, seeds=1, fractions=(100,), painting=PaintSettings(batch_size=2))
        painter = Painter(pipe=pipe, weights="w", folder=tmp_path / "painted")
        report, examples = evaluate_utility([root], painter, settings, runs=tmp_path / "runs")
        json.dumps(report, allow_nan=False)
        assert report["evaluation"] == "utility"
        assert report["targets"] == []
        assert report["data"]["synthetic"]["lesions"] == report["data"]["synthetic"]["normal"] == 3
        assert [row["arm"] for row in report["results"]] == list(ARMS)
        painted, before = examples["synthetic lesion"], examples["before painting"]
        changed = painted != before
        assert changed.any((1, 2)).all()  # every one was painted,
        assert (painted[changed] == 1).all()  # and under its mask alone
        blob = examples["blob"]
        assert 0 < (blob - before).max() <= 0.1 + 1e-6
        np.testing.assert_array_equal(examples["autoencoder"], before)
        draw_figure(tmp_path / "figure.png", report, examples)
        assert (tmp_path / "figure.png").stat().st_size > 10_000

    def test_a_patient_who_trains_and_is_judged_is_refused(self, tmp_path):
        # Two images of one breast, in two splits.
        generate_phantom(tmp_path / "phantom", studies=6, seed=4, size=192)
        for table in (tmp_path / "phantom").glob("*annotations.csv"):
            found = pd.read_csv(table)
            found["split"] = np.where(found["view_position"] == "CC", "training", "test")
            found.to_csv(table, index=False)
        painter = Painter(pipe=None, weights="w", folder=tmp_path / "painted")
        with pytest.raises(GBCIError, match="trains and is judged; expected the splits to share no patient"):
            evaluate_utility([tmp_path / "phantom"], painter, replace(TINY, split="test"), runs=tmp_path / "runs")

    def test_lesions_of_a_generated_set_are_taken_and_normal_windows_of_the_same_images(self, root, tmp_path):
        made = generated(root, tmp_path / "made", "AB")
        settings = replace(TINY, seeds=1, fractions=(100,), synthetic_count=2)
        report, examples = evaluate_utility([root], [made], settings, runs=tmp_path / "runs")
        assert report["synthetic"] == ["made"]
        assert report["data"]["synthetic"]["lesions"] == 2
        arms = [row["arm"] for row in report["results"]]
        assert "blob" in arms
        assert "autoencoder" not in arms  # no pipeline is at hand
        draw_figure(tmp_path / "figure.png", report, examples)

    def test_a_generated_set_in_judged_patients_is_refused(self, root, tmp_path):
        made = generated(root, tmp_path / "made", "C")
        with pytest.raises(GBCIError, match=r"of made is judged, too; expected templates of other patients"):
            evaluate_utility([root], [made], TINY, runs=tmp_path / "runs")


def generated(root, folder, folds):
    """An output of `generate` that is a copy of the lesions of some folds: tables that name templates, and masks."""
    folder.mkdir()
    studies = {record.study_id for record in VinDr(root).images if patient_fold(record.patient) in folds}
    for path in root.glob("*.csv"):
        table = pd.read_csv(path)
        table[table.study_id.isin(studies)].assign(template_image_id="another").to_csv(folder / path.name, index=False)
    for name in ("images", "masks"):
        (folder / name).symlink_to(root / name)
    return folder
