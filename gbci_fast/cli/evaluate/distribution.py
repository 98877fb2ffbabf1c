"""`gbci-fast evaluate distribution`: whether synthetic lesions are distributed as real ones."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gbci_fast.cli.evaluate.options import add_files, add_painting, print_targets, refuse_painting, stage_progress
from gbci_fast.cli.parser import add_fields, settings_of
from gbci_fast.evaluate.settings import DistributionSettings, PaintSettings
from gbci_fast.jobs.files import real_path

if TYPE_CHECKING:
    from rich.table import Table

    from gbci_fast.evaluate.lesions import Crops, LesionCase, OnProgress

    Make = Callable[[list[LesionCase], OnProgress], tuple[dict[str, Crops], dict[str, Any]]]
    """(real cases, progress callback) -> (the crops of each column, the judged one first; the report's entries on the
    origin of the crops)."""

EXAMPLE = """\
example:
  gbci-fast evaluate distribution VINDR_ROOT --output out/distribution.json
  gbci-fast evaluate distribution VINDR_ROOT --features radiomics,models/rad-dino --output out/distribution.json
  gbci-fast evaluate distribution VINDR_ROOT --synthetic out/generated --output out/generated.json
"""
STATISTICS = {
    "frechet": "Fréchet",
    "kernel": "kernel",
    "precision": "precision",
    "recall": "recall",
    "density": "density",
    "coverage": "coverage",
}


def add_parser(kinds: argparse._SubParsersAction) -> None:
    """Adds the command's options."""
    parser = kinds.add_parser(
        "distribution",
        help="compare the distributions of synthetic and real lesions",
        description="Distances between synthetic and real lesions, beside those between two halves of the real\n"
        "patients; diversity, power spectrum, seams. Repaints the real lesions, or takes another data set.\n"
        "Writes JSON and a PNG figure, prints tables.",
        epilog=EXAMPLE,
    )
    add_files(parser)
    add_fields(parser, DistributionSettings)
    parser.add_argument(
        "--features",
        default="radiomics",
        metavar="LIST",
        help="radiomics or folders of DINOv2 models, with commas between (default: radiomics)",
    )
    parser.add_argument(
        "--synthetic",
        type=Path,
        metavar="ROOT",
        help="judge the painted lesions of this output of `gbci-fast generate`, or all of another VinDr-layout folder, "
        "instead of painting",
    )
    add_painting(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Evaluates, writes figure and report, and prints the tables."""
    from rich.console import Console

    from gbci_fast.evaluate.distribution.evaluation import REAL, check_patients, evaluate_distribution
    from gbci_fast.evaluate.distribution.figure import draw_figure
    from gbci_fast.evaluate.extractors import open_extractors
    from gbci_fast.evaluate.lesions import crop_lesions, read_split
    from gbci_fast.evaluate.report import figure_path, write_report

    figure = figure_path(args.output, args.figure)
    settings = settings_of(args, DistributionSettings)
    extractors = open_extractors(args.features)
    make = _painting(args) if args.synthetic is None else _reading(args)
    with stage_progress(("reading",)) as on_progress:
        cases = read_split(args.roots, args.split, limit=args.limit, seed=args.seed, on_progress=on_progress)
        real = crop_lesions(cases)
        check_patients(REAL, real.patients, settings.neighbors)
        columns, made = make(cases, on_progress)
        report = evaluate_distribution(
            real, columns, extractors, settings, judged=next(iter(columns)), on_progress=on_progress
        )
    report |= made | {"roots": [real_path(root).name for root in args.roots]}
    sets = {REAL: real, **columns}
    write_report(args.output, figure, report, lambda path: draw_figure(path, report, sets))
    for extractor in report["extractors"]:
        Console().print(build_distances(extractor))
    Console().print(build_appearance(report))
    print_targets(report)
    print(f"report: {args.output}\nfigure: {figure}")


def _painting(args: argparse.Namespace) -> "Make":
    """Checks the options, and returns a function that paints."""
    from dataclasses import asdict

    from gbci_fast.cli.evaluate.options import open_pipeline, painted_folder
    from gbci_fast.evaluate.lesions import crop_lesions
    from gbci_fast.evaluate.painting import paint, reconstruct, ring_mean_fill
    from gbci_fast.model.checkpoint import checkpoint_folder
    from gbci_fast.model.devices import pick_device

    settings = settings_of(args, PaintSettings)
    checkpoint_folder(args.weights)
    pick_device(args.device)

    def make(cases: "list[LesionCase]", on_progress: "OnProgress") -> "tuple[dict[str, Crops], dict[str, Any]]":
        pipe, weights = open_pipeline(args)
        painted = paint(pipe, cases, settings, weights=weights, folder=painted_folder(args), on_progress=on_progress)
        columns = {
            "model": crop_lesions(cases, painted),
            "vae": crop_lesions(cases, reconstruct(pipe, cases, settings.batch_size)),
            "ring_mean": crop_lesions(cases, ring_mean_fill(cases)),
        }
        return columns, {"painting": asdict(settings), "weights": weights}

    return make


def _reading(args: argparse.Namespace) -> "Make":
    """Checks the options, and returns a function that reads the lesions of --synthetic, of all splits."""
    from dataclasses import replace

    from gbci_fast.data.vindr import VinDr
    from gbci_fast.evaluate.distribution.evaluation import join_patients
    from gbci_fast.evaluate.lesions import crop_lesions, read_lesions, read_painted

    refuse_painting(args)
    generated = any("template_image_id" in record.extra for record in VinDr(args.synthetic).images)

    def make(cases: "list[LesionCase]", on_progress: "OnProgress") -> "tuple[dict[str, Crops], dict[str, Any]]":
        options = {"limit": args.limit, "seed": args.seed, "on_progress": on_progress}
        if generated:  # its tables also list the templates' own lesions
            made, _ = read_painted(args.synthetic, **options)
        else:
            made = read_lesions([args.synthetic], **options)
        crops = replace(crop_lesions(made), patients=join_patients(cases, made))
        shared = len(set(crops.patients) & {case.patient for case in cases})
        return {"synthetic": crops}, {"synthetic": {"root": real_path(args.synthetic).name, "shared_patients": shared}}

    return make


def build_distances(extractor: dict[str, Any]) -> "Table":
    """A row per statistic: the real halves' median and central 95 %, then each column's median; fits 80 columns."""
    from rich import box
    from rich.table import Table

    title = f"{extractor['name']}: median over halvings; of the real halves also the central 95 %"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("statistic", no_wrap=True)
    columns = extractor["statistics"]["frechet"]["columns"]
    for heading in ("real halves", "95 %", *columns):
        table.add_column(heading, justify="right", no_wrap=True)
    for key, label in STATISTICS.items():
        statistic = extractor["statistics"][key]
        null, medians = statistic["null"], [statistic["columns"][name]["splits"]["median"] for name in columns]
        interval = f"{null['low']:.3g} to {null['high']:.3g}"
        table.add_row(label, f"{null['median']:.3g}", interval, *(f"{median:.3g}" for median in medians))
    return table


def build_appearance(report: dict[str, Any]) -> "Table":
    """A row per set of lesions: diversity, spectrum and seams; fits 80 columns."""
    from rich import box
    from rich.table import Table

    sizes = ", ".join(f"{name} {x['crops']} of {x['patients']} patients" for name, x in report["sets"].items())
    title = f"means with 95 % over patients; inside: share in the real central 95 %\ncrops: {sizes}"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("lesions", no_wrap=True)
    for heading in ("MS-SSIM", "slope", "95 %", "inside", "seam", "95 %", "inside"):
        table.add_column(heading, justify="right", no_wrap=True)
    diversity, appearance = report["diversity"], report["appearance"]
    for name in report["sets"]:
        similarity = (diversity["columns"].get(name) or diversity["real"])["ms_ssim"]
        cells = []
        for key in ("spectrum_slope", "seam"):
            row = appearance[key]["columns"].get(name) or appearance[key]["real"]
            share = f"{row['share_in_real_range']:.0%}" if name in appearance[key]["columns"] else ""
            cells += [f"{row['mean']:.2f}", f"{row['low']:.2f} to {row['high']:.2f}", share]
        table.add_row(name, f"{similarity:.3f}", *cells)
    return table
