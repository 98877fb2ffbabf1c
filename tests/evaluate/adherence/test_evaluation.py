"""Adherence: painters that obey and that do not, controls that leak and that do not, and the statistics."""

import io
from dataclasses import asdict, replace

import numpy as np
import pytest
from rich.console import Console

from gbci_fast.attributes import Attributes
from gbci_fast.cli.evaluate.adherence import build_table
from gbci_fast.errors import GBCIError
from gbci_fast.evaluate.adherence.evaluation import (
    AdherenceSettings,
    balanced_accuracy,
    derange,
    evaluate_adherence,
)
from gbci_fast.evaluate.adherence.figure import draw_figure
from gbci_fast.evaluate.metrics import patient_draws
from gbci_fast.evaluate.scorer import ScorerConfig

SETTINGS = AdherenceSettings()
BRIGHT, DARK = 0.9, 0.4


class Reader:
    """Stands for a perfect scorer: bright lesions are of high BI-RADS, and size is the bright or dark area."""

    config = ScorerConfig(tasks=("birads_high", "size"), median_diameter=15.0)

    def predict(self, crops, windows):
        inside = (crops.pixels * crops.masks).sum((1, 2)) / crops.masks.sum((1, 2))
        area = ((np.abs(windows - 20000 / 65535) > 0.05) & (windows > 0)).sum((1, 2))
        size = np.where(area == 0, 0.5, area > np.pi * 15**2 / 4)
        return {"birads_high": (inside > (BRIGHT + DARK) / 2).astype(float), "size": size.astype(float)}


@pytest.fixture
def lesions(square):
    """`lesions(count=40, root="set")`: cases with two views per patient; brightness tells the BI-RADS."""

    def make(count=40, root="set"):
        cases = []
        for i in range(count):
            given = {"root": root, "patient": f"{root}/{i // 2}", "image_id": f"{root}{i}", "seed": i}
            case = square(top=10, left=10, side=(10, 24)[i % 2], **given)
            high = i // 2 % 2
            image = np.where(case.mask, (DARK, BRIGHT)[high] * 65535, 20000).astype(np.uint16)
            cases.append(replace(case, image=image, attributes=Attributes(finding_birads=(3, 5)[high])))
        return cases

    return make


def obedient(cases, descriptions, guidance):
    values = [BRIGHT if told.attributes.finding_birads == 5 else DARK for told in descriptions]
    return [np.where(c.mask, np.float32(v), c.pixels) for c, v in zip(cases, values, strict=True)]


def deaf(cases, descriptions, guidance):
    rng = np.random.default_rng(0)
    return [np.where(c.mask, np.float32(rng.choice([BRIGHT, DARK])), c.pixels) for c in cases]


def copying(cases, descriptions, guidance):
    return [case.pixels for case in cases]


def value(report, task, condition, measure="balanced_accuracy"):
    return report["tasks"][task][condition][measure]["value"]


def target(report, start):
    return next(t for t in report["targets"] if t["name"].startswith(start))


class TestPainters:
    def test_an_obedient_painter_has_full_adherence_and_no_leak(self, lesions):
        report = evaluate_adherence(lesions(), Reader(), obedient, SETTINGS)
        for condition in ("real", "painted", "shuffled"):
            assert value(report, "birads_high", condition) == value(report, "birads_high", condition, "auc") == 1
        assert target(report, "adherence of birads_high")["value"] == 1
        assert target(report, "adherence of birads_high")["met"]
        assert target(report, "leak of birads_high")["met"]

    def test_one_that_ignores_conditions_is_at_chance(self, lesions):
        report = evaluate_adherence(lesions(200), Reader(), deaf, SETTINGS)
        for condition in ("painted", "shuffled", "shuffled_original"):
            found = report["tasks"]["birads_high"][condition]["balanced_accuracy"]
            assert found["low"] <= 0.5 <= found["high"]
        assert target(report, "adherence of birads_high")["met"] is False
        assert target(report, "leak of birads_high")["met"]

    def test_one_that_copies_the_hidden_lesion_leaks(self, lesions):
        report = evaluate_adherence(lesions(), Reader(), copying, SETTINGS)
        assert value(report, "birads_high", "painted") == 1  # looks adherent
        assert value(report, "birads_high", "shuffled_original") == 1  # and is found out
        assert value(report, "birads_high", "shuffled") == pytest.approx(0.5, abs=0.1)
        assert target(report, "leak of birads_high")["met"] is False

    def test_size_is_not_shuffled_and_its_control_is_the_erased_image(self, lesions):
        report = evaluate_adherence(lesions(), Reader(), obedient, SETTINGS)
        assert set(report["tasks"]["size"]) == {"real", "ring_mean", "painted"}
        assert value(report, "size", "painted") == 1
        assert value(report, "size", "ring_mean") == 0.5
        assert target(report, "leak of size")["met"]

    def test_a_scorer_at_chance_on_real_lesions_judges_nothing(self, lesions):
        cases = [replace(case, image=np.full_like(case.image, 20000)) for case in lesions()]
        report = evaluate_adherence(cases, Reader(), obedient, SETTINGS)
        assert target(report, "adherence of birads_high")["met"] is None


