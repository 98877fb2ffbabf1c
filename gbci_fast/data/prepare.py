"""Prepares data sets into a cache: in parallel, resumable, and with the same bytes every time.

Worker processes read images and return their part of the cache, a few hundred kilobytes each. Only the main process
writes, in the order of the inputs. An unfinished cache lies in the progress folder of a `JobFolder`: arrays that are
appended to, and one note per image of the bytes that it added. A resumed job truncates the arrays to the noted bytes.
"""

import csv
import hashlib
import io
import json
import math
import os
import shutil
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import chain, count
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from gbci_fast import __version__
from gbci_fast.data.cache import (
    CACHE_FILE,
    FORMAT,
    INDEX,
    INDEX_SCHEMA,
    MASKS,
    PIXELS,
    Cache,
    packed_length,
)
from gbci_fast.data.prepare_image import PreparedImage, prepare_image, start_reader
from gbci_fast.data.qc import QC_FOLDER, write_qc
from gbci_fast.data.settings import PrepareSettings
from gbci_fast.data.vindr import ImageRecord, VinDr, find_inputs, is_data_set
from gbci_fast.errors import GBCIError, one_line
from gbci_fast.jobs.files import atomically, locked, naming_file, real_path, sha256_of, sync, sync_tree
from gbci_fast.jobs.folder import JOB_FILE, PROGRESS_FOLDER, SKIPPED, JobFolder, Kept
from gbci_fast.jobs.processes import close_pool, how_it_ended, processes_of, worker_pool

# Files that move from the progress folder to the output at the end, in this order.
RESULTS = (PIXELS, MASKS, INDEX, SKIPPED, QC_FOLDER, CACHE_FILE)
ROW_GROUP = 4096


@dataclass(frozen=True, kw_only=True)
class Source:
    """One root: its name in the index, its images, and its numbers of clamped and repeated boxes (see `VinDr`)."""

    name: str
    root: Path
    records: list[ImageRecord]
    clamped: int
    repeated: int


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """Numbers of a finished job: images read, images skipped, and fields of view."""

    images: int
    skipped: int
    views: int


def open_sources(roots: Sequence[Path], *, skip_bad: bool = False) -> list[Source]:
    """The images of VinDr roots, folders or files. Further roots of the same name become ``name-2``, ``name-3`` …

    Args:
        skip_bad: see `find_inputs`.

    Raises:
        GBCIError: a root is absent, given twice, a file in the folder of an earlier root, without images, or has
            illegal tables.
    """
    sources: list[Source] = []
    for root in map(Path, roots):
        clamped = repeated = 0
        if is_data_set(root):
            data = VinDr(root)
            records, clamped, repeated = data.images, data.clamped, data.repeated
        else:
            records = find_inputs(root, skip_bad=skip_bad)
        folder = root if root.is_dir() else root.parent
        if any(folder.samefile(source.root) for source in sources):
            told = f"{root} is given twice" if root.is_dir() else f"{root} lies in the folder of an earlier root"
            raise GBCIError(f"{told}; expected every folder once")
        name, taken = one_line(folder.absolute().name), {source.name for source in sources}
        names = chain((name,), (f"{name}-{number}" for number in count(2)))
        name = next(name for name in names if name not in taken)
        sources.append(Source(name=name, root=folder, records=records, clamped=clamped, repeated=repeated))
    return sources


def prepare(
    roots: Sequence[Path],
    output: Path,
    settings: PrepareSettings | None = None,
    *,
    workers: int | None = None,
    resume: bool = False,
    check: str = "digests",
    skip_bad: bool = False,
    sheets: int = 1,
    on_image: Callable[[int, int], None] = lambda done, total: None,
) -> Prepared:
    """Writes the cache of every image below ``roots`` into ``output``.

    An interrupted job can be resumed. If no image was finished, nothing is left in ``output``.

    Args:
        workers: number of processes, by default one per core. The cache's bytes do not depend on it.
        resume: continue an interrupted job with the same settings and inputs; a finished cache is left as it is.
        check: how a resumed job checks inputs and finished parts: "digests" reads them, "sizes" compares sizes only.
        skip_bad: list files that cannot be used in ``skipped.csv`` instead of stopping at the first.
        sheets: pages of the contact sheet.
        on_image: called with the numbers of finished and of all images, at the start and after each.

    Raises:
        GBCIError: an illegal input or option; ``output`` holds other files or another job; a prepared image or a
            finished cache has changed.
        OSError: ``output`` cannot be written, such as on a full disk; the error names a file.
    """
    settings = settings or PrepareSettings()
    workers = len(os.sched_getaffinity(0)) if workers is None else workers
    for name, value in (("workers", workers), ("sheets", sheets)):
        if value < 1:
            raise GBCIError(f"{name} is {value}; expected at least 1")
    sources = open_sources(roots, skip_bad=skip_bad)
    for source in sources:
        folder = real_path(output)
        if real_path(source.root) in (folder, *folder.parents):
            raise GBCIError(f"{output} lies in {source.root}, where images are read from; choose a folder outside")
    job = _Preparation(sources, output, settings, sheets)
    if job.is_complete(resume=resume, check=check):
        return job.summary(Cache(output))
    with naming_file(output), job.folder.claimed(resume=resume), job.opened(check):
        if not skip_bad:
            job.check_files()
        job.check_space()
        job.run(workers, skip_bad, on_image)
        return job.finish()


