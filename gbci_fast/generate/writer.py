"""Writes one image: its files, its sample of a shard, and its row of the manifest."""

import hashlib
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from gbci_fast.data.vindr import TEMPLATE
from gbci_fast.errors import GBCIError
from gbci_fast.generate.identities import Identities
from gbci_fast.generate.manifest import SYNTHETIC, finding_kind
from gbci_fast.generate.plan import PlanItem, date_text
from gbci_fast.generate.settings import JobSettings
from gbci_fast.generate.sinks import dicom, png
from gbci_fast.generate.template import Extent, Synthesis
from gbci_fast.jobs.files import atomically, sha256_of

SHARD_FINDINGS = 16  # one bit per finding in a 16-bit image


@dataclass(frozen=True, kw_only=True, eq=False)
class Written:
    """One image whose files are on disk; its `sample` is still to be added to a shard.

    Attributes:
        row: of the manifest, without the columns of the job and of the shard (see `manifest.manifest_row`).
        sample: {suffix: member of a WebDataset shard}, without the row; empty where that format was not requested.
        digest: SHA-256 of the sample's image; empty without a sample.
    """

    row: dict[str, Any]
    sample: dict[str, bytes]
    digest: str


class ImageWriter:
    """Writes images in the formats of a job; thread-safe.

    Args:
        output: the job's folder.
        settings: of the job.
        identities: names of the inputs.
    """

    def __init__(self, output: Path, settings: JobSettings, identities: Identities):
        self._output = output
        self._settings = settings
        self._identities = identities

    def write(self, image: Synthesis) -> Written:
        """Writes the files of one image.

        Raises:
            GBCIError: view or side is unknown, which DICOM needs; or there are too many findings for a shard's sample.
        """
        image = replace(image, attributes=self._identities.attributes(image.attributes))
        item, formats = image.item, self._settings.formats
        files, sample = {}, {}
        kept = [i for i, finding in enumerate(image.template.record.findings) if not _covered(finding.box, image.mask)]
        lesions = _lesions(image, kept)
        stem, mask = Path(item.study_id) / item.image_id, _encode_mask(image.mask)
        if "dicom" in formats:
            files["dicom"] = Path("images") / stem.with_suffix(".dicom")
            dicom.write_synthesis(
                image,
                self._output / files["dicom"],
                identities=self._identities,
                job_seed=self._settings.seed,
                weights_hash=self._settings.weights_hash,
                compression=self._settings.compression,
            )
        pixels = png.encode_synthesis(image) if {"png", "webdataset"} & set(formats) else b""
        if "png" in formats:
            files["png"] = Path("images") / stem.with_suffix(".png")
            write_bytes(pixels, self._output / files["png"])
        if "webdataset" in formats:
            sample = {"png": pixels, "mask.png": mask, "findings.png": _encode_findings(image, lesions)}
        if set(formats) != {"webdataset"}:
            files["mask"] = Path("masks") / stem.with_suffix(".png")
            write_bytes(mask, self._output / files["mask"])
            for number, _, extent in lesions:
                files[finding_kind(number)] = file = Path("finding_masks") / f"{stem}-{number}.png"
                write_bytes(_encode_mask(extent.on(image.mask.shape)), self._output / file)
        row = _row(image, kept, self._identities, formats) | {
            "finding_masks": [{"finding": number, "source": source} for number, source, _ in lesions],
            "files": {kind: path.as_posix() for kind, path in files.items()},
            "sha256": {kind: sha256_of(self._output / path) for kind, path in files.items()},
        }
        return Written(row=row, sample=sample, digest=hashlib.sha256(pixels).hexdigest() if sample else "")

    def remove(self, item: PlanItem) -> None:
        """Removes the files of an image, including half-written ones, and folders that are empty afterwards."""
        for folder in ("images", "masks", "finding_masks"):
            study = self._output / folder / item.study_id
            for file in list(study.glob(f"*{item.image_id}*")):
                file.unlink()
            with suppress(OSError):  # absent, or not empty
                study.rmdir()
                study.parent.rmdir()


def write_bytes(content: bytes, path: Path) -> None:
    """Writes a file whole or not at all."""
    atomically(path, lambda temporary: temporary.write_bytes(content))


def _lesions(image: Synthesis, kept: Sequence[int]) -> list[tuple[int, str, Extent]]:
    """Number in the findings' table (from 1), source and pixels of every finding whose pixels are known.

    Args:
        image: the synthesis.
        kept: indices of the template's findings that were not painted over; they follow the painted one in the table.
    """
    listed = [] if image.attributes.finding_categories == () else [(SYNTHETIC, image.lesion)]
    listed += [(TEMPLATE, image.template.lesions[i]) for i in kept]
    return [(number, source, extent) for number, (source, extent) in enumerate(listed, 1) if extent is not None]


def _encode_mask(mask: np.ndarray) -> bytes:
    """bool [H, W] as a PNG of 0 and 255."""
    return png.encode_png(mask.astype(np.uint8) * 255)


def _encode_findings(image: Synthesis, lesions: Sequence[tuple[int, str, Extent]]) -> bytes:
    """All lesions as one 16-bit PNG: bit k - 1 is set in the pixels of the k-th finding, since lesions may overlap.

    A single file keeps the members of all samples the same, whatever the number of findings.
    """
    planes = np.zeros(image.mask.shape, np.uint16)
    for number, _, extent in lesions:
        if number > SHARD_FINDINGS:
            raise GBCIError(
                f"{image.item.template.path} has a mask of finding {number}; a sample of a shard holds "
                f"{SHARD_FINDINGS}: take --format png, or leave such inputs out with --skip-bad"
            )
        xmin, ymin, xmax, ymax = extent.box
        planes[ymin:ymax, xmin:xmax] |= extent.pixels.astype(np.uint16) << (number - 1)
    return png.encode_png(planes)


def _row(image: Synthesis, kept: Sequence[int], identities: Identities, formats: Sequence[str]) -> dict[str, Any]:
    item, template = image.item, image.template
    record, origin = template.record, identities.origin(template.record, template.mammogram)
    unsure = "dicom" in formats and identities.names.removes and dicom.not_looked_at(template.mammogram.dataset)
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
        "lesion_id": item.lesion_id,
        "lesion": item.lesion.to_json(),
        "date": date_text(item.date),
        "mask_source": item.mask_source,
        "attributes": image.attributes.to_mapping(),
        "report": item.report or "",
        "split": record.split or "training",
        "spacing_mm": template.spacing[0],
        "spacing_assumed": template.mammogram.spacing is None,
        "template_patient_id": origin.patient_id,
        "template_study_id": origin.study_id,
        "template_image_id": origin.image_id,
        "template_file": origin.file,
        "template_sha256": template.sha256,
        "template_notes": "; ".join([*template.notes, *([dicom.NOT_LOOKED_AT] if unsure else [])]),
        "template_findings": [
            {
                "box": list(finding.box),
                "attributes": identities.attributes(finding.attributes).to_mapping(),
                "report": finding.report(record) or "",
                "pathology": finding.extra.get("pathology", ""),
                "source": TEMPLATE,
            }
            for finding in map(record.findings.__getitem__, kept)
        ],
    }


def _covered(box: tuple[float, float, float, float], mask: np.ndarray) -> bool:
    """Whether most of a template's own lesion was painted over, so that its label no longer holds."""
    xmin, ymin, xmax, ymax = (round(value) for value in box)
    inside = mask[ymin:ymax, xmin:xmax]
    return bool(inside.size and inside.mean() > 0.5)
