"""The scripts of a GPU run, as far as they run without a GPU: they work, and fail where they should."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
FORWARD = 20e9  # operations of a guided forward of one image, roughly
PARTS = (
    "tests",
    "ops",
    "sampler",
    "unet",
    "roofline",
    "tune",
    "generate",
    "memcheck",
    "racecheck",
    "compile",
    "tensorrt",
)


def script(name: str, *arguments: object, **environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, ROOT / name, *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True)


def load(name: str):
    spec = importlib.util.spec_from_file_location(Path(name).stem, ROOT / name)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_roofline_adds_up(tmp_path):
    done = script(
        "benchmarks/roofline.py", "--output", tmp_path / "r.json", "--device", "cpu", "--batches", 1, "--steps", 1
    )
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "r.json").read_text())
    (unet,), (sampler,) = report["unet"], report["sampler"]
    assert unet["share_of_matmul"] == pytest.approx(unet["flop_per_s"] / report["ceilings"]["matmul_flop_per_s"])
    assert unet["flop_per_s"] * unet["seconds"] == pytest.approx(FORWARD, rel=0.5)
    assert sampler["images_per_s"] == pytest.approx(1 / sampler["seconds"])
    assert sampler["tier"] == "approximate"
    for row in (unet, sampler):
        assert 0.5 < row["busy_of_profiled_call"] < 1.5
        shares = [kernel["share"] for kernel in row["kernels"]]
        assert shares == sorted(shares, reverse=True)
        assert 0.5 < sum(shares) <= 1 + 1e-9
        assert any("convolution" in kernel["name"] for kernel in row["kernels"])
    assert "| guided UNet forward, batch | ms |" in done.stdout


def test_tuning_times_every_candidate_that_is_right(tmp_path):
    pytest.importorskip("triton")
    given = "--output", tmp_path / "t.json", "--only", "layer_norm_film", "--batch", 1
    done = script("benchmarks/tune.py", *given, TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "t.json").read_text())
    assert [case["case"] for case in report["cases"]] == [
        "layer_norm_film, 784 rows of 128", "layer_norm_film, 196 rows of 192",
    ]  # fmt: skip
    for case in report["cases"]:
        assert case["failures"] == {}
        assert set(case["microseconds"]) == {"512", "1024", "2048", "4096", "8192"}
        assert case["present"] == "2048"
        assert list(case["microseconds"].values()) == sorted(case["microseconds"].values())


@pytest.fixture
def tune(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return load("benchmarks/tune.py")


@pytest.mark.parametrize("name", ["attention", "cross_attention", "geglu", "layer_norm_film", "group_norm_film_silu"])
@torch.no_grad()
def test_every_case_can_be_called(tune, name, monkeypatch):
    monkeypatch.setattr(tune, "architecture", lambda: 90)
    for case in tune.CASES[name](1, torch.device("cpu")):
        reference = case.reference().float()
        if name != "attention":  # its Triton kernel, which is tuned, does not run on a CPU
            assert (case.run().float() - reference).abs().max() <= tune.ERROR * reference.abs().max(), case.name
        assert len(case.candidates) > 3
        present = tune.entry(case.table)
        with tune.changed(case.table, case.candidates[0]):
            assert tune.entry(case.table) == case.candidates[0]
        assert tune.entry(case.table) == present


def test_a_wrong_candidate_is_no_candidate(tune):
    table = {"key": 1.0}
    case = tune.Case(
        name="case",
        run=lambda: torch.full((3,), table["key"] if table["key"] < 4 else 1 / 0),
        reference=lambda: torch.ones(3),
        table=(table, "key"),
        candidates=[1.0, 1.001, 2.0, float("nan"), 5.0],
    )
    found = tune.tune(case, torch.device("cpu"))
    assert set(found["microseconds"]) == {"1.0", "1.001"}
    assert found["failures"]["2.0"] == "is 1 off"
    assert found["failures"]["5.0"].startswith("ZeroDivisionError")
    assert set(found["failures"]) == {"2.0", "nan", "5.0"}
    assert table == {"key": 1.0}
    assert tune.sentence(found).startswith("case: 1.0 ")


@pytest.mark.skipif(shutil.which("compute-sanitizer") is not None, reason="it is installed here")
def test_the_sanitizer_says_what_is_missing_and_what_it_takes(tmp_path):
    absent = script("tests/sanitize_cuda.py", "memcheck", CUDA_HOME=str(tmp_path))
    assert absent.returncode == 1
    assert absent.stderr.startswith("compute-sanitizer is neither in")
    unknown = script("tests/sanitize_cuda.py", "leakcheck")
    assert unknown.returncode == 2
    assert "expected memcheck or racecheck" in unknown.stderr


def test_the_sanitizer_takes_cases_from_all_over():
    spread = load("tests/sanitize_cuda.py").spread
    assert spread(list(range(5))) == list(range(5))
    assert spread(list(range(80))) == list(range(0, 80, 10))


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
def test_the_deliberate_faults_compile(tmp_path):
    assert load("tests/sanitize_cuda.py").build_faults(tmp_path).exists()


def test_the_gpu_run_knows_its_parts(tmp_path):
    run = ROOT / "benchmarks" / "gpu_run.sh"
    done = subprocess.run(["bash", run, "everything"], capture_output=True, text=True)
    assert done.returncode == 2
    assert "the part is 'everything'" in done.stderr
    text = run.read_text()
    for part in PARTS:
        assert f"\n#   {part} " in text


def test_generate_s_benchmark_runs():
    row = f"{ROOT / 'benchmarks' / 'bench_generate.py'}::bench_generate[cpu-host-webdataset-threads-8]"
    command = [sys.executable, "-m", "pytest", row, "--benchmark-disable", "-q", "-p", "no:cacheprovider"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 passed" in done.stdout
