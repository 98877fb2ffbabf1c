"""Utility: do synthetic lesions train a lesion detector that works on real images of other patients?

A small network classifies patches as lesion or normal. It is trained on real patches, on synthetic ones, or on both,
always with the same number of optimizer steps, and judged on real patches of patients that trained nothing. A synthetic
lesion is a *new* one: another patient's mask, moved into normal tissue and painted from that patient's description. Its
normal counterpart is the same window before painting, so that neither place nor mask distinguishes the two. Only the
masked pixels have passed through the autoencoder. A network that learns the model's traces instead of lesions scores
low on real patches.

Trivial fillings of the same masks train networks of their own. What they reach, too, is no merit of the model.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gbci_fast.errors import GBCIError
from gbci_fast.evaluate.case import spread
from gbci_fast.evaluate.lesions import (
    LesionCase,
    OnProgress,
    pick_painted,
    read_lesions,
    read_split,
    read_training,
    refuse_shared,
)
from gbci_fast.evaluate.metrics import LEVEL, RESAMPLES, interval, numbered, resample, weighted_auc
from gbci_fast.evaluate.painting import blob_on_tissue, blurred_fill, paint, reconstruct, ring_mean_fill
from gbci_fast.evaluate.report import versions
from gbci_fast.evaluate.settings import UtilitySettings
from gbci_fast.evaluate.utility.patch_classifier import (
    RECIPE,
    PatchSet,
    Phase,
    classify,
    fit_patch_classifier,
    flip,
    vary,
)
from gbci_fast.evaluate.utility.patches import (
    PATCH_SIZE,
    Patches,
    lesion_patches,
    moved_lesions,
    normal_patches,
)
from gbci_fast.jobs.files import atomically, real_path
from gbci_fast.model.pipeline import GBCIPipeline

ARMS = {
    "real": "real lesions and normal patches of a share of the training patients; flips",
    "augmented": "as real, with the stronger classical augmentation: flips, rotation by any angle, gain and gamma",
    "real_normal": "as real, with the synthetic set's normal patches and none of its lesions: what those alone bring",
    "real_synthetic": "real and synthetic patches in one pool; flips",
    "real_blob": "real patches and those of the arm blob in one pool; flips",
    "synthetic": "synthetic lesions and their normal patches, nothing else (TSTR); it knows no share of real patients",
    "blob": "as synthetic, with the blurred mask added to the normal tissue, a tenth of the gray scale: no model",
    "blurred": "the real lesions of all training patients, blurred by a pixel under the mask, and real normal patches",
    "autoencoder": "as synthetic, with the autoencoder's reconstruction of the normal tissue: its traces, no lesion",
    "ring_mean": "as synthetic, with the mean of the surroundings under the mask: an outline, no lesion",
}
TRIVIAL = ("blob", "blurred", "autoencoder", "ring_mean")
WITHOUT_FRACTION = ("synthetic", *TRIVIAL)
MEASURES = ("auc", "balanced_accuracy")
REFERENCE = "real"
NUM_EXAMPLES = 8

Examples = dict[str, np.ndarray]
"""{kind ("real lesion", ...): patches, float32 [n, P, P]}."""


@dataclass(frozen=True, kw_only=True, eq=False)
class UtilityData:
    """The patches that the arms are trained on and judged by.

    Attributes:
        real, synthetic: to train on.
        trivial: {arm of `TRIVIAL`: patches}; without "autoencoder" where no pipeline is at hand.
        test: of the judged patients.
    """

    real: PatchSet
    synthetic: PatchSet
    trivial: Mapping[str, PatchSet]
    test: PatchSet

    @property
    def arms(self) -> tuple[str, ...]:
        """The names of `ARMS` for which there are patches."""
        return tuple(arm for arm in ARMS if arm not in TRIVIAL or arm in self.trivial)


@dataclass(frozen=True, kw_only=True)
class Run:
    """One training: its arm, percentage of the real patients (None for an arm without real patches), and seed."""

    arm: str
    fraction: float | None
    seed: int


@dataclass(frozen=True, kw_only=True)
class Painter:
    """What paints the synthetic lesions.

    Attributes:
        pipe, weights: as for `paint`.
        folder: of the painted batches.
    """

    pipe: GBCIPipeline
    weights: str
    folder: Path

    def paint(
        self, cases: Sequence[LesionCase], settings: UtilitySettings, on_progress: OnProgress
    ) -> list[np.ndarray]:
        """float32 [S, S] in [0, 1], one per case."""
        return paint(
            self.pipe, cases, settings.painting, weights=self.weights, folder=self.folder, on_progress=on_progress
        )


def evaluate_utility(
    roots: Sequence[Path],
    source: Painter | Sequence[Path],
    settings: UtilitySettings,
    *,
    runs: Path,
    on_progress: OnProgress = lambda stage, done, total: None,
) -> tuple[dict[str, Any], Examples]:
    """Reads, paints, trains and judges every arm; returns the report and patches for its figure.

    Args:
        roots: folders in the VinDr layout.
        source: of the synthetic lesions: what paints them, or outputs of `gbci-fast generate`.
        settings: of the evaluation.
        runs: folder of the trainings' scores; trainings whose scores are there are not repeated.
        on_progress: called as ``f(stage, done, total)``.

    Raises:
        GBCIError: a split without lesions, a patient who trains and is judged, or images without normal tissue.
    """
    training, test = _read(roots, settings, on_progress)
    moved = moved_lesions(training, settings.synthetic_count, settings.seed, offset=settings.offset)
    real = _real_set(training, settings)
    if isinstance(source, Painter):
        images = source.paint(moved, settings, on_progress)
        synthetic, origin = synthetic_set(moved, images, settings.offset), {"weights": source.weights}
    else:
        synthetic = generated_set(source, test, settings, on_progress)
        origin = {"synthetic": [real_path(root).name for root in source]}
    pipe = source.pipe if isinstance(source, Painter) else None
    trivial = trivial_sets(training, moved, real, settings, pipe)
    data = UtilityData(real=real, synthetic=synthetic, trivial=trivial, test=_real_set(test, settings))
    scores = train_arms(data, settings, folder=runs, on_progress=on_progress)
    counted = {"real": real, "synthetic": synthetic, **trivial, "test": data.test}
    report = {
        "evaluation": "utility",
        "settings": asdict(settings),
        "versions": versions(),
        **origin,
        "roots": [real_path(root).name for root in roots],
        "patch_size": PATCH_SIZE,
        "arms": {arm: ARMS[arm] for arm in data.arms},
        "interval": f"{LEVEL:.0%}: judged patients and seeds drawn with replacement, {RESAMPLES} times",
        "data": {name: _counts(part) for name, part in counted.items()}
        | {"diameter": {"real": _diameters(training), "moved": _diameters(moved), "test": _diameters(test)}},
        "results": summarize(scores, data.test, settings),
        "targets": [],
    }
    return report, _examples(data)


def synthetic_set(moved: Sequence[LesionCase], images: Sequence[np.ndarray], offset: int) -> PatchSet:
    """The painted windows as lesions, and the same windows before painting as normal patches."""
    return PatchSet(lesions=lesion_patches(moved, images, offset=offset), normal=lesion_patches(moved, offset=offset))


def generated_set(
    roots: Sequence[Path], judged: Sequence[LesionCase], settings: UtilitySettings, on_progress: OnProgress
) -> PatchSet:
    """The painted lesions of outputs of `gbci-fast generate`, and normal windows of the same images, as for real ones.

    Up to `settings.synthetic_count` lesions are taken, spread evenly. The normal windows touch neither a painted lesion
    nor one of the template.

    Raises:
        GBCIError: a root is no such output, or the images of a judged patient were painted into.
    """
    painted: list[LesionCase] = []
    everything: list[LesionCase] = []
    for root in roots:
        cases = read_lesions([root], seed=settings.seed, on_progress=on_progress)
        painted += pick_painted(root, cases)[0]
        everything += cases
    ids = {case.patient.removeprefix(f"{case.root}/") for case in judged}
    for case in painted:
        if (patient := case.patient.removeprefix(f"{case.root}/")) in ids:
            raise GBCIError(f"patient {patient} of {case.root} is judged, too; expected templates of other patients")
    painted = list(spread(painted, settings.synthetic_count))
    offset = settings.offset
    return PatchSet(
        lesions=lesion_patches(painted, offset=offset),
        normal=normal_patches(painted, settings.seed, offset=offset, others=everything),
    )


def trivial_sets(
    training: Sequence[LesionCase],
    moved: Sequence[LesionCase],
    real: PatchSet,
    settings: UtilitySettings,
    pipe: GBCIPipeline | None,
) -> dict[str, PatchSet]:
    """The patches of the arms `TRIVIAL`; "autoencoder" only with a pipeline."""
    offset = settings.offset
    filled = {"blob": blob_on_tissue(moved), "ring_mean": ring_mean_fill(moved)}
    if pipe is not None:
        filled["autoencoder"] = reconstruct(pipe, moved, settings.painting.batch_size)
    sets = {name: synthetic_set(moved, images, offset) for name, images in filled.items()}
    blurred = lesion_patches(training, blurred_fill(training), offset=offset)
    return sets | {"blurred": PatchSet(lesions=blurred, normal=real.normal)}


def planned_runs(settings: UtilitySettings, arms: Sequence[str] = tuple(ARMS)) -> list[Run]:
    """All trainings of some arms, seed by seed."""
    return [
        Run(arm=arm, fraction=fraction, seed=settings.seed + i)
        for i in range(settings.seeds)
        for arm in arms
        for fraction in ((None,) if arm in WITHOUT_FRACTION else settings.fractions)
    ]


def train_arms(
    data: UtilityData,
    settings: UtilitySettings,
    *,
    folder: Path,
    on_progress: OnProgress = lambda stage, done, total: None,
) -> dict[Run, np.ndarray]:
    """{training: its logits on the test patches, lesions first, float64 [L + N]}; resumable.

    A training's scores are kept in `folder`, under a digest of everything that decides them.

    Raises:
        GBCIError: a kept file is damaged, or a training diverged.
    """
    plan = planned_runs(settings, data.arms)
    scores: dict[Run, np.ndarray] = {}
    for run in plan:
        phases = phases_of(run, data, settings)
        digest = _digest([*(phase.data for phase in phases), data.test])
        key = json.dumps([asdict(run), settings.train_steps, settings.train_batch, digest, RECIPE, torch.__version__])
        path = folder / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.json"
        if not path.exists():
            model = fit_patch_classifier(phases, seed=run.seed, batch_size=settings.train_batch)
            kept = {"run": asdict(run), "logits": classify(model, data.test.lesions + data.test.normal).tolist()}
            text = json.dumps(kept, allow_nan=False)
            atomically(path, lambda place, text=text: place.write_text(text, encoding="utf-8"))
        scores[run] = _kept_scores(path, len(data.test.lesions) + len(data.test.normal))
        on_progress("training", len(scores), len(plan))
    return scores


def phases_of(run: Run, data: UtilityData, settings: UtilitySettings) -> list[Phase]:
    """The phases of a training; their steps add up to `train_steps` in every arm."""
    steps = settings.train_steps
    if run.fraction is None:
        alone = data.synthetic if run.arm == "synthetic" else data.trivial[run.arm]
        return [Phase(data=alone, steps=steps, augment=flip)]
    real = share_of_patients(data.real, run.fraction, run.seed)
    if run.arm == "augmented":
        return [Phase(data=real, steps=steps, augment=vary)]
    pools = {
        "real": real,
        "real_normal": PatchSet(lesions=real.lesions, normal=real.normal + data.synthetic.normal),
        "real_synthetic": real + data.synthetic,
        "real_blob": real + data.trivial["blob"],
    }
    return [Phase(data=pools[run.arm], steps=steps, augment=flip)]


def share_of_patients(real: PatchSet, percent: float, seed: int) -> PatchSet:
    """The patches of a random share of the patients; for one seed, a larger share includes the smaller ones."""
    patients = sorted({*real.lesions.patients, *real.normal.patients})
    count = max(1, round(percent / 100 * len(patients)))
    chosen = {patients[i] for i in np.random.default_rng(seed).permutation(len(patients))[:count]}
    return PatchSet(lesions=real.lesions.of_patients(chosen), normal=real.normal.of_patients(chosen))


def summarize(scores: dict[Run, np.ndarray], test: PatchSet, settings: UtilitySettings) -> list[dict[str, Any]]:
    """One row per arm and fraction: mean over seeds, interval, and the difference to `REFERENCE`, paired by seed.

    The interval is a bootstrap over test patients (with all of their patches) and seeds. The resamples are the same for
    every arm. The interval is None for a single patient, the standard deviation None for a single seed.
    """
    draws, seed_draws = _draws(test, settings)
    measured = {run: _measure(logits, test, draws) for run, logits in scores.items()}
    rows = []
    for arm in dict.fromkeys(run.arm for run in scores):
        for fraction in (None,) if arm in WITHOUT_FRACTION else settings.fractions:
            runs = [run for run in scores if (run.arm, run.fraction) == (arm, fraction)]
            row: dict[str, Any] = {"arm": arm, "fraction": fraction}
            for i, measure in enumerate(MEASURES):
                values = np.stack([measured[run][i] for run in runs])
                row[measure] = _summary(values, seed_draws)
            row["auc_difference"] = None
            if arm != REFERENCE and fraction is not None:
                partners = [Run(arm=REFERENCE, fraction=fraction, seed=run.seed) for run in runs]
                pairs = zip(runs, partners, strict=True)
                row["auc_difference"] = _summary(
                    np.stack([measured[run][0] - measured[partner][0] for run, partner in pairs]), seed_draws
                )
            rows.append(row)
    return rows


def _draws(test: PatchSet, settings: UtilitySettings) -> tuple[np.ndarray, np.ndarray]:
    """How often each resample draws each test patch, [1 + B, L + N], and each seed, [B, S].

    Row 0 of the first array is no resample: all patches count once.
    """
    owners = numbered(test.lesions.patients + test.normal.patients)
    count, rng = owners.max() + 1, np.random.default_rng(settings.seed)
    weights = np.concatenate([np.ones((1, count), int), resample(count, rng, RESAMPLES if count > 1 else 0)])
    seeds = resample(settings.seeds, rng, len(weights) - 1)
    return weights[:, owners].astype(np.float64), seeds


def _measure(logits: np.ndarray, test: PatchSet, draws: np.ndarray) -> np.ndarray:
    """AUC and balanced accuracy (at logit 0) under every row of weights, [2, 1 + B]; NaN where a class is missing."""
    count = len(test.lesions)
    lesions, normal = logits[:count], logits[count:]
    of_lesions, of_normal = draws[:, :count], draws[:, count:]
    with np.errstate(invalid="ignore"):
        auc = weighted_auc(lesions, normal, of_lesions, of_normal)
        sensitivity = of_lesions @ (lesions > 0) / of_lesions.sum(1)
        specificity = of_normal @ (normal <= 0) / of_normal.sum(1)
    return np.stack([auc, (sensitivity + specificity) / 2])


def _summary(values: np.ndarray, seed_draws: np.ndarray) -> dict[str, Any]:
    """Mean, interval and spread of the figures of all seeds under all resamples, [S, 1 + B]."""
    own = values[:, 0]
    resampled = (seed_draws * values[:, 1:].T).sum(1) / len(values)
    return {
        "mean": float(own.mean()),
        **interval(resampled[np.isfinite(resampled)]),
        "seed_sd": float(own.std(ddof=1)) if len(own) > 1 else None,
        "by_seed": own.tolist(),
    }


def _read(
    roots: Sequence[Path], settings: UtilitySettings, on_progress: OnProgress
) -> tuple[list[LesionCase], list[LesionCase]]:
    """The lesions to train on, and those to judge by."""

    def named(what: str) -> OnProgress:
        return lambda stage, done, total: on_progress(f"{stage} {what}", done, total)

    training = read_training(roots, limit=settings.limit, seed=settings.seed, on_progress=named("training"))
    judged = read_split(roots, settings.split, limit=settings.limit, seed=settings.seed, on_progress=named("test"))
    refuse_shared(training, judged)
    return training, judged


def _real_set(cases: Sequence[LesionCase], settings: UtilitySettings) -> PatchSet:
    offset = settings.offset
    return PatchSet(
        lesions=lesion_patches(cases, offset=offset), normal=normal_patches(cases, settings.seed, offset=offset)
    )


def _digest(sets: Sequence[PatchSet]) -> str:
    digest = hashlib.sha256()
    for part in sets:
        for kind in (part.lesions, part.normal):
            digest.update(json.dumps([kind.patients, kind.pixels.shape]).encode())
            digest.update(np.ascontiguousarray(kind.pixels).tobytes())
    return digest.hexdigest()


def _kept_scores(path: Path, count: int) -> np.ndarray:
    try:
        logits = np.array(json.loads(path.read_text(encoding="utf-8"))["logits"], np.float64)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise GBCIError(f"{path} cannot be read as the scores of a training; remove it to train again") from error
    if logits.shape != (count,):
        raise GBCIError(f"{path} holds scores of shape {logits.shape}; expected {count}; remove it to train again")
    return logits


def _counts(part: PatchSet) -> dict[str, int]:
    return {
        "lesions": len(part.lesions),
        "normal": len(part.normal),
        "patients": len({*part.lesions.patients, *part.normal.patients}),
    }


def _diameters(cases: Sequence[LesionCase]) -> dict[str, float]:
    """Quartiles of the lesions' diameters in model pixels."""
    low, median, high = np.quantile([case.diameter for case in cases], (0.25, 0.5, 0.75))
    return {"low": float(low), "median": float(median), "high": float(high)}


def _examples(data: UtilityData) -> Examples:
    """Patches of each kind, spread evenly; most trivial lesions are in the windows of the painted ones."""

    def some(kind: Patches) -> np.ndarray:
        return kind.pixels[list(spread(range(len(kind)), NUM_EXAMPLES))]

    return {
        "real lesion": some(data.real.lesions),
        "real normal": some(data.real.normal),
        "before painting": some(data.synthetic.normal),
        "synthetic lesion": some(data.synthetic.lesions),
    } | {name: some(part.lesions) for name, part in data.trivial.items()}
