"""Compares the distribution of synthetic lesions with that of real ones; the null is one half of the real lesions
against the other.

Distances of small sets are not zero even for equal distributions, and fall with the number of items. So every distance
is measured between two halves of the patients, which are disjoint and of equal size. Real half A against real half B is
the null; a column's half A against the same real half B is the column's value. Random halvings (100 by default) give
the spread of both.

Film and digital images differ so much that a set of both has a wide null, behind which a difference on film hides. So
every data set is judged apart, and then all together.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from gbci_fast.errors import GBCIError
from gbci_fast.evaluate.detail import CUTOFF, SEAM, fine_power
from gbci_fast.evaluate.distribution.appearance import BAND, FLANK, ms_ssim, seams, spectrum, spectrum_slopes
from gbci_fast.evaluate.distribution.distances import KernelPairs, NeighborPairs, frechet_distance
from gbci_fast.evaluate.features import Extractor
from gbci_fast.evaluate.lesions import NATIVE_SIZE, Crops, LesionCase, OnProgress
from gbci_fast.evaluate.metrics import QUANTILES, interval, patient_summary, resample
from gbci_fast.evaluate.report import target, versions
from gbci_fast.evaluate.settings import DistributionSettings

REAL = "real"
POOLED = "pooled"  # the block of all data sets together
NEIGHBOR_STATISTICS = ("precision", "recall", "density", "coverage")
FEWEST_JUDGED = 20  # patients that a set needs for its targets to be judged
FRECHET_BOUND, SLOPE_BOUND, POWER_BOUND = 1.5, 0.2, 1.5
APPEARANCE: dict[str, Callable[[Crops], np.ndarray]] = {
    "spectrum_slope": spectrum_slopes,
    "fine_power": fine_power,
    "seam": seams,
}
"""{name: function of crops to one number per crop}."""

Measure = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""Maps weights of a set's items, [R, N], and of the real items, [R, M], to R values."""


def evaluate_blocks(
    blocks: Mapping[str, Mapping[str, Crops]],
    extractors: Sequence[Extractor],
    settings: DistributionSettings,
    *,
    judged: str,
    on_progress: OnProgress = lambda stage, done, total: None,
) -> dict[str, Any]:
    """The report of several blocks, such as one per data set and all pooled; the caller adds how lesions were painted.

    A block with too few patients is left out, and named in ``left_out`` with the reason.

    Args:
        blocks: {name of the block: {name of the set: crops}}; each has the set `REAL`.
        extractors, settings, judged, on_progress: as for `evaluate_distribution`.

    Raises:
        GBCIError: all blocks have too few patients.
    """
    found, left_out = {}, {}
    for name, sets in blocks.items():
        columns = {column: crops for column, crops in sets.items() if column != REAL}
        try:
            for column, crops in sets.items():
                check_patients(f"{name} {column}", crops.patients, settings.neighbors)
        except GBCIError as error:
            left_out[name] = str(error)
            continue
        found[name] = evaluate_distribution(
            sets[REAL], columns, extractors, settings, judged=judged, on_progress=_prefixed(name, on_progress)
        )
    if not found:
        raise GBCIError(next(iter(left_out.values())))
    return {
        "evaluation": "distribution",
        "settings": asdict(settings),
        "versions": versions(),
        "notes": NOTES,
        "judged": judged,
        "blocks": found,
        "left_out": left_out,
        "targets": [
            row | {"name": f"{name}: {row['name']}"}
            for name, block in found.items()
            for row in block["targets"][judged]
        ],
    }


def _prefixed(name: str, on_progress: OnProgress) -> OnProgress:
    return lambda stage, done, total: on_progress(f"{stage} {name}", done, total)


