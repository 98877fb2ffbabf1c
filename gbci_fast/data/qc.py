"""Quality control of a cache: counts, what looks wrong and where, as one HTML page beside its pictures."""

import base64
import html
import io
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from PIL import Image

from gbci_fast.data.cache import Cache
from gbci_fast.data.qc_figures import draw_sheets, draw_summary

QC_FOLDER = "qc"
REPORT, SUMMARY = "report.html", "summary.png"
SMALL_LESION = 3  # model pixels
MAX_Z = 5.0
# Measure of an image, and the least spread that counts as one: a set of near-equal images has no outliers.
MEASURES = {"breast_fraction": 0.02, "brightness": 0.02, "aspect": 0.05, "saturated": 0.005}
LISTED = 12  # images shown per kind of issue
NOTE_KINDS = 20
THUMBNAIL = 96


@dataclass(frozen=True, kw_only=True)
class Issue:
    """Something to look at: its kind, the field of view that shows it, and what it is."""

    kind: str
    position: int
    text: str


def write_qc(cache: Cache, folder: Path, *, skipped: Sequence[tuple[str, str]] = (), sheets: int = 1) -> None:
    """Writes contact sheets, `SUMMARY` and `REPORT` into `folder`.

    Args:
        skipped: (file, reason) of what could not be read.
        sheets: pages of the contact sheet.
    """
    folder.mkdir(parents=True, exist_ok=True)
    table = image_table(cache)
    pages = draw_sheets(cache, table["position"].tolist(), folder, sheets)
    draw_summary(table, folder / SUMMARY)
    text = build_report(cache, table, list(find_issues(cache, table)), skipped, [page.name for page in pages])
    (folder / REPORT).write_text(
        text.replace("@SUMMARY@", _data_uri((folder / SUMMARY).read_bytes())), encoding="utf-8"
    )


def image_table(cache: Cache) -> pd.DataFrame:
    """One row per image: the index of its first field of view, with its ``position``."""
    nested = ["lesions", "notes"]  # pandas would turn their integers into floats
    table = cache.index.drop_columns([*nested, "frame"]).to_pandas()
    table = table.assign(**{name: cache.index.column(name).to_pylist() for name in nested})
    table["position"] = range(len(table))
    return table.drop_duplicates(["source", "path"]).reset_index(drop=True)


def find_issues(cache: Cache, table: pd.DataFrame) -> Iterator[Issue]:
    """Everything that deserves a look, by kind; `table` is `image_table`."""
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
    """Contradictions, and what the reader found unusual; a kind for each of the most frequent."""
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
    """Against the other images of the same source, since film and detectors differ."""
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
    """Title to label to images (for findings: boxes) per source."""
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
    """Label to count per source, by label; the 12 most frequent where there are more, the rest in one line."""
    counts: dict[str, Counter] = {}
    for source, value in pairs:
        label = "unknown" if value is None or pd.isna(value) else str(value)
        counts.setdefault(label, Counter())[source] += 1
    frequent = sorted(counts, key=lambda label: (-counts[label].total(), label))[:12]
    kept = {label: counts[label] for label in sorted(frequent)}
    if rest := [counter for label, counter in counts.items() if label not in kept]:
        kept[f"{len(rest)} others"] = sum(rest, Counter())
    return kept


_STYLE = """body{font:14px/1.4 sans-serif;max-width:72em;margin:2em auto;padding:0 1em;color:#222}
table{border-collapse:collapse;margin:.5em 0 1.5em}td,th{border:1px solid #ccc;padding:.2em .6em;text-align:left;
vertical-align:top}td.n{text-align:right}figure{display:inline-block;width:190px;margin:.4em;vertical-align:top;
font-size:11px;overflow-wrap:anywhere}img{max-width:100%;background:#000}.tables{column-width:22em}
.tables>div{break-inside:avoid}"""


def build_report(
    cache: Cache,
    table: pd.DataFrame,
    issues: Sequence[Issue],
    skipped: Sequence[tuple[str, str]],
    pages: Sequence[str],
) -> str:
    """The page as HTML; every text that comes from the data is escaped, and the page may load and run nothing."""
    sources = [source["name"] for source in cache.info["sources"]]
    by_kind: dict[str, list[Issue]] = {}
    for issue in issues:
        by_kind.setdefault(issue.kind, []).append(issue)
    clamped, repeated = (sum(source[name] for source in cache.info["sources"]) for name in ("clamped", "repeated"))
    overview = [
        ("Images", len(table)),
        ("Fields of view", f"{len(cache)} of {cache.size} x {cache.size} pixels"),
        ("Patients", len(table[["source", "patient"]].drop_duplicates())),
        ("Skipped files", len(skipped)),
        ("Boxes cut at the image's edge", clamped),
        ("Rows that repeat a finding, left out", repeated),
        *((kind, len(found)) for kind, found in by_kind.items()),
    ]
    sections = [
        "<h1>Quality of the prepared data</h1>",
        _table(("", ""), overview),
        "".join(f'<p><a href="{html.escape(page)}">{html.escape(page)}</a></p>' for page in pages),
        '<img alt="distributions" src="@SUMMARY@">',
        '<h2>Counts</h2><div class="tables">',
        *(_counts(title, counts, sources) for title, counts in count_tables(cache, table).items()),
        "</div>",
        *(_issues(cache, kind, found) for kind, found in by_kind.items()),
    ]
    if skipped:
        sections += ["<h2>Skipped files</h2>", _table(("file", "reason"), skipped[:500])]
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Quality of the prepared data</title>'
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:; style-src '
        f"'unsafe-inline'\"><style>{_STYLE}</style></head><body>{''.join(sections)}</body></html>\n"
    )


def _issues(cache: Cache, kind: str, found: Sequence[Issue]) -> str:
    shown = "".join(_figure(cache, issue) for issue in found[:LISTED])
    more = f"<p>and {len(found) - LISTED} more</p>" if len(found) > LISTED else ""
    return f"<h2>{html.escape(kind)} ({len(found)})</h2>{shown}{more}"


def _figure(cache: Cache, issue: Issue) -> str:
    row, field = cache.row(issue.position), cache[issue.position]
    thumbnail = Image.fromarray((field.image >> 8).astype(np.uint8)).resize((THUMBNAIL, THUMBNAIL))
    buffer = io.BytesIO()
    thumbnail.save(buffer, format="PNG")
    name = html.escape(f"{row['source']}/{row['study_id']}/{row['image_id']}")
    return f'<figure><img alt="" src="{_data_uri(buffer.getvalue())}"><br>{html.escape(issue.text)}<br>{name}</figure>'


def _counts(title: str, counts: dict[str, Counter], sources: Sequence[str]) -> str:
    shown = sources if len(sources) > 1 else []
    rows = [(label, *(counter[source] for source in shown), counter.total()) for label, counter in counts.items()]
    return f"<div><h3>{html.escape(title)}</h3>{_table(('', *shown, 'all'), rows)}</div>"


def _table(heading: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in heading) if any(heading) else ""
    body = "".join(f"<tr>{''.join(map(_cell, row))}</tr>" for row in rows)
    return f"<table>{f'<tr>{head}</tr>' if head else ''}{body}</table>"


def _cell(value: object) -> str:
    return f'<td class="n">{value}</td>' if isinstance(value, int) else f"<td>{html.escape(str(value))}</td>"


def _data_uri(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"
