"""The common parts of every evaluation's report: versions, targets, and writing and reading the files."""

import importlib.metadata
import json
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gbci_fast.errors import GBCIError
from gbci_fast.jobs.files import atomically, real_path

ABOUT_TARGETS = (
    "Each bound is a target of the packaged model on fold C or the test images of CBIS-DDSM and CDD-CESM. For another "
    "model, other images or other settings it is a figure to compare with, and no verdict."
)
PACKAGES = ("gbci_fast", "torch", "diffusers", "numpy", "scipy", "scikit-image")


def versions() -> dict[str, str]:
    """The versions of Python and of the packages that affect the figures."""
    return {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in PACKAGES}


def target(name: str, value: float | None, bound: float, *, at_least: bool, note: str = "") -> dict[str, Any]:
    """An entry of a report's ``targets``; `value` is None where the data cannot judge it, for the reason in `note`."""
    met = None if value is None else (value >= bound if at_least else value <= bound)
    return {"name": name, "value": value, "bound": bound, "at_least": at_least, "met": met, "note": note}


def figure_path(output: Path, figure: Path | None) -> Path:
    """The path of the figure, by default beside the report; checks both paths before the long sampling starts.

    Raises:
        GBCIError: report and figure are one file, a path is a folder, or a parent folder cannot be made.
    """
    figure = figure or output.with_suffix(".png")
    if real_path(figure) == real_path(output):
        raise GBCIError(f"report and figure are both {output}; expected two files")
    for path in (output, figure):
        if path.is_dir():
            raise GBCIError(f"{path} is a folder; expected a file name")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise GBCIError(f"{path.parent} cannot be made: {error.strerror}") from error
    return figure


def write_report(output: Path, figure: Path, report: dict[str, Any], draw: Callable[[Path], object]) -> None:
    """Writes the figure by ``draw(path)``, then the report as JSON; each file is written whole or not at all.

    Raises:
        ValueError: the report holds NaN or infinity; then neither file is written.
    """
    text = json.dumps(report, indent=1, allow_nan=False) + "\n"
    atomically(figure, draw)
    atomically(output, lambda path: path.write_text(text, encoding="utf-8"))


def read_report(path: Path) -> dict[str, Any]:
    """Reads a report of `write_report`.

    Raises:
        GBCIError: the file cannot be read, or is not a report.
    """
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise GBCIError(f"{path} cannot be read as a report: {error}") from error
    if not isinstance(report, dict) or not isinstance(report.get("evaluation"), str):
        raise GBCIError(f"{path} names no evaluation; expected a report of `gbci-fast evaluate`")
    return report


def place(target: dict[str, Any]) -> str:
    """The side of its bound on which a target's value lies: "inside", "outside" or "not judged"."""
    return {True: "inside", False: "outside", None: "not judged"}[target["met"]]