def evaluate_distribution(
    real: Crops,
    columns: Mapping[str, Crops],
    extractors: Sequence[Extractor],
    settings: DistributionSettings,
    *,
    judged: str,
    on_progress: OnProgress = lambda stage, done, total: None,
) -> dict[str, Any]:
    """The columns' crops against the real ones, as JSON values: one block of the report.

    Args:
        real: crops of real lesions.
        columns: {name: crops}. Crops of one patient are never compared with each other, even across sets.
        extractors: of the features to compare.
        settings: of the evaluation.
        judged: name of the column whose targets come first.
        on_progress: called as ``f(stage, done, total)``.

    Raises:
        GBCIError: too few patients.
    """
    sets = {REAL: real, **columns}
    for name, crops in sets.items():
        check_patients(name, crops.patients, settings.neighbors)
    halvings = Halvings.of(sets, settings)
    steps, report = len(extractors) + 1, []
    for done, extractor in enumerate(extractors):
        on_progress("comparing", done, steps)
        report.append(_compare_features(extractor, sets, halvings, settings))
    on_progress("comparing", steps - 1, steps)
    diversity = _compare_diversity(sets, halvings, settings)
    appearance = {
        key: _compare_values({name: measure(x) for name, x in sets.items()}, sets, halvings)
        for key, measure in APPEARANCE.items()
    }
    on_progress("comparing", steps, steps)
    return {
        "sets": {name: {"crops": len(x), "patients": len(set(x.patients))} for name, x in sets.items()},
        "halves": {"crops_left": _spread(halvings.left[REAL].sum(1)), "crops_right": _spread(halvings.right.sum(1))},
        "extractors": report,
        "diversity": diversity,
        "appearance": appearance,
        "spectra": _mean_spectra(sets),
        "targets": {name: _targets(name, report, appearance, sets) for name in (judged, *columns)},
    }


NOTES = {
    "splits": "left is one half of the patients of the named set, right the other half of the real patients; of the "
    "left halves as many crops are drawn as the smallest has; the null is the real left half against the right one",
    "standardized": "each feature less the mean of all real crops, over their standard deviation",
    "gaussian": "false: the features are more than the crops, so that no Gaussian can be fitted and every crop is far "
    "from every other one; such sets are compared by the kernel distance alone",
    "frechet": "full: all crops; its resamples are biased upward and moved so that their mean is the value, floored at "
    "0: an interval of the distance at this number of crops, not of the distance without noise",
    "kernel": "unbiased squared maximum mean discrepancy, cubic kernel; pairs of one patient are left out",
    "neighbors": "pairs of one patient are left out; intervals resample the patients, and keep the manifolds",
    "diversity": "mean MS-SSIM (three scales) of random pairs of crops of two patients, less that of the real crops; "
    "above 0: less diverse than real",
    "spectrum_slope": f"of log power over log frequency, {BAND[0] / NATIVE_SIZE:.2f} to {BAND[1] / NATIVE_SIZE:g} "
    f"cycles per model pixel, in the {NATIVE_SIZE} model pixels in the lesion's middle, Hann window",
    "fine_power": f"log of the power beyond {CUTOFF:g} cycles per model pixel along either axis, more than {SEAM} "
    "pixels inside the mask; the ratio to the real lesions is of geometric means",
    "seam": "log of the mean absolute difference across the mask's outline over that of pixels "
    f"{FLANK[0]:g} to {FLANK[1]:g} crop pixels beside it; 0: the outline does not show",
}


