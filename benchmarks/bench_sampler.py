"""The sampler end to end: encode, sample, decode and composite, in images per second, with the parity in the same row.

Rows:
    `eager`: the unmodified pipeline in float32.
    `eager_narrow`: the same in the dtype that tier "tolerance" uses on the device.
    `compile`: `eager_narrow` with ``torch.compile`` of the UNet.
    every tier of `accelerate`.
    `tensorrt`: this runtime in tier "tolerance".
    `few_step`: the checkpoint's student in tier "approximate".

Rows of `accelerate` alternate with timed calls of the eager pipeline. They fail unless their images are within the
tier's gates (`gbci_fast.evaluate.parity.images`), compared with the eager pipeline's images; for `few_step`, with the
eager student's. Rows of `approximate` and `few_step` that miss their gates are kept, and say so, if `parity_real.py`
has found with the same weights that held-out lesions come out no worse. Its number of steps may differ, because its
verdict is about windows and weights.

`--quick` runs small batches and few steps; `--full` runs everything; ``-k cuda`` or ``-k 8-20`` selects rows.
"""

import json
import statistics
import time
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import ndimage
from torch import Tensor, nn

from gbci_fast.choices import GUIDANCE_SCALE, TIERS
from gbci_fast.evaluate.case import MASK_GROWTH, Case
from gbci_fast.evaluate.metrics import grow
from gbci_fast.evaluate.painting import sampler_arguments
from gbci_fast.evaluate.paired.evaluation import PairedSettings, load_cases
from gbci_fast.evaluate.parity.images import (
    Output,
    Parity,
    candidate_output,
    measure,
    narrowed,
    parity,
    reference_output,
    worst,
)
from gbci_fast.fast.accelerate import accelerate
from gbci_fast.fast.pipeline import FastPipeline
from gbci_fast.fast.tensorrt.denoiser import tensorrt_refusals
from gbci_fast.jobs.files import hash_weights
from gbci_fast.model.checkpoint import checkpoint_folder
from gbci_fast.model.pipeline import GBCIPipeline
from gbci_fast.phantom import generate_phantom

BATCHES, STEPS = (1, 8, 64, 256), (4, 20, 50)
QUICK = {"cpu": ((1, 4), (8, 4)), "cuda": ((8, 20), (256, 20))}
ROWS = ("eager", "eager_narrow", "compile", *TIERS, "tensorrt", "few_step")
GATED = {tier: tier for tier in TIERS} | {"tensorrt": "tolerance", "few_step": "approximate"}  # row: tier of its gates
VERDICT = Path(__file__).parent / "results" / "parity_real.json"
ROUNDS = {"quick": 2, "full": 3}
STUDIES = 6  # phantoms that provide templates and descriptions, used repeatedly
LESION = 17  # pixels, the median size of a real lesion's box at 224 x 224


def pytest_generate_tests(metafunc):
    full = metafunc.config.getoption("full")
    cases = [(batch, steps) for batch in BATCHES for steps in STEPS]
    quick = {case for cases in QUICK.values() for case in cases}
    metafunc.parametrize(("batch", "steps"), [case for case in cases if full or case in quick])
    metafunc.parametrize("row", ROWS)


@dataclass
class Bench:
    """The pipelines on one device, each made at first use, and the eager pipeline's outputs."""

    cases: list[Case]
    eager: GBCIPipeline
    narrow_dtype: torch.dtype = torch.float32
    pipes: dict[str, GBCIPipeline] = field(default_factory=dict)
    references: dict[tuple[bool, int, int], Output] = field(default_factory=dict)

    def pipe(self, row: str) -> GBCIPipeline:
        if row not in self.pipes:
            self.pipes[row] = self._make(row)
        return self.pipes[row]

    def _make(self, row: str) -> GBCIPipeline:
        if row == "eager":
            return self.eager
        if row == "tensorrt":
            return accelerate(self.eager, runtime="tensorrt", tier=GATED[row])
        if row == "few_step":
            return accelerate(self.eager, tier=GATED[row])
        if row in TIERS:
            return accelerate(self.eager, tier=row, few_step=False)
        made = narrowed(self.eager, self.narrow_dtype)
        if row == "compile":
            cuda = made.device.type == "cuda"
            if self.narrow_dtype != torch.float32:
                nn.Module.to(made.unet, memory_format=torch.channels_last)
            made.unet.compile(mode="max-autotune" if cuda else "default", dynamic=False)
        return made

    def call(self, batch: int, steps: int) -> dict[str, Any]:
        """Arguments of a pipeline's call: templates, descriptions, and median-sized masks at the phantoms' lesions."""
        cases = [self.cases[i % len(self.cases)] for i in range(batch)]
        return sampler_arguments(cases, steps=steps, guidance=GUIDANCE_SCALE) | {
            "mask_image": torch.stack([median_lesion(case) for case in cases])[:, None],
            "seed": list(range(batch)),
        }

    def reference(self, row: str, batch: int, steps: int) -> Output:
        """The output of the eager pipeline; for the row `few_step`, of the eager student."""
        key = row == "few_step", batch, steps
        if key not in self.references:
            call, pipe = self.call(batch, steps), self.eager
            if row == "few_step":
                call, pipe = call | {"guidance_scale": 1.0}, self.eager.few_step_pipeline()
                pipe.set_progress_bar_config(disable=True)
            self.references[key] = reference_output(pipe, **call)
        return self.references[key]


