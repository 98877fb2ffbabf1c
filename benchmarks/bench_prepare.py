"""`prepare` on phantoms: images/s by number of workers, and the resident memory of all its processes over time.

``pytest benchmarks/bench_prepare.py --prepare-images 20000 -k memory`` measures a data set of the size of VinDr-Mammo.
"""

import csv
import os
import shutil
from pathlib import Path

import psutil
import pytest

from gbci_fast.data.prepare import prepare
from gbci_fast.data.vindr import BREAST_TABLE, FINDING_TABLE
from gbci_fast.phantom import generate_phantom

SIZE = 256  # side of the phantoms in pixels; the cache has the default size
DISTINCT = 100  # largest number of different phantoms
POINTS = 40  # number of points of the memory curve


@pytest.fixture(scope="module")
def root(request, tmp_path_factory) -> Path:
    """A VinDr root of ``--prepare-images`` images: hard links to a quarter as many phantoms, at most `DISTINCT`."""
    count = request.config.getoption("--prepare-images")
    folder = tmp_path_factory.mktemp("prepare")
    generate_phantom(folder / "phantoms", studies=min(DISTINCT, max(4, count // 4)) // 4, seed=0, size=SIZE)
    return link_copies(folder / "phantoms", folder / "root", count)


def link_copies(phantoms: Path, root: Path, count: int) -> Path:
    """Repeats the studies of `phantoms` under new ids until there are `count` images."""
    for name in (BREAST_TABLE, FINDING_TABLE):
        with (phantoms / name).open(newline="") as file:
            header, *rows = csv.reader(file)
        study, image = header.index("study_id"), header.index("image_id")
        ids = list(dict.fromkeys(row[image] for row in rows))
        root.mkdir(exist_ok=True)
        with (root / name).open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(header)
            for copy in range(-(-count // len(ids))):
                kept = set(ids[: count - copy * len(ids)])
                for row in (row for row in rows if row[image] in kept):
                    renamed = dict(zip(header, row, strict=True))
                    renamed |= {"study_id": f"{row[study]}-{copy}", "image_id": f"{row[image]}-{copy}"}
                    writer.writerow(renamed.values())
                    for folder, suffix in (("images", ".dicom"), ("masks", ".png")):
                        source = phantoms / folder / row[study] / f"{row[image]}{suffix}"
                        target = root / folder / renamed["study_id"] / f"{renamed['image_id']}{suffix}"
                        if source.exists() and not target.exists():
                            target.parent.mkdir(parents=True, exist_ok=True)
                            os.link(source, target)
    return root


def resident_mib() -> float:
    """Resident memory in MiB of this process and its descendants; shared pages count once per process."""
    this = psutil.Process()
    return sum(process.memory_info().rss for process in (this, *this.children(recursive=True))) / 2**20


@pytest.mark.parametrize("workers", [1, 2])
def bench_prepare_workers(benchmark, root, tmp_path, workers):
    output = tmp_path / "cache"

    def run():
        prepare([root], output, workers=workers)

    benchmark.pedantic(run, setup=lambda: shutil.rmtree(output, ignore_errors=True), rounds=3, warmup_rounds=1)
    count = len(list((root / "images").rglob("*.dicom")))
    bytes_per_image = sum(path.stat().st_size for path in output.glob("*.*")) / count
    benchmark.extra_info.update(workers=workers, images=count, native_size=SIZE, bytes_per_image=round(bytes_per_image))
    if benchmark.enabled:
        benchmark.extra_info["images_per_s"] = count / benchmark.stats.stats.median


def bench_prepare_memory(benchmark, root, tmp_path):
    """Stores the curve with the row: (images done, MiB of all processes)."""
    curve: list[tuple[int, int]] = []

    def on_image(done: int, total: int) -> None:
        if done % max(1, total // POINTS) == 0:
            curve.append((done, round(resident_mib())))

    benchmark.pedantic(lambda: prepare([root], tmp_path / "cache", workers=2, on_image=on_image), rounds=1)
    curve.append((curve[-1][0], round(resident_mib())))  # after the index and the report
    benchmark.extra_info.update(workers=2, native_size=SIZE, resident_mib=curve)
