"""A folder that one job writes to, that may be stopped at any moment, and that is resumed.

    JOB/job.json                  the job's identity: what decides its result
    JOB/.lock                     held while a process works there
    JOB/.progress/journal.jsonl   a note per finished piece of work, with the digests of the files that hold it
    JOB/.finished/                what `.progress` is called once the job is done

A note is on the disk before `JobFolder.note` returns, and its files are before it is called. So a power cut loses what
was not noted, and nothing else; a damaged note is an unfinished piece of work.
"""

import hashlib
import json
import os
import shutil
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from gbci_fast.errors import GBCIError
from gbci_fast.jobs.files import (
    LOCK_FILE,
    atomically,
    is_empty,
    is_temporary,
    locked,
    make_folder,
    naming_file,
    remove_temporaries,
    sync,
)

SKIPPED = "skipped.csv"  # what could not be used, with reasons, beside what a job wrote
JOB_FILE = "job.json"
PROGRESS_FOLDER = ".progress"
FINISHED_FOLDER = ".finished"
JOURNAL = "journal.jsonl"
CHECKS = ("digests", "sizes")

Key = int | str


@dataclass(frozen=True, kw_only=True)
class Kept:
    """A file below the job's folder, or `size` bytes of it from `start` on, by their SHA-256."""

    path: str
    size: int
    sha256: str
    start: int | None = None

    @classmethod
    def of(cls, job: Path, path: Path, *, span: tuple[int, int] | None = None, sha256: str | None = None) -> "Kept":
        """A file as it is now, or what lies between two of its bytes; the digest is made where it is not given."""
        start, end = span or (0, path.stat().st_size)
        digest = _sha256(path, start, end) if sha256 is None else sha256
        return cls(
            path=path.relative_to(job).as_posix(),
            size=end - start,
            sha256=digest,
            start=None if span is None else start,
        )

    def is_in(self, job: Path, check: str) -> bool:
        """Whether the bytes are still there; of `CHECKS`, "sizes" reads nothing."""
        path, start = job / self.path, self.start or 0
        try:
            size = path.stat().st_size
            sound = size == self.size if self.start is None else size >= start + self.size
            return sound and (check == "sizes" or _sha256(path, start, start + self.size) == self.sha256)
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            return False


