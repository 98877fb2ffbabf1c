"""Digital Mammography For Presentation, on the matrix and in the stored values of the template."""

from datetime import datetime, timedelta
from pathlib import Path

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

    UIDs, dates and times are functions of the job's seed and the plan item, so the same job writes the same bytes.

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
    path.parent.mkdir(parents=True, exist_ok=True)
    write_dicom(dataset, path, compression=compression)


def _header(synthesis: Synthesis, job_seed: int, weights_hash: str) -> MammogramHeader:
    item, attributes = synthesis.item, synthesis.attributes
    check_view(item.template.path, attributes.view_position, attributes.laterality)
    categories = attributes.finding_categories
    findings = "of unspecified category" if categories is None else ", ".join(categories) or NO_FINDING
    study_number = int(item.study_id[:8], 16)
    return MammogramHeader(
        view_position=attributes.view_position,
        laterality=attributes.laterality,
        study_uid=uid_from_seed("study", job_seed, item.study_id),
        series_uid=uid_from_seed("series", job_seed, item.study_id, attributes.laterality, attributes.view_position),
        instance_uid=uid_from_seed("instance", job_seed, item.image_id),
        study_datetime=_EPOCH + timedelta(days=study_number % 7300, seconds=study_number % 86400),
        patient_id=f"SYN-{item.study_id[:12]}",
        software_version=__version__,
        derivation=f"Synthetic lesion ({findings}) by latent diffusion (weights {weights_hash[:12]}, "
        f"seed {item.seed}); research data, not for diagnosis.",
        source=_source(synthesis.template.mammogram.dataset),
        spacing=synthesis.template.mammogram.spacing,
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
