"""The figure of an adherence evaluation: every condition's balanced accuracy by task, and the guidance sweep."""

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from gbci_fast.evaluate.adherence.evaluation import CHANCE, CONDITIONS, ORIGINAL, SHUFFLED, TOLD
from gbci_fast.evaluate.scorer import CATEGORY

LABELS = {
    "real": "real",
    "reconstruction": "VAE alone",
    "ring_mean": "erased (ring mean)",
    TOLD: "painted, own description",
    SHUFFLED: "painted, another's description",
    ORIGINAL: "the same, against own labels",
}


def draw_figure(path: Path, report: dict[str, Any]) -> None:
    """Writes the PNG of `evaluate_adherence`'s report."""
    tasks, sweep = report["tasks"], report["sweep"]
    heights = [3.4] + [3.0] * bool(sweep)
    figure = Figure(figsize=(max(7.0, 2.4 * len(tasks)), sum(heights)), layout="constrained")
    panels = figure.subplots(len(heights), 1, squeeze=False, height_ratios=heights)[:, 0]
    _draw_conditions(panels[0], report)
    if sweep:
        _draw_sweep(panels[1], sweep, tasks)
    figure.savefig(path, format="png", dpi=150)


def _draw_conditions(axes: Axes, report: dict[str, Any]) -> None:
    tasks = report["tasks"]
    used = [name for name in CONDITIONS if any(name in found for found in tasks.values())]
    for j, name in enumerate(used):
        places, values, errors = [], [], []
        for i, found in enumerate(tasks.values()):
            summary = found.get(name, {}).get("balanced_accuracy", {"value": None})
            if summary["value"] is not None:
                places.append(i + (j - (len(used) - 1) / 2) * 0.8 / len(used))
                values.append(summary["value"])
                errors.append(_error(summary))
        if values:
            axes.errorbar(places, values, np.array(errors).T, fmt="o", capsize=3, markersize=5, label=LABELS[name])
    real = {task.removeprefix(CATEGORY): found["real"] for task, found in tasks.items()}
    ticks = [f"{name}\n{found['positive']} positive, {found['negative']} negative" for name, found in real.items()]
    axes.set_xticks(range(len(tasks)), ticks, fontsize=8)
    axes.set_xlim(-0.5, len(tasks) - 0.5)
    _finish(axes, f"{report['lesions']} lesions of {report['patients']} patients; bars: 95 % intervals over patients")


def _draw_sweep(axes: Axes, sweep: list[dict[str, Any]], tasks: dict[str, Any]) -> None:
    """Draws a line per task; faint where the scorer is not above chance on real lesions and cannot judge."""
    for i, (task, found) in enumerate(tasks.items()):
        judged = (found["real"]["balanced_accuracy"]["low"] or 0) > CHANCE
        for name, style in ((TOLD, "o-"), (SHUFFLED, "s--")):
            points = [(row["guidance"], row[task][name]["balanced_accuracy"]) for row in sweep if name in row[task]]
            points = [(guidance, summary) for guidance, summary in points if summary["value"] is not None]
            if points:
                told = task.removeprefix(CATEGORY) + ("" if name == TOLD else ", shuffled")
                axes.errorbar(
                    [guidance for guidance, _ in points],
                    [summary["value"] for _, summary in points],
                    np.array([_error(summary) for _, summary in points]).T,
                    fmt=style,
                    color=f"C{i}",
                    capsize=2,
                    alpha=1.0 if judged else 0.25,
                    label=told if judged else f"{told} (not judged)",
                )
    axes.set_xlabel("guidance scale")
    _finish(axes, "by guidance")


def _error(summary: dict[str, float | None]) -> tuple[float, float]:
    """The lengths of the error bar below and above the value; 0 without an interval or where the value exceeds it."""
    value, low, high = (summary[name] for name in ("value", "low", "high"))
    if value is None or low is None or high is None:
        return 0.0, 0.0
    return max(0.0, value - low), max(0.0, high - value)


def _finish(axes: Axes, title: str) -> None:
    axes.axhline(CHANCE, color="gray", linestyle=":")
    axes.set_ylabel("balanced accuracy")
    axes.set_title(title, fontsize=9)
    axes.grid(axis="y", alpha=0.3)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
