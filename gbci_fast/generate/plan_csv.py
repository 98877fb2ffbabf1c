"""Plan files: one CSV row per synthetic image, to be written, edited and run.

Only ``image`` is required. A blank cell stands for the default of a run without a plan file; "unknown" means that the
value is not known.
"""

import csv
import hashlib
import json
import os
from array import array
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from datetime import date, timedelta
from functools import lru_cache
from pathlib import Path
from typing import Any

from gbci_fast.attributes import NO_FINDING, VIEW_POSITIONS, Attributes
from gbci_fast.data.tables import Table
from gbci_fast.data.vindr import BOX_COLUMNS, ImageRecord
from gbci_fast.errors import GBCIError
from gbci_fast.generate.mask_sources import FileMask, Mask
from gbci_fast.generate.plan import (
    LARGEST_INDEX,
    Plan,
    PlanItem,
    automatic,
    check_text,
    date_text,
    describe,
    lesion_of,
    make_item,
    of_tables,
    parse_overrides,
    unshared,
    withheld,
)
from gbci_fast.generate.plan_cells import (
    ELLIPSE_COLUMNS,
    mask_cells,
    parse_date,
    parse_lesion,
    parse_mask,
    parse_name,
    parse_whole,
)
from gbci_fast.generate.priors import Priors, load_priors
from gbci_fast.jobs.files import atomically
from gbci_fast.lesion.lesion import Lesion

ATTRIBUTES = tuple(each.name for each in fields(Attributes))
OF_LESION = tuple(each.name for each in fields(Lesion) if each.name in ATTRIBUTES)
PLAN_COLUMNS = (
    *("image", "variant", "seed", "index", "lesion_id", "view", "date"),
    *ATTRIBUTES,
    *("lesion", "report", "mask", *BOX_COLUMNS, *ELLIPSE_COLUMNS),
)
_PAGE = 2**15  # indices


def read_plan(
    path: Path,
    records: Sequence[ImageRecord],
    root: Path,
    *,
    seed: int,
    overrides: Mapping[str, Any] | None = None,
    report: str | None = None,
    priors: Priors | None = None,
) -> Plan:
    """The plan of a plan file, in the order of its rows.

    All rows are checked first. The plan then reads a row when its item is asked for, and holds none.

    Columns (`PLAN_COLUMNS`; all but ``image`` may be absent or blank):
        image: image_id of a record, or its path below `root`; an image_id takes precedence.
        variant: 0, 1, ...; blank = one more than in the image's previous row.
        seed: of noise and automatic mask, in [0, 2^63); blank = from the job's seed and the index.
        index: position in the whole plan, 0, 1, ...; blank = the row's number in this file, from 0. Ids follow from
            the index, so that pieces of a plan make the same images as the whole.
        lesion_id: a name that all pictures of one lesion have; blank = a lesion of its own, unless another row has
            the same patient, lesion, mask and seed.
        view: the view that the picture must show; blank = the image's.
        date: see `parse_date`; blank = the image's.
        attributes: as in `Attributes`; several categories as ``['Mass', 'Asymmetry']`` or ``Mass|Asymmetry``.
        lesion: a `Lesion` as JSON; a filled cell of an attribute must agree with it.
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
    check_text(report)
    table = Table(path, ("image",))
    if unknown := [column for column in table.columns if column not in PLAN_COLUMNS]:
        raise GBCIError(f"{path}: column {unknown[0]!r} is not known; expected out of {', '.join(PLAN_COLUMNS)}")
    rows = _Rows(
        table,
        {_below(root, record): record for record in records} | {record.image_id: record for record in records},
        seed=seed,
        overrides=parse_overrides(overrides or {}),
        report=report,
        priors=priors or load_priors(),
    )
    templates, identity = rows.check()
    return Plan(
        make=rows.item,
        places=range(len(table)),
        templates=templates,
        identity=identity,
        alike=lambda place: None,
    )


def write_plan(plan: Sequence[PlanItem], path: Path) -> None:
    """Writes a plan file from which `read_plan` restores the plan, given the same seed, priors and records.

    Rows can be left out, or split over several files with the header each: the remaining rows make the same images.

    Every cell is filled in, except those of other kinds of masks, ``lesion_id`` where the lesion has no name, ``view``
    and ``date`` where they are the image's, and ``breast_birads`` where it follows from the finding. An automatic mask
    has no columns of its own: the seed decides it. Boxes of annotations become boxes of the plan.

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
class _Row:
    """A row's cells, parsed; None = blank, except in `given` and `lesion`.

    Attributes:
        given: attributes that the row or the command states.
        lesion: what the cell of this name tells.
    """

    record: ImageRecord
    variant: int | None
    seed: int | None
    index: int | None
    name: str | None
    view: str | None
    when: date | timedelta | None
    given: Mapping[str, Any]
    lesion: Lesion
    mask: Mask | None


