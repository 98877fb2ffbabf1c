"""`gbci-fast evaluate utility`: whether a lesion detector can learn from synthetic lesions."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gbci_fast.cli.evaluate.options import (
    add_files,
    add_painting,
    open_pipeline,
    painted_folder,
    refuse_painting,
    stage_progress,
)
from gbci_fast.cli.parser import add_fields, settings_of
from gbci_fast.evaluate.settings import PaintSettings, UtilitySettings

if TYPE_CHECKING:
    from rich.table import Table

EXAMPLE = """\
example:
  gbci-fast evaluate utility VINDR_ROOT --output out/utility.json
  gbci-fast evaluate utility VINDR_ROOT --output out/utility.json --synthetic-count 128 --fractions 10,100 --seeds 3
  gbci-fast evaluate utility VINDR_ROOT --output out/automatic.json --synthetic out/generated
"""


def add_parser(kinds: argparse._SubParsersAction) -> None:
    """Adds the command's options."""
    parser = kinds.add_parser(
        "utility",
        help="train a lesion detector on synthetic lesions, judge it on real ones",
        description="Trains a small network to tell lesion patches from normal ones: on real patches of a share of\n"
        "the training patients (folds A and B), on synthetic ones, on both, and on trivial fillings; with equal\n"
        "steps. Judges the network on real patches of --split. Writes JSON and a PNG figure, prints a table. A\n"
        "stopped run continues.",
        epilog=EXAMPLE,
    )
    add_files(parser)
    add_fields(parser, UtilitySettings)
    parser.add_argument(
        "--synthetic",
        type=Path,
        nargs="+",
        metavar="DIR",
        help="take the painted lesions of these outputs of gbci-fast generate, such as with --mask auto, instead of "
        "painting at the moved masks of training lesions; their templates must not be of judged patients",
    )
    add_painting(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Evaluates, writes figure and report, and prints the table."""
    from rich.console import Console

    from gbci_fast.evaluate.report import figure_path, write_report
    from gbci_fast.evaluate.utility.evaluation import Painter, evaluate_utility
    from gbci_fast.evaluate.utility.figure import draw_figure

    figure = figure_path(args.output, args.figure)
    settings = settings_of(args, UtilitySettings, painting=settings_of(args, PaintSettings))
    if args.synthetic is None:
        pipe, weights = open_pipeline(args)
        source: Painter | list[Path] = Painter(pipe=pipe, weights=weights, folder=painted_folder(args))
    else:
        refuse_painting(args)
        source = args.synthetic
    with stage_progress(("reading training", "reading test", "painting", "training")) as on_progress:
        report, examples = evaluate_utility(
            args.roots,
            source,
            settings,
            runs=args.output.parent / "utility_runs",
            on_progress=on_progress,
        )
    write_report(args.output, figure, report, lambda path: draw_figure(path, report, examples))
    Console().print(build_table(report))
    print(f"report: {args.output}\nfigure: {figure}")


def build_table(report: dict[str, Any]) -> "Table":
    """One section per arm, one row per share of the real patients; "sd" is over seeds, "bal." is balanced accuracy."""
    from rich import box
    from rich.table import Table

    test = report["data"]["test"]
    title = (
        f"{test['lesions']} lesions, {test['normal']} normal patches of {test['patients']} patients; "
        f"mean of {report['settings']['seeds']} seeds (95 %)"
    )
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("arm", no_wrap=True)
    for heading in ("share", "AUC", "95 %", "sd", "to real", "95 %", "bal."):
        table.add_column(heading, justify="right", no_wrap=True)
    last = None
    for row in report["results"]:
        if row["arm"] != last:
            table.add_section()
        auc, difference = row["auc"], row["auc_difference"]
        table.add_row(
            row["arm"] if row["arm"] != last else "",
            "" if row["fraction"] is None else f"{row['fraction']:g} %",
            f"{auc['mean']:.3f}",
            _interval(auc, ".2f", "-"),
            "" if auc["seed_sd"] is None else f"{auc['seed_sd']:.3f}",
            "" if difference is None else f"{difference['mean']:+.3f}",
            "" if difference is None else _interval(difference, "+.2f", ".."),
            f"{row['balanced_accuracy']['mean']:.3f}",
        )
        last = row["arm"]
    return table


def _interval(summary: dict[str, Any], form: str, between: str) -> str:
    """Text of an interval; empty if there is none."""
    return "" if summary["low"] is None else f"{summary['low']:{form}}{between}{summary['high']:{form}}"