@dataclass(frozen=True, kw_only=True, eq=False)
class Halvings:
    """The crops in every halving and every resample, the same for all measures.

    Attributes:
        left: {name of a set: bool [S, N]}, half A of its patients, thinned to equal numbers of crops.
        right: bool [S, N], half B of the real crops.
        draws: {name of a set: int64 [R, N]}, how often each crop is in a resample of the patients.
    """

    left: dict[str, np.ndarray]
    right: np.ndarray
    draws: dict[str, np.ndarray]

    @classmethod
    def of(cls, sets: Mapping[str, Crops], settings: DistributionSettings) -> "Halvings":
        """Halves and resamples the patients within strata (patients of the same sets), so that set sizes are kept.

        A patient is in the same half, and equally often in a resample, in every set.
        """
        rng = np.random.default_rng(settings.seed)
        members = {name: set(crops.patients) for name, crops in sets.items()}
        patients = sorted(set.union(*members.values()))
        rows = {patient: i for i, patient in enumerate(patients)}
        strata: dict[tuple[bool, ...], list[int]] = {}
        for patient in patients:
            strata.setdefault(tuple(patient in who for who in members.values()), []).append(rows[patient])
        halves = np.zeros((settings.splits, len(patients)), bool)
        draws = np.zeros((settings.resamples, len(patients)), np.int64)
        for stratum in map(np.array, strata.values()):
            order = rng.permuted(np.tile(np.arange(len(stratum)), (settings.splits, 1)), axis=1)
            # In an odd stratum, a random half gets the extra patient.
            cut = (len(stratum) + rng.integers(0, 2, (settings.splits, 1)) * (len(stratum) % 2)) // 2
            halves[:, stratum] = order < cut
            draws[:, stratum] = resample(len(stratum), rng, settings.resamples)
        owners = {name: np.array([rows[patient] for patient in crops.patients]) for name, crops in sets.items()}
        left = {name: halves[:, owner] for name, owner in owners.items()}
        fewest = np.min([half.sum(1) for half in left.values()], axis=0)
        return cls(
            left={name: _thin(half, fewest, rng) for name, half in left.items()},
            right=~halves[:, owners[REAL]],
            draws={name: draws[:, owner] for name, owner in owners.items()},
        )


def join_patients(real: Sequence[LesionCase], synthetic: Sequence[LesionCase]) -> tuple[str, ...]:
    """The patients of synthetic lesions: the real patient of the same id, or else a patient of their own.

    `gbci-fast generate` writes the ``patient_id`` of the template, the breast that was painted into.
    """
    known = {_patient_id(case): case.patient for case in reversed(real)}
    return tuple(known.get(_patient_id(case), f"synthetic:{case.patient}") for case in synthetic)


def _patient_id(case: LesionCase) -> str:
    """The patient's id in the data set's table."""
    return case.patient.removeprefix(f"{case.root}/")


def check_patients(name: str, patients: Sequence[str], neighbors: int) -> None:
    """Checks that every item of a half can have `neighbors` neighbors of other patients.

    Args:
        name: of the set, for the message.
        patients: the patient of every lesion.
        neighbors: k.

    Raises:
        GBCIError: there are fewer than ``2 * (neighbors + 1)`` patients.
    """
    number, needed = len(set(patients)), 2 * (neighbors + 1)
    if number < needed:
        raise GBCIError(
            f"the {name} lesions are of {number} patients; expected at least {needed}, so that each half has "
            f"{neighbors} neighbors"
        )


