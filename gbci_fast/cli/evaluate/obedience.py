"""`gbci-fast evaluate obedience`: whether what is told of a lesion is painted."""

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
from gbci_fast.evaluate.settings import STUDENT, ObedienceSettings, PaintSettings

if TYPE_CHECKING:
    from rich.table import Table

EXAMPLE = """\
example:
  gbci-fast evaluate obedience VINDR_ROOT --output out/obedience.json --sheet out/sheet.png
  gbci-fast evaluate obedience VINDR_ROOT --output out/obedience.json --steps 20 --tier tolerance --lesions 24
"""


def add_parser(kinds: argparse._SubParsersAction) -> None:
    """Adds the command's options."""
    parser = kinds.add_parser(
        "obedience",
        help="check whether what is told of a lesion is painted",
        description="Tells one attribute of a lesion differently, at one seed: what readers trained on real lesions\n"
        "then read, how measures shift against the difference between real classes, how much changes against\n"
        "another seed, whether place and size stay, and whether a meaningless word changes anything. The few-step\n"
        "student paints; other weights may need --steps 20 --tier tolerance. Writes JSON and a PNG figure, prints two\n"
        "tables.",
        epilog=EXAMPLE,
    )
    add_files(parser)
    parser.add_argument("--sheet", type=Path, metavar="FILE", help="a contact sheet, PNG: one lesion, ten descriptions")
    add_fields(parser, ObedienceSettings)
    parser.add_argument("--readers", type=Path, metavar="DIR", help="written by `train classifier` (default: packaged)")
    add_painting(parser)
    parser.set_defaults(**STUDENT)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Evaluates, writes figure, report and sheet, and prints the tables."""
    import time
    from dataclasses import asdict

    from rich.console import Console

    from gbci_fast.evaluate.lesions import read_lesions, read_split
    from gbci_fast.evaluate.obedience.evaluation import choose, evaluate_obedience
    from gbci_fast.evaluate.obedience.figure import draw_figure
    from gbci_fast.evaluate.obedience.sheet import draw_sheet, typical
    from gbci_fast.evaluate.painting import paint
    from gbci_fast.evaluate.readers import load_readers
    from gbci_fast.evaluate.report import figure_path, versions, write_report
    from gbci_fast.jobs.files import atomically

    start = time.perf_counter()
    figure = figure_path(args.output, args.figure)
    if args.sheet is not None:
        figure_path(args.output, args.sheet)
    settings = settings_of(args, ObedienceSettings, painting=settings_of(args, PaintSettings))
    judge, folder = load_readers(args.readers), painted_folder(args)
    pipe, weights = open_pipeline(args)
    minutes = {"painting": 0.0}
    with stage_progress(("reading", "reading attributes")) as on_progress:
        given: dict[str, Any] = {"limit": settings.limit, "seed": settings.seed, "on_progress": on_progress}
        cases = read_split(args.roots, settings.split, **given)
        yardstick = read_lesions(args.roots, split="training", folds=settings.yardstick, **given)

        def painter(cases, descriptions):
            began = time.perf_counter()
            images = paint(pipe, cases, settings.painting, weights=weights, folder=folder, descriptions=descriptions)
            minutes["painting"] += (time.perf_counter() - began) / 60
            return images

        found = evaluate_obedience(cases, painter, judge, settings, yardstick=yardstick, on_progress=on_progress)
        if args.sheet is not None:
            shown = typical(choose(cases, settings.lesions, settings.seed))
            atomically(args.sheet, lambda path: draw_sheet(path, shown, painter))
    report = {
        "evaluation": "obedience",
        "settings": asdict(settings),
        "versions": versions(),
        "weights": weights,
        "readers": {"digest": judge.digest, "tasks": list(judge.tasks)},
        **found,
        "minutes": minutes | {"all": (time.perf_counter() - start) / 60},
    }
    write_report(args.output, figure, report, lambda path: draw_figure(path, report))
    for table in build_tables(report):
        Console().print(table)
    print_targets(report)
    print(f"report: {args.output}\nfigure: {figure}" + (f"\nsheet: {args.sheet}" if args.sheet else ""))


def build_tables(report: dict[str, Any]) -> "list[Table]":
    """Two tables with a row per switch: readings and whole changes; shares of the measures. Both fit 80 columns."""
    from gbci_fast.evaluate.obedience.measures import MEASURES

    title = (
        f"{report['lesions']} lesions of {report['patients']} patients, {report['settings']['seeds']} seeds; "
        f"{report['minutes']['all']:.0f} minutes.\n"
        "AUC: readings told 1 against told 0 (real: of real classes). share: their\n"
        "shift over the difference between real classes. change, place, size: over\n"
        "those of another seed."
    )
    columns = ("real", "AUC", "95 %", "share", "change", "95 %", "place", "size")
    first = _table(title, "switch", columns)
    for name, found in report["switches"].items():
        reading, place = found["reading"], found["place"]
        read = ("", "", "not judged", "")
        if reading["judged"]:
            read = (_value(reading["real_auc"]), *_cells(reading["auc"]), _value(reading["share"]))
        kept = [_value(place[key]) for key in ("moved_share", "resized_share")]
        first.add_row(name, *read, *_cells(found["change"]), *kept)
    title = (
        "Shift of measures over the difference between real classes (95 %).\n-: real classes are not shown to differ."
    )
    second = _table(title, "switch", [name.replace("_", " ") for name in MEASURES])
    for name, found in report["switches"].items():
        shares = [found["measures"][measure]["share"] for measure in MEASURES]
        second.add_row(name, *("-" if share is None else "\n".join(_cells(share)) for share in shares))
    return [first, second]


def _table(title: str, first: str, others: Any) -> "Table":
    from rich import box
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column(first, no_wrap=True)
    for heading in others:
        table.add_column(heading, justify="right", no_wrap=True)
    return table


def _value(summary: dict[str, float | None]) -> str:
    return "" if summary["value"] is None else f"{summary['value']:.2f}"


def _cells(summary: dict[str, float | None]) -> tuple[str, str]:
    """Texts of value and interval; empty where there is none."""
    low, high = summary["low"], summary["high"]
    if low is None or high is None:
        return _value(summary), ""
    return _value(summary), f"{low:.2f}{'..' if low < 0 else '-'}{high:.2f}"
