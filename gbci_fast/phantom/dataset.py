"""Writes a phantom data set with its truth in the VinDr-Mammo layout. The folder appears whole or not at all."""

import csv
import os
import shutil
from collections.abc import Callable, Generator
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from gbci_fast.attributes import NO_FINDING
from gbci_fast.dicom.writing import mammogram_dataset, uid_from_seed, write_dicom
from gbci_fast.errors import GBCIError
from gbci_fast.jobs.files import is_empty, real_path, remove_temporaries, sync, sync_tree
from gbci_fast.jobs.processes import close_pool, how_it_ended, processes_of, worker_pool
from gbci_fast.phantom.preview import PREVIEW, write_preview
from gbci_fast.phantom.settings import PhantomJob, Population
from gbci_fast.phantom.study import (
    LesionTruth,
    PhantomImage,
    StudyPlan,
    draw_study,
    growth_series,
    make_grid,
    render_plan,
)
from gbci_fast.phantom.ultrasound_files import ULTRASOUND_COLUMNS, ultrasound_file, write_ultrasound

PATIENT_COLUMNS = ("source", "spacing_mm", "patient_id", "timepoint", "days", "age", "hazard", "twin")
LESION_COLUMNS = (
    "report", "shape", "margin", "pathology", "volume_mm3", "doubling_days", "mask_file", "ultrasound",
)  # fmt: skip
BREAST_COLUMNS = (
    "study_id", "series_id", "image_id", "laterality", "view_position", "height", "width", "breast_birads",
    "breast_density", "split", *PATIENT_COLUMNS,
)  # fmt: skip
PHANTOM_COLUMNS = (
    *BREAST_COLUMNS[:9], "finding_categories", "finding_birads", "xmin", "ymin", "xmax", "ymax", "split",
    *LESION_COLUMNS, *PATIENT_COLUMNS,
)  # fmt: skip

Rows = list[dict[str, object]]


