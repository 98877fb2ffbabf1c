"""Search for copies: the null's arithmetic by simulation, planted copies, fresh lesions, the command."""

import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from scipy.ndimage import gaussian_filter

from gbci_fast.cli import main
from gbci_fast.data.vindr import VinDr
from gbci_fast.errors import GBCIError
from gbci_fast.evaluate.features import Radiomics
from gbci_fast.evaluate.lesions import CROP_SIZE, Crops, crop_lesions, read_lesions
from gbci_fast.evaluate.memorisation.evaluation import Lesions, MemorisationSettings, compare, evaluate_memorisation
from gbci_fast.evaluate.memorisation.neighbors import load_index
from gbci_fast.phantom import generate_phantom

SETTINGS = MemorisationSettings()
TRIALS = 600


def textures(count, seed):
    """Random textures around 0.5 with a disk as the mask."""
    fields = gaussian_filter(np.random.default_rng(seed).standard_normal((count, CROP_SIZE, CROP_SIZE)), (0, 2.5, 2.5))
    y, x = np.mgrid[:CROP_SIZE, :CROP_SIZE] - (CROP_SIZE - 1) / 2
    return Crops(
        pixels=(0.5 + 0.08 * fields / fields.std()).astype(np.float32),
        masks=np.broadcast_to(np.hypot(y, x) < 20, fields.shape).copy(),
        patients=tuple(f"p{i}" for i in range(count)),
    )


def lesions(crops, kind):
    ids = tuple(f"{kind}{i}" for i in range(len(crops)))
    return Lesions(crops=crops, names=tuple(f"{name}-1" for name in ids), image_ids=ids)


@pytest.fixture(scope="module")
def training():
    return lesions(textures(30, seed=0), "training")


@pytest.fixture(scope="module")
def real():
    return lesions(textures(30, seed=1), "real")


def evaluate(training, real, synthetic, **options):
    options = {"source": {"kind": "test"}, "repainted": False, **options}
    return evaluate_memorisation(training, real, synthetic, Radiomics(), SETTINGS, **options)


class TestNull:
    @pytest.mark.parametrize(("real", "synthetic", "quantile"), [(40, 60, 0.05), (165, 165, 0.01), (20, 10, 0.01)])
    def test_the_number_below_the_threshold_is_distributed_as_stated(self, real, synthetic, quantile):
        rng, below, beyond = np.random.default_rng(0), [], 0
        settings = MemorisationSettings(quantile=quantile)
        patients = ["one"] * real, ["two"] * synthetic  # of one patient: no bootstrap
        for _ in range(TRIALS):
            row = compare([rng.gamma(2, size=real), rng.gamma(2, size=synthetic)], patients, settings)
            below.append(row["below"])
            beyond += row["below"] > row["allowed"]
        error = np.std(below) / np.sqrt(len(below))
        assert np.mean(below) == pytest.approx(row["expected"], abs=4 * error)
        assert row["expected_share"] <= max(quantile, 1 / (real + 1))
        assert beyond / TRIALS < 0.025 + 4 * np.sqrt(0.025 / TRIALS)

    def test_p_is_that_of_as_many_or_more(self):
        """Two real, one synthetic: the synthetic one is the smallest of three in a third of all orders."""
        patients = ["a", "b"], ["c"]
        assert compare([np.array([2.0, 3.0]), np.array([1.0])], patients, SETTINGS)["p"] == pytest.approx(1 / 3)
        assert compare([np.array([2.0, 3.0]), np.array([2.5])], patients, SETTINGS)["p"] == 1

    def test_the_ratio_of_medians_has_an_interval_over_patients(self):
        rng = np.random.default_rng(0)
        people = [f"p{i}" for i in range(60)]
        values = rng.uniform(1, 2, 60)
        row = compare([values, values / 2], [people, people], SETTINGS)
        assert row["ratio"] == pytest.approx(0.5)
        assert row["ratio_low"] == pytest.approx(0.5)  # the same patients are drawn for both
        assert row["ratio_high"] == pytest.approx(0.5)
        other = compare([values, rng.uniform(1, 2, 60) / 2], [people, [f"q{i}" for i in range(60)]], SETTINGS)
        assert other["ratio_low"] < 0.49 < 0.51 < other["ratio_high"]

    @pytest.mark.parametrize("quantile", [0.0, -0.1, 0.6, np.nan])
    def test_quantiles_out_of_range(self, quantile):
        with pytest.raises(GBCIError, match=r"quantile is .*; expected above 0, at most 0.5"):
            MemorisationSettings(quantile=quantile)


