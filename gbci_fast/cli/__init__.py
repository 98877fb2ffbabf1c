"""`gbci-fast`: one file per command, each with `add_parser(subparsers)` and `run(args)`."""

import argparse
import importlib
import signal
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from gbci_fast import __version__
from gbci_fast.cli.parser import Parser
from gbci_fast.errors import GBCIError, InputWarning, one_line

OUTPUTS = ("output", "write_plan", "index")
COMMANDS = ("generate", "phantom", "prepare", "priors", "train", "evaluate", "export", "doctor")


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands. A command imports its heavy modules only when it runs."""
    parser = Parser(
        prog="gbci-fast",
        description="Synthetic breast lesions for research data sets. Not for diagnosis.",
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name in COMMANDS:
        importlib.import_module(f"gbci_fast.cli.{name}").add_parser(subparsers)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; returns the exit status: 0 success, 1 failure (one sentence on stderr), 130 interrupted.

    Bad usage exits with status 2 (SystemExit).
    """
    args = build_parser().parse_args(argv)
    # SIGTERM raises KeyboardInterrupt like Ctrl-C, so that the same clean-up runs.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        _check_outputs(args)
        with _notes():
            args.run(args)
    except GBCIError as error:
        print(f"gbci-fast {args.command}: {error}", file=sys.stderr)
        return 1
    except OSError as error:  # no space, no permission, a file where a folder should be
        where = f"{error.filename}: " if error.filename else ""
        print(f"gbci-fast {args.command}: {one_line(f'{where}{error.strerror or error}')}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"gbci-fast {args.command}: interrupted", file=sys.stderr)
        return 130
    return 0


def _check_outputs(args: argparse.Namespace) -> None:
    """Raises GBCIError, before any work, if an output's name is not UTF-8: tables could not contain it."""
    for name in OUTPUTS:
        path = getattr(args, name, None)
        try:
            str(path).encode()
        except UnicodeEncodeError:
            raise GBCIError(f"{path} is not UTF-8; choose another name for --{name.replace('_', '-')}") from None


@contextmanager
def _notes() -> Iterator[None]:
    """Prints each different `InputWarning` once, as one line."""
    with warnings.catch_warnings():
        warnings.filterwarnings("default", category=InputWarning)
        show = warnings.showwarning

        def print_note(message, category, *where, **options) -> None:
            if issubclass(category, InputWarning):
                print(f"note: {one_line(str(message))}", file=sys.stderr)
            else:
                show(message, category, *where, **options)

        warnings.showwarning = print_note
        yield
