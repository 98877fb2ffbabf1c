"""From files to report: folds, painting, paintings of a file, self-checks, and the figure."""

import json

import numpy as np
import pytest
import torch

from gbci_fast.data.folds import patient_fold
from gbci_fast.data.vindr import VinDr
from gbci_fast.errors import GBCIError
from gbci_fast.evaluate.realism.evaluation import LEAST, build_targets, evaluate_realism, self_checks
from gbci_fast.evaluate.realism.figure import draw_figure
from gbci_fast.evaluate.realism.paintings import StoredPaintings, read_paintings
from gbci_fast.evaluate.settings import PaintSettings, RealismSettings
from gbci_fast.phantom import generate_phantom

TINY = RealismSettings(seeds=1, train_steps=2, train_batch=8, painting=PaintSettings(batch_size=4))


class Pipe:
    """Paints white, and reconstructs what it is given."""

    device = torch.device("cpu")
    vae = torch.nn.Conv2d(1, 1, 1)
    vae.dtype = torch.float32
    calls = 0

    def __call__(self, image, mask_image, **call):
        self.calls += 1
        return type("Output", (), {"images": image.masked_fill(mask_image, 1)})

    def encode_image(self, x):
        return x

    def decode_latents(self, x):
        return x / 2 + 0.5


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("realism") / "phantom"
    generate_phantom(root, studies=12, seed=10, size=128)
    return root


@pytest.fixture(scope="module")
def evaluate(root):
    def run(folder, settings=TINY, pipe=None, **more):
        given = {"weights": "w" * 64, "painted": folder / "painted", "runs": folder / "runs"} | more
        return evaluate_realism([root], pipe or Pipe(), settings, **given)

    return run


@pytest.fixture(scope="module")
def first(evaluate, tmp_path_factory):
    """The report of a run that paints, its folder, and the paintings that it wrote."""
    folder = tmp_path_factory.mktemp("first")
    return evaluate(folder, save=folder / "paintings.npz"), folder, folder / "paintings.npz"


def results(**aucs):
    """Rows of whole lesions, from `network_real_painted=0.9` and the like; the rest is perfect."""
    rows = []
    for judge in ("network", "boosting"):
        for one, other, value in (("real", "painted", 0.97), ("real", "autoencoder", 0.99), ("real", "real", 0.5)):
            value = aucs.get(f"{judge}_{one}_{other}", value)
            auc = {"value": value, "low": value - 0.05, "high": value + 0.05}
            rows.append({"judge": judge, "first": one, "second": other, "region": "whole", "features": "all"})
            rows[-1]["auc"] = {"pooled": auc}
    return rows


@pytest.fixture
def stored(tmp_path):
    return StoredPaintings(path=tmp_path / "x.npz", weights="w", painting={}, pixels={})


class TestReport:
    def test_it_trains_on_two_folds_and_judges_the_third(self, first, root):
        report = first[0]
        training = [r for r in VinDr(root).of_split("training") if r.findings]
        for side, folds in (("training", "AB"), ("judged", "C")):
            patients = {record.patient for record in training if patient_fold(record.patient) in folds}
            assert 2 <= report["sets"][side]["pooled"]["patients"] <= len(patients)
        assert report["judged_on"] == "fold C of the training split"

    def test_it_is_json_and_says_how_it_was_made(self, first):
        report = json.loads(json.dumps(first[0], allow_nan=False))
        assert report["evaluation"] == "realism"
        assert report["weights"] == "w" * 64
        assert report["paintings"] is None
        assert "scikit-learn" in report["versions"]
        assert set(report["minutes"]) == {"reading", "painting", "reconstructing", "judging"}
        pairs = {(row["first"], row["second"]) for row in report["results"]}
        assert pairs == {("real", "painted"), ("real", "autoencoder"), ("autoencoder", "painted"), ("real", "real")}

    def test_what_the_autoencoder_keeps_is_told_by_nobody(self, first):
        found = [row["auc"]["pooled"]["value"] for row in first[0]["results"] if row["second"] == "autoencoder"]
        assert len(found) > 3
        assert set(found) == {0.5}

    def test_the_figure_is_drawn(self, first, tmp_path):
        draw_figure(tmp_path / "figure.png", first[0])
        assert (tmp_path / "figure.png").stat().st_size > 10_000

    @pytest.mark.parametrize(
        ("split", "read"),
        [
            ("C", [("training", "AB"), ("training", "C")]),
            ("test", [("training", "AB"), ("test", None)]),
        ],
    )
    def test_the_test_split_is_read_where_it_is_asked_for_alone(self, evaluate, tmp_path, monkeypatch, split, read):
        seen = []

        def stop(roots, *, split, folds=None, **more):
            seen.append((split, folds))
            return []

        monkeypatch.setattr("gbci_fast.evaluate.lesions.read_lesions", stop)
        with pytest.raises(GBCIError):
            evaluate(tmp_path, RealismSettings(split=split))
        assert seen == read


