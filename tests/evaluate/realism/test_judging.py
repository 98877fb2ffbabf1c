"""Comparisons: planted differences and none, halves by patient, AUCs against plain code."""

from dataclasses import replace

import numpy as np
import pytest
from scipy import ndimage
from sklearn.metrics import roc_auc_score

from gbci_fast.errors import GBCIError
from gbci_fast.evaluate.metrics import patient_draws
from gbci_fast.evaluate.realism.judging import (
    HALVINGS,
    Comparison,
    Scores,
    compare,
    halve,
    planned_comparisons,
    summarize,
)
from gbci_fast.evaluate.settings import RealismSettings

TINY = RealismSettings(seeds=1, train_steps=2, train_batch=8)


def of(results, **wanted):
    wanted = {"region": "whole", "features": "all"} | wanted
    (row,) = (row for row in results if wanted.items() <= row.items())
    return row["auc"]


class TestPlan:
    def test_every_pair_is_judged_by_both_and_real_against_real_is_among_them(self):
        plan = planned_comparisons(["real", "painted", "autoencoder"])
        assert len(set(plan)) == len(plan)
        for judge in ("network", "boosting"):
            for pair in (
                ("real", "painted"),
                ("real", "autoencoder"),
                ("autoencoder", "painted"),
                ("real", "real"),
            ):
                assert Comparison(judge=judge, first=pair[0], second=pair[1]) in plan
            regions = {one.region for one in plan if (one.judge, one.first, one.second) == (judge, "real", "painted")}
            assert regions == {"whole", "interior", "ring"}
        assert [one.is_null for one in plan] == [one.second == "real" for one in plan]

    def test_pairs_of_a_missing_set_are_left_out(self):
        plan = planned_comparisons(["real", "painted"])
        assert {(one.first, one.second) for one in plan} == {("real", "painted"), ("real", "real")}


class TestCompare:
    @pytest.fixture(scope="class")
    @classmethod
    def results(cls, noisy_cases, side):
        """Painted lesions are blurred; those of the autoencoder are the real ones."""
        sides = []
        for seed, count in ((1, 40), (2, 24)):
            cases = noisy_cases(count, seed=seed, roots=("film", "digital"))
            blurred = [ndimage.gaussian_filter(case.pixels, 1.0) for case in cases]
            sides.append(side(cases, painted=blurred, autoencoder=[case.pixels for case in cases]))
        progress = []
        found = compare(*sides, TINY, None, lambda *step: progress.append(step))
        assert [step[1:] for step in progress if step[0] == "judging"][-1] == (len(progress) - 6,) * 2
        return found

    def test_boosting_tells_blurred_lesions_by_the_finest_band(self, results):
        for name, auc in of(results, judge="boosting", first="real", second="painted").items():
            assert auc["value"] > 0.95, name
            assert auc["low"] <= auc["value"] <= auc["high"]

    def test_equal_images_are_told_apart_by_nobody(self, results):
        for judge in ("network", "boosting"):
            for auc in of(results, judge=judge, first="real", second="autoencoder").values():
                assert (auc["value"], auc["low"], auc["high"]) == (0.5, 0.5, 0.5)

    def test_each_data_set_has_its_own_auc(self, results):
        for row in results:
            assert list(row["auc"]) == ["pooled", "film", "digital"]
        counts = {name: auc["lesions"] for name, auc in results[0]["auc"].items()}
        assert counts == {"pooled": 24, "film": 12, "digital": 12}

    def test_real_against_real_is_averaged_over_halvings(self, results):
        network = of(results, judge="network", first="real", second="real")["pooled"]
        boosting = of(results, judge="boosting", first="real", second="real")["pooled"]
        assert len(network["by_run"]) == len(boosting["by_run"]) == HALVINGS
        assert len(set(boosting["by_run"])) > 1
        assert boosting["value"] == pytest.approx(np.mean(boosting["by_run"]))
        assert boosting["low"] < boosting["value"] < boosting["high"]
        assert abs(boosting["value"] - 0.5) < 0.2

    def test_one_patient_is_too_few(self, noisy_cases, side):
        alone, several = side(noisy_cases(3, patients=1)), side(noisy_cases(3))
        with pytest.raises(GBCIError, match="the test lesions are of 1 patient; expected at least 2"):
            compare(several, alone, TINY)


class TestStatistics:
    def scores(self, count, seed=0, effect=1.0):
        rng = np.random.default_rng(seed)
        rows = np.arange(count)
        return Scores(first=rows, second=rows, of_first=rng.normal(effect, 1, count), of_second=rng.normal(size=count))

    def test_the_auc_is_that_of_scikit_learn_and_the_mean_over_runs(self, noisy_cases):
        cases = noisy_cases(30)
        runs = [self.scores(30, seed) for seed in range(3)]
        found = summarize(runs, cases, patient_draws([case.patient for case in cases], 0))["pooled"]
        wanted = [roc_auc_score([1] * 30 + [0] * 30, np.r_[run.of_first, run.of_second]) for run in runs]
        assert found["by_run"] == pytest.approx(wanted)
        assert found["value"] == pytest.approx(np.mean(wanted))

    def test_a_pooled_auc_alone_where_there_is_one_data_set(self, noisy_cases):
        cases = noisy_cases(6)
        found = summarize([self.scores(6)], cases, patient_draws([case.patient for case in cases], 0))
        assert list(found) == ["pooled"]

    def test_patients_with_many_lesions_widen_the_interval(self, noisy_cases):
        widths = []
        for patients in (5, 60):
            cases = noisy_cases(60, patients=patients)
            own = np.random.default_rng(1).normal(size=patients)[np.arange(60) % patients]
            run = replace(self.scores(60), of_first=own, of_second=-own)
            auc = summarize([run], cases, patient_draws([case.patient for case in cases], 0))["pooled"]
            widths.append(auc["high"] - auc["low"])
        assert widths[0] > 2 * widths[1]

    def test_a_set_without_lesions_of_a_data_set_has_no_auc_there(self, noisy_cases):
        cases = noisy_cases(8, roots=("film", "digital"))
        film = np.arange(0, 8, 2)
        run = Scores(first=film, second=film, of_first=np.ones(4), of_second=np.zeros(4))
        found = summarize([run], cases, patient_draws([case.patient for case in cases], 0))
        assert (found["film"]["value"], found["pooled"]["value"]) == (1.0, 1.0)
        assert found["digital"]["value"] is found["digital"]["low"] is None

    def test_halves_are_of_patients_and_differ_between_seeds(self):
        patients = [f"p{i % 7}" for i in range(30)]
        halves = [halve(patients, np.random.default_rng(seed)) for seed in range(2)]
        for first, second in halves:
            assert sorted([*first, *second]) == list(range(30))
            assert not {patients[i] for i in first} & {patients[i] for i in second}
            assert len({patients[i] for i in first}) == 3
        assert halves[0][0].tolist() != halves[1][0].tolist()
