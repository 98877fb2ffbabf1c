"""`gbci-fast phantom`: a data set of procedural mammograms with exact truth."""

import argparse
import re
from pathlib import Path

from gbci_fast.cli.parser import add_fields, settings_of
from gbci_fast.cli.progress import image_progress
from gbci_fast.phantom.settings import PhantomJob, Population

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
        "in the VinDr-Mammo layout. The same seed gives the same bytes on one type of processor.",
        epilog=EXAMPLE,
    )
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="a new or an empty folder")
    parser.add_argument("--studies", type=int, default=100, metavar="N", help="patients of four images (default: 100)")
    add_fields(parser, PhantomJob, "seed")
    add_fields(parser, PhantomJob, "size", type=image_size)
    add_fields(parser, Population)
    add_fields(parser, PhantomJob, "timepoints", "interval", "twins", "truth", "ultrasound")
    parser.add_argument(
        "--workers", type=int, default=1, metavar="N", help="processes; same bytes for any N (default: 1)"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Writes the data set and says where it is."""
    from gbci_fast.phantom import generate_phantom

    each = 4 * args.growth  # images per patient
    with image_progress("drawing", args.output) as on_image:
        generate_phantom(
            args.output,
            args.studies,
            args.seed,
            args.size,
            lambda done: on_image(done * each, args.studies * each),
            population=settings_of(args, Population),
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
    """(height, width) in pixels of a text such as "512" (a square) or "4096x3328".

    Raises:
        argparse.ArgumentTypeError: the text has another form.
    """
    match = re.fullmatch(r"(\d+)(?:x(\d+))?", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"size is {text!r}; expected HEIGHT or HEIGHTxWIDTH such as 4096x3328")
    height, width = match.groups()
    return int(height), int(width or height)
