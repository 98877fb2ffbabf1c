"""Fields of settings classes with metadata. The command line makes options from them, and they check values."""

from dataclasses import MISSING, field, fields
from typing import Any

from gbci_fast.errors import GBCIError


def option(default: Any = MISSING, help: str | None = None, **how: Any) -> Any:
    """A dataclass field that `gbci_fast.cli.parser.add_fields` turns into an option of the same name, type and default.

    Args:
        default: of the field.
        help: the text of ``--help``; ``%(default)s`` stands for the default.
        how: ``flag``, another name of the option; ``least``, see `check_least`; ``such``, a description of the elements
            of a comma-separated list, for error messages; and further arguments of
            `argparse.ArgumentParser.add_argument`, such as ``choices``.
    """
    return field(default=default, metadata={"help": help, **how})


def like(settings: type, name: str) -> Any:
    """A copy of a field of another settings class."""
    found = settings.__dataclass_fields__[name]
    return field(default=found.default, metadata=found.metadata)


def check_seed(seed: int) -> None:
    """Raises GBCIError if a seed is outside of [0, 2^63), which generators and the column of the manifest hold."""
    if not 0 <= seed < 2**63:
        raise GBCIError(f"seed is {seed}; expected a whole number from 0 to {2**63 - 1}")


def check_least(settings: Any) -> None:
    """Raises GBCIError if a number in a dataclass is below the ``least`` of its field; None is accepted."""
    for found in fields(settings):
        value, least = getattr(settings, found.name), found.metadata.get("least")
        if None not in (value, least) and value < least:
            raise GBCIError(f"{found.name} is {value}; expected at least {least}")
