"""`gbci-fast export`: writes the UNet and the decoder of a pipeline for other software."""

import argparse
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from gbci_fast.errors import GBCIError

if TYPE_CHECKING:
    from rich.console import Console

    from gbci_fast.fast.export import Bucket
    from gbci_fast.fast.tensorrt.build import Progress
    from gbci_fast.model.pipeline import GBCIPipeline

DTYPES = ("float32", "float16", "bfloat16")
PARTS = ("unet", "decoder")
EXAMPLE = """\
example:
  gbci-fast export onnx --output out/onnx --batch 8 --dtype float16
  gbci-fast export onnx runs/ldm/pipeline --output out/onnx --part unet --no-guidance
  gbci-fast export tensorrt --output out/engines --batch 8 --compute-capability 8.0,8.6
"""


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Adds `export` with one sub-command per format."""
    parser = subparsers.add_parser(
        "export",
        help="write the model for other software",
        epilog=EXAMPLE,
    )
    formats = parser.add_subparsers(dest="format", required=True, metavar="FORMAT")
    onnx = formats.add_parser(
        "onnx",
        help="ONNX files of UNet and decoder",
        description="Writes the UNet as the fused runtime calls it per step (keys and values of the context and FiLM\n"
        "rows are inputs), and the decoder, each as one file of static shapes. Compares every file with PyTorch.",
        epilog=EXAMPLE,
    )
    add_shape_options(onnx)
    onnx.add_argument(
        "--dtype", choices=DTYPES, default="float32", help="of weights and activations (default: float32)"
    )
    onnx.set_defaults(run=run_onnx)
    tensorrt = formats.add_parser(
        "tensorrt",
        help="TensorRT engines of UNet and decoder",
        description="Builds engines of the files of `export onnx`: TensorRT for this machine's GPU, TensorRT-RTX for\n"
        "any GPU. Engines are also kept in the user's cache. There the tensorrt runtime finds the sizes\n"
        "that it uses: batches of 1, 2, 4 and so on, up to 256 (decoder: up to 16).",
        epilog=EXAMPLE,
    )
    add_shape_options(tensorrt)
    tensorrt.add_argument(
        "--dtype", choices=DTYPES, default="bfloat16", help="of weights and activations (default: bfloat16)"
    )
    tensorrt.add_argument(
        "--flavor", choices=("auto", "tensorrt", "tensorrt-rtx"), default="auto", help="which TensorRT (default: auto)"
    )
    tensorrt.add_argument(
        "--compute-capability",
        metavar="8.0,8.6",
        help="of the GPUs to build for (default: this machine's GPU or, without a GPU, the builder's choice)",
    )
    tensorrt.set_defaults(run=run_tensorrt)


def add_shape_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options of every format: the pipeline, the output folder, the part, and the static shapes."""
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
    """The static shapes that the options name, for a pipeline.

    Raises:
        GBCIError: a size that the model does not take, or a number below 1.
    """
    import torch

    from gbci_fast.attributes import Attributes
    from gbci_fast.fast.export import Bucket
    from gbci_fast.fast.graph import TOKEN_MULTIPLE

    size = pipe.unet.config.sample_size * pipe.vae_scale_factor if args.size is None else args.size
    if size < 1 or size % pipe.stride != 0:
        raise GBCIError(f"--size is {size}; expected a multiple of {pipe.stride}")
    tokens = args.tokens
    if tokens is None:
        blank = torch.zeros(1, 1, size, size)
        tokens = pipe.encode_condition(blank, blank, [Attributes()], [None]).pad(TOKEN_MULTIPLE).tokens.shape[1]
    side = size // pipe.vae_scale_factor
    return Bucket(batch=args.batch, height=side, width=side, tokens=tokens, guided=not args.no_guidance)


def run_onnx(args: argparse.Namespace) -> None:
    """Writes and checks the files, and prints their names."""
    import importlib.util

    import torch
    from rich.console import Console

    from gbci_fast.evaluate.parity.onnx import LARGEST_ERROR, check_decoder, check_unet
    from gbci_fast.fast.export import export_decoder, export_unet
    from gbci_fast.model.checkpoint import checkpoint_folder, load_pipeline

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
                except BaseException:
                    path.unlink()  # a file that differs from PyTorch must not stay
                    raise
            checked = f"largest error {error:.1e} of the largest output"
        print(f"{path}: {path.stat().st_size / 1e6:.1f} MB, {checked}", flush=True)


def run_tensorrt(args: argparse.Namespace) -> None:
    """Gets the engines from the cache or builds them, writes them, and prints their names."""
    import torch
    from rich.console import Console
    from torch import nn

    from gbci_fast.fast.tensorrt.build import Built
    from gbci_fast.fast.tensorrt.cache import EngineCache
    from gbci_fast.fast.tensorrt.flavor import GENERIC, pick_flavor
    from gbci_fast.fast.tensorrt.store import decoder_recipe, digest, obtain, unet_recipe
    from gbci_fast.jobs.files import atomically
    from gbci_fast.model.checkpoint import checkpoint_folder, load_pipeline

    console = Console(stderr=True, markup=False, highlight=False)
    device = torch.device("cuda") if torch.cuda.is_available() else None
    flavor = pick_flavor(args.flavor, device)
    capability = GENERIC if device is None else flavor.target(device)
    if args.compute_capability is not None:
        named = [part.strip() for part in args.compute_capability.split(",")]
        if not all(re.fullmatch(r"\d+\.\d", part) for part in named):
            raise GBCIError(f"--compute-capability is {args.compute_capability!r}; expected such as 8.0,8.6")
        capability = "+".join(named)
    with console.status("reading the checkpoint"), torch.no_grad():
        pipe = load_pipeline(checkpoint_folder(args.checkpoint))
        bucket = read_shapes(args, pipe)
    dtype = getattr(torch, args.dtype)
    for part in PARTS if args.part == "all" else (args.part,):
        module = nn.Module.to(pipe.unet if part == "unet" else pipe.vae, dtype)
        if part == "unet":
            recipe = unet_recipe(module, bucket, digest(module))
        else:
            recipe = decoder_recipe(module, bucket.batch, bucket.height, bucket.width, digest(module))
        built: list[Built] = []
        with build_progress(console, str(recipe)) as on_progress:
            engine = obtain(
                recipe, flavor, EngineCache(), capability, device=device, on_progress=on_progress, on_built=built.append
            )
        path = args.output / f"{recipe}-{flavor.name}-{flavor.version}-sm{capability}.plan"
        args.output.mkdir(parents=True, exist_ok=True)
        atomically(path, lambda temporary, engine=engine: temporary.write_bytes(engine))
        how = f"built in {built[0].seconds:.1f} s from {len(built[0].layers)} layers" if built else "from the cache"
        print(f"{path}: {path.stat().st_size / 1e6:.1f} MB, {how}", flush=True)


@contextmanager
def build_progress(console: "Console", name: str) -> Iterator["Progress"]:
    """Yields a callback that shows a progress bar for each phase of a build that has more than one step."""
    from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bars

    columns = (TextColumn(f"{name}: {{task.description}}"), BarColumn(), TimeElapsedColumn())
    with Bars(*columns, console=console, transient=True, disable=not console.is_terminal) as bars:
        tasks = {}

        def on_progress(phase: str, done: int, steps: int) -> None:
            if steps > 1:
                tasks[phase] = tasks[phase] if phase in tasks else bars.add_task(phase)
                bars.update(tasks[phase], completed=done, total=steps)

        yield on_progress
