"""A contact sheet of a phantom data set: one example of every category and density, with outlined truth."""

import ast
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw
from pydicom import dcmread
from scipy import ndimage

from gbci_fast.attributes import BREAST_DENSITIES, FINDING_CATEGORIES, NO_FINDING

PREVIEW = "preview.png"
_CELL = 300  # pixels
_CAPTION = 18
_PER_ROW = 5


def write_preview(root: Path, rows: list[dict[str, Any]], path: Path) -> None:
    """Draws the sheet from the data set's files.

    Two lines show five categories each: the whole breast with the outline of the finding, and a close-up without
    outline. A third line shows a healthy breast of each density. Missing examples stay black, with a caption "none".

    Args:
        root: folder of the data set.
        rows: rows of its ``finding_annotations.csv``.
        path: the PNG to write.
    """
    cells = [_category_cell(root, category, _example(rows, category)) for category in FINDING_CATEGORIES]
    healthy = [row for row in rows if ast.literal_eval(str(row["finding_categories"])) == [NO_FINDING]]
    for density in BREAST_DENSITIES:
        row = next((row for row in healthy if row["breast_density"] == f"DENSITY {density}"), None)
        picture = None if row is None else _fit(_read(root, row))
        cells.append(_caption(f"density {density}, {NO_FINDING.lower()}", [picture]))
    lines = []
    for start in range(0, len(cells), _PER_ROW):
        line = cells[start : start + _PER_ROW]
        empty = np.zeros_like(line[0])
        lines.append(np.concatenate([*line, *[empty] * (_PER_ROW - len(line))], axis=1))
    Image.fromarray(np.concatenate(lines, axis=0)).save(path)


def _example(rows: list[dict[str, Any]], category: str) -> dict[str, Any] | None:
    """The best visible row of a category: fewest other categories first, then density B, A, C, D; None if absent."""
    having = [row for row in rows if category in ast.literal_eval(str(row["finding_categories"]))]

    def hidden(row: dict[str, Any]) -> tuple[int, int]:
        return len(ast.literal_eval(str(row["finding_categories"]))), "BACD".index(str(row["breast_density"])[-1])

    return min(having, key=hidden, default=None)


def _category_cell(root: Path, category: str, row: dict[str, Any] | None) -> np.ndarray:
    if row is None:
        return _caption(category, [None, None])
    image = _read(root, row)
    with Image.open(root / str(row["mask_file"])) as drawn:
        mask = np.asarray(drawn) > 127
    width = max(1, round(image.shape[0] / _CELL))  # line width: at least a pixel after the reduction
    outlined = image.copy()
    outlined[ndimage.binary_dilation(mask, iterations=width) & ~mask] = (255, 64, 64)
    xmin, ymin, xmax, ymax = (int(row[key]) for key in ("xmin", "ymin", "xmax", "ymax"))
    half = max(round(0.8 * max(xmax - xmin, ymax - ymin)), image.shape[0] // 12)
    x, y = (xmin + xmax) // 2, (ymin + ymax) // 2
    padded = np.pad(image, ((half, half), (half, half), (0, 0)))
    return _caption(
        f"{category} ({row['view_position']}, {row['breast_density']})",
        [_fit(outlined), _fit(padded[y : y + 2 * half, x : x + 2 * half])],
    )


def _read(root: Path, row: dict[str, Any]) -> np.ndarray:
    """The image through its window, uint8 [H, W, 3]."""
    dataset = dcmread(root / "images" / str(row["study_id"]) / f"{row['image_id']}.dicom")
    low = float(dataset.WindowCenter) - float(dataset.WindowWidth) / 2
    unit = np.clip((dataset.pixel_array - np.float32(low)) / np.float32(dataset.WindowWidth), 0, 1)
    return np.repeat(np.round(unit * 255).astype(np.uint8)[..., None], 3, axis=-1)


def _fit(picture: np.ndarray) -> np.ndarray:
    """The picture resized to fit a cell and padded with black."""
    scale = _CELL / max(picture.shape[:2])
    size = (max(1, round(picture.shape[1] * scale)), max(1, round(picture.shape[0] * scale)))
    cell = np.zeros((_CELL, _CELL, 3), np.uint8)
    cell[: size[1], : size[0]] = np.asarray(Image.fromarray(picture).resize(size, Image.Resampling.LANCZOS))
    return cell


def _caption(text: str, pictures: list[np.ndarray | None]) -> np.ndarray:
    """Pictures stacked below their caption; None becomes a black picture."""
    blank = np.zeros((_CELL, _CELL, 3), np.uint8)
    image = Image.new("RGB", (_CELL, _CAPTION))
    missing = pictures[0] is None
    ImageDraw.Draw(image).text((4, 3), f"{text}: none" if missing else text, fill=(255, 255, 255))
    return np.concatenate([np.asarray(image), *(blank if picture is None else picture for picture in pictures)])
