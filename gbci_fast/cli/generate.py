"""`gbci-fast generate`: synthetic lesions in real mammograms, as a labeled data set."""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from gbci_fast.choices import RUNTIME, RUNTIMES, SHARD_SIZE, TIER, TIERS
from gbci_fast.cli.parser import add_fields, settings_of
from gbci_fast.cli.progress import image_progress
from gbci_fast.errors import GBCIError
from gbci_fast.generate.settings import JobSettings, SamplerSettings
from gbci_fast.jobs.folder import CHECKS

if TYPE_CHECKING:
    from gbci_fast.data.vindr import ImageRecord
    from gbci_fast.generate.plan import Plan
    from gbci_fast.generate.priors import Priors

PLANNING = ("variants", "seed", "mask", "priors", "overrides", "report", "balance", "plan", "skip_bad", "weights")
NOTED = 10_000  # lesions whose categories are looked at
EXAMPLE = """\
example:
  gbci-fast generate mammograms/ --output out/synthetic --variants 4 --seed 0 --set finding_birads=4
  gbci-fast generate VINDR_ROOT --output out/synthetic --mask annotations --format png --resume
  gbci-fast generate VINDR_ROOT --output out/balanced --balance finding_categories,finding_birads --variants 30
  gbci-fast generate VINDR_ROOT --output out/many --variants 50 --format webdataset --tier approximate --steps 4
  gbci-fast generate VINDR_ROOT --balance natural --write-plan plan.csv     (edit it, then)
  gbci-fast generate VINDR_ROOT --plan plan.csv --output out/planned
"""


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Adds the command's options."""
    parser = subparsers.add_parser(
        "generate",
        help="paint lesions into mammograms and write them as a labeled data set",
        description="Paint lesion variants into every input mammogram. INPUT is a DICOM or PNG file, a folder of them, "
        "or a VinDr-Mammo root. For research data sets, not for diagnosis.",
        epilog=EXAMPLE,
    )
    parser.add_argument("input", type=Path, metavar="INPUT")
    parser.add_argument("--output", type=Path, help="folder of the new data set; needed unless --write-plan is given")
    parser.add_argument("--variants", type=int, help="synthetic images per input (default 4)")
    add_fields(parser, JobSettings, "seed", default=0)
    add_fields(parser, SamplerSettings)
    add_fields(parser, JobSettings, "formats")
    add_fields(parser, JobSettings, "shard_size", default=None)
    parser.add_argument(
        "--mask", help="auto (the default: drawn from the priors), annotations (the boxes), or a mask image file"
    )
    parser.add_argument("--priors", type=Path, help="lesion priors of gbci-fast priors (default: the packaged ones)")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        dest="overrides",
        help="attribute of every lesion, such as finding_birads=4, finding_categories=Mass, margin=spiculated, "
        "shape=irregular, pathology=malignant or subtlety=3; repeatable",
    )
    parser.add_argument("--report", help="report text of every lesion")
    parser.add_argument(
        "--balance",
        metavar="NAMES",
        help="one or more of finding_categories, finding_birads, shape, margin, pathology and subtlety, "
        "comma-separated: every value equally often; or natural: as frequent as in the priors' data",
    )
    parser.add_argument("--plan", type=Path, metavar="CSV", help="one row per synthetic image, instead of --variants")
    parser.add_argument(
        "--write-plan", type=Path, metavar="CSV", help="write the plan of these arguments, to be edited, and stop"
    )
    add_fields(parser, JobSettings, "batch_size", "compression")
    parser.add_argument("--weights", type=Path, help="pipeline folder (default: the packaged checkpoint)")
    parser.add_argument(
        "--runtime", choices=RUNTIMES, default=RUNTIME, help="what executes the UNet (default auto: the fastest here)"
    )
    parser.add_argument(
        "--tier",
        choices=TIERS,
        default=TIER,
        help="the largest difference to the eager pipeline's images that a technique may make (default %(default)s)",
    )
    parser.add_argument(
        "--dtype",
        choices=("auto", "fp32", "bf16"),
        default="auto",
        help="of UNet and VAE (default auto: bf16 if the tier allows it and the device is faster in it)",
    )
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument(
        "--workers",
        type=int,
        help="processes that read, paste and write beside the sampler; any number gives the same bytes (default: with "
        "a GPU one per core, otherwise 0, which uses threads)",
    )
    parser.add_argument(
        "--resume", action="store_true", help="continue an interrupted job in --output, or make lost files again"
    )
    parser.add_argument(
        "--check",
        choices=CHECKS,
        default="digests",
        help="how --resume checks finished images: digests of all files and templates (default), or their sizes",
    )
    parser.add_argument(
        "--skip-bad",
        action="store_true",
        help="leave out inputs that cannot be used, and list them in skipped.csv, instead of stopping",
    )
    parser.add_argument(
        "--reject-copies",
        type=Path,
        metavar="INDEX",
        help="write no lesion that is nearly a training lesion, and list it in skipped.csv; INDEX is written by "
        "gbci-fast evaluate memorisation --index and holds pixels of the training data",
    )
    identity = parser.add_mutually_exclusive_group()
    identity.add_argument(
        "--keep-identifiers",
        action="store_true",
        help="write names of files and folders, UIDs, ages and dates as they are in INPUT, instead of pseudonyms",
    )
    identity.add_argument(
        "--identity-key",
        type=Path,
        metavar="FILE",
        help="secret file of at least 16 bytes: jobs with the same key give a patient the same pseudonym (default: a "
        "key derived from --seed and the content of INPUT)",
    )
    defaults = vars(parser.parse_args([""]))
    parser.set_defaults(run=run, refuse=parser.error, defaults=defaults)


