"""`gbci-fast phantom`: options, exit status, and what it says."""

import argparse

import pytest

from gbci_fast.cli import phantom
from gbci_fast.errors import GBCIError


@pytest.fixture
def parser():
    parser = argparse.ArgumentParser(prog="gbci-fast")
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