class _Rows:
    """Makes the items of a plan file.

    Args:
        table: the file.
        records: {text of the column image: record}.
        seed, overrides, report, priors: as for `read_plan`, parsed.
    """

    def __init__(
        self,
        table: Table,
        records: Mapping[str, ImageRecord],
        *,
        seed: int,
        overrides: Mapping[str, Any],
        report: str | None,
        priors: Priors,
    ):
        self._table = table
        self._records = records
        self._seed = seed
        self._overrides = overrides
        self._report = report
        self._priors = priors
        self._files: dict[Path, FileMask] = {}
        self._variants = array("I")  # of every row up to the last one with a blank variant
        self._told = lru_cache(maxsize=4096)(self._tell)

    def item(self, place: int) -> PlanItem:
        """The item of the row at `place`."""
        cells = self._table[place]
        row = self._parse(cells)
        attributes = describe(row.record, None, row.given)
        return make_item(
            self._seed,
            index=place if row.index is None else row.index,
            template=row.record,
            variant=self._variants[place] if row.variant is None else row.variant,
            mask=row.mask or automatic(self._priors, attributes.finding_categories),
            attributes=attributes,
            report=cells.get("report") or self._report,
            lesion=lesion_of(attributes, row.lesion),
            withheld=withheld(row.given),
            seed=row.seed,
            named=row.name,
            view=row.view,
            when=row.when,
        )

    def check(self) -> tuple[list[ImageRecord], dict[str, str]]:
        """Checks all rows; returns the templates in order of first use, and `Plan.identity`.

        Raises:
            GBCIError: a row is bad, or there is none.
        """
        upcoming: Counter[str] = Counter()  # the next variant of each image
        used: dict[str, ImageRecord] = {}
        indices, masks, descriptions = _Indices(), hashlib.sha256(), hashlib.sha256()
        for place, (where, cells) in enumerate(self._table.scan()):
            try:
                row = self._parse(cells)
                index = place if row.index is None else row.index
                if not indices.add(index):
                    raise GBCIError(
                        f"index is {index}, as in {self._place_of(index)}; expected every index once (a blank cell is "
                        "the row's number, from 0)"
                    )
            except GBCIError as error:
                raise GBCIError(f"{where}: {error}") from None
            image = row.record.image_id
            variant = upcoming[image] if row.variant is None else row.variant
            if row.variant is None:
                self._variants.extend([0] * (place - len(self._variants)))
                self._variants.append(variant)
            upcoming[image] = variant + 1
            used.setdefault(image, row.record)
            masks.update(_line(row.mask.identity() if row.mask else "auto"))
            told = [cells.get(name, "") for name in (*ATTRIBUTES, "lesion", "report", "lesion_id", "view", "date")]
            descriptions.update(_line([image, index, variant, row.seed, *told]))
        if not used:
            raise GBCIError(f"{self._table.path} has no rows; expected one per synthetic image")
        masks.update(self._priors.digest.encode())
        tables = [of_tables(record) for record in used.values()]
        descriptions.update(_line([self._seed, dict(self._overrides), self._report, tables]))
        return list(used.values()), {"masks": masks.hexdigest(), "descriptions": descriptions.hexdigest()}

    def _place_of(self, index: int) -> str:
        """ "line n", the first row of an index."""
        rows = enumerate(Table(self._table.path, ()).scan())
        found = ((parse_whole(cells, "index", below=LARGEST_INDEX), place, where) for place, (where, cells) in rows)
        first = next(where for stated, place, where in found if index == (place if stated is None else stated))
        return first.rpartition(", ")[2]

    def _parse(self, cells: Mapping[str, str]) -> _Row:
        index = parse_whole(cells, "index", below=LARGEST_INDEX)
        record = self._records.get(cells["image"])
        if record is None:
            raise GBCIError(f"image is {cells['image']!r}; expected an image_id of INPUT or a path below it")
        given, lesion = self._told(tuple(cells.get(name, "") for name in ATTRIBUTES), cells.get("lesion", ""))
        return _Row(
            record=record,
            variant=parse_whole(cells, "variant", below=10**9),
            seed=parse_whole(cells, "seed", below=2**63),
            index=index,
            name=parse_name(cells.get("lesion_id", "")),
            view=_view(cells.get("view", ""), given.get("view_position")),
            when=parse_date(cells.get("date", "")),
            given=given,
            lesion=lesion,
            mask=parse_mask(cells, self._table.path.parent, self._files),
        )

    def _tell(self, texts: tuple[str, ...], lesion: str) -> tuple[dict[str, Any], Lesion]:
        """The stated attributes and the lesion; rows that say the same share them."""
        cells: dict[str, Any] = {name: text for name, text in zip(ATTRIBUTES, texts, strict=True) if text}
        if "finding_categories" in cells:
            cells["finding_categories"] = cells["finding_categories"].replace("|", ",")
        stated, told = parse_overrides(cells), parse_lesion(lesion)
        known = {name: value for name in OF_LESION if (value := getattr(told, name)) is not None}
        for name in OF_LESION:
            if name in known and stated.get(name, known[name]) != known[name]:
                raise GBCIError(f"{name} is {stated[name]!r}, and {known[name]!r} in lesion; expected the same")
        known.pop("laterality", None)  # of the picture, which its file states
        categories = {name: value for name, value in self._overrides.items() if name == "finding_categories"}
        given = {**self._overrides, **parse_overrides({**categories, **known, **stated})}
        nowhere = ImageRecord(study_id="", image_id="", path=Path())
        lesion_of(describe(nowhere, None, given), told)
        return given, told


