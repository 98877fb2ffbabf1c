"""What tests of several folders use."""

import os
import stat
import threading
from pathlib import Path

import pytest


class RecordedDisk:
    """A folder of which it is noted what ``fsync`` has put on the disk, so that a power cut can be played.

    A file has the content that it had when it was last synced (none: it is empty), a folder the names. Some file
    systems keep names that were never synced: `cut` plays either.
    """

    def __init__(self, root: Path):
        self.root = root
        self._files: dict[int, bytes] = {}
        self._folders: dict[int, dict[str, int]] = {}
        self._kinds: dict[int, bool] = {}  # whether an inode is a folder
        self._held: list[int] = []  # descriptors: an inode is not used again while it is open
        self._lock = threading.Lock()
        self.states: list[tuple[dict, dict, dict]] = []

    def note(self, descriptor: int) -> None:
        """Notes what a call of ``os.fsync`` does."""
        path = Path(f"/proc/self/fd/{descriptor}").readlink()
        if not path.is_relative_to(self.root):
            return
        with self._lock:
            names = self._names()
            self._held.append(os.dup(descriptor))
            status = os.fstat(descriptor)
            self._kinds[status.st_ino] = stat.S_ISDIR(status.st_mode)
            if stat.S_ISDIR(status.st_mode):
                self._folders[status.st_ino] = {entry.name: entry.inode() for entry in os.scandir(path)}
                self._kinds |= {entry.inode(): entry.is_dir() for entry in os.scandir(path)}
            else:
                self._files[status.st_ino] = Path(f"/proc/self/fd/{descriptor}").read_bytes()
            self.states.append((dict(self._files), dict(self._folders), names))

    def cut(self, count: int, target: Path, *, names: bool) -> None:
        """Writes into `target` what a power cut after so many calls of ``fsync`` leaves.

        Args:
            names: whether names are kept that were not synced, up to the next call.
        """
        files, folders, _ = self.states[count - 1]
        if names:
            folders = self.states[count][2]
        self._restore(self.root.stat().st_ino, target, files, folders)

    def close(self) -> None:
        for descriptor in self._held:
            os.close(descriptor)

    def _restore(self, inode: int, target: Path, files: dict, folders: dict) -> None:
        target.mkdir(parents=True)
        for name, below in folders.get(inode, {}).items():
            if self._kinds[below]:
                self._restore(below, target / name, files, folders)
            else:
                (target / name).write_bytes(files.get(below, b""))

    def _names(self) -> dict[int, dict[str, int]]:
        found = {}
        for folder, _, _ in os.walk(self.root):
            entries = list(os.scandir(folder))
            self._kinds |= {entry.inode(): entry.is_dir() for entry in entries}
            found[Path(folder).stat().st_ino] = {entry.name: entry.inode() for entry in entries}
        return found


@pytest.fixture
def recorded_disk(tmp_path, monkeypatch):
    """A `RecordedDisk` that is empty."""
    disk, fsync = RecordedDisk(tmp_path / "disk"), os.fsync
    disk.root.mkdir()

    def recorded(descriptor):
        disk.note(descriptor if isinstance(descriptor, int) else descriptor.fileno())
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", recorded)
    yield disk
    disk.close()
