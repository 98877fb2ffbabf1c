"""Makes options from settings classes and settings from options, and suggests names for mistyped options."""

import argparse
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import Field, fields
from typing import Any, NoReturn, TypeVar, get_args, get_origin

Settings = TypeVar("Settings")


class Parser(argparse.ArgumentParser):
    """A parser that keeps the lines of descriptions and examples, and suggests the name nearest to a mistyped one."""

    def __init__(self, *, formatter_class: type = argparse.RawDescriptionHelpFormatter, **options: Any):
        super().__init__(formatter_class=formatter_class, **options)

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> tuple[Any, list[str]]:
        """As in argparse, but unknown arguments are an error of this parser, which knows the options to suggest."""
        self._given = sys.argv[1:] if args is None else list(args)
        found, self._given = super().parse_known_args(self._given, namespace)
        if self._given:
            self.error(f"unrecognized arguments: {' '.join(self._given)}")
        return found, []

    def error(self, message: str) -> NoReturn:
        """Prints usage and message, and exits with status 2."""
        known = list(self._option_string_actions)
        if chosen := re.search(r"invalid choice: '(.*)' \(choose from (.*)\)", message):
            message += _nearest(chosen[1], re.findall(r"[\w-]+", chosen[2]))
        else:
            for name in (word.partition("=")[0] for word in self._given if word.startswith("--")):
                if not any(option.startswith(name) for option in known) and (hint := _nearest(name, known)):
                    message = f"unknown option {name}{hint}"
        super().error(message)


def _nearest(name: str, known: list[str]) -> str:
    import difflib

    bare = {option.strip("-"): option for option in known}
    return "".join(f"; did you mean {bare[near]}?" for near in difflib.get_close_matches(name.strip("-"), bare, 1, 0.7))


def add_fields(parser: argparse.ArgumentParser, settings: type, *names: str, **same: Any) -> None:
    """Adds the options that fields of a settings class declare with `gbci_fast.options.option`.

    Args:
        parser: gets the options.
        settings: the settings class.
        names: fields, in the order of ``--help`` (default: all fields that are options, in their own order).
        same: arguments of `add_argument` for all these options, such as ``default=None`` if a preset decides.
    """
    for found in [settings.__dataclass_fields__[name] for name in names] or _options(settings):
        how = {name: value for name, value in found.metadata.items() if name not in ("flag", "least", "such")}
        origin, kind = get_origin(found.type), next(iter(get_args(found.type)), found.type)  # int of `int | None`
        if kind is bool:
            how["action"] = argparse.BooleanOptionalAction if found.default else "store_true"
        elif origin is tuple and "nargs" not in how:
            how["type"] = _list_parser(_flag(found), kind, found.metadata.get("such"))
        else:
            how["type"] = kind
        parser.add_argument(_flag(found), **how | {"default": _default(found.default)} | same)


def settings_of(args: argparse.Namespace, settings: type[Settings], **more: Any) -> Settings:
    """The settings from the options of `add_fields`; `more` are the fields that are not options of this command.

    Raises:
        GBCIError: the class rejects a value.
    """
    given = {found.name: getattr(args, dest) for found in _options(settings) if hasattr(args, dest := _dest(found))}
    return settings(**given | more)


def changes_of(args: argparse.Namespace, settings: type) -> dict[str, Any]:
    """{field: value} of the options that were given, for options with default None."""
    given = {found.name: getattr(args, _dest(found), None) for found in _options(settings)}
    return {name: tuple(x) if isinstance(x, list) else x for name, x in given.items() if x is not None}


def _options(settings: Any) -> list[Field]:
    return [found for found in fields(settings) if "help" in found.metadata]


def _flag(found: Field) -> str:
    return found.metadata.get("flag", f"--{found.name.replace('_', '-')}")


def _dest(found: Field) -> str:
    return _flag(found).removeprefix("--").replace("-", "_")


def _default(value: Any) -> Any:
    """A default as text of the command line, for ``--help``; argparse parses a text like a given value."""
    if isinstance(value, tuple) and value:
        return ",".join(map(str, value))
    return str(value) if isinstance(value, int | float) and not isinstance(value, bool) else value


def _list_parser(flag: str, kind: Callable[[str], Any], such: str | None) -> Callable[[str], tuple[Any, ...]]:
    def parse(text: str) -> tuple[Any, ...]:
        try:
            return tuple(kind(part) for part in text.split(","))
        except ValueError:
            name = flag.removeprefix("--").replace("-", " ")
            raise argparse.ArgumentTypeError(f"{name} is {text!r}; expected {such}") from None

    return parse
