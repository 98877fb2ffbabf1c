"""Training of the readers: features of lesion crops, principal components, logistic regression, and a judgment on C."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np

from gbci_fast.data.cache import is_cache
from gbci_fast.errors import GBCIError
from gbci_fast.evaluate.backbone import open_lite0
from gbci_fast.evaluate.lesions import LesionCase, OnProgress, read_lesions
from gbci_fast.evaluate.metrics import first_with_interval, patient_draws, within_sets_auc
from gbci_fast.evaluate.readers import (
    LEAST_AUC,
    SIZE,
    TASKS,
    Interval,
    LinearMap,
    Readers,
    ReadersConfig,
    Record,
    describe,
    features_of,
    truths,
)
from gbci_fast.jobs.files import replace_folder
from gbci_fast.training.settings import ReaderSettings
from gbci_fast.training.stages import digest_roots

TRAINED, JUDGED, SPLIT = "A", "C", "training"  # folds, and the split that they are folds of
SIMILAR = 1.25  # largest ratio of two diameters that count as about the same
ITERATIONS = 5000  # of a logistic regression, at most


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What the cross-validation chooses: see `Record`."""

    components: int
    regularization: float


CONTROL = Choice(components=50, regularization=1e-3)


@dataclass(frozen=True, kw_only=True, eq=False)
class Seen:
    """Lesions of some folds and their features.

    Attributes:
        cases: N lesions.
        features: of `features_of`.
    """

    cases: Sequence[LesionCase]
    features: dict[bool, np.ndarray]

    @property
    def sets(self) -> np.ndarray:
        """The data set of every lesion, [N]."""
        return np.array([case.root for case in self.cases])

    @property
    def patients(self) -> np.ndarray:
        """The patient of every lesion, [N]."""
        return np.array([case.patient for case in self.cases])

    @property
    def diameters(self) -> np.ndarray:
        """float64 [N], in model pixels."""
        return np.array([case.diameter for case in self.cases])


