"""Compares each tier of `accelerate` with the eager pipeline on real lesions: figures of its gates, and a verdict.

    python benchmarks/parity_real.py VINDR_ROOT... --output benchmarks/results/parity_real.json

Every image is repainted as in `gbci-fast evaluate paired`. The tier's fidelity to the erased lesions, minus the eager
pipeline's, is printed, too. If "approximate" misses its gates, this difference decides: its mean over images must not
be significantly below 0, neither in PSNR nor in SSIM. "few_step" is the tier "approximate" with the checkpoint's
few-step student, compared with the eager student at the student's number of steps. The student's own quality is
measured by `few_steps.py`. The summary has figures only, no pixels or identifiers.
"""

import argparse
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gbci_fast.choices import GUIDANCE_SCALE, JUDGED, TIERS
from gbci_fast.evaluate.case import Case
from gbci_fast.evaluate.metrics import patient_summary
from gbci_fast.evaluate.painting import images_and_masks, sampler_arguments
from gbci_fast.evaluate.paired.evaluation import PairedSettings, load_cases
from gbci_fast.evaluate.parity.images import (
    Distance,
    Output,
    candidate_output,
    measure,
    narrowed,
    parity,
    reference_output,
)
from gbci_fast.fast.accelerate import accelerate
from gbci_fast.fast.pipeline import FastPipeline
from gbci_fast.jobs.files import atomically, hash_weights
from gbci_fast.model.checkpoint import checkpoint_folder, load_pipeline
from gbci_fast.model.pipeline import GBCIPipeline

FEW_STEP = "few_step"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("roots", type=Path, nargs="+", metavar="ROOT", help="folders in the VinDr-Mammo layout")
    parser.add_argument("--split", default=JUDGED[0], choices=JUDGED, help="fold C or the test split (%(default)s)")
    parser.add_argument("--output", type=Path, metavar="FILE", help="the summary, JSON")
    parser.add_argument("--weights", type=Path, metavar="DIR", help="(default: the packaged checkpoint)")
    parser.add_argument(
        "--tiers", nargs="+", choices=(*TIERS, FEW_STEP), help=f"(default: all; {FEW_STEP} where there is a student)"
    )
    parser.add_argument("--limit", type=int, default=32, help="images, spread evenly over all (default: 32)")
    parser.add_argument("--steps", type=int, default=20, help="(default: 20)")
    parser.add_argument("--guidance", type=float, default=GUIDANCE_SCALE, help=f"(default: {GUIDANCE_SCALE})")
    parser.add_argument("--batch-size", type=int, default=8, help="(default: 8)")
    parser.add_argument("--device", default="cpu", help="(default: cpu)")
    args = parser.parse_args()
    settings = PairedSettings(
        split=args.split, steps=args.steps, guidance=args.guidance, batch_size=args.batch_size, limit=args.limit
    )
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False  # eager float32 is the reference
    weights = checkpoint_folder(args.weights)
    pipe = load_pipeline(weights, device=args.device)
    cases, _ = load_cases(args.roots, settings, pipe.unet.config.sample_size * pipe.vae_scale_factor, lambda *_: None)
    about = {
        "settings": asdict(settings) | {"device": args.device, "weights_sha256": hash_weights(weights)},
        "torch": torch.__version__,
    }
    student = pipe.few_step is not None and pipe.few_step.covers(pipe.few_step.config.steps, args.guidance, 0.0)
    tiers = args.tiers or [*TIERS, *([FEW_STEP] if student else [])]
    if FEW_STEP in tiers and not student:
        parser.error(f"argument --tiers: {weights} has no student at guidance {args.guidance:g}")
    for found in compare(pipe, cases, settings, tiers):
        summary = about | found
        if args.output is not None:  # after every batch: this takes long
            text = json.dumps(summary, indent=1, allow_nan=False) + "\n"
            atomically(args.output, lambda path, text=text: path.write_text(text, encoding="utf-8"))
    print_table(summary)
    return 0 if all(tier["holds"] for tier in summary["tiers"].values()) else 1


