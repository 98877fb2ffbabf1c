"""Figures of a cache's quality control: contact sheets and distributions."""

from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image, ImageDraw

from gbci_fast.data.cache import Cache
from gbci_fast.data.segmentation import outline

COLUMNS, ROWS = 8, 6
TILE, CAPTION = 192, 26
BREAST_COLOR, MUSCLE_COLOR, LESION_COLOR, BOX_COLOR = (64, 200, 96), (80, 160, 255), (255, 160, 0), (255, 64, 64)


def draw_sheets(cache: Cache, positions: list[int], folder: Path, pages: int) -> list[Path]:
    """Writes ``contact-sheet.png``, ``contact-sheet-2.png`` … with fields of view spread evenly over ``positions``.

    Outlines: breast green, pectoral muscle blue, lesions orange; annotated boxes red. Returns the paths of at most
    ``pages`` pages, fewer if there are too few images.
    """
    count = min(len(positions), pages * COLUMNS * ROWS)
    chosen = [positions[i * len(positions) // count] for i in range(count)]
    paths = []
    for start in range(0, count, COLUMNS * ROWS):
        part = chosen[start : start + COLUMNS * ROWS]
        sheet = Image.new("RGB", (COLUMNS * TILE, -(-len(part) // COLUMNS) * (TILE + CAPTION)))
        for i, position in enumerate(part):
            sheet.paste(_tile(cache, position), (i % COLUMNS * TILE, i // COLUMNS * (TILE + CAPTION)))
        page = start // (COLUMNS * ROWS) + 1
        paths.append(folder / ("contact-sheet.png" if page == 1 else f"contact-sheet-{page}.png"))
        sheet.save(paths[-1])
    return paths


def _tile(cache: Cache, position: int) -> Image.Image:
    field, row = cache[position], cache.row(position)
    shape = (TILE, TILE)
    gray = np.asarray(Image.fromarray((field.image >> 8).astype(np.uint8)).resize(shape, Image.Resampling.BILINEAR))
    pixels = np.repeat(gray[..., None], 3, axis=-1)
    masks = (field.breast, BREAST_COLOR), (cache.pectoral(position), MUSCLE_COLOR), (field.any_lesion, LESION_COLOR)
    for mask, color in masks:
        pixels[outline(np.asarray(Image.fromarray(mask).resize(shape, Image.Resampling.NEAREST)))] = color
    tile = Image.new("RGB", (TILE, TILE + CAPTION))
    tile.paste(Image.fromarray(pixels))
    draw = ImageDraw.Draw(tile)
    for lesion in row["lesions"]:
        xmin, ymin, xmax, ymax = (value * TILE / cache.size for value in lesion["model_box"])
        draw.rectangle((xmin, ymin, max(xmin, xmax - 1), max(ymin, ymax - 1)), outline=BOX_COLOR)
    draw.rectangle((0, TILE, TILE, TILE + CAPTION), fill=(0, 0, 0))
    known = (row["laterality"], row["view_position"], row["breast_density"], row["split"])
    lines = row["image_id"][:30], " ".join(value for value in known if value)
    for i, line in enumerate(lines):
        draw.text((2, TILE + 1 + 12 * i), line.encode("ascii", "replace").decode(), fill=(255, 255, 255))
    return tile


def draw_summary(table: pd.DataFrame, path: Path) -> None:
    """Writes six distributions over the images of `gbci_fast.data.qc.image_table`, one color per source."""
    figure = Figure(figsize=(12, 6), layout="constrained")
    axes = figure.subplots(2, 3)
    lesions = table.explode("lesions").dropna(subset="lesions")
    sides = lesions["lesions"].map(_longer_side)
    panels = {
        "breast / image area": table["breast_fraction"],
        "mean brightness in the breast": table["brightness"],
        "height / width of the breast": table["aspect"],
        "saturated share of the breast": table["saturated"],
        "native spacing (mm)": table["row_spacing"],
        "longer side of the lesions' boxes (model pixels)": sides,
    }
    for place, (title, values) in zip(axes.flat, panels.items(), strict=True):
        _histogram(place, title, values.astype(float), lesions["source"] if values is sides else table["source"])
        place.set_ylabel("boxes" if values is sides else "images", fontsize=8)
    axes[1, 0].set_yscale("log")  # nearly all images have no saturated pixels
    axes[0, 0].legend(fontsize=8)
    figure.savefig(path, format="png", dpi=100, metadata={"Software": None})


def _longer_side(lesion: dict) -> float:
    xmin, ymin, xmax, ymax = lesion["model_box"]
    return max(xmax - xmin, ymax - ymin)


def _histogram(axes: Axes, title: str, values: pd.Series, sources: pd.Series) -> None:
    known = values.notna().to_numpy()
    groups = {name: values[known & (sources == name).to_numpy()].to_numpy() for name in sources.unique()}
    if known.any():
        low, high = float(values.min()), float(values.max())
        bins = np.linspace(low, high if high > low else low + 1e-3, 33)
        for name, group in groups.items():
            # A leading underscore would hide the name from the legend.
            axes.hist(group, bins=bins, histtype="step", label=f" {name}".replace("$", r"\$"))
    else:
        axes.set_axis_off()
    unknown = f" ({int((~known).sum())} unknown)" if not known.all() else ""
    axes.set_title(title + unknown, fontsize=9)
    axes.tick_params(labelsize=8)
