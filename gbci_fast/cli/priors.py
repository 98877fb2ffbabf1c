"""`gbci-fast priors`: size, aspect and position of lesions per category, and forms of masses, from annotations."""

import argparse
from pathlib import Path

from gbci_fast.errors import GBCIError

EXAMPLE = """example:
  gbci-fast priors VINDR_ROOT --output priors.json
  gbci-fast priors VINDR_ROOT --fallback out/phantom --output priors.json
  gbci-fast generate INPUT --priors priors.json --balance natural --output out/synthetic
"""


def add_parser(subparsers) -> None:
    """Adds the command's options."""
    parser = subparsers.add_parser(
        "priors",
        help="fit lesion sizes, shapes and positions per category",
        description="Fits size, aspect, position and BI-RADS per finding category from the boxes of data sets in the\n"
        "VinDr-Mammo layout, and pathology, shape and margin of masses where the tables state them. generate --priors\n"
        "draws automatic masks and --balance natural from them.",
        epilog=EXAMPLE,
    )
    parser.add_argument("roots", type=Path, nargs="+", metavar="ROOT", help="a folder in the VinDr-Mammo layout")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="the JSON file")
    parser.add_argument(
        "--fallback",
        type=Path,
        action="append",
        default=[],
        metavar="ROOT",
        help="data (such as phantoms) for categories with fewer than 30 boxes in the others; repeatable",
    )
    parser.add_argument("--split", default="training", help="training (default) or test")
    parser.add_argument(
        "--note", action="append", default=[], help="kept in the file, such as the data's attribution; repeatable"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Fits, writes, and prints the table."""
    from rich.console import Console
    from rich.progress import Progress

    from gbci_fast.generate.prior_fit import fit_priors

    if args.output.is_dir():  # fail before the hour of reading
        raise GBCIError(f"{args.output} is a folder; expected the name of a JSON file")
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("images", total=None)
        priors = fit_priors(
            args.roots,
            args.fallback,
            split=args.split,
            notes=args.note,
            on_image=lambda done, total: progress.update(task, completed=done, total=total),
        )
    priors.save(args.output)
    for line in table(priors):
        print(line)
    print(f"priors of {sum(source['boxes'] for source in priors.sources.values())} boxes: {args.output}")


def table(priors) -> list[str]:
    """One line per category: number of boxes, diameter in model pixels and mm, aspect."""
    lines = [f"{'category':<26}{'boxes':>6}{'weight':>8}{'diameter px':>22}{'mm (median)':>13}{'aspect':>18}"]
    for prior in (priors.pooled, *priors.categories.values()):
        size, shape = prior.diameter, prior.aspect
        millimeters = f"{prior.diameter_mm['median']:.1f}" if prior.diameter_mm else "-"
        lines.append(
            f"{prior.category:<26}{sum(prior.boxes.values()):>6}{prior.own_weight:>8.2f}"
            f"{f'{size.median:.1f} ({size.low:.1f}-{size.high:.1f})':>22}"
            f"{millimeters:>13}"
            f"{f'{shape.median:.2f} ({shape.low:.2f}-{shape.high:.2f})':>18}"
        )
    if priors.masses is None:
        return [*lines, "too few masses of known pathology, shape and margin, so none of the three is drawn"]
    shares = ", ".join(f"{share:.0%} of BI-RADS {grade}" for grade, share in priors.masses.malignant.items())
    return [*lines, f"{sum(priors.masses.boxes.values())} masses of known pathology; malignant are {shares}"]
