"""Options that several kinds of evaluation share, the objects made from them, and the output to the terminal."""

import argparse
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gbci_fast.cli.parser import Parser, add_fields
from gbci_fast.evaluate.settings import PaintSettings

if TYPE_CHECKING:
    from gbci_fast.model.pipeline import GBCIPipeline


def add_files(parser: argparse.ArgumentParser) -> None:
    """Adds ROOT…, --output and --figure."""
    parser.add_argument("roots", type=Path, nargs="+", metavar="ROOT", help="folders in the VinDr-Mammo layout")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="the report, JSON")
    parser.add_argument("--figure", type=Path, metavar="FILE", help="the figure, PNG (default: beside the report)")


def add_painting(parser: argparse.ArgumentParser, **sampler: Any) -> None:
    """Adds --weights, --steps, --guidance, --runtime, --tier, --batch-size, --device and --painted.

    `sampler` are arguments of `add_argument` for --steps and --tier, whose defaults differ between kinds.
    """
    parser.add_argument(
        "--weights", type=Path, metavar="DIR", help="a pipeline folder (default: the packaged checkpoint)"
    )
    add_fields(parser, PaintSettings, "steps", "tier", **sampler)
    add_fields(parser, PaintSettings, "guidance", "runtime", "batch_size")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda (default: auto)")
    parser.add_argument(
        "--painted",
        type=Path,
        metavar="DIR",
        help="folder that keeps painted batches, so that a stopped run and other evaluations need not paint them again "
        "(default: painted/ beside the report)",
    )


def refuse_painting(
    args: argparse.Namespace, beside: str = "--synthetic", names: Sequence[str] | None = None, **defaults: Any
) -> None:
    """Raises GBCIError if an option of `add_painting` is given that `beside` would ignore.

    Args:
        args: of the command.
        beside: the option with which nothing is painted.
        names: the ignored options; None = all.
        defaults: the command's own defaults.
    """
    from gbci_fast.errors import GBCIError

    parser = Parser()
    add_painting(parser)
    parser.set_defaults(**defaults)
    for name, default in vars(parser.parse_args([])).items():
        if (names is None or name in names) and getattr(args, name) != default:
            option = f"--{name.replace('_', '-')}"
            raise GBCIError(f"{option} is {getattr(args, name)} beside {beside}, where nothing is painted; drop one")


def painted_folder(args: argparse.Namespace) -> Path:
    """The folder of --painted, or its default."""
    return args.painted or args.output.parent / "painted"


def open_pipeline(args: argparse.Namespace) -> "tuple[GBCIPipeline, str]":
    """The accelerated pipeline of --weights on --device, and the digest of its weights."""
    from gbci_fast.fast.accelerate import accelerate
    from gbci_fast.jobs.files import hash_weights
    from gbci_fast.model.checkpoint import checkpoint_folder, load_pipeline
    from gbci_fast.model.devices import pick_device

    device, folder = pick_device(args.device), checkpoint_folder(args.weights)
    return accelerate(load_pipeline(folder), args.runtime, args.tier, device=device), hash_weights(folder)


def print_targets(report: Mapping[str, Any]) -> None:
    """Prints what targets mean, then each target of a report: value, bound, side of the bound, note; in 80 columns."""
    from gbci_fast.evaluate.report import ABOUT_TARGETS, place

    if report["targets"]:
        print(textwrap.fill(ABOUT_TARGETS, 80))
    for target in report["targets"]:
        value = "-" if target["value"] is None else f"{target['value']:.3g}"
        sign = ">=" if target["at_least"] else "<="
        line = f"{target['name']}: {value} (bound {sign} {target['bound']:.3g}: {place(target)}) {target['note']}"
        print(textwrap.fill(line.strip(), 80, subsequent_indent="  "))


@contextmanager
def stage_progress(stages: Sequence[str]) -> Iterator[Callable[[str, float, int], None]]:
    """Shows a bar per stage on a terminal, or a line per tenth in a log; yields ``on_progress(stage, done, total)``."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed:.0f}/{task.total}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        tasks = {stage: progress.add_task(stage, total=None) for stage in stages}
        tenths = dict.fromkeys(tasks, 0)

        def on_progress(stage: str, done: float, total: int) -> None:
            if stage not in tasks:
                tasks[stage], tenths[stage] = progress.add_task(stage, total=total), 0
            progress.update(tasks[stage], completed=done, total=total)
            if not console.is_terminal and 10 * done // total > tenths[stage]:
                tenths[stage] = 10 * done // total
                console.print(f"{stage} {done:.0f}/{total}")

        yield on_progress
