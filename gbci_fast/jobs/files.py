"""Atomic and durable file writes, folders locked to one process, and digests."""

import errno
import hashlib
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from filelock import FileLock, Timeout

from gbci_fast.errors import GBCIError

LOCK_FILE = ".lock"
_TEMPORARY = re.compile(r"\..+\.\d+\.tmp")


def atomically(path: Path, write: Callable[[Path], object], *, mode: int | None = None) -> None:
    """Writes a file whole or not at all: ``write(temporary)`` fills a sibling, which is then renamed to ``path``.

    On return the file and its name are on the disk (``fsync``): a power cut leaves the old file or the new one.

    Args:
        mode: permissions of the file, such as 0o600; None = the process's default.

    Raises:
        OSError: the file cannot be written, such as on a full disk; its ``filename`` is the path.
    """
    temporary = _temporary(path)
    with naming_file(path):
        make_folder(path.parent)
        try:
            if mode is not None:
                temporary.touch(mode)
            write(temporary)
            sync(temporary)
            temporary.replace(path)
            sync(path.parent)
        finally:
            temporary.unlink(missing_ok=True)


def atomically_open(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """As `atomically`, with ``write(file)`` on the open file. `numpy.save` would add a suffix to a temporary's name."""

    def fill(temporary: Path) -> None:
        with temporary.open("wb") as file:
            write(file)

    atomically(path, fill)


def replace_folder(path: Path, write: Callable[[Path], object]) -> None:
    """Writes a folder whole or not at all: ``write(temporary)`` makes a sibling, which then replaces ``path``.

    On return its files are on the disk (``fsync``).

    Raises:
        OSError: as `atomically`.
    """
    temporary, aside = _temporary(path), _temporary(path.with_name(f"{path.name}.old"))
    with naming_file(path):
        try:
            write(temporary)
            sync_tree(temporary)
            if path.exists():  # a rename cannot replace a folder that is not empty
                path.replace(aside)
            temporary.replace(path)
            sync(path.parent)
        finally:
            for folder in (temporary, aside):
                shutil.rmtree(folder, ignore_errors=True)


def sync(path: Path) -> None:
    """Waits until the content of a file, or the list of names of a folder, is on the disk (``fsync``)."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(path: Path) -> None:
    """Calls `sync` on a file, or on a folder and everything below it."""
    for below in sorted(path.rglob("*")):
        sync(below)
    sync(path)


def make_folder(path: Path) -> None:
    """Makes a folder and its parents. On return their names are on the disk.

    Raises:
        NotADirectoryError: the path or a parent is a file.
    """
    if path.is_dir():
        return
    make_folder(path.parent)
    try:
        path.mkdir(exist_ok=True)
    except FileExistsError:
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(path)) from None
    sync(path.parent)


@contextmanager
def naming_file(path: Path) -> Iterator[None]:
    """Adds ``path`` to an OSError that names no file, such as "No space left on device" on writing to an open file."""
    try:
        yield
    except OSError as error:
        first = error
        while first.errno is None and isinstance(first.__cause__, OSError):  # pydicom wraps the OSError
            first = first.__cause__
        if first.errno is None or error.filename is not None:
            raise
        raise OSError(first.errno, first.strerror, str(path)) from error


def is_temporary(name: str) -> bool:
    """Whether a name is a temporary one of `atomically` or `replace_folder`, which a killed process leaves behind."""
    return _TEMPORARY.fullmatch(name) is not None


def is_empty(folder: Path) -> bool:
    """Whether a folder is absent, or holds only a lock and temporary files, which killed processes leave behind."""
    files = (name for _, _, names in os.walk(folder) for name in names)
    return all(name == LOCK_FILE or is_temporary(name) for name in files)


def remove_temporaries(folder: Path) -> None:
    """Removes the temporary files and folders of killed processes below ``folder``. No process may be writing there."""
    for parent, folders, names in os.walk(folder):
        for name in filter(is_temporary, names):
            Path(parent, name).unlink(missing_ok=True)
        for name in list(filter(is_temporary, folders)):
            shutil.rmtree(Path(parent, name))
            folders.remove(name)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Locks an existing folder against other processes and threads while the block runs.

    The lock is the operating system's (``flock``), which ends with a killed process. A `LOCK_FILE` left behind locks
    nothing.

    Raises:
        GBCIError: another run holds the lock.
    """
    lock = FileLock(folder / LOCK_FILE, timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise GBCIError(f"{folder} is in use by another run; wait until it ends, or choose another folder") from None
    try:
        yield
    finally:
        (folder / LOCK_FILE).unlink(missing_ok=True)
        lock.release()


def real_path(path: Path) -> Path:
    """The path without links and dots; a loop of links is followed as far as possible (`Path.resolve` raises)."""
    return Path(os.path.realpath(path))


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's bytes, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest_of(*parts: object) -> str:
    """SHA-256 of the parts' texts, joined by the unit separator (ASCII 31); hexadecimal."""
    return hashlib.sha256("\x1f".join(map(str, parts)).encode()).hexdigest()


def hash_weights(folder: Path) -> str:
    """SHA-256 over the names and bytes of every safetensors and JSON file below ``folder``, in sorted order.

    Links are followed. The JSON files are the configs: another schedule or scaling is another model.
    """
    digest = hashlib.sha256()
    for path in sorted(path for path in _files_below(folder) if path.suffix in (".safetensors", ".json")):
        digest.update(f"{path.relative_to(folder).as_posix()}\n{sha256_of(path)}\n".encode())
    return digest.hexdigest()


def _files_below(folder: Path) -> Iterator[Path]:
    """Yields every file below a folder, also through links; links to a parent folder are not followed."""
    for parent, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(parent)
        folders[:] = [name for name in folders if not f"{real}/".startswith(f"{os.path.realpath(Path(parent, name))}/")]
        yield from (Path(parent, name) for name in names)


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")
