"""`gbci-fast phantom`: a data set of procedural mammograms with exact truth."""

import argparse
import re
from pathlib import Path

from gbci_fast.cli.progress import image_progress

EXAMPLE = """example:
  gbci-fast phantom --output out/phantom --studies 100 --seed 0
  gbci-fast phantom --output out/rare --studies 100 --balance --twins --truth --workers 2
  gbci-fast phantom --output out/paired --studies 50 --prevalence 1 --ultrasound
  gbci-fast phantom --output out/growth --studies 20 --growth 4 --interval 180
  gbci-fast phantom --output out/full-field --studies 2 --size 4096x3328
"""


def add_parser(subparsers) -> None:
    """Adds the command's options."""
    parser = subparsers.add_parser(
        "phantom",
        help="write procedural mammograms with exact truth, in the VinDr-Mammo layout",
        description="Writes procedural mammograms (DICOM), lesion masks (PNG), annotations (CSV) and a contact sheet\n"
        "in the VinDr-Mammo layout. The same seed gives the same bytes.",
        epilog=EXAMPLE,
    )
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="a new or an empty folder")
    parser.add_argument("--studies", type=int, default=100, metavar="N", help="patients, four images (default: 100)")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="decides everything (default: 0)")
    parser.add_argument(
        "--size",
        type=image_size,
        default=(512, 512),
        metavar="HEIGHT[xWIDTH]",
        help="pixels, from 128 to 4096; the height spans 240 mm (default: 512)",
    )
    parser.add_argument(
        "--prevalence", type=float, default=0.5, metavar="P", help="primary findings per breast (default: 0.5)"
    )
    parser.add_argument(
        "--balance", action="store_true", help="every category equally often (default: VinDr-Mammo's rates)"
    )
    parser.add_argument(
        "--growth", type=int, default=1, metavar="N", help="studies per patient, of growing lesions (default: 1)"
    )
    parser.add_argument(
        "--interval", type=int, default=365, metavar="DAYS", help="between the studies of a patient (default: 365)"
    )
    parser.add_argument("--twins", action="store_true", help="also write each breast without its findings: twins/")
    parser.add_argument("--truth", action="store_true", help="also write masks of breast and pectoral muscle: truth/")
    parser.add_argument(
        "--ultrasound", action="store_true", help="also write a B-mode slice of each lesion: ultrasound/"
    )
    parser.add_argument("--workers", type=int, default=1, metavar="N", help="processes; same bytes (default: 1)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Writes the data set and says where it is."""
    from gbci_fast.phantom import Population, generate_phantom

    population = Population(prevalence=args.prevalence, balance=args.balance)
    each = 4 * args.growth  # images of a patient
    with image_progress("drawing", args.output) as on_image:
        generate_phantom(
            args.output,
            args.studies,
            args.seed,
            args.size,
            lambda done: on_image(done * each, args.studies * each),
            population=population,
            timepoints=args.growth,
            interval=args.interval,
            twins=args.twins,
            truth=args.truth,
            ultrasound=args.ultrasound,
            workers=args.workers,
        )
    studies = args.studies * args.growth
    print(f"{studies} studies, {4 * studies} images: {args.output}")


def image_size(text: str) -> tuple[int, int]:
    """Height and width of "512" or "4096x3328"."""
    match = re.fullmatch(r"(\d+)(?:x(\d+))?", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"size is {text!r}; expected HEIGHT or HEIGHTxWIDTH such as 4096x3328")
    height, width = match.groups()
    return int(height), int(width or height)
