"""How a row is measured: with the device synchronized, and stored with its bytes, its rate and its machine."""

import pytest
import torch


def pytest_addoption(parser):
    """Sizes that a quick run leaves small."""
    parser.addoption("--prepare-images", type=int, default=64, help="images of bench_prepare.py (default 64)")


@pytest.fixture(params=["cpu", "cuda"])
def device(request) -> torch.device:
    """Every benchmark runs on the CPU, and on a CUDA device where there is one."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    return torch.device(request.param)


@pytest.fixture
def measure(device, benchmark):
    """``measure(function, num_bytes=...)`` times one call, and adds the bytes it must move and the rate to the row."""

    def run(function, *, num_bytes: int) -> None:
        def synchronized():
            function()
            if device.type == "cuda":
                torch.cuda.synchronize()

        synchronized()  # builds, loads and autotunes, once and untimed
        benchmark(synchronized)
        benchmark.extra_info.update(device=device.type, num_bytes=num_bytes)
        if benchmark.enabled:
            benchmark.extra_info["gb_per_s"] = num_bytes / benchmark.stats.stats.median / 1e9

    return run


def pytest_benchmark_update_machine_info(config, machine_info):
    """A stored row says which torch, how many threads and which GPU, and not on whose machine."""
    machine_info.pop("node", None)
    machine_info["cpu"] = machine_info.get("cpu", {}).get("brand_raw")
    machine_info["torch"] = torch.__version__
    machine_info["threads"] = torch.get_num_threads()
    machine_info["gpu"] = torch.cuda.get_device_name() if torch.cuda.is_available() else None


def pytest_benchmark_update_json(config, benchmarks, output_json):
    """Stored rows keep the statistics and not every timing."""
    for row in output_json["benchmarks"]:
        row["stats"].pop("data", None)
