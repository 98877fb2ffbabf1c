"""`gbci-fast train vae|ldm|distill|classifier`: the model's stages and the evaluations' scorer, resumable."""

import argparse
from pathlib import Path

STAGES = ("vae", "ldm", "distill", "classifier")
OVERRIDES = (
    "steps",
    "batch_size",
    "accumulate",
    "learning_rate",
    "precision",
    "seed",
    "save_every",
    "sample_every",
    "tensorboard",
)  # of the preset's LoopConfig
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
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    stages = parser.add_subparsers(dest="stage", required=True, metavar="STAGE")
    for stage in STAGES:
        stage_parser = stages.add_parser(stage, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter)
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
            stage_parser.add_argument("--guidance", type=float, help="guidance scale that the student has built in")
            stage_parser.add_argument("--student-steps", type=int, metavar="N", help="steps the student takes")
            stage_parser.add_argument(
                "--solver-steps", type=int, metavar="N", help="DDIM steps of the teacher, a multiple of the student's"
            )
            stage_parser.add_argument(
                "--trajectories", type=int, metavar="N", help="pairs of image and mask that the teacher paints first"
            )
            stage_parser.add_argument("--rank", type=int, help="of the low-rank change of every layer")
            stage_parser.add_argument(
                "--latent-crop", type=int, metavar="SIDE", help="of the window of each pair, in latent cells"
            )
        if stage == "ldm":
            stage_parser.add_argument(
                "--variants", type=int, help="augmented (image, mask) pairs encoded per image before training"
            )
            stage_parser.add_argument(
                "--latent-crops",
                type=int,
                nargs="+",
                metavar="SIDE",
                help="sides of the random latent crops, of which each batch takes one; the full latent's is no crop",
            )
        stage_parser.set_defaults(run=run)


def _add_common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--data",
        type=Path,
        nargs="+",
        required=True,
        help="VinDr-layout roots (training split used) or, but for the classifier, caches of `prepare`",
    )
    parser.add_argument(
        "--output", type=Path, required=True, help="run folder: state.pt, samples/, the weights, and what was encoded"
    )
    parser.add_argument("--preset", choices=("tiny", "base"), default="base")
    parser.add_argument("--steps", type=int, help="optimizer steps in all")
    parser.add_argument("--batch-size", type=int)
    parser.add_argument(
        "--accumulate", type=int, help="micro-batches per optimizer step; processes under torchrun share them"
    )
    parser.add_argument("--learning-rate", type=float)
    parser.add_argument("--precision", choices=("fp32", "bf16"))
    parser.add_argument("--seed", type=int)
    parser.add_argument("--save-every", type=int)
    parser.add_argument("--sample-every", type=int)
    parser.add_argument(
        "--tensorboard", action="store_true", default=None, help="write curves to OUTPUT/tensorboard (gbci_fast[train])"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--resume", action="store_true", help="continue the run in --output")


def run(args: argparse.Namespace) -> None:
    """Builds the stage from its preset and the given overrides, and trains it."""
    from gbci_fast.training import stages

    overrides = {name: getattr(args, name) for name in OVERRIDES if getattr(args, name) is not None}
    common = {"preset": args.preset, "overrides": overrides, "resume": args.resume, "device": args.device}
    if args.stage == "vae":
        stages.train_vae(args.data, args.output, init=args.init, decoder_only=args.decoder_only, **common)
    elif args.stage == "classifier":
        stages.train_classifier(args.data, args.output, **common)
    elif args.stage == "distill":
        from gbci_fast.model.checkpoint import checkpoint_folder
        from gbci_fast.training.distill import train_distill

        train_distill(
            args.data,
            args.output,
            teacher=checkpoint_folder(args.teacher),
            guidance=args.guidance,
            student_steps=args.student_steps,
            solver_steps=args.solver_steps,
            trajectories=args.trajectories,
            rank=args.rank,
            latent_crop=args.latent_crop,
            **common,
        )
    else:
        stages.train_ldm(
            args.data,
            args.output,
            vae=args.vae,
            init=args.init,
            variants=args.variants,
            latent_crops=args.latent_crops,
            **common,
        )
