"""The table that `gbci-fast evaluate utility` prints."""

import json
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from gbci_fast.cli.evaluate.utility import build_table

STORED = Path(__file__).parents[2] / "benchmarks" / "results" / "evaluation" / "utility.json"


@pytest.fixture
def report():
    """The stored report of the packaged weights."""
    return json.loads(STORED.read_text())


def lines_of(report):
    """The printed lines of the results, below the headings."""
    text = StringIO()
    Console(file=text, width=120).print(build_table(report))
    _, *rows = [line for line in text.getvalue().splitlines() if "." in line]
    return rows


def test_a_line_per_result_with_its_figures(report):
    rows = lines_of(report)
    assert f"{report['data']['test']['lesions']} lesions, " in build_table(report).title
    assert len(rows) == len(report["results"])
    for row, result in zip(rows, report["results"], strict=True):
        cells = row.split()
        assert f"{result['auc']['mean']:.3f}" in cells
        assert f"{result['auc']['low']:.2f}-{result['auc']['high']:.2f}" in cells
        assert cells[-1] == f"{result['balanced_accuracy']['mean']:.3f}"
        if result["auc_difference"] is not None:
            assert f"{result['auc_difference']['mean']:+.3f}" in cells


def test_an_arm_is_named_once(report):
    rows = lines_of(report)
    arms = [result["arm"] for result in report["results"]]
    firsts = [i for i, arm in enumerate(arms) if i == 0 or arms[i - 1] != arm]
    assert [i for i, row in enumerate(rows) if not row.startswith("  ")] == firsts


def test_no_interval_is_an_empty_cell(report):
    report["results"] = report["results"][:1]
    report["results"][0]["auc"] |= {"low": None, "high": None, "seed_sd": None}
    (row,) = lines_of(report)
    assert f"{report['results'][0]['auc']['mean']:.3f}" in row
    assert "None" not in row
