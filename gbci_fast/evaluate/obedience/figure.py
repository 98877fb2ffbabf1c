"""The figure of an obedience evaluation: a row per switch, a panel per kind of evidence."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from gbci_fast.evaluate.obedience.evaluation import CHANCE, CONTROL_BOUND
from gbci_fast.evaluate.obedience.measures import MEASURES

HEIGHT = 0.62  # of a switch, inches


def draw_figure(path: Path, report: Mapping[str, Any]) -> None:
    """Writes the PNG of `evaluate_obedience`'s report."""
    switches = report["switches"]
    figure = Figure(figsize=(11.5, 2.0 + HEIGHT * len(switches)), layout="constrained")
    reading, share, change = figure.subplots(1, 3, sharey=True, width_ratios=(1, 1.6, 1))
    _draw_readings(reading, switches)
    _draw_shares(share, switches)
    _draw_changes(change, switches)
    reading.set_yticks(
        range(len(switches)),
        [f"{name}\n({found['told'][0]} to {found['told'][1]})" for name, found in switches.items()],
        fontsize=7,
    )
    reading.invert_yaxis()
    figure.suptitle(
        f"{report['lesions']} lesions of {report['patients']} patients, told one attribute differently at one seed; "
        "bars: 95 % intervals over patients",
        fontsize=9,
    )
    figure.savefig(path, format="png", dpi=150)


def _draw_readings(axes: Axes, switches: Mapping[str, Any]) -> None:
    for key, label, color, offset in (
        ("real_auc", "real lesions", "gray", -0.2),
        ("auc", "painted", "C0", 0.0),
        ("null_auc", "painted, control word", "C1", 0.2),
    ):
        points = [(i, found["reading"][key]) for i, found in enumerate(switches.values()) if found["reading"]["judged"]]
        _draw(axes, [(i + offset, summary) for i, summary in points], color, label)
    for i, found in enumerate(switches.values()):
        if not found["reading"]["judged"]:
            axes.text(CHANCE, i, " not judged", fontsize=7, va="center", color="gray")
    axes.axvline(CHANCE, color="gray", linestyle=":")
    axes.set_xlim(0.3, 1)
    axes.set_title("reader's AUC, told 1 against told 0", fontsize=8)
    _add_legend(axes)


def _draw_shares(axes: Axes, switches: Mapping[str, Any]) -> None:
    """Draws shares of the difference between real classes, cut at 2.5; 1 would be full obedience."""
    names = ("reading", *MEASURES)
    for j, name in enumerate(names):
        points = []
        for i, found in enumerate(switches.values()):
            entry = found["reading"] if name == "reading" else found["measures"][name]
            if entry.get("share") is not None:
                points.append((i + (j - (len(names) - 1) / 2) * 0.8 / len(names), entry["share"]))
        _draw(axes, points, f"C{j}", name)
    axes.axvline(0, color="gray", linestyle=":")
    axes.axvline(1, color="gray")
    axes.set_xlim(-1, 2.5)
    axes.set_title("shift as a share of the difference between real classes", fontsize=8)
    _add_legend(axes)


def _draw_changes(axes: Axes, switches: Mapping[str, Any]) -> None:
    _draw(axes, [(i, found["change"]) for i, found in enumerate(switches.values())], "C0", "")
    axes.axvline(1, color="gray")
    axes.axvline(CONTROL_BOUND, color="gray", linestyle=":")
    axes.set_xlim(left=0)
    axes.set_title("change of pixels as a share of a seed's", fontsize=8)


def _draw(axes: Axes, points: list[tuple[float, Mapping[str, float | None]]], color: str, label: str) -> None:
    """Draws values with their intervals, at heights."""
    values, heights = [], []
    for y, summary in points:
        value, low, high = (summary[name] for name in ("value", "low", "high"))
        if value is not None:
            values.append(value)
            heights.append(y)
        if low is not None and high is not None:
            axes.plot([low, high], [y, y], color=color, linewidth=1.2)
    if values:
        axes.plot(values, heights, "o", color=color, markersize=4, label=label)
    axes.grid(axis="x", alpha=0.3)


def _add_legend(axes: Axes) -> None:
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.05), ncols=3)
