"""The page of all evaluations, and the command that makes it."""

import json
import sys

import pytest
from PIL import Image

from gbci_fast.cli import build_parser
from gbci_fast.cli.evaluate import KINDS
from gbci_fast.cli.evaluate.all import arguments_of
from gbci_fast.cli.evaluate.options import print_targets
from gbci_fast.errors import GBCIError
from gbci_fast.evaluate.page import Section, write_page
from gbci_fast.evaluate.report import ABOUT_TARGETS, target
from gbci_fast.phantom import generate_phantom

OTHERS = ",".join(name for name in KINDS if name not in ("all", "paired"))


@pytest.fixture
def section(tmp_path):
    targets = [
        target("a < b", 1.0, 2.0, at_least=True),
        target("ratio", 1.0, 2.0, at_least=False),
        target("unknown", None, 0.5, at_least=True, note="no such lesions"),
    ]
    report = {"evaluation": "made up", "targets": targets, "seed": 7, "rows": [0.123456] * 10_000}
    (tmp_path / "report.json").write_text(json.dumps(report))
    Image.new("L", (4, 4)).save(tmp_path / "report.png")
    return Section(report=tmp_path / "report.json", figure=tmp_path / "report.png")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Test images."""
    folder = tmp_path_factory.mktemp("all")
    generate_phantom(folder / "root", studies=2, seed=3, size=128)
    for table in (folder / "root").glob("*.csv"):
        table.write_text(table.read_text().replace(",training,", ",test,"))
    return folder / "root"


@pytest.fixture(scope="module")
def evaluate_all(root, tiny_checkpoint):
    """`evaluate_all(output, *more)`: the command, with an untrained model."""

    def run(output, *more):
        arguments = [root, "--split", "test", "--output", output, "--weights", tiny_checkpoint(), "--steps", 1, *more]
        args = build_parser().parse_args(["evaluate", "all", *map(str, arguments)])
        args.run(args)

    return run


class TestPage:
    def test_every_target_is_listed_beside_its_bound(self, section, tmp_path):
        write_page(tmp_path / "index.html", [section])
        html = (tmp_path / "index.html").read_text()
        rows = [row for row in html.split("<tr>") if "made up" in row]
        verdicts = ('class="outside"', 'class="inside"', 'class="open"')
        assert [[word in row for word in verdicts] for row in rows] == [[i == j for i in range(3)] for j in range(3)]
        assert "a &lt; b" in html
        assert "no such lesions" in html
        assert ABOUT_TARGETS in html

    def test_the_page_is_one_file_and_leaves_long_lists_out(self, section, tmp_path):
        write_page(tmp_path / "index.html", [section])
        html = (tmp_path / "index.html").read_text()
        assert "data:image/png;base64," in html
        assert "&#34;seed&#34;: 7" in html
        assert "0.123456" not in html

    def test_a_foreign_report_is_refused(self, section, tmp_path):
        section.report.write_text("[]")
        with pytest.raises(GBCIError, match="names no evaluation; expected a report of"):
            write_page(tmp_path / "index.html", [section])
        assert not (tmp_path / "index.html").exists()

    def test_any_damaged_report_is_one_sentence(self, section, tmp_path):
        whole = section.report.read_text()
        good = json.loads(whole)
        damaged = ["", "[" * 100_000, whole[: len(whole) // 2], "null", "NaN", json.dumps(good | {"evaluation": 7})]
        damaged += [json.dumps(good | {"targets": targets}) for targets in (None, 7, "x", [None], [[]], [{}], {"a": 1})]
        for key in good["targets"][0]:
            for value in ([], {}, "x" if key not in ("name", "note") else 7):
                damaged.append(json.dumps(good | {"targets": [good["targets"][0] | {key: value}]}))
            damaged.append(json.dumps(good | {"targets": [{k: v for k, v in good["targets"][0].items() if k != key}]}))
        for text in damaged:
            section.report.write_text(text)
            with pytest.raises(GBCIError, match=r"report\.json"):
                write_page(tmp_path / "index.html", [section])


def test_targets_are_printed_as_what_they_are_about(section, capsys):
    print_targets(json.loads(section.report.read_text()))
    printed = " ".join(capsys.readouterr().out.split())
    assert printed == (
        f"{ABOUT_TARGETS} a < b: 1 (bound >= 2: outside) ratio: 1 (bound <= 2: inside) "
        "unknown: - (bound >= 0.5: not judged) no such lesions"
    )
    assert "packaged model" in ABOUT_TARGETS
    print_targets({"targets": []})
    assert capsys.readouterr().out == ""


class TestCommand:
    @pytest.mark.parametrize("kind", [name for name in KINDS if name != "all"])
    def test_every_kind_takes_the_shared_options(self, kind, tmp_path):
        options = "--weights W --steps 3 --guidance 4 --seed 5 --batch-size 4 --limit 6 --device cpu"
        options += " --tier exact --split test"
        shared = build_parser().parse_args(["evaluate", "all", "ROOT", "--output", str(tmp_path), *options.split()])
        args = build_parser().parse_args(arguments_of(kind, shared, tmp_path / "report.json"))
        assert (args.kind, args.output.name) == (kind, "report.json")
        for name in ("split", "weights", "steps", "guidance", "seed", "batch_size", "limit", "device"):
            assert getattr(args, name) == getattr(shared, name), name
        assert kind == "paired" or args.tier == "exact"

    def test_reports_figures_and_page(self, evaluate_all, tmp_path, capsys):
        evaluate_all(tmp_path / "out", "--skip", OTHERS, "--limit", 1)
        assert {path.name for path in (tmp_path / "out").iterdir()} == {
            "paired.json",
            "paired.png",
            "index.html",
            "arguments.json",
            ".finished",
        }
        assert json.loads((tmp_path / "out" / "paired.json").read_text())["settings"]["limit"] == 1
        assert "paired" in (tmp_path / "out" / "index.html").read_text()

    def test_resume_keeps_reports_of_the_same_arguments_alone(self, evaluate_all, tmp_path, capsys):
        given = ("--skip", OTHERS, "--limit", 1)
        evaluate_all(tmp_path / "out", *given)
        before = (tmp_path / "out" / "paired.json").stat().st_mtime_ns
        with pytest.raises(GBCIError, match="is not empty; pass --resume"):
            evaluate_all(tmp_path / "out", *given)
        evaluate_all(tmp_path / "out", *given, "--resume")
        assert (tmp_path / "out" / "paired.json").stat().st_mtime_ns == before
        report = (tmp_path / "out" / "paired.json").read_bytes()
        (tmp_path / "out" / "paired.json").write_bytes(report[:-1])
        evaluate_all(tmp_path / "out", *given, "--resume")
        assert json.loads((tmp_path / "out" / "paired.json").read_bytes()) == json.loads(report)
        with pytest.raises(GBCIError, match=r"holds another job: guidance 2\.0, not 1\.0; resume with"):
            evaluate_all(tmp_path / "out", *given, "--resume", "--guidance", 1)

    def test_unknown_kinds_cannot_be_skipped(self, evaluate_all, tmp_path):
        with pytest.raises(GBCIError, match="--skip names 'beauty'; expected out of paired"):
            evaluate_all(tmp_path / "out", "--skip", "beauty")
        assert not (tmp_path / "out").exists()


def test_packages_that_a_kind_lacks_are_named_before_any_work(evaluate_all, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(GBCIError, match="scikit-learn is not installed; install it by"):
        evaluate_all(tmp_path / "out")
    assert not (tmp_path / "out").exists()
