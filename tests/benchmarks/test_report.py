"""Table and plot of stored rows: they hold the newest measurement of every row, and nothing else."""

import importlib.util
import json
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "report.py"
MACHINE = {"cpu": "Some CPU", "threads": 2, "torch": "2.13.0", "gpu": None}


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("benchmark_report", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def entry(row: str, median: float, batch: int = 8, **info) -> dict:
    about = {
        "device": "cpu", "row": row, "batch": batch, "steps": 4, "dtype": "float32", "images_per_s": batch / median,
        "worst_roi_psnr": 96.3, "worst_roi_ssim": 1.0,
    }  # fmt: skip
    stats = {"median": median, "min": 0.9 * median, "max": 1.1 * median}
    return {"name": f"bench_sampler[{batch}-4-{row}-cpu]", "extra_info": about | info, "stats": stats}


def product(row: str, rate: float) -> dict:
    about = {"device": "cpu", "row": row, "batch": 8, "dtype": "bf16", "gflop_per_s": rate}
    stats = dict.fromkeys(("median", "min", "max"), 0.5)
    return {"name": f"bench_unet[cpu-{row}-bf16-8]", "extra_info": about, "stats": stats}


def store(path: Path, when: str, *entries: dict, machine: dict = MACHINE) -> None:
    path.write_text(json.dumps({"machine_info": machine, "datetime": when, "benchmarks": entries}))


def test_the_newest_of_each_row_is_in_the_table(script, tmp_path):
    store(tmp_path / "b.json", "2026-01-02", entry("eager", 4.0), entry("tolerance", 2.0, times_faster_than_eager=2.0))
    store(tmp_path / "a.json", "2026-01-01", entry("eager", 8.0), entry("eager", 1.0, batch=1))
    (tmp_path / "parity.json").write_text('{"tiers": {}}')
    rows = script.read_rows(tmp_path)
    assert [(row["batch"], row["row"], row["median"]) for row in rows] == [
        (1, "eager", 1.0), (8, "eager", 4.0), (8, "tolerance", 2.0),
    ]  # fmt: skip
    text = script.report(rows)
    assert "| Some CPU, 2 threads | 4 | 8 | tolerance | float32 | 4 | 2 (1.8 to 2.2) | 2.00 | 96.3 dB / 1.0000 " in text
    assert "Nothing here was measured on a GPU" in text


def test_a_missed_gate_is_marked(script, tmp_path):
    store(tmp_path / "a.json", "2026-01-01", entry("approximate", 1.0, gates_hold=False), entry("exact", 2.0))
    found = [line for line in script.report(script.read_rows(tmp_path)).splitlines() if "| Some CPU" in line]
    assert {line.split("| ")[4].strip(): "(gate missed)" in line for line in found} == {
        "approximate": True, "exact": False,
    }  # fmt: skip


def test_a_gpu_s_rows_go_under_its_name(script, tmp_path):
    store(tmp_path / "a.json", "2026-01-01", entry("eager", 1.0, device="cuda"), machine=MACHINE | {"gpu": "Some GPU"})
    text = script.report(script.read_rows(tmp_path))
    assert "| Some GPU | 4 | 8 | eager |" in text
    assert "measured on a GPU" not in text


def test_the_unet_is_held_against_the_matrix_product(script, tmp_path):
    store(tmp_path / "a.json", "2026-01-01", product("matmul", 200.0), product("ours", 50.0))
    text = script.report(script.read_rows(tmp_path))
    assert "| Some CPU, 2 threads | 8 | ours | bf16 | 500 (500 to 500) | 50 | 25% |" in text


def test_nothing_stored_is_said(script, tmp_path):
    assert script.report(script.read_rows(tmp_path)).count("No row was measured.") == 3


def test_the_plot_is_the_same_for_the_same_rows(script, tmp_path):
    store(tmp_path / "a.json", "2026-01-01", *(entry("eager", 1.0 * batch, batch=batch) for batch in (1, 8)))
    rows = script.read_rows(tmp_path)
    for name in ("first.svg", "second.svg"):
        script.plot(rows, tmp_path / name)
    first = (tmp_path / "first.svg").read_text()
    assert first == (tmp_path / "second.svg").read_text()
    assert "Some CPU, 2 threads, 4 steps" in first  # text as text


def test_generate_has_a_row_per_format_and_kind_of_worker(script, tmp_path):
    def row(workers: int, rate: float) -> dict:
        about = {"row": "few_step", "steps": 4, "batch": 256, "formats": "webdataset", "workers": workers}
        found = {"device": "cuda", "images_per_s": rate, "steady_images_per_s": 2 * rate}
        stats = dict.fromkeys(("median", "min", "max"), 0.5)
        return {"name": f"bench_generate[cuda-{workers}]", "extra_info": about | found, "stats": stats}

    store(tmp_path / "a.json", "2026-01-01", row(0, 100.0), row(16, 900.0), machine=MACHINE | {"gpu": "Some GPU"})
    text = script.report(script.read_rows(tmp_path))
    assert "| Some GPU | few_step | 4 | webdataset | 256 | threads | 100 | 200 |" in text
    assert "| Some GPU | few_step | 4 | webdataset | 256 | 16 processes | 900 | 1.8e+03 |" in text


def test_operators_are_held_against_eager_and_a_copy(script, tmp_path):
    def row(name: str, when: float, **info) -> dict:
        about = {"device": "cpu", "gb_per_s": 30.0, **info}
        return {"name": name, "extra_info": about, "stats": dict.fromkeys(("median", "min", "max"), when)}

    ours = row(
        "bench_blend_step[cpu-ours-ddim-fp32-64]", 2e-4, times_faster_than_eager=9, times_faster_than_memcpy=0.87
    )
    fast = row("bench_geglu[cpu-ours]", 1.0, times_faster_than_eager=8.0, device="cuda", device_seconds=3e-6)
    store(tmp_path / "a.json", "2026-01-01", ours, row("bench_blend_step[cpu-eager-ddim-fp32-64]", 1.8e-3), fast)
    store(tmp_path / "b.json", "2025-01-01", row(ours["name"], 1.0, times_faster_than_eager=1.0))
    text = script.operators_report(script.read_operators(tmp_path))
    assert "| Some CPU, 2 threads | blend_step[ddim-fp32-64] | 200 | 30 | 9.00 | 87% |" in text
    assert "| geglu[ours] | 3 | 30 | 8.00 |  |" in text
    assert len(text.splitlines()) == 8
    assert "No row was measured." in script.operators_report([])
