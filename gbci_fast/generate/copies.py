"""The gate of `gbci-fast generate --reject-copies`: no painted lesion that is nearly a training lesion is written."""

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
"""How the reason of every rejection begins, in `manifest.SKIPPED`."""


class CopyError(GBCIError):
    """A painted lesion that is nearer to a training lesion than the gate allows."""


@dataclass(frozen=True, kw_only=True, eq=False)
class CopyGate:
    """Compares painted lesions with training lesions, in pixel space (see `evaluate.neighbors`).

    Attributes:
        index: of the training lesions.
        threshold: a distance below it is a copy's.
        digest: SHA-256 of both, hexadecimal.
    """

    index: TrainingIndex
    threshold: float
    digest: str

    @classmethod
    def load(cls, path: Path) -> "CopyGate":
        """Of the file that ``gbci-fast evaluate memorisation --index`` wrote.

        Raises:
            GBCIError: it does not exist, is damaged, or is something else.
        """
        index, threshold = load_index(path)
        return cls(index=index, threshold=threshold, digest=index_digest(index, threshold))

    def check(self, item: PlanItem, template: "Template", mask: np.ndarray, painted: np.ndarray) -> None:
        """Compares one painted lesion; the template's own lesions do not count, as in the evaluation.

        Args:
            template: what was painted into.
            mask: bool [S, S], what was painted.
            painted: float32 [S, S] in [0, 1], the sampler's image in model space.

        Raises:
            CopyError: it is nearer than the threshold; names the training lesion.
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
    """What was painted as a lesion of a data set, so that its crop is cut as those of training lesions are."""
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
        pathology=None,
    )