def run(args: argparse.Namespace) -> None:
    """Plans the job, runs it with a progress bar, and prints where the preview is."""
    from gbci_fast.generate.priors import load_priors

    if args.write_plan is not None:
        _write_plan(args, load_priors(args.priors))
        return
    if args.output is None:
        args.refuse("the following arguments are required: --output")
    if args.shard_size is not None and "webdataset" not in args.format:
        args.refuse(f"argument --shard-size: not allowed with --format {','.join(args.format)}, which writes no shards")
    if args.workers is not None and args.workers < 0:
        args.refuse(f"argument --workers: {args.workers}; expected 0 or more")

    import torch

    from gbci_fast.data.vindr import find_inputs
    from gbci_fast.fast.accelerate import accelerate
    from gbci_fast.generate.copies import CopyGate
    from gbci_fast.generate.identities import job_identities
    from gbci_fast.generate.job import run_job
    from gbci_fast.generate.manifest import SKIPPED
    from gbci_fast.jobs.files import hash_weights, real_path
    from gbci_fast.model.checkpoint import checkpoint_folder, load_pipeline
    from gbci_fast.model.devices import pick_device

    priors = load_priors(args.priors)
    gate = None if args.reject_copies is None else CopyGate.load(args.reject_copies)
    output = real_path(args.output)
    if real_path(args.input) in (output, *output.parents):
        raise GBCIError(f"{args.output} lies in {args.input}, where images are read from; choose a folder outside")
    records = find_inputs(args.input, skip_bad=args.skip_bad)
    plan = _plan(args, records, priors)
    identities = job_identities(
        args.output,
        args.seed,
        [record.path for record in records],
        keep=args.keep_identifiers,
        key_file=args.identity_key,
    )
    folder, device = checkpoint_folder(args.weights), pick_device(args.device)
    names = {"auto": None, "fp32": torch.float32, "bf16": torch.bfloat16}
    if args.tier == "exact":
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    pipe = accelerate(load_pipeline(folder), args.runtime, args.tier, names[args.dtype], device)
    _note_ignored(plan, args, pipe.conditioner.ignores)
    settings = settings_of(
        args,
        JobSettings,
        shard_size=SHARD_SIZE if args.shard_size is None else args.shard_size,
        sampler=settings_of(args, SamplerSettings),
        # The decision instead of the options: if "auto" decides differently, the job has other bytes.
        runtime=pipe.decision.runtime,
        tier=pipe.decision.tier,
        dtype=next(name for name, dtype in names.items() if dtype == pipe.decision.dtype),
        device=device.type,
        weights_hash=hash_weights(folder),
        priors_hash=priors.digest,
        copies_hash="" if gate is None else gate.digest,
    )
    with image_progress("generating", args.output) as on_image:
        result = run_job(
            pipe,
            plan,
            args.output,
            settings,
            identities=identities,
            resume=args.resume,
            check=args.check,
            skip_bad=args.skip_bad,
            gate=gate,
            workers=_workers(args.workers, device.type),
            on_batch=lambda done: on_image(done, len(plan)),
        )
    print(f"{result.images} synthetic images in {args.output}; look at {result.preview}")
    how, *notes = str(pipe.decision).splitlines()
    print(f"sampled with {how}")
    for note in notes:
        print(f"note: {note}")
    if result.mended:
        print(f"made {result.mended} again that were lost, damaged, or of another template")
    if result.skipped:
        copies = f" ({result.rejected} near copies of training lesions)" if result.rejected else ""
        print(f"skipped {result.skipped} of {len(plan)}{copies}, see {args.output / SKIPPED}")
    elif gate is not None:
        print(f"no near copy of a training lesion among {len(plan)}")
    for note, inputs in result.noted.items():
        print(f"note of {inputs} input{'s' * (inputs > 1)}: {note}")


