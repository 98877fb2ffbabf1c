"""`gbci-fast evaluate KIND`: one file per kind of evidence, each with `add_parser(kinds)` and `run(args)`."""

import argparse
import importlib

KINDS = ("paired", "adherence")
EXAMPLE = """\
example:
  gbci-fast evaluate paired VINDR_ROOT --output out/paired.json
  gbci-fast evaluate paired VINDR_ROOT OTHER_ROOT --weights runs/ldm/pipeline --output out/paired.json --limit 16
  gbci-fast evaluate adherence VINDR_ROOT --output out/adherence.json
"""


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Adds `evaluate` with one sub-command per kind of evidence."""
    parser = subparsers.add_parser(
        "evaluate",
        help="measure the quality of the model",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="KIND")
    for name in KINDS:
        importlib.import_module(f"gbci_fast.cli.evaluate.{name}").add_parser(kinds)
