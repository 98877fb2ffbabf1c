"""`gbci-fast evaluate realism`: whether trained judges can tell painted lesions from real ones."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gbci_fast.cli.evaluate.options import (
    add_files,
    add_painting,
    open_pipeline,
    painted_folder,
    print_targets,
    refuse_painting,
    stage_progress,
)
from gbci_fast.cli.parser import add_fields, settings_of
from gbci_fast.evaluate.settings import STUDENT, PaintSettings, RealismSettings

if TYPE_CHECKING:
    from rich.table import Table

EXAMPLE = """\
example:
  gbci-fast evaluate realism VINDR_ROOT --output out/realism.json
  gbci-fast evaluate realism VINDR_ROOT --output out/mine.json --weights runs/ldm/pipeline --save-paintings mine.npz
  gbci-fast evaluate realism VINDR_ROOT --output out/check.json --paintings benchmarks/fixtures/painted_2026_11.npz
"""
VERDICTS = {
    True: "passed",
    False: "FAILED: its figures tell nothing about a model",
    None: "incomplete; --paintings with the weights that painted them checks all of it",
}


def add_parser(kinds: argparse._SubParsersAction) -> None:
    """Adds the command's options."""
    parser = kinds.add_parser(
        "realism",
        help="train judges to tell painted lesions from real ones",
        description="Trains a small network and gradient boosting on the folds A and B of the training patients, to\n"
        "tell real, reconstructed and painted lesions apart at the same masks; tests them on fold C.\n"
        "AUC 0.5: they cannot. Writes JSON and a PNG figure, prints a table. A stopped run continues.",
        epilog=EXAMPLE,
    )
    add_files(parser)
    add_fields(parser, RealismSettings)
    add_painting(parser)
    parser.set_defaults(**STUDENT)
    stored = parser.add_mutually_exclusive_group()
    stored.add_argument(
        "--paintings",
        type=Path,
        metavar="FILE",
        help="judge the paintings of this file, which --save-paintings wrote, instead of painting: checks the judges "
        "themselves",
    )
    stored.add_argument(
        "--save-paintings",
        type=Path,
        metavar="FILE",
        help="write the painted pixels of all lesions to a file, NPZ; it holds no pixel outside of the masks",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Evaluates, writes figure and report, and prints the table."""
    from rich.console import Console

    from gbci_fast.evaluate.realism.boosting import check_boosting
    from gbci_fast.evaluate.realism.evaluation import evaluate_realism
    from gbci_fast.evaluate.realism.figure import draw_figure
    from gbci_fast.evaluate.realism.paintings import read_paintings
    from gbci_fast.evaluate.report import figure_path, write_report

    figure = figure_path(args.output, args.figure)
    settings = settings_of(args, RealismSettings, painting=settings_of(args, PaintSettings))
    check_boosting()
    stored = None
    if args.paintings is not None:
        refuse_painting(args, "--paintings", ("steps", "guidance", "painted"), **STUDENT)
        stored = read_paintings(args.paintings)
    pipe, weights = open_pipeline(args)
    with stage_progress(("reading training", "reading judged")) as on_progress:
        report = evaluate_realism(
            args.roots,
            pipe,
            settings,
            weights=weights,
            painted=painted_folder(args),
            runs=args.output.parent / "realism_runs",
            stored=stored,
            save=args.save_paintings,
            on_progress=on_progress,
        )
    write_report(args.output, figure, report, lambda path: draw_figure(path, report))
    Console().print(build_table(report))
    print_targets(report)
    for judge, found in report["self_checks"].items():
        print(f"self-check of the {judge}: {VERDICTS[found['passed']]}")
    print(f"minutes: {sum(part['clock'] for part in report['minutes'].values()):.1f}")
    print(f"report: {args.output}\nfigure: {figure}")


def build_table(report: dict[str, Any]) -> "Table":
    """One section per pair, a row per judge and what it sees, a column per data set; fits 80 columns."""
    from rich import box
    from rich.table import Table

    from gbci_fast.evaluate.realism.judging import ALL, PLAIN_ALONE

    judged = report["sets"]["judged"]["pooled"]
    title = (
        f"AUC (95 %; 0.5: cannot tell) on {judged['lesions']} lesions of {judged['patients']} patients,\n"
        f"{report['judged_on']}; plain: {PLAIN_ALONE}"
    )
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("pair, judge", no_wrap=True)
    groups = list(report["results"][0]["auc"])
    for name in groups:
        table.add_column(name, justify="right", no_wrap=True)
    last = None
    for row in report["results"]:
        pair = f"{row['first']}/{row['second']}"
        if pair != last:
            table.add_section()
            table.add_row(pair)
        features = {ALL: row["region"], PLAIN_ALONE: "plain"}.get(row["features"], row["features"])
        table.add_row(f"  {row['judge']}, {features}", *(_cell(row["auc"][name]) for name in groups))
        last = pair
    return table


def _cell(auc: dict[str, Any]) -> str:
    """Text of an AUC with its interval; empty where there is none."""
    if auc["value"] is None:
        return ""
    return f"{auc['value']:.3f}" + ("" if auc["low"] is None else f" {auc['low']:.2f}-{auc['high']:.2f}")
