"""Data sets to a cache: read once in parallel, append in order, resume where it stopped, the same bytes every time.

Worker processes read images and send back what the cache keeps of them, a few hundred kilobytes each; this process
alone writes. Until a cache is finished everything lies in ``.progress/``: arrays that only grow, and a journal with a
line per image that names the bytes it added. A resumed job cuts the arrays to what the journal vouches for.
"""

import csv
import fcntl
import hashlib
import io
import json
import os
import shutil
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from itertools import chain, count
from multiprocessing import get_context
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

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
from gbci_fast.data.prepare_image import PreparedImage, PrepareSettings, prepare_image, start_reader
from gbci_fast.data.qc import QC_FOLDER, write_qc
from gbci_fast.data.vindr import BREAST_TABLE, FINDING_TABLE, ImageRecord, VinDr, find_inputs
from gbci_fast.errors import GBCIError
from gbci_fast.files import PROGRESS_FOLDER, atomically, sha256_of

JOB_FILE, JOURNAL, SKIPPED = "job.json", "journal.jsonl", "skipped.csv"
# What moves up out of the progress folder at the end, in this order.
RESULTS = (PIXELS, MASKS, INDEX, SKIPPED, QC_FOLDER, CACHE_FILE)
ROW_GROUP = 4096


@dataclass(frozen=True, kw_only=True)
class Source:
    """One root: its name in the index, its images, and how many of its boxes were cut at the image's edge."""

    name: str
    root: Path
    records: list[ImageRecord]
    clamped: int


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """What a finished job made: numbers of images read and skipped, and of fields of view."""

    images: int
    skipped: int
    views: int


def open_sources(roots: Sequence[Path]) -> list[Source]:
    """The images of VinDr roots, folders or files; roots of one name are told apart as ``name-2``, ``name-3`` …

    Raises:
        GBCIError: a root is absent, or in the folder of another, holds no image, or its tables are not legal.
    """
    sources: list[Source] = []
    for root in map(Path, roots):
        clamped = 0
        if (root / BREAST_TABLE).exists() or (root / FINDING_TABLE).exists():
            data = VinDr(root)
            records, clamped = data.images, data.clamped
        else:
            records = find_inputs(root)
        folder = root if root.is_dir() else root.parent
        if any(folder.samefile(source.root) for source in sources):
            told = f"{root} is given twice" if root.is_dir() else f"{root} lies in the folder of an earlier root"
            raise GBCIError(f"{told}; expected every folder once")
        name, taken = folder.absolute().name, {source.name for source in sources}
        names = chain((name,), (f"{name}-{number}" for number in count(2)))
        name = next(name for name in names if name not in taken)
        sources.append(Source(name=name, root=folder, records=records, clamped=clamped))
    return sources


def prepare(
    roots: Sequence[Path],
    output: Path,
    settings: PrepareSettings | None = None,
    *,
    workers: int | None = None,
    resume: bool = False,
    skip_bad: bool = False,
    sheets: int = 1,
    on_image: Callable[[int, int], None] = lambda done, total: None,
) -> Prepared:
    """Writes the cache of every image below `roots` into `output`.

    Whatever stops it, `output` stays resumable; where no image is finished, nothing stays.

    Args:
        workers: processes; the machine's cores by default. The bytes do not depend on it.
        resume: continue an interrupted job with the same settings and inputs; a finished cache is left as it is.
        skip_bad: list files that cannot be used in ``skipped.csv`` instead of stopping at the first.
        sheets: pages of the contact sheet.
        on_image: called with the numbers of images done and in all, at the start and after each.

    Raises:
        GBCIError: an input or option is not legal, `output` holds something else, or the disk is full.
    """
    settings = settings or PrepareSettings()
    workers = len(os.sched_getaffinity(0)) if workers is None else workers
    for name, value in (("workers", workers), ("sheets", sheets)):
        if value < 1:
            raise GBCIError(f"{name} is {value}; expected at least 1")
    sources = open_sources(roots)
    for source in sources:
        if source.root.resolve() in (output.resolve(), *output.resolve().parents):
            raise GBCIError(f"{output} lies in {source.root}, where images are read from; choose a folder outside")
    job = _Job(sources, output, settings, sheets)
    try:
        if job.open(resume=resume):
            return job.summary(Cache(output))
        if not skip_bad:
            job.check_files()
        job.check_space()
        job.run(workers, skip_bad, on_image)
        return job.finish()
    except OSError as error:
        raise GBCIError(f"{output} cannot be written: {error.strerror or error}") from error
    finally:
        job.close()


