"""The VinDr-Mammo folder layout, and plain files or folders of mammograms, as one list of lazy records.

A root holds ``breast-level_annotations.csv``, ``finding_annotations.csv`` and ``images/<study_id>/<image_id>.dicom``
(Nguyen et al., "VinDr-Mammo", Scientific Data 2023). The tables are read at once, pixels by `ImageRecord.read`.
"""

import math
import os
import re
import stat
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import count
from pathlib import Path

from gbci_fast.attributes import NO_FINDING, Attributes, is_unknown
from gbci_fast.choices import SPLITS
from gbci_fast.data.boxes import Box
from gbci_fast.data.lexicon import shape_and_margin
from gbci_fast.data.tables import read_table
from gbci_fast.data.walk import Found, fault_of, walk_files
from gbci_fast.dicom.reading import IMAGE_SUFFIXES, Mammogram, looks_like_image, read_mammogram
from gbci_fast.dicom.view_positions import laterality_in_text, view_in_text, without_view
from gbci_fast.errors import GBCIError, InputWarning, one_line
from gbci_fast.jobs.files import digest_of

BREAST_TABLE = "breast-level_annotations.csv"
FINDING_TABLE = "finding_annotations.csv"
IMAGE_COLUMNS = (
    "study_id",
    "series_id",
    "image_id",
    "laterality",
    "view_position",
    "height",
    "width",
    "breast_birads",
    "breast_density",
    "split",
)
# 0 (incomplete) and 6 (proven by biopsy) are legal BI-RADS categories that do not describe the image: unknown.
OTHER_BIRADS = re.compile(r"(BI-?RADS\s*)?[06](\.0)?", re.IGNORECASE)
BOX_COLUMNS = ("xmin", "ymin", "xmax", "ymax")
FINDING_COLUMNS = ("image_id", "finding_categories", "finding_birads", *BOX_COLUMNS)
LONGEST_ID = 200  # bytes; a file name holds 255, including its suffix
TEMPLATE = "template"  # source of a synthetic image's finding that comes from the real image
AGE_COLUMN = "age"  # an optional column that VinDr-Mammo does not have
LESION_COLUMNS = ("shape", "margin", "pathology", "subtlety")  # others, of findings
_NO_TEXT = "has a name that is not plain text (UTF-8); rename it"


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One annotated box.

    Attributes:
        box: (xmin, ymin, xmax, ymax) in native pixels, half-open and inside the image.
        attributes: those of the image, with the finding's categories and BI-RADS.
        extra: the row's other columns that are not blank.
        number: the row's number among the image's rows with a box, from 1. Repeated rows count, because the file name
            of the finding's own mask has this number.
    """

    box: Box
    attributes: Attributes
    extra: dict[str, str] = field(default_factory=dict)
    number: int = 1

    def report(self, image: "ImageRecord") -> str | None:
        """The finding's report, or else its image's; None if neither has one."""
        return self.extra.get("report") or image.extra.get("report")


@dataclass(frozen=True, kw_only=True)
class ImageRecord:
    """One image before it is decoded; ``None`` means unknown.

    Attributes:
        height, width: native pixels.
        attributes: ``finding_categories`` is the empty tuple if the tables say "No Finding", else ``None``.
        extra: the row's other columns that are not blank.
        listed: whether a table lists the image; False for a plain file, whose patient no table states.
        fault: why the file cannot be read, if that is known already (see `find_inputs`).
    """

    study_id: str
    image_id: str
    path: Path
    series_id: str | None = None
    laterality: str | None = None
    view_position: str | None = None
    height: int | None = None
    width: int | None = None
    split: str | None = None
    attributes: Attributes = field(default_factory=Attributes)
    extra: dict[str, str] = field(default_factory=dict)
    findings: tuple[Finding, ...] = ()
    listed: bool = True
    fault: str | None = None

    @property
    def root(self) -> Path:
        """The data set's folder with the tables; only for a `listed` image."""
        return self.path.parents[2]

    @property
    def patient(self) -> str:
        """Group for patient-disjoint splits: the table's ``patient_id``, or else the study (as in VinDr-Mammo)."""
        return self.extra.get("patient_id", self.study_id)

    def patient_in(self, mammogram: Mammogram) -> str:
        """`patient`; for a plain file, whose folder may hold many patients, a digest of its header's PatientID, if any.

        The digest does not protect against guessing. `generate` publishes keyed digests instead (`Deidentifier`).
        """
        named = without_view(mammogram.patient_id or "")
        if self.listed or not named:
            return self.patient
        return digest_of("patient", named)[:16]

    def read(self) -> Mammogram:
        """Decodes the image. View and side are the header's, or else the record's.

        Raises:
            GBCIError: the file is absent, not a mammogram, damaged, or not of the size that the table states.
        """
        if self.fault:
            raise GBCIError(_sentence(self.path, self.fault))
        mammogram = read_mammogram(self.path)
        self.check_shape(mammogram.shape)
        return replace(
            mammogram,
            view_position=mammogram.view_position or (None if mammogram.other_view else self.view_position),
            laterality=mammogram.laterality or self.laterality,
        )

    def file_fault(self) -> str | None:
        """Why the path is not a usable file, as a sentence that begins with the path; None if it is one."""
        fault = self.fault or fault_of(self.path)
        return fault and _sentence(self.path, fault)

    def check_shape(self, shape: tuple[int, int]) -> None:
        """Raises GBCIError if the file's (height, width) differs from the table's."""
        stated = (self.height or shape[0], self.width or shape[1])
        if shape != stated:
            raise GBCIError(
                f"{self.path} has {shape[0]} rows and {shape[1]} columns; expected {stated[0]} "
                f"and {stated[1]} as {BREAST_TABLE} says, or its boxes do not fit"
            )


