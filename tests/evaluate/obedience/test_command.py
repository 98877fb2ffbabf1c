"""`gbci-fast evaluate obedience` on phantoms with an untrained model and a reader of nothing."""

import json
import re

import pytest

from gbci_fast.cli import build_parser
from gbci_fast.evaluate.obedience.switches import SWITCHES, TELLINGS
from gbci_fast.phantom import generate_phantom


class Blind:
    tasks, digest = (), "none"


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("obedience") / "root"
    generate_phantom(folder, studies=6, seed=3, size=128)
    first, *_ = (
        line for line in (folder / "finding_annotations.csv").read_text().splitlines() if "Calcification" in line
    )
    patient = next(cell for cell in first.split(",") if re.fullmatch("[0-9a-f]{12}", cell))
    for table in folder.glob("*.csv"):  # calcifications and asymmetries are told as masses; one patient trains
        text = re.sub("Suspicious Calcification|Focal Asymmetry", "Mass", table.read_text())
        lines = [line if patient in line else line.replace(",training", ",test") for line in text.splitlines()]
        table.write_text("\n".join(lines) + "\n")
    return folder


def test_report_figure_sheet_and_kept_paintings(root, tiny_checkpoint, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("gbci_fast.evaluate.readers.load_readers", lambda folder: Blind())

    def run():
        options = f"--split test --lesions 2 --seeds 2 --steps 1 --tier exact --weights {tiny_checkpoint()}"
        files = f"--output {tmp_path}/out.json --sheet {tmp_path}/sheet.png"
        args = build_parser().parse_args(f"evaluate obedience {root} {files} {options}".split())
        args.run(args)
        return json.loads((tmp_path / "out.json").read_text())

    report = run()
    assert (tmp_path / "out.png").is_file()
    assert (tmp_path / "sheet.png").is_file()
    assert set(report["switches"]) == {switch.name for switch in SWITCHES}
    assert report["settings"]["painting"]["steps"] == 1
    assert 0 < report["minutes"]["painting"] < report["minutes"]["all"]
    out = capsys.readouterr().out
    assert all(switch.name in out for switch in SWITCHES)
    assert "obedience, control" in out

    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "painted").glob("*.npy")}
    assert len(kept) == len(TELLINGS) * 2 + 2  # and the sheet's eleven in two batches
    assert run()["switches"] == report["switches"]
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "painted").glob("*.npy")} == kept
