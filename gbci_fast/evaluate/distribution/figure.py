"""The figure of a distribution evaluation: values over the null's histograms, spectra, and crops side by side."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from gbci_fast.evaluate.distribution.evaluation import REAL
from gbci_fast.evaluate.lesions import Crops

TITLES = {
    "frechet": "Fréchet distance",
    "kernel": "kernel distance",
    "precision": "precision",
    "recall": "recall",
    "density": "density",
    "coverage": "coverage",
}
STRIP = 12  # crops in a row


def draw_figure(path: Path, report: dict[str, Any], sets: Mapping[str, Crops]) -> None:
    """Writes the PNG.

    Args:
        report: of `evaluate_distribution`.
        sets: real crops and the columns; up to `STRIP` crops of each are shown.
    """
    extractors = report["extractors"]
    colors = {name: f"C{i}" for i, name in enumerate(report["sets"])}
    heights = [*(2.2 for _ in extractors), 2.6, 0.95 * len(sets)]
    figure = Figure(figsize=(14, sum(heights) + 0.6), layout="constrained")
    grid = figure.add_gridspec(len(heights), 1, height_ratios=heights)
    for row, extractor in enumerate(extractors):
        places = grid[row].subgridspec(1, len(TITLES))
        for column, (key, title) in enumerate(TITLES.items()):
            axes = figure.add_subplot(places[column])
            _draw_null(axes, extractor["statistics"][key], colors)
            axes.set_title(f"{title}\n{extractor['name']}", fontsize=8)
    places = grid[len(extractors)].subgridspec(1, 3)
    axes = figure.add_subplot(places[0])
    _draw_null(axes, report["diversity"], colors)
    axes.set_title("MS-SSIM of pairs, less that of real pairs\nleft of 0: more diverse", fontsize=8)
    _draw_spectra(figure.add_subplot(places[1]), report["spectra"], colors)
    _draw_means(figure.add_subplot(places[2]), report["appearance"]["seam"], colors)
    _draw_strip(figure.add_subplot(grid[len(extractors) + 1]), sets)
    figure.savefig(path, format="png", dpi=120)


def _draw_null(axes: Axes, statistic: dict[str, Any], colors: Mapping[str, str]) -> None:
    """Draws the real halves' histogram, and each column's median (line) and central 95 % of halvings (bar)."""
    axes.hist(statistic["null"]["values"], bins=20, color=colors[REAL], alpha=0.5, label="real halves")
    top = axes.get_ylim()[1]
    for i, (name, column) in enumerate(statistic["columns"].items()):
        splits, height = column["splits"], top * (1.05 + 0.08 * i)
        axes.axvline(splits["median"], color=colors[name], label=name)
        axes.plot([splits["low"], splits["high"]], [height, height], color=colors[name], linewidth=3)
    axes.set_yticks([])
    axes.tick_params(labelsize=6)
    axes.legend(fontsize=5, frameon=False)


def _draw_spectra(axes: Axes, spectra: dict[str, Any], colors: Mapping[str, str]) -> None:
    for name, power in spectra["log_power"].items():
        axes.loglog(spectra["frequencies"], np.exp(power), color=colors[name], label=name)
    axes.set_xlabel("cycles per crop", fontsize=7)
    axes.set_title("power spectrum", fontsize=8)
    axes.tick_params(labelsize=6, which="both")
    axes.legend(fontsize=6, frameon=False)


def _draw_means(axes: Axes, seam: dict[str, Any], colors: Mapping[str, str]) -> None:
    rows = {REAL: seam["real"]} | seam["columns"]
    axes.axvspan(*seam["real_range_of_patient_means"], color=colors[REAL], alpha=0.15, label="95 % of real patients")
    for i, (name, row) in enumerate(rows.items()):
        axes.plot([row["low"], row["high"]], [i, i], color=colors[name], linewidth=3)
        axes.plot(row["mean"], i, "o", color=colors[name])
    axes.set_yticks(range(len(rows)), rows, fontsize=7)
    axes.set_title("seam at the mask's outline (log ratio; 0: none)", fontsize=8)
    axes.tick_params(axis="x", labelsize=6)
    axes.legend(fontsize=6, frameon=False)


def _draw_strip(axes: Axes, sets: Mapping[str, Crops]) -> None:
    """Draws a row of crops per set; in sets of equal length, crops below each other are of one lesion."""
    rows = []
    for crops in sets.values():
        picked = crops.pixels[np.linspace(0, len(crops) - 1, min(STRIP, len(crops))).round().astype(int)]
        blank = np.ones((STRIP - len(picked), *picked.shape[1:]), np.float32)
        rows.append(np.concatenate([*picked, *blank], axis=1))
    side = len(rows[0])
    axes.imshow(np.concatenate(rows), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    axes.set_yticks([side * (i + 0.5) for i in range(len(rows))], sets, fontsize=7)
    axes.set_xticks([])
