"""The contact sheet of an obedience evaluation: one lesion, painted by ten descriptions at one seed."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from gbci_fast.data.boxes import bounding_box
from gbci_fast.evaluate.case import variant_seed
from gbci_fast.evaluate.lesions import LesionCase
from gbci_fast.evaluate.obedience.evaluation import Painter
from gbci_fast.evaluate.obedience.switches import OWN, TELLINGS

TOLD = (
    OWN,
    "circumscribed",
    "spiculated",
    "oval",
    "irregular",
    "BI-RADS 2",
    "BI-RADS 5",
    "density D",
    "calcification",
    "no finding",
)
COLUMNS, CONTEXT, SMALLEST = 4, 2.2, 48  # side of a panel: a multiple of the mask's box, at least so many model pixels


def typical(cases: Sequence[LesionCase]) -> LesionCase:
    """The lesion at the upper quartile of the diameters: large enough to be looked at."""
    ordered = sorted(cases, key=lambda case: (case.diameter, case.name))
    return ordered[3 * (len(ordered) - 1) // 4]


def draw_sheet(path: Path, case: LesionCase, painter: Painter) -> None:
    """Writes the PNG: the real lesion, ten paintings at one seed, and one by the own description at another seed.

    All panels have the same gray scale. Beside what was told stands the root mean square change against the own
    description at the same seed, as a share of the change by the other seed.
    """
    other = replace(case, seed=variant_seed(case.seed, 1))
    cases = [case] * len(TOLD) + [other]
    images = painter(cases, [TELLINGS[name](case) for name in (*TOLD, OWN)])
    changes = [float(np.sqrt(((image - images[0])[case.mask].astype(np.float64) ** 2).mean())) for image in images]
    seed = max(changes[-1], 1e-12)
    titles = ["real", *TOLD, f"{OWN}, another seed"]
    notes = [case.report or "", "", *(f"{change / seed:.2f} of a seed's change" for change in changes[1:])]
    window = _window(case)
    panels = [image[window] for image in (case.pixels, *images)]
    low, high = np.percentile(panels[0], (1, 99.5))
    figure = Figure(figsize=(2.4 * COLUMNS, 2.8 * -(-len(panels) // COLUMNS)), layout="constrained")
    for axes, panel, title, note in zip(
        figure.subplots(-1 * (-len(panels) // COLUMNS), COLUMNS).flat, panels, titles, notes, strict=True
    ):
        axes.imshow(panel, cmap="gray", vmin=low, vmax=max(high, low + 0.05), interpolation="bicubic")
        axes.set_title(f"{title}\n{note}", fontsize=7)
        axes.set_axis_off()
    figure.savefig(path, format="png", dpi=150)


def _window(case: LesionCase) -> tuple[slice, slice]:
    """Rows and columns of a square around the mask, moved into the image."""
    xmin, ymin, xmax, ymax = bounding_box(case.mask)
    side = min(max(SMALLEST, round(CONTEXT * max(xmax - xmin, ymax - ymin))), *case.mask.shape)
    starts = [
        min(max((low + high - side) // 2, 0), size - side)
        for low, high, size in ((ymin, ymax, case.mask.shape[0]), (xmin, xmax, case.mask.shape[1]))
    ]
    return slice(starts[0], starts[0] + side), slice(starts[1], starts[1] + side)
