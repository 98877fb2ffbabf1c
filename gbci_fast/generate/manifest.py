"""The tables of a synthetic data set: the manifest, and VinDr-Mammo's two CSVs, which any VinDr reader can read."""

import csv
import json
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from gbci_fast.attributes import NO_FINDING
from gbci_fast.data.vindr import AGE_COLUMN, BOX_COLUMNS, BREAST_TABLE, FINDING_TABLE, IMAGE_COLUMNS, LESION_COLUMNS
from gbci_fast.errors import one_line
from gbci_fast.jobs.files import atomically
from gbci_fast.jobs.folder import SKIPPED

MANIFEST = "manifest.parquet"
TABLES = (MANIFEST, BREAST_TABLE, FINDING_TABLE)
SYNTHETIC = "synthetic"  # `source` of painted findings


def _columns(kind: pa.DataType, *names: str) -> list[pa.Field]:
    return [pa.field(name, kind, nullable=False) for name in names]


# Every job has this schema, so that the tables of many jobs can be read as one. No cell is null: a missing text is "",
# and an unknown subtlety 0. "lesion", "attributes", "template_findings" and "finding_masks" are JSON, since their keys
# differ between images (docs/data.md).
MANIFEST_SCHEMA = pa.schema(
    [
        *_columns(pa.string(), "image_id", "study_id"),
        *_columns(pa.int64(), "index", "variant", "seed", "height", "width", *BOX_COLUMNS),
        *_columns(pa.string(), "lesion_id", "lesion", "date"),
        *_columns(pa.string(), "mask_source", "attributes", "shape", "margin", "pathology"),
        *_columns(pa.int64(), "subtlety"),
        *_columns(pa.string(), "report", "split"),
        *_columns(pa.float64(), "spacing_mm"),
        *_columns(pa.bool_(), "spacing_assumed"),
        *_columns(pa.string(), "template_patient_id", "template_study_id", "template_image_id", "template_file"),
        *_columns(pa.string(), "template_sha256", "template_notes", "template_findings", "finding_masks"),
        *_columns(pa.int64(), "batch"),
        *_columns(pa.string(), "gbci_fast", "scheduler"),
        *_columns(pa.bool_(), "few_step"),
        *_columns(pa.string(), "ignored_attributes"),
        *_columns(pa.int64(), "job_seed"),
        *_columns(pa.string(), "formats"),
        *_columns(pa.int64(), "num_inference_steps"),
        *_columns(pa.float64(), "guidance_scale"),
        *_columns(pa.int64(), "batch_size", "shard_size"),
        *_columns(pa.string(), "compression", "runtime", "tier", "dtype", "device"),
        *_columns(pa.string(), "weights_hash", "priors_hash", "copies_hash"),
        *_columns(
            pa.string(),
            *(f"{kind}_{what}" for kind in ("dicom", "png", "mask", "webdataset") for what in ("file", "sha256")),
        ),
    ]
)
# "patient_id" is the template's: split by it, so that variants of one breast and the real image stay together.
_EXTRA = (AGE_COLUMN, "report", "source", "spacing_mm", "patient_id", "template_image_id")
_FINDING_COLUMNS = (
    *IMAGE_COLUMNS[:-1],
    "finding_categories",
    "finding_birads",
    *BOX_COLUMNS,
    "split",
    *_EXTRA,
    *LESION_COLUMNS,
    "lesion_id",
    "mask_file",
)


ROWS_AT_ONCE = 2**14  # of the manifest in memory; a row group of the file


def write_tables(rows: Iterable[dict[str, Any]], output: Path) -> None:
    """Writes the manifest (one row per image, with all settings) and the two annotation tables, in the order of `rows`.

    A template's own findings that were not painted over are listed after the synthetic one, with their own reports,
    pathology, shape, margin and subtlety, and `TEMPLATE` as their source. The report of such an image is left blank,
    because it describes the synthetic finding only. The column mask_file names the mask of a finding where its pixels
    are known.

    Args:
        rows: of the images; iterated once per table and never held whole.
        output: the data set's folder.
    """
    atomically(output / MANIFEST, lambda temporary: _write_manifest(rows, temporary))
    breasts = (_image_columns(row) for row in rows)
    _write_csv(output / BREAST_TABLE, (*IMAGE_COLUMNS, *_EXTRA), breasts)
    findings = (finding for row in rows for finding in _finding_rows(row))
    _write_csv(output / FINDING_TABLE, _FINDING_COLUMNS, findings)


