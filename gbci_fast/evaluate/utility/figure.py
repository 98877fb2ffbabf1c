"""The figure of a utility evaluation: AUC against the share of real patients, and patches of every kind."""

from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from gbci_fast.evaluate.utility.evaluation import Examples

LABELS = {
    "real": "real",
    "augmented": "real, classical augmentation",
    "real_normal": "real + host normals (control)",
    "real_synthetic": "real + synthetic",
    "real_blob": "real + blobs",
    "synthetic": "synthetic only (TSTR)",
    "blob": "blobs only",
    "blurred": "blurred real lesions only",
    "autoencoder": "autoencoder on normal tissue only",
    "ring_mean": "ring mean only",
}
SPREAD = 0.07  # distance between arms where a tick is 1, so that intervals do not overlap


def draw_figure(path: Path, report: dict[str, Any], examples: Examples) -> None:
    """Writes the PNG.

    Args:
        report: of `evaluate_utility`.
        examples: one row each.
    """
    figure = Figure(figsize=(8, 4.6 + 1.0 * len(examples)), layout="constrained")
    curves, strips = figure.subfigures(2, 1, height_ratios=[4.6, 1.0 * len(examples)])
    _draw_curves(curves.subplots(), report)
    columns = max(map(len, examples.values()))
    grid = strips.subplots(len(examples), columns, squeeze=False)
    for row, (kind, patches) in zip(grid, examples.items(), strict=True):
        for axes, patch in zip(row, patches, strict=False):
            axes.imshow(patch, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
        for i, axes in enumerate(row):
            axes.set(xticks=[], yticks=[])
            axes.set_frame_on(i < len(patches))
        row[0].set_ylabel(kind.replace(" ", "\n"), fontsize=8, rotation=0, ha="right", va="center")
    figure.savefig(path, format="png", dpi=150)


def _draw_curves(axes: Axes, report: dict[str, Any]) -> None:
    fractions = report["settings"]["fractions"]
    places = {None: -1} | {fraction: i for i, fraction in enumerate(fractions)}
    for number, arm in enumerate(report["arms"]):
        rows = [row for row in report["results"] if row["arm"] == arm]
        x = [places[row["fraction"]] + SPREAD * (number - len(report["arms"]) / 2) for row in rows]
        means = [row["auc"]["mean"] for row in rows]
        ends = [
            [0.0 if row["auc"][end] is None else abs(row["auc"][end] - row["auc"]["mean"]) for row in rows]
            for end in ("low", "high")
        ]
        axes.errorbar(x, means, yerr=ends, color=f"C{number}", marker="o", capsize=3, label=LABELS[arm])
    axes.axhline(0.5, color="gray", linewidth=0.8)
    axes.set_xticks(range(-1, len(fractions)), ["none", *(f"{fraction:g} %" for fraction in fractions)])
    axes.set(xlabel="of the real training patients", ylabel="AUC on real patches of the judged patients")
    test, synthetic = report["data"]["test"], report["data"]["synthetic"]
    axes.set_title(
        f"{test['lesions']} lesions and {test['normal']} normal patches of {test['patients']} patients; "
        f"{synthetic['lesions']} synthetic lesions;\nmean of {report['settings']['seeds']} seeds, 95 % over "
        "patients and seeds",
        fontsize=9,
    )
    axes.grid(axis="y", alpha=0.3)
    axes.legend(fontsize=8)
