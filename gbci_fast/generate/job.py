"""A generation job on disk: batches in, files and tables out; interruptible, resumable, the same bytes every time.

While a job runs, ``.progress/`` holds the job's settings, one JSON file per finished batch and the preview's panels.
The tables are compiled from the finished batches, after the last one or when the job is interrupted.
"""

import itertools
import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from gbci_fast import __version__
from gbci_fast.errors import GBCIError
from gbci_fast.files import atomically, sha256_of
from gbci_fast.generate.engine import SamplerSettings, Synthesis, synthesize
from gbci_fast.generate.manifest import TABLES, write_tables
from gbci_fast.generate.plan import PlanItem
from gbci_fast.generate.preview import PREVIEW, preview_panels, write_preview
from gbci_fast.generate.sinks.dicom import write_synthesis
from gbci_fast.generate.sinks.png import save_gray, write_png
from gbci_fast.pipeline import GBCIPipeline

FORMATS = ("dicom", "png")
JOB_FILE = "job.json"
PROGRESS_FOLDER = ".progress"
PREVIEW_ROWS = 8


@dataclass(frozen=True, kw_only=True)
class JobSettings:
    """What decides a job's bytes; written to ``job.json`` and compared when a job is resumed.

    Attributes:
        seed: of the whole job.
        formats: out of `FORMATS`.
        batch_size: images sampled together (bytes are equal when it is).
        compression: of DICOM files: "none", "rle" or "jpeg2000"; lossless.
        sampler: steps, guidance, mask source.
        runtime, tier, dtype, weights_hash: how and with what it is sampled.
    """

    seed: int
    formats: tuple[str, ...] = ("dicom", "png")
    batch_size: int = 8
    compression: str = "rle"
    sampler: SamplerSettings = field(default_factory=SamplerSettings)
    runtime: str = "eager"
    tier: str = "exact"
    dtype: str = "fp32"
    weights_hash: str = ""

    def __post_init__(self):
        if not self.formats or set(self.formats) - set(FORMATS):
            raise GBCIError(f"format is {','.join(self.formats)!r}; expected one or more of {', '.join(FORMATS)}")
        if self.batch_size < 1:
            raise GBCIError(f"batch_size is {self.batch_size}; expected at least 1")


def run_job(
    pipe: GBCIPipeline,
    plan: list[PlanItem],
    output: Path,
    settings: JobSettings,
    *,
    resume: bool = False,
    on_batch: Callable[[int], None] = lambda images: None,
) -> Path:
    """Makes every image of `plan` in `output` and returns the preview's path.

    Args:
        resume: keep the finished batches of an interrupted run of the same job; a finished job is left as it is.
        on_batch: called with the number of images done after each batch (and once for what was already there).

    Raises:
        GBCIError: `output` is not empty and `resume` is not set, or it holds another job.
    """
    batches = [plan[i : i + settings.batch_size] for i in range(0, len(plan), settings.batch_size)]
    progress = output / PROGRESS_FOLDER
    if _open_job(output, plan, settings, resume=resume):
        on_batch(len(plan))
        return output / PREVIEW
    done = {i for i in range(len(batches)) if _batch_file(progress, i).exists()}
    count = sum(len(batches[i]) for i in done)
    on_batch(count)
    pending = [i for i in range(len(batches)) if i not in done]
    previewed = _preview_indices(len(plan))
    try:
        for i, images in zip(pending, synthesize(pipe, [batches[i] for i in pending], settings.sampler), strict=True):
            rows = [_write_image(image, output, settings, batch=i) for image in images]
            for image in images:
                if image.item.index in previewed:
                    panels = preview_panels(image)
                    atomically(progress / f"preview-{image.item.index:06d}.npy", lambda t, p=panels: _save_array(t, p))
            atomically(_batch_file(progress, i), lambda temporary, rows=rows: temporary.write_text(json.dumps(rows)))
            count += len(images)
            on_batch(count)
    except BaseException:
        # Whatever stopped it, the finished batches become a valid data set, and half a batch leaves no orphans.
        _remove_unfinished(output, batches, progress)
        _compile(output, progress, batches)
        raise
    _compile(output, progress, batches)
    shutil.rmtree(progress)
    return output / PREVIEW


def _open_job(output: Path, plan: list[PlanItem], settings: JobSettings, *, resume: bool) -> bool:
    """Creates or checks the job's folder; True when the job is already complete."""
    wanted = json.loads(json.dumps(_job_description(plan, settings)))
    job_file = output / JOB_FILE
    if output.exists() and not output.is_dir():
        raise GBCIError(f"{output} is a file; expected a folder to write to")
    if not (output.exists() and any(output.iterdir())):
        (output / PROGRESS_FOLDER).mkdir(parents=True)
        atomically(job_file, lambda temporary: temporary.write_text(json.dumps(wanted, indent=1) + "\n"))
        return False
    if not resume:
        raise GBCIError(f"{output} is not empty; pass --resume to continue the job there, or choose another folder")
    try:
        found = json.loads(job_file.read_text())
    except (OSError, ValueError) as error:
        raise GBCIError(f"{job_file} cannot be read, so {output} holds no job to resume: {error}") from error
    changed = [key for key in wanted if found.get(key) != wanted[key]]
    if changed:
        raise GBCIError(f"{output} holds another job: {', '.join(changed)} differ; resume with the same arguments")
    return not (output / PROGRESS_FOLDER).exists() and (output / TABLES[0]).exists()