class _Job:
    """Sources on their way into a folder."""

    def __init__(self, sources: list[Source], output: Path, settings: PrepareSettings, sheets: int):
        self.output, self.settings, self.sheets = output, settings, sheets
        self.progress = output / PROGRESS_FOLDER
        self._sources = sources
        self._tasks = [(source, record) for source in sources for record in source.records]
        self._identity = _identify(sources, settings, sheets)
        self._created = not output.exists()
        self._files = ExitStack()
        self._opened = False
        self.done = self.views = self.masks = self.skipped = 0

    def open(self, *, resume: bool) -> bool:
        """Creates the folder, or checks that it holds this job; True when the cache is already complete."""
        output = self.output
        if output.exists() and not output.is_dir():
            raise GBCIError(f"{output} is a file; expected a folder to write to")
        if not self._created and any(output.iterdir()):
            if not resume:
                raise GBCIError(
                    f"{output} is not empty; pass --resume to continue the job there, or choose another folder"
                )
            if (output / CACHE_FILE).exists():
                self._check_identity(Cache(output).info, output / CACHE_FILE)
                shutil.rmtree(self.progress, ignore_errors=True)
                return True
            self._check_identity(_read_json(self.progress / JOB_FILE), self.progress / JOB_FILE)
        else:
            text = json.dumps(self._identity, indent=1) + "\n"
            atomically(self.progress / JOB_FILE, lambda temporary: temporary.write_text(text, encoding="utf-8"))
        self._journal = self._append(JOURNAL)
        try:
            fcntl.flock(self._journal, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise GBCIError(f"{output} is being written by another process; wait for it to end") from None
        self._recover()
        self._pixels, self._masks = self._append(PIXELS), self._append(MASKS)
        self._opened = True
        return False

    def check_files(self) -> None:
        """Raises GBCIError where a listed image is not there: before the hours of work, not within them."""
        missing = [record.path for _, record in self._tasks[self.done :] if not record.path.is_file()]
        if missing:
            more = f" (nor do {len(missing) - 1} more)" if len(missing) > 1 else ""
            raise GBCIError(f"{missing[0]} does not exist{more}; expected every listed image, or --skip-bad")

    def check_space(self) -> None:
        """Raises GBCIError where not even one field of view per image would fit on the disk."""
        size = self.settings.size
        expected = (len(self._tasks) - self.done) * (2 * size * size + packed_length(size))
        free = shutil.disk_usage(self.output).free
        if "whole" in self.settings.views and free < expected:
            raise GBCIError(
                f"{self.output} has {free / 1e6:,.0f} MB of free space; expected at least {expected / 1e6:,.0f} MB"
            )

    def run(self, workers: int, skip_bad: bool, on_image: Callable[[int, int], None]) -> None:
        """Reads every image that is not finished; appends in the order of the tables."""
        total = len(self._tasks)
        on_image(self.done, total)
        todo = self._tasks[self.done :]
        if not todo:
            return
        # A fork server imports everything once, in a process without threads, and every worker starts as its copy.
        context = get_context("forkserver")
        context.set_forkserver_preload([prepare_image.__module__])
        pool = ProcessPoolExecutor(min(workers, len(todo)), mp_context=context, initializer=start_reader)
        pending: deque[tuple[Source, ImageRecord, Future[PreparedImage]]] = deque()
        try:
            for source, record in todo:
                arguments = (record, source.root, source.name, self.settings)
                pending.append((source, record, pool.submit(prepare_image, *arguments)))
                if len(pending) >= 4 * workers:  # what waits for its turn is bounded, and with it the memory
                    self._take(*pending.popleft(), skip_bad=skip_bad)
                    on_image(self.done, total)
            while pending:
                self._take(*pending.popleft(), skip_bad=skip_bad)
                on_image(self.done, total)
        except BrokenProcessPool as error:  # from a result, or from `submit` while earlier results are still good
            _, record = self._tasks[self.done]
            raise GBCIError(
                f"a worker process died at {record.path} or one of the next images (out of memory, or a decoder's "
                "crash); use fewer --workers, or remove the file"
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)

    def finish(self) -> Prepared:
        """Index, report and description; then everything moves up, the description last."""
        if not self.views:
            first = next(self._entries(), None)
            why = f"; the first: {first['skipped']}" if first and "skipped" in first else ""
            raise GBCIError(f"none of {len(self._tasks)} images gave a field of view{why}")
        self._pixels.close()
        self._masks.close()
        size = self.settings.size
        _write_header(self.progress / PIXELS, "<u2", (self.views, size, size))
        _write_header(self.progress / MASKS, "|u1", (self.masks, packed_length(size)))
        self._write_index()
        self._write_skipped()
        files = {
            name: {"bytes": (self.progress / name).stat().st_size, "sha256": sha256_of(self.progress / name)}
            for name in (PIXELS, MASKS, INDEX)
        }
        info = self._identity | {"views_prepared": self.views, "skipped": self.skipped, "files": files}
        (self.progress / CACHE_FILE).write_text(json.dumps(info, indent=1) + "\n", encoding="utf-8")
        cache = Cache(self.progress)
        write_qc(cache, self.progress / QC_FOLDER, skipped=self._skipped_rows(), sheets=self.sheets)
        for name in RESULTS:
            if (self.progress / name).exists():
                (self.progress / name).rename(self.output / name)
        shutil.rmtree(self.progress)
        return self.summary(cache)

    def summary(self, cache: Cache) -> Prepared:
        """The numbers of a finished cache."""
        skipped = cache.info["skipped"]
        return Prepared(images=len(self._tasks) - skipped, skipped=skipped, views=len(cache))

    def close(self) -> None:
        """Lets go of the files; takes back what `open` made where there is nothing worth resuming."""
        self._files.close()
        if self._opened and not self.views:
            shutil.rmtree(self.progress, ignore_errors=True)
            if self._created and self.output.is_dir() and not any(self.output.iterdir()):
                self.output.rmdir()

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
        for file, content in ((self._pixels, pixels), (self._masks, masks)):
            file.write(content)
            file.flush()
        self._note({"rows": image.rows, "masks": [len(part) for part in image.masks], "crc": _crc(pixels, masks)})

    def _skip(self, source: Source, record: ImageRecord, reason: str) -> None:
        # Neither the table nor the cache depends on where the data lie.
        reason = reason.replace(f"{source.root}{os.sep}", "")
        self._note({"file": f"{source.name}/{record.path.relative_to(source.root).as_posix()}", "skipped": reason})

    def _note(self, entry: dict[str, Any]) -> None:
        self._journal.write(json.dumps(entry, ensure_ascii=False).encode() + b"\n")
        self._journal.flush()
        self._count(entry)

    def _count(self, entry: dict[str, Any]) -> None:
        self.done += 1
        self.skipped += "skipped" in entry
        self.views += len(entry.get("rows", ()))
        self.masks += sum(entry.get("masks", ()))

    def _append(self, name: str) -> BinaryIO:
        return self._files.enter_context((self.progress / name).open("ab"))

    def _entries(self) -> Iterator[dict[str, Any]]:
        with (self.progress / JOURNAL).open("rb") as file:
            yield from (json.loads(line) for line in file)

    def _check_identity(self, found: dict[str, Any], file: Path) -> None:
        changed = [key for key, value in self._identity.items() if found.get(key) != value]
        if changed:
            raise GBCIError(f"{file} is of another job: {', '.join(changed)} differ; resume with the same arguments")

    def _recover(self) -> None:
        """Brings the folder back to the last image that is whole in all three files; a new job to its headers."""
        for name in RESULTS[:2]:  # where an earlier run was killed while it moved its results up
            if (self.output / name).exists():
                (self.output / name).rename(self.progress / name)
        for name in RESULTS[2:]:
            for path in (self.output / name, self.progress / name):
                shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        size = self.settings.size
        view_bytes, mask_bytes = 2 * size * size, packed_length(size)
        headers = _header("<u2", (0, size, size)), _header("|u1", (0, mask_bytes))
        for name, header in zip((PIXELS, MASKS), headers, strict=True):
            if not (self.progress / name).exists():
                (self.progress / name).write_bytes(header)
        kept = 0
        with (
            (self.progress / JOURNAL).open("rb") as journal,
            (self.progress / PIXELS).open("rb") as pixels,
            (self.progress / MASKS).open("rb") as masks,
        ):
            pixels.seek(len(headers[0]))
            masks.seek(len(headers[1]))
            for line, (source, record) in zip(journal, self._tasks, strict=False):
                entry = _parse_entry(line)
                if entry is None:
                    break
                if rows := entry.get("rows"):
                    parts = pixels.read(len(rows) * view_bytes), masks.read(sum(entry["masks"]) * mask_bytes)
                    if _crc(*parts) != entry["crc"]:
                        break
                    _check_unchanged(record, rows[0], source)
                self._count(entry)
                kept += len(line)
        os.truncate(self.progress / JOURNAL, kept)
        os.truncate(self.progress / PIXELS, len(headers[0]) + self.views * view_bytes)
        os.truncate(self.progress / MASKS, len(headers[1]) + self.masks * mask_bytes)

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
    """What tells a job from others; a damaged file may be repaired before a resume, so that contents do not count."""
    digest = hashlib.sha256()
    for source in sources:
        for record in source.records:
            path = PurePosixPath(record.path.relative_to(source.root))
            digest.update(repr(replace(record, path=path)).encode())
    return {
        "format": FORMAT,
        "gbci_fast": __version__,
        **{key: list(value) if isinstance(value, tuple) else value for key, value in asdict(settings).items()},
        "sheets": sheets,
        "sources": [{"name": s.name, "images": len(s.records), "clamped": s.clamped} for s in sources],
        "inputs": digest.hexdigest(),
    }


def _check_unchanged(record: ImageRecord, row: dict[str, Any], source: Source) -> None:
    size = record.path.stat().st_size if record.path.exists() else 0
    if size != row["bytes"]:
        raise GBCIError(
            f"{record.path} has {size} bytes, and had {row['bytes']} when it was prepared; "
            "start again in another folder"
        )


def _header(dtype: str, shape: tuple[int, ...]) -> bytes:
    """The header of a ``.npy`` file; NumPy pads it so that its length does not depend on the first axis."""
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {"descr": dtype, "fortran_order": False, "shape": shape})
    return buffer.getvalue()


def _write_header(path: Path, dtype: str, shape: tuple[int, ...]) -> None:
    with path.open("r+b") as file:
        file.write(_header(dtype, shape))
        file.flush()
        os.fsync(file.fileno())


def _crc(pixels: bytes, masks: bytes) -> int:
    return zlib.crc32(masks, zlib.crc32(pixels))


def _parse_entry(line: bytes) -> dict[str, Any] | None:
    """One journal line; None where a kill or a full disk cut it."""
    try:
        return json.loads(line) if line.endswith(b"\n") else None
    except ValueError:
        return None


def _read_json(file: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise GBCIError(f"{file} cannot be read, so {file.parent.parent} holds no job to resume") from error
