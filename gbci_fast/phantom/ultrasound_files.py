"""Writes the ultrasound slices of a study's findings, their masks and the rows of ``ultrasound.csv``."""

from pathlib import Path

import numpy as np
from PIL import Image

from gbci_fast.phantom.study import BreastPlan, StudyPlan
from gbci_fast.phantom.ultrasound import UltrasoundSlice, render_ultrasound

ULTRASOUND_COLUMNS = (
    "study_id", "laterality", "finding", "file", "mask_file", "twin_file", "height", "width", "spacing_mm", "xmin",
    "ymin", "xmax", "ymax", "finding_categories", "finding_birads", "breast_density", "report", "pathology",
    "volume_mm3", "patient_id", "timepoint", "split",
)  # fmt: skip


def ultrasound_file(study_id: str, breast: BreastPlan, finding: int) -> str:
    """Path of a slice in the data set; "" for a finding without a body, which has no slice.

    ``finding`` counts the breast's findings from 0; the file's name counts them from 1.
    """
    return (
        "" if breast.findings[finding].body is None else f"ultrasound/{study_id}/{breast.laterality}-{finding + 1}.png"
    )


def write_ultrasound(root: Path, study_id: str, plan: StudyPlan, *, twins: bool = False) -> list[dict[str, object]]:
    """Writes a slice for every finding of the study that has a body; returns the rows of ``ultrasound.csv``.

    Files below ``root``: ``ultrasound/<study_id>/<laterality>-<k>.png`` (8 bits, skin at the top), ``...-<k>-mask.png``
    (255 on the lesion) and, with ``twins``, ``...-<k>-twin.png`` (the same breast without the finding).
    """
    rows = []
    for breast in plan.breasts:
        for number in range(len(breast.findings)):
            file = ultrasound_file(study_id, breast, number)
            if not file:
                continue
            picture = render_ultrasound(plan, breast, number)
            stem = file.removesuffix(".png")
            pixels = {file: picture.image, f"{stem}-mask.png": picture.mask.astype(np.uint8) * 255}
            if twins:
                pixels[f"{stem}-twin.png"] = render_ultrasound(plan, breast, number, healthy=True).image
            (root / file).parent.mkdir(parents=True, exist_ok=True)
            for name, values in pixels.items():
                Image.fromarray(values).save(root / name)
            files = dict(zip(("file", "mask_file", "twin_file"), (*pixels, ""), strict=False))
            rows.append({"study_id": study_id, **files, **_describe(plan, breast, number, picture)})
    return rows


def _describe(plan: StudyPlan, breast: BreastPlan, number: int, picture: UltrasoundSlice) -> dict[str, object]:
    finding = breast.findings[number]
    height, width = picture.image.shape
    box = ("", "", "", "") if picture.box is None else picture.box
    return {
        "laterality": breast.laterality,
        "finding": number + 1,
        "height": height,
        "width": width,
        "spacing_mm": picture.spacing_mm,
        **dict(zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True)),
        "finding_categories": str(list(finding.categories)),
        "finding_birads": f"BI-RADS {finding.birads}",
        "breast_density": f"DENSITY {plan.breast_density}",
        "report": finding.report,
        "pathology": finding.pathology,
        "volume_mm3": "" if finding.volume_mm3 is None else f"{finding.volume_mm3:.2f}",
        "patient_id": plan.patient_id,
        "timepoint": plan.timepoint,
        "split": plan.split,
    }