class TestSuspects:
    def test_fresh_lesions_meet_the_target(self, training, real):
        report, findings = evaluate(training, real, lesions(textures(30, seed=2), "fresh"))
        (target,) = report["targets"]
        assert target["met"]
        assert len(report["suspects"]) == report["spaces"]["pixel"]["below"] <= 5
        assert 0.8 < report["spaces"]["pixel"]["ratio_low"] < 1 < report["spaces"]["pixel"]["ratio_high"] < 1.2
        assert findings.threshold == report["spaces"]["pixel"]["threshold"] == min(findings.real.distances)
        json.dumps(report, allow_nan=False)

    def test_planted_copies_are_listed_with_what_they_copy(self, training, real):
        fresh = textures(30, seed=3)
        pixels = fresh.pixels.copy()
        pixels[:8] = 0.6 * training.crops.pixels[10:18, :, ::-1] + 0.1
        report, _ = evaluate(training, real, lesions(replace(fresh, pixels=pixels), "copy"))
        named = {row["name"]: row["neighbor"] for row in report["suspects"]}
        assert {f"copy{i}-1": f"training{i + 10}-1" for i in range(8)}.items() <= named.items()
        assert len(named) <= 10
        distances = [row["distance"] for row in report["suspects"]]
        assert distances == sorted(distances)
        assert report["targets"][0]["met"] is False
        assert report["spaces"]["pixel"]["p"] < 0.01

    def test_copies_in_their_own_template_do_not_count(self, training, real):
        copies = Lesions(crops=training.crops, names=training.names, image_ids=training.image_ids)
        report, _ = evaluate(training, real, copies)
        assert report["targets"][0]["met"]
        assert all(row["neighbor"] != row["name"] for row in report["crops"])
        elsewhere, _ = evaluate(training, real, replace(copies, image_ids=tuple("x" * 30)))
        assert elsewhere["spaces"]["pixel"]["below"] == elsewhere["spaces"]["feature"]["below"] == 30
        assert elsewhere["spaces"]["feature"]["median_synthetic"] == pytest.approx(0, abs=1e-9)

    def test_the_control_tells_what_would_be_found(self, training, real):
        report, _ = evaluate(training, real, real)
        assert report["control"]["found_share"] == report["control"]["named_share"] == 1
        blind = replace(real, crops=replace(real.crops, pixels=np.roll(training.crops.pixels, 1, 0)))
        assert evaluate(training, blind, real)[0]["control"]["found_share"] == 0  # the threshold is 0 then

    def test_repainting_is_compared_with_what_was_erased(self, training, real):
        assert evaluate(training, real, real, repainted=True)[0]["repainted"] == {
            "median_distance_to_own": pytest.approx(0, abs=1e-3),
            "own_is_nearest_share": 1,
            "chance_share": 1 / 30,
        }
        fresh = evaluate(training, real, lesions(textures(30, seed=5), "fresh"), repainted=True)[0]["repainted"]
        assert fresh["own_is_nearest_share"] < 0.2

    def test_splits_that_share_an_image_are_refused(self, training):
        with pytest.raises(GBCIError, match="image training0 is in the training and in the test split"):
            evaluate(training, training, training)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A phantom of eight studies, two of them test."""
    root = tmp_path_factory.mktemp("memorisation") / "phantom"
    generate_phantom(root, studies=8, seed=1, size=192)
    for name in ("breast-level_annotations.csv", "finding_annotations.csv"):
        table = pd.read_csv(root / name)
        studies = sorted(table.study_id.unique())
        table["split"] = np.where(table.study_id.isin(studies[:3]), "test", "training")
        table.to_csv(root / name, index=False)
    return root


def synthetic_root(root, folder, split):
    """The output of a `generate` that copies training lesions: images with findings, and their lesions' masks."""
    folder.mkdir()
    for name in ("breast-level_annotations.csv", "finding_annotations.csv"):
        table = pd.read_csv(root / name)
        table = table[table.split == split]
        table["template_image_id"] = "another"
        table.to_csv(folder / name, index=False)
    (folder / "images").symlink_to(root / "images")
    for record in VinDr(folder).images:
        if record.findings:
            mask = np.zeros((record.height, record.width), np.uint8)
            xmin, ymin, xmax, ymax = map(round, record.findings[0].box)
            mask[ymin:ymax, xmin:xmax] = 255
            file = folder / "masks" / record.study_id / f"{record.image_id}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(mask).save(file)
    return folder