def _workers(asked: int | None, device: str) -> int:
    if asked is not None:
        return asked
    return len(os.sched_getaffinity(0)) if device == "cuda" else 0


def _write_plan(args: argparse.Namespace, priors: "Priors") -> None:
    from gbci_fast.data.vindr import find_inputs
    from gbci_fast.generate.plan_csv import write_plan

    for name, default in args.defaults.items():
        if name not in (*PLANNING, "input", "write_plan") and getattr(args, name) != default:
            option = name.replace("_", "-")
            args.refuse(f"argument --{option}: not allowed with --write-plan, as it decides nothing of a plan")
    plan = _plan(args, find_inputs(args.input, skip_bad=args.skip_bad), priors)
    write_plan(plan, args.write_plan)
    print(f"{len(plan)} synthetic images planned in {args.write_plan}; edit it and run it with --plan")


def _plan(args: argparse.Namespace, records: "list[ImageRecord]", priors: "Priors") -> "Plan":
    """The plan: the rows of --plan, or --variants of each input."""
    from gbci_fast.generate.plan import make_plan
    from gbci_fast.generate.plan_csv import read_plan

    overrides = _pairs(args.overrides)
    if args.plan is None:
        plan = make_plan(
            records,
            variants=4 if args.variants is None else args.variants,
            seed=args.seed,
            mask="auto" if args.mask is None else args.mask,
            overrides=overrides,
            report=args.report,
            balance=args.balance,
            priors=priors,
        )
        _note_categories(plan, args)
        return plan
    for name in ("variants", "mask", "balance"):
        if getattr(args, name) is not None:
            args.refuse(f"argument --{name}: not allowed with --plan, whose rows say it")
    plan = read_plan(
        args.plan, records, args.input, seed=args.seed, overrides=overrides, report=args.report, priors=priors
    )
    _note_categories(plan, args)
    return plan


def _note_categories(plan: "Plan", args: argparse.Namespace) -> None:
    """Prints a note if the plan has lesions of categories that the packaged weights have hardly learned."""
    from gbci_fast.generate.balance import LEARNED_CATEGORIES, hardly_learned

    first = plan[:NOTED]
    if args.weights is None and (counts := hardly_learned(item.attributes.finding_categories for item in first)):
        listed = "; ".join(f"{count} {name}" for name, count in counts.most_common())
        part = "the first " if len(first) < len(plan) else ""
        print(
            f"note: {counts.total()} of {part}{len(first)} lesions are of other categories than "
            f"{', '.join(LEARNED_CATEGORIES)} ({listed}); the packaged weights have seen few real ones or none, and "
            "may paint masses there. The tables state what was asked for",
            file=sys.stderr,
        )


def _note_ignored(plan: "Plan", args: argparse.Namespace, ignores: Sequence[str]) -> None:
    """Prints a note if the user has set attributes that the checkpoint does not know; those of tables are no news."""
    from gbci_fast.generate.balance import DRAWN, NATURAL

    chosen = {*_pairs(args.overrides), *(DRAWN if args.balance == NATURAL else (args.balance or "").split(","))}
    if args.plan is not None:
        chosen.update(ignores)
    set_here = [name for name in ignores if name in {each.strip() for each in chosen}]
    first = [item.attributes for item in plan[:NOTED]]
    told = [name for name in set_here if any(getattr(described, name) is not None for described in first)]
    if told:
        print(
            f"note: this checkpoint does not know {', '.join(told)}, and ignores what was set. The tables state it "
            "nevertheless; the manifest's ignored_attributes says that it was not painted",
            file=sys.stderr,
        )


def _pairs(texts: list[str]) -> dict[str, str]:
    pairs = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals:
            raise GBCIError(f"--set {text!r} is not NAME=VALUE; expected such as finding_birads=4")
        pairs[name.strip()] = value
    return pairs
