"""A model observer: how well a lesion of known shape and place can be told from healthy tissue.

The non-prewhitening matched filter with a local background: the template is the expected signal minus the mean of its
surroundings. The area under its ROC curve measures how visible a lesion is. The observer models neither search nor the
eye (Burgess et al., "Human observer detection experiments with mammograms and power-law noise", Med. Phys. 28, 2001).
"""

from collections.abc import Sequence

import numpy as np
from scipy import stats

from gbci_fast.errors import GBCIError


def matched_filter(signal: np.ndarray) -> np.ndarray:
    """The template [h, w] for an expected signal [h, w] that is zero around the lesion.

    The weights sum to zero, so that the level of the background cancels. A score is the weighted mean of the signal
    minus the mean of its surroundings.

    Raises:
        GBCIError: the signal has negative values, no positive ones, or no zeros around it.
    """
    around = signal == 0
    if signal.min() < 0 or not signal.any() or not around.any():
        raise GBCIError("signal has no lesion or no surroundings; expected positive values amid zeros")
    return signal / signal.sum() - around / around.sum()


def score(image: np.ndarray, template: np.ndarray, corner: tuple[int, int]) -> float:
    """The template's response where its first pixel lies at ``corner`` (row, column) of the image [H, W].

    Raises:
        GBCIError: the template reaches beyond the image.
    """
    (row, column), (height, width) = corner, template.shape
    patch = image[max(row, 0) : row + height, max(column, 0) : column + width]
    if patch.shape != template.shape:
        raise GBCIError(
            f"template of {height}x{width} at {corner} reaches beyond an image of {image.shape[0]}x{image.shape[1]}"
        )
    return float((patch * template).sum())


def roc_auc(present: Sequence[float] | np.ndarray, absent: Sequence[float] | np.ndarray) -> float:
    """The probability that a score with a lesion exceeds one without; ties count half (Mann and Whitney's U)."""
    ranks = stats.rankdata(np.concatenate([present, absent]))[: len(present)]
    return float((ranks.sum() - len(present) * (len(present) + 1) / 2) / (len(present) * len(absent)))


def auc_interval(
    present: Sequence[float], absent: Sequence[float], *, level: float = 0.95, rounds: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """Bootstrap interval of `roc_auc` over cases; scores ``i`` of both lists are of one breast and drawn together.

    Raises:
        GBCIError: the lists differ in length.
    """
    with_lesion, without = np.asarray(present), np.asarray(absent)
    if with_lesion.shape != without.shape:
        raise GBCIError(f"{len(present)} scores with and {len(absent)} without a lesion; expected pairs")
    rng = np.random.default_rng(seed)
    draws = rng.integers(len(present), size=(rounds, len(present)))
    areas = [roc_auc(with_lesion[draw], without[draw]) for draw in draws]
    low, high = np.quantile(areas, ((1 - level) / 2, (1 + level) / 2))
    return float(low), float(high)
