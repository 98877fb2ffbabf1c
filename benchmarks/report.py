"""Makes tables and a plot of the stored rows.

    python benchmarks/report.py    # benchmarks/results/*.json -> sampler.md, sampler.svg and operators.md there

sampler.md holds the rows of the sampler, the UNet and `generate`; operators.md those of the operators. If several files
hold a row, the newest counts.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
BENCHMARKS = ("bench_sampler", "bench_unet", "bench_generate")
EAGER = "times_faster_than_eager"
COPIES = ("times_faster_than_copy", "times_faster_than_memcpy")  # equal to the share of a copy's bandwidth
MISSED = " (gate missed)"
Row = dict[str, Any]


def read_rows(folder: Path) -> list[Row]:
    """The rows of `BENCHMARKS` in all JSON files of `folder`, as flat dictionaries.

    They are sorted by device, machine, steps and batch.
    """
    names = ("benchmark", "machine", "batch", "steps", "dtype", "row", "formats", "workers")
    rows = [row for row in _entries(folder) if row["benchmark"] in BENCHMARKS and "row" in row]
    newest = {tuple(row.get(name) for name in names): row for row in rows}
    return sorted(newest.values(), key=lambda row: (row["device"], row["machine"], row.get("steps", 0), row["batch"]))


def read_operators(folder: Path) -> list[Row]:
    """The rows of all other benchmarks that have a ratio to eager PyTorch."""
    rows = [row for row in _entries(folder) if row["benchmark"] not in BENCHMARKS and EAGER in row]
    newest = {(row["name"], row["machine"]): row for row in rows}
    return sorted(newest.values(), key=lambda row: (row["device"], row["machine"], row["benchmark"]))


def _entries(folder: Path) -> list[Row]:
    """Every stored row, the oldest first."""
    files = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))]
    rows = []
    for file in sorted((one for one in files if "benchmarks" in one), key=lambda one: one["datetime"]):
        machine = file["machine_info"]
        for entry in file["benchmarks"]:
            info = entry["extra_info"]
            row = {"name": entry["name"], "benchmark": entry["name"].partition("[")[0], "torch": machine["torch"]}
            row |= info | {name: entry["stats"][name] for name in ("median", "min", "max")}
            rows.append(row | {"machine": _machine(info.get("device", "cpu"), machine)})
    return rows


def _machine(device: str, machine: Row) -> str:
    if device == "cuda":
        return machine["gpu"]
    vectors = f" with {machine['vectors']}" if "vectors" in machine else ""
    return f"{machine['cpu']}{vectors}, {machine['threads']} threads"


def sampler_table(rows: list[Row]) -> list[str]:
    """Markdown lines of the sampler, end to end."""
    lines = [
        "| device | steps | batch | row | dtype | images/s | s, median (min to max) | times eager, in turn "
        "| worst RoI PSNR / SSIM to eager float32 (few_step: to the eager student) |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        missed = "" if row.get("gates_hold", True) else MISSED
        faster = f"{row['times_faster_than_eager']:.2f}" if "times_faster_than_eager" in row else ""
        lines.append(
            f"| {row['machine']} | {row['steps']} | {row['batch']} | {row['row']} | {row['dtype']} "
            f"| {row['images_per_s']:.3g} | {row['median']:.3g} ({row['min']:.3g} to {row['max']:.3g}) | {faster} "
            f"| {row['worst_roi_psnr']:.1f} dB / {row['worst_roi_ssim']:.4f}{missed} |"
        )
    return lines


def unet_table(rows: list[Row]) -> list[str]:
    """Markdown lines of one guided UNet forward; the share is that of the matrix product on the same machine."""
    lines = [
        "| device | batch | row | dtype | ms, median (min to max) | GFLOP/s | share of matmul |",
        "|---|---|---|---|---|---|---|",
    ]
    products = {(row["machine"], row["dtype"]): row["gflop_per_s"] for row in rows if row["row"] == "matmul"}
    for row in rows:
        product = products.get((row["machine"], row["dtype"]))
        share = f"{row['gflop_per_s'] / product:.0%}" if product is not None else ""
        median, least, most = (f"{1e3 * row[name]:.4g}" for name in ("median", "min", "max"))
        lines.append(
            f"| {row['machine']} | {row['batch']} | {row['row']} | {row['dtype']} "
            f"| {median} ({least} to {most}) | {row['gflop_per_s']:.0f} | {share} |"
        )
    return lines


def generate_table(rows: list[Row]) -> list[str]:
    """Markdown lines of `gbci-fast generate` with reading and writing; the row `host` leaves out the sampler."""
    lines = [
        "| device | sampler | steps | formats | batch | beside it | images/s | steady |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        beside = f"{row['workers']} processes" if row["workers"] else "threads"
        steady = f"{row['steady_images_per_s']:.3g}" if "steady_images_per_s" in row else ""
        lines.append(
            f"| {row['machine']} | {row['row']} | {row['steps']} | {row['formats']} | {row['batch']} | {beside} "
            f"| {row['images_per_s']:.3g} | {steady} |"
        )
    return lines


def operators_report(rows: list[Row]) -> str:
    """The Markdown file of the operators."""
    lines = [
        "# Operators",
        "",
        "Against eager PyTorch, and as a share of the bandwidth of a copy of as many bytes. On a GPU times are of "
        "recorded loops; small images stay in its cache, in both.",
        "",
        "| device | case | us, median | GB/s | times eager | share of a copy |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        case = row["name"].removeprefix("bench_").replace("[cpu-", "[").replace("[cuda-", "[").replace("ours-", "")
        share = next((f"{row[name]:.0%}" for name in COPIES if name in row), "")
        rate = f"{row['gb_per_s']:.4g}" if "gb_per_s" in row else ""
        took = 1e6 * row.get("device_seconds", row["median"])
        lines.append(f"| {row['machine']} | {case} | {took:.4g} | {rate} | {row[EAGER]:.2f} | {share} |")
    return "\n".join([*(lines if rows else [*lines[:2], "No row was measured."]), ""])


def report(rows: list[Row]) -> str:
    """The Markdown file of the sampler, the UNet and `generate`."""
    sampler, unet, generate = ([row for row in rows if row["benchmark"] == name] for name in BENCHMARKS)
    none = ["No row was measured."]
    lines = ["# The sampler, end to end", "", *(sampler_table(sampler) if sampler else none), ""]
    if sampler:
        lines += [
            "A tier's row is stored only if it is within the tier's gates; where `approximate` misses them, only if "
            "held-out lesions come out no worse than by the eager pipeline ([parity_real.json](parity_real.json)). "
            "Each is of the weights packaged when it ran (its file has the commit). ![images/s by batch](sampler.svg)",
            "",
        ]
    lines += ["# One guided UNet forward", "", *(unet_table(unet) if unet else none), ""]
    lines += [
        "# `gbci-fast generate`, with reading and writing",
        "",
        *(generate_table(generate) if generate else none),
        "",
    ]
    if not any(row["device"] == "cuda" for row in rows):
        lines += ["Nothing here was measured on a GPU; `benchmarks/gpu_run.sh` measures those rows.", ""]
    return "\n".join(lines)


def plot(rows: list[Row], path: Path) -> None:
    """Plots images per second against the batch: a curve per row, a panel per device and number of steps."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams |= {"svg.hashsalt": "gbci_fast", "svg.fonttype": "none"}  # the same rows give the same file
    from matplotlib import pyplot as plt

    panels = list(dict.fromkeys((row["machine"], row["steps"]) for row in rows))
    figure, axes = plt.subplots(1, len(panels), figsize=(4.5 * len(panels), 3.6), squeeze=False, layout="constrained")
    for axis, (machine, steps) in zip(axes[0], panels, strict=True):
        here = [row for row in rows if (row["machine"], row["steps"]) == (machine, steps)]
        for name in dict.fromkeys(row["row"] for row in here):
            points = sorted((row["batch"], row["images_per_s"]) for row in here if row["row"] == name)
            axis.plot(*zip(*points, strict=True), marker="o", label=name)
        batches = sorted({row["batch"] for row in here})
        axis.set(xscale="log", xlabel="batch", ylabel="images/s", title=f"{machine}, {steps} steps")
        axis.set_xticks(batches, batches)
        axis.minorticks_off()
        axis.set_ylim(bottom=0)
        axis.legend()
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="DIR", help="(default: benchmarks/results)")
    folder = parser.parse_args().results
    rows = read_rows(folder)
    (folder / "sampler.md").write_text(report(rows), encoding="utf-8")
    (folder / "operators.md").write_text(operators_report(read_operators(folder)), encoding="utf-8")
    sampler = [row for row in rows if row["benchmark"] == "bench_sampler"]
    if sampler:
        plot(sampler, folder / "sampler.svg")
    print(report(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
