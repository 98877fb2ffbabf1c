"""The comparisons: which judge tells which lesions from which, by what it sees; training, scores and AUCs."""

import hashlib
import importlib.metadata
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cache, partial
from typing import Any

import numpy as np
import torch

from gbci_fast.errors import GBCIError
from gbci_fast.evaluate.lesions import LesionCase, OnProgress
from gbci_fast.evaluate.metrics import first_with_interval, numbered, patient_draws, weighted_auc
from gbci_fast.evaluate.realism.boosting import BoostedJudge, Table, measure
from gbci_fast.evaluate.realism.keeping import Arrays, Kept, source_of
from gbci_fast.evaluate.realism.network import Windows, cut_windows, score_windows, train_network
from gbci_fast.evaluate.realism.paintings import Filling, key_of
from gbci_fast.evaluate.realism.regions import REGIONS, Place, Region
from gbci_fast.evaluate.realism.texture import FINEST, GROUPS, PLAIN
from gbci_fast.evaluate.settings import RealismSettings
from gbci_fast.evaluate.utility.patch_classifier import RECIPE

REAL, AUTOENCODER, PAINTED = "real", "autoencoder", "painted"
PAIRS = ((REAL, PAINTED), (REAL, AUTOENCODER), (AUTOENCODER, PAINTED), (REAL, REAL))
NETWORK, BOOSTING = "network", "boosting"
POOLED = "pooled"
ALL, WITHOUT_FINEST, PLAIN_ALONE = "all", f"without {FINEST}", f"{', '.join(PLAIN)} alone"
CHOICES = {ALL: GROUPS, WITHOUT_FINEST: tuple(group for group in GROUPS if group != FINEST), PLAIN_ALONE: PLAIN}
"""{choice of features: its groups}."""
HALVINGS = 10
"""Random halvings of the patients over which real against real is averaged."""
SOURCES = source_of("judging", "boosting", "network", "texture", "regions")

Score = Callable[[Any], np.ndarray]
"""Maps a set's items to one number per lesion, higher = more like the first set."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Side:
    """Lesions that judges are trained on, or tested on.

    Attributes:
        cases: the lesions.
        places: where each lies.
        fillings: {"real", "autoencoder" or "painted": the pixels under the masks}.
    """

    cases: Sequence[LesionCase]
    places: Sequence[Place]
    fillings: dict[str, Filling]

    @property
    def patients(self) -> tuple[str, ...]:
        return tuple(case.patient for case in self.cases)

    def digest(self, kind: str) -> str:
        """Of the images of one kind, their masks and their patients."""
        digest = hashlib.sha256()
        for case, pixels in zip(self.cases, self.fillings[kind], strict=True):
            digest.update(f"{key_of(case)} {case.patient}".encode())
            digest.update(np.packbits(case.breast).tobytes())
            digest.update(pixels.tobytes())
        return digest.hexdigest()


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One question: whether a judge tells the lesions of set `first` from those of set `second`.

    `features` names the features of `CHOICES` that boosting may use; the network has no choice.
    """

    judge: str
    first: str
    second: str
    region: Region = "whole"
    features: str = ALL

    @property
    def is_null(self) -> bool:
        return self.first == self.second


@dataclass(frozen=True, kw_only=True, eq=False)
class Scores:
    """What one trained judge said of the test lesions: their numbers and scores, [N] of the first set, [M]."""

    first: np.ndarray
    second: np.ndarray
    of_first: np.ndarray
    of_second: np.ndarray


def planned_comparisons(kinds: Sequence[str]) -> list[Comparison]:
    """All comparisons between the sets `kinds`.

    Boosting sees every pair in every region, and with fewer features; the slower network sees real against painted in
    every region, and the other pairs whole.
    """
    plan = []
    for first, second in PAIRS:
        if not {first, second} <= set(kinds):
            continue
        everywhere = REGIONS if (first, second) == (REAL, PAINTED) else REGIONS[:1]
        plan += [Comparison(judge=NETWORK, first=first, second=second, region=region) for region in everywhere]
        everywhere = REGIONS if first != second else REGIONS[:1]
        plan += [Comparison(judge=BOOSTING, first=first, second=second, region=region) for region in everywhere]
        if first != second:
            plan += [
                Comparison(judge=BOOSTING, first=first, second=second, features=choice)
                for choice in (WITHOUT_FINEST, PLAIN_ALONE)
            ]
    return plan


def compare(
    train: Side,
    test: Side,
    settings: RealismSettings,
    kept: Kept | None = None,
    on_progress: OnProgress = lambda stage, done, total: None,
) -> list[dict[str, Any]]:
    """Every comparison with its AUC, as JSON values: of all test lesions, and of those of each data set.

    Args:
        train, test: the lesions, of equal kinds.
        settings: of the evaluation.
        kept: of features and scores; None = nothing is kept.
        on_progress: called as ``f(stage, done, total)``.

    Raises:
        GBCIError: a side has fewer than two patients, or a training diverged.
    """
    for name, side in (("training", train), ("test", test)):
        if (count := len(set(side.patients))) < 2:
            raise GBCIError(f"the {name} lesions are of {count} patient; expected at least 2")
    kept, sides = kept or Kept(None), (train, test)
    digests = [{kind: side.digest(kind) for kind in side.fillings} for side in sides]
    plan = planned_comparisons(list(train.fillings))
    tables = _measure(sides, digests, kept, on_progress)
    draws = patient_draws(test.patients, settings.seed)
    done, total, rows = 0, sum(_count_runs(one, settings) for one in plan), []
    for one in plan:
        items = cache(partial(_tables_of, one, tables) if one.judge == BOOSTING else partial(_windows_of, one, sides))
        told = [SOURCES, RECIPE, torch.__version__, importlib.metadata.version("scikit-learn"), asdict(one)]
        told += [settings.train_steps, settings.train_batch]
        told += [side[kind] for side in digests for kind in (one.first, one.second)]
        runs = []
        for seed in range(settings.seed, settings.seed + _count_runs(one, settings)):
            judge = partial(_judge, one, items, sides, settings, seed=seed)
            runs.append(Scores(**kept.get([*told, seed], judge)))
            done += 1
            on_progress("judging", done, total)
        rows.append(asdict(one) | {"auc": summarize(runs, test.cases, draws)})
    return rows