class VinDr:
    """A data set in the VinDr-Mammo layout.

    Args:
        root: folder with the two tables and ``images/``. Without `FINDING_TABLE` no image has findings. Ids have to be
            plain file names, so that no row leads out of the folder. Links inside the folder are followed.

    Attributes:
        images: one `ImageRecord` per row of `BREAST_TABLE`, in its order.
        clamped: number of boxes that exceeded the image and were cut at its edge (VinDr-Mammo itself has 42).
        repeated: number of finding rows left out because an earlier row of the same image states the same box,
            categories and BI-RADS: one lesion. An `InputWarning` says so.

    Raises:
        GBCIError: a table or column is absent, or a row is illegal; the sentence names file, row and value.
    """

    def __init__(self, root: str | Path):
        self.root = Path(root)
        self.clamped = self.repeated = 0
        images = self._read_images()
        if os.path.lexists(self.root / FINDING_TABLE):
            images = self._add_findings(images)
        self.images = list(images.values())

    def of_split(self, split: str) -> list[ImageRecord]:
        """The images of ``"training"`` or ``"test"``, possibly none.

        Raises:
            GBCIError: another split.
        """
        if split not in SPLITS:
            raise GBCIError(f"split is {split!r}; expected one of {', '.join(SPLITS)}")
        return [image for image in self.images if image.split == split]

    def missing(self) -> list[ImageRecord]:
        """The listed images without a file on the disk."""
        return [image for image in self.images if not image.path.is_file()]

    def _read_images(self) -> dict[str, ImageRecord]:
        listings: dict[str, set[str]] = {}
        images: dict[str, ImageRecord] = {}
        for where, row in read_table(self.root / BREAST_TABLE, IMAGE_COLUMNS):
            study_id, image_id = (_check_id(where, key, row[key]) for key in ("study_id", "image_id"))
            if image_id in images:
                raise GBCIError(f"{where}: image_id {image_id!r} stands in the table twice")
            if row["split"] not in (*SPLITS, ""):
                raise GBCIError(f"{where}: split is {row['split']!r}; expected one of {', '.join(SPLITS)}")
            keys = ("laterality", "view_position", "breast_density", "breast_birads", AGE_COLUMN)
            attributes = _attributes(where, {key: row[key] for key in keys if key in row})
            images[image_id] = ImageRecord(
                study_id=study_id,
                image_id=image_id,
                path=self._locate(study_id, image_id, listings),
                series_id=row["series_id"] or None,
                laterality=attributes.laterality,
                view_position=attributes.view_position,
                height=_parse_size(where, "height", row["height"]),
                width=_parse_size(where, "width", row["width"]),
                split=row["split"] or None,
                attributes=attributes,
                extra=_extra(row, (*IMAGE_COLUMNS, AGE_COLUMN)),
            )
        if not images:
            raise GBCIError(f"{self.root / BREAST_TABLE} has no rows; expected one per image")
        return images

    def _locate(self, study_id: str, image_id: str, listings: dict[str, set[str]]) -> Path:
        """The image's file, or its VinDr-Mammo path if absent. Every study folder is listed only once."""
        folder = self.root / "images" / study_id
        if study_id not in listings:
            try:
                listings[study_id] = {file.name for file in folder.iterdir()}
            except OSError:  # absent, or unreadable: so is every image in it
                listings[study_id] = set()
        names = [image_id + suffix for suffix in IMAGE_SUFFIXES]
        return folder / next((name for name in names if name in listings[study_id]), names[0])

    def _add_findings(self, images: dict[str, ImageRecord]) -> dict[str, ImageRecord]:
        findings: dict[str, list[Finding]] = {}
        boxes: Counter[str] = Counter()  # rows with a box, by image
        stated: set[tuple[str, Box, Attributes]] = set()
        first_repeated = ""
        for where, row in read_table(self.root / FINDING_TABLE, FINDING_COLUMNS):
            image = images.get(row["image_id"])
            if image is None:
                raise GBCIError(f"{where}: image_id {row['image_id']!r} does not stand in {BREAST_TABLE}")
            known = _attributes(where, {key: row[key] for key in ("finding_categories", "finding_birads")})
            box = _parse_box(where, row)
            healthy = known.finding_categories == ()
            if healthy and box is not None:
                raise GBCIError(f"{where}: {NO_FINDING!r} comes with the box {box}; expected blanks")
            if known.finding_categories and box is None:
                raise GBCIError(f"{where}: {row['finding_categories']} comes without a box; expected xmin to ymax")
            # A row without category and box carries no information.
            if healthy or box is not None:
                findings.setdefault(image.image_id, [])
            if box is not None:
                boxes[image.image_id] += 1
                finding = self._finding(where, row, image, box, known, boxes[image.image_id])
                lesion = (image.image_id, finding.box, known)  # the row's other columns may differ
                if lesion in stated:
                    self.repeated += 1
                    first_repeated = first_repeated or where
                    continue
                stated.add(lesion)
                findings[image.image_id].append(finding)
                self.clamped += finding.box != box
        if self.repeated:
            more = f" and {self.repeated - 1} more rows" if self.repeated > 1 else ""
            warnings.warn(
                f"{first_repeated}{more}: the same image, box, finding_categories and finding_birads as in an earlier "
                "row; counted as one lesion",
                InputWarning,
                stacklevel=2,
            )
        return {image_id: _with_findings(image, findings.get(image_id)) for image_id, image in images.items()}

    def _finding(
        self, where: str, row: dict[str, str], image: ImageRecord, box: Box, known: Attributes, number: int
    ) -> Finding:
        extra = _extra(row, (*IMAGE_COLUMNS, *FINDING_COLUMNS, AGE_COLUMN))
        shape, margin = shape_and_margin(extra.get("report"))
        told = _attributes(where, {name: extra.get(name, "") for name in LESION_COLUMNS})
        return Finding(
            box=_clamp(where, box, image),
            attributes=replace(
                image.attributes,
                finding_categories=known.finding_categories,
                finding_birads=known.finding_birads,
                shape=told.shape or shape,
                margin=told.margin or margin,
                pathology=told.pathology,
                subtlety=told.subtlety,
            ),
            extra=extra,
            number=number,
        )


