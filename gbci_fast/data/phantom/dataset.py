"""Writes phantom studies in the VinDr-Mammo layout, with masks; the folder appears whole or not at all."""

import csv
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from gbci_fast.data.attributes import NO_FINDING
from gbci_fast.data.dicom_writer import mammogram_dataset, write_dicom
from gbci_fast.data.phantom.study import PhantomImage, make_grid, render_study
from gbci_fast.errors import GBCIError

BREAST_COLUMNS = (
    "study_id", "series_id", "image_id", "laterality", "view_position", "height", "width", "breast_birads",
    "breast_density", "split", "report", "pathology", "source", "spacing_mm",
)  # fmt: skip
FINDING_COLUMNS = (
    *BREAST_COLUMNS[:9], "finding_categories", "finding_birads", "xmin", "ymin", "xmax", "ymax", *BREAST_COLUMNS[9:],
)  # fmt: skip


def generate_phantom(
    output: str | os.PathLike[str],
    studies: int,
    seed: int = 0,
    size: int | tuple[int, int] = 512,
    progress: Callable[[int], None] | None = None,
) -> None:
    """Writes ``studies`` studies of four images each; study ``i`` is the same for any number of studies.

    ``output`` gets ``images/<study_id>/<image_id>.dicom``, ``masks/<study_id>/<image_id>.png`` (255 on the lesion,
    all black without one), ``breast-level_annotations.csv`` and ``finding_annotations.csv``: VinDr-Mammo's columns and
    ``report``, ``pathology``, ``source``, ``spacing_mm``. ``progress`` is called with the number of studies done.

    Raises:
        GBCIError: an ``output`` that holds something, fewer than one study, or a size that `render_study` refuses.
    """
    output = Path(output)
    if studies < 1:
        raise GBCIError(f"number of studies is {studies}; expected at least 1")
    make_grid(size)
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise GBCIError(f"output {output} already exists and is not empty; expected a new or an empty folder")
    partial = output.absolute().with_name(f".{output.absolute().name}.{os.getpid()}.partial")
    partial.mkdir(parents=True)
    try:
        images = []
        for index in range(studies):
            for image in render_study(seed, index, size):
                _write_image(image, partial)
                images.append(_describe(image))
            if progress is not None:
                progress(index + 1)
        _write_csv(partial / "breast-level_annotations.csv", BREAST_COLUMNS, images)
        _write_csv(partial / "finding_annotations.csv", FINDING_COLUMNS, images)
        partial.replace(output)
    except BaseException:
        shutil.rmtree(partial)
        raise


def _write_image(image: PhantomImage, root: Path) -> None:
    for folder in ("images", "masks"):
        (root / folder / image.study_id).mkdir(parents=True, exist_ok=True)
    dataset = mammogram_dataset(image.stored, image.header, window=image.window)
    write_dicom(dataset, root / "images" / image.study_id / f"{image.image_id}.dicom")
    mask = Image.fromarray(image.mask.astype(np.uint8) * 255)
    mask.save(root / "masks" / image.study_id / f"{image.image_id}.png")


def _describe(image: PhantomImage) -> dict[str, object]:
    """The row of `FINDING_COLUMNS`; a breast without a lesion is BI-RADS 1."""
    lesion = image.lesion
    height, width = image.stored.shape
    finding = dict.fromkeys(("finding_birads", "xmin", "ymin", "xmax", "ymax", "report", "pathology"), "")
    if lesion is not None:
        finding |= {
            "finding_birads": f"BI-RADS {lesion.birads}",
            "report": lesion.report,
            "pathology": lesion.pathology,
        }
        finding |= dict(zip(("xmin", "ymin", "xmax", "ymax"), image.box, strict=True))
    return finding | {
        "study_id": image.study_id,
        "series_id": image.series_id,
        "image_id": image.image_id,
        "laterality": image.header.laterality,
        "view_position": image.header.view_position,
        "height": height,
        "width": width,
        "breast_birads": f"BI-RADS {1 if lesion is None else lesion.birads}",
        "breast_density": f"DENSITY {image.breast_density}",
        "finding_categories": str([NO_FINDING if lesion is None else lesion.category]),
        "split": image.split,
        "source": "phantom",
        "spacing_mm": image.header.spacing[0],
    }


def _write_csv(path: Path, columns: tuple[str, ...], rows: list[dict[str, object]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
