"""Quality control of a cache: counts and suspicious images as one HTML page, with contact sheets."""

import base64
import io
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from PIL import Image

from gbci_fast.data.cache import Cache
from gbci_fast.data.qc_figures import draw_sheets, draw_summary

QC_FOLDER = "qc"
REPORT, SUMMARY = "report.html", "summary.png"
SMALL_LESION = 3  # model pixels
MAX_Z = 5.0
# Measures of an image, each with the smallest spread to divide by: a set of near-equal images has no outliers.
MEASURES = {"breast_fraction": 0.02, "brightness": 0.02, "aspect": 0.05, "saturated": 0.005}
LISTED = 12  # images shown per kind of issue
NOTE_KINDS = 20
THUMBNAIL = 96
PAGES = Environment(
    loader=FileSystemLoader(Path(__file__).parent),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    keep_trailing_newline=True,
)


@dataclass(frozen=True, kw_only=True)
class Issue:
    """Something to inspect: its kind, the index of a field of view that shows it, and a description."""

    kind: str
    position: int
    text: str


def write_qc(cache: Cache, folder: Path, *, skipped: Sequence[tuple[str, str]] = (), sheets: int = 1) -> None:
    """Writes contact sheets, `SUMMARY` and `REPORT` into ``folder``.

    Args:
        skipped: (file, reason) of every skipped file.
        sheets: pages of the contact sheet.
    """
    folder.mkdir(parents=True, exist_ok=True)
    table = image_table(cache)
    pages = draw_sheets(cache, table["position"].tolist(), folder, sheets)
    draw_summary(table, folder / SUMMARY)
    text = build_report(cache, table, skipped, [page.name for page in pages], (folder / SUMMARY).read_bytes())
    (folder / REPORT).write_text(text, encoding="utf-8")


def image_table(cache: Cache) -> pd.DataFrame:
    """One row per image: the index row of its first field of view, with its ``position`` in the cache."""
    nested = ["lesions", "notes"]  # pandas would convert their integers to floats
    table = cache.index.drop_columns([*nested, "frame"]).to_pandas()
    table = table.assign(**{name: cache.index.column(name).to_pylist() for name in nested})
    table["position"] = range(len(table))
    return table.drop_duplicates(["source", "path"]).reset_index(drop=True)


def find_issues(table: pd.DataFrame) -> Iterator[Issue]:
    """Yields everything that deserves inspection, by kind; ``table`` is from `image_table`."""
    yield from _notes(table)
    yield from _lesion_issues(table)
    yield from _outliers(table)
    yield from _copies(table)


def robust_z(values: np.ndarray, floor: float) -> np.ndarray:
    """Distance from the median in robust standard deviations (1.4826 MAD, at least `floor`)."""
    distance = np.abs(values - np.median(values))
    return distance / max(1.4826 * float(np.median(distance)), floor)


def _rows(table: pd.DataFrame) -> Iterator[Any]:
    """Named tuples with a field per column, whose names a type checker cannot know."""
    return iter(table.itertuples())


def _notes(table: pd.DataFrame) -> Iterator[Issue]:
    """Issues from the images' notes (`INDEX_SCHEMA`). Each of the most frequent notes is a kind of its own."""
    notes = [(row.position, note) for row in _rows(table) for note in row.notes]
    frequent = [note for note, _ in Counter(note for _, note in notes).most_common(NOTE_KINDS)]
    for position, note in notes:
        yield Issue(kind=f"Note: {note}" if note in frequent else "Other notes", position=position, text=note)


def _lesion_issues(table: pd.DataFrame) -> Iterator[Issue]:
    for row in _rows(table[table["kind"] == "whole"]):
        if row.findings > len(row.lesions):
            lost = row.findings - len(row.lesions)
            yield Issue(
                kind="Boxes outside the field of view",
                position=row.position,
                text=f"{lost} of {row.findings} boxes lie outside the breast's crop",
            )
        for lesion in row.lesions:
            xmin, ymin, xmax, ymax = lesion["model_box"]
            width, height = xmax - xmin, ymax - ymin
            if max(width, height) < SMALL_LESION:
                text = f"finding {lesion['finding']} is {width:.1f} x {height:.1f} pixels in the field of view"
                yield Issue(kind=f"Lesions below {SMALL_LESION} pixels", position=row.position, text=text)
            if lesion["inside"] < 0.5:
                text = f"{1 - lesion['inside']:.0%} of finding {lesion['finding']} lies outside the breast's outline"
                yield Issue(kind="Lesions outside the breast", position=row.position, text=text)


def _outliers(table: pd.DataFrame) -> Iterator[Issue]:
    """Outliers among the images of the same source; film and detectors differ too much to be compared."""
    for name, floor in MEASURES.items():
        for _, group in table.groupby("source", sort=False):
            values = group[name].to_numpy(np.float64)
            scores = robust_z(values, floor)
            for i in np.argsort(-scores, kind="stable"):
                if scores[i] <= MAX_Z:
                    break
                text = f"{values[i]:.3f}, median {np.median(values):.3f}, z = {scores[i]:.1f}"
                yield Issue(
                    kind=f"Outliers: {name.replace('_', ' ')}", position=int(group["position"].iloc[i]), text=text
                )