def is_data_set(folder: Path) -> bool:
    """Whether a folder is a `VinDr` root: it has at least one of the tables, or a link to one."""
    return any(os.path.lexists(folder / table) for table in (BREAST_TABLE, FINDING_TABLE))


def find_inputs(path: str | Path, *, skip_bad: bool = False) -> list[ImageRecord]:
    """The images of an INPUT argument, not yet decoded; plain files are sorted by path.

    Args:
        path: one DICOM or PNG file, a folder of them (searched recursively and through links, see `walk_files`; other
            files are ignored), or a `VinDr` root.
        skip_bad: a folder that cannot be listed, a broken link, or a name that is not UTF-8 becomes a record with a
            ``fault`` instead of an error.

    Returns:
        Records with unique ``image_id``. For plain files, ``image_id`` is the file's stem (with ``-2``, ``-3`` … for
        repeated stems), ``study_id`` is the folder below ``path`` (``001-left`` for ``001/left/``, the folder's own
        name for ``path`` itself), and view and side come from the file name.

    Raises:
        GBCIError: the path is absent or holds no image; without ``skip_bad`` also the faults above.
    """
    path = Path(path)
    if path.is_dir():
        if is_data_set(path):
            return VinDr(path).images
        found = [entry for entry in walk_files(path) if _may_be_image(entry)]
        if not found:
            raise GBCIError(f"{path} holds no DICOM or PNG file and no {BREAST_TABLE}")
    elif path.is_file():
        found = [Found(path=path)]
    else:
        fault = fault_of(path)
        raise GBCIError(f"{_sentence(path, fault)}; expected a DICOM or PNG file or a folder of them")
    # Ids and tables are text.
    found = [entry if is_text(entry.path) else replace(entry, fault=_NO_TEXT) for entry in found]
    faults = [(entry.path, entry.fault) for entry in found if entry.fault is not None]
    if faults and not skip_bad:
        more = f" ({len(faults) - 1} more cannot be looked at either)" if len(faults) > 1 else ""
        raise GBCIError(f"{_sentence(*faults[0])}{more}")
    return list(_file_records(found, path if path.is_dir() else path.parent))


