"""The distribution evaluation: planted differences are found, their absence too; report, figure and command line."""

import json
import re
import shutil
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from scipy.ndimage import gaussian_filter

from gbci_fast.cli import main
from gbci_fast.errors import GBCIError
from gbci_fast.evaluate.distribution.distances import KernelPairs, frechet_distance
from gbci_fast.evaluate.distribution.evaluation import (
    DistributionSettings,
    Halvings,
    evaluate_blocks,
    evaluate_distribution,
    join_patients,
)
from gbci_fast.evaluate.distribution.figure import draw_figure
from gbci_fast.evaluate.features import Bands, Radiomics
from gbci_fast.evaluate.lesions import CROP_SIZE, Crops, read_lesions, read_painted
from gbci_fast.phantom import generate_phantom

QUICK = DistributionSettings(splits=20, resamples=50, pairs=200)
PATIENTS = 40


class Sums:
    """Means of quarters of a crop: four numbers that a test can predict."""

    name, digest, standardized, gaussian = "sums", "0", False, True

    def __call__(self, crops):
        half = CROP_SIZE // 2
        quarters = (crops.pixels[:, y : y + half, x : x + half] for y in (0, half) for x in (0, half))
        return 10 * np.stack([quarter.mean((1, 2)) for quarter in quarters], axis=1).astype(np.float64)


def make_crops(seed, *, patients=PATIENTS, offset=0.0, step=0.0, smooth=False, prefix="p", each=2):
    """Disks in noise, of patients whose crops share a brightness."""
    rng = np.random.default_rng(seed)
    n = patients * each
    y, x = np.indices((CROP_SIZE, CROP_SIZE)) - CROP_SIZE / 2 + 0.5
    mask = np.hypot(y, x) < 20
    quarters = rng.normal(0, 0.08, (n, 2, 2)) + np.repeat(rng.normal(0, 0.06, patients), each)[:, None, None]
    pixels = 0.5 + offset + np.kron(quarters, np.ones((32, 32))) + rng.normal(0, 0.03, (n, CROP_SIZE, CROP_SIZE))
    pixels += step * mask
    if smooth:
        pixels = 0.25 * sum(np.roll(pixels, (i, j), (1, 2)) for i in (0, 1) for j in (0, 1))
    return Crops(
        pixels=pixels.astype(np.float32),
        masks=np.stack([mask] * n),
        patients=tuple(f"{prefix}{i // each}" for i in range(n)),
    )


def joined(one, other):
    return Crops(
        pixels=np.concatenate([one.pixels, other.pixels]),
        masks=np.concatenate([one.masks, other.masks]),
        patients=one.patients + other.patients,
    )


@pytest.fixture(scope="module")
def real():
    return make_crops(0)


@pytest.fixture(scope="module")
def columns():
    """The same patients' crops drawn again, and planted failures."""
    return {
        "same": make_crops(1),
        "brighter": make_crops(2, offset=0.15),
        "seam": make_crops(3, step=0.2),
        "smooth": make_crops(4, smooth=True),
        "copies": replace(make_crops(5)[np.arange(2 * PATIENTS) % 3], patients=make_crops(5).patients),
    }


@pytest.fixture(scope="module")
def report(real, columns):
    return evaluate_distribution(real, columns, [Sums()], QUICK, judged="same")


def statistic(report, key):
    return report["extractors"][0]["statistics"][key]


class TestHalves:
    def test_patients_are_on_one_side_and_every_patient_on_either_side_at_times(self, real):
        halvings = Halvings.of({"real": real, "model": make_crops(1)}, QUICK)
        for left, other, right in zip(halvings.left["real"], halvings.left["model"], halvings.right, strict=True):
            owners = np.array(real.patients)
            assert not set(owners[left]) & set(owners[right])
            assert not set(owners[other]) & set(owners[right])
            assert left.sum() == other.sum() == right.sum() == PATIENTS
        assert halvings.left["real"].any(0).all()
        assert halvings.right.any(0).all()

    def test_a_larger_set_is_thinned_to_the_size_of_the_halves(self, real):
        made = make_crops(1, patients=30, each=5, prefix="other")
        halvings = Halvings.of({"real": real, "synthetic": made}, QUICK)
        assert (halvings.left["synthetic"].sum(1) == halvings.left["real"].sum(1)).all()
        assert (halvings.left["synthetic"].sum(1) == PATIENTS).all()
        assert halvings.left["synthetic"].any(0).mean() > 0.9

    def test_a_resample_draws_patients_whole_and_alike_in_all_sets(self, real):
        shared = replace(make_crops(1), patients=real.patients[::-1])
        draws = Halvings.of({"real": real, "model": shared}, QUICK).draws
        assert (draws["real"].sum(1) == len(real)).all()
        assert (draws["real"][:, 0::2] == draws["real"][:, 1::2]).all()
        assert (draws["real"] == draws["model"][:, ::-1]).all()

    def test_sets_without_common_patients_keep_their_sizes(self, real):
        made = make_crops(1, patients=25, prefix="other")
        halvings = Halvings.of({"real": real, "synthetic": made}, QUICK)
        assert (halvings.draws["real"].sum(1) == 80).all()
        assert (halvings.draws["synthetic"].sum(1) == 50).all()
        assert set(halvings.left["synthetic"].sum(1)) <= {24, 26}  # 12 or 13 of 25 patients