def _job_description(plan: list[PlanItem], settings: JobSettings) -> dict[str, Any]:
    described = asdict(settings)
    return {
        "gbci_fast": __version__,
        **described.pop("sampler"),
        **described,
        "images": [item.image_id for item in plan],
        "descriptions": [[item.attributes.to_mapping(), item.report, item.box] for item in plan],
    }


def _write_image(image: Synthesis, output: Path, settings: JobSettings, *, batch: int) -> dict[str, Any]:
    """Writes the files of one image and returns its manifest row."""
    item, template = image.item, image.template
    files = {}
    stem = Path("images") / item.study_id / item.image_id
    if "dicom" in settings.formats:
        files["dicom"] = stem.with_suffix(".dicom")
        write_synthesis(image, output / files["dicom"], job_seed=settings.seed, compression=settings.compression)
    if "png" in settings.formats:
        files["png"] = stem.with_suffix(".png")
        write_png(image, output / files["png"])
    files["mask"] = Path("masks") / item.study_id / f"{item.image_id}.png"
    save_gray(image.mask.astype(np.uint8) * 255, output / files["mask"])
    record = template.record
    return {
        "image_id": item.image_id,
        "study_id": item.study_id,
        "index": item.index,
        "variant": item.variant,
        "batch": batch,
        "seed": item.seed,
        "height": template.mammogram.shape[0],
        "width": template.mammogram.shape[1],
        "xmin": image.box[0],
        "ymin": image.box[1],
        "xmax": image.box[2],
        "ymax": image.box[3],
        "attributes": image.attributes.to_mapping(),
        "report": item.report,
        "split": record.split or "training",
        "spacing_mm": template.spacing[0],
        "spacing_assumed": template.mammogram.spacing is None,
        "template_study_id": record.study_id,
        "template_image_id": record.image_id,
        "template_file": record.path.name,
        "template_sha256": sha256_of(record.path),
        "template_breast_birads": record.attributes.breast_birads,
        "template_findings": [
            {"box": list(f.box), "attributes": f.attributes.to_mapping()}
            for f in record.findings
            if not _covered(f.box, image.mask)
        ],
        "files": {kind: path.as_posix() for kind, path in files.items()},
        "sha256": {kind: sha256_of(output / path) for kind, path in files.items()},
        **{f"sampler_{key}": value for key, value in asdict(settings.sampler).items()},
        "scheduler": image.scheduler,
        "batch_size": settings.batch_size,
        "job_seed": settings.seed,
        "runtime": settings.runtime,
        "tier": settings.tier,
        "dtype": settings.dtype,
        "weights_hash": settings.weights_hash,
        "gbci_fast": __version__,
    }


def _covered(box: tuple[float, float, float, float], mask: np.ndarray) -> bool:
    """Whether most of a template's own lesion was painted over, so that its label no longer holds."""
    xmin, ymin, xmax, ymax = (round(value) for value in box)
    inside = mask[ymin:ymax, xmin:xmax]
    return bool(inside.size and inside.mean() > 0.5)


def _compile(output: Path, progress: Path, batches: list[list[PlanItem]]) -> None:
    """Tables and preview of the finished batches."""
    rows: list[dict[str, Any]] = []
    for i in range(len(batches)):
        if _batch_file(progress, i).exists():
            rows.extend(json.loads(_batch_file(progress, i).read_text()))
    write_tables(rows, output)
    finished = {row["index"] for row in rows}
    panels = [np.load(path) for path in sorted(progress.glob("preview-*.npy")) if int(path.stem[8:]) in finished]
    if panels:
        write_preview(panels, output / PREVIEW)


def _remove_unfinished(output: Path, batches: list[list[PlanItem]], progress: Path) -> None:
    for i, batch in enumerate(batches):
        if not _batch_file(progress, i).exists():
            for item, folder in itertools.product(batch, ("images", "masks")):
                for path in list((output / folder / item.study_id).glob(f"*{item.image_id}*")):
                    path.unlink()


def _preview_indices(total: int) -> set[int]:
    """Up to `PREVIEW_ROWS` plan positions, evenly spread."""
    rows = min(PREVIEW_ROWS, total)
    return {row * total // rows for row in range(rows)}


def _batch_file(progress: Path, index: int) -> Path:
    return progress / f"batch-{index:06d}.json"


def _save_array(path: Path, array: np.ndarray) -> None:
    with path.open("wb") as file:
        np.save(file, array)
