"""`gbci-fast evaluate distribution`: whether synthetic lesions are distributed as real ones."""

import argparse
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gbci_fast.cli.evaluate.options import add_files, add_painting, print_targets, refuse_painting, stage_progress
from gbci_fast.cli.parser import add_fields, settings_of
from gbci_fast.evaluate.settings import DistributionSettings, PaintSettings
from gbci_fast.jobs.files import real_path

if TYPE_CHECKING:
    from rich.table import Table

    from gbci_fast.evaluate.lesions import Crops, LesionCase, OnProgress

    Sets = dict[str, dict[str, Crops]]
    """{block: {set: crops}}"""
    Make = Callable[[list[LesionCase], OnProgress], tuple[Sets, dict[str, Any]]]
    """(real cases, progress callback) -> (the crops, the judged column behind the real ones; the report's entries on
    the origin of the crops)."""

EXAMPLE = """\
example:
  gbci-fast evaluate distribution VINDR_ROOT --output out/distribution.json
  gbci-fast evaluate distribution VINDR_ROOT --features radiomics,bands,lite0 --output out/distribution.json
  gbci-fast evaluate distribution VINDR_ROOT --synthetic out/generated --output out/generated.json
  gbci-fast evaluate distribution FILM DIGITAL --synthetic out/film out/digital --output out/generated.json
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
        "patients; diversity, power spectrum, fine detail, seams. Repaints the real lesions, and fills their\n"
        "places in trivial ways, too; or takes another data set. Judges every root apart, then all pooled.\n"
        "Writes JSON and a PNG figure, prints tables.",
        epilog=EXAMPLE,
    )
    add_files(parser)
    add_fields(parser, DistributionSettings)
    parser.add_argument(
        "--features",
        default="radiomics,bands",
        metavar="LIST",
        help="radiomics, bands, lite0 (needs `pip install gbci_fast[evaluate]`) or folders of DINOv2 models, with "
        "commas between (default: %(default)s)",
    )
    parser.add_argument(
        "--synthetic",
        type=Path,
        nargs="+",
        metavar="ROOT",
        help="judge the painted lesions of this output of `gbci-fast generate` (with --mask auto, they borrow neither "
        "place nor shape), or all of another VinDr-layout folder, instead of painting; or one such folder for every "
        "root, in the same order",
    )
    add_painting(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Evaluates, writes figure and report, and prints the tables."""
    from rich.console import Console

    from gbci_fast.evaluate.distribution.evaluation import REAL, check_patients, evaluate_blocks
    from gbci_fast.evaluate.distribution.figure import draw_figure
    from gbci_fast.evaluate.extractors import open_extractors
    from gbci_fast.evaluate.lesions import read_split
    from gbci_fast.evaluate.report import figure_path, write_report

    figure = figure_path(args.output, args.figure)
    settings = settings_of(args, DistributionSettings)
    extractors = open_extractors(args.features)
    make = _painting(args) if args.synthetic is None else _reading(args)
    with stage_progress(("reading",)) as on_progress:
        cases = read_split(args.roots, args.split, limit=args.limit, seed=args.seed, on_progress=on_progress)
        check_patients(REAL, [case.patient for case in cases], settings.neighbors)
        blocks, made = make(cases, on_progress)
        judged = next(name for name in next(iter(blocks.values())) if name != REAL)
        report = evaluate_blocks(blocks, extractors, settings, judged=judged, on_progress=on_progress)
    report |= made | {"roots": [real_path(root).name for root in args.roots]}
    write_report(args.output, figure, report, lambda path: draw_figure(path, report, blocks))
    for name, block in report["blocks"].items():
        for extractor in block["extractors"]:
            Console().print(build_distances(name, extractor))
        Console().print(build_appearance(name, block))
        Console().print(build_targets(name, block))
    for name, reason in report["left_out"].items():
        print(f"{name} is left out: {reason}")
    print_targets(report)
    print(f"report: {args.output}\nfigure: {figure}")


def _painting(args: argparse.Namespace) -> "Make":
    """Checks the options, and returns a function that paints."""
    from dataclasses import asdict

    import numpy as np

    from gbci_fast.cli.evaluate.options import open_pipeline, painted_folder
    from gbci_fast.evaluate.distribution.evaluation import POOLED, REAL
    from gbci_fast.evaluate.lesions import crop_lesions
    from gbci_fast.evaluate.painting import paint, trivial_fills
    from gbci_fast.model.checkpoint import checkpoint_folder
    from gbci_fast.model.devices import pick_device

    settings = settings_of(args, PaintSettings)
    checkpoint_folder(args.weights)
    pick_device(args.device)

    def make(cases: "list[LesionCase]", on_progress: "OnProgress") -> "tuple[Sets, dict[str, Any]]":
        pipe, weights = open_pipeline(args)
        painted = paint(pipe, cases, settings, weights=weights, folder=painted_folder(args), on_progress=on_progress)
        images = {"model": painted, **trivial_fills(pipe, cases, settings.batch_size)}
        sets = {REAL: crop_lesions(cases)} | {name: crop_lesions(cases, filled) for name, filled in images.items()}
        blocks = {}
        if len(roots := dict.fromkeys(case.root for case in cases)) > 1:
            for root in roots:
                rows = np.array([case.root == root for case in cases])
                blocks[root] = {name: crops[rows] for name, crops in sets.items()}
            blocks[POOLED] = sets
        else:
            blocks = dict.fromkeys(roots, sets)
        return blocks, {"painting": asdict(settings), "weights": weights}

    return make


