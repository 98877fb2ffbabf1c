"""Files that appear whole or not at all, and their digests."""

import hashlib
import os
from collections.abc import Callable
from pathlib import Path


def atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Calls ``write(temporary)`` on a sibling name and renames it to `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


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
