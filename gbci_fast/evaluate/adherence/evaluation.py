"""Adherence: whether painted lesions match their descriptions, judged by a classifier that never saw painted ones."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from gbci_fast.errors import GBCIError
from gbci_fast.evaluate.case import variant_seed
from gbci_fast.evaluate.lesions import LesionCase, crop_lesions
from gbci_fast.evaluate.metrics import first_with_interval, patient_draws, within_sets, within_sets_auc
from gbci_fast.evaluate.painting import Description, ring_mean_fill
from gbci_fast.evaluate.report import target
from gbci_fast.evaluate.scorer import SIZE, Scorer, cut_windows, label, labels
from gbci_fast.evaluate.settings import AdherenceSettings

CHANCE = 0.5
KEPT_SHARE = 0.8  # the share of the real crops' advantage over chance that painted ones must reach
TRIES = 500  # random derangements, of which the best is taken
TOLD, SHUFFLED, ORIGINAL = "painted", "shuffled", "shuffled_original"
CONDITIONS = ("real", "reconstruction", "ring_mean", TOLD, SHUFFLED, ORIGINAL)

Painter = Callable[[Sequence[LesionCase], Sequence[Description], float], Sequence[np.ndarray]]
"""``f(cases, descriptions, guidance)``: float32 [S, S] in [0, 1], one per case."""


@dataclass(frozen=True, kw_only=True, eq=False)
class _Judged:
    """Probabilities and truths (NaN = unknown) of one task in one condition: [N], or [V * N] for V variants."""

    scores: np.ndarray
    truths: np.ndarray


def evaluate_adherence(
    cases: Sequence[LesionCase],
    scorer: Scorer,
    painter: Painter,
    settings: AdherenceSettings,
    *,
    reconstruction: Sequence[np.ndarray] | None = None,
) -> dict[str, Any]:
    """Balanced accuracy and AUC of the scorer's tasks on real, painted and control images of the same lesions.

    Images are compared with the description that the sampler was given. With `settings.shuffled`, every case is also
    painted from the description of another lesion of its data set (see `derange`). Agreement with that description is
    adherence proper. Agreement with the case's own labels must be at chance; otherwise the surroundings or the mask
    give the answer away. The task `size` depends on the mask, which is not shuffled; its control is the erased image,
    `ring_mean`. The model is told the pathology only through BI-RADS and report.

    Args:
        cases: the real lesions.
        scorer: the judge.
        painter: called once per guidance scale, set of descriptions and variant; `LesionCase.seed` decides the noise.
        settings: of the evaluation.
        reconstruction: float32 [S, S] in [0, 1] per case, the image through the autoencoder alone; None leaves the
            condition out.

    Returns:
        The report's ``lesions``, ``patients``, ``tasks``, ``sweep`` and ``targets``, as JSON values.

    Raises:
        GBCIError: `settings.shuffled` is set and a data set has only one lesion.
    """
    donors = derange(cases, scorer, settings.seed) if settings.shuffled else None
    judge = _Judge(cases, scorer, donors, settings)
    fixed: dict[str, Sequence[np.ndarray]] = {
        "real": [case.pixels for case in cases],
        "ring_mean": ring_mean_fill(cases),
    }
    if reconstruction is not None:
        fixed["reconstruction"] = reconstruction
    judged = {name: judge.own(images) for name, images in fixed.items()}
    scales = dict.fromkeys((settings.guidance, *settings.sweep))
    by_guidance = {guidance: judge.painted(painter, guidance) for guidance in scales}
    judged |= by_guidance[settings.guidance]
    tasks = {
        task: {name: judge.summary(judged[name][task]) for name in CONDITIONS if task in judged.get(name, ())}
        for task in scorer.config.tasks
    }
    sweep = [
        {"guidance": guidance}
        | {
            task: {name: judge.summary(found[task]) for name, found in judged.items() if task in found}
            for task in tasks
        }
        for guidance, judged in sorted(by_guidance.items() if settings.sweep else ())
    ]
    return {
        "lesions": len(cases),
        "patients": len({case.patient for case in cases}),
        "tasks": tasks,
        "sweep": sweep,
        "targets": build_targets(tasks),
    }


def derange(cases: Sequence[LesionCase], scorer: Scorer, seed: int) -> np.ndarray:
    """Assigns every case the description of another lesion of its data set: the donors' indices, int [N].

    The best of `TRIES` random derangements is taken. Donors should be other patients, since two views of one lesion
    have the same description. Their labels should not correlate with the cases' own; otherwise adherence itself would
    move the agreement with the original labels off chance.

    Raises:
        GBCIError: a data set has only one lesion.
    """
    rng, donors = np.random.default_rng(seed), np.empty(len(cases), int)
    patients = np.unique([case.patient for case in cases], return_inverse=True)[1]
    truths = labels(cases, [t for t in scorer.config.tasks if t != SIZE], scorer.config.median_diameter)
    roots = np.array([case.root for case in cases])
    for root in dict.fromkeys(roots):
        rows = np.flatnonzero(roots == root)
        if len(rows) < 2:
            raise GBCIError(f"{root} has one lesion, whose description cannot be shuffled; pass --no-shuffled")
        best = np.inf
        for _ in range(TRIES):
            order = rng.permutation(rows)
            taken = np.roll(order, -1)
            cost = (patients[order] == patients[taken]).mean() + _dependence(truths[order], truths[taken])
            if cost < best:
                best, donors[order] = cost, taken
    return donors


def _dependence(one: np.ndarray, other: np.ndarray) -> float:
    """How much the donors' labels depend on the cases' own: the largest difference over T tasks, in [0, 1].

    The difference is between the rates of positive donors among positive and among negative cases.

    Args:
        one, other: labels of cases and donors, [N, T].
    """
    worst = 0.0
    for own, told in zip(one.T, other.T, strict=True):
        known = ~np.isnan(own) & ~np.isnan(told)
        positive, negative = told[known & (own == 1)], told[known & (own == 0)]
        if len(positive) and len(negative):
            worst = max(worst, abs(positive.mean() - negative.mean()))
    return worst


class _Judge:
    """Scores images of `cases`, and summarizes scores with intervals over patients."""

    def __init__(
        self,
        cases: Sequence[LesionCase],
        scorer: Scorer,
        donors: np.ndarray | None,
        settings: AdherenceSettings,
    ):
        self.cases, self.scorer, self.donors, self.variants = cases, scorer, donors, settings.variants
        self.tasks, median = scorer.config.tasks, scorer.config.median_diameter
        self.truths = labels(cases, self.tasks, median)
        self.roots = np.unique([case.root for case in cases], return_inverse=True)[1]
        self.patients = np.unique([case.patient for case in cases], return_inverse=True)[1]
        if donors is not None:
            told = [
                [label(t, cases[j].attributes, case.diameter, median) for t in self.tasks]
                for case, j in zip(cases, donors, strict=True)
            ]
            self.told = np.array(told, dtype=object).astype(np.float64)
        self.draws = patient_draws(self.patients, settings.seed)

    def own(self, images: Sequence[np.ndarray]) -> dict[str, _Judged]:
        """The scores of `images` in every task, with the cases' own truths."""
        return self._against(self._score(images), self.truths)

    def painted(self, painter: Painter, guidance: float) -> dict[str, dict[str, _Judged]]:
        """Paints all cases; returns scores by condition: own descriptions and, if there are donors, shuffled ones."""
        described = [Description.of(case) for case in self.cases]
        found = {TOLD: self._against(self._paint(painter, described, guidance), self.truths)}
        if self.donors is None:
            return found
        scores = self._paint(painter, [described[j] for j in self.donors], guidance)
        for name, truths in ((SHUFFLED, self.told), (ORIGINAL, self.truths)):
            found[name] = {task: pair for task, pair in self._against(scores, truths).items() if task != SIZE}
        return found

    def summary(self, judged: _Judged) -> dict[str, Any]:
        """Balanced accuracy and AUC with intervals, and the numbers of lesions and patients behind them."""
        times = len(judged.truths) // len(self.cases)
        known = ~np.isnan(judged.truths)
        scores, truths, roots = judged.scores[known], judged.truths[known] == 1, np.tile(self.roots, times)[known]
        draws = np.tile(self.draws, times)[:, known]
        return {
            "positive": int(truths.sum()) // times,
            "negative": int((~truths).sum()) // times,
            "patients": len(set(np.tile(self.patients, times)[known])),
            "balanced_accuracy": first_with_interval(balanced_accuracy(scores, truths, roots, draws)),
            "auc": first_with_interval(within_sets_auc(scores, truths, roots, draws)),
        }

    def _score(self, images: Sequence[np.ndarray]) -> Mapping[str, np.ndarray]:
        return self.scorer.predict(crop_lesions(self.cases, images), cut_windows(self.cases, images))

    def _paint(self, painter: Painter, told: Sequence[Description], guidance: float) -> dict[str, np.ndarray]:
        """The scores of every task, [V * N], variant by variant; the first variant uses the cases' own noise."""
        found = []
        for variant in range(self.variants):
            cases = [replace(case, seed=variant_seed(case.seed, variant)) for case in self.cases]
            found.append(self._score(painter(cases, told, guidance)))
        return {task: np.concatenate([scores[task] for scores in found]) for task in self.tasks}

    def _against(self, scores: Mapping[str, np.ndarray], truths: np.ndarray) -> dict[str, _Judged]:
        truths = np.tile(truths, (len(scores[self.tasks[0]]) // len(truths), 1))
        return {task: _Judged(scores=scores[task], truths=truths[:, i]) for i, task in enumerate(self.tasks)}


def balanced_accuracy(scores: np.ndarray, truths: np.ndarray, roots: np.ndarray, draws: np.ndarray) -> np.ndarray:
    """The mean of sensitivity and specificity at threshold 0.5, within data sets: float64 [R].

    The mean is taken within data sets, because they differ in their labels and telling one set from another says
    nothing about a lesion. Data sets weigh by their number of lesions, and only those with both classes count; NaN if
    none has both.

    Args:
        scores, truths, roots: [N]: probabilities, bool labels, and numbers of the data sets.
        draws: weights of the lesions, [R, N].
    """
    right = (scores > CHANCE) == truths

    def value(rows: np.ndarray, weights: np.ndarray) -> np.ndarray:
        hits, positive = right[rows], truths[rows]
        rates = [weights @ (hits & kind) / (weights @ kind) for kind in (positive, ~positive)]
        return (rates[0] + rates[1]) / 2

    return within_sets(value, truths, roots, draws)


def build_targets(tasks: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Two targets per task: the share of the real crops' advantage over chance, and a control at chance."""
    targets = []
    for task, found in tasks.items():
        real, painted = (found[name]["balanced_accuracy"] for name in ("real", TOLD))
        judged = real["low"] is not None and real["low"] > CHANCE and painted["value"] is not None
        share = (painted["value"] - CHANCE) / (real["value"] - CHANCE) if judged else None
        note = "" if judged else "the scorer is not above chance on real crops, so that it cannot judge"
        name = f"adherence of {task}: painted over real, above chance"
        targets.append(target(name, share, KEPT_SHARE, at_least=True, note=note))
        control = found.get("ring_mean" if task == SIZE else ORIGINAL)
        if control is None:
            continue
        value = control["balanced_accuracy"]
        known = value["low"] is not None
        what = "erased lesions" if task == SIZE else "original labels under shuffled descriptions"
        measured = f"95 % interval {value['low']:.2f} to {value['high']:.2f}" if known else "too few lesions"
        note = f"balanced accuracy must be at chance; {measured}"
        outside = max(value["low"] - CHANCE, CHANCE - value["high"]) if known else None
        name = f"leak of {task}: {what}, chance outside of the interval by"
        targets.append(target(name, outside, 0.0, at_least=False, note=note))
    return targets
