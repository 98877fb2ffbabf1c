"""One HTML page of several reports, figures inside: a file that can be sent around."""

import base64
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from gbci_fast.errors import GBCIError
from gbci_fast.evaluate.report import ABOUT_TARGETS, place, read_report
from gbci_fast.jobs.files import atomically

PAGES = Environment(
    loader=FileSystemLoader(Path(__file__).parent),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    keep_trailing_newline=True,
)


@dataclass(frozen=True, kw_only=True)
class Section:
    """One evaluation: its report (JSON) and figure (PNG) on disk."""

    report: Path
    figure: Path


def write_page(path: Path, sections: Sequence[Section]) -> None:
    """Writes the page: the targets of all reports, then figure and report of each.

    Raises:
        GBCIError: a report or a figure cannot be read.
    """
    shown = [_shown(section) for section in sections]
    html = PAGES.get_template("page.html").render(sections=shown, about_targets=ABOUT_TARGETS, place=place)
    atomically(path, lambda temporary: temporary.write_text(html, encoding="utf-8"))


def _shown(section: Section) -> dict[str, Any]:
    """What the page shows of a section."""
    report = read_report(section.report)
    targets = report.get("targets", [])
    if not isinstance(targets, list) or not all(map(_is_target, targets)):
        raise GBCIError(f"{section.report} has damaged targets; expected a report of `gbci-fast evaluate`")
    try:
        figure = section.figure.read_bytes()
    except OSError as error:
        raise GBCIError(f"{section.figure} cannot be read: {error.strerror}") from error
    return {
        "name": report["evaluation"],
        "targets": targets,
        "figure": base64.b64encode(figure).decode("ascii"),
        "file": section.report.name,
        "text": json.dumps({key: value for key, value in report.items() if not _is_long(value)}, indent=1),
    }


def _is_target(found: object) -> bool:
    """Whether `found` has the keys and types of `target`."""
    if not isinstance(found, dict):
        return False
    types: dict[str, Any] = {"name": str, "value": int | float | None, "bound": int | float, "note": str}
    types |= {"at_least": bool, "met": bool | None}
    return types.keys() <= found.keys() and all(isinstance(found[key], kind) for key, kind in types.items())


def _is_long(value: Any) -> bool:
    return isinstance(value, list) and len(json.dumps(value)) > 20_000
