"""The figure of a paired evaluation: examples side by side above the spread of the RoI's PSNR."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.gridspec import SubplotSpec

from gbci_fast.evaluate.paired.evaluation import CONDITIONS, ImageCase, Images

COLUMNS = {
    "original": "original",
    "copy_input": "masked",
    "pipeline": "pipeline",
    "source_setting": "source's setting",
    "vae": "VAE alone",
    "ring_mean": "ring mean",
}
LABELS = COLUMNS | {"copy_input": "copied input"}
INSET = 0.45  # of a panel's side


def draw_figure(path: Path, report: dict[str, Any], examples: Sequence[tuple[ImageCase, Images]]) -> None:
    """Writes the PNG.

    Args:
        report: of `evaluate_paired`.
        examples: one row each; the inset shows the lesion enlarged.
    """
    figure = Figure(figsize=(2.2 * len(COLUMNS), 2.2 * len(examples) + 3.6), layout="constrained")
    grid = figure.add_gridspec(2, 1, height_ratios=[2.2 * len(examples), 3.2])
    _draw_examples(figure, grid[0], examples)
    _draw_spread(figure.add_subplot(grid[1]), report)
    figure.savefig(path, format="png", dpi=150)


def _draw_examples(figure: Figure, place: SubplotSpec, examples: Sequence[tuple[ImageCase, Images]]) -> None:
    grid = place.subgridspec(len(examples), len(COLUMNS))
    for i, (case, images) in enumerate(examples):
        panels = {"original": case.pixels} | images
        for j, (name, title) in enumerate(COLUMNS.items()):
            axes = figure.add_subplot(grid[i, j])
            _draw_panel(axes, panels[name], case.mask, outline=name == "original")
            if i == 0:
                axes.set_title(title, fontsize=9)
            if j == 0:
                axes.set_ylabel(f"{case.root}\n{', '.join(case.attributes.finding_categories or ())}", fontsize=6)


def _draw_panel(axes: Axes, pixels: np.ndarray, mask: np.ndarray, *, outline: bool) -> None:
    """Draws an image with an inset that enlarges the mask, in the nipple-side corner away from the lesion."""
    size = len(mask)
    ys, xs = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    y, x = (ys[0] + ys[-1]) / 2, (xs[0] + xs[-1]) / 2
    half = min(max(len(ys), len(xs)) * 0.8, size / 2)
    bottom = 0.0 if y < size / 2 else 1 - INSET
    inset = axes.inset_axes((1 - INSET, bottom, INSET, INSET))
    for target in (axes, inset):
        target.imshow(pixels, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
        target.set(xticks=[], yticks=[])
        if outline:
            target.contour(mask, levels=[0.5], colors="tab:red", linewidths=0.6)
    inset.set(xlim=(x - half, x + half), ylim=(y + half, y - half))
    inset.spines[:].set_color("tab:orange")


def _draw_spread(axes: Axes, report: dict[str, Any]) -> None:
    values = [[row["scores"][name]["roi"]["psnr"] for row in report["images"]] for name in CONDITIONS]
    axes.boxplot(values, showmeans=True, widths=0.5, medianprops={"color": "tab:blue"})
    axes.set_xticks(range(1, 1 + len(CONDITIONS)), [LABELS[name] for name in CONDITIONS])
    axes.set_ylabel("PSNR in the RoI (dB)")
    axes.set_title(
        f"{report['all']['num_images']} images of {report['all']['num_patients']} patients; "
        "box: quartiles, line: median, triangle: mean",
        fontsize=9,
    )
    axes.grid(axis="y", alpha=0.3)
