"""A generation job on disk: batches in, files and tables out; interruptible, resumable, the same bytes every time.

While a job runs, ``.progress/`` holds the manifest rows of its finished batches and the preview's panels. The tables
are compiled from them after the last batch, or when the job is stopped.
"""

import hashlib
import itertools
import json
import shutil
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from gbci_fast import __version__
from gbci_fast.errors import GBCIError
from gbci_fast.files import atomically, sha256_of
from gbci_fast.generate.engine import SamplerSettings, Synthesis, Synthesizer
from gbci_fast.generate.manifest import TABLES, write_tables
from gbci_fast.generate.plan import PlanItem
from gbci_fast.generate.preview import PREVIEW, preview_panels, write_preview
from gbci_fast.generate.sinks import dicom, png
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
        sampler: steps and guidance.
        runtime, tier, dtype, device, weights_hash: how and with what it is sampled.
        priors_hash: of the priors that automatic masks and natural frequencies come from (`Priors.digest`).
    """

    seed: int
    formats: tuple[str, ...] = ("dicom", "png")
    batch_size: int = 8
    compression: str = "rle"
    sampler: SamplerSettings = field(default_factory=SamplerSettings)
    runtime: str = "eager"
    tier: str = "exact"
    dtype: str = "fp32"
    device: str = "cpu"
    weights_hash: str = ""
    priors_hash: str = ""

    def __post_init__(self):
        if not self.formats or set(self.formats) - set(FORMATS):
            raise GBCIError(f"format is {','.join(self.formats)!r}; expected one or more of {', '.join(FORMATS)}")
        if self.batch_size < 1:
            raise GBCIError(f"batch_size is {self.batch_size}; expected at least 1")

    def columns(self) -> dict[str, Any]:
        """Every setting as one JSON value."""
        flat = asdict(self)
        return {"job_seed": flat.pop("seed"), "formats": ",".join(flat.pop("formats")), **flat.pop("sampler"), **flat}


def run_job(
    pipe: GBCIPipeline,
    plan: Sequence[PlanItem],
    output: Path,
    settings: JobSettings,
    *,
    resume: bool = False,
    on_batch: Callable[[int], None] = lambda images: None,
) -> Path:
    """Makes every image of `plan` in `output` and returns the preview's path.

    Whatever stops it, the finished batches stay as a valid data set, without files of an unfinished one. Where no batch
    is finished, nothing stays.

    Args:
        resume: keep the finished batches of an interrupted run of the same job; a finished job is left as it is.
        on_batch: called with the number of images done after each batch (and once for what was already there).

    Raises:
        GBCIError: `output` is not empty and `resume` is not set, or it holds another job; an input is missing, damaged
            or does not suit the job.
    """
    job = _Job(plan, output, settings, scheduler=type(pipe.scheduler).__name__)
    if job.open(resume=resume):
        on_batch(len(plan))
        return output / PREVIEW
    try:
        job.run(Synthesizer(pipe, settings.sampler), on_batch)
        job.compile()
    except BaseException:
        job.stop()
        raise
    finished = output / f"{PROGRESS_FOLDER}.finished"  # renamed first, so that a cut removal is no unfinished job
    job.progress.rename(finished)
    shutil.rmtree(finished)
    return output / PREVIEW


class _Job:
    """A plan on its way into a folder."""

    def __init__(self, plan: Sequence[PlanItem], output: Path, settings: JobSettings, *, scheduler: str):
        self.output = output
        self.progress = output / PROGRESS_FOLDER
        self._created = not output.exists()
        self._settings = settings
        self._columns = {"gbci_fast": __version__, "scheduler": scheduler, **settings.columns()}
        self._identity = self._columns | _identify(plan)
        self._batches = [plan[i : i + settings.batch_size] for i in range(0, len(plan), settings.batch_size)]
        self._previewed = _preview_indices(len(plan))

    def open(self, *, resume: bool) -> bool:
        """Creates the folder, or checks that it holds this job; True when the job is already complete."""
        output, file = self.output, self.output / JOB_FILE
        if output.exists() and not output.is_dir():
            raise GBCIError(f"{output} is a file; expected a folder to write to")
        if self._created or not any(output.iterdir()):
            atomically(file, lambda temporary: temporary.write_text(json.dumps(self._identity, indent=1) + "\n"))
            return False
        if not resume:
            raise GBCIError(f"{output} is not empty; pass --resume to continue the job there, or choose another folder")
        try:
            found = dict(json.loads(file.read_text()))
        except (OSError, ValueError, TypeError) as error:
            raise GBCIError(f"{file} cannot be read, so {output} holds no job to resume: {error}") from error
        changed = [key for key, value in self._identity.items() if found.get(key) != value]
        if changed:
            raise GBCIError(f"{output} holds another job: {', '.join(changed)} differ; resume with the same arguments")
        return not self.progress.exists() and (output / TABLES[0]).exists()

    def run(self, synthesizer: Synthesizer, on_batch: Callable[[int], None]) -> None:
        """Every batch that is not finished, in order."""
        self._remove_unfinished()  # where an earlier run was killed
        finished = self._finished()
        count = sum(len(self._batches[i]) for i in finished)
        on_batch(count)
        for i, batch in enumerate(self._batches):
            if i not in finished:
                rows = []
                for image in synthesizer(batch):
                    rows.append(self._write_image(image) | {"batch": i, **self._columns})
                    if image.item.index in self._previewed:
                        png.save_png(preview_panels(image), self.progress / f"panels-{image.item.index:06d}.png")
                file = self.progress / f"batch-{i:06d}.json"
                atomically(file, lambda temporary, rows=rows: temporary.write_text(json.dumps(rows)))
                count += len(batch)
                on_batch(count)

    def compile(self) -> None:
        """Tables and preview of the finished batches."""
        files = sorted(self.progress.glob("batch-*.json"))
        rows = [row for file in files for row in json.loads(file.read_text())]
        write_tables(rows, self.output)
        shown = sorted(self._previewed & {row["index"] for row in rows})
        panels = [np.asarray(Image.open(self.progress / f"panels-{index:06d}.png")) for index in shown]
        write_preview(panels, self.output / PREVIEW)

    def stop(self) -> None:
        """Makes a valid data set of the finished batches; without any, takes back what `open` made."""
        self._remove_unfinished()
        if self._finished():
            self.compile()
            return
        shutil.rmtree(self.progress, ignore_errors=True)
        (self.output / JOB_FILE).unlink(missing_ok=True)
        if self._created:
            self.output.rmdir()

    def _finished(self) -> set[int]:
        return {int(file.stem.removeprefix("batch-")) for file in self.progress.glob("batch-*.json")}

    def _remove_unfinished(self) -> None:
        """Removes files of the first unfinished batch, the only one that can have begun, and half-written tables."""
        finished = self._finished()
        begun = next((batch for i, batch in enumerate(self._batches) if i not in finished), ())
        for item, folder in itertools.product(begun, ("images", "masks")):
            study = self.output / folder / item.study_id
            for file in list(study.glob(f"*{item.image_id}*")):
                file.unlink()
            with suppress(OSError):  # absent, or not empty
                study.rmdir()
                study.parent.rmdir()
        for name in (*TABLES, PREVIEW):
            for file in list(self.output.glob(f".{name}.*")):
                file.unlink()

    def _write_image(self, image: Synthesis) -> dict[str, Any]:
        """Writes the files of one image and returns its manifest row."""
        item, template = image.item, image.template
        files = {}
        stem = Path("images") / item.study_id / item.image_id
        if "dicom" in self._settings.formats:
            files["dicom"] = stem.with_suffix(".dicom")
            dicom.write_synthesis(
                image,
                self.output / files["dicom"],
                job_seed=self._settings.seed,
                weights_hash=self._settings.weights_hash,
                compression=self._settings.compression,
            )
        if "png" in self._settings.formats:
            files["png"] = stem.with_suffix(".png")
            png.write_synthesis(image, self.output / files["png"])
        files["mask"] = Path("masks") / item.study_id / f"{item.image_id}.png"
        png.save_png(image.mask.astype(np.uint8) * 255, self.output / files["mask"])
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
            "template_study_id": record.study_id,
            "template_image_id": record.image_id,
            "template_file": record.path.name,
            "template_sha256": template.sha256,
            "template_findings": [
                {"box": list(f.box), "attributes": f.attributes.to_mapping()}
                for f in record.findings
                if not _covered(f.box, image.mask)
            ],
            "files": {kind: path.as_posix() for kind, path in files.items()},
            "sha256": {kind: sha256_of(self.output / path) for kind, path in files.items()},
        }


def _identify(plan: Sequence[PlanItem]) -> dict[str, Any]:
    """What tells a plan from others. Inputs count by name, so that a damaged one can be repaired before a resume.

    Raises:
        GBCIError: an input does not exist.
    """
    missing = [path for path in dict.fromkeys(item.template.path for item in plan) if not path.is_file()]
    if missing:
        more = f" (nor do {len(missing) - 1} more)" if len(missing) > 1 else ""
        raise GBCIError(f"{missing[0]} does not exist{more}; expected every image of the input")
    return {
        "images": len(plan),
        "masks": _sha256([item.mask.identity() for item in plan]),
        "descriptions": _sha256(
            [[item.image_id, item.seed, item.attributes.to_mapping(), item.report] for item in plan]
        ),
    }


def _covered(box: tuple[float, float, float, float], mask: np.ndarray) -> bool:
    """Whether most of a template's own lesion was painted over, so that its label no longer holds."""
    xmin, ymin, xmax, ymax = (round(value) for value in box)
    inside = mask[ymin:ymax, xmin:xmax]
    return bool(inside.size and inside.mean() > 0.5)


def _preview_indices(total: int) -> set[int]:
    """Up to `PREVIEW_ROWS` plan positions, evenly spread."""
    rows = min(PREVIEW_ROWS, total)
    return {row * total // rows for row in range(rows)}


def _sha256(content: object) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()
