"""Options from settings classes, and suggestions for mistyped names."""

import subprocess
import sys
from dataclasses import dataclass

import pytest

from gbci_fast import __version__
from gbci_fast.cli import main
from gbci_fast.cli.parser import Parser, add_fields, changes_of, settings_of
from gbci_fast.errors import GBCIError
from gbci_fast.options import check_least, like, option


@dataclass(frozen=True, kw_only=True)
class Oven:
    heat: float = option(180.5, "in degrees (default: %(default)s)", least=20)
    steps: int | None = option(None, flag="--number-of-steps", metavar="N")
    fan: bool = option(True)
    light: bool = option(False)
    trays: tuple[int, ...] = option((1, 3), "(default: %(default)s)", such="numbers such as 1,3")
    kind: str = option("gas", choices=("gas", "electric"))
    inner: int = 7

    def __post_init__(self):
        check_least(self)


@dataclass(frozen=True, kw_only=True)
class Grill:
    heat: float = like(Oven, "heat")
    crops: tuple[int, ...] = option((28,), nargs="+")

    def __post_init__(self):
        check_least(self)


@pytest.fixture
def parser():
    parser = Parser(prog="cook")
    add_fields(parser, Oven)
    return parser


def refused(capsys, *arguments):
    with pytest.raises(SystemExit) as exit_info:
        main(arguments)
    assert exit_info.value.code == 2
    usage, *_, sentence = capsys.readouterr().err.splitlines()
    assert usage.startswith("usage: gbci-fast")
    return sentence


def test_defaults_are_those_of_the_class(parser):
    assert settings_of(parser.parse_args([]), Oven) == Oven()
    assert "in degrees (default: 180.5)" in parser.format_help()
    assert "(default: 1,3)" in parser.format_help()


def test_every_option_reaches_its_field(parser):
    given = "--heat 200 --number-of-steps 4 --no-fan --light --trays 2,4,5 --kind electric"
    made = Oven(heat=200.0, steps=4, fan=False, light=True, trays=(2, 4, 5), kind="electric", inner=8)
    assert settings_of(parser.parse_args(given.split()), Oven, inner=8) == made


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("--heat warm", "argument --heat: invalid float value: 'warm'"),
        ("--trays 1,x", "argument --trays: trays is '1,x'; expected numbers such as 1,3"),
        ("--kind wood", "argument --kind: invalid choice: 'wood'"),
        ("--inner 3", "unrecognized arguments: --inner 3"),
    ],
)
def test_what_no_field_takes_is_bad_usage(parser, capsys, given, said):
    with pytest.raises(SystemExit, match="2"):
        parser.parse_args(given.split())
    assert f"cook: error: {said}" in capsys.readouterr().err


@pytest.mark.parametrize("settings", [Oven, Grill])
def test_a_number_below_its_least_is_refused(settings):
    assert settings(heat=20).heat == 20
    with pytest.raises(GBCIError, match="heat is 19; expected at least 20"):
        settings(heat=19)


def test_only_what_is_given_changes_a_preset():
    parser = Parser()
    add_fields(parser, Grill, default=None)
    assert changes_of(parser.parse_args([]), Grill) == {}
    assert changes_of(parser.parse_args(["--crops", "16", "28"]), Grill) == {"crops": (16, 28)}


def test_version(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert capsys.readouterr().out == f"gbci-fast {__version__}\n"


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("generate in --output out --varients 3", "unknown option --varients; did you mean --variants?"),
        ("generate in --output out --varients=3", "unknown option --varients; did you mean --variants?"),
        ("phantom --ouput out", "unknown option --ouput; did you mean --output?"),
        ("train ldm --data in --output out --vae vae --latent-crop 3 --stps 4", "--stps; did you mean --steps?"),
        ("evaluate paired in --output out --gidance 2", "--gidance; did you mean --guidance?"),
        ("--verison", "gbci-fast: error: unknown option --verison; did you mean --version?"),
    ],
)
def test_a_mistyped_option_is_told_the_right_one(capsys, command, said):
    assert refused(capsys, *command.split()).endswith(said)


@pytest.mark.parametrize(
    ("command", "near"),
    [
        ("gernate in --output out", "generate"),
        ("evaluate memorization in --output out", "memorisation"),
        ("generate in --output out --tier tolerence", "tolerance"),
    ],
)
def test_a_mistyped_name_is_told_the_right_one(capsys, command, near):
    sentence = refused(capsys, *command.split())
    assert "invalid choice: " in sentence
    assert sentence.endswith(f"); did you mean {near}?")


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("generate in --output out --nonsense", "error: unrecognized arguments: --nonsense"),
        ("generate in more --output out", "error: unrecognized arguments: more"),
        ("generate in --out out --varia x", "error: argument --variants: invalid int value: 'x'"),
        ("--nonsense doctor --json", "error: unrecognized arguments: --nonsense"),
    ],
)
def test_what_is_like_nothing_or_begins_a_name_is_not_guessed_at(capsys, command, said):
    assert refused(capsys, *command.split()).endswith(said)


def test_the_command_line_starts_without_heavy_modules():
    heavy = ("torch", "numpy", "pandas", "diffusers", "PIL", "pydicom", "rich")
    code = f"import sys, gbci_fast.cli as cli; cli.build_parser(); print([m for m in {heavy} if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"
