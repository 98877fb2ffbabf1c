"""Distances between two sets of feature vectors, on plain arrays; items of one owner (patient) are never compared.

`owners` holds the owner of every item. Two views of one lesion, or a real lesion and the one painted in its place, are
not independent: they would pull every distance toward zero.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.spatial.distance import cdist

from gbci_fast.errors import GBCIError


@dataclass(frozen=True, kw_only=True, eq=False)
class KernelPairs:
    """The terms of the unbiased kernel distance of two sets (Binkowski et al. 2018), for any weights of their items.

    The distance can be negative: between samples of one distribution its expectation is zero.

    Attributes:
        xx, yy, xy: float64, the cubic kernel (x.y / D + 1)^3 of every pair, 0 where the pair does not count.
        counts_xx, counts_yy, counts_xy: float64, 1 where a pair counts (the items have different owners), else 0.
    """

    xx: np.ndarray
    yy: np.ndarray
    xy: np.ndarray
    counts_xx: np.ndarray
    counts_yy: np.ndarray
    counts_xy: np.ndarray

    @classmethod
    def of(cls, x: np.ndarray, y: np.ndarray, owners_x: Sequence[str], owners_y: Sequence[str]) -> "KernelPairs":
        """The pairs of features x [N, D] and y [M, D]."""
        parts = {}
        for name, a, b, counts in (
            ("xx", x, x, _different(owners_x, owners_x)),
            ("yy", y, y, _different(owners_y, owners_y)),
            ("xy", x, y, _different(owners_x, owners_y)),
        ):
            kernel = (a.astype(np.float64) @ b.astype(np.float64).T / x.shape[1] + 1) ** 3
            parts |= {name: np.where(counts, kernel, 0), f"counts_{name}": counts.astype(np.float64)}
        return cls(**parts)

    def distances(self, weights_x: np.ndarray, weights_y: np.ndarray) -> np.ndarray:
        """The distance under each of R weightings of the items, [R, N] and [R, M]: float64 [R].

        A weight is the number of times that an item is in a resample, or 1 if it is in a half, else 0. The distance is
        NaN where no pair counts.
        """

        def mean(kernel: np.ndarray, counts: np.ndarray, left: np.ndarray, right: np.ndarray) -> np.ndarray:
            with np.errstate(invalid="ignore"):
                return ((left @ kernel) * right).sum(1) / ((left @ counts) * right).sum(1)

        wx, wy = np.asarray(weights_x, np.float64), np.asarray(weights_y, np.float64)
        within = mean(self.xx, self.counts_xx, wx, wx) + mean(self.yy, self.counts_yy, wy, wy)
        return within - 2 * mean(self.xy, self.counts_xy, wx, wy)


def frechet_distance(
    x: np.ndarray, y: np.ndarray, weights_x: np.ndarray | None = None, weights_y: np.ndarray | None = None
) -> float:
    """The Frechet distance of two Gaussians that are fitted to features [N, D] and [M, D] (Heusel et al. 2017).

    Let A and B be the centered features divided by the square root of their number minus one. The covariances are A'A
    and B'B, and the trace of the square root of their product is the sum of the singular values of AB'. No matrix
    square root is taken, so the number of items may be below the number of features.

    Args:
        x, y: features.
        weights_x, weights_y: [N] and [M], how often each item counts; None = once.
    """
    mean_x, spread_x = _moments(x, weights_x)
    mean_y, spread_y = _moments(y, weights_y)
    together = np.linalg.svd(spread_x @ spread_y.T, compute_uv=False).sum()
    total = ((mean_x - mean_y) ** 2).sum() + (spread_x**2).sum() + (spread_y**2).sum() - 2 * together
    return float(max(total, 0.0))


@dataclass(frozen=True, kw_only=True, eq=False)
class Neighbors:
    """Which items lie in the other set's manifold, the union of balls that reach from its items to their k-th neighbor.

    Attributes:
        precision, density: float64 [M], one per synthetic item.
        recall, coverage: float64 [N], one per real item.
    """

    precision: np.ndarray
    density: np.ndarray
    recall: np.ndarray
    coverage: np.ndarray

    @property
    def means(self) -> dict[str, float]:
        return {name: float(getattr(self, name).mean()) for name in ("precision", "recall", "density", "coverage")}


@dataclass(frozen=True, kw_only=True, eq=False)
class NeighborPairs:
    """Euclidean distances within and between two sets; infinite where two items have one owner.

    Attributes:
        real, synthetic: float64 [N, N] and [M, M], within the sets.
        cross: float64 [N, M], between them.
    """

    real: np.ndarray
    synthetic: np.ndarray
    cross: np.ndarray

    @classmethod
    def of(
        cls, real: np.ndarray, synthetic: np.ndarray, real_owners: Sequence[str], synthetic_owners: Sequence[str]
    ) -> "NeighborPairs":
        """The distances of features real [N, D] and synthetic [M, D]."""
        return cls(
            real=np.where(_different(real_owners, real_owners), cdist(real, real), np.inf),
            synthetic=np.where(_different(synthetic_owners, synthetic_owners), cdist(synthetic, synthetic), np.inf),
            cross=np.where(_different(real_owners, synthetic_owners), cdist(real, synthetic), np.inf),
        )

    def find(
        self, k: int, real_rows: np.ndarray | slice = slice(None), synthetic_rows: np.ndarray | slice = slice(None)
    ) -> Neighbors:
        """Precision and recall (Kynkaanniemi et al. 2019), density and coverage (Naeem et al. 2020), item by item.

        Args:
            k: number of neighbors of other owners in a ball.
            real_rows, synthetic_rows: the items that count, bool or indices.

        Raises:
            GBCIError: an item has fewer than `k` neighbors of other owners.
        """
        real_radii = _radii("real", self.real[real_rows][:, real_rows], k)
        synthetic_radii = _radii("synthetic", self.synthetic[synthetic_rows][:, synthetic_rows], k)
        distances = self.cross[real_rows][:, synthetic_rows]
        in_real = distances < real_radii[:, None]
        return Neighbors(
            precision=in_real.any(0).astype(np.float64),
            density=in_real.sum(0) / k,
            recall=(distances < synthetic_radii).any(1).astype(np.float64),
            coverage=in_real.any(1).astype(np.float64),
        )


def _moments(x: np.ndarray, weights: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """The mean [D], and a matrix R of at most D rows, [<= D, D], such that R'R is the covariance."""
    x = x.astype(np.float64)
    weights = np.ones(len(x)) if weights is None else np.asarray(weights, np.float64)
    x, weights = x[weights > 0], weights[weights > 0]
    mean = weights @ x / weights.sum()
    spread = np.sqrt(weights / max(weights.sum() - 1, 1))[:, None] * (x - mean)
    return mean, np.linalg.qr(spread, mode="r") if len(spread) > spread.shape[1] else spread


def _radii(what: str, distances: np.ndarray, k: int) -> np.ndarray:
    """The distance of every item to its k-th neighbor of another owner, float64 [N]; `what` names the set in errors."""
    fewest = int(np.isfinite(distances).sum(1).min())
    if fewest < k:
        raise GBCIError(
            f"a {what} crop has {fewest} neighbors of other patients among {len(distances)} crops; expected at least "
            f"{k}: use more images"
        )
    return np.partition(distances, k - 1, axis=1)[:, k - 1]


def _different(left: Sequence[str], right: Sequence[str]) -> np.ndarray:
    """Which pairs have different owners, bool [N, M]."""
    return np.asarray(left)[:, None] != np.asarray(right)