class TestPaintingsOfAFile:
    def test_they_give_the_same_figures_without_painting(self, first, evaluate, tmp_path):
        pipe = Pipe()
        report = evaluate(tmp_path, pipe=pipe, stored=read_paintings(first[2]))
        assert pipe.calls == 0
        assert report["results"] == first[0]["results"]
        assert report["paintings"] == "paintings.npz"
        assert report["settings"]["painting"] == first[0]["settings"]["painting"]

    def test_beside_other_weights_the_autoencoder_is_left_out(self, first, evaluate, tmp_path):
        report = evaluate(tmp_path, stored=read_paintings(first[2]), weights="v" * 64)
        assert report["weights"] == "w" * 64
        assert {(row["first"], row["second"]) for row in report["results"]} == {("real", "painted"), ("real", "real")}
        for found in report["self_checks"].values():
            check = found["checks"][-1]
            assert (check["pair"], check["passed"]) == ("real/autoencoder", None)
            assert check["note"] == "the paintings are by weights wwwwwwwwwwww, the autoencoder is of vvvvvvvvvvvv"

    def test_other_images_are_refused(self, first, evaluate, tmp_path):
        stored = read_paintings(first[2])
        stored.pixels.clear()
        with pytest.raises(GBCIError, match=r"paintings\.npz holds no painting of phantom/"):
            evaluate(tmp_path, stored=stored)


class TestSelfChecks:
    def passed(self, stored, **aucs):
        return [found["passed"] for found in self_checks(results(**aucs), stored, "w").values()]

    def test_each_judge_passes_or_fails_by_its_own_bounds(self, stored):
        assert self.passed(stored) == [True, True]
        assert self.passed(stored, network_real_painted=0.9, boosting_real_painted=0.9) == [True, False]
        assert self.passed(stored, network_real_painted=0.87) == [False, True]
        assert self.passed(stored, boosting_real_autoencoder=0.94) == [True, False]
        assert self.passed(stored, network_real_real=0.56, boosting_real_real=0.44) == [False, False]
        assert LEAST["real", "painted"] == {"network": 0.88, "boosting": 0.93}

    def test_without_stored_paintings_only_chance_is_checked(self):
        """A model that nobody can tell from real is no fault of the judge."""
        assert self.passed(None, boosting_real_painted=0.5) == [None, None]
        assert self.passed(None, boosting_real_real=0.6) == [None, False]

    def test_targets_are_the_checks_and_the_interval_of_chance(self, stored):
        rows = results(network_real_painted=0.53)
        targets = {one["name"]: one for one in build_targets(rows, self_checks(rows, stored, "w"))}
        assert targets["self-check of the network: real/painted"]["met"] is False
        assert targets["self-check of the boosting: real/real, distance from chance"]["met"] is True
        assert targets["network: painted told from real"]["met"] is True
        assert targets["boosting: painted told from real"]["met"] is False
        assert np.isclose(targets["boosting: painted told from real"]["bound"], 0.55)


class TestSettings:
    @pytest.mark.parametrize(
        ("changes", "said"),
        [
            ({"seeds": 0}, "seeds is 0; expected at least 1"),
            ({"train_steps": 1}, "train_steps is 1; expected at least 2"),
            ({"train_batch": 7}, "train_batch is 7; expected an even number"),
            ({"limit": 0}, "limit is 0; expected at least 1"),
        ],
    )
    def test_what_cannot_be_is_refused(self, changes, said):
        with pytest.raises(GBCIError, match=said):
            RealismSettings(**changes)

    def test_the_student_paints_by_default_and_the_test_split_is_not_read(self):
        settings = RealismSettings()
        assert (settings.painting.steps, settings.painting.tier, settings.split) == (4, "approximate", "C")
