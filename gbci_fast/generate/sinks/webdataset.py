"""WebDataset shards: tar files of many samples in the order of the plan, for data sets too large for single files.

Every sample has four members:
    ``<image_id>.png``: the image as the sink `png` encodes it.
    ``<image_id>.mask.png``: the painted pixels.
    ``<image_id>.findings.png``: the pixels of its lesions.
    ``<image_id>.json``: its row of the manifest, always with the same keys and types.

No member has a date or an owner, so that the same samples give the same bytes.
"""

import os
import tarfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from io import BytesIO
from pathlib import Path

from gbci_fast.errors import GBCIError
from gbci_fast.jobs.files import make_folder, naming_file, sync


def shard_path(number: int) -> Path:
    """The path of a shard, relative to the job's output; shards count from 0."""
    return Path("shards") / f"{number:06d}.tar"


class Shard:
    """A tar file that is open for more samples; its first `end` bytes are members."""

    def __init__(self, tar: tarfile.TarFile):
        self._tar = tar

    @property
    def end(self) -> int:
        return self._tar.fileobj.tell()

    def add(self, key: str, sample: Mapping[str, bytes]) -> None:
        """Adds the members of a sample, {suffix: content}; the key must not contain a dot."""
        for suffix, content in sample.items():
            member = tarfile.TarInfo(f"{key}.{suffix}")
            member.size, member.mode = len(content), 0o644
            self._tar.addfile(member, BytesIO(content))


@contextmanager
def open_shard(path: Path, end: int) -> Iterator[Shard]:
    """Opens a shard to append after its first `end` bytes, dropping what follows; `end` = 0 starts a new shard.

    Without an exception, the file is then a complete tar, flushed to disk. After an exception, `close_shard` repairs
    it.

    Raises:
        GBCIError: the file is missing, or shorter than `end`.
    """
    make_folder(path.parent)
    size = path.stat().st_size if path.exists() else 0
    if size < end:
        raise GBCIError(f"{path} has {size} bytes; expected at least {end}: put it back, or start again elsewhere")
    with naming_file(path), path.open("r+b" if end else "wb") as file:
        file.truncate(end)
        file.seek(end)
        with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
            yield Shard(tar)
        file.flush()
        os.fsync(file.fileno())  # before the batch is marked as finished
    if not end:
        sync(path.parent)


def is_closed(path: Path, end: int) -> bool:
    """Whether a shard is a complete tar: `end` bytes of members, then zeros up to the end of a record."""
    size = -(-(end + 2 * tarfile.BLOCKSIZE) // tarfile.RECORDSIZE) * tarfile.RECORDSIZE
    if not path.is_file() or path.stat().st_size != size:
        return False
    with path.open("rb") as file:
        file.seek(end)
        return not any(file.read())


def close_shard(path: Path, end: int) -> None:
    """Cuts a shard to its first `end` bytes of members; `end` = 0 removes the file, and its folder if empty."""
    if end:
        with open_shard(path, end):
            return
    path.unlink(missing_ok=True)
    with suppress(OSError):  # other shards are in it
        path.parent.rmdir()
