"""The names under which a job publishes its inputs, and the secret key behind them, kept in ``job.json``."""

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

KEY = "identity_key"  # field of `JOB_FILE`
HEAD = 2**16  # bytes read from the beginning of each input to derive the key
SHORTEST_KEY = 16  # bytes


@dataclass(frozen=True, kw_only=True)
class Origin:
    """What a synthetic data set's tables say of a template."""

    patient_id: str
    study_id: str
    image_id: str
    file: str


@dataclass(frozen=True)
class Identities:
    """Names a job's inputs; `names` is a `Deidentifier`, or `KeptIdentifiers` to keep the original names.

    The ids of tables in the VinDr layout are pseudonyms already. They are kept, so that input and output tables can be
    joined. UIDs and ages are de-identified whatever their source.
    """

    names: KeptIdentifiers

    def origin(self, record: ImageRecord, mammogram: Mammogram) -> Origin:
        """The published ids and file name of an opened input."""
        patient = record.patient_in(mammogram)
        return Origin(
            patient_id=patient if record.listed else self.names.patient(patient),
            study_id=record.study_id if record.listed else self.names.name(record.study_id),
            image_id=self._image(record),
            file=self.file(record),
        )

    def file(self, record: ImageRecord) -> str:
        """The published name of an input's file."""
        if record.listed or not self.names.removes:
            return record.path.name
        return self._image(record) + _suffix(record.path)

    def item(self, item: PlanItem) -> PlanItem:
        """The item, with keyed ids where the input is a plain folder: unkeyed digests of file names can be guessed."""
        if item.template.listed or not self.names.removes:
            return item
        study, image = (self.names.name(text, digits=32) for text in (item.study_id, item.image_id))
        lesion = item.lesion_id if item.named else self.names.name(item.lesion_id, digits=32)
        return replace(item, study_id=study, image_id=image, lesion_id=lesion)

    def attributes(self, attributes: Attributes) -> Attributes:
        """The attributes as the tables publish them: the age is de-identified."""
        return replace(attributes, age=self.names.age(attributes.age))

    def listing(self, records: Iterable[ImageRecord]) -> dict[Path, str]:
        """{path: name in `manifest.SKIPPED`}: the path below the inputs' common folder, or the pseudonym of `file`."""
        by_path = {record.path: record for record in records}
        short = names_below(by_path)
        plain = {path for path, record in by_path.items() if self.names.removes and not record.listed}
        return {path: self.file(record) if path in plain else short[path] for path, record in by_path.items()}

    def identity(self) -> dict[str, Any]:
        """The part of a job's identity that these names decide: the key, hexadecimal; None where names are kept."""
        return {KEY: self.names.key.hex() if isinstance(self.names, Deidentifier) else None}

    def templates(self, records: Sequence[ImageRecord]) -> dict[str, str]:
        """{published template_image_id: path below the inputs' common folder}."""
        paths = names_below({record.path for record in records})
        return {self._image(record): paths[record.path] for record in records}

    def _image(self, record: ImageRecord) -> str:
        if record.listed or not self.names.removes:
            return record.image_id
        return self.names.name(f"{record.study_id}/{record.image_id}")


def job_identities(
    output: Path, seed: int, inputs: Iterable[Path], *, keep: bool = False, key_file: Path | None = None
) -> Identities:
    """The identities of the job in `output`, with the key it began with, or else a new one.

    Args:
        output: the job's folder.
        seed: of the job.
        inputs: every file of INPUT. Without `key_file`, the key follows from their content and the seed.
        keep: keep the original names.
        key_file: a file of at least `SHORTEST_KEY` bytes; jobs with the same file give the same pseudonyms.

    Raises:
        GBCIError: `key_file` cannot be read or is too short.
    """
    if keep:
        return Identities(KeptIdentifiers())
    if key_file is not None:
        return Identities(Deidentifier(_key_of_file(key_file)))
    return Identities(Deidentifier(_key_of_job(output / JOB_FILE) or derive_key(seed, inputs)))


def derive_key(seed: int, inputs: Iterable[Path]) -> bytes:
    """A key of 32 bytes from the seed and the names, sizes and first `HEAD` bytes of the inputs.

    The seed is published, so the inputs are the secret: the key cannot be found without all of them. An input that
    cannot be read counts by its name.
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
    """{path: path below the folder that all have in common}, so that no table shows where a user keeps files."""
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
    """The key in a job file; None where there is none. Whether the job can be resumed is checked elsewhere."""
    try:
        return bytes.fromhex(json.loads(file.read_text(encoding="utf-8"))[KEY]) if file.is_file() else None
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return None


def _suffix(path: Path) -> str:
    """The suffix of an image file, lower case; "" for any other, which may be part of a patient's name."""
    return path.suffix.lower() if path.suffix.lower() in IMAGE_SUFFIXES else ""