def _copies(table: pd.DataFrame) -> Iterator[Issue]:
    for _, group in table[table.duplicated("sha256", keep=False)].groupby("sha256", sort=False):
        first, *others = _rows(group)
        for row in others:
            text = f"the same file as {first.source}/{first.path}"
            if row.split != first.split:
                text += f", which is of split {first.split}, not {row.split}"
            yield Issue(kind="The same file twice", position=row.position, text=text)
    patients = table.dropna(subset="split").groupby(["source", "patient"], sort=False)
    for (_, patient), group in patients:
        if group["split"].nunique() > 1:
            text = f"patient {patient} is in both splits"
            yield Issue(kind="Patients in both splits", position=int(group["position"].iloc[0]), text=text)


def count_tables(cache: Cache, table: pd.DataFrame) -> dict[str, dict[str, Counter]]:
    """{title: {label: count per source}} of images, of boxes for findings, and of fields of view."""
    lesions = [(row.source, lesion) for row in _rows(table) for lesion in row.lesions]
    spacing = table["row_spacing"].map(lambda value: "unknown" if pd.isna(value) else f"{value:.3f} mm")
    columns = {
        "Split": table["split"],
        "Patient fold": table["fold"],
        "View": table["view_position"],
        "Side": table["laterality"],
        "Breast density": table["breast_density"],
        "Breast BI-RADS": table["breast_birads"].astype("Int64"),
        "Native size": table["width"].astype(str) + " x " + table["height"].astype(str),
        "Native spacing": spacing,
    }
    tables = {title: _count(zip(table["source"], values, strict=True)) for title, values in columns.items()}
    kinds = cache.index.select(["source", "kind"]).to_pandas()
    tables["Fields of view"] = _count(zip(kinds["source"], kinds["kind"], strict=True))
    categories = [(s, name) for s, x in lesions for name in _categories(x)]
    tables["Finding category (boxes)"] = _count(categories)
    tables["Finding BI-RADS (boxes)"] = _count((s, x["attributes"]["finding_birads"]) for s, x in lesions)
    return tables


def _categories(lesion: dict[str, Any]) -> list[str | None]:
    categories = lesion["attributes"]["finding_categories"]
    return [None] if categories is None else list(categories)


def _count(pairs: Iterable[tuple[str, Any]]) -> dict[str, Counter]:
    """{label: count per source}, sorted by label. Beyond the 12 most frequent labels, the rest is one entry."""
    counts: dict[str, Counter] = {}
    for source, value in pairs:
        label = "unknown" if value is None or pd.isna(value) else str(value)
        counts.setdefault(label, Counter())[source] += 1
    frequent = sorted(counts, key=lambda label: (-counts[label].total(), label))[:12]
    kept = {label: counts[label] for label in sorted(frequent)}
    if rest := [counter for label, counter in counts.items() if label not in kept]:
        kept[f"{len(rest)} others"] = sum(rest, Counter())
    return kept


def build_report(
    cache: Cache, table: pd.DataFrame, skipped: Sequence[tuple[str, str]], pages: Sequence[str], summary: bytes
) -> str:
    """The page as HTML. Text from the data is escaped, and a content security policy forbids scripts and loading."""
    issues: dict[str, list[Issue]] = {}
    for issue in find_issues(table):
        issues.setdefault(issue.kind, []).append(issue)
    sources = cache.info["sources"]
    overview = [
        ("Images", len(table)),
        ("Fields of view", f"{len(cache)} of {cache.size} x {cache.size} pixels"),
        ("Patients", len(table[["source", "patient"]].drop_duplicates())),
        ("Skipped files", len(skipped)),
        ("Boxes cut at the image's edge", sum(source["clamped"] for source in sources)),
        ("Rows that repeat a finding, left out", sum(source["repeated"] for source in sources)),
        *((kind, len(found)) for kind, found in issues.items()),
    ]
    names = [source["name"] for source in sources] if len(sources) > 1 else []
    counts = {
        title: [(label, *(one[name] for name in names), one.total()) for label, one in labels.items()]
        for title, labels in count_tables(cache, table).items()
    }

    def thumbnail(issue: Issue) -> bytes:
        image = Image.fromarray((cache[issue.position].image >> 8).astype(np.uint8))
        buffer = io.BytesIO()
        image.resize((THUMBNAIL, THUMBNAIL)).save(buffer, format="PNG")
        return buffer.getvalue()

    def name(issue: Issue) -> str:
        row = cache.row(issue.position)
        return f"{row['source']}/{row['study_id']}/{row['image_id']}"

    return PAGES.get_template("qc.html").render(
        overview=overview,
        pages=pages,
        summary=summary,
        counts=counts,
        sources=names,
        issues=issues,
        listed=LISTED,
        skipped=skipped,
        data_uri=_data_uri,
        thumbnail=thumbnail,
        name=name,
    )


def _data_uri(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"
