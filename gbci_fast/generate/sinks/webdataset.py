"""WebDataset shards: tar files of many samples, in the order of the plan, for data sets of more images than files.

A sample is ``<image_id>.png``, the image as the sink `png` makes it, ``<image_id>.mask.png``, where it was painted,
``<image_id>.findings.png``, the pixels of its lesions, and ``<image_id>.json``, its row of the manifest. Every sample
has these members, and every JSON the same keys and types. No member has a date or an owner: the same samples are the
same bytes.
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
    """Of a shard, counted from 0, relative to the job's output."""
    return Path("shards") / f"{number:06d}.tar"


class Shard:
    """A tar file that is open for more samples; `end` bytes of it are members."""

    def __init__(self, tar: tarfile.TarFile):
        self._tar = tar

    @property
    def end(self) -> int:
        return self._tar.fileobj.tell()

    def add(self, key: str, sample: Mapping[str, bytes]) -> None:
        """Adds the members of a sample, by their suffixes; a key must hold no dot."""
        for suffix, content in sample.items():
            member = tarfile.TarInfo(f"{key}.{suffix}")
            member.size, member.mode = len(content), 0o644
            self._tar.addfile(member, BytesIO(content))


@contextmanager
def open_shard(path: Path, end: int) -> Iterator[Shard]:
    """Goes on behind the first `end` bytes of a shard's members, and drops what follows; 0 begins it.

    Left without an exception, the file is a whole tar, and on the disk. After one, `close_shard` makes it one again.

    Raises:
        GBCIError: the file is gone, or shorter than `end`.
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
        os.fsync(file.fileno())  # before it is noted that the samples are there
    if not end:
        sync(path.parent)


def is_closed(path: Path, end: int) -> bool:
    """Whether a shard of `end` bytes of members is a whole tar: zeros up to the end of a record follow them."""
    size = -(-(end + 2 * tarfile.BLOCKSIZE) // tarfile.RECORDSIZE) * tarfile.RECORDSIZE
    if not path.is_file() or path.stat().st_size != size:
        return False
    with path.open("rb") as file:
        file.seek(end)
        return not any(file.read())


def close_shard(path: Path, end: int) -> None:
    """Leaves the first `end` bytes of a shard's members; without any, no file, and no empty folder."""
    if end:
        with open_shard(path, end):
            return
    path.unlink(missing_ok=True)
    with suppress(OSError):  # other shards are in it
        path.parent.rmdir()