def median_lesion(case: Case) -> Tensor:
    """A mask, float32 [S, S]: a disk of `LESION` pixels at the center of the case's lesion, grown by `MASK_GROWTH`."""
    center = np.zeros_like(case.mask)
    center[tuple(int(index) for index in ndimage.center_of_mass(case.mask))] = True
    return torch.from_numpy(grow(center, LESION // 2 + MASK_GROWTH)).float()


@pytest.fixture(scope="module")
def cases(tmp_path_factory) -> list[Case]:
    """The phantom images with a finding, out of `STUDIES` studies."""
    root = tmp_path_factory.mktemp("sampler") / "phantom"
    generate_phantom(root, studies=STUDIES, seed=0, size=256)
    return load_cases([root], PairedSettings(split="training"), 224, lambda *_: None)[0]


@pytest.fixture(scope="module")
def benches() -> dict[str, Bench]:
    return {}


@pytest.fixture
def bench(device, cases, benches, full_float32) -> Bench:
    """The packaged checkpoint on the device."""
    if device.type not in benches:
        eager = GBCIPipeline.from_pretrained()
        eager.set_progress_bar_config(disable=True)
        eager.to(device)
        narrow_dtype = accelerate(eager, tier="tolerance").decision.dtype
        benches[device.type] = Bench(cases=cases, eager=eager, narrow_dtype=narrow_dtype)
    return benches[device.type]


def judge(bench: Bench, row: str, batch: int, steps: int) -> Parity:
    """Compares the row's pipeline with the eager one on the timed batch, which also warms the pipeline up."""
    fast, call, tier = bench.pipe(row), bench.call(batch, steps), GATED[row]
    assert isinstance(fast, FastPipeline)
    reference = bench.reference(row, batch, steps)
    narrow = None
    if tier == "tolerance":
        wide = fast.decision.dtype == torch.float32
        narrow = reference if wide else candidate_output(bench.pipe("eager_narrow"), **call)
    return parity(
        tier,
        candidate_output(fast, latents=tier == "exact", **call),
        reference,
        templates=call["image"],
        masks=call["mask_image"],
        narrow=narrow,
    )


def no_worse_on_held_out(row: str, weights: str, path: Path = VERDICT) -> bool:
    """Whether `parity_real.py` has found that a row holds, with the same weights.

    Args:
        row: "approximate" or "few_step".
        weights: digest of the weights.
        path: report of `parity_real.py`.
    """
    if not path.exists():
        return False
    found = json.loads(path.read_text(encoding="utf-8"))
    same = found["settings"]["weights_sha256"] == weights
    return same and row in found["tiers"] and found["tiers"][row]["holds"]


def bench_sampler(request, benchmark, skip_slow_builds, bench, device, batch, steps, row):
    if not request.config.getoption("full") and (batch, steps) not in QUICK[device.type]:
        pytest.skip("is left to --full")
    if row == "eager_narrow" and bench.narrow_dtype == torch.float32:
        pytest.skip(f"this {device.type} is no faster in bfloat16: it would be eager")
    if row == "tensorrt" and (refusals := tensorrt_refusals(device)):
        pytest.skip("; ".join(refusals))
    if row == "few_step" and bench.eager.few_step is None:
        pytest.skip("the packaged checkpoint has no few-step student")
    if row == "few_step" and steps > (most := bench.eager.few_step.config.steps):
        pytest.skip(f"is meant for up to {most} steps")
    pipe, call = bench.pipe(row), bench.call(batch, steps)
    benchmark.extra_info.update(device=device.type, batch=batch, steps=steps, row=row, guidance=GUIDANCE_SCALE)
    benchmark.extra_info.update(dtype=str(pipe.unet.dtype).removeprefix("torch."), threads=torch.get_num_threads())
    if row in GATED:
        found = judge(bench, row, batch, steps)
        approximate = GATED[row] == "approximate"
        excused = approximate and no_worse_on_held_out(row, hash_weights(checkpoint_folder(None)))
        assert found.holds or excused, found.sentence()
        benchmark.extra_info.update(parity=found.sentence(), gates_hold=found.holds, plan=pipe.describe())
        distance = found.worst
    else:
        reference = bench.reference(row, batch, steps)
        found = reference if row == "eager" else candidate_output(pipe, **call)
        distance = worst(measure(found.images, reference.images, call["mask_image"] > 0.5))
    benchmark.extra_info.update(worst_roi_psnr=distance.psnr, worst_roi_ssim=distance.ssim)

    def sample(pipe: GBCIPipeline) -> None:
        pipe(**call, output_type="pt")
        if device.type == "cuda":
            torch.cuda.synchronize()

    turns = []

    def eager_in_turn() -> None:
        start = time.perf_counter()
        sample(bench.eager)
        turns.append(time.perf_counter() - start)

    in_turn = row in GATED and benchmark.enabled
    rounds = ROUNDS["full" if request.config.getoption("full") else "quick"]
    benchmark.pedantic(partial(sample, pipe), rounds=rounds, setup=eager_in_turn if in_turn else None)
    if benchmark.enabled:
        median = benchmark.stats.stats.median
        benchmark.extra_info["images_per_s"] = batch / median
        if turns:
            eager = statistics.median(turns)
            benchmark.extra_info.update(eager_in_turn_s=turns, times_faster_than_eager=eager / median)
