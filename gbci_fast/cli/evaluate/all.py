"""`gbci-fast evaluate all`: runs every kind of evaluation, and writes one page of the results."""

import argparse
from pathlib import Path

from gbci_fast.cli.evaluate.options import add_painting
from gbci_fast.cli.parser import add_fields
from gbci_fast.errors import GBCIError
from gbci_fast.evaluate.settings import UtilitySettings
from gbci_fast.jobs.files import real_path

PAGE, ARGUMENTS = "index.html", "arguments.json"
EXAMPLE = """\
example:
  gbci-fast evaluate all VINDR_ROOT OTHER_ROOT --output out/evaluation
  gbci-fast evaluate all VINDR_ROOT --weights runs/ldm/pipeline --output out/mine --skip utility --resume
"""
SHARED = ("split", "weights", "steps", "guidance", "seed", "batch_size", "limit", "device")
FAST = ("runtime", "tier", "painted")  # not for `paired`, which measures the eager pipeline


def add_parser(kinds: argparse._SubParsersAction) -> None:
    """Adds the command's options."""
    parser = kinds.add_parser(
        "all",
        help="every kind of evidence, as reports, figures and one HTML page",
        description="Run every kind of evaluation on the roots' images of --split, each with its own defaults,\n"
        f"and put targets, figures and reports on one page, {PAGE}.",
        epilog=EXAMPLE,
    )
    parser.add_argument("roots", type=Path, nargs="+", metavar="ROOT", help="folders in the VinDr-Mammo layout")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="a new folder, or with --resume")
    add_fields(parser, UtilitySettings, "split")
    add_painting(parser, default=None, help="of the sampler (default: each kind's own)")
    add_fields(parser, UtilitySettings, "seed", help="of noise, splits and bootstrap (default: %(default)s)")
    add_fields(parser, UtilitySettings, "limit")
    parser.add_argument(
        "--skip", default="", metavar="KINDS", help="kinds to leave out, comma-separated, such as utility"
    )
    parser.add_argument("--resume", action="store_true", help="keep the reports that --output already holds")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Runs the kinds one after another, then writes the page."""
    from gbci_fast.cli.evaluate import KINDS
    from gbci_fast.evaluate.page import Section, write_page
    from gbci_fast.jobs.folder import JobFolder, Kept

    kinds = [name for name in KINDS if name != "all"]
    skipped = [name for name in args.skip.split(",") if name]
    for name in skipped:
        if name not in kinds:
            raise GBCIError(f"--skip names {name!r}; expected out of {', '.join(kinds)}")
    if set(skipped) == set(kinds):
        raise GBCIError("--skip leaves out every kind of evaluation; expected at least one to be left")
    _check_extra(set(kinds) - set(skipped))
    job = JobFolder(args.output, _arguments(args), file=ARGUMENTS)
    job.begun(resume=args.resume)
    with job.claimed(resume=args.resume):
        sections = []
        for kind in kinds:
            if kind in skipped:
                continue
            section = Section(report=args.output / f"{kind}.json", figure=args.output / f"{kind}.png")
            sections.append(section)
            if kind in job and not job.is_damaged(kind):
                print(f"{kind}: kept, {section.report}")
                continue
            _run_kind(kind, args, section.report)
            job.note(kind, None, [Kept.of(args.output, path) for path in (section.report, section.figure)])
        write_page(args.output / PAGE, sections)
        job.finish()
    print(f"page: {args.output / PAGE}")


def _check_extra(kinds: set[str]) -> None:
    """Raises GBCIError before any work if a kind needs packages of the extra `evaluate` that are not installed."""
    from gbci_fast.evaluate.backbone import open_lite0
    from gbci_fast.evaluate.realism.boosting import check_boosting

    if "realism" in kinds:
        check_boosting()
    if "obedience" in kinds:
        open_lite0()


def _run_kind(kind: str, args: argparse.Namespace, report: Path) -> None:
    """Runs one kind as its own command, with the options of `evaluate all`."""
    from gbci_fast.cli import build_parser

    parsed = build_parser().parse_args(arguments_of(kind, args, report))
    parsed.run(parsed)


def arguments_of(kind: str, args: argparse.Namespace, report: Path) -> list[str]:
    """The command line of one kind, with the options of `evaluate all` that the kind has."""
    argv = ["evaluate", kind, *map(str, args.roots), "--output", str(report)]
    for name in SHARED if kind == "paired" else (*SHARED, *FAST):
        value = getattr(args, name)
        if value is not None:
            argv += [f"--{name.replace('_', '-')}", str(value)]
    return argv


def _arguments(args: argparse.Namespace) -> dict[str, object]:
    """Everything that decides the reports; saved, and compared at --resume."""
    from gbci_fast.jobs.files import hash_weights
    from gbci_fast.model.checkpoint import checkpoint_folder

    names = [name for name in (*SHARED, *FAST) if name not in ("weights", "painted", "device")]
    digest = hash_weights(checkpoint_folder(args.weights))
    return {"roots": [str(real_path(root)) for root in args.roots], "weights_sha256": digest} | {
        name: getattr(args, name) for name in names
    }
