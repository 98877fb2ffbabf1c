"""Copies of training lesions: is a synthetic crop nearer to a training crop than real held-out crops are?

Real test lesions are the reference. Their patients are in no training image, so their distances to the nearest training
crops are those of new lesions. The threshold is an order statistic of these distances. Under exchangeability the number
of synthetic crops below it has a beta-binomial distribution, whatever the distribution of the distances (Nelson's
precedence test, 1963). A binomial would take the threshold as exact, which it is not for about a hundred lesions.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats
from scipy.ndimage import gaussian_filter
from scipy.spatial.distance import cdist

from gbci_fast.errors import GBCIError
from gbci_fast.evaluate.features import Extractor
from gbci_fast.evaluate.lesions import Crops, LesionCase, OnProgress, crop_lesions, read_painted
from gbci_fast.evaluate.memorisation.neighbors import Nearest, TrainingIndex, index_digest
from gbci_fast.evaluate.metrics import interval, numbered, resample
from gbci_fast.evaluate.report import target, versions
from gbci_fast.evaluate.settings import MemorisationSettings

NUM_CONTROLS = 48  # training crops that are turned into known copies
CONTROL_SHIFT, CONTROL_GAIN, CONTROL_NOISE = (2, -3), 0.7, 0.1  # crop pixels; factor; lesion's standard deviations
CHUNK = 16  # crops between two progress reports


@dataclass(frozen=True, kw_only=True, eq=False)
class Lesions:
    """The crops and names of N lesions.

    Attributes:
        crops: around the lesions.
        names: ``<root>/<image id>-<number>``.
        image_ids: of the lesions' images; for synthetic lesions, of the images that they were painted into.
    """

    crops: Crops
    names: tuple[str, ...]
    image_ids: tuple[str, ...]

    @classmethod
    def of(cls, cases: Sequence[LesionCase], images: Sequence[np.ndarray] | None = None) -> "Lesions":
        """The lesions of `cases`, in their own images or in `images` (float32 [S, S] in [0, 1], one per case)."""
        return cls(
            crops=crop_lesions(cases, images),
            names=tuple(f"{case.root}/{case.name}" for case in cases),
            image_ids=tuple(case.image_id for case in cases),
        )

    def __len__(self) -> int:
        return len(self.names)


@dataclass(frozen=True, kw_only=True, eq=False)
class NearestTraining:
    """What the figure and the gate need besides the report.

    Attributes:
        index, threshold: for `neighbors.save_index`.
        real, synthetic: the nearest training crops of real and synthetic crops, in pixel space.
    """

    index: TrainingIndex
    threshold: float
    real: Nearest
    synthetic: Nearest


def read_synthetic(
    root: Path, limit: int | None = None, on_progress: OnProgress = lambda stage, done, total: None
) -> Lesions:
    """The painted lesions of an output of `gbci-fast generate`, without the templates' own lesions.

    Raises:
        GBCIError: `root` is another kind of data set, or has no painted lesion.
    """
    painted, templates = read_painted(root, limit=limit, on_progress=on_progress)
    found = Lesions.of(painted)
    return Lesions(crops=found.crops, names=found.names, image_ids=templates)


def evaluate_memorisation(
    training: Lesions,
    real: Lesions,
    synthetic: Lesions,
    extractor: Extractor,
    settings: MemorisationSettings,
    *,
    source: dict[str, Any],
    repainted: bool,
    on_progress: OnProgress = lambda stage, done, total: None,
) -> tuple[dict[str, Any], NearestTraining]:
    """The report (JSON values), and the data for the figure and the gate.

    Args:
        training, real: lesions of the training and of the test split.
        synthetic: lesions to judge. Training lesions in the image that a lesion was painted into do not count for it.
        extractor: of the features for the second space.
        settings: of the evaluation.
        source: how the synthetic lesions were made, for the report.
        repainted: the synthetic lesions are the real ones, erased and painted again, in the same order.
        on_progress: called as ``f(stage, done, total)``.

    Raises:
        GBCIError: an image is in both splits.
    """
    if shared := sorted(set(training.image_ids) & set(real.image_ids)):
        raise GBCIError(f"image {shared[0]} is in the training and in the test split; expected disjoint splits")
    index = TrainingIndex.of(training.crops, training.names, training.image_ids)
    pixel = [
        _nearest(index, lesions, lambda done, total, stage=stage: on_progress(stage, done, total))
        for stage, lesions in (("real crops", real), ("synthetic crops", synthetic))
    ]
    feature = _nearest_features(extractor, training, real, synthetic, on_progress)
    spaces = {
        name: compare(
            [found.distances for found in nearest],
            [lesions.crops.patients for lesions in (real, synthetic)],
            settings,
        )
        for name, nearest in (("pixel", pixel), ("feature", feature))
    }
    threshold = spaces["pixel"]["threshold"]
    report = {
        "evaluation": "memorisation",
        "settings": asdict(settings),
        "source": source,
        "versions": versions(),
        "extractor": {"name": extractor.name, "digest": extractor.digest},
        "index_digest": index_digest(index, threshold),
        "counts": {
            name: {"lesions": len(lesions), "patients": len(set(lesions.crops.patients))}
            for name, lesions in (("training", training), ("real", real), ("synthetic", synthetic))
        },
        "spaces": spaces,
        "control": _control(index, training, threshold, settings.seed),
        "repainted": _repainted(real, synthetic) if repainted else None,
        "suspects": _suspects(training, synthetic, pixel[1], feature[1], threshold),
        "crops": [
            {"name": name, "distance": float(distance), "neighbor": training.names[row]}
            for name, distance, row in zip(synthetic.names, pixel[1].distances, pixel[1].rows, strict=True)
        ],
        "targets": [_target(spaces["pixel"])],
    }
    return report, NearestTraining(index=index, threshold=threshold, real=pixel[0], synthetic=pixel[1])


def compare(
    distances: Sequence[np.ndarray], patients: Sequence[Sequence[str]], settings: MemorisationSettings
) -> dict[str, Any]:
    """Compares the nearest-neighbor distances of real and synthetic crops in one space.

    The threshold is the k-th smallest of m real distances, k = max(1, floor(quantile (m + 1))). On average, the share
    ``k / (m + 1)`` of new lesions lies below it.

    Args:
        distances: of the real crops and of the synthetic crops to their nearest training crops.
        patients: of the real crops and of the synthetic crops.
        settings: quantile and seed.

    Returns:
        ``threshold``, ``below`` (number of synthetic crops below it); under exchangeability, ``expected``, ``allowed``
        (97.5 % quantile) and ``p`` (of as many or more); medians, their ratio, and its interval over patients.
    """
    real, synthetic = distances
    k = max(1, int(settings.quantile * (len(real) + 1)))
    threshold = float(np.sort(real)[k - 1])
    below = int((synthetic < threshold).sum())
    null = stats.betabinom(len(synthetic), k, len(real) + 1 - k)
    medians = float(np.median(real)), float(np.median(synthetic))
    ratio = _ratio_interval(distances, patients, settings.seed)
    return {
        "threshold": threshold,
        "expected_share": k / (len(real) + 1),
        "below": below,
        "expected": float(null.mean()),
        "allowed": int(null.ppf(0.975)),
        "p": float(null.sf(below - 1)),
        "median_real": medians[0],
        "median_synthetic": medians[1],
        "ratio": medians[1] / medians[0] if medians[0] else None,
        "ratio_low": ratio["low"],
        "ratio_high": ratio["high"],
        "distances_real": [float(value) for value in real],
        "distances_synthetic": [float(value) for value in synthetic],
    }


def _ratio_interval(
    distances: Sequence[np.ndarray], patients: Sequence[Sequence[str]], seed: int
) -> dict[str, float | None]:
    """The bootstrap interval of the ratio of medians (synthetic / real) over patients; None for a single patient.

    A patient with crops in both groups is drawn for both.
    """
    if min(len(set(group)) for group in patients) < 2:
        return interval(np.empty(0))
    owners = numbered([*patients[0], *patients[1]])
    draws = resample(owners.max() + 1, np.random.default_rng(seed))
    medians = []
    for values, owner in zip(distances, np.split(owners, [len(patients[0])]), strict=True):
        order = np.argsort(values)
        weights = draws[:, owner[order]].cumsum(1)
        middle = (weights < weights[:, -1:] / 2).sum(1)
        medians.append(np.where(weights[:, -1] > 0, values[order][np.minimum(middle, len(values) - 1)], np.nan))
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = medians[1] / medians[0]
    return interval(ratios[np.isfinite(ratios)])


def _nearest(index: TrainingIndex, lesions: Lesions, on_done: Callable[[int, int], None]) -> Nearest:
    parts = []
    for start in range(0, len(lesions), CHUNK):
        rows = slice(start, start + CHUNK)
        parts.append(index.nearest(lesions.crops[rows], lesions.image_ids[rows]))
        on_done(min(start + CHUNK, len(lesions)), len(lesions))
    return Nearest(
        distances=np.concatenate([part.distances for part in parts]),
        rows=np.concatenate([part.rows for part in parts]),
        moves=np.concatenate([part.moves for part in parts]),
    )


def _nearest_features(
    extractor: Extractor, training: Lesions, real: Lesions, synthetic: Lesions, on_progress: OnProgress
) -> list[Nearest]:
    """The nearest training lesions of real and synthetic ones by Euclidean distance in feature space.

    Features are standardized by the training lesions.
    """
    groups = (training, real, synthetic)
    features = []
    for i, lesions in enumerate(groups):
        features.append(extractor(lesions.crops))
        on_progress("features", i + 1, len(groups))
    center, spread = features[0].mean(0), features[0].std(0)
    reference, *others = [(part - center) / np.where(spread > 0, spread, 1) for part in features]
    found = []
    for lesions, part in zip(groups[1:], others, strict=True):
        distances = cdist(part, reference)
        distances[np.array(lesions.image_ids)[:, None] == np.array(training.image_ids)] = np.inf
        rows = distances.argmin(1)
        found.append(Nearest(distances=distances.min(1), rows=rows, moves=np.zeros_like(rows)))
    return found


def _control(index: TrainingIndex, training: Lesions, threshold: float, seed: int) -> dict[str, Any]:
    """The share of known copies that the threshold finds.

    The copies are training crops that are mirrored, shifted, darkened, blurred and noisy. Blur and noise exceed the
    losses of this project's autoencoder.
    """
    rng = np.random.default_rng(seed)
    rows = np.unique(np.linspace(0, len(training) - 1, NUM_CONTROLS).astype(int))
    picked = training.crops[rows]
    grain = gaussian_filter(rng.standard_normal(picked.pixels.shape), (0, 1, 1))
    inside = [pixels[mask].std() for pixels, mask in zip(picked.pixels, picked.masks, strict=True)]
    noise = CONTROL_NOISE * np.array(inside)[:, None, None] * grain / grain.std()
    copied = CONTROL_GAIN * (gaussian_filter(picked.pixels, (0, 1, 1)) + noise)
    copies = Crops(
        pixels=np.clip(np.roll(copied, CONTROL_SHIFT, (1, 2))[:, :, ::-1], 0, 1).astype(np.float32),
        masks=np.roll(picked.masks, CONTROL_SHIFT, (1, 2))[:, :, ::-1],
        patients=picked.patients,
    )
    found = index.nearest(copies, [None] * len(copies))
    return {
        "copies": len(copies),
        "found_share": float((found.distances < threshold).mean()),
        "named_share": float((found.rows == rows).mean()),
        "median_distance": float(np.median(found.distances)),
    }


def _repainted(real: Lesions, synthetic: Lesions) -> dict[str, Any]:
    """The distances of painted lesions to the erased lesions in their place; the model sees their surroundings."""
    index = TrainingIndex.of(real.crops, real.names, real.image_ids)
    distances = index.distances(synthetic.crops)
    own = distances.diagonal()
    others = np.where(np.eye(len(own), dtype=bool), np.inf, distances).min(1)
    return {
        "median_distance_to_own": float(np.median(own)),
        "own_is_nearest_share": float((own < others).mean()) if len(own) > 1 else None,
        "chance_share": 1 / len(own),
    }


def _suspects(
    training: Lesions, synthetic: Lesions, pixel: Nearest, feature: Nearest, threshold: float
) -> list[dict[str, Any]]:
    """The synthetic crops below the threshold in pixel space, the nearest first."""
    return [
        {
            "name": synthetic.names[i],
            "neighbor": training.names[pixel.rows[i]],
            "distance": float(pixel.distances[i]),
            "feature_neighbor": training.names[feature.rows[i]],
            "feature_distance": float(feature.distances[i]),
            "same_neighbor": bool(pixel.rows[i] == feature.rows[i]),
        }
        for i in np.argsort(pixel.distances)
        if pixel.distances[i] < threshold
    ]


def _target(space: dict[str, Any]) -> dict[str, Any]:
    note = f"{space['expected']:.1f} expected of new lesions, p = {space['p']:.3g}; bound: the null's 97.5 %"
    name = "crops nearer to a training crop than the threshold"
    return target(name, float(space["below"]), float(space["allowed"]), at_least=False, note=note)
