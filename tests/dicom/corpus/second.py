"""A second implementation of the display: dcmtk's command-line tools, if installed."""

import re
import shutil
import subprocess
from pathlib import Path

import numpy as np

MISSING = "dcmtk (dcmj2pnm, dcml2pnm) is not installed"


def is_installed() -> bool:
    """Whether dcmtk's renderers are on the path."""
    return all(shutil.which(tool) for tool in ("dcmj2pnm", "dcml2pnm"))


def version() -> str | None:
    """dcmtk's version, such as "3.6.7"; ``None`` if it is not installed."""
    if not is_installed():
        return None
    text = subprocess.run(["dcmj2pnm", "--version"], capture_output=True, text=True, check=True).stdout
    return re.search(r"v(\d+(?:\.\d+)+)", text)[1]


def render(path: Path, tool: str, *options: str) -> np.ndarray:
    """dcmtk's display of a file, float64 [H, W] in [0, 1] in steps of 1 / 65535, without overlays."""
    command = [tool, "--quiet", "--no-overlays", "--write-16-bit-pnm", *options, str(path)]
    result = subprocess.run(command, capture_output=True, check=True)
    magic, columns, rows, white, *values = result.stdout.split()
    assert (magic, white) == (b"P2", b"65535")
    return np.array(values, dtype=np.float64).reshape(int(rows), int(columns)) / 65535


def difference(unit: np.ndarray, other: np.ndarray, ignored: np.ndarray | None = None) -> int:
    """The largest difference of two displays in levels of 16 bits, outside ``ignored``."""
    levels = np.abs(np.rint(np.float64(unit) * 65535) - np.rint(other * 65535))
    return int(levels.max() if ignored is None else levels[~ignored].max())
