"""`gbci-fast phantom`: options, exit status, and messages."""

import csv

import pytest

from gbci_fast.cli import phantom
from gbci_fast.cli.parser import Parser
from gbci_fast.errors import GBCIError


@pytest.fixture
def parser():
    parser = Parser(prog="gbci-fast")
    phantom.add_parser(parser.add_subparsers())
    return parser


def run(parser, *arguments: object) -> None:
    args = parser.parse_args(["phantom", *map(str, arguments)])
    args.run(args)


def test_writes_the_data_set(parser, tmp_path, capsys):
    run(parser, "--output", tmp_path / "data", "--studies", 1, "--size", "160x128", "--seed", 5)
    assert len(list((tmp_path / "data").rglob("*.dicom"))) == 4
    assert capsys.readouterr().out == f"1 studies, 4 images: {tmp_path / 'data'}\n"


def test_a_second_run_is_refused(parser, tmp_path):
    arguments = ("--output", tmp_path / "data", "--studies", 1, "--size", 128)
    run(parser, *arguments)
    with pytest.raises(GBCIError, match="not empty; expected a new or an empty folder"):
        run(parser, *arguments)


def test_defaults(parser):
    args = parser.parse_args(["phantom", "--output", "somewhere"])
    assert (args.studies, args.seed, args.size) == (100, 0, (512, 512))


@pytest.mark.parametrize("size", ["big", "512x", "-512", "5.5"])
def test_bad_size_is_bad_usage(parser, size, capsys):
    with pytest.raises(SystemExit) as exit_info:
        parser.parse_args(["phantom", "--output", "somewhere", f"--size={size}"])
    assert exit_info.value.code == 2
    assert "expected HEIGHT or HEIGHTxWIDTH" in capsys.readouterr().err


def test_help_has_an_example(parser, capsys):
    with pytest.raises(SystemExit) as exit_info:
        parser.parse_args(["phantom", "--help"])
    assert exit_info.value.code == 0
    assert "gbci-fast phantom --output out/phantom" in capsys.readouterr().out


def test_options_reach_the_data_set(parser, tmp_path, capsys):
    options = ("--balance", "--prevalence", 1, "--growth", 2, "--interval", 90, "--twins", "--truth")
    run(parser, "--output", tmp_path / "data", "--studies", 2, "--size", 128, *options)
    assert capsys.readouterr().out == f"4 studies, 16 images: {tmp_path / 'data'}\n"
    with (tmp_path / "data" / "finding_annotations.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {row["days"] for row in rows} == {"0", "90"}
    assert sum(row["finding_categories"] != "['No Finding']" for row in rows) > 8
    assert len(list((tmp_path / "data" / "truth" / "breast").rglob("*.png"))) == 16
    assert list((tmp_path / "data" / "twins").rglob("*.dicom"))


@pytest.mark.parametrize(
    ("option", "sentence"),
    [
        (("--prevalence", 2), r"prevalence is 2\.0; expected findings per breast from 0 to 1"),
        (("--growth", 0), "number of timepoints is 0; expected 1 to 100"),
        (("--interval", 0), "interval between timepoints is 0; expected 1 to 3650 days"),
        (("--workers", 0), "number of workers is 0; expected at least 1"),
    ],
)
def test_bad_values_are_one_sentence_and_leave_nothing(parser, tmp_path, option, sentence):
    with pytest.raises(GBCIError, match=sentence):
        run(parser, "--output", tmp_path / "data", "--studies", 1, "--size", 128, *option)
    assert not list(tmp_path.iterdir())
