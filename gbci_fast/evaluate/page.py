"""One HTML page of several reports, figures inside: a file that can be sent around."""

import base64
import json
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from gbci_fast.errors import GBCIError
from gbci_fast.evaluate.report import ABOUT_TARGETS, place, read_report
from gbci_fast.jobs.files import atomically

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1100px; margin: 2em auto; padding: 0 1em; color: #222; }
table { border-collapse: collapse; margin: 1em 0; } th, td { padding: .25em .8em; border-bottom: 1px solid #ddd; }
th { text-align: left; } td.number { text-align: right; font-variant-numeric: tabular-nums; }
.inside { color: #176f2c; } .outside { font-weight: 600; } .open { color: #777; }
img { max-width: 100%; } pre { overflow-x: auto; background: #f6f6f6; padding: 1em; font-size: 12px; }
"""
LEAD = "Measured by <code>gbci-fast evaluate</code>. For research data sets, not for diagnosis."


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
    loaded = [(section, read_report(section.report)) for section in sections]
    for section, report in loaded:
        targets = report.get("targets", [])
        if not isinstance(targets, list) or not all(map(_is_target, targets)):
            raise GBCIError(f"{section.report} has damaged targets; expected a report of `gbci-fast evaluate`")
    rows = "".join(_target_row(report["evaluation"], one) for _, report in loaded for one in report.get("targets", ()))
    head = "<tr><th>evaluation</th><th>figure</th><th>measured</th><th>bound</th><th></th><th>note</th></tr>"
    body = "".join(_section_html(section, report) for section, report in loaded)
    html = (
        '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"><title>gbci_fast: evaluation</title>'
        f"<style>{STYLE}</style></head><body><h1>How good the lesions are</h1><p>{LEAD}</p>"
        f"<h2>Beside the packaged model's targets</h2><p>{ABOUT_TARGETS}</p>"
        f"<table>{head}{rows}</table>{body}</body></html>\n"
    )
    atomically(path, lambda temporary: temporary.write_text(html, encoding="utf-8"))


def _is_target(found: object) -> bool:
    """Whether `found` has the keys and types of `target`."""
    if not isinstance(found, dict):
        return False
    types: dict[str, Any] = {"name": str, "value": int | float | None, "bound": int | float, "note": str}
    types |= {"at_least": bool, "met": bool | None}
    return types.keys() <= found.keys() and all(isinstance(found[key], kind) for key, kind in types.items())


def _target_row(evaluation: str, one: dict[str, Any]) -> str:
    word = place(one)
    kind = "open" if one["met"] is None else word
    value = "" if one["value"] is None else f"{one['value']:.4g}"
    bound = f"{'≥' if one['at_least'] else '≤'} {one['bound']:.4g}"
    numbers = "".join(f'<td class="number">{escape(text)}</td>' for text in (value, bound))
    return (
        f"<tr><td>{escape(evaluation)}</td><td>{escape(one['name'])}</td>{numbers}"
        f'<td class="{kind}">{word}</td><td>{escape(one["note"])}</td></tr>'
    )


def _section_html(section: Section, report: dict[str, Any]) -> str:
    try:
        image = base64.b64encode(section.figure.read_bytes()).decode("ascii")
    except OSError as error:
        raise GBCIError(f"{section.figure} cannot be read: {error.strerror}") from error
    name = escape(report["evaluation"])
    short = {key: value for key, value in report.items() if not _is_long(value)}
    text = escape(json.dumps(short, indent=1))
    return (
        f'<h2 id="{name}">{name}</h2><img alt="{name}" src="data:image/png;base64,{image}">'
        f"<details><summary>{escape(section.report.name)}, without its long lists</summary><pre>{text}</pre></details>"
    )


def _is_long(value: Any) -> bool:
    return isinstance(value, list) and len(json.dumps(value)) > 20_000