def train_classifier(roots: Sequence[Path], output: Path, settings: ReaderSettings, on_progress: OnProgress) -> Readers:
    """Trains readers on fold A of the training split of `roots`, judges them on fold C, and writes ``output/readers``.

    Args:
        roots: VinDr-layout folders.
        output: a new folder, or an empty one.
        settings: of the cross-validation.
        on_progress: called as ``f(stage, done, total)``.

    Raises:
        GBCIError: `output` holds something, EfficientNet-Lite0 is not installed, a root is a cache, a fold has no
            lesion, or no reader is admitted.
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise GBCIError(f"{output} is not empty; expected a new folder")
    open_lite0()  # fail before the reading
    train, judge = (see_lesions(roots, fold, on_progress) for fold in (TRAINED, JUDGED))
    readers = train_readers(train, judge, settings, digest_roots(roots))
    replace_folder(output / "readers", readers.save)
    return readers


def see_lesions(roots: Sequence[Path], folds: str, on_progress: OnProgress) -> Seen:
    """The lesions of some folds of the training split, with their features.

    Raises:
        GBCIError: a root is a cache, or there is no lesion in the folds.
    """
    for root in roots:
        if is_cache(root):
            raise GBCIError(f"{root} is a cache, which keeps no pathology; expected the VinDr-layout folder it is from")

    def report(stage: str, done: float, total: int) -> None:
        on_progress(f"{stage}, fold {folds}", done, total)

    cases = read_lesions(roots, split=SPLIT, folds=folds, on_progress=report)
    return Seen(cases=cases, features=features_of(cases, on_progress=report))


def train_readers(train: Seen, judge: Seen, settings: ReaderSettings, data: str) -> Readers:
    """One reader per task of `TASKS` with enough lesions; those that are not admitted are in `ReadersConfig.refused`.

    Args:
        train: lesions of fold A.
        judge: lesions of fold C, which decide only on the admission.
        settings: of the cross-validation.
        data: digest of the training tables.

    Raises:
        GBCIError: no reader is admitted.
    """
    median = float(np.median(train.diameters))
    maps, tasks, refused = {}, {}, {}
    for task in TASKS:
        labels = truths(train.cases, task, median)
        if min((labels == 0).sum(), (labels == 1).sum()) < settings.fewest:
            continue
        reader, record = _train_reader(task, train, judge, median, settings)
        if record.admitted:
            maps[task], tasks[task] = reader, record
        else:
            refused[task] = record
    if not tasks:
        told = ", ".join(f"{task} {describe(record.auc)}" for task, record in refused.items())
        raise GBCIError(
            f"no reader is admitted; expected an AUC on fold {JUDGED} whose lower 95 % bound is at least {LEAST_AUC}, "
            f"got {told or f'no task with {settings.fewest} lesions of both answers in fold {TRAINED}'}"
        )
    config = ReadersConfig(
        median_diameter=median,
        backbone=open_lite0().digest,
        data=data,
        folds=TRAINED,
        split=SPLIT,
        tasks=tasks,
        refused=refused,
        control=tell_sets_apart(train, judge, CONTROL),
    )
    return Readers(config, maps)


def _train_reader(
    task: str, train: Seen, judge: Seen, median: float, settings: ReaderSettings
) -> tuple[LinearMap, Record]:
    """The reader of one task, and its record."""
    answers, judged = truths(train.cases, task, median), truths(judge.cases, task, median)
    scaled = TASKS[task].scaled
    choice, validated = choose(train, train.features[scaled], answers, settings)
    (reader,) = fit(train.features[scaled], answers, train.sets, choice)
    logits = reader(judge.features[scaled])
    record = Record(
        trained=_count(train.sets, answers),
        judged=_count(judge.sets, judged),
        components=choice.components,
        regularization=choice.regularization,
        cross_validated=validated,
        auc=auc_of(logits, judged, judge),
        size_auc=auc_of(judge.diameters, judged, judge),
        matched_auc=None if task == SIZE else matched_auc(logits, judged, judge),
        by_set={
            name: auc_of(logits, np.where(judge.sets == name, judged, np.nan), judge)
            for name in dict.fromkeys(judge.sets[~np.isnan(judged)].tolist())
        },
    )
    return reader, record


def fit(features: np.ndarray, answers: np.ndarray, sets: np.ndarray, *choices: Choice) -> list[LinearMap]:
    """Logistic regressions on the principal components of standardized features, each folded into one linear map.

    The components are of all lesions, the regressions of those with a known answer. In every data set both answers
    weigh the same, so that it is of no use to tell the data sets apart.

    Args:
        features: [N, D].
        answers: float64 [N]: 1, 0, or NaN = unknown.
        sets: the data set of every lesion, [N].
        choices: one map each.
    """
    from sklearn.decomposition import PCA
    from sklearn.linear_model import LogisticRegression

    mean, scale = features.mean(0, dtype=np.float64), features.std(0, dtype=np.float64) + 1e-6
    standardized = (features - mean) / scale
    most = min(*features.shape, max(choice.components for choice in choices))
    pca = PCA(most, svd_solver="full").fit(standardized)  # the default solver draws at random
    known = ~np.isnan(answers)
    scores, weights = pca.transform(standardized[known]), balanced(answers[known], sets[known])
    maps = []
    for choice in choices:
        regression = LogisticRegression(C=choice.regularization, max_iter=ITERATIONS)
        regression.fit(scores[:, : choice.components], answers[known], sample_weight=weights)
        coefficients, axes = np.ravel(regression.coef_), np.asarray(pca.components_)[: choice.components]
        weight = coefficients @ axes / scale
        maps.append(
            LinearMap(weight=weight.astype(np.float32), bias=float(np.ravel(regression.intercept_)[0] - weight @ mean))
        )
    return maps


def balanced(answers: np.ndarray, sets: np.ndarray) -> np.ndarray:
    """Weights, float64 [N], that make both answers weigh the same in every data set; answers are 1 or 0."""
    weights = np.empty(len(answers))
    for name in np.unique(sets):
        for answer in (0, 1):
            rows = (sets == name) & (answers == answer)
            weights[rows] = (sets == name).sum() / (2 * max(rows.sum(), 1))
    return weights


def choose(train: Seen, features: np.ndarray, answers: np.ndarray, settings: ReaderSettings) -> tuple[Choice, float]:
    """The best of `ReaderSettings`' choices by cross-validation over patients, and its AUC within data sets."""
    from sklearn.model_selection import StratifiedGroupKFold

    choices = [Choice(components=k, regularization=c) for k, c in product(settings.components, settings.regularization)]
    logits = np.full((len(choices), len(answers)), np.nan)
    folds = StratifiedGroupKFold(settings.parts, shuffle=True, random_state=settings.seed)
    for rows, left in folds.split(features, np.nan_to_num(answers, nan=2), train.patients):
        for found, reader in zip(logits, fit(features[rows], answers[rows], train.sets[rows], *choices), strict=True):
            found[left] = reader(features[left])
    known = ~np.isnan(answers)
    once = np.ones((1, known.sum()), int)
    aucs = [within_sets_auc(found[known], answers[known] == 1, train.sets[known], once)[0] for found in logits]
    best = int(np.argmax(aucs))
    return choices[best], float(aucs[best])


