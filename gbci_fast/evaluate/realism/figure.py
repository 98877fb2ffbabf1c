"""The figure of a realism evaluation: AUCs of all pairs and judges, beside the line of chance. It shows no pixels."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

MARKERS = {"network": "o", "boosting": "s"}


def draw_figure(path: Path, report: dict[str, Any]) -> None:
    """Writes the PNG from a report of `evaluate_realism`: whole lesions by pair, and all other comparisons."""
    rows = report["results"]
    plain = [row for row in rows if (row["region"], row["features"]) == ("whole", "all")]
    rest = [row for row in rows if row not in plain]
    groups = list(rows[0]["auc"])
    heights = [1.2 + 0.42 * len(part) for part in (plain, rest) if part]
    figure = Figure(figsize=(9, sum(heights) + 0.5), layout="constrained")
    axes = figure.subplots(len(heights), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0]
    _draw(axes[0], plain, groups, "whole lesions")
    if rest:
        _draw(axes[1], rest, groups, "parts of the lesion, and fewer features")
    judged = report["sets"]["judged"]["pooled"]
    axes[0].legend(fontsize=8, loc="lower right")
    axes[-1].set_xlabel("AUC; 0.5: the judge cannot tell the two sets apart")
    figure.suptitle(
        f"{judged['lesions']} lesions of {judged['patients']} patients, {report['judged_on']}; 95 % over patients",
        fontsize=9,
    )
    figure.savefig(path, format="png", dpi=130)


def _draw(axes: Axes, rows: Sequence[dict[str, Any]], groups: Sequence[str], title: str) -> None:
    for i, group in enumerate(groups):
        for y, row in enumerate(rows):
            auc, place = row["auc"][group], y + 0.2 * (i - (len(groups) - 1) / 2)
            if auc["value"] is None:
                continue
            if auc["low"] is not None:
                axes.plot([auc["low"], auc["high"]], [place, place], color=f"C{i}", linewidth=1.5)
            label = group if y == 0 else None
            axes.plot(auc["value"], place, MARKERS[row["judge"]], color=f"C{i}", markersize=4, label=label)
    axes.axvline(0.5, color="gray", linewidth=0.8)
    axes.set_yticks(range(len(rows)), [_label(row) for row in rows], fontsize=8)
    axes.set_title(title, fontsize=9)
    axes.invert_yaxis()
    axes.grid(axis="x", alpha=0.3)


def _label(row: dict[str, Any]) -> str:
    sees = [row["region"]] * (row["region"] != "whole") + [row["features"]] * (row["features"] != "all")
    return ", ".join([f"{row['first']}/{row['second']}", row["judge"], *sees])
