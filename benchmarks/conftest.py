"""Measurement of a row: with the device synchronized, and stored with its bytes, rate and machine."""

import statistics
from collections import defaultdict

import pytest
import torch

MEDIANS = pytest.StashKey[dict]()
"""{benchmark with its other parameters: {row: median in seconds}}."""
QUICK_SECONDS = 0.3  # time that a quick run spends on a row, unless five rounds take longer
RATES = {"num_bytes": "gb_per_s", "num_flops": "gflop_per_s"}


def pytest_addoption(parser):
    """Adds options for the extent of a run."""
    parser.addoption("--prepare-images", type=int, default=64, help="images of bench_prepare.py (default 64)")
    extent = {"dest": "full", "default": False}
    parser.addoption("--quick", action="store_false", **extent, help="few batches, steps and rounds: minutes (default)")
    parser.addoption("--full", action="store_true", **extent, help="all: hours without a GPU; choose by -k")


def pytest_collection_modifyitems(config, items):
    if not config.getoption("full"):
        for item in items:
            item.add_marker(pytest.mark.benchmark(max_time=QUICK_SECONDS))


@pytest.fixture
def skip_slow_builds(request, device):
    """Skips `compile` rows on the CPU in quick runs: compiling a UNet takes longer than all rounds of its row."""
    builds = device.type == "cpu" and request.node.callspec.params["row"] == "compile"
    if builds and not request.config.getoption("full"):
        pytest.skip("builds for minutes: is left to --full")


@pytest.fixture(params=["cpu", "cuda"])
def device(request) -> torch.device:
    """The CPU, and a CUDA device where available: every benchmark runs on both."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    return torch.device(request.param)


@pytest.fixture
def full_float32():
    """Disables TF32."""
    backends = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [backend.allow_tf32 for backend in backends]
    for backend in backends:
        backend.allow_tf32 = False
    yield
    for backend, allowed in zip(backends, before, strict=True):
        backend.allow_tf32 = allowed


@pytest.fixture
def measure(device, benchmark, request):
    """``measure(function, num_bytes=...)`` or ``num_flops=...`` times a call, given the bytes or FLOPs that it needs.

    The row stores these numbers and the rates, GB/s and GFLOP/s. On a GPU, rates and ratios are computed from
    `device_seconds`, which is stored, too: the row's own times include Python's time to launch kernels, recorded loops
    do not. Data that fit into the GPU's cache stay there, in all rows alike.

    In benchmarks parametrized with `row`, the row "ours" also stores its ratio to each row measured before it.
    """

    def run(function, *, num_bytes: int | None = None, num_flops: int | None = None) -> None:
        work = {"num_bytes": num_bytes, "num_flops": num_flops}
        work = {name: amount for name, amount in work.items() if amount is not None}

        def synchronized():
            function()
            if device.type == "cuda":
                torch.cuda.synchronize()

        synchronized()  # builds, loads and autotunes before timing
        benchmark(synchronized)
        benchmark.extra_info.update(device=device.type, **work)
        if not benchmark.enabled:
            return
        median = benchmark.stats.stats.median
        if device.type == "cuda" and (seconds := device_seconds(function)) is not None:
            benchmark.extra_info["device_seconds"] = median = seconds
        benchmark.extra_info.update({RATES[name]: amount / median / 1e9 for name, amount in work.items()})
        name, _, parameters = request.node.name.partition("[")
        row = request.node.callspec.params.get("row")
        if row is not None:
            case = f"{name}[{'-'.join(part for part in parameters[:-1].split('-') if part != row)}]"
            rows = request.config.stash.setdefault(MEDIANS, defaultdict(dict))[case]
            if row == "ours":
                benchmark.extra_info.update({f"times_faster_than_{other}": rows[other] / median for other in rows})
            rows[row] = median

    return run


def device_seconds(function, calls: int = 10, rounds: int = 20) -> float | None:
    """Median seconds per call when `calls` calls are replayed as one CUDA graph; None if they cannot be captured."""
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    try:
        with torch.cuda.stream(stream):
            function()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph, stream=stream):
            for _ in range(calls):
                function()
    except RuntimeError:  # the function synchronizes, or replays graphs of its own
        torch.cuda.synchronize()
        return None
    times = []
    for _ in range(rounds):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3 / calls)
    return statistics.median(times)


def pytest_terminal_summary(terminalreporter, config):
    """Prints how many times faster `ours` is than the other rows; against a copy, that is the share of bandwidth."""
    for case, rows in config.stash.get(MEDIANS, {}).items():
        if "ours" in rows:
            ratios = ", ".join(f"{rows[name] / rows['ours']:.2f}x {name}" for name in rows if name != "ours")
            terminalreporter.write_line(f"{case}: {1e6 * rows['ours']:.0f} us, {ratios}")


def pytest_benchmark_update_machine_info(config, machine_info):
    """Stores versions, threads and devices, and removes the machine's name."""
    machine_info.pop("node", None)
    machine_info["cpu"] = machine_info.get("cpu", {}).get("brand_raw")
    machine_info["vectors"] = torch.backends.cpu.get_cpu_capability()
    machine_info["torch"] = torch.__version__
    machine_info["threads"] = torch.get_num_threads()
    machine_info["gpu"] = torch.cuda.get_device_name() if torch.cuda.is_available() else None


def pytest_benchmark_update_json(config, benchmarks, output_json):
    """Removes single timings from stored rows; the statistics stay."""
    for row in output_json["benchmarks"]:
        row["stats"].pop("data", None)
