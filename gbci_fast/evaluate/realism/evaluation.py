"""Realism: can a judge that is trained for it tell painted lesions from real ones? An AUC of 0.5 = it cannot.

Two judges, a small network and gradient boosting on features, learn from the lesions of folds A and B. The painted
lesions lie at the same masks as the real ones. The judges are tested on lesions of other patients. A weak judge would
flatter every model. So the judges are checked: they must tell the stored paintings of a known model (`StoredPaintings`)
from real lesions, and they must not tell real lesions from real ones.
"""

import importlib.metadata
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from gbci_fast.evaluate.lesions import LesionCase, OnProgress, read_split, read_training, refuse_shared
from gbci_fast.evaluate.metrics import LEVEL, RESAMPLES
from gbci_fast.evaluate.painting import paint, reconstruct
from gbci_fast.evaluate.realism.boosting import SETTINGS, check_boosting
from gbci_fast.evaluate.realism.judging import (
    ALL,
    AUTOENCODER,
    BOOSTING,
    CHOICES,
    HALVINGS,
    NETWORK,
    PAINTED,
    POOLED,
    REAL,
    Side,
    compare,
)
from gbci_fast.evaluate.realism.keeping import Kept
from gbci_fast.evaluate.realism.network import WINDOW
from gbci_fast.evaluate.realism.paintings import Filling, StoredPaintings, key_of, save_paintings, under_masks
from gbci_fast.evaluate.realism.regions import ERODED, Place
from gbci_fast.evaluate.report import target, versions
from gbci_fast.evaluate.settings import RealismSettings
from gbci_fast.model.pipeline import PIXEL_FEATHER, GBCIPipeline

CHUNK = 8  # batches that are reconstructed between two reports of progress
LEAST = {(REAL, PAINTED): {NETWORK: 0.88, BOOSTING: 0.93}, (REAL, AUTOENCODER): {NETWORK: 0.95, BOOSTING: 0.95}}
"""The AUC that a judge must reach on the stored paintings; an outside evaluation of these paintings, on other lesions,
reached 0.90 by a small network, 0.96 by boosting, and 0.98 on the autoencoder."""
OFF_CHANCE = 0.05  # largest distance from 0.5 of real against real
NOTES = {
    "auc": "the probability that the judge ranks two lesions of the two sets rightly; 0.5: it cannot tell them apart",
    "real against real": "the patients' real lesions in two random halves, in training and test; the mean over "
    f"{HALVINGS} halvings, each with half as many lesions",
    "regions": f"whole: lesion and surroundings; interior: the mask without {ERODED} pixels, the rest flat; ring: the "
    "rest, the interior flat",
    "network": f"windows of {WINDOW} model pixels, never resampled, and the mask; 8 mirrorings and turns",
    "boosting": "features at the model's own pixels; without finest: all of them measured after a blur of one pixel",
    "minutes": "of this run, by the clock and of all cores together; what an earlier run has kept takes none",
    "outside of the mask": "painted and reconstructed images equal the original",
}