class TestPlantedEffects:
    def test_the_same_distribution_is_within_the_null(self, report):
        for key in ("frechet", "kernel", "precision", "recall", "coverage"):
            null, splits = statistic(report, key)["null"], statistic(report, key)["columns"]["same"]["splits"]
            assert null["low"] <= splits["median"] <= null["high"], key
        assert all(target["met"] for target in report["targets"]["same"])

    def test_a_shift_is_found_by_every_distance(self, report):
        for key, sign in {"frechet": 1, "kernel": 1, "precision": -1, "recall": -1, "coverage": -1}.items():
            null, splits = statistic(report, key)["null"], statistic(report, key)["columns"]["brighter"]["splits"]
            assert sign * splits["median"] > sign * null["high" if sign > 0 else "low"], key

    def missed(self, report, column):
        return {target["name"] for target in report["targets"][column] if not target["met"]}

    def test_a_shift_fails_the_targets_of_its_distances_alone(self, report):
        assert self.missed(report, "brighter") == {"frechet_sums", "kernel_sums"}

    def test_seams_and_smoothness_fail_their_own_targets(self, report):
        assert "seam" in self.missed(report, "seam")
        assert {"spectrum_slope", "fine_power"} <= self.missed(report, "smooth")
        assert report["appearance"]["spectrum_slope"]["columns"]["smooth"]["difference"]["high"] < 0

    def test_blur_that_crops_do_not_show_is_seen_at_model_pixels(self, real):
        """The crops are equal; the lesions' middles, which are not resampled, are blurred."""
        pixels, masks = real.native
        blurred = replace(real, middles=(gaussian_filter(pixels, (0, 1, 1)), masks))
        report = evaluate_distribution(real, {"blurred": blurred}, [Radiomics(), Bands()], QUICK, judged="blurred")
        assert self.missed(report, "blurred") == {"frechet_bands", "kernel_bands", "spectrum_slope", "fine_power"}
        bands = report["extractors"][1]["statistics"]["frechet"]
        assert bands["columns"]["blurred"]["splits"]["low"] > bands["null"]["high"]

    def test_three_crops_again_and_again_are_less_diverse(self, report):
        copies = report["diversity"]["columns"]["copies"]
        assert copies["full"]["low"] > 0
        assert copies["splits"]["median"] > report["diversity"]["null"]["high"]
        assert statistic(report, "recall")["columns"]["copies"]["splits"]["median"] < 0.5

    def test_full_values_are_those_of_all_crops(self, report, real, columns):
        x, y = Sums()(columns["brighter"]), Sums()(real)
        full = {key: statistic(report, key)["columns"]["brighter"]["full"] for key in ("frechet", "kernel")}
        assert full["frechet"]["value"] == pytest.approx(frechet_distance(x, y))
        pairs, everything = KernelPairs.of(x, y, real.patients, real.patients), np.ones((1, len(x)))
        assert full["kernel"]["value"] == pytest.approx(pairs.distances(everything, everything)[0])
        for row in full.values():
            assert row["low"] < row["value"] < row["high"]

    def test_shares_inside_the_real_range(self, report):
        slope = report["appearance"]["spectrum_slope"]["columns"]
        assert slope["same"]["share_in_real_range"] > 0.85 > 0.7 > slope["smooth"]["share_in_real_range"]


