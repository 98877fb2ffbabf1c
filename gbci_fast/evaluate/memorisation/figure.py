"""The figure of a memorisation evaluation: the nearest pairs side by side, and histograms of the distances."""

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from gbci_fast.evaluate.memorisation.evaluation import Lesions, NearestTraining
from gbci_fast.evaluate.memorisation.neighbors import laid_on

ROWS = 8


def draw_figure(
    path: Path, report: dict[str, Any], training: Lesions, synthetic: Lesions, nearest: NearestTraining
) -> None:
    """Writes the PNG: the synthetic crops that are nearest to a training crop, nearest first, and the histograms."""
    order = np.argsort(nearest.synthetic.distances)[:ROWS]
    figure = Figure(figsize=(12, 1.7 * max(len(order), 4)), layout="constrained")
    pairs, charts = figure.subfigures(1, 2, width_ratios=(6, 5))
    axes = pairs.subplots(len(order), 3, squeeze=False)
    for row, i in zip(axes, order, strict=True):
        _draw_pair(row, i, training, synthetic, nearest)
    for column, title in zip(axes[0], ("synthetic", "nearest training crop, moved onto it", "difference"), strict=True):
        column.set_title(title, fontsize=8)
    spaces = charts.subplots(2, 1)
    for place, (name, space) in zip(spaces, report["spaces"].items(), strict=True):
        _draw_distances(place, name, space)
    figure.savefig(path, format="png", dpi=130)


def _draw_pair(axes: np.ndarray, i: int, training: Lesions, synthetic: Lesions, nearest: NearestTraining) -> None:
    """Draws a pair; the training crop's gain and offset, which the distance ignores, are fitted under the mask."""
    row, move = nearest.synthetic.rows[i], nearest.synthetic.moves[i]
    pixels, mask = synthetic.crops.pixels[i], synthetic.crops.masks[i]
    neighbor = laid_on(move, training.crops.pixels[row])
    gain = pixels[mask].std() / max(float(neighbor[mask].std()), 1e-3)
    fitted = (neighbor - neighbor[mask].mean()) * gain + pixels[mask].mean()
    low, high = np.quantile(pixels[mask], (0.01, 0.99))
    margin = max(0.2 * float(high - low), 0.01)
    window = {"cmap": "gray", "vmin": low - margin, "vmax": high + margin}
    axes[0].imshow(pixels, **window)
    axes[1].imshow(fitted, **window)
    axes[2].imshow(np.where(mask, pixels - fitted, 0), cmap="RdBu", vmin=low - high - margin, vmax=high - low + margin)
    for place in axes:
        place.contour(mask, levels=[0.5], colors="tab:orange", linewidths=0.6)
        place.set(xticks=[], yticks=[])
    distance = nearest.synthetic.distances[i]
    axes[0].set_ylabel(f"{distance:.3f}", fontsize=8, color="tab:red" if distance < nearest.threshold else "black")
    for place, name in zip(axes, (synthetic.names[i], training.names[row]), strict=False):
        place.set_xlabel(_short(name), fontsize=5)


def _draw_distances(axes: Axes, name: str, space: dict[str, Any]) -> None:
    groups = {"real, held out": space["distances_real"], "synthetic": space["distances_synthetic"]}
    edges = np.histogram_bin_edges(np.concatenate(list(groups.values())), 30)
    for (label, values), color in zip(groups.items(), ("tab:gray", "tab:red"), strict=True):
        shares = np.full(len(values), 1 / len(values))
        axes.hist(values, edges, weights=shares, histtype="stepfilled", alpha=0.45, color=color, label=label)
    axes.axvline(space["threshold"], color="black", linewidth=0.8, label="threshold")
    axes.set_xlabel(f"distance to the nearest training crop, {name} space", fontsize=8)
    axes.set_ylabel("share", fontsize=8)
    axes.set_title(
        f"{space['below']} below the threshold, {space['expected']:.1f} expected, p = {space['p']:.2g}", fontsize=8
    )
    axes.tick_params(labelsize=7)
    axes.legend(fontsize=7)


def _short(name: str) -> str:
    return name if len(name) <= 44 else f"{name[:20]}…{name[-22:]}"
