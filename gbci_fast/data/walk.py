"""Files below a folder, through links: each once, and none left out without a word."""

import os
import stat
from collections import deque
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class Found:
    """A file below a folder, or something that cannot be looked at.

    Attributes:
        path: below the folder that was searched; parts of it may be links.
        fault: what is wrong, as a sentence goes on after the path; None = a regular file.
        mode: of what the path leads to, as `os.stat` has it; 0 = not known.
    """

    path: Path
    fault: str | None = None
    mode: int = stat.S_IFREG


def walk_files(folder: Path) -> list[Found]:
    """Everything below `folder` that is no folder, sorted by path.

    Links to files and folders are followed. A file that can be reached by several paths is listed once: by the path
    without a link where there is one, else by the first. A folder is searched once, so that loops end. A link that
    leads nowhere and a folder that cannot be listed are listed with their fault.
    """
    files: dict[str, tuple[bool, Path]] = {}  # by their real path
    faults: list[Found] = []
    seen: set[str] = set()
    folders, linked = deque([folder]), deque[Path]()
    while folders or linked:  # what is behind links comes last, when everything else is known
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
    """Why there is no file at `path`, see `Found.fault`; None where there is one."""
    mode, _, fault = _look_at(path)
    if not stat.S_ISDIR(mode):
        return fault
    try:
        next(path.iterdir(), None)
    except OSError as error:
        return _unreadable(error)
    return "is a folder; expected a file"


def _look_at(path: Path) -> tuple[int, bool, str | None]:
    """The mode of what a path leads to (0 where that is not known), whether it is a link, and what is wrong with it."""
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