class TestVariants:
    def test_every_variant_has_other_noise_and_the_first_the_cases_own(self, lesions):
        asked = []

        def painter(cases, descriptions, guidance):
            asked.append([case.seed for case in cases])
            return obedient(cases, descriptions, guidance)

        evaluate_adherence(lesions(8), Reader(), painter, replace(SETTINGS, variants=3, shuffled=False))
        assert asked[0] == [case.seed for case in lesions(8)]
        assert len({seed for seeds in asked for seed in seeds}) == 3 * 8
        assert all(0 <= seed < 2**64 for seeds in asked for seed in seeds)

    def test_the_figure_is_the_mean_over_variants(self, lesions):
        """A painter that obeys in one of its two variants is right in three of four cases."""
        calls = []

        def painter(cases, descriptions, guidance):
            calls.append(guidance)
            return (obedient if len(calls) == 1 else dark)(cases, descriptions, guidance)

        def dark(cases, descriptions, guidance):
            return [np.where(c.mask, np.float32(DARK), c.pixels) for c in cases]

        report = evaluate_adherence(lesions(), Reader(), painter, replace(SETTINGS, variants=2, shuffled=False))
        assert value(report, "birads_high", "painted") == 0.75
        found, real = (report["tasks"]["birads_high"][name] for name in ("painted", "real"))
        assert [found[key] for key in ("positive", "negative", "patients")] == [20, 20, 20]
        assert [real[key] for key in ("positive", "negative", "patients")] == [20, 20, 20]

    def test_variants_of_one_patient_are_drawn_together(self, lesions):
        """Repeating the very same paintings narrows no interval."""
        once, thrice = (
            evaluate_adherence(lesions(), Reader(), deaf, replace(SETTINGS, variants=n, shuffled=False)) for n in (1, 3)
        )
        assert once["tasks"]["birads_high"]["painted"] == thrice["tasks"]["birads_high"]["painted"]


class TestSweep:
    def test_every_guidance_is_painted_once_with_both_sets_of_descriptions(self, lesions):
        asked = []

        def painter(cases, descriptions, guidance):
            asked.append(guidance)
            return (obedient if guidance > 2 else deaf)(cases, descriptions, guidance)

        settings = AdherenceSettings(guidance=3.0, sweep=(1.0,))
        report = evaluate_adherence(lesions(), Reader(), painter, settings)
        assert sorted(asked) == [1, 1, 3, 3]
        assert [row["guidance"] for row in report["sweep"]] == [1, 3]
        low, high = (row["birads_high"]["shuffled"]["balanced_accuracy"]["value"] for row in report["sweep"])
        assert low < 0.8 < high == 1

    def test_not_shuffled_paints_once(self, lesions, tmp_path):
        asked = []

        def painter(cases, descriptions, guidance):
            asked.append(guidance)
            return obedient(cases, descriptions, guidance)

        report = evaluate_adherence(lesions(8), Reader(), painter, replace(SETTINGS, shuffled=False))
        assert asked == [SETTINGS.guidance]
        assert "shuffled" not in report["tasks"]["birads_high"]
        assert not [t for t in report["targets"] if t["name"].startswith("leak of birads_high")]

    def test_figure_and_table_of_both(self, lesions, tmp_path):
        settings = AdherenceSettings(sweep=(1.0, 3.0))
        cases = lesions(12)
        report = evaluate_adherence(cases, Reader(), obedient, settings, reconstruction=copying(cases, (), 0))
        draw_figure(tmp_path / "figure.png", report)
        assert (tmp_path / "figure.png").stat().st_size > 10_000
        table = build_table(report | {"settings": asdict(settings)})
        assert table.row_count == 2 + 6 + 4
        console = Console(width=80, file=io.StringIO())
        console.print(table)
        assert "…" not in console.file.getvalue()

    def test_settings_that_cannot_be_are_refused(self):
        with pytest.raises(GBCIError, match="guidance sweep is 1, 1; expected each value once"):
            AdherenceSettings(sweep=(1.0, 1.0))
        with pytest.raises(GBCIError, match="guidance is nan; expected a finite number"):
            AdherenceSettings(sweep=(float("nan"),))
        with pytest.raises(GBCIError, match="variants is 0"):
            AdherenceSettings(variants=0)


