"""Plan files: one CSV row per synthetic image, to be written, edited and run.

Only ``image`` is required. A blank cell stands for the default of a run without a plan file; "unknown" means that the
value is not known.
"""

import csv
import math
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from gbci_fast.attributes import NO_FINDING, Attributes
from gbci_fast.data.vindr import BOX_COLUMNS, ImageRecord, is_text, read_table
from gbci_fast.errors import GBCIError
from gbci_fast.generate.mask_sources import AutomaticMask, BoxMask, EllipseMask, FileMask, Mask
from gbci_fast.generate.plan import (
    PlanItem,
    automatic,
    describe,
    make_item,
    parse_overrides,
    withheld,
)
from gbci_fast.generate.priors import Priors, load_priors
from gbci_fast.jobs.files import atomically

ATTRIBUTES = tuple(each.name for each in fields(Attributes))
LARGEST_INDEX = 2**31 - 1  # DICOM's InstanceNumber, one more than the index, has 32 bits
DIAMETERS = {"diameter_px": "px", "diameter_mm": "mm"}
ELLIPSE_COLUMNS = ("center_x", "center_y", *DIAMETERS, "aspect", "tilt")
PLAN_COLUMNS = ("image", "variant", "seed", "index", *ATTRIBUTES, "report", "mask", *BOX_COLUMNS, *ELLIPSE_COLUMNS)


def read_plan(
    path: Path,
    records: Sequence[ImageRecord],
    root: Path,
    *,
    seed: int,
    overrides: Mapping[str, Any] | None = None,
    report: str | None = None,
    priors: Priors | None = None,
) -> list[PlanItem]:
    """The plan of a plan file, in the order of its rows.

    Columns (`PLAN_COLUMNS`; all but ``image`` may be absent or blank):
        image: image_id of a record, or its path below `root`; an image_id takes precedence.
        variant: 0, 1, ...; blank = one more than in the image's previous row.
        seed: of noise and automatic mask, in [0, 2^63); blank = from the job's seed and the index.
        index: position in the whole plan, 0, 1, ...; blank = the row's number in this file, from 0. Ids follow from
            the index, so that pieces of a plan make the same images as the whole.
        attributes: as in `Attributes`; several categories as ``['Mass', 'Asymmetry']`` or ``Mass|Asymmetry``.
        report: free text.
        mask: "auto", or a mask file's path from the plan's folder; blank = the box or ellipse of the next columns, or
            auto without one.
        xmin, ymin, xmax, ymax: a box in native pixels; its ellipse is the mask.
        center_x, center_y, diameter_px | diameter_mm, aspect, tilt: see `EllipseMask`.

    Args:
        path: the plan file.
        records: the images of INPUT.
        root: the path of INPUT.
        seed, overrides, report, priors: as for `make_plan`; a filled cell takes precedence over `overrides` and
            `report`.

    Raises:
        GBCIError: an unreadable file, an unknown column, image or value, or an index in two rows; the message names the
            file and the line.
    """
    if not path.is_file():
        raise GBCIError(f"{path} does not exist; expected a plan file with the column image")
    known = _Known(
        records={_below(root, record): record for record in records} | {record.image_id: record for record in records},
        overrides=parse_overrides(overrides or {}),
        report=report,
        priors=priors or load_priors(),
        folder=path.parent,
    )
    items: list[PlanItem] = []
    places: dict[int, str] = {}
    for where, row in read_table(path, ("image",)):
        if unknown := [column for column in row if column not in PLAN_COLUMNS]:
            raise GBCIError(f"{path}: column {unknown[0]!r} is not known; expected out of {', '.join(PLAN_COLUMNS)}")
        try:
            item = _item(row, len(items), seed, known)
            if item.index in places:
                raise GBCIError(
                    f"index is {item.index}, as in {places[item.index]}; expected every index once (a blank cell is "
                    "the row's number, from 0)"
                )
        except GBCIError as error:
            raise GBCIError(f"{where}: {error}") from None
        places[item.index] = where.rpartition(", ")[2]
        items.append(item)
    if not items:
        raise GBCIError(f"{path} has no rows; expected one per synthetic image")
    return items


