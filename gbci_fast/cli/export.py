"""`gbci-fast export`: the parts of a pipeline that sampling calls most, for other software to run."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from gbci_fast.errors import GBCIError

if TYPE_CHECKING:
    from gbci_fast.export import Bucket
    from gbci_fast.pipeline import GBCIPipeline

DTYPES = ("float32", "float16", "bfloat16")
PARTS = ("unet", "decoder")
EXAMPLE = """\
example:
  gbci-fast export onnx --output out/onnx --batch 8 --dtype float16
  gbci-fast export onnx runs/ldm/pipeline --output out/onnx --part unet --no-guidance
"""


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Adds `export` with one sub-command per format."""
    parser = subparsers.add_parser(
        "export",
        help="write the model for other software",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    formats = parser.add_subparsers(dest="format", required=True, metavar="FORMAT")
    onnx = formats.add_parser(
        "onnx",
        help="ONNX files of UNet and decoder",
        description="The UNet as the fused runtime calls it per step (keys and values of the context and FiLM rows\n"
        "are inputs), and the decoder, each as one file of static shapes; every file is compared with PyTorch.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_shape_options(onnx)
    onnx.add_argument(
        "--dtype", choices=DTYPES, default="float32", help="of weights and activations (default: float32)"
    )
    onnx.set_defaults(run=run_onnx)


def add_shape_options(parser: argparse.ArgumentParser) -> None:
    """What every format asks: the pipeline, where to, which part, and the static shapes."""
    parser.add_argument(
        "checkpoint", type=Path, nargs="?", metavar="CHECKPOINT", help="a pipeline folder (default: the packaged one)"
    )
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="the folder for the files")
    parser.add_argument("--part", choices=(*PARTS, "all"), default="all", help="what to export (default: all)")
    parser.add_argument("--batch", type=int, default=8, help="images at once (default: 8)")
    parser.add_argument("--size", type=int, metavar="PIXELS", help="side of the images (default: the model's)")
    parser.add_argument(
        "--tokens", type=int, metavar="N", help="length of the context (default: that of an image without a report)"
    )
    parser.add_argument("--no-guidance", action="store_true", help="without the null condition's half")


def read_shapes(args: argparse.Namespace, pipe: "GBCIPipeline") -> "Bucket":
    """The bucket that the options name, for a pipeline.

    Raises:
        GBCIError: a size that the model cannot have, or numbers below 1.
    """
    import torch

    from gbci_fast.data.attributes import Attributes
    from gbci_fast.export import Bucket
    from gbci_fast.runtimes.graph import TOKENS

    stride = pipe.vae_scale_factor * 2 ** (len(pipe.unet.config.block_out_channels) - 1)
    size = pipe.unet.config.sample_size * pipe.vae_scale_factor if args.size is None else args.size
    if size < 1 or size % stride != 0:
        raise GBCIError(f"--size is {size}; expected a multiple of {stride}")
    tokens = args.tokens
    if tokens is None:
        blank = torch.zeros(1, 1, size, size)
        tokens = pipe.encode_condition(blank, blank, [Attributes()], [None]).pad(TOKENS).tokens.shape[1]
    side = size // pipe.vae_scale_factor
    return Bucket(batch=args.batch, height=side, width=side, tokens=tokens, guided=not args.no_guidance)


def run_onnx(args: argparse.Namespace) -> None:
    """Writes, checks and names the files."""
    import importlib.util

    import torch
    from rich.console import Console

    from gbci_fast.checkpoint import checkpoint_folder, load_pipeline
    from gbci_fast.evaluate.onnx_parity import LARGEST_ERROR, check_decoder, check_unet
    from gbci_fast.export import export_decoder, export_unet

    console = Console(stderr=True, markup=False, highlight=False)
    with console.status("reading the checkpoint"), torch.no_grad():
        pipe = load_pipeline(checkpoint_folder(args.checkpoint))
        bucket = read_shapes(args, pipe)
    dtype, shape = getattr(torch, args.dtype), (bucket.batch, bucket.height, bucket.width)
    for part in PARTS if args.part == "all" else (args.part,):
        unet = part == "unet"
        name = f"unet-{bucket}" if unet else "decoder-b{}-{}x{}".format(*shape)
        path = args.output / f"{name}-{args.dtype}.onnx"
        with console.status(f"exporting {path.name}"):
            if unet:
                export_unet(pipe.unet, bucket, dtype, path)
            else:
                export_decoder(pipe.vae, *shape, dtype, path)
        checked = f"not compared: onnxruntime has no {args.dtype} on a CPU"
        if importlib.util.find_spec("onnxruntime") is None:
            checked = "not compared: onnxruntime is not installed: pip install onnxruntime"
        elif dtype in LARGEST_ERROR:
            with console.status(f"comparing {path.name} with PyTorch"):
                try:
                    error = (
                        check_unet(path, pipe.unet, bucket, dtype)
                        if unet
                        else check_decoder(path, pipe.vae, shape, dtype)
                    )
                except GBCIError:
                    path.unlink()  # what does not compute the same is no export
                    raise
            checked = f"largest error {error:.1e} of the largest output"
        print(f"{path}: {path.stat().st_size / 1e6:.1f} MB, {checked}", flush=True)