def evaluate_realism(
    roots: Sequence[Path],
    pipe: GBCIPipeline,
    settings: RealismSettings,
    *,
    weights: str,
    painted: Path,
    runs: Path,
    stored: StoredPaintings | None = None,
    save: Path | None = None,
    on_progress: OnProgress = lambda stage, done, total: None,
) -> dict[str, Any]:
    """Reads, paints, trains and tests the judges; returns the report, as JSON values.

    Args:
        roots: folders in the VinDr layout.
        pipe, weights: as for `paint`.
        settings: of the evaluation.
        painted: folder of the painted batches, as `folder` of `paint`.
        runs: folder of reconstructions, features and scores; those that are there are not computed again.
        stored: paintings to judge instead of painting: the self-check of the judges.
        save: file that gets the paintings, see `save_paintings`.
        on_progress: called as ``f(stage, done, total)``.

    Raises:
        GBCIError: scikit-learn is missing, there are no lesions to train on or to judge, a patient is on both sides, or
            `stored` lacks a lesion.
    """
    check_boosting()
    clock, kept = _Clock(), Kept(runs)
    with clock.stage("reading"):
        cases = _read(roots, settings, on_progress)
    with clock.stage("painting"):
        fillings = _paint(pipe, cases, settings, weights, painted, stored, on_progress)
    if save is not None:
        every = [case for side in cases.values() for case in side]
        pixels = [one for side in fillings.values() for one in side[PAINTED]]
        save_paintings(save, every, pixels, weights=weights, painting=settings.painting)
    if stored is None or stored.weights == weights:
        with clock.stage("reconstructing"):
            for name, side in cases.items():
                fillings[name][AUTOENCODER] = _reconstruct(pipe, side, settings, weights, kept, on_progress, name)
    train, test = (
        Side(cases=side, places=[Place.of(case) for case in side], fillings=fillings[name])
        for name, side in cases.items()
    )
    with clock.stage("judging"):
        results = compare(train, test, settings, kept, on_progress)
    checks = self_checks(results, stored, weights)
    return {
        "evaluation": "realism",
        "settings": asdict(settings) | ({"painting": stored.painting} if stored else {}),
        "versions": versions() | {"scikit-learn": importlib.metadata.version("scikit-learn")},
        "weights": stored.weights if stored else weights,
        "paintings": stored.path.name if stored else None,
        "trained_on": "folds A and B of the training split",
        "judged_on": "the test split" if settings.split == "test" else "fold C of the training split",
        "interval": f"{LEVEL:.0%}: test patients drawn with replacement, {RESAMPLES} times",
        "notes": NOTES,
        "boosting": SETTINGS,
        "features": {name: list(groups) for name, groups in CHOICES.items()},
        "sets": {name: _counts(side) for name, side in cases.items()},
        "results": results,
        "self_checks": checks,
        "targets": build_targets(results, checks),
        "minutes": clock.minutes,
    }


def find_auc(results: Sequence[dict[str, Any]], judge: str, first: str, second: str) -> dict[str, Any] | None:
    """The pooled AUC of a judge on a pair, whole, with all features; None if the pair was not compared."""
    wanted = {"judge": judge, "first": first, "second": second, "region": "whole", "features": ALL}
    return next((row["auc"][POOLED] for row in results if wanted.items() <= row.items()), None)


def self_checks(
    results: Sequence[dict[str, Any]], stored: StoredPaintings | None, weights: str
) -> dict[str, dict[str, Any]]:
    """{judge: whether it `passed`, and its `checks`}; None where a check was not possible.

    A judge that fails tells nothing about any model.
    """
    found = {}
    for judge in (NETWORK, BOOSTING):
        null = (find_auc(results, judge, REAL, REAL) or {"value": None})["value"]
        checks = [
            {"pair": f"{REAL}/{REAL}", "value": null, "low": 0.5 - OFF_CHANCE, "high": 0.5 + OFF_CHANCE, "note": ""}
        ]
        for (first, second), least in LEAST.items():
            auc = find_auc(results, judge, first, second) if stored else None
            note = "" if auc else _why_unchecked(stored, weights)
            value = auc["value"] if auc else None
            checks.append({"pair": f"{first}/{second}", "value": value, "low": least[judge], "high": 1.0, "note": note})
        for check in checks:
            value = check["value"]
            check["passed"] = None if value is None else check["low"] <= value <= check["high"]
        passed = [check["passed"] for check in checks]
        found[judge] = {"passed": False if False in passed else None if None in passed else True, "checks": checks}
    return found


