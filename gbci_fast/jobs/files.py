"""Files that appear whole or not at all and survive a power cut, folders that one process writes to, and digests."""

import errno
import hashlib
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from gbci_fast.errors import GBCIError

LOCK_FILE = ".lock"
_TEMPORARY = re.compile(r"\..+\.\d+\.tmp")


def atomically(path: Path, write: Callable[[Path], object], *, mode: int | None = None) -> None:
    """Calls ``write(temporary)`` on a sibling name and renames it to `path`.

    When it returns, the file and its name are on the disk (``fsync``): a power cut leaves the old file or the new one.

    Args:
        mode: of the file, such as 0o600; None = as the process creates files.

    Raises:
        OSError: with the path as its file name, also where the disk is full.
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


def replace_folder(path: Path, write: Callable[[Path], object]) -> None:
    """Calls ``write(temporary)`` on a sibling name and puts that folder where `path` is: never half-written.

    When it returns, its files are on the disk.
    """
    temporary, aside = _temporary(path), _temporary(path.with_name(f"{path.name}.old"))
    with naming_file(path):
        try:
            write(temporary)
            sync_tree(temporary)
            if path.exists():  # a folder cannot take another's place in one step
                path.replace(aside)
            temporary.replace(path)
            sync(path.parent)
        finally:
            for folder in (temporary, aside):
                shutil.rmtree(folder, ignore_errors=True)


def sync(path: Path) -> None:
    """Waits until the content of a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(path: Path) -> None:
    """`sync` of a file, or of a folder and everything below."""
    for below in sorted(path.rglob("*")):
        sync(below)
    sync(path)


def make_folder(path: Path) -> None:
    """Makes a folder and those above it, whose names are on the disk when this returns."""
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
    """Names `path` in an OSError that names no file: a write to an open file ("No space left on device") does not."""
    try:
        yield
    except OSError as error:
        first = error
        while first.errno is None and isinstance(first.__cause__, OSError):  # pydicom packs it into another
            first = first.__cause__
        if first.errno is None or error.filename is not None:
            raise
        raise OSError(first.errno, first.strerror, str(path)) from error


def is_temporary(name: str) -> bool:
    """Whether `atomically` or `replace_folder` writes under such a name; a kill leaves it behind."""
    return _TEMPORARY.fullmatch(name) is not None


def is_empty(folder: Path) -> bool:
    """Whether a folder holds no file but what killed processes leave there, if it is there at all."""
    files = (name for _, _, names in os.walk(folder) for name in names)
    return all(name == LOCK_FILE or is_temporary(name) for name in files)


def remove_temporaries(folder: Path) -> None:
    """Removes what killed processes left below `folder`; nobody may be writing there."""
    for parent, folders, names in os.walk(folder):
        for name in filter(is_temporary, names):
            Path(parent, name).unlink(missing_ok=True)
        for name in list(filter(is_temporary, folders)):
            shutil.rmtree(Path(parent, name))
            folders.remove(name)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keeps every other caller out of an existing folder while the block runs.

    The operating system's lock (``flock``), so that a process that is killed leaves none behind; its `LOCK_FILE` may
    stay, and means nothing by itself.

    Raises:
        GBCIError: somebody else is in there.
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
    """The path without links and dots; of a loop of links, as far as it can be followed (`Path.resolve` raises)."""
    return Path(os.path.realpath(path))


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's bytes, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hash_weights(folder: Path) -> str:
    """SHA-256 over the names and bytes of every safetensors and JSON file below `folder`, in sorted order.

    Links are followed.

    The JSON files are the configs: another schedule or scaling is another model.
    """
    digest = hashlib.sha256()
    for path in sorted(path for path in _files_below(folder) if path.suffix in (".safetensors", ".json")):
        digest.update(f"{path.relative_to(folder).as_posix()}\n{sha256_of(path)}\n".encode())
    return digest.hexdigest()


def _files_below(folder: Path) -> Iterator[Path]:
    """Every name of a file, through links; those that lead back up are not followed."""
    for parent, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(parent)
        folders[:] = [name for name in folders if not f"{real}/".startswith(f"{os.path.realpath(Path(parent, name))}/")]
        yield from (Path(parent, name) for name in names)


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")