class _Indices:
    """A set of whole numbers; one bit each, in pages."""

    def __init__(self):
        self._pages: dict[int, bytearray] = {}

    def add(self, index: int) -> bool:
        """Adds a number; returns whether it was not in the set."""
        number, place = divmod(index, _PAGE)
        page = self._pages.get(number)
        if page is None:
            page = self._pages[number] = bytearray(_PAGE // 8)
        bit = 1 << place % 8
        new = not page[place // 8] & bit
        page[place // 8] |= bit
        return new


def _line(content: Any) -> bytes:
    return json.dumps(content).encode() + b"\n"


def _view(text: str, set_to: str | None) -> str | None:
    view = text.upper() or None
    if view not in (None, *VIEW_POSITIONS):
        raise GBCIError(f"view is {text!r}; expected one of {', '.join(VIEW_POSITIONS)}")
    if None not in (view, set_to) and view != set_to:
        raise GBCIError(f"view is {view}, and view_position is {set_to}; expected the same")
    return view


def _below(root: Path, record: ImageRecord) -> str:
    """A record's path below `root`, as a row may name it."""
    return Path(os.path.relpath(record.path, root if root.is_dir() else root.parent)).as_posix()


def _row(item: PlanItem, folder: Path) -> dict[str, Any]:
    """The inverse of `_Rows.item`."""
    given = {name: getattr(item.attributes, name) for name in ATTRIBUTES}
    # breast_birads is left blank where it follows from the finding, so that editing finding_birads changes both.
    graded = describe(item.template, None, {name: given[name] for name in ATTRIBUTES if name != "breast_birads"})
    if graded == item.attributes:
        del given["breast_birads"]
    blank = describe(item.template, None, {})
    known = {
        name for name in given if given[name] is not None or getattr(blank, name) is not None or name in item.withheld
    }
    more = unshared(item.lesion, item.attributes)
    return {
        "image": item.template.image_id,
        "variant": item.variant,
        "seed": item.seed,
        "index": item.index,
        "lesion_id": item.lesion_id if item.named else "",
        "view": item.view or "",
        "date": date_text(item.date),
        **{name: _text(given[name]) for name in known},
        "lesion": json.dumps(more, sort_keys=True) if more else "",
        "report": item.report or "",
        **mask_cells(item.mask, folder),
    }


def _text(value: Any) -> str:
    if value is None:
        return "unknown"
    return str(list(value) or [NO_FINDING]) if isinstance(value, tuple) else str(value)