def _may_be_image(entry: Found) -> bool:
    """Whether an entry looks like an image, or cannot be read and might be an image or a folder of images."""
    hidden = entry.path.name.startswith(".")
    if entry.fault is None:
        return looks_like_image(entry.path) or not (hidden or _opens(entry.path))
    if stat.S_ISDIR(entry.mode):
        return True
    return not hidden and (entry.mode == 0 or entry.path.suffix.lower() in IMAGE_SUFFIXES)


def _opens(path: Path) -> bool:
    """Whether a file can be read."""
    try:
        with path.open("rb") as file:
            file.read(1)
    except OSError:
        return False
    return True


def is_text(text: str | Path) -> bool:
    """Whether a name or an argument is UTF-8; Python decodes other bytes as lone surrogates."""
    return not any("\ud800" <= character <= "\udfff" for character in str(text))


def _plain(name: str) -> str:
    """A name for a table: bytes that are not UTF-8 are escaped."""
    return name if is_text(name) else one_line(name)


def _sentence(path: Path, fault: str) -> str:
    return f"{path if is_text(path) else repr(str(path))} {fault}"


def _file_records(found: Sequence[Found], root: Path) -> Iterator[ImageRecord]:
    taken: set[str] = set()
    names: dict[str, Iterator[str]] = {}  # per stem, the names that were not tried yet
    for entry in found:
        file, stem = entry.path, _plain(entry.path.stem)
        image_id = next(name for name in names.setdefault(stem, _numbered(stem)) if name not in taken)
        taken.add(image_id)
        attributes = Attributes(laterality=laterality_in_text(stem), view_position=view_in_text(stem))
        yield ImageRecord(
            study_id=_plain("-".join(file.parent.relative_to(root).parts) or root.absolute().name),
            image_id=image_id,
            path=file,
            laterality=attributes.laterality,
            view_position=attributes.view_position,
            attributes=attributes,
            listed=False,
            fault=entry.fault,
        )


def _numbered(stem: str) -> Iterator[str]:
    yield stem
    yield from (f"{stem}-{number}" for number in count(2))


def _check_id(where: str, key: str, value: str) -> str:
    """Refuses an id that is no plain file name: ids become file names, which must not lead out of ``images/``."""
    legal = value.isprintable() and not any(character in value for character in "/\\:")
    if not legal or value in ("", ".", "..") or len(value.encode(errors="replace")) > LONGEST_ID:
        raise GBCIError(f"{where}: {key} is {value!r}; expected an identifier that is a plain file name")
    return value


def _attributes(where: str, values: dict[str, str]) -> Attributes:
    other = [key for key, text in values.items() if key.endswith("birads") and OTHER_BIRADS.fullmatch(text)]
    try:
        return Attributes.from_mapping(values | dict.fromkeys(other))
    except GBCIError as error:
        raise GBCIError(f"{where}: {error}") from None


def _extra(row: dict[str, str], known: tuple[str, ...]) -> dict[str, str]:
    return {column: text for column, text in row.items() if column not in known and not is_unknown(text)}


def _parse_size(where: str, key: str, text: str) -> int | None:
    if is_unknown(text):
        return None
    if not re.fullmatch(r"\d{1,9}(\.0+)?", text) or not float(text):
        raise GBCIError(f"{where}: {key} is {text!r}; expected a number of pixels")
    return int(float(text))


def _parse_box(where: str, row: dict[str, str]) -> Box | None:
    texts = [row[column] for column in BOX_COLUMNS]
    if all(is_unknown(text) for text in texts):
        return None
    try:
        xmin, ymin, xmax, ymax = (float(text) for text in texts)
    except ValueError:
        xmin = ymin = xmax = ymax = math.nan
    if not (math.isfinite(xmin + ymin + xmax + ymax) and xmin < xmax and ymin < ymax):
        raise GBCIError(f"{where}: the box is ({', '.join(texts)}); expected numbers with xmin < xmax and ymin < ymax")
    return xmin, ymin, xmax, ymax


def _clamp(where: str, box: Box, image: ImageRecord) -> Box:
    width, height = image.width or math.inf, image.height or math.inf
    xmin, ymin, xmax, ymax = box
    inside = (max(xmin, 0.0), max(ymin, 0.0), min(xmax, float(width)), min(ymax, float(height)))
    if inside[0] >= inside[2] or inside[1] >= inside[3]:
        raise GBCIError(f"{where}: the box {box} lies outside the image of {width} x {height} pixels")
    return inside


def _with_findings(image: ImageRecord, findings: list[Finding] | None) -> ImageRecord:
    """The image with its findings: ``None`` = no row, unknown; ``[]`` = only "No Finding" rows, healthy."""
    if findings is None:
        return image
    if not findings:
        return replace(image, attributes=replace(image.attributes, finding_categories=()))
    return replace(image, findings=tuple(findings))
