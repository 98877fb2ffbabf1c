"""`gbci-fast generate` end to end: templates read, sampled, pasted, encoded and written, in images per second.

Templates are phantoms of 256 x 256 pixels. `few_step` and `tolerance` sample with the packaged checkpoint: the student
in 4 steps, the whole UNet in 20. `host` replaces the sampler by brightening the lesion, and so measures the rate of the
workers alone. `images_per_s` is that of the whole job, including the start of worker processes and the tables.
`steady_images_per_s` is measured from the first finished batch to the last but one, when as many batches are sampled as
are finished.

`--full` makes more batches, and runs `tolerance` on a CPU, too; `-k webdataset` or `-k host` selects rows.
"""

import itertools
import os
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from gbci_fast.data.vindr import ImageRecord, find_inputs
from gbci_fast.fast.accelerate import accelerate
from gbci_fast.generate.job import run_job
from gbci_fast.generate.plan import make_plan
from gbci_fast.generate.settings import JobSettings, SamplerSettings
from gbci_fast.model.pipeline import GBCIPipeline
from gbci_fast.phantom import generate_phantom

STUDIES = 4  # of four views each
STEPS = {"few_step": 4, "tolerance": 20, "host": 4}
TIERS = {"few_step": "approximate", "tolerance": "tolerance"}
FORMATS = {"files": ("dicom", "png"), "webdataset": ("webdataset",)}
BATCHES = {"cpu": (8,), "cuda": (64, 256)}
HOST_BATCHES = (8, 256)
NUM_BATCHES = {"quick": 4, "full": 8}
NUM_HOST_IMAGES = 512  # or `NUM_BATCHES` batches, if they hold more images
WORKERS = (0, len(os.sched_getaffinity(0)))


class Brighter:
    """Stands in for a pipeline: returns the templates, a little brighter under the mask."""

    scheduler = None
    conditioner = SimpleNamespace(ignores=(), without_ignored=lambda attributes: attributes)

    def __call__(self, image: torch.Tensor, mask: torch.Tensor, **options: object) -> SimpleNamespace:
        return SimpleNamespace(images=(image + 0.1 * mask).clamp(0, 1))


@pytest.fixture(scope="module")
def records(tmp_path_factory) -> list[ImageRecord]:
    root = tmp_path_factory.mktemp("generate") / "phantom"
    generate_phantom(root, studies=STUDIES, seed=0, size=256)
    return find_inputs(root)


@pytest.fixture(scope="module")
def pipes() -> dict[tuple[str, str], GBCIPipeline]:
    return {}


def pipe_of(row: str, device: torch.device, pipes: dict[tuple[str, str], GBCIPipeline]):
    if row == "host":
        return Brighter()
    key = row, device.type
    if key not in pipes:
        pipes[key] = accelerate(GBCIPipeline.from_pretrained(), tier=TIERS[row], device=device)
    return pipes[key]


@pytest.mark.parametrize("batch", sorted({batch for batches in BATCHES.values() for batch in batches}))
@pytest.mark.parametrize("workers", WORKERS, ids=["threads", "processes"])
@pytest.mark.parametrize("formats", FORMATS)
@pytest.mark.parametrize("row", STEPS)
def bench_generate(request, benchmark, device, records, pipes, tmp_path, batch, workers, formats, row):
    full = request.config.getoption("full")
    if batch not in (HOST_BATCHES if row == "host" else BATCHES[device.type]):
        pytest.skip("is for another device or sampler")
    if row == "tolerance" and device.type == "cpu" and not full:
        pytest.skip("is left to --full")
    pipe = pipe_of(row, device, pipes)
    count = max(batch * NUM_BATCHES["full" if full else "quick"], NUM_HOST_IMAGES if row == "host" else 0)
    plan = make_plan(records, variants=-(-count // len(records)), seed=0)[:count]
    settings = JobSettings(
        seed=0,
        formats=FORMATS[formats],
        batch_size=batch,
        sampler=SamplerSettings(num_inference_steps=STEPS[row]),
        tier=TIERS.get(row, "exact"),
        device=device.type,
    )
    folders, finished = (tmp_path / str(number) for number in itertools.count()), []

    def note(done: int) -> None:
        finished.append((done, time.perf_counter()))

    def generate(output: Path) -> None:
        finished.clear()
        run_job(pipe, plan, output, settings, workers=workers, on_batch=note)

    if row != "host":  # a warm-up: builds, autotunes and records graphs
        warm = make_plan(records, variants=-(-batch // len(records)), seed=1)[:batch]
        run_job(pipe, warm, tmp_path / "warm", settings)
    benchmark.extra_info.update(device=device.type, row=row, batch=batch, steps=STEPS[row], formats=formats)
    benchmark.extra_info.update(workers=workers, images=count, native_size=256)
    benchmark.pedantic(generate, setup=lambda: ((next(folders),), {}), rounds=3 if full else 1)
    if benchmark.enabled:
        benchmark.extra_info["images_per_s"] = count / benchmark.stats.stats.median
        (first, start), (last, end) = finished[1], finished[-2]  # the first call comes before any batch
        benchmark.extra_info["steady_images_per_s"] = (last - first) / (end - start)
