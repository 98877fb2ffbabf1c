"""A judge that measures: gradient boosting on features (`texture`), of which groups can be left out."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from gbci_fast.errors import GBCIError
from gbci_fast.evaluate.lesions import LesionCase
from gbci_fast.evaluate.realism.paintings import Filling, fill
from gbci_fast.evaluate.realism.regions import Place, Region
from gbci_fast.evaluate.realism.texture import features

SETTINGS: dict[str, Any] = {
    "learning_rate": 0.1,
    "max_iter": 150,
    "max_leaf_nodes": 15,
    "min_samples_leaf": 20,
    "l2_regularization": 1.0,
    "max_features": 0.3,
    "early_stopping": False,
}


@dataclass(frozen=True, kw_only=True, eq=False)
class Table:
    """The features of the lesions of one set.

    Attributes:
        names: "group/feature" of the D columns.
        values: float64 [N, D]; NaN where a lesion is too small to tell.
    """

    names: tuple[str, ...]
    values: np.ndarray

    def of(self, lesions: np.ndarray) -> "Table":
        """The rows of some lesions, int [N]."""
        return replace(self, values=self.values[lesions])

    def columns(self, groups: Collection[str]) -> "Table":
        """The columns of some groups."""
        kept = [i for i, name in enumerate(self.names) if name.split("/")[0] in groups]
        return Table(names=tuple(self.names[i] for i in kept), values=self.values[:, kept])


def measure(
    cases: Sequence[LesionCase], places: Sequence[Place], filling: Filling, regions: Sequence[Region]
) -> dict[Region, Table]:
    """The features of every case with its filling, in every region."""
    rows: dict[Region, list[dict[str, float]]] = {region: [] for region in regions}
    for case, place, inside in zip(cases, places, filling, strict=True):
        image = fill(case, inside)
        for region in regions:
            rows[region].append(features(place, image, region))
    return {
        region: Table(names=tuple(found[0]), values=np.array([list(row.values()) for row in found]))
        for region, found in rows.items()
    }


def check_boosting() -> None:
    """Raises GBCIError if scikit-learn is not installed."""
    try:
        import sklearn  # noqa: F401
    except ImportError as error:
        raise GBCIError("scikit-learn is not installed; install it by `pip install 'gbci_fast[evaluate]'`") from error


class BoostedJudge:
    """Histogram gradient boosting (scikit-learn; Ke et al. 2017) that tells lesions of one set from those of another.

    Args:
        first, second: the sets; equal columns.
        seed: of the columns that each split may choose from.
    """

    def __init__(self, first: Table, second: Table, *, seed: int):
        from sklearn.ensemble import HistGradientBoostingClassifier

        values = np.concatenate([first.values, second.values])
        # scikit-learn cannot bin a column without two different numbers.
        known = np.where(np.isfinite(values), values, np.nan)
        several = np.array([len(np.unique(column[np.isfinite(column)])) > 1 for column in known.T])
        self._columns = np.flatnonzero(several)
        labels = np.repeat([1, 0], [len(first.values), len(second.values)])
        self._model = HistGradientBoostingClassifier(random_state=seed, **SETTINGS)
        self._model.fit(known[:, self._columns], labels)

    def score(self, table: Table) -> np.ndarray:
        """The log odds of every lesion to be of the first set, float64 [N]."""
        return self._model.decision_function(table.values[:, self._columns])