def auc_of(scores: np.ndarray, answers: np.ndarray, judge: Seen, seed: int = 0) -> Interval:
    """The AUC of scores, [N], on the lesions with a known answer, within data sets, with its interval over patients."""
    known = ~np.isnan(answers)
    if not known.any():
        return Interval(value=None, low=None, high=None)
    draws = patient_draws(judge.patients[known], seed)
    return Interval(
        **first_with_interval(within_sets_auc(scores[known], answers[known] == 1, judge.sets[known], draws))
    )


def matched_auc(scores: np.ndarray, answers: np.ndarray, judge: Seen, seed: int = 0) -> Interval:
    """The AUC among pairs of one data set whose diameters differ by a factor below `SIMILAR`, with its interval.

    A reader that only saw how large a lesion is would be at 0.5. Arguments are those of `auc_of`.
    """
    positive, negative = np.flatnonzero(answers == 1), np.flatnonzero(answers == 0)
    one, other = np.ix_(positive, negative)
    ratios = np.abs(np.log(judge.diameters[one] / judge.diameters[other]))
    alike = (judge.sets[one] == judge.sets[other]) & (ratios < np.log(SIMILAR))
    wins = (scores[one] > scores[other]) + 0.5 * (scores[one] == scores[other])
    draws = patient_draws(judge.patients, seed).astype(np.float64)
    won, pairs = (((draws[:, positive] @ x) * draws[:, negative]).sum(1) for x in (wins * alike, alike))
    with np.errstate(invalid="ignore"):
        return Interval(**first_with_interval(won / pairs))


def tell_sets_apart(train: Seen, judge: Seen, choice: Choice) -> dict[str, Interval]:
    """How well the crops' features tell each data set from the others: {data set: AUC on fold C}; {} for one set.

    A control: film and digital images are told apart without fail, so a task must not be confused with its data set.
    """
    names = sorted(set(train.sets) & set(judge.sets))
    together, draws, found = np.full(len(train.cases), "all"), patient_draws(judge.patients), {}
    for name in names if len(names) > 1 else ():
        answers = (train.sets == name).astype(np.float64)
        (reader,) = fit(train.features[True], answers, together, choice)
        scores = reader(judge.features[True])
        found[name] = Interval(
            **first_with_interval(within_sets_auc(scores, judge.sets == name, ["all"] * len(scores), draws))
        )
    return found


def _count(sets: np.ndarray, answers: np.ndarray) -> dict[str, tuple[int, int]]:
    """{data set: (negative, positive)} of the known answers."""
    known = ~np.isnan(answers)
    return {
        name: (int((answers[sets == name] == 0).sum()), int((answers[sets == name] == 1).sum()))
        for name in dict.fromkeys(sets[known].tolist())
    }
