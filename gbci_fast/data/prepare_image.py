"""Prepares one image of a cache in a worker process: its pixels, masks and rows of the index."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gbci_fast.data.cache import attribute_columns, frame_columns, pack_masks
from gbci_fast.data.fields import PlacedField, Reading, VisibleLesion, read_fields
from gbci_fast.data.folds import patient_fold
from gbci_fast.data.segmentation import chest_wall_side
from gbci_fast.data.settings import PrepareSettings
from gbci_fast.data.vindr import ImageRecord
from gbci_fast.dicom.acquisition import side_contradiction
from gbci_fast.jobs.files import sha256_of
from gbci_fast.jobs.processes import start_worker

SATURATED = round(0.999 * 65535)  # resampling may lower white areas slightly


@dataclass(frozen=True, kw_only=True, eq=False)
class PreparedImage:
    """The fields of view of one image.

    Attributes:
        rows: rows of the index, one per field of view, without ``mask``.
        pixels: uint16 [n, S, S], one image per field of view.
        masks: packed masks, uint8 [k, bytes], one array per field of view.
    """

    rows: list[dict[str, Any]]
    pixels: np.ndarray
    masks: list[np.ndarray]


def start_reader() -> None:
    """Initializer of the workers. One torch thread per process: more would compete for the cores."""
    start_worker()
    torch.set_num_threads(1)


def prepare_image(record: ImageRecord, root: Path, source: str, settings: PrepareSettings) -> PreparedImage:
    """Reads an image and computes its part of the cache.

    Raises:
        GBCIError: see `read_fields`.
    """
    reading = read_fields(record, root, settings.size, settings.views)
    patient = record.patient_in(reading.mammogram)
    common = {
        "source": source,
        "study_id": record.study_id,
        "image_id": record.image_id,
        "path": record.path.relative_to(root).as_posix(),
        "sha256": sha256_of(record.path),
        "bytes": record.path.stat().st_size,
        "split": record.split or settings.split,
        "patient": patient,
        "fold": patient_fold(patient),
        **_native_columns(record, reading),
    }
    pectoral = reading.pectoral
    return PreparedImage(
        rows=[common | _field_columns(record, reading, placed) for placed in reading.fields],
        pixels=np.array([placed.field.image for placed in reading.fields], np.uint16),
        masks=[_masks(placed, pectoral) for placed in reading.fields],
    )


def _masks(placed: PlacedField, pectoral: np.ndarray) -> np.ndarray:
    """The rows of one field of view in ``masks.npy``: breast, pectoral muscle, lesions."""
    muscle = placed.frame.to_model(pectoral) > 0.5
    return pack_masks([placed.field.breast, muscle & placed.field.breast, *(x.pixels for x in placed.field.lesions)])


def _native_columns(record: ImageRecord, reading: Reading) -> dict[str, Any]:
    height, width = reading.mammogram.shape
    row_spacing, column_spacing = reading.mammogram.spacing or (None, None)
    return {
        "height": height,
        "width": width,
        "row_spacing": row_spacing,
        "column_spacing": column_spacing,
        "findings": len(record.findings),
        "notes": [*reading.mammogram.notes, *contradictions(record, reading)],
        "extra": _json(record.extra),
        "breast_fraction": float(reading.breast.mean()),
    }


def _field_columns(record: ImageRecord, reading: Reading, placed: PlacedField) -> dict[str, Any]:
    field, frame = placed.field, placed.frame
    inside = field.image[field.breast]
    return {
        "kind": placed.kind,
        **attribute_columns(field.attributes),
        "frame": frame_columns(frame),
        "lesions": [_lesion_columns(record, reading, placed, lesion) for lesion in field.lesions],
        "brightness": float(inside.mean() / 65535) if inside.size else 0.0,
        "saturated": float((inside >= SATURATED).mean()) if inside.size else 0.0,
        "aspect": (frame.y1 - frame.y0) / (frame.x1 - frame.x0),
    }


def _lesion_columns(
    record: ImageRecord, reading: Reading, placed: PlacedField, lesion: VisibleLesion
) -> dict[str, Any]:
    finding, truth = record.findings[lesion.finding], reading.truth[lesion.finding]
    xmin, ymin, xmax, ymax = (int(value) for value in finding.box)
    part = slice(ymin, ymax + 1), slice(xmin, xmax + 1)
    return {
        "finding": lesion.finding,
        "box": list(finding.box),
        "model_box": list(placed.frame.box_to_model(finding.box)),
        "pixels": int(lesion.pixels.sum()),
        "inside": float(reading.breast[part][truth[part]].mean()),
        "report": lesion.report,
        "attributes": attribute_columns(lesion.attributes),
        "extra": _json(finding.extra),
    }


def contradictions(record: ImageRecord, reading: Reading) -> list[str]:
    """One phrase per disagreement about side or view between table or file name, header, and pixels."""
    mammogram, notes = reading.mammogram, list[str | None]()
    source = "the table" if record.listed else "the file's name"
    stated = {"laterality": mammogram.laterality, "view_position": mammogram.other_view or mammogram.view_position}
    for name, header in stated.items():
        other = getattr(record, name)
        if other and header and other != header:
            notes.append(f"{name} is {other} in {source} and {header} in the image's header")
    notes.append(side_contradiction(mammogram.laterality, chest_wall_side(reading.breast)))
    return [note for note in notes if note]


def _json(extra: dict[str, str]) -> str:
    return json.dumps(extra, ensure_ascii=False)
