"""Results that that are kept in files, so that a stopped evaluation goes on: pixels, features and scores."""

import hashlib
import json
import zipfile
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from gbci_fast.jobs.files import atomically_open

Arrays = dict[str, np.ndarray]


class Kept:
    """A folder of results; each is under a digest of all that decides it.

    Args:
        folder: made when the first result is kept; None = keep nothing.
    """

    def __init__(self, folder: Path | None):
        self._folder = folder

    def get(self, key: Sequence[Any], compute: Callable[[], Arrays]) -> Arrays:
        """The kept result of `key` (JSON values), or else that of `compute`, which is then kept.

        A file that cannot be read is written again.
        """
        if self._folder is None:
            return compute()
        path = self._folder / f"{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:32]}.npz"
        try:
            with np.load(path, allow_pickle=False) as file:
                return dict(file.items())
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
            found = compute()
        path.parent.mkdir(parents=True, exist_ok=True)
        atomically_open(path, partial(np.savez_compressed, **found))
        return found


@cache
def source_of(*modules: str) -> str:
    """SHA-256 of modules of this package, such as "texture": what other code has computed is not taken."""
    digest = hashlib.sha256()
    for name in modules:
        digest.update((Path(__file__).parent / f"{name}.py").read_bytes())
    return digest.hexdigest()
