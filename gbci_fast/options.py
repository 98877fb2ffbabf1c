"""What a field of a settings class says of itself, once, as an option of the command line and as a value to check."""

from dataclasses import MISSING, field, fields
from typing import Any

from gbci_fast.errors import GBCIError


def option(default: Any = MISSING, help: str | None = None, **how: Any) -> Any:
    """A field that `gbci_fast.cli.parser.add_fields` makes an option of, with the field's name, type and default.

    Args:
        help: what ``--help`` says; ``%(default)s`` in it is the default.
        how: ``flag``, another name of the option; ``least``, see `check_least`; ``such``, of a list with commas, what
            is expected; and what `argparse.ArgumentParser.add_argument` takes besides, such as ``choices``.
    """
    return field(default=default, metadata={"help": help, **how})


def like(settings: type, name: str) -> Any:
    """The field of another settings class once more."""
    found = settings.__dataclass_fields__[name]
    return field(default=found.default, metadata=found.metadata)


def check_least(settings: Any) -> None:
    """Raises GBCIError where a number of a dataclass is below the ``least`` of its field; None is not."""
    for found in fields(settings):
        value, least = getattr(settings, found.name), found.metadata.get("least")
        if None not in (value, least) and value < least:
            raise GBCIError(f"{found.name} is {value}; expected at least {least}")
