"""`gbci-fast evaluate KIND`: one file per kind of evidence, each with `add_parser(kinds)` and `run(args)`."""

import argparse
import importlib

KINDS = ("paired", "distribution", "obedience", "realism", "memorisation", "utility", "all")
EXAMPLE = """\
example:
  gbci-fast evaluate distribution VINDR_ROOT --output out/distribution.json
  gbci-fast evaluate paired VINDR_ROOT --output out/paired.json
  gbci-fast evaluate paired VINDR_ROOT OTHER_ROOT --weights runs/ldm/pipeline --output out/paired.json --limit 16
  gbci-fast evaluate memorisation VINDR_ROOT --output out/memorisation.json
  gbci-fast evaluate utility VINDR_ROOT --output out/utility.json
  gbci-fast evaluate realism VINDR_ROOT --output out/realism.json
  gbci-fast evaluate obedience VINDR_ROOT --output out/obedience.json --sheet out/sheet.png
  gbci-fast evaluate all VINDR_ROOT --output out/evaluation
"""


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Adds `evaluate` with one sub-command per kind of evidence."""
    parser = subparsers.add_parser(
        "evaluate",
        help="measure the quality of the model",
        epilog=EXAMPLE,
    )
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="KIND")
    for name in KINDS:
        importlib.import_module(f"gbci_fast.cli.evaluate.{name}").add_parser(kinds)