def _write_manifest(rows: Iterable[dict[str, Any]], path: Path) -> None:
    flat = map(manifest_row, rows)
    with pq.ParquetWriter(path, MANIFEST_SCHEMA) as writer:
        while part := list(islice(flat, ROWS_AT_ONCE)):
            writer.write_table(pa.Table.from_pylist(part, MANIFEST_SCHEMA))


def _write_csv(path: Path, columns: Sequence[str], rows: Iterable[dict[str, Any]]) -> None:
    def write(temporary: Path) -> None:
        with temporary.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, columns, restval="", lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)

    atomically(path, write)


def write_skipped(skipped: Iterable[tuple[str, str]], output: Path) -> None:
    """Writes `SKIPPED`: each distinct (file, reason) once, in order of appearance."""
    lines = [(one_line(file), one_line(reason)) for file, reason in skipped]
    table = pd.DataFrame(list(dict.fromkeys(lines)), columns=["file", "reason"])
    atomically(output / SKIPPED, lambda temporary: table.to_csv(temporary, index=False))


def read_reasons(output: Path) -> list[str]:
    """The reasons in `SKIPPED`; none where there is no such file."""
    file = output / SKIPPED
    return pd.read_csv(file, dtype=str, keep_default_na=False)["reason"].tolist() if file.exists() else []


def manifest_row(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row of the manifest and of a shard's JSON, with the columns and types of `MANIFEST_SCHEMA`.

    Args:
        row: the row of `ImageWriter.write` with the job's columns. "files" and "sha256" hold the written files by kind:
            "dicom", "png", "mask", "webdataset", and the `finding_kind` of every lesion mask.

    Raises:
        KeyError: the row's columns are not those of the schema.
    """
    files, digests = row["files"], row["sha256"]
    masks = [
        entry | {"file": files.get(kind, ""), "sha256": digests.get(kind, "")}
        for entry in row["finding_masks"]
        for kind in [finding_kind(entry["finding"])]
    ]
    flat = {key: value for key, value in row.items() if key not in ("files", "sha256")}
    flat |= {key: json.dumps(row[key]) for key in ("lesion", "attributes", "template_findings")}
    flat |= {"finding_masks": json.dumps(masks)}
    flat |= {name: row["attributes"].get(name, 0 if name == "subtlety" else "") for name in LESION_COLUMNS}
    for kind in ("dicom", "png", "mask", "webdataset"):
        flat |= {f"{kind}_file": files.get(kind, ""), f"{kind}_sha256": digests.get(kind, "")}
    if unlike := set(flat) ^ set(MANIFEST_SCHEMA.names):
        raise KeyError(f"{', '.join(sorted(unlike))}: in the row or in MANIFEST_SCHEMA, but not in both")
    # JSON distinguishes 1 from 1.0.
    return {
        field.name: float(flat[field.name]) if field.type == pa.float64() else flat[field.name]
        for field in MANIFEST_SCHEMA
    }


def finding_kind(number: int) -> str:
    """The kind of file that holds the lesion mask of an image's finding; findings count from 1."""
    return f"finding_mask_{number}"


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
        "report": "" if row["template_findings"] else row["report"],
        "source": SYNTHETIC,
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
        "pathology": row["attributes"].get("pathology", ""),
        "source": shared["source"],
        "lesion_id": row["lesion_id"],
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
            **{name: finding["attributes"].get(name, "") for name in LESION_COLUMNS},
            **{name: finding[name] for name in ("report", "pathology", "source")},  # pathology in the template's words
            "lesion_id": finding.get("lesion_id", ""),
            "mask_file": row["files"].get(finding_kind(number), ""),
        }
        for number, finding in enumerate(findings, 1)
    ]


def _birads(grade: int | None) -> str:
    return "" if grade is None else f"BI-RADS {grade}"
