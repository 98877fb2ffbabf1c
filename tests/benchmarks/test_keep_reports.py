"""Stored reports keep their figures and name nothing of a data set."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "keep_reports.py"
REPORT = {
    "evaluation": "memorisation",
    "sets": {"real": {"crops": 165}},
    "spaces": {"pixel": {"ratio": 0.123456789, "distances_real": [0.5] * 30, "range": [0.1, 0.9]}},
    "suspects": [{"name": "a-secret-file"}],
    "images": [{"image_id": "a-secret-file"}],
    "targets": [{"name": "copies", "met": True}],
}


def keep(*paths, output):
    arguments = [sys.executable, SCRIPT, *paths, "--output", output]
    return subprocess.run(arguments, capture_output=True, text=True, check=False)


def test_figures_stay_and_names_go(tmp_path):
    (tmp_path / "report.json").write_text(json.dumps(REPORT))
    assert keep(tmp_path / "report.json", output=tmp_path / "kept").returncode == 0
    assert json.loads((tmp_path / "kept" / "report.json").read_text()) == {
        "evaluation": "memorisation",
        "sets": {"real": {"crops": 165}},
        "spaces": {"pixel": {"ratio": 0.123457, "range": [0.1, 0.9]}},
        "targets": [{"name": "copies", "met": True}],
    }


@pytest.mark.parametrize(
    ("content", "sentence"),
    [("{}", "names no evaluation"), ("{", "cannot be read as a report"), (None, "cannot be read as a report")],
)
def test_another_file_is_one_sentence_and_nothing_is_kept(tmp_path, content, sentence):
    (tmp_path / "report.json").write_text(json.dumps(REPORT))
    if content is not None:
        (tmp_path / "other.json").write_text(content)
    done = keep(tmp_path / "report.json", tmp_path / "other.json", output=tmp_path / "kept")
    assert (done.returncode, (tmp_path / "kept").exists()) == (1, False)
    assert sentence in done.stderr
    assert done.stderr.count("\n") == 1