def write_plan(plan: Sequence[PlanItem], path: Path) -> None:
    """Writes a plan file from which `read_plan` restores the plan, given the same seed, priors and records.

    Rows can be left out, or split over several files with the header each: the remaining rows make the same images.

    Every cell is filled in, except those of other kinds of masks, and ``breast_birads`` where it follows from the
    finding. An automatic mask has no columns of its own: the seed decides it. Boxes of annotations become boxes of the
    plan.

    Raises:
        GBCIError: the file exists, or a mask file's name is not plain text.
    """
    if path.exists():
        raise GBCIError(f"{path} exists, and may have been edited; choose another name or remove it")

    def write(temporary: Path) -> None:
        with temporary.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, PLAN_COLUMNS, restval="", lineterminator="\n")
            writer.writeheader()
            writer.writerows(_row(item, path.parent) for item in plan)

    atomically(path, write)


@dataclass(frozen=True, kw_only=True)
class _Known:
    """What all rows share."""

    records: Mapping[str, ImageRecord]
    overrides: Mapping[str, Any]
    report: str | None
    priors: Priors
    folder: Path
    variants: Counter = field(default_factory=Counter)  # the next variant of each image
    files: dict[Path, FileMask] = field(default_factory=dict)


def _item(row: dict[str, str], number: int, job_seed: int, known: _Known) -> PlanItem:
    index = _whole(row, "index", below=LARGEST_INDEX)
    record = known.records.get(row["image"])
    if record is None:
        raise GBCIError(f"image is {row['image']!r}; expected an image_id of INPUT or a path below it")
    cells = {name: row[name] for name in ATTRIBUTES if row.get(name)}
    if "finding_categories" in cells:
        cells["finding_categories"] = cells["finding_categories"].replace("|", ",")
    given = {**known.overrides, **parse_overrides(cells)}
    attributes, report = describe(record, None, given), row.get("report") or known.report
    variant = _whole(row, "variant", below=10**9)
    if variant is None:
        variant = known.variants[record.image_id]
    known.variants[record.image_id] = variant + 1
    return make_item(
        job_seed,
        index=number if index is None else index,
        template=record,
        variant=variant,
        mask=_mask(row, known) or automatic(known.priors, attributes.finding_categories),
        attributes=attributes,
        report=report,
        withheld=withheld(given),
        seed=_whole(row, "seed", below=2**63),
    )


def _mask(row: dict[str, str], known: _Known) -> Mask | None:
    """The mask that a row states; None = automatic."""
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
    path = known.folder / name
    if path not in known.files:
        known.files[path] = FileMask.of(path)
    return known.files[path]


def _box(row: dict[str, str]) -> BoxMask:
    xmin, ymin, xmax, ymax = (_number(row, name) for name in BOX_COLUMNS)
    if xmin is None or ymin is None or xmax is None or ymax is None or not (xmin < xmax and ymin < ymax):
        texts = ", ".join(row.get(name, "") for name in BOX_COLUMNS)
        raise GBCIError(f"the box is ({texts}); expected numbers with xmin < xmax and ymin < ymax")
    return BoxMask(box=(xmin, ymin, xmax, ymax), source="plan")


def _ellipse(row: dict[str, str]) -> EllipseMask:
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


def _number(row: dict[str, str], name: str) -> float | None:
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


def _whole(row: dict[str, str], name: str, *, below: int) -> int | None:
    text = row.get(name, "")
    if not text:
        return None
    if not (text.isascii() and text.isdigit() and len(text) < 20 and int(text) < below):
        raise GBCIError(f"{name} is {text!r}; expected a whole number from 0 to {below - 1}")
    return int(text)


def _below(root: Path, record: ImageRecord) -> str:
    """A record's path below `root`, as a row may name it."""
    return Path(os.path.relpath(record.path, root if root.is_dir() else root.parent)).as_posix()


def _row(item: PlanItem, folder: Path) -> dict[str, Any]:
    """The inverse of `_item`."""
    given = {name: getattr(item.attributes, name) for name in ATTRIBUTES}
    # breast_birads is left blank where it follows from the finding, so that editing finding_birads changes both.
    graded = describe(item.template, None, {name: given[name] for name in ATTRIBUTES if name != "breast_birads"})
    if graded == item.attributes:
        del given["breast_birads"]
    blank = describe(item.template, None, {})
    known = {
        name for name in given if given[name] is not None or getattr(blank, name) is not None or name in item.withheld
    }
    return {
        "image": item.template.image_id,
        "variant": item.variant,
        "seed": item.seed,
        "index": item.index,
        **{name: _text(given[name]) for name in known},
        "report": item.report or "",
        **_mask_cells(item.mask, folder),
    }


def _text(value: Any) -> str:
    if value is None:
        return "unknown"
    return str(list(value) or [NO_FINDING]) if isinstance(value, tuple) else str(value)


def _mask_cells(mask: Mask, folder: Path) -> dict[str, Any]:
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