def build_targets(results: Sequence[dict[str, Any]], checks: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Per judge: its self-checks, and real against painted beside the largest AUC that chance would give."""
    targets = []
    for judge, found in checks.items():
        for check in found["checks"]:
            if check["pair"] == f"{REAL}/{REAL}":
                value = None if check["value"] is None else abs(check["value"] - 0.5)
                name = f"self-check of the {judge}: {check['pair']}, distance from chance"
                targets.append(target(name, value, OFF_CHANCE, at_least=False, note=check["note"]))
            else:
                name = f"self-check of the {judge}: {check['pair']}"
                targets.append(target(name, check["value"], check["low"], at_least=True, note=check["note"]))
        painted, null = (find_auc(results, judge, REAL, other) for other in (PAINTED, REAL))
        if painted and null and null["high"] is not None:
            note = "bound: upper end of the interval of real against real"
            name = f"{judge}: painted told from real"
            targets.append(target(name, painted["value"], max(null["high"], 0.5), at_least=False, note=note))
    return targets


def _why_unchecked(stored: StoredPaintings | None, weights: str) -> str:
    if stored is None:
        return "not checked here: the check needs the stored paintings of a known model (--paintings)"
    return f"the paintings are by weights {stored.weights[:12]}, the autoencoder is of {weights[:12]}"


class _Clock:
    """The minutes that stages took: by the clock, and of all processor cores together."""

    def __init__(self) -> None:
        self.minutes: dict[str, dict[str, float]] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        start, used = time.monotonic(), time.process_time()
        yield
        elapsed = {"clock": time.monotonic() - start, "cores": time.process_time() - used}
        self.minutes[name] = {kind: round(seconds / 60, 2) for kind, seconds in elapsed.items()}


def _read(roots: Sequence[Path], settings: RealismSettings, on_progress: OnProgress) -> dict[str, list[LesionCase]]:
    """The lesions to train on and those to judge."""

    def naming(name: str) -> OnProgress:
        return lambda stage, done, total: on_progress(f"{stage} {name}", done, total)

    limit, seed = settings.limit, settings.seed
    found = {
        "training": read_training(roots, limit=limit, seed=seed, on_progress=naming("training")),
        "judged": read_split(roots, settings.split, limit=limit, seed=seed, on_progress=naming("judged")),
    }
    refuse_shared(found["training"], found["judged"])
    return found


def _paint(
    pipe: GBCIPipeline,
    cases: dict[str, list[LesionCase]],
    settings: RealismSettings,
    weights: str,
    folder: Path,
    stored: StoredPaintings | None,
    on_progress: OnProgress,
) -> dict[str, dict[str, Filling]]:
    """{side: {"real" and "painted": pixels under the masks}}."""
    found = {}
    for name, side in cases.items():
        if stored is not None:
            painted = stored.of(side)
        else:
            stage = f"painting {name}"
            images = paint(
                pipe, side, settings.painting, weights=weights, folder=folder, stage=stage, on_progress=on_progress
            )
            painted = under_masks(side, images)
        found[name] = {REAL: [case.image[case.mask] for case in side], PAINTED: painted}
    return found


def _reconstruct(
    pipe: GBCIPipeline,
    cases: Sequence[LesionCase],
    settings: RealismSettings,
    weights: str,
    kept: Kept,
    on_progress: OnProgress,
    name: str,
) -> Filling:
    """The autoencoder's reconstruction under the masks."""
    found: Filling = []
    painting = settings.painting
    size = painting.batch_size
    for start in range(0, len(cases), CHUNK * size):
        part = cases[start : start + CHUNK * size]
        key = ["autoencoder", PIXEL_FEATHER, weights, painting.tier, painting.runtime, size]
        key.append([key_of(case) for case in part])
        pixels = kept.get(
            key, lambda part=part: {"pixels": np.concatenate(under_masks(part, reconstruct(pipe, part, size)))}
        )
        found += np.split(pixels["pixels"], np.cumsum([case.mask.sum() for case in part])[:-1])
        on_progress(f"reconstructing {name}", len(found), len(cases))
    return found


def _counts(cases: Sequence[LesionCase]) -> dict[str, dict[str, int]]:
    roots = dict.fromkeys(case.root for case in cases)
    groups = {POOLED: cases} | {root: [case for case in cases if case.root == root] for root in roots}
    return {
        name: {"lesions": len(group), "patients": len({case.patient for case in group})}
        for name, group in groups.items()
    }
