"""The cells of a plan file: masks, numbers, dates and lesions, as they are read and written."""

import json
import math
import os
import re
from collections.abc import Mapping
from datetime import date, timedelta
from pathlib import Path
from typing import Any

from gbci_fast.data.vindr import BOX_COLUMNS, LONGEST_ID, is_text
from gbci_fast.errors import GBCIError
from gbci_fast.generate.mask_sources import AutomaticMask, BoxMask, EllipseMask, FileMask, Mask
from gbci_fast.lesion.lesion import Lesion

DIAMETERS = {"diameter_px": "px", "diameter_mm": "mm"}
ELLIPSE_COLUMNS = ("center_x", "center_y", *DIAMETERS, "aspect", "tilt")
FIRST_YEAR, MOST_DAYS = 1900, 36500


def parse_date(text: str) -> date | timedelta | None:
    """A day such as 2031-05-02, or days from the template's such as 180 and -30; None if blank.

    Raises:
        GBCIError: another text, no such day, or a day too far away.
    """
    if not text:
        return None
    try:
        if re.fullmatch(r"[+-]?\d{1,5}", text) and abs(int(text)) <= MOST_DAYS:
            return timedelta(days=int(text))
        if re.fullmatch(r"\d{4}-\d\d-\d\d", text) and (day := date.fromisoformat(text)).year >= FIRST_YEAR:
            return day
    except ValueError:  # no such day
        pass
    raise GBCIError(
        f"date is {text!r}; expected a day such as 2031-05-02, or days from the template's, at most {MOST_DAYS}, such "
        "as 180"
    )


def parse_name(text: str) -> str | None:
    """A lesion's name; None if blank.

    Raises:
        GBCIError: it is too long, or holds a character that cannot be printed.
    """
    if not text.isprintable() or len(text) > LONGEST_ID:
        raise GBCIError(f"lesion_id is {text[:60]!r}; expected at most {LONGEST_ID} printable characters")
    return text or None


def parse_lesion(text: str) -> Lesion:
    """A `Lesion` from its JSON; nothing is known of it if blank.

    Raises:
        GBCIError: the text is no JSON, or no lesion.
    """
    if not text:
        return Lesion()
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):
        raise GBCIError(f'lesion is {text[:60]!r}; expected JSON such as {{"axes": [12, 9, 8]}}') from None
    try:
        return Lesion.from_json(content)
    except GBCIError as error:
        raise GBCIError(f"lesion: {error}") from None


def parse_mask(row: Mapping[str, str], folder: Path, files: dict[Path, FileMask]) -> Mask | None:
    """The mask that a row states; None = automatic.

    Args:
        row: texts by column.
        folder: of the plan file.
        files: the mask files that were read before, by path; gets new ones.

    Raises:
        GBCIError: more than one mask, an incomplete one, or a mask file that cannot be read.
    """
    box, ellipse = ([name for name in names if row.get(name)] for names in (BOX_COLUMNS, ELLIPSE_COLUMNS))
    name = row.get("mask", "")
    kinds = [kind for kind, there in (("a box", box), ("an ellipse", ellipse), (f"mask {name!r}", name)) if there]
    if len(kinds) > 1:
        raise GBCIError(f"the row has {' and '.join(kinds)}; expected one of them, or none for an automatic mask")
    if box:
        return _box(row)
    if ellipse:
        return _ellipse(row)
    if name in ("", "auto"):
        return None
    path = folder / name
    if path not in files:
        files[path] = FileMask.of(path)
    return files[path]


def _box(row: Mapping[str, str]) -> BoxMask:
    xmin, ymin, xmax, ymax = (_number(row, name) for name in BOX_COLUMNS)
    if xmin is None or ymin is None or xmax is None or ymax is None or not (xmin < xmax and ymin < ymax):
        texts = ", ".join(row.get(name, "") for name in BOX_COLUMNS)
        raise GBCIError(f"the box is ({texts}); expected numbers with xmin < xmax and ymin < ymax")
    return BoxMask(box=(xmin, ymin, xmax, ymax), source="plan")


def _ellipse(row: Mapping[str, str]) -> EllipseMask:
    numbers = {name: _number(row, name) for name in ELLIPSE_COLUMNS}
    diameters = [(name, value) for name in DIAMETERS if (value := numbers[name]) is not None]
    if numbers["center_x"] is None or numbers["center_y"] is None or len(diameters) != 1:
        given = ", ".join(name for name, value in numbers.items() if value is not None)
        raise GBCIError(f"an ellipse has {given}; expected center_x, center_y and one of {' and '.join(DIAMETERS)}")
    (measure, diameter), aspect = diameters[0], 1.0 if numbers["aspect"] is None else numbers["aspect"]
    for name, value, low, high in ((measure, diameter, 0.01, 1e5), ("aspect", aspect, 0.1, 10)):
        if not low <= value <= high:
            raise GBCIError(f"{name} is {value:g}; expected a number from {low:g} to {high:g}")
    return EllipseMask(
        center=(numbers["center_x"], numbers["center_y"]),
        diameter=diameter,
        unit=DIAMETERS[measure],
        aspect=aspect,
        tilt=numbers["tilt"] or 0.0,
    )


def _number(row: Mapping[str, str], name: str) -> float | None:
    text = row.get(name, "")
    if not text:
        return None
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise GBCIError(f"{name} is {text!r}; expected a number")
    return value


def parse_whole(row: Mapping[str, str], name: str, *, below: int) -> int | None:
    """A whole number from 0 to ``below - 1``; None if blank.

    Raises:
        GBCIError: another text.
    """
    text = row.get(name, "")
    if not text:
        return None
    if not (text.isascii() and text.isdigit() and len(text) < 20 and int(text) < below):
        raise GBCIError(f"{name} is {text!r}; expected a whole number from 0 to {below - 1}")
    return int(text)


def mask_cells(mask: Mask, folder: Path) -> dict[str, Any]:
    """The inverse of `parse_mask`: the cells of a mask, which is named from `folder`.

    Raises:
        GBCIError: the mask file's name is not plain text.
    """
    match mask:
        case AutomaticMask():
            return {"mask": "auto"}
        case FileMask():
            if not is_text(path := os.path.relpath(mask.path, folder)):
                raise GBCIError(
                    f"{path!r} has a name that is not plain text (UTF-8), so no plan can name it; rename it"
                )
            return {"mask": path}
        case BoxMask():
            return dict(zip(BOX_COLUMNS, map(_short, mask.box), strict=True))
        case EllipseMask():
            numbers = (*mask.center, mask.diameter, mask.aspect, mask.tilt)
            names = ("center_x", "center_y", f"diameter_{mask.unit}", "aspect", "tilt")
            return dict(zip(names, map(_short, numbers), strict=True))


def _short(value: float) -> float | int:
    """Whole numbers without a decimal point; other floats as Python writes them, exactly."""
    return int(value) if value == int(value) else value
