"""Digital Mammography For Presentation, on the matrix and in the stored values of the template."""

import hashlib
import re
from datetime import date, datetime, timedelta
from pathlib import Path

import numpy as np
from pydicom import Dataset
from pydicom.uid import UID, SecondaryCaptureImageStorage

from gbci_fast import __version__
from gbci_fast.attributes import NO_FINDING
from gbci_fast.data.deidentify import KeptIdentifiers
from gbci_fast.dicom.writing import (
    MammogramHeader,
    SourceImage,
    mammogram_dataset,
    stated,
    uid_from_seed,
    write_dicom,
)
from gbci_fast.errors import GBCIError
from gbci_fast.generate.checks import check_view
from gbci_fast.generate.identities import Identities
from gbci_fast.generate.template import Synthesis
from gbci_fast.jobs.files import digest_of

# For a template without a date, one is invented after this day, from the study's ids.
_EPOCH = datetime(2000, 1, 1)
NOT_LOOKED_AT = "nobody has ruled out text in the pixels: PatientIdentityRemoved is NO"


def write_synthesis(
    synthesis: Synthesis, path: Path, *, identities: Identities, job_seed: int, weights_hash: str, compression: str
) -> None:
    """Writes the synthesis as a DICOM file with SyntheticData = YES and its provenance.

    UIDs, dates and times are functions of the job's seed, the plan item, and the template's patient and study as
    `identities` name them; the SOPInstanceUID also depends on the pixels. So the same job writes the same bytes, and
    images that differ have different UIDs. Each variant is a patient of its own. Within a variant, the studies of one
    patient stay together, with the template's intervals between them.

    Raises:
        GBCIError: the view or side is unknown.
    """
    mammogram = synthesis.template.mammogram
    dataset = mammogram_dataset(
        synthesis.stored,
        _header(synthesis, identities, job_seed, weights_hash),
        like=mammogram.dataset,
        window=mammogram.presentation.window,
        lut=mammogram.presentation.lut,
    )
    write_dicom(dataset, path, compression=compression)


def not_looked_at(dataset: Dataset | None) -> bool:
    """Whether the template's header (None for PNG) does not rule out text in the pixels."""
    return stated(dataset, "BurnedInAnnotation") != ["NO"]


def _header(synthesis: Synthesis, identities: Identities, job_seed: int, weights_hash: str) -> MammogramHeader:
    item, attributes, mammogram = synthesis.item, synthesis.attributes, synthesis.template.mammogram
    check_view(item.template.path, attributes.view_position, attributes.laterality, mammogram.other_view)
    categories = attributes.finding_categories
    findings = "of unspecified category" if categories is None else ", ".join(categories) or NO_FINDING
    # The header's patient and study count too: the input's folders may not separate them.
    patient = identities.origin(item.template, mammogram).patient_id
    source, names = mammogram.dataset, identities.names
    study = (item.study_id, patient, names.uid(_text(source, "StudyInstanceUID")))
    number = int(digest_of(*study)[:8], 16)
    invented = _EPOCH + timedelta(days=number % 7300, seconds=number % 86400)
    when = _study_datetime(source)
    day = invented if when is None else when + names.shift(patient)
    pixels = hashlib.sha256(np.ascontiguousarray(synthesis.stored).data).hexdigest()
    return MammogramHeader(
        view_position=attributes.view_position,
        laterality=attributes.laterality,
        study_uid=uid_from_seed("study", job_seed, *study),
        series_uid=uid_from_seed("series", job_seed, *study, attributes.laterality, attributes.view_position),
        instance_uid=uid_from_seed("instance", job_seed, *study, item.image_id, pixels),
        study_datetime=_planned(day, item.date),
        patient_id=f"SYN-{digest_of('patient', job_seed, item.variant, patient)[:12]}",
        software_version=__version__,
        derivation=f"Synthetic lesion ({findings}) by latent diffusion (weights {weights_hash[:12]}, "
        f"seed {item.seed}); research data, not for diagnosis.",
        source=_source(source, names),
        spacing=mammogram.spacing,
        chest_wall="R" if synthesis.template.frame.flip else "L",
        patient_age=attributes.age,
        deidentified=names.removes,
        dates="REMOVED" if when is None else "MODIFIED" if names.removes or item.date is not None else "UNMODIFIED",
        instance_number=1 + item.index,
    )


def _planned(template: datetime, planned: date | timedelta | None) -> datetime:
    """The date and time of a synthetic study whose template, as published, has the date and time `template`.

    Raises:
        GBCIError: no calendar has the day.
    """
    if planned is None:
        return template
    if isinstance(planned, date):
        return datetime.combine(planned, template.time())
    try:
        return template + planned
    except OverflowError:
        raise GBCIError(f"date is {planned.days:+d} days from {template:%Y-%m-%d}; expected a day up to 9999") from None


def _study_datetime(dataset: Dataset | None) -> datetime | None:
    """StudyDate with StudyTime, or midnight where the time is not legal; None where the date is not."""
    day = re.fullmatch(r"(\d{4})\.?(\d\d)\.?(\d\d)", _text(dataset, "StudyDate"))
    time = re.match(r"([01]\d|2[0-3]):?([0-5]\d)?:?([0-5]\d)?", _text(dataset, "StudyTime"))
    if day is None or int(day[1]) < 1900:
        return None
    hour, minute, second = (int(part or 0) for part in time.groups()) if time else (0, 0, 0)
    try:
        return datetime(int(day[1]), int(day[2]), int(day[3]), hour, minute, second)
    except ValueError:  # no such day
        return None


def _text(dataset: Dataset | None, keyword: str) -> str:
    return "" if dataset is None else str(dataset.get(keyword) or "").strip()


def _source(dataset: Dataset | None, names: KeptIdentifiers) -> SourceImage | None:
    """The template as a reference to a DICOM object; None for a PNG or a file without a SOPInstanceUID.

    A SOP class that the standard does not know is replaced, since its text may identify somebody.
    """
    if dataset is None or not dataset.get("SOPInstanceUID"):
        return None
    sop_class = UID(_text(dataset, "SOPClassUID"))
    return SourceImage(
        sop_class_uid=sop_class if sop_class.type == "SOP Class" else SecondaryCaptureImageStorage,
        sop_instance_uid=names.uid(dataset.SOPInstanceUID),
    )
