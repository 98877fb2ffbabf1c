"""`gbci-fast train vae|ldm|distill|classifier`: the model's stages and the evaluations' scorer, resumable."""

import argparse
from pathlib import Path

from gbci_fast.cli.parser import add_fields, changes_of
from gbci_fast.training.settings import DistillConfig, LDMConfig, LoopConfig

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
        help="train the autoencoder, the latent diffusion model, its few-step student, or the scorer of `evaluate`",
        description="Train one stage. Ctrl-C saves; --resume continues bit for bit.",
        epilog=EXAMPLE,
    )
    stages = parser.add_subparsers(dest="stage", required=True, metavar="STAGE")
    for stage in STAGES:
        stage_parser = stages.add_parser(stage, epilog=EXAMPLE)
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
        stage_parser.set_defaults(run=run)


def _add_common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--data",
        type=Path,
        nargs="+",
        required=True,
        help="VinDr-layout roots (training split used) or caches of `prepare`; for the classifier, roots only",
    )
    parser.add_argument(
        "--output", type=Path, required=True, help="run folder: state.pt, samples/, the weights, and what was encoded"
    )
    parser.add_argument("--preset", choices=("tiny", "base"), default="base")
    add_fields(parser, LoopConfig, "steps", "batch_size", "accumulate", "learning_rate", "precision", default=None)
    add_fields(parser, LoopConfig, "seed", "save_every", "sample_every", "tensorboard", default=None)
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--resume", action="store_true", help="continue the run in --output")


def run(args: argparse.Namespace) -> None:
    """Builds the stage from its preset and the given overrides, and trains it."""
    from gbci_fast.training import stages

    common = {"preset": args.preset, "resume": args.resume, "device": args.device}
    common["overrides"] = changes_of(args, LoopConfig)
    if args.stage == "vae":
        stages.train_vae(args.data, args.output, init=args.init, decoder_only=args.decoder_only, **common)
    elif args.stage == "classifier":
        stages.train_classifier(args.data, args.output, **common)
    elif args.stage == "distill":
        from gbci_fast.model.checkpoint import checkpoint_folder
        from gbci_fast.training.distill import train_distill

        changes, teacher = changes_of(args, DistillConfig), checkpoint_folder(args.teacher)
        train_distill(args.data, args.output, teacher=teacher, **changes, **common)
    else:
        changes = changes_of(args, LDMConfig)
        stages.train_ldm(args.data, args.output, vae=args.vae, init=args.init, **changes, **common)
