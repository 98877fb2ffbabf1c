"""Values of options that several commands share."""

import pytest

from gbci_fast.cli import build_parser


@pytest.mark.parametrize("command", [("generate", "x", "--output", "y"), ("phantom", "--output", "y")])
@pytest.mark.parametrize("seed", ["-1", "1.5", "x", str(2**63), str(2**100)])
def test_a_seed_that_tables_and_generators_cannot_hold(capsys, command, seed):
    with pytest.raises(SystemExit) as ended:
        build_parser().parse_args([*command, f"--seed={seed}"])
    assert ended.value.code == 2
    assert f"seed is '{seed}'; expected a whole number from 0 to 9223372036854775807" in capsys.readouterr().err


def test_the_largest_seed():
    assert build_parser().parse_args(["phantom", "--output", "y", "--seed", str(2**63 - 1)]).seed == 2**63 - 1
