"""`gbci-fast evaluate paired`: how close synthetic lesions come to the real ones they replace."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gbci_fast.cli.evaluate.options import add_files, print_targets, stage_progress
from gbci_fast.cli.parser import add_fields, settings_of
from gbci_fast.evaluate.settings import PairedSettings

if TYPE_CHECKING:
    from rich.table import Table

EXAMPLE = """\
example:
  gbci-fast evaluate paired VINDR_ROOT --output out/paired.json
  gbci-fast evaluate paired VINDR_ROOT OTHER_ROOT --weights runs/ldm/pipeline --output out/paired.json --limit 16
"""


def add_parser(kinds: argparse._SubParsersAction) -> None:
    """Adds the command's options."""
    parser = kinds.add_parser(
        "paired",
        help="repaint real lesions and compare with the originals",
        description="SSIM and PSNR of repainted lesions against the real ones, in the whole image, the breast and the\n"
        "dilated lesion, beside a ceiling and two trivial fillings. Writes JSON and a PNG figure, prints a table.",
        epilog=EXAMPLE,
    )
    add_files(parser)
    parser.add_argument(
        "--weights", type=Path, metavar="DIR", help="a pipeline folder (default: the packaged checkpoint)"
    )
    add_fields(parser, PairedSettings)
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda (default: auto)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Evaluates, writes figure and report, and prints the table."""
    from rich.console import Console

    from gbci_fast.evaluate.paired.evaluation import evaluate_paired
    from gbci_fast.evaluate.paired.figure import draw_figure
    from gbci_fast.evaluate.report import figure_path, write_report
    from gbci_fast.model.checkpoint import checkpoint_folder
    from gbci_fast.model.devices import pick_device

    figure = figure_path(args.output, args.figure)
    settings = settings_of(args, PairedSettings)
    device = pick_device(args.device)
    with stage_progress(("reading", "sampling")) as on_progress:
        report, examples = evaluate_paired(
            args.roots,
            checkpoint_folder(args.weights),
            settings,
            device=device,
            on_progress=on_progress,
        )
    write_report(args.output, figure, report, lambda path: draw_figure(path, report, examples))
    for name, group in ({"all": report["all"]} | (report["roots"] if len(report["roots"]) > 1 else {})).items():
        Console().print(build_table(name, group))
    print_targets(report)
    reported = report["source_reported"]
    print(f"The source reports SSIM {reported['ssim']} and PSNR {reported['psnr']} dB in its setting, on its own data.")
    print(f"report: {args.output}\nfigure: {figure}")


def build_table(name: str, group: dict[str, Any]) -> "Table":
    """A row per condition, in one section per region; fits 80 columns."""
    from rich import box
    from rich.table import Table

    from gbci_fast.evaluate.paired.evaluation import REGIONS

    title = f"{name}: {group['num_images']} images of {group['num_patients']} patients; mean (95 %), median; PSNR in dB"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for heading in ("region", "condition"):
        table.add_column(heading, no_wrap=True)
    for heading in ("SSIM", "95 %", "median", "PSNR", "95 %", "median"):
        table.add_column(heading, justify="right", no_wrap=True)
    for region in REGIONS:
        table.add_section()
        for i, (condition, scores) in enumerate(group["scores"].items()):
            ssim, psnr = scores[region]["ssim"], scores[region]["psnr"]
            table.add_row(region if i == 0 else "", condition, *_cells(ssim, digits=3), *_cells(psnr, digits=1))
    return table


def _cells(summary: dict[str, float | None], digits: int) -> tuple[str, str, str]:
    """Texts of mean, interval (empty if there is none) and median."""
    low, high = summary["low"], summary["high"]
    interval = "" if low is None else f"{low:.{digits}f}-{high:.{digits}f}"
    return f"{summary['mean']:.{digits}f}", interval, f"{summary['median']:.{digits}f}"
