"""Digital Mammography For Presentation, on the matrix and in the stored values of the template."""

import hashlib
from datetime import datetime, timedelta
from pathlib import Path

import numpy as np
from pydicom import Dataset
from pydicom.uid import SecondaryCaptureImageStorage

from gbci_fast import __version__
from gbci_fast.data.attributes import NO_FINDING
from gbci_fast.data.dicom_writer import (
    MammogramHeader,
    SourceImage,
    mammogram_dataset,
    uid_from_seed,
    write_dicom,
)
from gbci_fast.generate.checks import check_view
from gbci_fast.generate.engine import Synthesis

_EPOCH = datetime(2000, 1, 1)  # dates are invented: a day and second after this, by the job's seed and the study


def write_synthesis(synthesis: Synthesis, path: Path, *, job_seed: int, weights_hash: str, compression: str) -> None:
    """Writes the synthesis with SyntheticData = YES and its provenance.

    UIDs, dates and times are functions of the job's seed, the plan item, the template's patient and study and, of the
    image's, its pixels: the same job writes the same bytes, and images that differ have different UIDs.

    Raises:
        GBCIError: the template's view or side is unknown.
    """
    mammogram = synthesis.template.mammogram
    dataset = mammogram_dataset(
        synthesis.stored,
        _header(synthesis, job_seed, weights_hash),
        like=mammogram.dataset,
        window=mammogram.presentation.window,
        lut=mammogram.presentation.lut,
    )
    write_dicom(dataset, path, compression=compression)


def _header(synthesis: Synthesis, job_seed: int, weights_hash: str) -> MammogramHeader:
    item, attributes, mammogram = synthesis.item, synthesis.attributes, synthesis.template.mammogram
    check_view(item.template.path, attributes.view_position, attributes.laterality, mammogram.other_view)
    categories = attributes.finding_categories
    findings = "of unspecified category" if categories is None else ", ".join(categories) or NO_FINDING
    # Where the input's folders do not tell patients and studies apart, its headers do.
    patient = item.template.patient_in(mammogram)
    source = mammogram.dataset
    study = (item.study_id, patient, "" if source is None else source.get("StudyInstanceUID", ""))
    number = int(hashlib.sha256("\x1f".join(map(str, study)).encode()).hexdigest()[:8], 16)
    pixels = hashlib.sha256(np.ascontiguousarray(synthesis.stored)).hexdigest()
    return MammogramHeader(
        view_position=attributes.view_position,
        laterality=attributes.laterality,
        study_uid=uid_from_seed("study", job_seed, *study),
        series_uid=uid_from_seed("series", job_seed, *study, attributes.laterality, attributes.view_position),
        instance_uid=uid_from_seed("instance", job_seed, *study, item.image_id, pixels),
        study_datetime=_EPOCH + timedelta(days=number % 7300, seconds=number % 86400),
        patient_id=f"SYN-{hashlib.sha256(f'{item.study_id}{patient}'.encode()).hexdigest()[:12]}",
        software_version=__version__,
        derivation=f"Synthetic lesion ({findings}) by latent diffusion (weights {weights_hash[:12]}, "
        f"seed {item.seed}); research data, not for diagnosis.",
        source=_source(source),
        spacing=mammogram.spacing,
        chest_wall="R" if synthesis.template.frame.flip else "L",
        patient_age=attributes.age,
        instance_number=1 + item.index,
    )


def _source(dataset: Dataset | None) -> SourceImage | None:
    """The template as a DICOM object; a PNG, or a file that states no identity, is none."""
    if dataset is None or not dataset.get("SOPInstanceUID"):
        return None
    return SourceImage(
        sop_class_uid=dataset.get("SOPClassUID") or SecondaryCaptureImageStorage,
        sop_instance_uid=dataset.SOPInstanceUID,
    )
