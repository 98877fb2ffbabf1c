"""Compares exported ONNX files, run by onnxruntime on the CPU, with PyTorch: one forward, and whole trajectories.

    python benchmarks/parity_onnx.py VINDR_ROOT... --output benchmarks/results/parity_onnx.json

UNet and decoder of the packaged checkpoint are exported as for TensorRT, in float32 and float16. They are compared on
random inputs, and then sample lesions as `gbci-fast evaluate paired` does. The output has figures only, no pixels.
"""

import argparse
import json
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from gbci_fast.choices import JUDGED
from gbci_fast.evaluate.case import Case
from gbci_fast.evaluate.painting import sampler_arguments
from gbci_fast.evaluate.paired.evaluation import PairedSettings, load_cases
from gbci_fast.evaluate.parity.images import candidate_output, measure, reference_output, worst
from gbci_fast.evaluate.parity.onnx import OnnxEngines, check_decoder, check_unet
from gbci_fast.fast.accelerate import accelerate
from gbci_fast.fast.export import Bucket, export_decoder, export_unet
from gbci_fast.fast.tensorrt.denoiser import EngineAutoencoder, TensorRTDenoiser
from gbci_fast.jobs.files import atomically, hash_weights
from gbci_fast.model.checkpoint import checkpoint_folder, load_pipeline
from gbci_fast.model.pipeline import GBCIPipeline

DTYPES = {"float32": torch.float32, "float16": torch.float16}
TRAJECTORY_PSNR = 60.0  # least PSNR in dB of the float32 trajectory
CELLS, TOKENS = 56, 224


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("roots", type=Path, nargs="+", metavar="ROOT", help="folders in the VinDr-Mammo layout")
    parser.add_argument("--split", default=JUDGED[0], choices=JUDGED, help="fold C or the test split (%(default)s)")
    parser.add_argument("--output", type=Path, metavar="FILE", help="the figures, JSON")
    parser.add_argument("--limit", type=int, default=4, help="images, spread evenly over all (default: 4)")
    parser.add_argument("--steps", type=int, default=20, help="(default: 20)")
    args = parser.parse_args()
    settings = PairedSettings(split=args.split, steps=args.steps, limit=args.limit, batch_size=args.limit)
    weights = checkpoint_folder(None)
    pipe = load_pipeline(weights)
    cases, _ = load_cases(args.roots, settings, pipe.unet.config.sample_size * pipe.vae_scale_factor, lambda *_: None)
    rows = {name: compare(pipe, cases, settings, dtype) for name, dtype in DTYPES.items()}
    print(f"{len(cases)} images, {args.steps} steps, guidance {settings.guidance:g}; RoI to eager float32")
    print("| dtype | UNet, largest error | decoder, largest error | RoI PSNR worst | RoI SSIM worst |")
    print("|---|---|---|---|---|")
    for name, row in rows.items():
        errors = f"{row['unet_error']:.1e} | {row['decoder_error']:.1e}"
        print(f"| {name} | {errors} | {row['worst_roi_psnr']:.1f} dB | {row['worst_roi_ssim']:.5f} |")
    if args.output is not None:
        about = {"steps": args.steps, "num_images": len(cases), "weights_sha256": hash_weights(weights)}
        text = json.dumps(about | {"torch": torch.__version__, "rows": rows}, indent=1, allow_nan=False) + "\n"
        atomically(args.output, lambda path: path.write_text(text, encoding="utf-8"))
    return 0 if rows["float32"]["worst_roi_psnr"] >= TRAJECTORY_PSNR else 1


def compare(pipe: GBCIPipeline, cases: list[Case], settings: PairedSettings, dtype: torch.dtype) -> dict[str, Any]:
    """Figures of one dtype: the largest errors of a forward relative to the largest output, and the worst distance."""
    with TemporaryDirectory() as folder:
        path, bucket = Path(folder) / "exported.onnx", Bucket(batch=1, height=CELLS, width=CELLS, tokens=TOKENS)
        export_unet(pipe.unet, bucket, dtype, path)
        unet_error = check_unet(path, pipe.unet, bucket, dtype)
        export_decoder(pipe.vae, 1, CELLS, CELLS, dtype, path)
        decoder_error = check_decoder(path, pipe.vae, (1, CELLS, CELLS), dtype)
    fast = accelerate(pipe, runtime="fused", dtype=dtype)
    fast._built = TensorRTDenoiser(fast.unet, OnnxEngines()), None
    fast.vae = EngineAutoencoder.of(fast.vae, OnnxEngines())
    call = sampler_arguments(cases, steps=settings.steps, guidance=settings.guidance)
    found, reference = candidate_output(fast, **call), reference_output(pipe, **call)
    distance = worst(measure(found.images, reference.images, call["mask_image"]))
    errors = {"unet_error": unet_error, "decoder_error": decoder_error}
    return errors | {"worst_roi_psnr": distance.psnr, "worst_roi_ssim": distance.ssim}


if __name__ == "__main__":
    sys.exit(main())
