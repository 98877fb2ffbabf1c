"""A cache of serialized engines: one file per key in the user's cache directory.

A file holds 32 bytes, the SHA-256 of the engine, and then the engine.
"""

import hashlib
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from filelock import FileLock, Timeout
from platformdirs import user_cache_path

from gbci_fast.jobs.files import atomically, make_folder

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class EngineKey:
    """Everything that an engine depends on.

    Attributes:
        part: "unet" or "decoder".
        shape: the static shapes, as ``str`` of `gbci_fast.fast.export.Bucket` for the UNet.
        dtype: such as "bfloat16".
        weights: the digest of the weights.
        graph: the digest of everything else that determines the ONNX file.
        flavor, version: of TensorRT.
        capability: the compute capabilities that the engine is for, such as "8.0+8.6".
    """

    part: str
    shape: str
    dtype: str
    weights: str
    graph: str
    flavor: str
    version: str
    capability: str

    @property
    def file_name(self) -> str:
        of = hashlib.sha256(f"{self.weights} {self.graph} {self.version}".encode()).hexdigest()[:16]
        return f"{self.part}-{self.shape}-{self.dtype}-{self.flavor}-sm{self.capability}-{of}.engine"


def default_folder() -> Path:
    """``gbci_fast/engines`` in the user's cache directory."""
    return user_cache_path("gbci_fast") / "engines"


@dataclass(frozen=True)
class EngineCache:
    """A folder of engines, made at the first write. Processes and threads may share the folder."""

    folder: Path = field(default_factory=default_folder)

    def get_or_build(self, key: EngineKey, build: Callable[[], bytes]) -> bytes:
        """The serialized engine of `key`; calls `build` and keeps the result if there is none yet.

        Other threads and processes that ask for the same key wait meanwhile. An engine for several compute capabilities
        serves each of them. A damaged file is built again.

        Raises:
            Exception: as `build` raises it; then nothing is kept.
        """
        with self._one_at_a_time(key):
            for path in (self.folder / key.file_name, *self._files_for_several(key)):
                engine = _read(path)
                if engine is not None:
                    return engine
            engine = build()
            content = hashlib.sha256(engine).digest() + engine
            atomically(self.folder / key.file_name, lambda temporary: temporary.write_bytes(content))
            return engine

    def _files_for_several(self, key: EngineKey) -> Iterator[Path]:
        """Files of engines for several compute capabilities that include the key's."""
        for path in sorted(self.folder.glob(replace(key, capability="*").file_name)):
            several = path.name.split("-")[-2].removeprefix("sm").split("+")
            if len(several) > 1 and key.capability in several:
                yield path

    @contextmanager
    def _one_at_a_time(self, key: EngineKey) -> Iterator[None]:
        """Holds the lock of a key. The empty lock file is left behind."""
        make_folder(self.folder)
        lock = FileLock(self.folder / f".{key.file_name}.lock")
        try:
            held = lock.acquire(timeout=0)
        except Timeout:
            logger.info("waiting for another process that builds %s", key.file_name)
            held = lock.acquire()
        with held:
            for left in self.folder.glob(f".{key.file_name}.*.tmp"):  # left by a process that was killed
                left.unlink()
            yield


def _read(path: Path) -> bytes | None:
    """The engine in a file; None if the file is missing or damaged."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return None
    digest, engine = content[:32], content[32:]
    if hashlib.sha256(engine).digest() == digest:
        return engine
    logger.warning("%s is damaged and will be built again", path)
    return None
