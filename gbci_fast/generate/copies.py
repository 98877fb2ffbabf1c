"""The gate of ``gbci-fast generate --reject-copies``: near copies of training lesions are not written."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from gbci_fast.errors import GBCIError
from gbci_fast.evaluate.lesions import LesionCase, crop_lesions
from gbci_fast.evaluate.memorisation.neighbors import TrainingIndex, index_digest, load_index
from gbci_fast.generate.plan import PlanItem

if TYPE_CHECKING:
    from gbci_fast.generate.template import Template

REJECTED = "near copy of "
"""The first words of every rejection's reason in `manifest.SKIPPED`."""


class CopyError(GBCIError):
    """A painted lesion is nearer to a training lesion than the gate allows."""


@dataclass(frozen=True, kw_only=True, eq=False)
class CopyGate:
    """Compares painted lesions with training lesions, in pixel space (see `evaluate.memorisation.neighbors`).

    Attributes:
        index: the training lesions.
        threshold: a lesion at a smaller distance is a copy.
        digest: SHA-256 of index and threshold, hexadecimal.
    """

    index: TrainingIndex
    threshold: float
    digest: str

    @classmethod
    def load(cls, path: Path) -> "CopyGate":
        """Reads the file that ``gbci-fast evaluate memorisation --index`` wrote.

        Raises:
            GBCIError: the file does not exist, is damaged, or is not such an index.
        """
        index, threshold = load_index(path)
        return cls(index=index, threshold=threshold, digest=index_digest(index, threshold))

    def check(self, item: PlanItem, template: "Template", mask: np.ndarray, painted: np.ndarray) -> None:
        """Compares one painted lesion with the training lesions, except those of its own template.

        Args:
            item: the plan item of the image.
            template: the image that was painted into.
            mask: bool [S, S], the painted pixels in model space.
            painted: float32 [S, S] in [0, 1], the sampler's image in model space.

        Raises:
            CopyError: the distance is below the threshold; the message names the training lesion.
        """
        if set(self.index.image_ids) == {item.template.image_id}:
            return  # nothing else to compare with
        crop = crop_lesions([_case(item, template, mask)], [np.where(mask, painted, template.pixels)])
        nearest = self.index.nearest(crop, [item.template.image_id])
        if nearest.distances[0] < self.threshold:
            raise CopyError(
                f"{REJECTED}training lesion {self.index.names[nearest.rows[0]]}: distance {nearest.distances[0]:.4f}, "
                f"threshold {self.threshold:.4f}, image {item.image_id}"
            )


def _case(item: PlanItem, template: "Template", mask: np.ndarray) -> LesionCase:
    """The painted lesion as a `LesionCase`, so that it is cropped as training lesions are."""
    return LesionCase(
        root="",
        image_id=item.image_id,
        number=0,
        patient=item.template.patient_in(template.mammogram),
        split=item.template.split,
        seed=item.seed,
        image=np.round(template.pixels * 65535).astype(np.uint16),
        breast=template.breast,
        lesion=mask,
        mask=mask,
        attributes=item.attributes,
        report=item.report,
    )