class TestDerangement:
    def test_donors_are_others_of_the_same_set_each_once(self, lesions):
        cases = lesions(30) + lesions(11, root="other")
        donors = derange(cases, Reader(), seed=0)
        assert sorted(donors) == list(range(len(cases)))
        for i, j in enumerate(donors):
            assert i != j
            assert cases[i].root == cases[j].root
        assert np.mean([cases[i].patient == cases[j].patient for i, j in enumerate(donors)]) < 0.05
        np.testing.assert_array_equal(donors, derange(cases, Reader(), seed=0))
        assert (donors != derange(cases, Reader(), seed=1)).any()

    def test_labels_of_donors_are_even(self, lesions):
        cases = lesions(40)
        high = np.array([case.attributes.finding_birads == 5 for case in cases])
        told = high[derange(cases, Reader(), seed=0)]
        assert abs(told[high].mean() - told[~high].mean()) < 0.11

    def test_a_set_of_one_lesion_is_one_sentence(self, lesions):
        with pytest.raises(GBCIError, match="other has one lesion, whose description cannot be shuffled; pass --no-sh"):
            derange(lesions(4) + lesions(1, root="other"), Reader(), seed=0)


class TestStatistics:
    def test_they_are_those_of_repeated_lesions(self):
        rng = np.random.default_rng(0)
        scores, truths = rng.random(30).round(1), rng.random(30) < 0.4
        roots, weights = np.zeros(30, int), rng.integers(0, 3, 30)
        again = np.repeat(np.arange(30), weights)
        s, t = scores[again], truths[again]
        expected = ((s[t] > 0.5).mean() + (s[~t] <= 0.5).mean()) / 2
        assert balanced_accuracy(scores, truths, roots, weights[None])[0] == pytest.approx(expected)

    def test_to_tell_the_sets_apart_is_worth_nothing(self):
        roots = np.repeat([0, 1], 50)
        truths = np.concatenate([np.arange(50) < 45, np.arange(50) < 5])
        scores, draws = (roots == 0).astype(float), np.ones((1, 100), int)
        assert balanced_accuracy(scores, truths, roots, draws)[0] == 0.5

    def test_one_class_is_undefined(self):
        truths, roots, draws = np.ones(4, bool), np.zeros(4, int), np.ones((1, 4), int)
        assert np.isnan(balanced_accuracy(np.ones(4), truths, roots, draws)[0])

    def test_intervals_cover_chance_about_as_often_as_they_say(self):
        """Scores that know nothing, two lesions per patient that share label and score."""
        covered = []
        for seed in range(60):
            rng = np.random.default_rng(seed)
            patients = np.arange(80) // 2
            truths, scores = (rng.random(40) < 0.4)[patients], rng.random(40)[patients]
            values = balanced_accuracy(scores, truths, np.zeros(80, int), patient_draws(patients, seed))[1:]
            low, high = np.nanquantile(values, [0.025, 0.975])
            covered.append(low <= 0.5 <= high)
        assert np.mean(covered) >= 0.85
