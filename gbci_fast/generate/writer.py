"""What one image becomes: its files, its sample of a shard, and its row of the manifest."""

import hashlib
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gbci_fast.data.vindr import TEMPLATE
from gbci_fast.files import atomically, sha256_of
from gbci_fast.generate.engine import Synthesis
from gbci_fast.generate.plan import PlanItem
from gbci_fast.generate.settings import JobSettings
from gbci_fast.generate.sinks import dicom, png


@dataclass(frozen=True, kw_only=True, eq=False)
class Written:
    """One image that is on disk but for its `sample`.

    Attributes:
        row: of the manifest, without the job's columns and what is of the image's shard.
        sample: members of a WebDataset shard by suffix, without the row; empty where that format was not asked for.
        digest: SHA-256 of the sample's image.
    """

    row: dict[str, Any]
    sample: dict[str, bytes]
    digest: str


class ImageWriter:
    """Writes images in the formats of a job; several threads may."""

    def __init__(self, output: Path, settings: JobSettings):
        self._output = output
        self._settings = settings

    def write(self, image: Synthesis) -> Written:
        """Writes the files of one image.

        Raises:
            GBCIError: the image cannot be a DICOM: its view or side is unknown.
        """
        item, formats = image.item, self._settings.formats
        files, sample = {}, {}
        stem, mask = Path(item.study_id) / item.image_id, png.encode_png(image.mask.astype(np.uint8) * 255)
        if "dicom" in formats:
            files["dicom"] = Path("images") / stem.with_suffix(".dicom")
            dicom.write_synthesis(
                image,
                self._output / files["dicom"],
                job_seed=self._settings.seed,
                weights_hash=self._settings.weights_hash,
                compression=self._settings.compression,
            )
        pixels = png.encode_synthesis(image) if {"png", "webdataset"} & set(formats) else b""
        if "png" in formats:
            files["png"] = Path("images") / stem.with_suffix(".png")
            write_bytes(pixels, self._output / files["png"])
        if "webdataset" in formats:
            sample = {"png": pixels, "mask.png": mask}
        if set(formats) != {"webdataset"}:
            files["mask"] = Path("masks") / stem.with_suffix(".png")
            write_bytes(mask, self._output / files["mask"])
        row = _row(image) | {
            "files": {kind: path.as_posix() for kind, path in files.items()},
            "sha256": {kind: sha256_of(self._output / path) for kind, path in files.items()},
        }
        return Written(row=row, sample=sample, digest=hashlib.sha256(pixels).hexdigest() if sample else "")

    def remove(self, item: PlanItem) -> None:
        """Removes the files of an image, also those half-written, and folders that are empty then."""
        for folder in ("images", "masks"):
            study = self._output / folder / item.study_id
            for file in list(study.glob(f"*{item.image_id}*")):
                file.unlink()
            with suppress(OSError):  # absent, or not empty
                study.rmdir()
                study.parent.rmdir()


def write_bytes(content: bytes, path: Path) -> None:
    """Writes a file whole or not at all."""
    atomically(path, lambda temporary: temporary.write_bytes(content))


def _row(image: Synthesis) -> dict[str, Any]:
    item, template = image.item, image.template
    record = template.record
    return {
        "image_id": item.image_id,
        "study_id": item.study_id,
        "index": item.index,
        "variant": item.variant,
        "seed": item.seed,
        "height": template.mammogram.shape[0],
        "width": template.mammogram.shape[1],
        "xmin": image.box[0],
        "ymin": image.box[1],
        "xmax": image.box[2],
        "ymax": image.box[3],
        "mask_source": item.mask_source,
        "attributes": image.attributes.to_mapping(),
        "report": item.report,
        "split": record.split or "training",
        "spacing_mm": template.spacing[0],
        "spacing_assumed": template.mammogram.spacing is None,
        "template_patient_id": record.patient_in(template.mammogram),
        "template_study_id": record.study_id,
        "template_image_id": record.image_id,
        "template_file": record.path.name,
        "template_sha256": template.sha256,
        "template_notes": "; ".join(template.notes),
        "template_findings": [
            {
                "box": list(finding.box),
                "attributes": finding.attributes.to_mapping(),
                "report": finding.report(record),
                "pathology": finding.extra.get("pathology"),
                "source": TEMPLATE,
            }
            for finding in record.findings
            if not _covered(finding.box, image.mask)
        ],
    }


def _covered(box: tuple[float, float, float, float], mask: np.ndarray) -> bool:
    """Whether most of a template's own lesion was painted over, so that its label no longer holds."""
    xmin, ymin, xmax, ymax = (round(value) for value in box)
    inside = mask[ymin:ymax, xmin:xmax]
    return bool(inside.size and inside.mean() > 0.5)
