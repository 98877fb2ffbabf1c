"""An obedient painter has a share near 1, a deaf one 0; controls, nulls, targets, figure and tables."""

import io
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from gbci_fast.cli.evaluate.obedience import build_tables
from gbci_fast.errors import GBCIError
from gbci_fast.evaluate.obedience.evaluation import choose, evaluate_obedience
from gbci_fast.evaluate.obedience.figure import draw_figure
from gbci_fast.evaluate.obedience.switches import CONTROL, OWN, SWITCHES, TELLINGS
from gbci_fast.evaluate.settings import ObedienceSettings

STORED = Path(__file__).parents[3] / "benchmarks" / "results" / "evaluation" / "obedience.json"
SETTINGS = ObedienceSettings(lesions=16, seeds=2)


@pytest.fixture(scope="module")
def told(masses, obedient, reader):
    """The report on a painter that paints spicules where they are told."""
    return evaluate_obedience(masses, obedient, reader, SETTINGS)


@pytest.fixture(scope="module")
def untold(masses, deaf, reader):
    """The report on a painter that paints by the seed alone."""
    return evaluate_obedience(masses, deaf, reader, SETTINGS)


def target(report, start):
    return next(entry for entry in report["targets"] if entry["name"].startswith(start))


class TestPainters:
    def test_spicules_that_are_told_and_painted_are_a_share_of_one(self, told):
        margin = told["switches"]["margin"]
        spiculation = margin["measures"]["spiculation"]
        assert spiculation["used"]
        assert spiculation["real_auc"]["low"] > 0.9
        assert spiculation["share"]["value"] == pytest.approx(1, abs=0.25)
        reading = margin["reading"]
        assert reading["auc"]["value"] > 0.95
        assert reading["higher"]["value"] > 0.95
        assert reading["share"]["value"] == pytest.approx(1, abs=0.25)
        assert margin["change"]["value"] > 0.5

    def test_a_deaf_painter_changes_nothing(self, untold):
        for found in untold["switches"].values():
            assert found["change"]["value"] == 0
            assert found["place"]["moved"]["value"] == 0
        margin = untold["switches"]["margin"]
        assert margin["reading"]["auc"]["value"] == 0.5
        assert margin["reading"]["higher"]["value"] == 0.5
        assert margin["measures"]["spiculation"]["share"]["value"] == 0
        assert margin["measures"]["spiculation"]["seed_share"]["value"] > 0.2

    def test_a_switch_that_the_painter_does_not_know_stays_at_its_null(self, told):
        birads = told["switches"]["BI-RADS"]
        assert birads["change"]["value"] == 0
        assert told["switches"]["margin"]["reading"]["null_auc"]["value"] == 0.5

    def test_a_meaningless_word_that_repaints_misses_the_target(self, masses, obedient, reader):
        def nervous(cases, descriptions):
            words = [len(told.report or "") for told in descriptions]
            return obedient([replace(c, seed=c.seed + n) for c, n in zip(cases, words, strict=True)], descriptions)

        report = evaluate_obedience(masses, nervous, reader, SETTINGS)
        assert report["switches"][CONTROL]["change"]["value"] > 0.5
        assert target(report, "obedience, control")["met"] is False

    def test_one_that_moves_the_lesion_when_told_otherwise_misses_the_target(self, masses, told, obedient, reader):
        def moving(cases, descriptions):
            images = obedient(cases, descriptions)
            shifts = [3 * (d.attributes.breast_density == "D") for d in descriptions]
            moved = [np.roll(image, shift, 0) for image, shift in zip(images, shifts, strict=True)]
            return [np.where(case.mask, image, case.pixels) for case, image in zip(cases, moved, strict=True)]

        place = evaluate_obedience(masses, moving, reader, SETTINGS)["switches"]["density"]["place"]
        assert place["moved"]["value"] == pytest.approx(3, abs=0.7)
        assert place["moved_share"]["value"] > 3
        assert target(told, "obedience, control")["met"]


class TestRealClasses:
    def test_normal_places_are_of_no_class_but_no_finding(self, told):
        assert told["real"]["normal"] > 10
        assert told["switches"]["margin"]["measures"]["contrast"]["real"] == {"ones": 24, "zeros": 24}
        nothing = told["switches"]["no finding"]["measures"]["contrast"]
        assert nothing["real"] == {"ones": told["real"]["normal"], "zeros": 48}
        assert nothing["used"]
        assert nothing["real_difference"]["high"] < 0

    def test_a_data_set_of_one_class_tells_nothing_of_the_classes(self, masses, disk_case, deaf, reader, told):
        # As digital images of which every lesion is malignant, beside film.
        ill = [disk_case(100 + i, True, root="digital") for i in range(20)]
        found = evaluate_obedience([*masses, *ill], deaf, reader, SETTINGS)["switches"]["margin"]
        assert found["reading"]["real"] == {"ones": 24, "zeros": 24}
        assert found["measures"]["contrast"]["real"] == {"ones": 24, "zeros": 24}
        known = told["switches"]["margin"]["reading"]["real_auc"]["value"]
        assert found["reading"]["real_auc"]["value"] == pytest.approx(known, abs=1e-9)
        apart = [replace(case, root=case.attributes.margin) for case in masses]
        found = evaluate_obedience(apart, deaf, reader, SETTINGS)["switches"]["margin"]
        assert found["reading"]["reason"] == "fewer than 10 real lesions of a class"


