"""A case of an evaluation: a masked place that is erased and painted again. Rules for its mask and its noise."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np

from gbci_fast.attributes import Attributes
from gbci_fast.data.fields import to_unit
from gbci_fast.evaluate.metrics import grow, ring_mean
from gbci_fast.jobs.files import digest_of, real_path

T = TypeVar("T")

MASK_GROWTH = 3  # pixels around the lesion; training grows masks by 1 to 5
AIR_MARGIN = 2  # pixels of air that a mask may cover, as in training


@dataclass(frozen=True, kw_only=True, eq=False)
class Case:
    """A mask in one whole-breast field of view, and the description of the lesion under the mask.

    Attributes:
        root: name of the data set.
        image_id: ID of the image in the data set.
        patient: ID of the patient.
        seed: seed of the sampler's noise, see `image_seed`.
        image: uint16 [S, S], 65535 = 1.0.
        breast: bool [S, S].
        mask: bool [S, S], the pixels that are erased and painted.
        attributes, report: the description.
    """

    root: str
    image_id: str
    patient: str
    seed: int
    image: np.ndarray
    breast: np.ndarray
    mask: np.ndarray
    attributes: Attributes
    report: str | None

    @property
    def pixels(self) -> np.ndarray:
        """The image as float32 [S, S] in [0, 1]."""
        return to_unit(self.image).numpy()

    @property
    def ring_mean(self) -> float:
        """The mean of the mask's surroundings in the breast."""
        return ring_mean(self.pixels, self.mask, self.breast)


def image_seed(seed: int, study_id: str, image_id: str) -> int:
    """A 63-bit seed from SHA-256: an image's noise depends on neither the batch size nor the choice of images."""
    return int(digest_of(seed, study_id, image_id)[:16], 16) >> 1


def variant_seed(seed: int, variant: int) -> int:
    """The seed of a case's variant: the case's own for variant 0, else derived from both."""
    return seed if variant == 0 else int(np.random.SeedSequence((seed, variant)).generate_state(1, np.uint64)[0])


def mask_around(lesion: np.ndarray, breast: np.ndarray) -> np.ndarray:
    """The lesion grown by `MASK_GROWTH`, within the breast and `AIR_MARGIN` of air, as in training; all bool [S, S]."""
    return lesion | (grow(lesion, MASK_GROWTH) & grow(breast, AIR_MARGIN))


def root_names(roots: Sequence[Path]) -> dict[Path, str]:
    """{root: name}: the folder's name or, if two folders have the same name, the path."""
    names = {root: real_path(root).name for root in roots}
    return names if len(set(names.values())) == len(names) else {root: str(root) for root in names}


def spread(items: Sequence[T], limit: int | None) -> Sequence[T]:
    """`limit` items, spread evenly over all items; all items if there are fewer or `limit` is None."""
    if limit is None or limit >= len(items):
        return items
    return [items[i * len(items) // limit] for i in range(limit)]