def _reading(args: argparse.Namespace) -> "Make":
    """Checks the options, and returns a function that reads the lesions of --synthetic, of all splits."""
    from dataclasses import replace

    from gbci_fast.data.vindr import VinDr
    from gbci_fast.errors import GBCIError
    from gbci_fast.evaluate.case import root_names
    from gbci_fast.evaluate.distribution.evaluation import POOLED, REAL, join_patients
    from gbci_fast.evaluate.lesions import crop_lesions, read_lesions, read_painted

    refuse_painting(args)
    if len(args.synthetic) not in (1, len(args.roots)):
        raise GBCIError(
            f"--synthetic names {len(args.synthetic)} folders; expected 1 or {len(args.roots)}, one per ROOT"
        )
    generated = {
        root: any("template_image_id" in record.extra for record in VinDr(root).images) for root in args.synthetic
    }

    def make(cases: "list[LesionCase]", on_progress: "OnProgress") -> "tuple[Sets, dict[str, Any]]":
        options = {"limit": args.limit, "seed": args.seed, "on_progress": on_progress}
        # The tables of a generated set also list the templates' own lesions.
        made = [
            read_painted(root, **options)[0] if generated[root] else read_lesions([root], **options)
            for root in args.synthetic
        ]

        def block(real: "list[LesionCase]", synthetic: "list[LesionCase]") -> "dict[str, Crops]":
            crops = replace(crop_lesions(synthetic), patients=join_patients(cases, synthetic))
            return {REAL: crop_lesions(real), "synthetic": crops}

        blocks = {}
        if len(made) > 1:
            for root, synthetic in zip(root_names(args.roots).values(), made, strict=True):
                blocks[root] = block([case for case in cases if case.root == root], synthetic)
        whole = block(cases, [case for part in made for case in part])
        blocks[POOLED if len(args.roots) > 1 else root_names(args.roots)[args.roots[0]]] = whole
        shared = len(set(whole["synthetic"].patients) & {case.patient for case in cases})
        names = [real_path(root).name for root in args.synthetic]
        return blocks, {"synthetic": {"roots": names, "shared_patients": shared}}

    return make


def build_distances(block: str, extractor: dict[str, Any]) -> "Table":
    """A row per set of lesions: the real halves' median and central 95 %, then each column's median; in 80 columns."""
    from rich import box
    from rich.table import Table

    title = f"{block}, {extractor['name']}: median over halvings; of the real halves also the central 95 %"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    found = {key: extractor["statistics"][key] for key in STATISTICS if key in extractor["statistics"]}
    table.add_column("lesions", no_wrap=True)
    for key in found:
        table.add_column(STATISTICS[key], justify="right", no_wrap=True)
    nulls = [statistic["null"] for statistic in found.values()]
    table.add_row("real halves", *(f"{null['median']:.3g}" for null in nulls))
    for name, end in (("  2.5 %", "low"), ("  97.5 %", "high")):
        table.add_row(name, *(f"{null[end]:.3g}" for null in nulls))
    for name in extractor["statistics"]["kernel"]["columns"]:
        medians = [statistic["columns"][name]["splits"]["median"] for statistic in found.values()]
        table.add_row(name, *(f"{median:.3g}" for median in medians))
    return table


def build_appearance(name: str, block: dict[str, Any]) -> "Table":
    """A row per set of lesions: diversity, spectrum, fine detail and seams; fits 80 columns."""
    from rich import box
    from rich.table import Table

    sizes = {x["crops"]: x["patients"] for x in block["sets"].values()}
    listed = ", ".join(f"{crops} lesions of {patients} patients" for crops, patients in sizes.items())
    title = f"{name}: {listed}; means with 95 % over patients\nfine: power beyond 0.25 cycles per pixel, over real"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("lesions", no_wrap=True)
    for heading in ("MS-SSIM", "slope", "95 %", "fine", "95 %", "seam", "95 %"):
        table.add_column(heading, justify="right", no_wrap=True)
    diversity, appearance = block["diversity"], block["appearance"]
    for column in block["sets"]:
        similarity = (diversity["columns"].get(column) or diversity["real"])["ms_ssim"]
        slope, power, seam = (
            appearance[key]["columns"].get(column) or appearance[key]["real"]
            for key in ("spectrum_slope", "fine_power", "seam")
        )
        fine = ["", ""]
        if (ratio := power.get("difference")) is not None:
            fine = [f"{math.exp(ratio['value']):.2f}", _range({end: math.exp(ratio[end]) for end in ("low", "high")})]
        cells = [f"{slope['mean']:.2f}", _range(slope), *fine, f"{seam['mean']:.2f}", _range(seam)]
        table.add_row(column, f"{similarity:.3f}", *cells)
    return table


def build_targets(name: str, block: dict[str, Any]) -> "Table":
    """A row per target: its bound, and the value of every column, marked where it is not met; fits 80 columns."""
    from rich import box
    from rich.table import Table

    title = f"{name}: targets; * = missed, () = too few patients to judge"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("target", no_wrap=True)
    for heading in ("bound", *block["targets"]):
        table.add_column(heading, justify="right", no_wrap=True)
    for rows in zip(*block["targets"].values(), strict=True):
        table.add_row(rows[0]["name"], f"{rows[0]['bound']:.3g}", *map(_judged, rows))
    return table


def _judged(row: Mapping[str, Any]) -> str:
    """Text of a target's value and of whether it is met."""
    if row["measured"] is None:
        return "-"
    value = f"{row['measured']:.3g}"
    return f"({value})" if row["met"] is None else value + ("" if row["met"] else "*")


def _range(summary: Mapping[str, Any]) -> str:
    return "" if summary["low"] is None else f"{summary['low']:.2f}..{summary['high']:.2f}"
