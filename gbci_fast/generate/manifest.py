"""The tables of a synthetic data set: VinDr-Mammo's two CSVs, so that any VinDr reader takes it, and the manifest."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from gbci_fast.data.attributes import NO_FINDING
from gbci_fast.data.vindr import AGE_COLUMN, BOX_COLUMNS, BREAST_TABLE, FINDING_TABLE, IMAGE_COLUMNS
from gbci_fast.files import atomically

MANIFEST = "manifest.parquet"
SKIPPED = "skipped.csv"
TABLES = (MANIFEST, BREAST_TABLE, FINDING_TABLE)
# "patient_id" is the template's: variants of one breast must not be split, nor from the real image.
_EXTRA = (AGE_COLUMN, "report", "source", "spacing_mm", "patient_id", "template_image_id")
_FINDING_COLUMNS = (
    *IMAGE_COLUMNS[:-1],
    "finding_categories",
    "finding_birads",
    *BOX_COLUMNS,
    "split",
    *_EXTRA,
    "pathology",
)


def write_tables(rows: Sequence[dict[str, Any]], output: Path) -> None:
    """Writes the manifest (one row per image, everything that made it) and the two annotation tables.

    A template's own findings that were not painted over are listed after the synthetic one, with their own reports and
    pathology, and `TEMPLATE` as their source: they are still there. Beside them, the report of the image is blank: it
    would be read as theirs.
    """
    rows = sorted(rows, key=lambda row: row["index"])
    manifest = pd.DataFrame([_flat(row) for row in rows])
    breasts = pd.DataFrame([_image_columns(row) for row in rows], columns=[*IMAGE_COLUMNS, *_EXTRA])
    findings = pd.DataFrame([finding for row in rows for finding in _finding_rows(row)], columns=_FINDING_COLUMNS)
    atomically(output / MANIFEST, lambda temporary: manifest.to_parquet(temporary, index=False))
    atomically(output / BREAST_TABLE, lambda temporary: breasts.to_csv(temporary, index=False))
    atomically(output / FINDING_TABLE, lambda temporary: findings.to_csv(temporary, index=False))


def write_skipped(skipped: Sequence[tuple[str, str]], output: Path) -> None:
    """Writes `SKIPPED`: every (file, reason) once, in their order."""
    table = pd.DataFrame(list(dict.fromkeys(skipped)), columns=["file", "reason"])
    atomically(output / SKIPPED, lambda temporary: table.to_csv(temporary, index=False))


def read_reasons(output: Path) -> list[str]:
    """The reasons in `SKIPPED`; none where there is no such file."""
    file = output / SKIPPED
    return pd.read_csv(file, dtype=str, keep_default_na=False)["reason"].tolist() if file.exists() else []


def _flat(row: dict[str, Any]) -> dict[str, Any]:
    """Nested values as JSON text; one column per file and digest."""
    flat = {key: value for key, value in row.items() if key not in ("files", "sha256")}
    flat["attributes"] = json.dumps(row["attributes"])
    flat["template_findings"] = json.dumps(row["template_findings"])
    for kind, name in row["files"].items():
        flat[f"{kind}_file"], flat[f"{kind}_sha256"] = name, row["sha256"][kind]
    return flat


def _image_columns(row: dict[str, Any]) -> dict[str, Any]:
    attributes = row["attributes"]
    return {
        "study_id": row["study_id"],
        "series_id": row["study_id"],
        "image_id": row["image_id"],
        "laterality": attributes.get("laterality", ""),
        "view_position": attributes.get("view_position", ""),
        "height": row["height"],
        "width": row["width"],
        "breast_birads": _birads(attributes.get("breast_birads")),
        "breast_density": f"DENSITY {attributes['breast_density']}" if "breast_density" in attributes else "",
        "split": row["split"],
        AGE_COLUMN: attributes.get("age", ""),
        "report": "" if row["template_findings"] else row["report"] or "",
        "source": "synthetic",
        "spacing_mm": "" if row["spacing_assumed"] else row["spacing_mm"],
        "patient_id": row["template_patient_id"],
        "template_image_id": row["template_image_id"],
    }


def _finding_rows(row: dict[str, Any]) -> list[dict[str, Any]]:
    shared = _image_columns(row)
    painted = {
        "box": [row[name] for name in BOX_COLUMNS],
        "attributes": row["attributes"],
        "report": row["report"],
        "pathology": None,
        "source": shared["source"],
    }
    findings = [
        finding
        for finding in (painted, *row["template_findings"])
        if finding["attributes"].get("finding_categories") != []
    ]
    if not findings:
        return [{**shared, "finding_categories": str([NO_FINDING]), "finding_birads": ""}]
    return [
        {
            **shared,
            "finding_categories": str(finding["attributes"].get("finding_categories", "")),
            "finding_birads": _birads(finding["attributes"].get("finding_birads")),
            **dict(zip(BOX_COLUMNS, finding["box"], strict=True)),
            **{name: finding[name] or "" for name in ("report", "pathology", "source")},
        }
        for finding in findings
    ]


def _birads(grade: int | None) -> str:
    return "" if grade is None else f"BI-RADS {grade}"