class _Preparation:
    """One job: the sources, the output folder, and the progress so far."""

    def __init__(self, sources: list[Source], output: Path, settings: PrepareSettings, sheets: int):
        self.output, self.settings, self.sheets = output, settings, sheets
        self.progress = output / PROGRESS_FOLDER
        self._sources = sources
        self._tasks = [(source, record) for source in sources for record in source.records]
        complete = (output / CACHE_FILE).exists()
        self.folder = JobFolder(
            output,
            _identify(sources, settings, sheets),
            file=CACHE_FILE if complete else f"{PROGRESS_FOLDER}/{JOB_FILE}",
            shared=complete,
        )
        self._arrays = {name: _Array(self.progress / name, kind, width) for name, kind, width in _arrays(settings.size)}
        self.done = self.views = self.masks = self.skipped = 0

    def is_complete(self, *, resume: bool, check: str) -> bool:
        """Whether the cache is finished; if so, its files are checked.

        Raises:
            GBCIError: the folder cannot be used, or the files of the finished cache have changed.
        """
        if not self.folder.begun(resume=resume) or not (self.output / CACHE_FILE).exists():
            return False
        cache = Cache(self.output)
        if check == "digests":
            cache.verify()
        if self.progress.exists():  # the run that finished the cache was killed before it removed the folder
            with locked(self.output):
                shutil.rmtree(self.progress, ignore_errors=True)
        return True

    @contextmanager
    def opened(self, check: str) -> Iterator[None]:
        """Opens the arrays, truncated to the sound images. If the block ends without any, all notes are deleted."""
        self._recover(check)
        with ExitStack() as stack:
            for array in self._arrays.values():
                stack.enter_context(array)
            try:
                yield
            finally:
                if not self.views:
                    self.folder.forget(list(self.folder))

    def check_files(self) -> None:
        """Raises GBCIError if a listed image is absent: at the start, not after hours of work."""
        faults = [fault for _, record in self._tasks[self.done :] if (fault := record.file_fault())]
        if faults:
            more = f" ({len(faults) - 1} more cannot be read either)" if len(faults) > 1 else ""
            raise GBCIError(f"{faults[0]}{more}; expected every listed image, or --skip-bad")

    def check_space(self) -> None:
        """Raises GBCIError if the disk has no space for even one field of view per image."""
        size = self.settings.size
        expected = (len(self._tasks) - self.done) * (2 * size * size + packed_length(size))
        free = shutil.disk_usage(self.output).free
        if "whole" in self.settings.views and free < expected:
            raise GBCIError(
                f"{self.output} has {free / 1e6:,.0f} MB of free space; expected at least {expected / 1e6:,.0f} MB"
            )

    def run(self, workers: int, skip_bad: bool, on_image: Callable[[int, int], None]) -> None:
        """Reads every unfinished image and appends it, in the order of the inputs."""
        total = len(self._tasks)
        on_image(self.done, total)
        todo = self._tasks[self.done :]
        if not todo:
            return
        pool, processes = worker_pool(min(workers, len(todo)), prepare_image.__module__, start_reader), []
        pending: deque[tuple[Source, ImageRecord, Future[PreparedImage]]] = deque()
        try:
            for source, record in todo:
                arguments = (record, source.root, source.name, self.settings)
                pending.append((source, record, pool.submit(prepare_image, *arguments)))
                processes = processes_of(pool) or processes
                if len(pending) >= 4 * workers:  # bounds the memory of finished images that wait for their turn
                    self._take(*pending.popleft(), skip_bad=skip_bad)
                    on_image(self.done, total)
            while pending:
                self._take(*pending.popleft(), skip_bad=skip_bad)
                on_image(self.done, total)
        except BrokenProcessPool as error:  # raised by a result, or by `submit` while earlier results are still sound
            close_pool(pool)
            _, record = self._tasks[self.done]
            raise GBCIError(
                f"a worker process {how_it_ended(processes)}, at {record.path} or one of the next images; use fewer "
                "--workers, or remove the file"
            ) from error
        finally:
            close_pool(pool)

    def finish(self) -> Prepared:
        """Writes index, report and ``cache.json``, then moves everything to the output, ``cache.json`` last."""
        if not self.views:
            first = next(self._entries(), None)
            why = f"; the first: {first['skipped']}" if first and "skipped" in first else ""
            raise GBCIError(f"none of {len(self._tasks)} images gave a field of view{why}")
        self._arrays[PIXELS].finish(self.views)
        self._arrays[MASKS].finish(self.masks)
        self._write_index()
        self._write_skipped()
        files = {
            name: {"bytes": (self.progress / name).stat().st_size, "sha256": sha256_of(self.progress / name)}
            for name in (PIXELS, MASKS, INDEX)
        }
        info = self.folder.stored | {"views_prepared": self.views, "skipped": self.skipped, "files": files}
        text = json.dumps(info, indent=1) + "\n"
        atomically(self.progress / CACHE_FILE, lambda temporary: temporary.write_text(text, encoding="utf-8"))
        cache = Cache(self.progress)
        write_qc(cache, self.progress / QC_FOLDER, skipped=self._skipped_rows(), sheets=self.sheets)
        for name in (name for name in RESULTS if (self.progress / name).exists()):
            sync_tree(self.progress / name)
            (self.progress / name).rename(self.output / name)
            sync(self.output)
        shutil.rmtree(self.progress)
        return self.summary(cache)

    def summary(self, cache: Cache) -> Prepared:
        """The numbers of a finished cache."""
        skipped = cache.info["skipped"]
        return Prepared(images=len(self._tasks) - skipped, skipped=skipped, views=len(cache))

    def _take(self, source: Source, record: ImageRecord, future: "Future[PreparedImage]", *, skip_bad: bool) -> None:
        try:
            image = future.result()
        except GBCIError as error:
            if not skip_bad:
                raise
            self._skip(source, record, str(error))
        except OSError as error:
            if not skip_bad:
                raise GBCIError(f"{record.path} cannot be read: {error.strerror or error}") from error
            self._skip(source, record, error.strerror or str(error))
        else:
            self._add(image)

    def _add(self, image: PreparedImage) -> None:
        pixels = image.pixels.astype("<u2", copy=False).tobytes()
        masks = b"".join(part.tobytes() for part in image.masks)
        kept = [self._arrays[name].append(part, self.output) for name, part in ((PIXELS, pixels), (MASKS, masks))]
        self._note({"rows": image.rows, "masks": [len(part) for part in image.masks]}, kept)

    def _skip(self, source: Source, record: ImageRecord, reason: str) -> None:
        # Neither the table of skipped files nor the cache depends on the location of the data.
        reason = reason.replace(one_line(f"{source.root}{os.sep}"), "")
        file = one_line(record.path.relative_to(source.root).as_posix())
        self._note({"file": f"{source.name}/{file}", "skipped": one_line(reason)})

    def _note(self, entry: dict[str, Any], kept: Sequence[Kept] = ()) -> None:
        self.folder.note(self.done, entry, kept)
        self._count(entry)

    def _count(self, entry: dict[str, Any]) -> None:
        self.done += 1
        self.skipped += "skipped" in entry
        self.views += len(entry.get("rows", ()))
        self.masks += sum(entry.get("masks", ()))

    def _entries(self) -> Iterator[dict[str, Any]]:
        return (self.folder.entry(number) for number in range(self.done))

    def _recover(self, check: str) -> None:
        """Truncates the arrays to the images before the first damaged one; in a new job, to their headers."""
        for name in RESULTS[:2]:  # an earlier run was killed while it moved its results to the output
            if (self.output / name).exists():
                (self.output / name).rename(self.progress / name)
        for name in RESULTS[2:]:
            for path in (self.output / name, self.progress / name):
                shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        damaged = set(self.folder.damaged(check))
        while self.done in self.folder and self.done not in damaged:
            self._count(self.folder.entry(self.done))
        self.folder.forget([number for number in self.folder if number >= self.done])
        self._check_unchanged(check)
        for name, rows in ((PIXELS, self.views), (MASKS, self.masks)):
            self._arrays[name].cut(rows)

    def _check_unchanged(self, check: str) -> None:
        """Raises GBCIError if the file of a prepared image has changed."""

        def fault(number: int) -> str | None:
            (_, record), rows = self._tasks[number], self.folder.entry(number).get("rows")
            if not rows:
                return None
            size = record.path.stat().st_size if record.path.exists() else 0
            if size != rows[0]["bytes"]:
                return f"has {size} bytes, and had {rows[0]['bytes']}"
            if check == "digests" and sha256_of(record.path) != rows[0]["sha256"]:
                return "is not the file that it was"
            return None

        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
            for number, found in enumerate(pool.map(fault, range(self.done))):
                if found:
                    path = self._tasks[number][1].path
                    raise GBCIError(f"{path} {found} when it was prepared; start again in another folder")

    def _write_index(self) -> None:
        mask, rows = 0, []
        with pq.ParquetWriter(self.progress / INDEX, INDEX_SCHEMA, compression="zstd") as writer:
            for entry in self._entries():
                for row, count in zip(entry.get("rows", ()), entry.get("masks", ()), strict=True):
                    rows.append(row | {"mask": mask})
                    mask += count
                if len(rows) >= ROW_GROUP:
                    writer.write_table(pa.Table.from_pylist(rows, INDEX_SCHEMA))
                    rows = []
            if rows:
                writer.write_table(pa.Table.from_pylist(rows, INDEX_SCHEMA))

    def _skipped_rows(self) -> list[tuple[str, str]]:
        return [(entry["file"], entry["skipped"]) for entry in self._entries() if "skipped" in entry]

    def _write_skipped(self) -> None:
        if self.skipped:
            with (self.progress / SKIPPED).open("w", newline="", encoding="utf-8") as file:
                csv.writer(file, lineterminator="\n").writerows([("file", "reason"), *self._skipped_rows()])


