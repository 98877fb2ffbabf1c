"""Under which names a job publishes its inputs, and the key of these names, which stays in ``job.json``."""

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gbci_fast.attributes import Attributes
from gbci_fast.data.deidentify import Deidentifier, KeptIdentifiers
from gbci_fast.data.vindr import ImageRecord
from gbci_fast.dicom.reading import IMAGE_SUFFIXES, Mammogram
from gbci_fast.errors import GBCIError
from gbci_fast.generate.plan import PlanItem
from gbci_fast.jobs.folder import JOB_FILE

KEY = "identity_key"  # of `JOB_FILE`
HEAD = 2**16  # bytes of an input that count for the key
SHORTEST_KEY = 16  # bytes


@dataclass(frozen=True, kw_only=True)
class Origin:
    """What a data set says of the image that one of its own was made from."""

    patient_id: str
    study_id: str
    image_id: str
    file: str


@dataclass(frozen=True)
class Identities:
    """How a job names its inputs: `names` are a `Deidentifier`, or `KeptIdentifiers`.

    The ids of tables in the VinDr layout are pseudonyms already, and stay, so that tables of the input and of the
    output can be joined. UIDs and ages are treated alike wherever they come from.
    """

    names: KeptIdentifiers

    def origin(self, record: ImageRecord, mammogram: Mammogram) -> Origin:
        """Of an opened input."""
        patient = record.patient_in(mammogram)
        return Origin(
            patient_id=patient if record.listed else self.names.patient(patient),
            study_id=record.study_id if record.listed else self.names.name(record.study_id),
            image_id=self._image(record),
            file=self.file(record),
        )

    def file(self, record: ImageRecord) -> str:
        """The name of an input's file."""
        if record.listed or not self.names.removes:
            return record.path.name
        return self._image(record) + _suffix(record.path)

    def item(self, item: PlanItem) -> PlanItem:
        """With ids that tell nothing of a plain folder's names: by themselves they are digests that can be guessed."""
        if item.template.listed or not self.names.removes:
            return item
        study, image = (self.names.name(text, digits=32) for text in (item.study_id, item.image_id))
        return replace(item, study_id=study, image_id=image)

    def attributes(self, attributes: Attributes) -> Attributes:
        """Those of the tables."""
        return replace(attributes, age=self.names.age(attributes.age))

    def listing(self, records: Iterable[ImageRecord]) -> dict[Path, str]:
        """By path, how `manifest.SKIPPED` names inputs: below the folder that all are in, or by `file`."""
        by_path = {record.path: record for record in records}
        short = names_below(by_path)
        plain = {path for path, record in by_path.items() if self.names.removes and not record.listed}
        return {path: self.file(record) if path in plain else short[path] for path, record in by_path.items()}

    def identity(self) -> dict[str, Any]:
        """What tells a job under these names from others: the key, hexadecimal; ``None`` without one."""
        return {KEY: self.names.key.hex() if isinstance(self.names, Deidentifier) else None}

    def templates(self, plan: Sequence[PlanItem]) -> dict[str, str]:
        """The path behind every image id that the tables name as a template's, below the folder that all are in."""
        paths = names_below({item.template.path for item in plan})
        return {self._image(item.template): paths[item.template.path] for item in plan}

    def _image(self, record: ImageRecord) -> str:
        if record.listed or not self.names.removes:
            return record.image_id
        return self.names.name(f"{record.study_id}/{record.image_id}")


def job_identities(
    output: Path, seed: int, inputs: Iterable[Path], *, keep: bool = False, key_file: Path | None = None
) -> Identities:
    """Of the job in `output`, with the key that it began with, or a new one.

    Args:
        seed: of the job.
        inputs: every file of INPUT. Their content and the seed give the key where no file does.
        keep: without de-identification.
        key_file: at least `SHORTEST_KEY` bytes: jobs with the same file give the same pseudonyms.

    Raises:
        GBCIError: `key_file` cannot be read or is too short.
    """
    if keep:
        return Identities(KeptIdentifiers())
    if key_file is not None:
        return Identities(Deidentifier(_key_of_file(key_file)))
    return Identities(Deidentifier(_key_of_job(output / JOB_FILE) or derive_key(seed, inputs)))


def derive_key(seed: int, inputs: Iterable[Path]) -> bytes:
    """A key that follows from the seed, and from names, sizes and first `HEAD` bytes of the inputs.

    The seed is published; the inputs are what the key is a secret to: whoever has not all of them, byte by byte, cannot
    find it. An input that cannot be read counts by its name.
    """
    digest = hashlib.sha256(f"gbci_fast identity key\x1f{seed}\x1f".encode())
    for path, name in sorted(names_below(inputs).items(), key=lambda pair: pair[1]):
        content, size = b"", -1
        with suppress(OSError):
            if path.is_file():
                size = path.stat().st_size
                with path.open("rb") as file:
                    content = file.read(HEAD)
        digest.update(hashlib.sha256(f"{name}\0{size}\0".encode(errors="surrogatepass") + content).digest())
    return digest.digest()


def names_below(paths: Iterable[Path]) -> dict[Path, str]:
    """Paths below the folder that all have in common: no table says where a user keeps things."""
    absolute = {path: path.absolute() for path in paths}
    common = os.path.commonpath([path.parent for path in absolute.values()]) if absolute else ""
    return {path: full.relative_to(common).as_posix() for path, full in absolute.items()}


def _key_of_file(path: Path) -> bytes:
    try:
        content = path.read_bytes() if path.is_file() else None
    except OSError as error:
        raise GBCIError(f"{path} cannot be read: {error.strerror or error}") from error
    if content is None:
        raise GBCIError(f"{path} is not a file; expected one of at least {SHORTEST_KEY} bytes as the key of identities")
    if len(content) < SHORTEST_KEY:
        raise GBCIError(f"{path} has {len(content)} bytes; expected at least {SHORTEST_KEY} as the key of identities")
    return hashlib.sha256(b"gbci_fast identity key file\x1f" + content).digest()


def _key_of_job(file: Path) -> bytes | None:
    """None where no job is there; whether that can be resumed is not asked here."""
    try:
        return bytes.fromhex(json.loads(file.read_text(encoding="utf-8"))[KEY]) if file.is_file() else None
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return None


def _suffix(path: Path) -> str:
    """That of an image; another one may be a part of a name."""
    return path.suffix.lower() if path.suffix.lower() in IMAGE_SUFFIXES else ""
