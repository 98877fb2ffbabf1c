"""Lists files below a folder, also through links: each file once, with a fault where it cannot be inspected."""

import os
import stat
from collections import deque
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class Found:
    """A file below a folder, or an entry that cannot be inspected.

    Attributes:
        path: below the searched folder; parts of it may be links.
        fault: what is wrong, as a phrase that follows the path; None = a regular file.
        mode: ``st_mode`` of the path's target; 0 = unknown.
    """

    path: Path
    fault: str | None = None
    mode: int = stat.S_IFREG


def walk_files(folder: Path) -> list[Found]:
    """Everything below ``folder`` except folders, sorted by path.

    Links to files and folders are followed. A file with several paths is listed once: by a path without links if there
    is one, else by the first. A folder is searched once, so that loops end. Broken links, folders that cannot be listed
    and special files are listed with their fault.
    """
    files: dict[str, tuple[bool, Path]] = {}  # by their real path
    faults: list[Found] = []
    seen: set[str] = set()
    folders, linked = deque([folder]), deque[Path]()
    while folders or linked:  # linked folders come last, after all real ones
        behind_link = not folders
        current = (folders or linked).popleft()
        real = os.path.realpath(current)
        if real in seen:
            continue
        seen.add(real)
        try:
            paths = sorted(current.iterdir())
        except OSError as error:
            faults.append(Found(path=current, fault=_unreadable(error), mode=stat.S_IFDIR))
            continue
        for path in paths:
            mode, is_link, fault = _look_at(path)
            if stat.S_ISDIR(mode):
                (linked if is_link or behind_link else folders).append(path)
            elif fault is not None:
                faults.append(Found(path=path, fault=fault, mode=mode))
            else:
                target = os.path.realpath(path) if is_link else f"{real}/{path.name}"
                files[target] = min(files.get(target, (True, path)), (is_link or behind_link, path))
    found = [Found(path=path) for _, path in files.values()]
    return sorted([*found, *faults], key=lambda entry: entry.path)


def fault_of(path: Path) -> str | None:
    """Why ``path`` is not a usable file, as `Found.fault`; None if it is a regular file."""
    mode, _, fault = _look_at(path)
    if not stat.S_ISDIR(mode):
        return fault
    try:
        next(path.iterdir(), None)
    except OSError as error:
        return _unreadable(error)
    return "is a folder; expected a file"


def _look_at(path: Path) -> tuple[int, bool, str | None]:
    """``st_mode`` of a path's target (0 = unknown), whether the path is a link, and its fault (`Found.fault`)."""
    is_link = False
    try:
        is_link = stat.S_ISLNK(path.lstat().st_mode)
        mode = path.stat().st_mode
    except FileNotFoundError:
        return 0, is_link, "is a link that leads nowhere" if is_link else "does not exist"
    except OSError as error:
        return 0, is_link, _unreadable(error)
    return mode, is_link, None if stat.S_ISREG(mode) or stat.S_ISDIR(mode) else "is no regular file"


def _unreadable(error: OSError) -> str:
    return f"cannot be read: {error.strerror or error}"
