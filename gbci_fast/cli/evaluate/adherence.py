"""`gbci-fast evaluate adherence`: whether painted lesions show the attributes that they were painted with."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gbci_fast.cli.evaluate.options import (
    add_files,
    add_painting,
    open_pipeline,
    painted_folder,
    print_targets,
    stage_progress,
)
from gbci_fast.cli.parser import add_fields, settings_of
from gbci_fast.evaluate.settings import AdherenceSettings, PaintSettings

if TYPE_CHECKING:
    from rich.table import Table

EXAMPLE = """\
example:
  gbci-fast evaluate adherence VINDR_ROOT --output out/adherence.json
  gbci-fast evaluate adherence VINDR_ROOT --output out/adherence.json --guidance-sweep 1,2,3,5 --no-shuffled
"""


def add_parser(kinds: argparse._SubParsersAction) -> None:
    """Adds the command's options."""
    parser = kinds.add_parser(
        "adherence",
        help="check whether painted lesions show the attributes that they were painted with",
        description="A classifier trained on real lesions judges painted ones: balanced accuracy and AUC, beside real\n"
        "lesions, the autoencoder alone, erased lesions, and lesions painted from other lesions' descriptions.\n"
        "Writes JSON and a PNG figure, prints a table.",
        epilog=EXAMPLE,
    )
    add_files(parser)
    add_painting(parser)
    add_fields(parser, AdherenceSettings, "split", "seed", "limit")
    parser.add_argument("--scorer", type=Path, metavar="DIR", help="written by `train classifier` (default: packaged)")
    add_fields(parser, AdherenceSettings, "sweep", "variants", "shuffled")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Evaluates, writes figure and report, and prints the table."""
    from dataclasses import asdict, replace

    from rich.console import Console

    from gbci_fast.evaluate.adherence.evaluation import derange, evaluate_adherence
    from gbci_fast.evaluate.adherence.figure import draw_figure
    from gbci_fast.evaluate.lesions import read_split
    from gbci_fast.evaluate.painting import paint, reconstruct
    from gbci_fast.evaluate.report import figure_path, versions, write_report
    from gbci_fast.evaluate.scorer import load_scorer

    figure = figure_path(args.output, args.figure)
    painting = settings_of(args, PaintSettings)
    settings = settings_of(args, AdherenceSettings, guidance=painting.guidance)
    scorer, folder = load_scorer(args.scorer), painted_folder(args)
    pipe, weights = open_pipeline(args)
    with stage_progress(("reading", "painting")) as on_progress:
        cases = read_split(args.roots, args.split, limit=args.limit, seed=args.seed, on_progress=on_progress)
        if settings.shuffled:
            derange(cases, scorer, args.seed)  # fail before the hour of painting

        def painter(cases, descriptions, guidance):
            at = replace(painting, guidance=guidance)
            stage = f"painting, guidance {guidance:g}"
            return paint(
                pipe,
                cases,
                at,
                weights=weights,
                folder=folder,
                descriptions=descriptions,
                stage=stage,
                on_progress=on_progress,
            )

        found = evaluate_adherence(
            cases, scorer, painter, settings, reconstruction=reconstruct(pipe, cases, painting.batch_size)
        )
    report = {
        "evaluation": "adherence",
        "settings": asdict(settings) | {"painting": asdict(painting)},
        "versions": versions(),
        "weights": weights,
        "scorer": {"digest": scorer.digest, "data": scorer.config.data, "counts": scorer.config.counts},
        **found,
    }
    write_report(args.output, figure, report, lambda path: draw_figure(path, report))
    Console().print(build_table(report))
    print_targets(report)
    print(f"report: {args.output}\nfigure: {figure}")


def build_table(report: dict[str, Any]) -> "Table":
    """A row per condition, in one section per task; fits 80 columns."""
    from rich import box
    from rich.table import Table

    times = report["settings"]["variants"]
    lesions = f"{report['lesions']} lesions" + (f" ({times} paintings each)" if times > 1 else "")
    title = f"{lesions} of {report['patients']} patients; 95 % intervals over patients; chance is 0.5"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("task, condition", no_wrap=True)
    for heading in ("balanced", "95 %", "AUC", "95 %"):
        table.add_column(heading, justify="right", no_wrap=True)
    for task, conditions in report["tasks"].items():
        table.add_section()
        table.add_row(task.removeprefix("category/"))
        for name, found in conditions.items():
            table.add_row(f"  {name}", *_cells(found["balanced_accuracy"]), *_cells(found["auc"]))
    return table


def _cells(summary: dict[str, float | None]) -> tuple[str, str]:
    """Texts of value and interval; empty where there is none."""
    value = "" if summary["value"] is None else f"{summary['value']:.2f}"
    return value, "" if summary["low"] is None else f"{summary['low']:.2f}-{summary['high']:.2f}"