def run(*arguments):
    return main(["evaluate", "memorisation", *map(str, arguments), "--split", "test"])


class TestCommand:
    def test_a_data_set_of_copies_is_found_out(self, root, tmp_path, capfd):
        data, output = synthetic_root(root, tmp_path / "data", "training"), tmp_path / "out" / "report.json"
        options = ("--index", tmp_path / "index.npz", "--limit", "6")
        assert run(root, "--synthetic", data, "--output", output, *options) == 0
        out = capfd.readouterr().out
        report = json.loads(output.read_text())
        assert report["counts"]["synthetic"]["lesions"] >= 6
        assert report["spaces"]["pixel"]["below"] >= 4
        assert report["targets"][0]["met"] is False
        assert f"suspect: {report['suspects'][0]['name']} like {report['suspects'][0]['neighbor']}" in out
        assert Image.open(output.with_suffix(".png")).size[0] > 1000
        index, threshold = load_index(tmp_path / "index.npz")
        assert threshold == report["spaces"]["pixel"]["threshold"]
        assert len(index.names) == report["counts"]["training"]["lesions"]

    def test_the_judged_lesions_are_painted_by_default(self, root, tmp_path, monkeypatch):
        def pipe(image, **call):
            return type("Output", (), {"images": image.flip(2)})

        monkeypatch.setattr("gbci_fast.cli.evaluate.memorisation.open_pipeline", lambda args: (pipe, "w"))
        output = tmp_path / "report.json"
        assert run(root, "--output", output, "--painted", tmp_path / "kept") == 0
        report = json.loads(output.read_text())
        assert report["source"]["kind"] == "repainted"
        assert report["counts"]["synthetic"] == report["counts"]["real"]
        assert report["repainted"]["chance_share"] == 1 / report["counts"]["real"]["lesions"]
        assert list((tmp_path / "kept").iterdir())

    @pytest.mark.parametrize(
        ("options", "sentence"),
        [
            (["--quantile", "0.7"], "quantile is 0.7; expected above 0, at most 0.5"),
            (["--synthetic", "{root}"], "has images without template_image_id; expected the output of gbci-fast gen"),
            (["--index", "{out}.json"], "the index would replace"),
            (["--index", "{out}.png"], "the index would replace"),
            (["--synthetic", "{out}"], "does not exist; a VinDr-Mammo folder has it"),
            (["--limit", "0", "--synthetic", "{root}"], "limit is 0; expected at least 1"),
        ],
    )
    def test_bad_options_are_one_sentence(self, root, tmp_path, capfd, options, sentence):
        options = [text.format(root=root, out=tmp_path / "out") for text in options]
        assert run(root, "--output", tmp_path / "out.json", *options) == 1
        assert sentence in capfd.readouterr().err.splitlines()[-1]
        assert not list(tmp_path.iterdir())

    def test_painting_options_do_not_go_with_a_data_set(self, root, tmp_path, capfd):
        assert run(root, "--output", tmp_path / "out.json", "--synthetic", root, "--batch-size", "3") == 1
        assert "--batch-size is 3 beside --synthetic, where nothing is painted" in capfd.readouterr().err


def test_crops_are_named_by_lesion(root):
    cases = read_lesions([root], split="test", limit=2)
    found = Lesions.of(cases, [np.zeros_like(case.pixels) for case in cases])
    assert found.names == tuple(f"phantom/{case.name}" for case in cases)
    assert not found.crops.pixels.any()
    np.testing.assert_array_equal(found.crops.masks, crop_lesions(cases).masks)