class TestWhatIsNotJudged:
    def test_a_reader_that_tells_no_real_classes_apart_gives_no_share(self, masses, obedient):
        class Guesser:
            tasks = ("margin",)

            def read(self, cases, images=None):
                pixels = [case.image for case in cases] if images is None else images
                return {"margin": np.array([float(np.sum(x, dtype=np.float64) * 1e6 % 7) for x in pixels])}

        reading = evaluate_obedience(masses, obedient, Guesser(), SETTINGS)["switches"]["margin"]["reading"]
        assert reading["real_difference"]["low"] < 0 < reading["real_difference"]["high"]
        assert reading["share"] == reading["null_share"] == {"value": None, "low": None, "high": None}
        assert reading["auc"]["value"] is not None

    def test_an_attribute_without_a_reader_says_so(self, told):
        assert told["switches"]["density"]["reading"]["reason"] == "no reader knows this attribute"
        shape = told["switches"]["shape"]["reading"]
        assert (shape["judged"], shape["reason"]) == (False, "no reader of shape is admitted")

    def test_a_measure_in_which_real_classes_do_not_differ_gives_no_share(self, told):
        density = told["switches"]["density"]["measures"]["spiculation"]
        birads = told["switches"]["BI-RADS"]["measures"]["spiculation"]
        for found in (density, birads):
            assert (found["used"], found["share"]) == (False, None)
        assert density["real_auc"]["low"] <= 0.5 <= density["real_auc"]["high"]
        assert density["reason"] == "real lesions of the two classes are not shown to differ"
        assert birads["reason"] == "fewer than 10 real lesions of a class"

    def test_too_few_real_lesions_give_no_reading(self, masses, deaf, reader):
        few = [case for i, case in enumerate(masses) if case.attributes.margin == "spiculated" or i < 8]
        found = evaluate_obedience(few, deaf, reader, SETTINGS, yardstick=masses)["switches"]["margin"]
        assert found["reading"]["reason"] == "fewer than 10 real lesions of a class"
        assert found["measures"]["spiculation"]["used"]

    def test_no_admitted_reader_reads_nothing(self, masses, deaf):
        class Blind:
            tasks = ()

            def read(self, cases, images=None):
                raise AssertionError("nothing is to be read")

        report = evaluate_obedience(masses, deaf, Blind(), SETTINGS)
        assert not any(found["reading"]["judged"] for found in report["switches"].values())


class TestPaintings:
    def test_every_telling_is_painted_at_the_same_seeds(self, masses, deaf, reader):
        asked = []

        def painter(cases, descriptions):
            asked.append((tuple(case.seed for case in cases), descriptions))
            return deaf(cases, descriptions)

        report = evaluate_obedience(masses, painter, reader, SETTINGS)
        assert len(asked) == len(TELLINGS) * SETTINGS.seeds
        assert len({seeds for seeds, _ in asked}) == SETTINGS.seeds
        assert len({tuple(told) for _, told in asked}) == len(TELLINGS)
        assert report["paintings"] == 16 * 2 * len(TELLINGS)

    def test_masses_of_many_patients_are_chosen(self, masses):
        others = [
            replace(case, attributes=replace(case.attributes, finding_categories=("Asymmetry",))) for case in masses
        ]
        chosen = choose([*masses, *others], 24, seed=0)
        assert len({case.patient for case in chosen}) == 24
        assert {case.attributes.finding_categories for case in chosen} == {("Mass",)}
        assert len(choose(masses, 100, seed=0)) == 48
        assert [c.name for c in choose(masses, 5, seed=1)] != [c.name for c in choose(masses, 5, seed=0)]
        with pytest.raises(GBCIError, match="of 48 lesions 0 are masses; expected masses of two patients or more"):
            choose(others, 5, seed=0)

    def test_the_default_reads_no_test_image(self):
        assert ObedienceSettings().split == "C"
        assert (ObedienceSettings().painting.steps, ObedienceSettings().painting.tier) == (4, "approximate")


class TestOutput:
    def test_figure_and_tables(self, told, tmp_path):
        draw_figure(tmp_path / "figure.png", told)
        assert (tmp_path / "figure.png").stat().st_size > 10_000
        report = told | {"settings": {"seeds": 2}, "minutes": {"all": 3.2}}
        for found in (report, json.loads(STORED.read_text())):
            tables = build_tables(found)
            assert [table.row_count for table in tables] == [len(SWITCHES)] * 2
            console = Console(width=80, file=io.StringIO())
            for table in tables:
                console.print(table)
            assert "…" not in console.file.getvalue()
        assert OWN not in report["switches"]

    def test_data_sets_apart(self, masses, obedient, reader):
        two = [replace(case, root="film" if i % 4 < 2 else "digital") for i, case in enumerate(masses)]
        found = evaluate_obedience(two, obedient, reader, SETTINGS)["switches"]["margin"]["roots"]
        assert set(found) == {"film", "digital"}
        assert sum(part["lesions"] for part in found.values()) == 16
