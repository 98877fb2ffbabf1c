"""A job's output folder: the job may be stopped at any moment and resumed.

    JOB/job.json                  the job's identity: everything that decides its result
    JOB/.lock                     held while a process works in the folder
    JOB/.progress/journal.jsonl   one note per finished piece of work, with the digests of its files
    JOB/.finished/                the new name of `.progress` once the job is finished

The files of a piece of work are on the disk before `JobFolder.note` is called, and the note is on the disk when it
returns. So a power cut loses only work without a note. Work with a damaged note counts as unfinished.
"""

import hashlib
import json
import os
import shutil
import zlib
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from gbci_fast.errors import GBCIError
from gbci_fast.jobs.files import (
    LOCK_FILE,
    atomically,
    atomically_open,
    is_empty,
    is_temporary,
    locked,
    make_folder,
    naming_file,
    remove_temporaries,
    sync,
)

SKIPPED = "skipped.csv"  # table of inputs that could not be used, with reasons, in a job's output folder
JOB_FILE = "job.json"
PROGRESS_FOLDER = ".progress"
FINISHED_FOLDER = ".finished"
JOURNAL = "journal.jsonl"
CHECKS = ("digests", "sizes")

Key = int | str  # numbers count from 0
AT_ONCE = 4096  # pieces of work that are checked in parallel


@dataclass(frozen=True, kw_only=True)
class Kept:
    """A file below the job's folder, or ``size`` bytes of it from ``start`` on, with the SHA-256 of these bytes."""

    path: str
    size: int
    sha256: str
    start: int | None = None

    @classmethod
    def of(cls, job: Path, path: Path, *, span: tuple[int, int] | None = None, sha256: str | None = None) -> "Kept":
        """Describes a file as it is now.

        Args:
            span: (start, end) of the described bytes; None = the whole file.
            sha256: digest of these bytes; None = it is computed.
        """
        start, end = span or (0, path.stat().st_size)
        digest = _sha256(path, start, end) if sha256 is None else sha256
        return cls(
            path=path.relative_to(job).as_posix(),
            size=end - start,
            sha256=digest,
            start=None if span is None else start,
        )

    def is_in(self, job: Path, check: str) -> bool:
        """Whether the bytes are still there. ``check`` is one of `CHECKS`; "sizes" compares sizes and reads nothing."""
        path, start = job / self.path, self.start or 0
        try:
            size = path.stat().st_size
            sound = size == self.size if self.start is None else size >= start + self.size
            return sound and (check == "sizes" or _sha256(path, start, start + self.size) == self.sha256)
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            return False


