"""A generation job on disk: batches in, files and tables out; interruptible, resumable, the same bytes every time.

The folder is a `JobFolder`. Its notes hold the manifest rows of the finished batches; the preview's panels lie beside
the notes. Tables and preview are compiled from both after the last batch, or when the job is stopped.
"""

import json
import os
import warnings
from array import array
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from PIL import Image

from gbci_fast import __version__
from gbci_fast.errors import GBCIError, InputWarning, one_line, without_values
from gbci_fast.fast.pipeline import FastPipeline
from gbci_fast.generate.checks import InputChecks
from gbci_fast.generate.copies import REJECTED, CopyError, CopyGate
from gbci_fast.generate.identities import Identities, job_identities
from gbci_fast.generate.manifest import SKIPPED, TABLES, manifest_row, read_reasons, write_skipped, write_tables
from gbci_fast.generate.mask_sources import FileMask
from gbci_fast.generate.plan import Plan, PlanItem
from gbci_fast.generate.preview import PREVIEW, preview_panels, write_preview
from gbci_fast.generate.settings import JobSettings
from gbci_fast.generate.sinks import png
from gbci_fast.generate.sinks.webdataset import close_shard, is_closed, open_shard, shard_path
from gbci_fast.generate.synthesizer import Made, Synthesizer
from gbci_fast.generate.writer import ImageWriter, Written, write_bytes
from gbci_fast.jobs.files import sha256_of
from gbci_fast.jobs.folder import JobFolder, Kept, Key
from gbci_fast.model.pipeline import GBCIPipeline

PREVIEW_ROWS = 8
TABLES_NOTE = "tables"
COMPILED = (*TABLES, SKIPPED, PREVIEW)


@dataclass(frozen=True, kw_only=True)
class JobResult:
    """What a finished job has made.

    Attributes:
        preview: path of the contact sheet.
        images: number of images made.
        skipped: number of plan items that were not made.
        mended: images that this run made again, because an earlier run's were lost, damaged or of another template.
        rejected: skipped items that were near copies of training lesions.
        noted: {note: number of used inputs with it}, from the manifest's template_notes.
    """

    preview: Path
    images: int
    skipped: int
    mended: int
    rejected: int
    noted: dict[str, int]


def run_job(
    pipe: GBCIPipeline,
    plan: Plan,
    output: Path,
    settings: JobSettings,
    *,
    identities: Identities | None = None,
    resume: bool = False,
    skip_bad: bool = False,
    check: str = "digests",
    gate: CopyGate | None = None,
    workers: int = 0,
    on_batch: Callable[[int], None] = lambda images: None,
) -> JobResult:
    """Makes every image of `plan` in `output`.

    A job that is stopped leaves its finished batches as a valid data set and no file of an unfinished batch. Without a
    finished batch it leaves nothing. While a job runs, no other job can use its folder.

    Headers, sizes and views of all inputs are checked first. Faults in the pixels are found when the input is opened.
    An item that cannot be made stops the job, or with `skip_bad` is skipped. A skipped item changes no other image
    beyond the rounding of a smaller batch: batches are cut from the whole plan, and an image's noise follows from its
    index. A job that a bad input stopped can be resumed with `skip_bad`. Resuming does not retry the skipped items of
    finished batches; inputs of unfinished batches are read again, so repairs count.

    Items that the gate rejects are skipped with or without `skip_bad`. They are sampled with their batch, so that all
    other images have the same bytes as without a gate.

    Args:
        identities: how inputs are named, see `job_identities`. None = pseudonyms under a key from the seed and the
            plan's templates; pieces of a plan file need the identities of the whole to use the same pseudonyms.
        resume: keep the finished batches of an interrupted run of the same job, except those whose files or templates
            have changed since. A finished job whose files are whole is left as it is.
        skip_bad: list items that cannot be made in `SKIPPED` (file, reason) instead of stopping.
        check: how finished batches are checked: "digests" reads their files and templates, "sizes" reads neither.
        gate: rejects near copies of training lesions and lists them in `SKIPPED`; `settings` hold its digest.
        workers: processes that read, paste and write beside the sampler; 0 = threads of this process. The bytes are
            the same. A script that uses processes needs the usual ``if __name__ == "__main__"`` guard.
        on_batch: called after each batch with the number of plan items done, and once at the start with the number
            done before.

    Raises:
        GBCIError: `output` is not empty and `resume` is not set, or it holds another job or one that is running; an
            input is missing, damaged or does not suit the job; all inputs were skipped.
    """
    call = asdict(settings.sampler)
    fast = isinstance(pipe, FastPipeline)
    sampled_by = {
        "scheduler": type(pipe.scheduler_for(**call) if fast else pipe.scheduler).__name__,
        "few_step": fast and pipe.uses_few_step(**call),
        "ignored_attributes": ",".join(pipe.conditioner.ignores),
    }
    identities = identities or job_identities(output, settings.seed, {record.path for record in plan.templates})
    job = _Job(plan, output, settings, identities, sampled_by=sampled_by, skip_bad=skip_bad)
    if job.is_complete(resume=resume, check=check):
        on_batch(len(plan))
        return job.result()
    job.check_inputs()
    with job.folder.claimed(resume=resume):
        try:
            job.run(Synthesizer(pipe, settings.sampler, gate, workers=workers), on_batch)
            job.compile()
        except BaseException:
            job.stop()
            raise
        job.folder.finish()
    return job.result()