def _thin(halves: np.ndarray, fewest: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Keeps `fewest` [S] random True entries of each row of `halves`: bool [S, N]."""
    keys = np.where(halves, rng.random(halves.shape), 2.0)
    return halves & (keys.argsort(1).argsort(1) < fewest[:, None])


def extract(extractor: Extractor, sets: Mapping[str, Crops]) -> dict[str, np.ndarray]:
    """The features [N, D] of every set, standardized by the set `REAL` if the extractor says so.

    Raises:
        GBCIError: a feature is NaN or infinite.
    """
    features = {name: extractor(crops) for name, crops in sets.items()}
    for name, x in features.items():
        if not np.isfinite(x).all():
            raise GBCIError(f"features {extractor.name} of the {name} lesions hold NaN or infinity; expected numbers")
    if extractor.standardized:
        mean, sd = features[REAL].mean(0), features[REAL].std(0)
        features = {name: (x - mean) / np.where(sd > 0, sd, 1) for name, x in features.items()}
    return features


def _compare_features(
    extractor: Extractor, sets: Mapping[str, Crops], halvings: Halvings, settings: DistributionSettings
) -> dict[str, Any]:
    features = extract(extractor, sets)
    statistics: dict[str, dict[str, Any]] = {}
    for name, x in features.items():
        owners = sets[name].patients, sets[REAL].patients
        kernel: Measure = KernelPairs.of(x, features[REAL], *owners).distances
        statistics.setdefault("kernel", {})[name] = _measure(name, kernel, halvings, centered=False)
        if not extractor.gaussian:
            continue
        frechet = _measure(name, _frechet(x, features[REAL]), halvings, centered=True)
        statistics.setdefault("frechet", {})[name] = frechet
        pairs = NeighborPairs.of(features[REAL], x, owners[1], owners[0])
        for key, values in _measure_neighbors(name, pairs, halvings, settings.neighbors).items():
            statistics.setdefault(key, {})[name] = values
    return {
        "name": extractor.name,
        "digest": extractor.digest,
        "dimensions": features[REAL].shape[1],
        "standardized": extractor.standardized,
        "gaussian": extractor.gaussian,
        "statistics": {key: _beside_null(values) for key, values in statistics.items()},
    }


def _frechet(x: np.ndarray, real: np.ndarray) -> Measure:
    def measure(weights_x: np.ndarray, weights_y: np.ndarray) -> np.ndarray:
        pairs = zip(weights_x, weights_y, strict=True)
        return np.array([frechet_distance(x, real, one, other) for one, other in pairs])

    return measure


def _measure(name: str, measure: Measure, halvings: Halvings, *, centered: bool) -> dict[str, Any]:
    """The measure on a set's halves; for columns, also on all crops, with its interval."""
    result: dict[str, Any] = {"splits": _spread(measure(halvings.left[name], halvings.right))}
    if name != REAL:
        everything = np.ones((1, halvings.left[name].shape[1])), np.ones((1, halvings.right.shape[1]))
        value = float(measure(*everything)[0])
        draws = measure(halvings.draws[name], halvings.draws[REAL])
        draws = draws[np.isfinite(draws)]
        if centered:
            draws = np.maximum(draws - draws.mean() + value, 0)
        result["full"] = {"value": value} | interval(draws)
    return result


def _measure_neighbors(name: str, pairs: NeighborPairs, halvings: Halvings, k: int) -> dict[str, dict[str, Any]]:
    halves = [pairs.find(k, right, left).means for right, left in zip(halvings.right, halvings.left[name], strict=True)]
    results = {key: {"splits": _spread(np.array([means[key] for means in halves]))} for key in NEIGHBOR_STATISTICS}
    if name != REAL:
        full = pairs.find(k)
        for key, result in results.items():
            values = getattr(full, key)
            draws = halvings.draws[name if key in ("precision", "density") else REAL]
            result["full"] = {"value": float(values.mean())} | interval(draws @ values / draws.sum(1))
    return results


def _compare_diversity(sets: Mapping[str, Crops], halvings: Halvings, settings: DistributionSettings) -> dict[str, Any]:
    pairs = {name: _pick_pairs(crops.patients, settings) for name, crops in sets.items()}
    similarity = {name: ms_ssim(sets[name].pixels[i], sets[name].pixels[j]) for name, (i, j) in pairs.items()}

    def mean(name: str, weights: np.ndarray) -> np.ndarray:
        i, j = pairs[name]
        both = (weights[:, i] * weights[:, j]).astype(np.float64)
        with np.errstate(invalid="ignore"):
            return both @ similarity[name] / both.sum(1)

    values = {
        name: {"ms_ssim": float(similarity[name].mean()), "pairs": len(similarity[name])}
        | _measure(name, lambda left, right, name=name: mean(name, left) - mean(REAL, right), halvings, centered=False)
        for name in sets
    }
    real = {key: values[REAL][key] for key in ("ms_ssim", "pairs")}
    return _beside_null(values) | {"real": real}


def _pick_pairs(patients: Sequence[str], settings: DistributionSettings) -> tuple[np.ndarray, np.ndarray]:
    """Indices, [P] each, of random pairs of crops of two patients; equal sets give equal pairs."""
    owners = np.array(patients)
    i, j = np.triu_indices(len(owners), 1)
    keep = np.flatnonzero(owners[i] != owners[j])
    keep = np.random.default_rng(settings.seed).permutation(keep)[: settings.pairs]
    return i[keep], j[keep]


def _compare_values(values: Mapping[str, np.ndarray], sets: Mapping[str, Crops], halvings: Halvings) -> dict[str, Any]:
    """Means of one number per crop, and the share of a column's values in the central 95 % of the real ones."""
    real = values[REAL]
    low, high = np.quantile(real, QUANTILES)
    owners = np.array(sets[REAL].patients)
    means = [real[owners == patient].mean() for patient in dict.fromkeys(owners)]
    report: dict[str, Any] = {
        "real": patient_summary(real, sets[REAL].patients),
        "real_range": [float(low), float(high)],
        "real_range_of_patient_means": [float(x) for x in np.quantile(means, QUANTILES)],
        "null": _spread(_mean(real, halvings.left[REAL]) - _mean(real, halvings.right)),
        "columns": {},
    }
    for name, column in values.items():
        if name != REAL:
            draws = _mean(column, halvings.draws[name]) - _mean(real, halvings.draws[REAL])
            report["columns"][name] = patient_summary(column, sets[name].patients) | {
                "difference": {"value": float(column.mean() - real.mean())} | interval(draws),
                "share_in_real_range": float(((column >= low) & (column <= high)).mean()),
            }
    return report


def _mean(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """The means [R] of values [N] under weights [R, N]."""
    return weights @ values / weights.sum(1)


def _mean_spectra(sets: Mapping[str, Crops]) -> dict[str, Any]:
    """The logarithm of the geometric mean of the crops' power at every frequency, for the figure."""
    frequencies = spectrum(sets[REAL][:1])[0] / NATIVE_SIZE
    means = {name: np.log(np.maximum(spectrum(x)[1], 1e-12)).mean(0) for name, x in sets.items()}
    return {"frequencies": frequencies.tolist(), "log_power": {name: x.tolist() for name, x in means.items()}}


def _targets(
    name: str, extractors: Sequence[dict[str, Any]], appearance: dict[str, Any], sets: Mapping[str, Crops]
) -> list[dict[str, Any]]:
    """The targets of a column; ``measured`` is the value even where too few patients judge it."""
    fewest = min(len(set(sets[key].patients)) for key in (REAL, name))
    rows: list[tuple[str, float | None, float, str]] = []
    for extractor in extractors:
        if extractor["gaussian"]:
            frechet = extractor["statistics"]["frechet"]
            null, value = frechet["null"]["median"], frechet["columns"][name]["splits"]["median"]
            note = "median over splits, over that of the null"
            rows.append((f"frechet_{extractor['name']}", value / null if null > 0 else None, FRECHET_BOUND, note))
        kernel = extractor["statistics"]["kernel"]
        note = "median over splits; bound: the null's 97.5 % quantile"
        value, bound = kernel["columns"][name]["splits"]["median"], kernel["null"]["high"]
        rows.append((f"kernel_{extractor['name']}", value, bound, note))
    off = {key: abs(found["columns"][name]["difference"]["value"]) for key, found in appearance.items()}
    rows.append(("spectrum_slope", off["spectrum_slope"], SLOPE_BOUND, "distance of the mean slope from the real one"))
    note = f"factor, above 1, between the power beyond {CUTOFF:g} cycles per pixel and the real one"
    rows.append(("fine_power", float(np.exp(off["fine_power"])), POWER_BOUND, note))
    bound = float(np.quantile(np.abs(appearance["seam"]["null"]["values"]), 0.975))
    note = "distance of the mean from the real one; bound: 97.5 % quantile between real halves"
    rows.append(("seam", off["seam"], bound, note))
    few = f"; not judged: {fewest} patients, expected at least {FEWEST_JUDGED}" if fewest < FEWEST_JUDGED else ""
    return [
        target(key, None if few else value, bound, at_least=False, note=f"{name}: {note}{few}") | {"measured": value}
        for key, value, bound, note in rows
    ]


def _beside_null(values: dict[str, dict[str, Any]]) -> dict[str, Any]:
    return {"null": values[REAL]["splits"], "columns": {name: x for name, x in values.items() if name != REAL}}


def _spread(values: np.ndarray) -> dict[str, Any]:
    """The median, the central 95 % and all values.

    Raises:
        GBCIError: a value is not finite.
    """
    values = np.asarray(values, np.float64)
    if not np.isfinite(values).all():
        raise GBCIError("a half of the patients has too few lesions to compare; use more images")
    return {"median": float(np.median(values)), **interval(values), "values": values.tolist()}
