"""`gbci-fast evaluate memorisation`: whether synthetic lesions are copies of training lesions."""

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
from gbci_fast.evaluate.settings import MemorisationSettings, PaintSettings
from gbci_fast.jobs.files import real_path

if TYPE_CHECKING:
    from rich.table import Table

EXAMPLE = """\
example:
  gbci-fast evaluate memorisation VINDR_ROOT --output out/memorisation.json
  gbci-fast evaluate memorisation VINDR_ROOT --synthetic out/synthetic --output out/copies.json --index out/copies.npz
"""


def add_parser(kinds: argparse._SubParsersAction) -> None:
    """Adds the command's options."""
    parser = kinds.add_parser(
        "memorisation",
        help="search synthetic lesions for copies of training lesions",
        description="Compares the distance of every synthetic lesion to its nearest training lesion, in pixels and\n"
        "features, with the distances of the real lesions of --split. The synthetic lesions are the real ones\n"
        "painted again, or those of --synthetic. With --split C, training lesions are those of folds A and B,\n"
        "with --split test also those of C, which models from before there were folds have seen (the packaged\n"
        "one). Writes JSON and a PNG figure with the nearest pairs, prints a table.",
        epilog=EXAMPLE,
    )
    add_files(parser)
    add_painting(parser)
    parser.add_argument(
        "--synthetic",
        type=Path,
        metavar="DIR",
        help="judge this output of gbci-fast generate; nothing is painted (default: repaint the real lesions)",
    )
    parser.add_argument(
        "--index",
        type=Path,
        metavar="FILE",
        help="also write the index of training crops for generate --reject-copies; it holds PIXELS OF THE TRAINING "
        "DATA: store it only where these may be stored, and never commit it",
    )
    add_fields(parser, MemorisationSettings)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Evaluates, writes figure, report and index, and prints the table."""
    from rich.console import Console

    from gbci_fast.data.folds import FOLDS, TRAINED
    from gbci_fast.errors import GBCIError
    from gbci_fast.evaluate.features import Radiomics
    from gbci_fast.evaluate.lesions import read_split, read_training, refuse_shared
    from gbci_fast.evaluate.memorisation.evaluation import (
        Lesions,
        evaluate_memorisation,
        read_synthetic,
    )
    from gbci_fast.evaluate.memorisation.figure import draw_figure
    from gbci_fast.evaluate.memorisation.neighbors import save_index
    from gbci_fast.evaluate.report import figure_path, write_report

    if args.synthetic is not None:
        refuse_painting(args)
    figure = figure_path(args.output, args.figure)
    if args.index is not None:
        if real_path(args.index) in (real_path(args.output), real_path(figure)):
            raise GBCIError(f"the index would replace {args.index}, report or figure; choose another name")
        figure_path(args.index, args.index.with_suffix(".npz.png"))  # raises if the index cannot be written
    settings = settings_of(args, MemorisationSettings)
    painting = None if args.synthetic is not None else settings_of(args, PaintSettings)
    opened = None if args.synthetic is not None else open_pipeline(args)
    with stage_progress(("reading",)) as on_progress:
        real_cases = read_split(
            args.roots, args.split, limit=args.limit, seed=args.seed, on_progress=_named("real", on_progress)
        )
        real = Lesions.of(real_cases)
        if opened is None:
            synthetic = read_synthetic(args.synthetic, args.limit, _named("synthetic", on_progress))
            source = {"kind": "data set", "name": real_path(args.synthetic).name}
        else:
            synthetic, source = _repaint(args, opened, painting, real_cases, on_progress)
        folds = "".join(FOLDS) if args.split == "test" else TRAINED
        training_cases = read_training(args.roots, folds=folds, on_progress=_named("training", on_progress))
        refuse_shared(training_cases, real_cases)
        training = Lesions.of(training_cases)
        report, findings = evaluate_memorisation(
            training,
            real,
            synthetic,
            Radiomics(),
            settings,
            source=source,
            repainted=opened is not None,
            on_progress=on_progress,
        )
    write_report(args.output, figure, report, lambda path: draw_figure(path, report, training, synthetic, findings))
    if args.index is not None:
        save_index(findings.index, findings.threshold, args.index)
    _print(Console(), report)
    print(f"report: {args.output}\nfigure: {figure}")
    if args.index is not None:
        print(f"index: {args.index} (it holds pixels of the training data)")


def _named(what: str, on_progress: Any) -> Any:
    return lambda stage, done, total: on_progress(f"{stage} {what}", done, total)


def _repaint(args: argparse.Namespace, opened: Any, painting: Any, cases: Any, on_progress: Any) -> tuple[Any, Any]:
    """The real lesions painted again, and the report's entry on the painting."""
    from dataclasses import asdict

    from gbci_fast.evaluate.memorisation.evaluation import Lesions
    from gbci_fast.evaluate.painting import paint

    pipe, weights = opened
    images = paint(pipe, cases, painting, weights=weights, folder=painted_folder(args), on_progress=on_progress)
    return Lesions.of(cases, images), {"kind": "repainted", "weights": weights, **asdict(painting)}


def build_table(report: dict[str, Any]) -> "Table":
    """A row per space (pixels and each kind of features); fits 80 columns."""
    from rich import box
    from rich.table import Table

    counts = {name: count["lesions"] for name, count in report["counts"].items()}
    title = f"{counts['synthetic']} synthetic, {counts['real']} other real, {counts['training']} training lesions"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for heading in ("space", "below", "expected", "allowed", "p", "real", "synthetic", "ratio", "95 %"):
        table.add_column(heading, justify="left" if heading == "space" else "right", no_wrap=True)
    for name, space in report["spaces"].items():
        ratio = "" if space["ratio"] is None else f"{space['ratio']:.2f}"
        interval = "" if space["ratio_low"] is None else f"{space['ratio_low']:.2f}-{space['ratio_high']:.2f}"
        medians = (f"{space['median_real']:.3f}", f"{space['median_synthetic']:.3f}")
        null = (f"{space['below']}", f"{space['expected']:.1f}", f"{space['allowed']}", f"{space['p']:.2g}")
        table.add_row(name, *null, *medians, ratio, interval)
    return table


def _print(console: Any, report: dict[str, Any]) -> None:
    console.print(build_table(report))
    control = report["control"]
    print(f"Of {control['copies']} planted copies {control['found_share']:.0%} lie below the threshold.")
    if (own := report["repainted"]) is not None and own["own_is_nearest_share"] is not None:
        print(
            f"Of the real lesions, the erased one is the nearest to {own['own_is_nearest_share']:.1%} of the painted "
            f"(chance {own['chance_share']:.1%})."
        )
    for suspect in report["suspects"]:
        print(f"suspect: {suspect['name']} like {suspect['neighbor']}, distance {suspect['distance']:.3f}")
