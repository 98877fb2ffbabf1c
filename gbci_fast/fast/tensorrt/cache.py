"""Plans that were built before, as files.

A file is a line that names the format, a line of JSON with the key and the plan's size and digest, and the plan. Its
name follows from what it is asked for with; the version of TensorRT is told by the key inside, so that a plan of
another version is met, and replaced.
"""

import fcntl
import hashlib
import json
import logging
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from gbci_fast.errors import GBCIError
from gbci_fast.fast.tensorrt.build import Built
from gbci_fast.jobs.files import atomically

logger = logging.getLogger(__name__)
FORMAT = b"gbci_fast engine 1\n"
MAX_BYTES = 10 * 2**30
_MAX_HEADER = 10_000  # bytes


@dataclass(frozen=True, kw_only=True)
class EngineKey:
    """What a plan depends on.

    Attributes:
        part: "unet" or "decoder".
        shape: of its tensors, as `gbci_fast.fast.export.Bucket` writes it.
        dtype: such as "bfloat16".
        weights: the digest of the weights.
        graph: the digest of all else that decides on the ONNX file.
        flavor, version: of TensorRT.
        capability: the compute capabilities that it is for, such as "8.0+8.6".
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
        """Without the version, which the file itself tells."""
        of = hashlib.sha256(f"{self.weights} {self.graph}".encode()).hexdigest()[:16]
        return f"{self.part}-{self.shape}-{self.dtype}-{self.flavor}-sm{self.capability}-{of}.engine"


def default_folder() -> Path:
    """``gbci_fast/engines`` in the user's cache directory."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gbci_fast" / "engines"


class EngineCache:
    """A folder of plans.

    Args:
        folder: made when it is first written to; `default_folder` by default.
        max_bytes: of all plans together; the least recently used make room for a new one.

    Processes and threads may share it: they build each plan once, and read only whole ones.
    """

    def __init__(self, folder: Path | None = None, max_bytes: int = MAX_BYTES):
        if max_bytes <= 0:
            raise GBCIError(f"max_bytes is {max_bytes}; expected more than 0")
        self.folder = folder or default_folder()
        self.max_bytes = max_bytes

    def path(self, key: EngineKey) -> Path:
        """Where its plan is, or would be."""
        return self.folder / key.file_name

    def get(self, key: EngineKey) -> bytes | None:
        """The plan, or one for several compute capabilities of which the key's is one; None if there is none.

        A damaged or outdated file is none, and one line of the log says so.
        """
        for path in self._candidates(key):
            try:
                header, plan = _read(path)
            except FileNotFoundError:
                continue
            except _UnusableError as error:
                logger.warning("%s is not used and will be built again: %s", path, error)
                continue
            asked, found = asdict(key), header["key"]
            if key.capability in str(found["capability"]).split("+"):
                asked["capability"] = found["capability"]
            differ = [f"{name} {found[name]}, not {asked[name]}" for name in asked if asked[name] != found[name]]
            if differ:
                logger.warning("%s is not used and will be built again: it is of %s", path, ", ".join(differ))
                continue
            with suppress(FileNotFoundError):  # if another process has just removed it
                os.utime(path)
            return plan
        return None

    def siblings(self, key: EngineKey, structure: str) -> Iterator[bytes]:
        """Plans that take the weights of an ONNX file of this `structure`: they were built with others."""
        asked = {**asdict(key), "weights": None}
        for path in sorted(self.folder.glob("*.engine")):
            try:
                header, plan = _read(path)
            except (FileNotFoundError, _UnusableError):
                continue
            if header["structure"] == structure and {**header["key"], "weights": None} == asked:
                yield plan

    def get_or_build(self, key: EngineKey, build: Callable[[], Built]) -> bytes:
        """The plan, built and kept if there is none yet; whoever else asks for it meanwhile waits for it.

        Raises:
            What `build` raises: then nothing is kept.
        """
        before = self._state(key)
        plan = self.get(key)
        if plan is not None:
            return plan
        with self._one_at_a_time(key):
            plan = None if self._state(key) == before else self.get(key)  # the one that we waited for
            if plan is None:
                built = build()
                self._put(key, built)
                plan = built.plan
        return plan

    def _state(self, key: EngineKey) -> tuple[int, int] | None:
        """Changes when the key's file is written."""
        try:
            status = self.path(key).stat()
        except FileNotFoundError:
            return None
        return status.st_ino, status.st_mtime_ns

    def _candidates(self, key: EngineKey) -> list[Path]:
        """The file of the key, and those that are for other compute capabilities as well."""
        own = self.path(key)
        before, after = own.name.split(f"-sm{key.capability}-")
        name = re.compile(f"{re.escape(before)}-sm([^-]+)-{re.escape(after)}")
        others = (path for path in sorted(self.folder.glob("*.engine")) if path != own)
        matches = ((path, name.fullmatch(path.name)) for path in others)
        return [own, *(path for path, match in matches if match and key.capability in match[1].split("+"))]

    def _put(self, key: EngineKey, built: Built) -> None:
        header = {
            "key": asdict(key),
            "size": len(built.plan),
            "sha256": hashlib.sha256(built.plan).hexdigest(),
            "structure": built.structure,
        }

        def write(path: Path) -> None:
            with path.open("wb") as file:
                file.write(FORMAT)
                file.write(json.dumps(header).encode() + b"\n")
                file.write(built.plan)
                file.flush()
                os.fsync(file.fileno())

        path = self.path(key)
        atomically(path, write)
        self._make_room(path)

    def _make_room(self, kept: Path) -> None:
        """Removes the least recently used plans until the rest fits, but never `kept`."""
        found = []
        for path in self.folder.glob("*.engine"):
            try:
                status = path.stat()
            except FileNotFoundError:
                continue
            found.append((status.st_mtime_ns, status.st_size, path))
        total = sum(size for _, size, _ in found)
        for _, size, path in sorted(found):
            if total <= self.max_bytes:
                return
            if path != kept:
                path.unlink(missing_ok=True)
                logger.info("%s made room for a new engine", path)
                total -= size

    @contextmanager
    def _one_at_a_time(self, key: EngineKey) -> Iterator[None]:
        """Holds the lock of a key; the empty file that carries it stays, as a lock on a removed file locks nothing."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f".{key.file_name}.lock"
        with path.open("a") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                logger.info("waiting for another process that builds %s", key.file_name)
                fcntl.flock(file, fcntl.LOCK_EX)
            for left in self.folder.glob(f".{key.file_name}.*.tmp"):  # by a process that was killed
                left.unlink(missing_ok=True)
            yield


class _UnusableError(Exception):
    """A file that is no whole plan; the message says why."""


def _read(path: Path) -> tuple[dict[str, Any], bytes]:
    """The header and the plan behind it.

    Raises:
        FileNotFoundError: it is not there, or no longer.
        _UnusableError: it is no file of this format, or not a whole one, or its bytes have changed.
    """
    with path.open("rb") as file:
        if file.readline(len(FORMAT)) != FORMAT:
            raise _UnusableError("it is no engine of gbci_fast")
        line = file.readline(_MAX_HEADER)
        try:
            header = json.loads(line)
            size, digest, _ = header["size"], header["sha256"], header["structure"]
            EngineKey(**header["key"])
        except (ValueError, KeyError, TypeError):
            raise _UnusableError("its header is damaged") from None
        plan = file.read()
    if len(plan) != size:
        raise _UnusableError(f"its plan has {len(plan)} bytes, and {size} were written")
    if hashlib.sha256(plan).hexdigest() != digest:
        raise _UnusableError("its bytes have changed since it was written")
    return header, plan