class _Job:
    """A plan that is being made in a folder."""

    def __init__(
        self,
        plan: Plan,
        output: Path,
        settings: JobSettings,
        identities: Identities,
        *,
        sampled_by: Mapping[str, Any],
        skip_bad: bool,
    ):
        self.output = output
        self._plan = plan.mapped(identities.item)
        self._settings = settings
        self._skip_bad = skip_bad
        self._checks = InputChecks(settings.formats)
        self._damaged: set[Key] = set()
        self._forgotten: set[int] = set()
        self._mended = 0
        self._columns = {"gbci_fast": __version__, **sampled_by, **settings.columns()}
        identity = self._columns | {"images": len(plan), **plan.identity} | identities.identity()
        self.folder = JobFolder(output, identity, private={"templates": identities.templates(plan.templates)})
        self._count = -(-len(plan) // settings.batch_size)
        self._shown: dict[int, Path] = {}
        self._writer = ImageWriter(output, settings, identities)
        self._names = identities.listing(plan.templates)
        self._removes = identities.names.removes

    def is_complete(self, *, resume: bool, check: str) -> bool:
        """Whether the folder holds this job, finished and undamaged; changes no file.

        Raises:
            GBCIError: the folder cannot be used.
        """
        if not self.folder.begun(resume=resume):
            return False
        self._damaged = self._find_damaged(check)
        return self.folder.finished and not self._damaged

    def check_inputs(self) -> None:
        """Checks the headers of the inputs of all pending items.

        Raises:
            GBCIError: an item cannot be made and `skip_bad` is not set, or no item can be made.
        """
        first, files, sound = None, set(), any(True for _ in self._finished())
        for item in self._different(self._pending()):
            if (fault := self._checks.fault(item)) is None:
                sound = True
                continue
            first = first or fault
            files.add(item.template.path)
        if first and not self._skip_bad:
            more = f" ({len(files) - 1} more inputs cannot be used either)" if len(files) > 1 else ""
            raise GBCIError(f"{first}{more}")
        if first and not sound:
            raise _all_skipped(len(self._plan), first)

    def run(self, synthesizer: Synthesizer, on_batch: Callable[[int], None]) -> None:
        """Makes every pending batch, in order."""
        self._remove_unfinished()  # an earlier run may have been killed
        self._shown = self._panels()
        numbers = self._pending()
        count = len(self._plan) - sum(len(self._places(i)) for i in numbers)
        on_batch(count)
        sound = (self._sound(i) for i in numbers)
        with closing(synthesizer.stream(sound, self._writer.write, skip_bad=self._skip_bad)) as stream:
            for i, images in zip(numbers, stream, strict=True):
                made = iter(images)
                self._record(i, {item.index: self._checks.fault(item) or next(made) for item in self._batch(i)})
                count += len(self._places(i))
                on_batch(count)
        if self._done("rows").is_empty():
            first, number = next(iter(self._done("skipped"))), next(self._finished())
            (path,) = (item.template.path for item in self._batch(number) if item.index == first["index"])
            raise _all_skipped(len(self._plan), f"{path}: {first['reason']}")

    def compile(self) -> None:
        """Writes the tables and the preview of the finished batches."""
        rows, skipped = self._done("rows"), self._done("skipped")
        write_tables(rows, self.output)
        if skipped.is_empty():
            (self.output / SKIPPED).unlink(missing_ok=True)
        else:
            write_skipped(((item["file"], item["reason"]) for item in skipped), self.output)
        if shown := sorted(self._panels().items()):
            write_preview([np.asarray(Image.open(file)) for _, file in shown], self.output / PREVIEW)
        compiled = [file for name in COMPILED if (file := self.output / name).exists()]
        self.folder.note(TABLES_NOTE, None, [Kept.of(self.output, file) for file in compiled])

    def stop(self) -> None:
        """Makes a valid data set of the finished batches; without any, removes what this job made.

        Damaged batches that have not been made again yet stay as they are.
        """
        self._remove_unfinished()
        if not self._done("rows").is_empty():
            self.compile()
            return
        self.folder.forget(list(self.folder))
        for name in COMPILED:
            (self.output / name).unlink(missing_ok=True)

    def result(self) -> JobResult:
        """The result of a finished job."""
        manifest, notes = pq.ParquetFile(self.output / TABLES[0]), {}
        for part in manifest.iter_batches(columns=["template_sha256", "template_notes"]):
            for template, text in zip(*(column.to_pylist() for column in part.columns), strict=True):
                notes.setdefault(template, text)
        noted = Counter(note for text in notes.values() for note in text.split("; ") if note)
        images = manifest.metadata.num_rows
        return JobResult(
            preview=self.output / PREVIEW,
            images=images,
            skipped=len(self._plan) - images,
            mended=self._mended,
            rejected=sum(reason.startswith(REJECTED) for reason in read_reasons(self.output)),
            noted=dict(noted.most_common()),
        )

    def _record(self, number: int, outcomes: Mapping[int, Made[Written] | GBCIError]) -> None:
        """Adds a batch's images to its shard and to the preview, and marks the batch as finished.

        Args:
            number: of the batch.
            outcomes: {plan index: the image, or why it was not made}.
        """
        rows, skipped, kept = [], [], []
        shard, start = self._shard(number)
        self._forget_behind(number)
        with ExitStack() as stack:
            opened = None
            for place in self._places(number):
                item = self._plan[place]
                made = outcomes[item.index]
                if isinstance(made, GBCIError):
                    skipped.append(self._skip(item, made))
                    continue
                row, sample = made.value.row | {"batch": number, **self._columns}, made.value.sample
                kept += [
                    Kept.of(self.output, self.output / row["files"][kind], sha256=row["sha256"][kind])
                    for kind in row["files"]
                ]
                if sample:
                    opened = opened or stack.enter_context(open_shard(self.output / shard, start))
                    row["files"]["webdataset"] = shard.as_posix()
                    row["sha256"]["webdataset"] = made.value.digest
                    opened.add(item.image_id, sample | {"json": json.dumps(manifest_row(row)).encode()})
                rows.append(row)
                if self._shown.setdefault(self._slot(place), file := self._panel_file(place)) == file:
                    write_bytes(png.encode_png(preview_panels(made.again())), file)
                    kept.append(Kept.of(self.output, file))
            end = opened.end if opened else start
        if end > start:
            kept.append(Kept.of(self.output, self.output / shard, span=(start, end)))
        self.folder.note(number, {"rows": rows, "skipped": skipped, "shard_end": end}, kept)
        self._mended += len(rows) * (number in self._damaged)
        self._damaged.discard(number)

    def _forget_behind(self, number: int) -> None:
        """Forgets later batches in the shard of a batch that is made again: the shard is cut at its start."""
        if number in self._damaged and "webdataset" in self._settings.formats:
            behind = range(number + 1, (number // self._batches_of_a_shard + 1) * self._batches_of_a_shard)
            lost = [each for each in behind if each in self.folder]
            self.folder.forget(lost)
            self._forgotten.update(lost)

    def _skip(self, item: PlanItem, error: GBCIError) -> dict[str, Any]:
        """The record of a skipped item; raises the error where the item must not be skipped.

        The recorded reason holds no path of the machine. Unless identifiers are kept, it holds no value of a header
        either; an `InputWarning` then shows the full message.
        """
        if not self._skip_bad and not isinstance(error, CopyError):
            raise error
        self._writer.remove(item)
        name = self._names[item.template.path]
        reason = str(error).replace(one_line(str(item.template.path)), name).removeprefix(f"{name}: ")
        if isinstance(item.mask, FileMask):
            path = one_line(str(item.mask.path))
            for mask in (f"the mask file {path}", path):
                reason = reason.replace(mask, "the mask file")
        if item.template.listed:  # the reason may name masks of the input's own findings
            reason = reason.replace(one_line(f"{item.template.root}{os.sep}"), "")
        if self._removes and not isinstance(error, CopyError):
            said, reason = reason, without_values(reason)
            if reason != said:
                warnings.warn(f"{error}: skipped", InputWarning, stacklevel=2)
        return {"index": item.index, "file": name, "reason": reason}

    def _shard(self, number: int) -> tuple[Path, int]:
        """The path of a batch's shard, and the byte at which the batch begins in it."""
        first = number - number % self._batches_of_a_shard
        start = self.folder.entry(number - 1)["shard_end"] if number > first else 0
        return shard_path(number // self._batches_of_a_shard), start

    @property
    def _batches_of_a_shard(self) -> int:
        return -(-self._settings.shard_size // self._settings.batch_size)

    def _places(self, number: int) -> range:
        """The places of a batch's items in the plan."""
        size = self._settings.batch_size
        return range(len(self._plan))[number * size : (number + 1) * size]

    def _batch(self, number: int) -> list[PlanItem]:
        return [self._plan[place] for place in self._places(number)]

    def _sound(self, number: int) -> list[PlanItem]:
        """The items of a batch that can be made, as far as headers tell."""
        return [item for item in self._batch(number) if self._checks.fault(item) is None]

    def _different(self, numbers: Iterable[int]) -> Iterator[PlanItem]:
        """The items of these batches, one of those that are `Plan.alike`."""
        seen = set()
        for place in (place for number in numbers for place in self._places(number)):
            kind = self._plan.alike(self._plan.places[place])
            if kind in seen:
                continue
            if kind is not None:
                seen.add(kind)
            yield self._plan[place]

    def _finished(self) -> Iterator[int]:
        """Numbers of the finished batches, in order."""
        return (key for key in self.folder if isinstance(key, int))

    def _pending(self) -> Sequence[int]:
        """Numbers of the batches that are missing or damaged, in order."""
        return array("q", (i for i in range(self._count) if i not in self.folder or i in self._damaged))

    def _done(self, kind: str) -> "_Noted":
        """The "rows" or the "skipped" items of the finished batches."""
        return _Noted(self.folder, kind)

    def _find_damaged(self, check: str) -> set[Key]:
        """Keys of the notes whose files are missing or changed, or would be written differently now."""
        damaged = set(self.folder.damaged(check))
        if TABLES_NOTE in self.folder and self.folder.is_damaged(TABLES_NOTE):  # `result` reads the tables
            damaged.add(TABLES_NOTE)
        if check == "digests":
            damaged |= self._of_changed_templates()
        if "webdataset" in self._settings.formats:
            damaged |= self._of_cut_shards(damaged)
        return damaged

    def _of_changed_templates(self) -> set[int]:
        """Finished batches with a template whose content has changed."""
        digests: dict[Path, str | None] = {}
        changed = set()
        for number in self._finished():
            paths = {item.index: item.template.path for item in self._batch(number)}
            for row in self.folder.entry(number)["rows"]:
                path = paths[row["index"]]
                if path not in digests:
                    digests[path] = sha256_of(path) if path.is_file() else None  # a lost template cannot be used again
                if digests[path] not in (None, row["template_sha256"]):
                    changed.add(number)
        return changed

    def _of_cut_shards(self, damaged: set[Key]) -> set[int]:
        """Finished batches behind a damaged one in their shard, and the last batch of a shard whose end is missing."""
        lost, of_shard = set(), {}
        for number in self._finished():
            of_shard.setdefault(number // self._batches_of_a_shard, []).append(number)
        for shard, numbers in of_shard.items():
            end = self.folder.entry(numbers[-1])["shard_end"]
            whole = self.folder.finished or shard < max(of_shard)  # a killed run may have appended to the last shard
            if end and whole and not is_closed(self.output / shard_path(shard), end):
                lost.add(numbers[-1])
            first = min(damaged & set(numbers), default=None)
            lost |= {number for number in numbers if first is not None and number > first}
        return lost

    def _panels(self) -> dict[int, Path]:
        """{row of the preview: panel file}, as finished batches have drawn it: the first image made in each row."""
        shown = {}
        for place in sorted(int(file.stem.partition("-")[2]) for file in self.folder.progress.glob("panels-*.png")):
            number, file = place // self._settings.batch_size, self._panel_file(place)
            sound = number in self.folder and number not in self._damaged
            if sound and any(self.output / each.path == file for each in self.folder.kept(number)):
                shown.setdefault(self._slot(place), file)
        return shown

    def _panel_file(self, place: int) -> Path:
        return self.folder.progress / f"panels-{place:06d}.png"

    def _slot(self, place: int) -> int:
        return _preview_slot(place, len(self._plan))

    def _remove_unfinished(self) -> None:
        """Removes the files of unfinished batches, and cuts shards behind their last finished batch.

        Only batches up to the one after the last finished batch can have begun.
        """
        last = max(self._finished(), default=-1)
        first = range(min(last + 2, self._count))
        for number in chain(first, sorted(each for each in self._forgotten if each not in first)):
            if number in self.folder:
                continue
            for item in self._batch(number):
                self._writer.remove(item)
            begun = number - 1 in self.folder and number - 1 not in self._damaged
            if begun or number % self._batches_of_a_shard == 0:
                shard, end = self._shard(number)
                if (self.output / shard).exists():
                    close_shard(self.output / shard, end)


def _preview_slot(place: int, total: int) -> int:
    """The preview row of a place in the plan; up to `PREVIEW_ROWS` rows share the plan evenly."""
    rows = min(PREVIEW_ROWS, total)
    return bisect_right([row * total // rows for row in range(rows)], place) - 1


@dataclass(frozen=True)
class _Noted:
    """The "rows" or the "skipped" items of a job's finished batches, read anew by every iteration."""

    folder: JobFolder
    kind: str

    def __iter__(self) -> Iterator[dict[str, Any]]:
        numbers = (key for key in self.folder if isinstance(key, int))
        return (entry for number in numbers for entry in self.folder.entry(number)[self.kind])

    def is_empty(self) -> bool:
        return next(iter(self), None) is None


def _all_skipped(total: int, first: object) -> GBCIError:
    return GBCIError(f"all {total} images were skipped, so nothing was made; the first reason: {first}")
