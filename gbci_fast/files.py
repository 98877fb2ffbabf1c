"""Files that appear whole or not at all, folders that one process writes to, and digests."""

import fcntl
import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from gbci_fast.errors import GBCIError

LOCK_FILE = ".lock"
PROGRESS_FOLDER = ".progress"  # in the output of a job that can be resumed


def atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Calls ``write(temporary)`` on a sibling name and renames it to `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keeps every other caller out of an existing folder while the block runs.

    The operating system's lock (``flock``), so that a process that is killed leaves none behind; its `LOCK_FILE` may
    stay, and means nothing by itself.

    Raises:
        GBCIError: somebody else is in there.
    """
    path = folder / LOCK_FILE
    while True:
        with path.open("a") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise GBCIError(
                    f"{folder} is in use by another run; wait until it ends, or choose another folder"
                ) from None
            if not _is_at(file.fileno(), path):
                continue  # its last holder removed it between our two steps
            try:
                yield
            finally:
                path.unlink(missing_ok=True)
            return


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's bytes, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hash_weights(folder: Path) -> str:
    """SHA-256 over the names and bytes of every safetensors and JSON file below `folder`, in sorted order.

    The JSON files are the configs: another schedule or scaling is another model.
    """
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.suffix in (".safetensors", ".json")):
        digest.update(f"{path.relative_to(folder).as_posix()}\n{sha256_of(path)}\n".encode())
    return digest.hexdigest()