class TestBlocks:
    def test_every_set_is_judged_apart_and_one_with_few_patients_is_left_out(self, real, columns):
        """Brightness differs between two scanners by more than between lesions: pooling hides what each shows."""
        other = make_crops(6, offset=0.3, prefix="q")
        shifted = make_crops(7, offset=0.1), make_crops(8, offset=0.4, prefix="q")
        blocks = {
            "film": {"real": real, "model": shifted[0]},
            "digital": {"real": other, "model": shifted[1]},
            "tiny": {"real": make_crops(9, patients=3), "model": make_crops(9, patients=3)},
            "pooled": {"real": joined(real, other), "model": joined(*shifted)},
        }
        report = evaluate_blocks(blocks, [Sums()], QUICK, judged="model")
        assert list(report["blocks"]) == ["film", "digital", "pooled"]
        assert "the tiny real lesions are of 3 patients; expected at least 12" in report["left_out"]["tiny"]
        ratios = {row["name"]: row["value"] for row in report["targets"] if "frechet" in row["name"]}
        assert min(ratios["film: frechet_sums"], ratios["digital: frechet_sums"]) > ratios["pooled: frechet_sums"]
        json.dumps(report, allow_nan=False)

    def test_many_features_are_compared_by_the_kernel_alone(self, real, columns):
        class Wide(Sums):
            gaussian = False

        report = evaluate_distribution(real, columns, [Wide()], QUICK, judged="same")
        assert list(report["extractors"][0]["statistics"]) == ["kernel"]
        assert {row["name"] for row in report["targets"]["same"]} >= {"kernel_sums"}
        assert "frechet_sums" not in {row["name"] for row in report["targets"]["same"]}