def summarize(runs: Sequence[Scores], cases: Sequence[LesionCase], draws: np.ndarray) -> dict[str, dict[str, Any]]:
    """{"pooled" or a data set: its AUC}, the mean over runs, with an interval over the test patients.

    Args:
        runs: of one comparison.
        cases: the test lesions.
        draws: of `patient_draws`.
    """
    roots = np.array([case.root for case in cases])
    groups = {POOLED: np.ones(len(cases), bool)} | {root: roots == root for root in dict.fromkeys(roots.tolist())}
    found = {}
    for name, group in groups.items():
        by_run = np.stack([_auc(run, group, draws) for run in runs])
        found[name] = {
            **first_with_interval(by_run.mean(0)),
            "by_run": [float(value) if np.isfinite(value) else None for value in by_run[:, 0]],
            "lesions": max(int(group[run.first].sum()) for run in runs),
            "patients": len({case.patient for case, chosen in zip(cases, group, strict=True) if chosen}),
        }
    return found if len(found) > 2 else {POOLED: found[POOLED]}


def halve(patients: Sequence[str], rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """The lesions, int [N] and [M], of two random halves of the patients."""
    owners = numbered(patients)
    count = int(owners.max()) + 1
    chosen = rng.permutation(count)[: count // 2]
    first = np.isin(owners, chosen)
    return np.flatnonzero(first), np.flatnonzero(~first)


def _judge(
    one: Comparison,
    items: Callable[[], Sequence[dict[str, Any]]],
    sides: Sequence[Side],
    settings: RealismSettings,
    *,
    seed: int,
) -> Arrays:
    """Trains a judge on the first side, scores the second side with it: the fields of `Scores`."""
    rng, kinds = np.random.default_rng(seed), (one.first, one.second)
    # Of the first and the second set, on each side.
    rows = [halve(side.patients, rng) if one.is_null else (np.arange(len(side.cases)),) * 2 for side in sides]
    train, test = (
        [found[kind].of(chosen) for kind, chosen in zip(kinds, pair, strict=True)]
        for found, pair in zip(items(), rows, strict=True)
    )
    score = _train(one.judge, train[0], train[1], settings, seed)
    return {"first": rows[1][0], "second": rows[1][1], "of_first": score(test[0]), "of_second": score(test[1])}


def _train(judge: str, first: Any, second: Any, settings: RealismSettings, seed: int) -> Score:
    if judge == BOOSTING:
        return BoostedJudge(first, second, seed=seed).score
    steps, batch = settings.train_steps, settings.train_batch
    network = train_network(first, second, seed=seed, steps=steps, batch_size=batch)
    return lambda windows: score_windows(network, windows)


def _auc(run: Scores, group: np.ndarray, draws: np.ndarray) -> np.ndarray:
    """The probability that a lesion of the first set outscores one of the second, within `group`: float64 [1 + R]."""
    one, other = group[run.first], group[run.second]
    if not one.any() or not other.any():
        return np.full(len(draws), np.nan)
    weights = (draws[:, rows].astype(np.float64) for rows in (run.first[one], run.second[other]))
    with np.errstate(invalid="ignore"):
        return weighted_auc(run.of_first[one], run.of_second[other], *weights)


def _count_runs(one: Comparison, settings: RealismSettings) -> int:
    return HALVINGS if one.is_null else settings.seeds


def _measure(
    sides: Sequence[Side], digests: Sequence[dict[str, str]], kept: Kept, on_progress: OnProgress
) -> list[dict[str, dict[Region, Table]]]:
    """The features of each side, {kind: {region: table}}."""
    done, total, found = 0, sum(map(len, digests)), []
    for side, known in zip(sides, digests, strict=True):
        tables = {}
        for kind, digest in known.items():
            arrays = kept.get(["features", source_of("texture", "regions"), digest], partial(_features, side, kind))
            tables[kind] = {
                region: Table(names=tuple(arrays[f"{region}_names"].tolist()), values=arrays[region])
                for region in REGIONS
            }
            done += 1
            on_progress("measuring", done, total)
        found.append(tables)
    return found


def _features(side: Side, kind: str) -> Arrays:
    tables = measure(side.cases, side.places, side.fillings[kind], REGIONS)
    names = {f"{region}_names": np.array(table.names) for region, table in tables.items()}
    return {region: table.values for region, table in tables.items()} | names


def _tables_of(one: Comparison, tables: Sequence[dict[str, dict[Region, Table]]]) -> list[dict[str, Table]]:
    groups = CHOICES[one.features]
    return [{kind: found[one.region].columns(groups) for kind, found in side.items()} for side in tables]


def _windows_of(one: Comparison, sides: Sequence[Side]) -> list[dict[str, Windows]]:
    return [
        {
            kind: cut_windows(side.cases, side.places, side.fillings[kind], one.region)
            for kind in dict.fromkeys((one.first, one.second))
        }
        for side in sides
    ]