def generate_phantom(
    output: str | os.PathLike[str],
    studies: int,
    seed: int = PhantomJob.seed,
    size: int | tuple[int, int] = PhantomJob.size,
    progress: Callable[[int], None] = lambda done: None,
    *,
    population: Population | None = None,
    timepoints: int = PhantomJob.timepoints,
    interval: int = PhantomJob.interval,
    twins: bool = PhantomJob.twins,
    truth: bool = PhantomJob.truth,
    ultrasound: bool = PhantomJob.ultrasound,
    workers: int = 1,
) -> None:
    """Writes a phantom data set of ``studies`` patients, with four images per patient and timepoint.

    Patient ``i`` does not depend on the number of patients. Files in ``output``:

    - ``images/<study_id>/<image_id>.dicom``, ``breast-level_annotations.csv`` and ``finding_annotations.csv``, as in
      VinDr-Mammo;
    - ``masks/<study_id>/<image_id>.png``: 255 on any finding;
    - ``finding_masks/<study_id>/<image_id>-<k>.png``: the k-th finding of an image, from 1 in the order of its rows;
    - with ``twins``: ``twins/<study_id>/<image_id>.dicom``;
    - with ``truth``: ``truth/breast|pectoral/<study_id>/<image_id>.png``;
    - with ``ultrasound``: the files of `write_ultrasound` and their table ``ultrasound.csv``;
    - ``preview.png``.

    Columns besides VinDr-Mammo's: ``source``, ``spacing_mm``, ``patient_id``, ``timepoint``, ``days`` since the first
    timepoint, ``age``, ``hazard`` (see `population.relative_hazard`), ``twin`` (its file or blank). Findings also have
    ``report``, ``shape``, ``margin``, ``pathology``, ``volume_mm3``, ``doubling_days``, ``mask_file`` and
    ``ultrasound`` (the slice's file); blank where it does not apply.

    Args:
        output: a new or an empty folder.
        studies: number of patients.
        progress: called with the number of finished patients, at the start and after each.
        workers: number of processes; the bytes do not depend on it.
        seed, size, population, timepoints, interval, twins, truth, ultrasound: see `PhantomJob`.

    Raises:
        GBCIError: an ``output`` that is not empty, fewer than one study or worker, or options that `PhantomJob`
            refuses.
        OSError: ``output`` cannot be written.
    """
    output = Path(output)
    if studies < 1:
        raise GBCIError(f"number of studies is {studies}; expected at least 1")
    if workers < 1:
        raise GBCIError(f"number of workers is {workers}; expected at least 1")
    make_grid(size)
    job = PhantomJob(
        seed=seed,
        size=size,
        population=population or Population(),
        timepoints=timepoints,
        interval=interval,
        twins=twins,
        truth=truth,
        ultrasound=ultrasound,
    )
    if output.exists() and not (output.is_dir() and is_empty(output)):
        raise GBCIError(f"output {output} already exists and is not empty; expected a new or an empty folder")
    existed, folder = output.exists(), real_path(output)
    # An existing folder may be a mount point or a process's working directory: it is filled, not replaced.
    name = f".{folder.name}.{os.getpid()}.tmp"
    if existed:
        remove_temporaries(folder)
    partial_folder = folder / name if existed else folder.with_name(name)
    partial_folder.mkdir(parents=True)
    try:
        breasts: Rows = []
        findings: Rows = []
        slices: Rows = []
        progress(0)
        with closing(_write_all(partial_folder, job, studies, workers)) as patients:
            for done, (more_breasts, more_findings, more_slices) in enumerate(patients, 1):
                breasts += more_breasts
                findings += more_findings
                slices += more_slices
                progress(done)
        _write_csv(partial_folder / "breast-level_annotations.csv", BREAST_COLUMNS, breasts)
        _write_csv(partial_folder / "finding_annotations.csv", PHANTOM_COLUMNS, findings)
        if ultrasound:
            _write_csv(partial_folder / "ultrasound.csv", ULTRASOUND_COLUMNS, slices)
        write_preview(partial_folder, findings, partial_folder / PREVIEW)
        sync_tree(partial_folder)
        if existed:
            _move_up(partial_folder)
        else:
            partial_folder.replace(folder)
        sync(folder.parent)
    except BaseException:
        shutil.rmtree(partial_folder)
        raise


def _move_up(folder: Path) -> None:
    """Moves all files to the parent folder, the tables last: only with them is it a data set."""
    for path in sorted(folder.iterdir(), key=lambda path: path.suffix == ".csv"):
        path.rename(folder.parent / path.name)
    folder.rmdir()


def _write_all(
    root: Path, job: PhantomJob, studies: int, workers: int
) -> Generator[tuple[Rows, Rows, Rows], None, None]:
    """Writes all patients; yields their rows in order, as `_write_patient`."""
    write = partial(_write_patient, root, job)
    if workers == 1:
        yield from map(write, range(studies))
        return
    pool, processes = worker_pool(workers, __name__), []
    try:
        patients = pool.map(write, range(studies))
        processes = processes_of(pool)
        yield from patients
    except BrokenProcessPool as error:
        close_pool(pool)
        raise GBCIError(f"a worker process {how_it_ended(processes)}; use fewer --workers") from error
    finally:
        close_pool(pool)


def _write_patient(root: Path, job: PhantomJob, index: int) -> tuple[Rows, Rows, Rows]:
    """Writes the files of one patient; returns the rows of the three tables (breasts, findings, slices)."""
    grid = make_grid(job.size)
    breasts, findings, slices = [], [], []
    plan = draw_study(job.seed, index, job.population)
    for timepoint in growth_series(plan, job.timepoints, job.interval):
        images = render_plan(timepoint, grid, twins=job.twins)
        if job.ultrasound:
            slices += write_ultrasound(root, images[0].study_id, timepoint, twins=job.twins)
        for image in images:
            row = _describe(image, _write_image(image, root, job), _breast_birads(image, images))
            breasts.append(row)
            findings += [
                row | _describe_lesion(image, lesion, k, job) for k, lesion in enumerate(image.lesions, 1)
            ] or [row | {"finding_categories": str([NO_FINDING])}]
    return breasts, findings, slices