def compare(
    pipe: GBCIPipeline, cases: list[Case], settings: PairedSettings, tiers: list[str]
) -> Iterator[dict[str, Any]]:
    """Samples all cases with every pipeline; after every batch, yields the verdicts on all cases so far."""
    fast = {tier: accelerated(pipe, tier) for tier in tiers}
    dtypes = {tier: one.decision.dtype for tier, one in fast.items()}
    narrow = {dtype: narrowed(pipe, dtype) for dtype in set(dtypes.values()) - {torch.float32}}
    made: dict[Any, list[Output]] = {name: [] for name in ("eager", *narrow, *tiers)}
    if FEW_STEP in tiers:
        made["eager student"], student, steps = [], pipe.few_step_pipeline(), pipe.few_step.config.steps
    start = time.monotonic()
    for first in range(0, len(cases), settings.batch_size):
        batch = cases[first : first + settings.batch_size]
        call = sampler_arguments(batch, steps=settings.steps, guidance=settings.guidance)
        made["eager"].append(reference_output(pipe, **call))
        for dtype, one in narrow.items():
            made[dtype].append(candidate_output(one, **call))
        for tier, one in fast.items():
            few = {"num_inference_steps": steps} if tier == FEW_STEP else {}
            made[tier].append(candidate_output(one, **call | few, latents=tier == "exact"))
        if FEW_STEP in tiers:
            made["eager student"].append(
                reference_output(student, **call | {"num_inference_steps": steps, "guidance_scale": 1.0})
            )
        done = cases[: first + settings.batch_size]
        print(f"{len(done)}/{len(cases)} images, {time.monotonic() - start:.0f} s", file=sys.stderr, flush=True)
        joined = {name: join(outputs) for name, outputs in made.items()}
        found = {}
        for tier, one in fast.items():
            reference = joined["eager student" if tier == FEW_STEP else "eager"]
            own = joined[dtypes[tier]] if tier != FEW_STEP and dtypes[tier] in narrow else reference
            found[tier] = judge(tier, joined[tier], reference, own, done) | {"plan": one.describe()}
        patients = {(case.root, case.patient) for case in done}
        yield {"num_images": len(done), "num_patients": len(patients), "tiers": found}


def accelerated(pipe: GBCIPipeline, tier: str) -> FastPipeline:
    """The pipeline of a tier; only `FEW_STEP` uses the student."""
    few_step = tier == FEW_STEP
    return accelerate(pipe, tier="approximate" if few_step else tier, few_step=few_step)


def judge(tier: str, candidate: Output, reference: Output, narrow: Output, cases: list[Case]) -> dict[str, Any]:
    """The gates of one tier, the distances to the reference behind them, and the distances to the erased lesions."""
    templates, masks = images_and_masks(cases)
    gates = "approximate" if tier == FEW_STEP else tier
    found = parity(gates, candidate, reference, templates=templates, masks=masks, narrow=narrow)
    print(found.sentence(), flush=True)
    truth = held_out(candidate, reference, templates, masks, cases)
    no_worse = all(one["high"] is not None and one["high"] >= 0 for one in truth.values())
    return {
        "holds": found.holds or (gates == "approximate" and no_worse),
        "gates_hold": found.holds,
        "gates": [asdict(gate) | {"holds": gate.holds} for gate in found.gates],
        "to_eager": summarize(found.distances),
        "eager_in_its_dtype_to_eager": summarize(found.own),
        "held_out": truth,
    }


def join(outputs: list[Output]) -> Output:
    latents = [one.latents for one in outputs if one.latents is not None]
    return Output(images=torch.cat([one.images for one in outputs]), latents=torch.cat(latents) if latents else None)


def summarize(distances: tuple[Distance, ...]) -> dict[str, dict[str, float]]:
    """Minimum, median and maximum of each figure over the images."""
    columns = {name: [getattr(one, name) for one in distances] for name in ("psnr", "ssim", "rms")}
    return {
        name: dict(zip(("min", "median", "max"), np.quantile(column, (0, 0.5, 1)).tolist(), strict=True))
        for name, column in columns.items()
    }


def held_out(
    candidate: Output, reference: Output, templates: Tensor, masks: Tensor, cases: list[Case]
) -> dict[str, dict[str, float | None]]:
    """PSNR and SSIM to the erased lesion, candidate minus reference: mean and 95 % interval over patients."""
    patients = [(case.root, case.patient) for case in cases]
    ours, eager = (measure(output.images, templates, masks) for output in (candidate, reference))
    return {
        name: patient_summary([getattr(a, name) - getattr(b, name) for a, b in zip(ours, eager, strict=True)], patients)
        for name in ("psnr", "ssim")
    }


def print_table(summary: dict[str, Any]) -> None:
    """Prints a Markdown table: each tier's worst and median distance, eager's in its dtype, held-out difference."""
    print(f"\n{summary['num_images']} images of {summary['num_patients']} patients; to eager float32, in the RoI")
    print("| tier | gates | RoI PSNR worst / median | RoI SSIM worst / median | eager in its dtype | to the truth |")
    print("|---|---|---|---|---|---|")
    for tier, found in summary["tiers"].items():
        ours, own, truth = found["to_eager"], found["eager_in_its_dtype_to_eager"], found["held_out"]["psnr"]
        verdict = "hold" if found["gates_hold"] else "missed, no worse on held-out data" if found["holds"] else "MISSED"
        interval = "one patient" if truth["low"] is None else f"{truth['low']:+.2f} to {truth['high']:+.2f}"
        print(
            f"| {tier} | {verdict} "
            f"| {ours['psnr']['min']:.1f} / {ours['psnr']['median']:.1f} dB "
            f"| {ours['ssim']['min']:.4f} / {ours['ssim']['median']:.4f} "
            f"| {own['psnr']['min']:.1f} dB, {own['ssim']['min']:.4f} "
            f"| {truth['mean']:+.2f} dB ({interval}) |"
        )


if __name__ == "__main__":
    sys.exit(main())
