"""The readers' training: it finds what is to be seen, refuses what is not, and cannot gain by telling sets apart."""

import io
from dataclasses import replace

import numpy as np
import pytest
from rich.console import Console

from gbci_fast.attributes import Attributes
from gbci_fast.cli import main
from gbci_fast.cli.train import build_table
from gbci_fast.errors import GBCIError
from gbci_fast.evaluate.readers import describe, features_of
from gbci_fast.training.classifier import (
    Choice,
    Seen,
    auc_of,
    balanced,
    choose,
    fit,
    matched_auc,
    tell_sets_apart,
    train_readers,
)
from gbci_fast.training.settings import ReaderSettings

SETTINGS = ReaderSettings(fewest=8, components=(4, 8), regularization=(1e-2,), parts=3)


@pytest.fixture(scope="module")
def striped(square):
    """`striped(count, seed=0)`: lesions of `count` patients; spiculated ones are striped, circumscribed ones are flat.

    Their pathology is drawn by lot, and every second pair is large.
    """

    def make(count, seed=0):
        rng, cases = np.random.default_rng(seed), []
        for i in range(count):
            spiculated, side = bool(i % 2), (12, 30)[i // 2 % 2]
            case = square(side=side, patient=f"set/{seed}-{i}")
            stripes = 15000 * (np.arange(96) // 2 % 2) * spiculated
            image = np.where(case.mask, 30000 + stripes, rng.integers(10000, 40000)) + rng.integers(-800, 800, (96, 96))
            told = Attributes(
                margin="spiculated" if spiculated else "circumscribed", pathology=("benign", "malignant")[i // 4 % 2]
            )
            cases.append(replace(case, image=image.astype(np.uint16), attributes=told))
        return Seen(cases=cases, features=features_of(cases))

    return make


@pytest.fixture(scope="module")
def seen(striped):
    return striped(24), striped(16, seed=1)


@pytest.fixture
def alike(square):
    """`alike(features, answers, sets=None)`: lesions of two views per patient with the given features."""

    def make(features, sets=None):
        sets = sets or ["set"] * len(features)
        cases = [square(patient=f"{name}/{i // 2}", root=name) for i, name in enumerate(sets)]
        return Seen(cases=cases, features={True: features, False: features})

    return make


class TestTraining:
    def test_a_planted_difference_is_found_in_other_lesions(self, seen):
        readers = train_readers(*seen, SETTINGS, data="d")
        assert {"margin", "size"} <= set(readers.tasks)
        logits = readers.read(seen[1].cases)
        assert ((logits["margin"] > 0) == np.resize([False, True], 16)).mean() > 0.9
        assert ((logits["size"] > 0) == np.resize([False, False, True, True], 16)).mean() > 0.9
        record = readers.config.tasks["margin"]
        assert record.trained == {"set": (12, 12)}
        assert record.judged == {"set": (8, 8)}
        assert record.auc.value > 0.95
        assert record.size_auc.value == 0.5
        assert readers.config.control == {}  # one data set

    def test_what_is_not_to_be_seen_is_refused(self, seen):
        readers = train_readers(*seen, SETTINGS, data="d")
        assert "pathology" not in readers.tasks
        assert readers.config.refused["pathology"].auc.low < 0.6

    def test_too_few_lesions_make_no_task(self, seen):
        readers = train_readers(*seen, replace(SETTINGS, fewest=12), data="d")
        assert "shape" not in readers.config.tasks | readers.config.refused  # never told

    def test_none_at_all_is_one_sentence(self, seen):
        train, judge = seen
        blind = Seen(cases=judge.cases, features={key: np.zeros_like(x) for key, x in judge.features.items()})
        with pytest.raises(GBCIError, match=r"no reader is admitted; expected an AUC on fold C .*margin 0.50 \("):
            train_readers(train, blind, SETTINGS, data="d")
        with pytest.raises(GBCIError, match="got no task with 99 lesions of both answers in fold A"):
            train_readers(train, judge, replace(SETTINGS, fewest=99), data="d")


class TestFit:
    def test_the_map_is_that_of_scikit_learn(self):
        from sklearn.decomposition import PCA
        from sklearn.linear_model import LogisticRegression
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler

        rng = np.random.default_rng(0)
        x, sets = rng.normal(3, 2, (60, 20)), np.full(60, "set")
        y = (x[:, 0] + rng.normal(size=60) > 3).astype(float)
        found = fit(x, y, sets, Choice(components=6, regularization=0.1), Choice(components=3, regularization=0.1))
        for reader, components in zip(found, (6, 3), strict=True):
            stages = make_pipeline(
                StandardScaler(), PCA(components), LogisticRegression(C=0.1, class_weight="balanced")
            )
            np.testing.assert_allclose(reader(x), stages.fit(x, y).decision_function(x), atol=1e-3)

    def test_the_same_data_give_the_same_map(self):
        """Principal components are exact; scikit-learn's default solver for many features draws at random."""
        rng = np.random.default_rng(0)
        x, y, sets = rng.normal(size=(600, 600)), np.resize([0.0, 1.0], 600), np.full(600, "set")
        (one,), (two,) = (fit(x, y, sets, Choice(components=5, regularization=0.1)) for _ in range(2))
        np.testing.assert_array_equal(one.weight, two.weight)

    def test_unknown_answers_pull_at_nothing(self):
        rng = np.random.default_rng(0)
        x, y, sets = rng.normal(size=(40, 5)), np.resize([0.0, 1.0], 40), np.full(40, "set")
        unknown = np.where(np.arange(40) < 20, y, np.nan)
        choice = Choice(components=5, regularization=1.0)
        (one,), (two,) = fit(x, unknown, sets, choice), fit(x, np.where(np.isnan(unknown), np.nan, y), sets, choice)
        np.testing.assert_array_equal(one.weight, two.weight)

    def test_both_answers_weigh_the_same_in_every_set(self):
        answers, sets = np.array([1, 1, 1, 0, 0, 1.0]), np.array(["a"] * 4 + ["b"] * 2)
        weights = balanced(answers, sets)
        for name, total in (("a", 4), ("b", 2)):
            for answer in (0, 1):
                assert weights[(sets == name) & (answers == answer)].sum() == pytest.approx(total / 2)

    def test_telling_sets_apart_is_of_no_use(self):
        """The only feature is the data set, most of whose lesions are positive."""
        sets = np.repeat(["a", "b"], 50)
        answers = np.concatenate([np.arange(50) < 40, np.arange(50) < 10]).astype(float)
        x = np.stack([sets == "a", np.random.default_rng(0).random(100)], 1).astype(float)
        (reader,) = fit(x, answers, sets, Choice(components=2, regularization=10.0))
        logits = reader(x)
        assert abs(logits[:50].mean() - logits[50:].mean()) < 0.2


class TestChoice:
    def test_patients_are_not_split(self, alike):
        """Views of one patient share features and a random answer; to know one view would be to know the other."""
        rng = np.random.default_rng(0)
        features, answers = np.repeat(rng.normal(size=(60, 30)), 2, 0), np.repeat(rng.random(60) < 0.5, 2).astype(float)
        _, auc = choose(alike(features), features, answers, replace(SETTINGS, components=(30,)))
        assert auc < 0.7

    def test_the_better_number_of_components_is_taken(self, alike):
        rng = np.random.default_rng(0)
        answers = np.repeat(rng.random(60) < 0.5, 2).astype(float)
        features = rng.normal(size=(120, 6))
        features[:, 1:4] = features[:, :1] + 0.1 * rng.normal(size=(120, 3))  # the first component
        features[:, 5] += 2 * answers
        settings = replace(SETTINGS, components=(1, 6), regularization=(1.0,))
        choice, auc = choose(alike(features), features, answers, settings)
        assert choice.components == 6
        assert auc > 0.8


def test_among_lesions_of_one_size_to_see_the_size_is_of_no_use(square):
    """The diameter decides the answer of most lesions; scores are the diameter alone, or the answer itself."""
    rng, sides = np.random.default_rng(0), np.resize([10, 10, 10, 10, 30, 30, 30, 30], 80)
    judge = Seen(cases=[square(side=int(side), patient=f"set/{i}") for i, side in enumerate(sides)], features={})
    answers = (np.arange(80) % 4 < np.where(sides == 30, 3, 1)).astype(float)
    blind, seeing = judge.diameters + 1e-3 * rng.normal(size=80), answers + 1e-3 * rng.normal(size=80)
    assert auc_of(blind, answers, judge).low > 0.55
    found = matched_auc(blind, answers, judge)
    assert found.low < 0.5 < found.high
    assert matched_auc(seeing, answers, judge).low == 1


def test_the_control_sees_the_data_set(alike):
    rng = np.random.default_rng(0)
    sets = ["film"] * 40 + ["digital"] * 40
    train, judge = (alike(rng.normal(size=(80, 60)) + (np.array(sets) == "film")[:, None], sets) for _ in range(2))
    found = tell_sets_apart(train, judge, Choice(components=5, regularization=0.1))
    assert set(found) == {"film", "digital"}
    assert found["film"].low > 0.95


def test_the_table_has_every_task_and_fits_80_columns(seen):
    config = train_readers(*seen, SETTINGS, data="d").config
    console = Console(width=80, file=io.StringIO())
    console.print(build_table(config))
    printed = console.file.getvalue()
    assert "…" not in printed
    for task, record in (config.tasks | config.refused).items():
        (line,) = [line for line in printed.splitlines() if line.strip().startswith(task)]
        assert describe(record.auc) in line


class TestCommand:
    def test_a_folder_that_is_not_empty_is_refused(self, tmp_path, capsys):
        (tmp_path / "kept").write_text("")
        assert main(["train", "classifier", "--data", str(tmp_path), "--output", str(tmp_path)]) == 1
        assert f"{tmp_path} is not empty; expected a new folder" in capsys.readouterr().err
