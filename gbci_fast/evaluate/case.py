"""What an evaluation erases and paints again, and the rules that its masks and its noise follow."""

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

MASK_GROWTH = 3  # pixels around the lesion; training masks are grown by 1 to 5
AIR_MARGIN = 2  # pixels of air that a mask may cover, as in training


@dataclass(frozen=True, kw_only=True, eq=False)
class Case:
    """A mask in one whole-breast field of view, and the description of what is under it.

    Attributes:
        root: name of the data set.
        patient: whose image it is.
        seed: of the sampler's noise, see `image_seed`.
        image: uint16 [S, S], 65535 = 1.0.
        breast: bool [S, S].
        mask: bool [S, S], what is erased and painted.
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
        """float32 [S, S] in [0, 1]."""
        return to_unit(self.image).numpy()

    @property
    def ring_mean(self) -> float:
        """The mean of the mask's surroundings in the breast."""
        return ring_mean(self.pixels, self.mask, self.breast)


def image_seed(seed: int, study_id: str, image_id: str) -> int:
    """63 bits of SHA-256, so that neither the batch size nor the choice of images changes an image's noise."""
    return int(digest_of(seed, study_id, image_id)[:16], 16) >> 1


def mask_around(lesion: np.ndarray, breast: np.ndarray) -> np.ndarray:
    """The lesion grown by `MASK_GROWTH` in the breast and `AIR_MARGIN` of air, as in training; all bool [S, S]."""
    return lesion | (grow(lesion, MASK_GROWTH) & grow(breast, AIR_MARGIN))


def root_names(roots: Sequence[Path]) -> dict[Path, str]:
    """A name per data set: its folder's or, where two folders have the same, its path."""
    names = {root: real_path(root).name for root in roots}
    return names if len(set(names.values())) == len(names) else {root: str(root) for root in names}


def spread(items: Sequence[T], limit: int | None) -> Sequence[T]:
    """`limit` items, spread evenly over all; all of them if there are fewer, or without a limit."""
    if limit is None or limit >= len(items):
        return items
    return [items[i * len(items) // limit] for i in range(limit)]
