"""Building TensorRT engines of the packaged checkpoint: time, size, layers. TensorRT-RTX builds on any machine.

The speed of engines is measured by the rows `tensorrt` of bench_sampler.py and bench_unet.py, which need a GPU.
"""

from pathlib import Path

import pytest
import torch

from gbci_fast.errors import GBCIError
from gbci_fast.fast.export import Bucket, export_decoder, export_unet
from gbci_fast.fast.tensorrt.build import Built, build
from gbci_fast.fast.tensorrt.flavor import FLAVORS
from gbci_fast.model.pipeline import GBCIPipeline

CELLS, TOKENS = 56, 224  # side of the latents; tokens of a context without a report, padded
CAPABILITIES = ("8.0", "8.6")
FLAVOR = FLAVORS["tensorrt-rtx"]
QUICK = ("float16", 1)


@pytest.fixture(scope="module")
def pipe() -> GBCIPipeline:
    """The packaged checkpoint."""
    return GBCIPipeline.from_pretrained()


@pytest.mark.parametrize("batch", [1, 8, 64])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("part", ["unet", "decoder"])
def bench_build(request, benchmark, pipe, tmp_path, part, dtype, batch):
    """One build, of an engine for `CAPABILITIES`; without the export."""
    if (dtype, batch) != QUICK and not request.config.getoption("full"):
        pytest.skip("is left to --full")
    try:
        FLAVOR.load()
    except GBCIError as error:
        pytest.skip(str(error))
    path: Path = tmp_path / "exported.onnx"
    if part == "unet":
        bucket = Bucket(batch=batch, height=CELLS, width=CELLS, tokens=TOKENS)
        export_unet(pipe.unet, bucket, getattr(torch, dtype), path)
    else:
        export_decoder(pipe.vae, batch, CELLS, CELLS, getattr(torch, dtype), path)
    built: list[Built] = []
    benchmark.pedantic(lambda: built.append(build(path, FLAVOR, capabilities=CAPABILITIES)), rounds=1)
    info = {"part": part, "dtype": dtype, "batch": batch, "flavor": f"{FLAVOR.name} {FLAVOR.version}"}
    made = built[0]
    sizes = {"engine_mb": len(made.engine) / 1e6, "onnx_mb": path.stat().st_size / 1e6, "layers": len(made.layers)}
    benchmark.extra_info.update(info, capabilities=CAPABILITIES, builder_seconds=made.seconds, **sizes)