class TestReport:
    def test_it_is_json_and_repeats(self, report, real, columns):
        json.dumps(report, allow_nan=False)
        assert evaluate_distribution(real, columns, [Sums()], QUICK, judged="same") == report

    def test_few_patients_are_not_judged(self):
        few = {"model": make_crops(1, patients=12)}
        report = evaluate_distribution(make_crops(0, patients=12), few, [Sums()], QUICK, judged="model")
        assert {target["met"] for target in report["targets"]["model"]} == {None}
        assert "not judged: 12 patients, expected at least 20" in report["targets"]["model"][0]["note"]
        assert all(target["measured"] is not None for target in report["targets"]["model"])

    def test_too_few_patients_are_one_sentence(self, real):
        with pytest.raises(GBCIError, match=r"the model lesions are of 11 patients; expected at least 12, so that"):
            evaluate_distribution(real, {"model": make_crops(1, patients=11)}, [], QUICK, judged="model")

    def test_features_that_are_no_numbers_are_one_sentence(self, real):
        class Broken(Sums):
            def __call__(self, crops):
                return super().__call__(crops) * np.nan

        with pytest.raises(GBCIError, match="features sums of the real lesions hold NaN or infinity"):
            evaluate_distribution(real, {"model": real}, [Broken()], QUICK, judged="model")

    @pytest.mark.parametrize("name", ["splits", "resamples", "neighbors", "pairs"])
    def test_settings_are_checked(self, name):
        with pytest.raises(GBCIError, match=f"{name} is 0; expected at least 1"):
            DistributionSettings(**{name: 0})

    def test_standardizing_makes_units_irrelevant(self, real, columns):
        class Scaled(Sums):
            standardized = True
            scale = np.ones(4)

            def __call__(self, crops):
                return super().__call__(crops) * self.scale + self.scale

        class Huge(Scaled):
            scale = np.array([1, 1e3, 1e-3, 5])

        one, two = (
            evaluate_distribution(real, {"same": columns["same"]}, [extractor()], QUICK, judged="same")
            for extractor in (Scaled, Huge)
        )
        value = [statistic(r, "frechet")["columns"]["same"]["full"]["value"] for r in (one, two)]
        assert value[0] == pytest.approx(value[1])
        assert one["extractors"][0]["standardized"]

    def test_figure(self, report, real, columns, tmp_path):
        draw_figure(tmp_path / "a.png", {"blocks": {"set": report}}, {"set": {"real": real, **columns}})
        assert min(Image.open(tmp_path / "a.png").size) > 500


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A phantom of 20 patients, all of the test split."""
    root = tmp_path_factory.mktemp("distribution") / "phantom"
    generate_phantom(root, studies=20, seed=1, size=128)
    for table in root.glob("*.csv"):
        table.write_text(table.read_text().replace(",training,", ",test,"))
    return root


@pytest.fixture(scope="module")
def weights(tiny_checkpoint):
    return tiny_checkpoint(224)


class TestCommand:
    def test_it_paints_and_reports(self, root, weights, tmp_path, capsys):
        output = tmp_path / "out.json"
        options = f"--split test --steps 1 --weights {weights} --tier exact --limit 12"
        main(["evaluate", "distribution", str(root), "--output", str(output), *options.split()])
        report = json.loads(output.read_text())
        assert list(report["blocks"]) == ["phantom"]
        block = report["blocks"]["phantom"]
        assert list(block["sets"]) == ["real", "model", "autoencoder", "blurred", "blob", "ring_mean"]
        assert [extractor["name"] for extractor in block["extractors"]] == ["radiomics", "bands"]
        assert report["painting"]["steps"] == 1
        assert len(report["weights"]) == 64
        # The noise that an untrained model paints is far from real lesions.
        frechet = block["extractors"][0]["statistics"]["frechet"]
        assert frechet["columns"]["model"]["splits"]["median"] > frechet["null"]["high"]
        assert output.with_suffix(".png").stat().st_size > 10_000
        printed = capsys.readouterr().out
        assert "real halves" in printed
        assert "frechet_radiomics" in printed
        assert max(map(len, re.sub(r"[^\n]*out\.(json|png)", "", printed).splitlines())) <= 80

    def test_another_data_set_is_judged_by_its_own_lesions(self, root, tmp_path):
        output = tmp_path / "out.json"
        options = ["--split", "test", "--synthetic", str(root)]
        main(["evaluate", "distribution", str(root), "--output", str(output), *options])
        report = json.loads(output.read_text())
        sizes = report["blocks"]["phantom"]["sets"]
        assert sizes["synthetic"]["crops"] >= sizes["real"]["crops"]
        assert report["synthetic"]["shared_patients"] == sizes["real"]["patients"]
        # A data set compared with a part of itself: no difference.
        kernel = report["blocks"]["phantom"]["extractors"][0]["statistics"]["kernel"]
        assert kernel["null"]["low"] < kernel["columns"]["synthetic"]["splits"]["median"] < kernel["null"]["high"]

    def test_of_a_generated_set_the_templates_own_lesions_are_left_out(self, root, tmp_path):
        made = tmp_path / "made"
        shutil.copytree(root, made)
        for path in made.glob("*.csv"):
            table = pd.read_csv(path)
            table.assign(template_image_id="another").to_csv(path, index=False)
        everything = read_lesions([made])
        painted, templates = read_painted(made)
        assert len(painted) < len(everything)
        assert {case.number for case in painted} == {0}
        assert templates == ("another",) * len(painted)
        output = tmp_path / "out.json"
        options = ["--split", "test", "--synthetic", str(made)]
        assert main(["evaluate", "distribution", str(root), "--output", str(output), *options]) == 0
        assert json.loads(output.read_text())["blocks"]["phantom"]["sets"]["synthetic"]["crops"] == len(painted)

    def test_every_root_has_its_own_synthetic_set_or_all_share_one(self, root, tmp_path, capsys):
        twice = tmp_path / "second"
        shutil.copytree(root, twice)
        command = ["evaluate", "distribution", str(root), str(twice), "--split", "test", "--features", "bands"]
        command += ["--output", str(tmp_path / "out.json"), "--synthetic"]
        assert main([*command, str(twice), str(root)]) == 0
        assert list(json.loads((tmp_path / "out.json").read_text())["blocks"]) == ["phantom", "second", "pooled"]
        assert main([*command, str(root), str(root), str(root)]) == 1
        assert "--synthetic names 3 folders; expected 1 or 2, one per ROOT" in capsys.readouterr().err

    def test_too_few_patients_are_refused_before_anything_is_painted(self, root, tmp_path, capsys):
        output = tmp_path / "out.json"
        command = ["evaluate", "distribution", str(root), "--output", str(output), "--split", "test", "--limit", "3"]
        assert main(command) == 1
        assert "patients; expected at least 12, so that each half has 5 neighbors" in capsys.readouterr().err
        assert not list(tmp_path.iterdir())

    def test_generated_lesions_belong_to_the_patient_of_their_template(self, root):
        cases = read_lesions([root], size=96, limit=4)
        made = [replace(case, root="made", patient=case.patient.replace("phantom/", "made/")) for case in cases]
        made[0] = replace(made[0], patient="made/nobody")
        assert join_patients(cases, made) == ("synthetic:made/nobody", *(case.patient for case in cases[1:]))
