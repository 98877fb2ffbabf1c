"""`gbci-fast evaluate realism`: its options, what it refuses, and its table."""

import json
from io import StringIO

import pytest
from rich.console import Console

from gbci_fast.cli import build_parser
from gbci_fast.cli.evaluate.realism import build_table
from gbci_fast.cli.parser import settings_of
from gbci_fast.errors import GBCIError
from gbci_fast.evaluate.realism.boosting import SETTINGS
from gbci_fast.evaluate.settings import PaintSettings
from gbci_fast.phantom import generate_phantom


def parse(*options):
    return build_parser().parse_args(["evaluate", "realism", "ROOT", "--output", "report.json", *options])


def test_the_student_paints_by_default():
    painting = settings_of(parse(), PaintSettings)
    assert (painting.steps, painting.tier) == (4, "approximate")
    assert settings_of(parse("--steps", "20", "--tier", "exact"), PaintSettings).steps == 20


def test_all_leaves_the_sampler_to_each_kind():
    from gbci_fast.cli.evaluate.all import arguments_of

    shared = build_parser().parse_args(["evaluate", "all", "ROOT", "--output", "out"])
    for kind, steps in (("realism", 4), ("distribution", 20)):
        assert build_parser().parse_args(arguments_of(kind, shared, shared.output)).steps == steps


@pytest.mark.parametrize("option", [("--steps", "5"), ("--guidance", "3"), ("--painted", "folder")])
def test_options_of_painting_are_refused_beside_paintings(option, tmp_path):
    args = build_parser().parse_args(
        ["evaluate", "realism", "ROOT", "--output", str(tmp_path / "r.json"), "--paintings", "p.npz", *option]
    )
    with pytest.raises(GBCIError, match=rf"{option[0]} is .* beside --paintings, where nothing is painted; drop one"):
        args.run(args)


def test_paintings_are_either_read_or_written(capsys):
    with pytest.raises(SystemExit):
        parse("--paintings", "one.npz", "--save-paintings", "two.npz")
    assert "not allowed with argument --paintings" in capsys.readouterr().err


def test_a_line_per_comparison_and_a_column_per_data_set():
    def row(judge, features="all", region="whole", second="painted", film=0.75):
        auc = {"pooled": {"value": 0.9, "low": 0.8, "high": 1.0}, "film": {"value": film, "low": None, "high": None}}
        return {"judge": judge, "first": "real", "second": second, "region": region, "features": features, "auc": auc}

    report = {
        "sets": {"judged": {"pooled": {"lesions": 245, "patients": 108}}},
        "judged_on": "fold C of the training split",
        "results": [
            row("network", region="ring"),
            row("boosting", features="without finest"),
            row("boosting", features="contrast, histogram, shape alone"),
            row("boosting", second="real", film=None),
        ],
    }
    text = StringIO()
    Console(file=text, width=80).print(build_table(report))
    shown = text.getvalue()
    assert "245 lesions of 108 patients, fold C of the training split" in " ".join(shown.split())
    lines = [line.strip() for line in shown.splitlines()]
    assert [line for line in lines if line.startswith("real/")] == ["real/painted", "real/real"]
    rows = [line.split("0.900 0.80-1.00") for line in lines if "0.900 0.80-1.00" in line]
    assert [[cell.strip() for cell in row] for row in rows] == [
        ["network, ring", "0.750"],
        ["boosting, without finest", "0.750"],
        ["boosting, plain", "0.750"],
        ["boosting, whole", ""],
    ]


class TestCommand:
    @pytest.fixture(scope="class")
    @classmethod
    def evaluate(cls, tiny_checkpoint, tmp_path_factory):
        """`evaluate(output, *more)`: the command, with an untrained model and judges that learn little."""
        root = tmp_path_factory.mktemp("realism") / "phantom"
        generate_phantom(root, studies=12, seed=10, size=128)

        def run(output, *more):
            given = [root, "--output", output, "--weights", tiny_checkpoint(), "--seeds", 1, "--train-steps", 2, *more]
            args = build_parser().parse_args(["evaluate", "realism", *map(str, given), "--limit", "6"])
            args.run(args)
            return json.loads(output.read_text())

        return run

    def test_paintings_that_were_saved_give_the_same_figures(self, evaluate, tmp_path, monkeypatch, capsys):
        monkeypatch.setitem(SETTINGS, "max_iter", 5)
        saved, folder = tmp_path / "paintings.npz", tmp_path / "other"
        report = evaluate(tmp_path / "report.json", "--save-paintings", saved, "--steps", 1)
        assert (tmp_path / "report.png").stat().st_size > 10_000
        printed = capsys.readouterr().out
        assert f"report: {tmp_path / 'report.json'}" in printed
        assert printed.count("self-check of the network: ") == 4  # three checks and the verdict
        folder.mkdir()
        again = evaluate(folder / "report.json", "--paintings", saved)
        assert again["results"] == report["results"]
        assert again["settings"]["painting"]["steps"] == 1
        assert again["paintings"] == "paintings.npz"
        assert not (folder / "painted").exists()
        checks = [check["passed"] for found in again["self_checks"].values() for check in found["checks"]]
        assert len(checks) == 6
        assert None not in checks
