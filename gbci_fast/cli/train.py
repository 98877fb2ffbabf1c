"""`gbci-fast train vae|ldm|distill|classifier`: the model's stages, resumable, and the readers of the evaluations."""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from gbci_fast.cli.parser import add_fields, changes_of, settings_of
from gbci_fast.training.settings import DistillConfig, LDMConfig, LoopConfig, ReaderSettings

if TYPE_CHECKING:
    from rich.table import Table

    from gbci_fast.evaluate.readers import ReadersConfig

STAGES = ("vae", "ldm", "distill", "classifier")
EXAMPLE = """\
example:
  gbci-fast train vae --data VINDR_ROOT --output runs/vae
  gbci-fast train ldm --data VINDR_ROOT --vae runs/vae --output runs/ldm --resume
  gbci-fast train distill --data VINDR_ROOT --teacher runs/ldm/pipeline --output runs/distill
  gbci-fast generate INPUT --weights runs/distill/pipeline --tier approximate --steps 4 --output out/fast
  gbci-fast train classifier --data VINDR_ROOT --output runs/classifier
  torchrun --nproc-per-node 4 --no-python gbci-fast train ldm --data CACHE --vae runs/vae --output runs/l --accumulate 4
"""


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Adds `train` with one sub-command per stage."""
    parser = subparsers.add_parser(
        "train",
        help="train the autoencoder, the latent diffusion model, its few-step student, or the readers of `evaluate`",
        description="Train one stage. Ctrl-C saves; --resume continues bit for bit. The classifier takes minutes, and\n"
        "does not save.",
        epilog=EXAMPLE,
    )
    stages = parser.add_subparsers(dest="stage", required=True, metavar="STAGE")
    for stage in STAGES:
        stage_parser = stages.add_parser(stage, epilog=EXAMPLE)
        stage_parser.set_defaults(run=run)
        if stage == "classifier":
            _add_classifier(stage_parser)
            continue
        _add_common(stage_parser)
        if stage == "ldm":
            stage_parser.add_argument(
                "--vae", type=Path, required=True, help="folder written by `train vae`, or a pipeline folder"
            )
        if stage in ("vae", "ldm"):
            stage_parser.add_argument(
                "--init", type=Path, help="start from the weights of this pipeline folder (not the optimizer)"
            )
        if stage == "vae":
            stage_parser.add_argument(
                "--decoder-only",
                action="store_true",
                help="leave the encoder of --init, and so the latents of models trained on it, as they are",
            )
        if stage == "distill":
            stage_parser.add_argument(
                "--teacher", type=Path, metavar="DIR", help="the pipeline folder to distill (default: the packaged one)"
            )
            add_fields(stage_parser, DistillConfig, default=None)
        if stage == "ldm":
            add_fields(stage_parser, LDMConfig, default=None)


def _add_common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--data",
        type=Path,
        nargs="+",
        required=True,
        help="VinDr-layout roots or caches of `prepare`; folds A and B of the training split are used",
    )
    parser.add_argument(
        "--output", type=Path, required=True, help="run folder: state.pt, samples/, the weights, and what was encoded"
    )
    parser.add_argument("--preset", choices=("tiny", "base"), default="base")
    add_fields(parser, LoopConfig, "steps", "batch_size", "accumulate", "learning_rate", "precision", default=None)
    add_fields(parser, LoopConfig, "seed", "save_every", "sample_every", "tensorboard", default=None)
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--resume", action="store_true", help="continue the run in --output")


def _add_classifier(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Train the readers: logistic regressions on features of EfficientNet-Lite0 that read margin, shape, BI-RADS,\n"
        "pathology and size from a lesion. Fold A of the training patients trains, fold C judges; a reader is left\n"
        "out unless the lower 95 % bound of its AUC on C is at least 0.60. This takes minutes on a laptop."
    )
    parser.add_argument("--data", type=Path, nargs="+", required=True, help="VinDr-layout roots (folds A and C used)")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="a new folder; gets readers/")
    add_fields(parser, ReaderSettings)


def run(args: argparse.Namespace) -> None:
    """Builds the stage from its preset and the given overrides, and trains it."""
    if args.stage == "classifier":
        _train_readers(args)
        return
    from gbci_fast.training import stages

    common = {"preset": args.preset, "resume": args.resume, "device": args.device}
    common["overrides"] = changes_of(args, LoopConfig)
    if args.stage == "vae":
        stages.train_vae(args.data, args.output, init=args.init, decoder_only=args.decoder_only, **common)
    elif args.stage == "distill":
        from gbci_fast.model.checkpoint import checkpoint_folder
        from gbci_fast.training.distill import train_distill

        changes, teacher = changes_of(args, DistillConfig), checkpoint_folder(args.teacher)
        train_distill(args.data, args.output, teacher=teacher, **changes, **common)
    else:
        changes = changes_of(args, LDMConfig)
        stages.train_ldm(args.data, args.output, vae=args.vae, init=args.init, **changes, **common)


def _train_readers(args: argparse.Namespace) -> None:
    """Trains, writes, and prints the table of tasks."""
    from rich.console import Console

    from gbci_fast.cli.evaluate.options import stage_progress
    from gbci_fast.evaluate.readers import describe
    from gbci_fast.training.classifier import train_classifier

    with stage_progress(()) as on_progress:
        readers = train_classifier(args.data, args.output, settings_of(args, ReaderSettings), on_progress)
    Console().print(build_table(readers.config))
    for task in readers.config.refused:
        print(f"{task} is left out: the lower bound of its AUC on fold C is not 0.60 or more")
    for name, found in readers.config.control.items():
        print(f"the same features tell {name} from the other data sets with an AUC of {describe(found)}")
    print(f"readers: {args.output / 'readers'}")


def build_table(config: "ReadersConfig") -> "Table":
    """A row per task, those that are left out last; fits 80 columns."""
    from rich import box
    from rich.table import Table

    from gbci_fast.evaluate.readers import describe

    title = (
        "positive/negative lesions; AUC on fold C, within data sets,\n"
        "with 95 % over patients; at equal size; of the diameter alone"
    )
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("task", no_wrap=True)
    for heading in (f"fold {config.folds}", "fold C", "AUC", "equal size", "diameter"):
        table.add_column(heading, justify="right", no_wrap=True)
    for task, record in (config.tasks | config.refused).items():
        counts = (_total(record.trained), _total(record.judged))
        equal = "-" if record.matched_auc is None else describe(record.matched_auc)
        diameter = "-" if record.size_auc.value is None else f"{record.size_auc.value:.2f}"
        table.add_row(task, *counts, describe(record.auc), equal, diameter)
    return table


def _total(counts: Mapping[str, tuple[int, int]]) -> str:
    """The positive and the negative lesions of all data sets, such as "96/130"."""
    negative, positive = map(sum, zip(*counts.values(), strict=True)) if counts else (0, 0)
    return f"{positive}/{negative}"
