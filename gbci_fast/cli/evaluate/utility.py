"""`gbci-fast evaluate utility`: whether synthetic lesions train a lesion detector."""

import argparse
from typing import TYPE_CHECKING, Any

from gbci_fast.cli.evaluate.options import (
    add_files,
    add_painting,
    open_pipeline,
    paint_settings,
    painted_folder,
    stage_progress,
)

if TYPE_CHECKING:
    from rich.table import Table

EXAMPLE = """\
example:
  gbci-fast evaluate utility VINDR_ROOT --output out/utility.json
  gbci-fast evaluate utility VINDR_ROOT --output out/utility.json --synthetic-count 128 --fractions 10,100 --seeds 3
"""


def add_parser(kinds: argparse._SubParsersAction) -> None:
    """Adds the command's options."""
    parser = kinds.add_parser(
        "utility",
        help="train a lesion detector on synthetic lesions, judge it on real ones",
        description="Trains a small network to tell lesion patches from normal ones: on real patches of a share of\n"
        "the training patients, on synthetic ones, on both; with equal steps. Judges it on real patches of the test\n"
        "split; needs both. Writes JSON and a PNG figure, prints a table. A stopped run goes on where it was.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_files(parser)
    parser.add_argument("--seed", type=int, default=0, help="the first seed (default: 0)")
    parser.add_argument("--seeds", type=int, default=5, help="trainings per arm and fraction (default: 5)")
    parser.add_argument(
        "--fractions",
        type=_percentages,
        default=(10.0, 25.0, 50.0, 100.0),
        metavar="P,P",
        help="percent of the real training patients (default: 10,25,50,100)",
    )
    parser.add_argument("--train-steps", type=int, default=300, help="optimizer steps per training (default: 300)")
    parser.add_argument("--synthetic-count", type=int, default=256, metavar="N", help="lesions painted (default: 256)")
    parser.add_argument("--limit", type=int, metavar="N", help="use N images of each split, spread evenly over all")
    add_painting(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Evaluates, writes figure and report, and prints the table."""
    from rich.console import Console

    from gbci_fast.evaluate.report import figure_path, write_report
    from gbci_fast.evaluate.utility.evaluation import UtilitySettings, evaluate_utility
    from gbci_fast.evaluate.utility.figure import draw_figure

    figure = figure_path(args.output, args.figure)
    settings = UtilitySettings(
        seed=args.seed,
        seeds=args.seeds,
        fractions=args.fractions,
        train_steps=args.train_steps,
        synthetic_count=args.synthetic_count,
        limit=args.limit,
        painting=paint_settings(args),
    )
    pipe, weights = open_pipeline(args)
    with stage_progress(("reading training", "reading test", "painting", "training")) as on_progress:
        report, examples = evaluate_utility(
            args.roots,
            pipe,
            settings,
            weights=weights,
            painted=painted_folder(args),
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
        f"{test['lesions']} lesions, {test['normal']} normal patches of {test['patients']} test patients; "
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
    """Blank where there is none."""
    return "" if summary["low"] is None else f"{summary['low']:{form}}{between}{summary['high']:{form}}"


def _percentages(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"fractions is {text!r}; expected percentages such as 10,25,50,100") from None