class JobFolder:
    """The output folder of a resumable job; its layout is in the module's docstring.

    Args:
        path: the folder, which need not exist.
        identity: everything that decides the job's result, as JSON values; compared when the job is resumed.
        file: name of the file below ``path`` that stores the identity.
        private: further JSON values for that file, which are not compared.
        shared: whether other files may lie in the folder, such as a training run's bank of latents.

    Attributes:
        progress: folder of the job's notes. The caller may keep files there that only an unfinished job needs.
        stored: content of ``file``, once read or written: the identity and ``private``.
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
        self._identity = json.loads(json.dumps(identity))  # as read back from the file: tuples become lists
        self._private = dict(private or {})
        self._shared = shared
        self._created = not path.exists()
        self._journal = _Journal(self.progress / JOURNAL)

    @property
    def finished(self) -> bool:
        """Whether the job was finished (`finish`)."""
        return (self.path / FINISHED_FOLDER).is_dir()

    def begun(self, *, resume: bool, hint: Callable[[Sequence[str]], str] = lambda changed: "") -> bool:
        """Whether an earlier run of this job began in this folder. Changes no file.

        Temporary files and the lock file of a killed run do not count.

        Args:
            resume: whether continuing an earlier run is allowed.
            hint: called with the names of the identity that differ; ends the error message about another job.

        Raises:
            GBCIError: the path is a file, or the folder holds other files, another job, or an earlier run that
                ``resume`` does not allow to continue.
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
        """Makes the folder if absent, locks it, and writes the job's identity; the block may then write to it.

        A finished job becomes unfinished. If the block neither notes anything nor finishes the job, the folder is left
        as it was before.

        Raises:
            GBCIError: as `begun`, or another run holds the lock.
        """
        self._check_path()
        make_folder(self.path)
        try:
            with locked(self.path):
                if not self.begun(resume=resume or self._created):  # checked again under the lock
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
                    if next(iter(self), None) is None and not self.finished:
                        self._take_back()
        finally:
            if self._created:
                with suppress(OSError):  # absent, or not empty
                    self.path.rmdir()

    def __iter__(self) -> Iterator[Key]:
        """The keys of all noted pieces of work, sorted: numbers, then names."""
        return self._journal.keys()

    def __contains__(self, key: Key) -> bool:
        return key in self._journal

    def entry(self, key: Key) -> Any:
        """The JSON value that was noted for a piece of work."""
        return self._journal.read(key)["entry"]

    def kept(self, key: Key) -> list[Kept]:
        """The files of a piece of work, in their present place."""
        found = [Kept(**each) for each in self._journal.read(key)["kept"]]
        if not self.finished:
            return found
        moved = f"{FINISHED_FOLDER}/"
        return [replace(each, path=each.path.replace(f"{PROGRESS_FOLDER}/", moved, 1)) for each in found]

    def note(self, key: Key, entry: Any, kept: Sequence[Kept] = ()) -> None:
        """Notes a piece of work as finished; replaces an earlier note of the same key.

        Args:
            entry: a JSON value.
            kept: the files of this piece of work, which must be on the disk already.
        """
        self._journal.append(key, {"entry": entry, "kept": [asdict(each) for each in kept]})

    def forget(self, keys: Sequence[Key]) -> None:
        """Marks pieces of work as unfinished."""
        for key in keys:
            self._journal.append(key, None)

    def is_damaged(self, key: Key, check: str = "digests") -> bool:
        """Whether a file of a finished piece of work is absent or differs from what was noted.

        Args:
            check: "digests" (reads every file) or "sizes".
        """
        return not all(each.is_in(self.path, check) for each in self.kept(key))

    def damaged(self, check: str) -> list[Key]:
        """The keys of all finished pieces of work that `is_damaged`, in order; reads files in parallel."""
        keys, lost = iter(self), []
        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
            while part := list(islice(keys, AT_ONCE)):
                found = pool.map(lambda key: self.is_damaged(key, check), part)
                lost += [key for key, damaged in zip(part, found, strict=True) if damaged]
        return lost

    def finish(self) -> None:
        """Marks the job as finished: compacts the journal, sorted by key, and renames `.progress` to `.finished`."""
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
        """Names in the folder other than the job's own identity, lock, notes and temporary files."""
        own = {LOCK_FILE, self.file.name, PROGRESS_FOLDER}
        return {path.name for path in self.path.iterdir() if path.name not in own and not is_temporary(path.name)}

    def _write_identity(self) -> None:
        self.stored = self._identity | self._private
        text = json.dumps(self.stored, indent=1) + "\n"
        atomically(self.file, lambda temporary: temporary.write_text(text, encoding="utf-8"), mode=0o600)


class _Journal:
    """A file of lines with CRC-32, key and note. The last line of a key counts; a note of None deletes the key.

    In memory a numbered piece of work takes 8 bytes: where its line starts.
    """

    def __init__(self, path: Path):
        self._path = path
        self._numbered = array("q")  # by number; -1 = no note
        self._named: dict[str, int] = {}
        self._end = 0
        with suppress(FileNotFoundError, NotADirectoryError), path.open("rb") as file:
            for line in file:
                if not line.endswith(b"\n"):
                    break  # cut short
                if (parsed := _parse(line)) is not None:
                    self._place(*parsed)
                self._end += len(line)

    def __contains__(self, key: Key) -> bool:
        if isinstance(key, str):
            return key in self._named
        return 0 <= key < len(self._numbered) and self._numbered[key] >= 0

    def keys(self) -> Iterator[Key]:
        yield from (number for number in range(len(self._numbered)) if self._numbered[number] >= 0)
        yield from sorted(self._named)

    def read(self, key: Key) -> dict[str, Any]:
        if key not in self:
            raise KeyError(key)
        with self._path.open("rb") as file:
            file.seek(self._named[key] if isinstance(key, str) else self._numbered[key])
            _, note = _parse(file.readline())
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
        self._place(key, note)
        self._end += len(line)

    def rewrite(self) -> None:
        """Rewrites the journal with one line per key, sorted."""
        lines = (_line(key, self.read(key)) for key in self.keys())
        atomically_open(self._path, lambda file: file.writelines(lines))

    def _place(self, key: Key, note: dict[str, Any] | None) -> None:
        start = -1 if note is None else self._end
        if isinstance(key, int):
            self._numbered.extend([-1] * (key + 1 - len(self._numbered)))
            self._numbered[key] = start
        elif start >= 0:
            self._named[key] = start
        else:
            self._named.pop(key, None)


def _line(key: Key, note: dict[str, Any] | None) -> bytes:
    text = json.dumps([key, note]).encode()
    return b"%08x %s\n" % (zlib.crc32(text), text)


def _parse(line: bytes) -> tuple[Key, dict[str, Any] | None] | None:
    """(key, note) of a journal line; None if the line is damaged."""
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