def _identify(sources: list[Source], settings: PrepareSettings, sheets: int) -> dict[str, Any]:
    """The identity of a job. It omits the files' contents: a damaged file may be repaired before a resume."""
    digest = hashlib.sha256()
    for source in sources:
        for record in source.records:
            path = PurePosixPath(record.path.relative_to(source.root))
            digest.update(repr(replace(record, path=path, fault=None)).encode())
    return {
        "format": FORMAT,
        "gbci_fast": __version__,
        **{key: list(value) if isinstance(value, tuple) else value for key, value in asdict(settings).items()},
        "sheets": sheets,
        "sources": [
            {"name": s.name, "images": len(s.records), "clamped": s.clamped, "repeated": s.repeated} for s in sources
        ],
        "inputs": digest.hexdigest(),
    }


def _arrays(size: int) -> tuple[tuple[str, str, tuple[int, ...]], ...]:
    """(name, dtype, shape of one row) of the cache's arrays."""
    return (PIXELS, "<u2", (size, size)), (MASKS, "|u1", (packed_length(size),))


class _Array:
    """A ``.npy`` file to append to. Its header states 0 rows until `finish` writes their number."""

    def __init__(self, path: Path, dtype: str, row: tuple[int, ...]):
        self._path, self._dtype, self._row = path, dtype, row
        self._start = len(self._header(0))
        self._row_bytes = np.dtype(dtype).itemsize * math.prod(row)

    def __enter__(self) -> "_Array":
        self._file = self._path.open("ab")
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def append(self, content: bytes, job: Path) -> Kept:
        """Appends the bytes of rows; on return they are on the disk."""
        start = self._file.tell()
        self._file.write(content)
        self._file.flush()
        os.fsync(self._file.fileno())
        digest = hashlib.sha256(content).hexdigest()
        return Kept.of(job, self._path, span=(start, start + len(content)), sha256=digest)

    def cut(self, rows: int) -> None:
        """Truncates the closed file to ``rows`` rows; makes the file if absent."""
        if not self._path.exists():
            atomically(self._path, lambda temporary: temporary.write_bytes(self._header(0)))
        os.truncate(self._path, self._start + rows * self._row_bytes)

    def finish(self, rows: int) -> None:
        """Writes the number of rows into the header."""
        self._file.close()
        with self._path.open("r+b") as file:
            file.write(self._header(rows))
            file.flush()
            os.fsync(file.fileno())

    def _header(self, rows: int) -> bytes:
        # NumPy pads the header so that its length does not depend on the number of rows.
        buffer = io.BytesIO()
        layout = {"descr": self._dtype, "fortran_order": False, "shape": (rows, *self._row)}
        np.lib.format.write_array_header_1_0(buffer, layout)
        return buffer.getvalue()
