"""`gbci-fast prepare`: writes data sets into a cache, from which training reads without decoding images."""

import argparse
from pathlib import Path

from gbci_fast.cli.parser import add_fields, settings_of
from gbci_fast.data.settings import PrepareSettings
from gbci_fast.jobs.folder import CHECKS

EXAMPLE = """\
example:
  gbci-fast prepare VINDR_ROOT out/phantom --output out/cache
  gbci-fast train vae --data out/cache --output runs/vae
"""


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Adds the command's options."""
    parser = subparsers.add_parser(
        "prepare",
        help="read data sets once into a memory-mapped cache for training, with a quality report",
        description="Resample every image of the ROOTs (VinDr-Mammo roots, folders of DICOM or PNG files, or single "
        "files) into model space. CACHE gets pixels.npy, masks.npy, index.parquet, and qc/ to look at. The same inputs "
        "give the same bytes, whatever the number of workers.",
        epilog=EXAMPLE,
    )
    parser.add_argument("roots", type=Path, nargs="+", metavar="ROOT")
    parser.add_argument("--output", type=Path, required=True, metavar="CACHE", help="a new or an empty folder")
    add_fields(parser, PrepareSettings)
    parser.add_argument("--workers", type=int, help="processes (default: one per core)")
    parser.add_argument("--sheets", type=int, default=1, metavar="N", help="pages of the contact sheet (default 1)")
    parser.add_argument("--skip-bad", action="store_true", help="list unusable files in skipped.csv and go on")
    parser.add_argument("--resume", action="store_true", help="continue an interrupted job in --output")
    parser.add_argument(
        "--check",
        choices=CHECKS,
        default="digests",
        help="how --resume checks finished images: digests of cache and inputs (default), or their sizes",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Prepares the cache with a progress bar, and prints where the quality report is."""
    from gbci_fast.cli.progress import image_progress
    from gbci_fast.data.prepare import SKIPPED, prepare
    from gbci_fast.data.qc import QC_FOLDER, REPORT

    with image_progress("preparing", args.output) as on_image:
        made = prepare(
            args.roots,
            args.output,
            settings_of(args, PrepareSettings),
            workers=args.workers,
            resume=args.resume,
            check=args.check,
            skip_bad=args.skip_bad,
            sheets=args.sheets,
            on_image=on_image,
        )
    if made.skipped:
        print(f"skipped {made.skipped} of {made.images + made.skipped}, see {args.output / SKIPPED}")
    print(
        f"{made.views} fields of view of {made.images} images in {args.output}; look at "
        f"{args.output / QC_FOLDER / REPORT}"
    )