class JobFolder:
    """See the module.

    Args:
        path: of the folder, which need not exist.
        identity: what decides the job's result, as JSON values; compared when the job is resumed.
        file: that keeps the identity, below `path`.
        shared: other files may lie in the folder (a training run's bank of latents).

    Attributes:
        progress: the folder of the job's notes; the caller may keep files there that the finished job needs no more.
        stored: what `file` holds once it is read or written: the identity, and `private`.
    """

    def __init__(
        self,
        path: Path,
        identity: Mapping[str, Any],
        *,
        file: str = JOB_FILE,
        private: Mapping[str, Any] | None = None,
        shared: bool = False,
    ):
        self.path = path
        self.progress = path / PROGRESS_FOLDER
        self.file = path / file
        self.stored: dict[str, Any] = {}
        self._identity = json.loads(json.dumps(identity))  # as it comes back: tuples are lists
        self._private = dict(private or {})
        self._shared = shared
        self._created = not path.exists()
        self._journal = _Journal(self.progress / JOURNAL)

    @property
    def finished(self) -> bool:
        """Whether `finish` was reached."""
        return (self.path / FINISHED_FOLDER).is_dir()

    def begun(self, *, resume: bool, hint: Callable[[Sequence[str]], str] = lambda changed: "") -> bool:
        """Whether an earlier run of this job left something here; changes nothing.

        Temporary files and the lock of a killed run count as nothing.

        Args:
            resume: whether that is wanted.
            hint: the end of the sentence that refuses another job, of the names that differ.

        Raises:
            GBCIError: the folder cannot be used, holds something else, or another job.
        """
        self._check_path()
        if not self.file.exists() and (self._shared or is_empty(self.path)):
            return False
        if not resume:
            raise GBCIError(
                f"{self.path} is not empty; pass --resume to continue the job there, or choose another folder"
            )
        try:
            if not self.file.is_file():
                raise FileNotFoundError("no such file")
            self.stored = dict(json.loads(self.file.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError, RecursionError) as error:
            raise GBCIError(f"{self.file} cannot be read, so {self.path} holds no job to resume: {error}") from error
        changed = [name for name, value in self._identity.items() if self.stored.get(name) != value]
        if changed:
            told = ", ".join(_difference(name, self.stored.get(name), self._identity[name]) for name in changed)
            raise GBCIError(
                f"{self.path} holds another job: {told}; resume with the same arguments, or choose another folder"
                f"{hint(changed)}"
            )
        if not (self.progress.exists() or self.finished or self._shared) and self._others():
            raise GBCIError(
                f"{self.path} has neither {PROGRESS_FOLDER} nor {FINISHED_FOLDER}, the notes of its job, and cannot be "
                "resumed without; put them back, or choose another folder"
            )
        self._journal = _Journal((self.path / FINISHED_FOLDER if self.finished else self.progress) / JOURNAL)
        return True

    @contextmanager
    def claimed(self, *, resume: bool) -> Iterator[None]:
        """The folder, made where it is not there, with this job's identity in it, and nobody else.

        A finished job is unfinished again. Where the block raises and nothing was noted, the folder is left as it was.

        Raises:
            GBCIError: as `begun`; or somebody else is in there.
        """
        self._check_path()
        make_folder(self.path)
        try:
            with locked(self.path):
                if not self.begun(resume=resume or self._created):  # again, now that nobody else can change it
                    remove_temporaries(self.path)
                    self._write_identity()
                elif self.finished:
                    (self.path / FINISHED_FOLDER).rename(self.progress)
                remove_temporaries(self.path)
                make_folder(self.progress)
                self._journal = _Journal(self.progress / JOURNAL)
                try:
                    yield
                finally:
                    if not self._journal.keys() and not self.finished:
                        self._take_back()
        finally:
            if self._created:
                with suppress(OSError):  # absent, or not empty
                    self.path.rmdir()

    def __iter__(self) -> Iterator[Key]:
        """The keys of what is noted, in order: numbers, then names."""
        return iter(self._journal.keys())

    def __contains__(self, key: Key) -> bool:
        return key in self._journal

    def entry(self, key: Key) -> Any:
        """What was noted of a piece of work."""
        return self._journal.read(key)["entry"]

    def kept(self, key: Key) -> list[Kept]:
        """The files of a piece of work."""
        found = [Kept(**each) for each in self._journal.read(key)["kept"]]
        if not self.finished:
            return found
        moved = f"{FINISHED_FOLDER}/"
        return [replace(each, path=each.path.replace(f"{PROGRESS_FOLDER}/", moved, 1)) for each in found]

    def note(self, key: Key, entry: Any, kept: Sequence[Kept] = ()) -> None:
        """Notes a piece of work as finished, instead of an earlier note of the same key.

        Args:
            entry: a JSON value.
            kept: the files that hold it, which are on the disk already.
        """
        self._journal.append(key, {"entry": entry, "kept": [asdict(each) for each in kept]})

    def forget(self, keys: Sequence[Key]) -> None:
        """Makes pieces of work unfinished."""
        for key in keys:
            self._journal.append(key, None)

    def is_damaged(self, key: Key, check: str = "digests") -> bool:
        """Whether the files of a finished piece of work are not there as they were written.

        Args:
            check: "digests" (reads every file) or "sizes".
        """
        return not all(each.is_in(self.path, check) for each in self.kept(key))

    def damaged(self, check: str) -> list[Key]:
        """Every finished piece of work that `is_damaged`, in order."""
        keys = list(self)
        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
            found = pool.map(lambda key: self.is_damaged(key, check), keys)
            return [key for key, damaged in zip(keys, found, strict=True) if damaged]

    def finish(self) -> None:
        """Keeps the notes, in the order of their keys, as those of a finished job."""
        self._journal.rewrite()
        self.progress.rename(self.path / FINISHED_FOLDER)
        sync(self.path)

    def _check_path(self) -> None:
        if self.path.exists() and not self.path.is_dir():
            raise GBCIError(f"{self.path} is a file; expected a folder to write to")

    def _take_back(self) -> None:
        shutil.rmtree(self.progress, ignore_errors=True)
        if self._shared or not self._others():
            self.file.unlink(missing_ok=True)

    def _others(self) -> set[str]:
        """Names of what is not the job's own account of itself."""
        own = {LOCK_FILE, self.file.name, PROGRESS_FOLDER}
        return {path.name for path in self.path.iterdir() if path.name not in own and not is_temporary(path.name)}

    def _write_identity(self) -> None:
        self.stored = self._identity | self._private
        text = json.dumps(self.stored, indent=1) + "\n"
        atomically(self.file, lambda temporary: temporary.write_text(text, encoding="utf-8"), mode=0o600)


class _Journal:
    """Lines of ``CRC-32, key, note``, of which the last of a key counts; a note may be None (forgotten)."""

    def __init__(self, path: Path):
        self._path = path
        self._at: dict[Key, tuple[int, int]] = {}  # where a key's line begins, and its length
        self._end = 0
        with suppress(FileNotFoundError, NotADirectoryError), path.open("rb") as file:
            for line in file:
                if not line.endswith(b"\n"):
                    break  # cut short
                if (parsed := _parse(line)) is not None:
                    self._place(*parsed, len(line))
                self._end += len(line)

    def __contains__(self, key: Key) -> bool:
        return key in self._at

    def keys(self) -> list[Key]:
        return sorted(self._at, key=lambda key: (isinstance(key, str), key))

    def read(self, key: Key) -> dict[str, Any]:
        start, length = self._at[key]
        with self._path.open("rb") as file:
            file.seek(start)
            _, note = _parse(file.read(length))
        return note

    def append(self, key: Key, note: dict[str, Any] | None) -> None:
        line = _line(key, note)
        new = not self._path.exists()
        with naming_file(self._path), self._path.open("r+b" if not new else "wb") as file:
            file.truncate(self._end)
            file.seek(self._end)
            file.write(line)
            file.flush()
            os.fsync(file.fileno())
        if new:
            sync(self._path.parent)
        self._place(key, note, len(line))
        self._end += len(line)

    def rewrite(self) -> None:
        """Leaves one line per key, in order."""

        def write(temporary: Path) -> None:
            with temporary.open("wb") as file:
                file.writelines(_line(key, self.read(key)) for key in self.keys())

        atomically(self._path, write)

    def _place(self, key: Key, note: dict[str, Any] | None, length: int) -> None:
        if note is None:
            self._at.pop(key, None)
        else:
            self._at[key] = self._end, length


def _line(key: Key, note: dict[str, Any] | None) -> bytes:
    text = json.dumps([key, note]).encode()
    return b"%08x %s\n" % (zlib.crc32(text), text)


def _parse(line: bytes) -> tuple[Key, dict[str, Any] | None] | None:
    """(key, note) of a line; None where it is damaged."""
    checksum, _, text = line.rstrip(b"\n").partition(b" ")
    return tuple(json.loads(text)) if checksum == b"%08x" % zlib.crc32(text) else None


def _difference(name: str, found: Any, wanted: Any) -> str:
    short = all(isinstance(value, int | float | str | None) and len(str(value)) < 32 for value in (found, wanted))
    return f"{name} {found}, not {wanted}" if short else f"other {name}"


def _sha256(path: Path, start: int, end: int) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        file.seek(start)
        while (left := end - file.tell()) > 0 and (part := file.read(min(left, 2**20))):
            digest.update(part)
    return digest.hexdigest()
