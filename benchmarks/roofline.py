"""Where the time goes in tier "tolerance" of `accelerate`, kernel by kernel, compared with the machine's limits.

    python benchmarks/roofline.py --output out/roofline.json
    python benchmarks/roofline.py --output out/roofline.json --batches 8 256 --steps 20 4

Three things are measured:
  1. two ceilings: the bandwidth of a copy, and the rate of a large matrix product in the tier's dtype;
  2. per batch, one guided UNet forward and its share of that rate (FLOPs are the stock forward's, as in bench_unet.py);
  3. per batch and number of steps, a whole call of the sampler (up to 4 steps in tier "approximate", with the student).

2 and 3 list the ten kernels (on a CPU, operators) that take most of the device's time, by PyTorch's profiler.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from bench_sampler import STUDIES, Bench
from bench_unet import STEP, denoiser, flops_per_image, inputs
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from gbci_fast.evaluate.paired.evaluation import PairedSettings, load_cases
from gbci_fast.fast.accelerate import accelerate
from gbci_fast.fast.runtimes.fused import FusedDenoiser
from gbci_fast.jobs.files import atomically
from gbci_fast.model.devices import pick_device
from gbci_fast.model.pipeline import GBCIPipeline
from gbci_fast.phantom import generate_phantom

COPY_BYTES = {"cpu": 2**28, "cuda": 2**32}  # bytes read and bytes written: far more than any cache
MATMUL = {"cpu": 2048, "cuda": 8192}
ROUNDS = 5
TOP = 10
STUDENT_STEPS = 4


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="report, JSON")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--batches", type=int, nargs="+", metavar="B", help="(default: 8 32 128 256; on a CPU 8)")
    parser.add_argument("--steps", type=int, nargs="+", default=[20, 4], metavar="N", help="(default: 20 4)")
    args = parser.parse_args()
    device = pick_device(args.device)
    batches = args.batches or ([8, 32, 128, 256] if device.type == "cuda" else [8])
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    report = measure(device, batches, args.steps)
    text = json.dumps(report, indent=1, allow_nan=False) + "\n"
    atomically(args.output, lambda file: file.write_text(text, encoding="utf-8"))
    print(tables(report))
    return 0


@torch.no_grad()
def measure(device: torch.device, batches: list[int], steps: list[int]) -> dict[str, Any]:
    """The whole report."""
    eager = GBCIPipeline.from_pretrained()
    eager.set_progress_bar_config(disable=True)
    dtype = accelerate(eager, tier="tolerance", device=device).decision.dtype
    found = ceilings(device, dtype)
    unet = [unet_forward(eager, batch, dtype, device) for batch in batches]
    for row in unet:
        row["share_of_matmul"] = row["flop_per_s"] / found["matmul_flop_per_s"]
    eager.to(device)
    with tempfile.TemporaryDirectory() as folder:
        generate_phantom(Path(folder) / "phantom", studies=STUDIES, seed=0, size=256)
        settings = PairedSettings(split="training")
        bench = Bench(cases=load_cases([Path(folder) / "phantom"], settings, 224, lambda *_: None)[0], eager=eager)
    sampler = [sampler_call(bench, batch, count, device) for count in steps for batch in batches]
    return {"machine": machine(device), "ceilings": found, "unet": unet, "sampler": sampler}


def machine(device: torch.device) -> dict[str, Any]:
    """The machine and the versions that were measured."""
    versions = {"torch": torch.__version__, "threads": torch.get_num_threads()}
    if device.type == "cpu":
        return {"device": "cpu", "vectors": torch.backends.cpu.get_cpu_capability(), **versions}
    import triton

    properties = torch.cuda.get_device_properties(device)
    return {
        "device": properties.name,
        "multiprocessors": properties.multi_processor_count,
        "driver_api": torch._C._cuda_getDriverVersion(),
        "cuda": torch.version.cuda,
        "triton": triton.__version__,
        **versions,
    }


def ceilings(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Bytes per second of a copy (read and written) and FLOPs per second of a matrix product, on random data."""
    source = torch.randn(COPY_BYTES[device.type] // 4, device=device)
    target = torch.empty_like(source)
    copy = seconds(lambda: target.copy_(source), device)
    side = MATMUL[device.type]
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    return {
        "copy_bytes_per_s": 2 * source.nbytes / copy,
        "matmul_flop_per_s": 2 * side**3 / seconds(lambda: a @ b, device),
        "dtype": name_of(dtype),
    }


def unet_forward(stock: GBCIPipeline, batch: int, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """One guided forward of the fused runtime; `stock` is in float32 on the CPU."""
    latents, given = inputs(stock, batch, device)
    made: FusedDenoiser = denoiser("ours", stock, dtype, device)
    state, latents = made.prepare(*given), latents.to(made.dtype)

    def forward() -> None:
        made(latents, STEP, state, True)

    took = seconds(forward, device)
    row = {"batch": batch, "seconds": took, "flop_per_s": batch * flops_per_image(stock) / took}
    return row | kernels(forward, device)


def sampler_call(bench: Bench, batch: int, steps: int, device: torch.device) -> dict[str, Any]:
    """One whole call of `accelerate`'s pipeline."""
    tier = "approximate" if steps <= STUDENT_STEPS else "tolerance"
    if tier not in bench.pipes:
        bench.pipes[tier] = accelerate(bench.eager, tier=tier)
    pipe, call = bench.pipes[tier], bench.call(batch, steps)

    def sample() -> None:
        pipe(**call, output_type="pt")

    took = seconds(sample, device)
    row = {"batch": batch, "steps": steps, "tier": tier, "seconds": took, "images_per_s": batch / took}
    return row | kernels(sample, device)


def seconds(function: Callable[[], object], device: torch.device) -> float:
    """Median seconds of `ROUNDS` calls by the host's clock, with the device synchronized, after a warm-up call."""
    times = []
    for _ in range(1 + ROUNDS):
        start = time.perf_counter()
        function()
        synchronize(device)
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def kernels(function: Callable[[], object], device: torch.device) -> dict[str, Any]:
    """Profiles one call: the share of its time in which the device was busy, and the `TOP` kernels in that time."""
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    with profile(activities=activities) as profiler:
        start = time.perf_counter()
        function()
        synchronize(device)
        wall = time.perf_counter() - start
    counts: dict[str, list[float]] = {}
    for event in profiler.events():
        if device.type == "cuda" and event.device_type == DeviceType.CUDA:
            counts.setdefault(event.name, []).append(event.time_range.elapsed_us())
        elif device.type == "cpu":
            counts.setdefault(event.name, []).append(event.self_cpu_time_total)
    busy = sum(map(sum, counts.values()))
    most = sorted(counts, key=lambda name: sum(counts[name]), reverse=True)[:TOP]
    return {
        "busy_of_profiled_call": busy / 1e6 / wall,
        "kernels": [
            {
                "name": name[:120],
                "calls": len(counts[name]),
                "seconds": sum(counts[name]) / 1e6,
                "share": sum(counts[name]) / busy,
            }
            for name in most
        ],
    }


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def tables(report: dict[str, Any]) -> str:
    """The report as Markdown tables."""
    most = report["ceilings"]
    lines = [
        f"{report['machine']['device']}, torch {report['machine']['torch']}: a copy moves "
        f"{most['copy_bytes_per_s'] / 1e9:.4g} GB/s, a {most['dtype']} matrix product makes "
        f"{most['matmul_flop_per_s'] / 1e12:.4g} TFLOP/s",
        "",
        "| guided UNet forward, batch | ms | TFLOP/s | share of matmul | device busy |",
        "|---|---|---|---|---|",
    ]
    for row in report["unet"]:
        lines.append(
            f"| {row['batch']} | {1e3 * row['seconds']:.4g} | {row['flop_per_s'] / 1e12:.4g} "
            f"| {row['share_of_matmul']:.0%} | {row['busy_of_profiled_call']:.0%} |"
        )
    lines += ["", "| sampler, tier | steps | batch | images/s | device busy |", "|---|---|---|---|---|"]
    for row in report["sampler"]:
        lines.append(
            f"| {row['tier']} | {row['steps']} | {row['batch']} | {row['images_per_s']:.4g} "
            f"| {row['busy_of_profiled_call']:.0%} |"
        )
    for kind in ("unet", "sampler"):
        row = report[kind][-1]
        steps = f", {row['steps']} steps" if "steps" in row else ""
        lines += ["", f"| {kind}, batch {row['batch']}{steps} | calls | ms | share |", "|---|---|---|---|"]
        lines += [
            f"| `{one['name']}` | {one['calls']} | {1e3 * one['seconds']:.4g} | {one['share']:.0%} |"
            for one in row["kernels"]
        ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
