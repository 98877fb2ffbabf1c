"""The figure of a distribution evaluation: values over the null's histograms, spectra, and crops side by side."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure

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


def draw_figure(path: Path, report: dict[str, Any], blocks: Mapping[str, Mapping[str, Crops]]) -> None:
    """Writes the PNG, one part per block of the report.

    Args:
        report: of `evaluate_blocks`.
        blocks: {block: real crops and the columns}; up to `STRIP` crops of each are shown.
    """
    heights = {name: _heights(block) for name, block in report["blocks"].items()}
    totals = [sum(rows) + 0.6 for rows in heights.values()]
    figure = Figure(figsize=(14, sum(totals)), layout="constrained")
    parts = figure.subfigures(len(totals), 1, height_ratios=totals, squeeze=False)
    for part, (name, block) in zip(parts[:, 0], report["blocks"].items(), strict=True):
        part.suptitle(name, fontsize=11)
        _draw_block(part, block, blocks[name], heights[name])
    figure.savefig(path, format="png", dpi=100)


def _heights(block: dict[str, Any]) -> list[float]:
    return [*(2.2 for _ in block["extractors"]), 2.6, 0.95 * len(block["sets"])]


def _draw_block(figure: SubFigure, block: dict[str, Any], sets: Mapping[str, Crops], heights: Sequence[float]) -> None:
    extractors = block["extractors"]
    colors = {name: f"C{i}" for i, name in enumerate(block["sets"])}
    grid = figure.add_gridspec(len(heights), 1, height_ratios=heights)
    for row, extractor in enumerate(extractors):
        places = grid[row].subgridspec(1, len(TITLES))
        for column, (key, title) in enumerate(TITLES.items()):
            if key in extractor["statistics"]:
                axes = figure.add_subplot(places[column])
                _draw_null(axes, extractor["statistics"][key], colors)
                axes.set_title(f"{title}\n{extractor['name']}", fontsize=8)
    places = grid[len(extractors)].subgridspec(1, 4)
    axes = figure.add_subplot(places[0])
    _draw_null(axes, block["diversity"], colors)
    axes.set_title("MS-SSIM of pairs, less that of real pairs\nleft of 0: more diverse", fontsize=8)
    _draw_spectra(figure.add_subplot(places[1]), block["spectra"], colors)
    power = block["appearance"]["fine_power"]
    _draw_means(figure.add_subplot(places[2]), power, colors, "log power beyond 0.25 cycles per pixel")
    seam = block["appearance"]["seam"]
    _draw_means(figure.add_subplot(places[3]), seam, colors, "seam at the mask's outline (log ratio; 0: none)")
    _draw_strip(figure.add_subplot(grid[len(extractors) + 1]), sets)


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
    axes.set_xlabel("cycles per model pixel", fontsize=7)
    axes.set_title("power spectrum", fontsize=8)
    axes.tick_params(labelsize=6, which="both")
    axes.legend(fontsize=6, frameon=False)


def _draw_means(axes: Axes, found: dict[str, Any], colors: Mapping[str, str], title: str) -> None:
    rows = {REAL: found["real"]} | found["columns"]
    axes.axvspan(*found["real_range_of_patient_means"], color=colors[REAL], alpha=0.15, label="95 % of real patients")
    for i, (name, row) in enumerate(rows.items()):
        axes.plot([row["low"], row["high"]], [i, i], color=colors[name], linewidth=3)
        axes.plot(row["mean"], i, "o", color=colors[name])
    axes.set_yticks(range(len(rows)), rows, fontsize=7)
    axes.set_title(title, fontsize=8)
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