def _write_image(image: PhantomImage, root: Path, job: PhantomJob) -> str:
    """Writes all files of an image; returns the name of its twin's file, or "" if it has none."""
    name = f"{image.study_id}/{image.image_id}"
    _write_dicom(image.stored, image, root / "images" / f"{name}.dicom")
    masks = {f"masks/{name}": image.mask}
    masks |= {_mask_file(image, k): lesion.mask for k, lesion in enumerate(image.lesions, 1)}
    if job.truth:
        masks |= {f"truth/breast/{name}": image.breast, f"truth/pectoral/{name}": image.pectoral}
    for file, mask in masks.items():
        path = (root / file).with_suffix(".png")
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(mask.astype(np.uint8) * 255).save(path)
    if image.twin is None or not image.lesions:
        return ""
    header = replace(
        image.header,
        series_uid=uid_from_seed("twin", image.header.series_uid),
        instance_uid=uid_from_seed("twin", image.header.instance_uid),
        series_number=2,
        derivation=f"{image.header.derivation} Healthy twin of {image.header.instance_uid}.",
    )
    _write_dicom(image.twin, replace(image, header=header), root / "twins" / f"{name}.dicom")
    return f"twins/{name}.dicom"


def _write_dicom(stored: np.ndarray, image: PhantomImage, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_dicom(mammogram_dataset(stored, image.header, window=image.window), path)


def _mask_file(image: PhantomImage, number: int) -> str:
    return f"finding_masks/{image.study_id}/{image.image_id}-{number}.png"


def _breast_birads(image: PhantomImage, images: list[PhantomImage]) -> int:
    """The highest BI-RADS category of the findings in either view of this breast; 1 without findings."""
    views = [each for each in images if each.header.laterality == image.header.laterality]
    return max((lesion.finding.birads for view in views for lesion in view.lesions), default=1)


def _describe(image: PhantomImage, twin: str, birads: int) -> dict[str, object]:
    """The columns of an image that both tables have; ``birads`` is the category of its breast."""
    plan: StudyPlan = image.plan
    height, width = image.stored.shape
    return {
        "study_id": image.study_id,
        "series_id": image.series_id,
        "image_id": image.image_id,
        "laterality": image.header.laterality,
        "view_position": image.header.view_position,
        "height": height,
        "width": width,
        "breast_birads": f"BI-RADS {birads}",
        "breast_density": f"DENSITY {plan.breast_density}",
        "split": plan.split,
        "source": "phantom",
        "spacing_mm": image.header.spacing[0],
        "patient_id": plan.patient_id,
        "timepoint": plan.timepoint,
        "days": plan.days,
        "age": plan.age,
        "hazard": f"{plan.hazard:.4f}",
        "twin": twin,
    }


def _describe_lesion(image: PhantomImage, lesion: LesionTruth, number: int, job: PhantomJob) -> dict[str, object]:
    finding, breast = lesion.finding, image.breast_plan
    xmin, ymin, xmax, ymax = lesion.box
    volume, doubling = finding.volume_mm3, finding.doubling_days
    return {
        "finding_categories": str(list(finding.categories)),
        "finding_birads": f"BI-RADS {finding.birads}",
        "xmin": xmin,
        "ymin": ymin,
        "xmax": xmax,
        "ymax": ymax,
        "report": finding.report,
        "shape": finding.shape or "",
        "margin": finding.margin or "",
        "pathology": finding.pathology,
        "volume_mm3": "" if volume is None else f"{volume:.2f}",
        "doubling_days": "" if doubling is None else f"{doubling:.1f}",
        "mask_file": _mask_file(image, number),
        "ultrasound": ultrasound_file(image.study_id, breast, breast.findings.index(finding)) if job.ultrasound else "",
    }


def _write_csv(path: Path, columns: tuple[str, ...], rows: Rows) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
