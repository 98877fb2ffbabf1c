"""Features of a lesion's pixels for a judge: bands of the spectrum up to the finest, contrast, histogram and shape.

They are measured at the model's own pixels. Each feature belongs to one group, so that a judge can do without a group.
All groups but `FINEST` are measured in the image blurred by one pixel, so that none of them lets the finest band in.
"""

from collections.abc import Mapping
from itertools import pairwise

import numpy as np
from scipy import ndimage
from skimage.filters import threshold_otsu
from skimage.measure import label, regionprops

from gbci_fast.evaluate.realism.regions import Place, Region

FINEST = "finest"
PLAIN = ("contrast", "histogram", "shape")
GROUPS = (FINEST, "bands", "residual", "gradient", "correlation", "lattice", *PLAIN)
BLUR = 1.0  # standard deviation in pixels; leaves 8 % of the power at 0.25 cycles per pixel
FINE_SCALES = (0.0, 0.6, BLUR)  # a band lies between two neighbors
SCALES = (BLUR, 1.6, 2.6, 4.2)
RESIDUAL = 1.6  # standard deviation in pixels of the blur that a residual is left by
LAGS = ((0, 1), (1, 0), (1, 1), (1, -1), (0, 2), (2, 0), (0, 3), (3, 0), (0, 4), (4, 0))
CELLS = (4, 8)  # pixels of a latent cell of the autoencoder, and of two
LEVELS = (0.02, 0.1, 0.25, 0.5, 0.75, 0.9, 0.98)  # quantiles of a histogram
DEPTHS = (-9.0, -6.0, -4.0, -2.0, 0.0, 2.0, 4.0, 7.0)  # limits of a profile; negative = inside of the outline
SMALLEST = 1e-12  # power that counts as none
FEWEST = 6  # pixels of a statistic
FILTERS = {
    "across": np.array([[1, -2, 1]]) / 6**0.5,
    "down": np.array([[1], [-2], [1]]) / 6**0.5,
    "corner": np.array([[1, -1], [-1, 1]]) / 2,
    "laplacian": np.array([[0, 1, 0], [1, -4, 1], [0, 1, 0]]) / 20**0.5,
    "checker": np.array([[1, -2, 1], [-2, 4, -2], [1, -2, 1]]) / 6,
}
"""Differences of neighboring pixels; each has unit power in white noise of unit power."""

SHOWN: dict[Region, tuple[str, ...]] = {"interior": ("core",), "ring": ("rim", "around")}
"""The parts that a region shows, where it does not show all."""

Named = dict[str, float]
"""{"group/feature": value}; NaN where a lesion is too small to tell."""
Parts = Mapping[str, np.ndarray]
"""{"core", "rim" or "around": bool [H, W]}, the pixels of the part that the region shows."""


def features(place: Place, image: np.ndarray, region: Region) -> Named:
    """The features of one lesion, from the pixels that the region shows and no others.

    The names do not depend on the lesion.

    Args:
        place: of the lesion.
        image: float [S, S] in [0, 1].
        region: that is shown.
    """
    x, seen = place.cut(image).astype(np.float64), place.seen(region)
    parts = {name: getattr(place, name) & seen for name in ("core", "rim", "around")}
    parts = {name: part for name, part in parts.items() if region == "whole" or name in SHOWN[region]}
    soft = smooth(x, seen, BLUR)
    found: Named = {}

    def add(group: str, more: Named) -> None:
        found.update({f"{group}/{name}": value for name, value in more.items()})

    for group, pixels, scales in ((FINEST, x, FINE_SCALES), (None, soft, SCALES)):
        add(group or "bands", _bands(pixels, scales, seen, parts))
        add(group or "gradient", _gradient(pixels, seen, parts))
        add(group or "residual", _residual(pixels, seen, parts))
        add(group or "correlation", _correlation(pixels, seen, parts))
        add(group or "lattice", _lattice(pixels, place, parts))
    add(FINEST, _filters(x, seen, parts))
    add("contrast", _contrast(soft, place, parts))
    add("histogram", _histogram(soft, parts))
    add("shape", _shape(soft, parts))
    return found


def smooth(x: np.ndarray, seen: np.ndarray, sigma: float) -> np.ndarray:
    """A Gaussian blur of the seen pixels alone (Knutsson and Westin 1993): the others weigh nothing, float64 [H, W]."""
    if sigma == 0:
        return x
    if seen.all():
        return ndimage.gaussian_filter(x, sigma, mode="nearest")
    weight = ndimage.gaussian_filter(seen.astype(np.float64), sigma, mode="nearest")
    return ndimage.gaussian_filter(np.where(seen, x, 0), sigma, mode="nearest") / np.maximum(weight, 1e-6)


def _bands(x: np.ndarray, scales: tuple[float, ...], seen: np.ndarray, parts: Parts) -> Named:
    """Log power of differences of Gaussians in each part, over that of its surroundings and over the next band's."""
    blurred = [x, *(smooth(x, seen, (one**2 - scales[0] ** 2) ** 0.5) for one in scales[1:])]
    bands = [one - other for one, other in pairwise(blurred)]
    found: Named = {}
    for i, band in enumerate(bands):
        for name, part in parts.items():
            found[f"band{i}_{name}"] = _log_power(band, part)
            found[f"band{i}_peak_{name}"] = _peakedness(band, part)
        if {"core", "around"} <= set(parts):
            found[f"band{i}_step"] = found[f"band{i}_core"] - found[f"band{i}_around"]
        if {"rim", "around"} <= set(parts):
            found[f"band{i}_seam"] = found[f"band{i}_rim"] - found[f"band{i}_around"]
    for i in range(len(bands) - 1):
        for name in parts:
            found[f"slope{i}_{name}"] = found[f"band{i}_{name}"] - found[f"band{i + 1}_{name}"]
    return found


def _filters(x: np.ndarray, seen: np.ndarray, parts: Parts) -> Named:
    found: Named = {}
    for name, taps in FILTERS.items():
        difference = ndimage.correlate(x, taps, mode="nearest")
        valid = ndimage.minimum_filter(seen, size=taps.shape, mode="nearest")
        for part, pixels in parts.items():
            found[f"{name}_{part}"] = _log_power(difference, pixels & valid)
        if {"core", "around"} <= set(parts):
            found[f"{name}_step"] = found[f"{name}_core"] - found[f"{name}_around"]
    return found


def _gradient(x: np.ndarray, seen: np.ndarray, parts: Parts) -> Named:
    """Quantiles of the gradient's length; a part's, and the rim's over the others'."""
    across, down = np.zeros_like(x), np.zeros_like(x)
    across[:, :-1], down[:-1] = np.diff(x, axis=1), np.diff(x, axis=0)
    valid = seen.copy()
    valid[:, :-1] &= seen[:, 1:]
    valid[:-1] &= seen[1:]
    length = np.log(np.hypot(across, down) + 1e-5)
    found: Named = {}
    for name, part in parts.items():
        levels = (0.1, 0.5, 0.9)
        values = _quantiles(length[part & valid], levels)
        found |= {f"gradient{level}_{name}": value for level, value in zip(levels, values, strict=True)}
    return found


def _residual(x: np.ndarray, seen: np.ndarray, parts: Parts) -> Named:
    """Moments of what a blur leaves over."""
    residual = x - smooth(x, seen, RESIDUAL)
    found: Named = {}
    for name, part in parts.items():
        found[f"residual_power_{name}"] = _log_power(residual, part)
        _, *shape = _moments(residual[part])
        found[f"residual_skewness_{name}"], found[f"residual_kurtosis_{name}"] = shape
    return found


def _correlation(x: np.ndarray, seen: np.ndarray, parts: Parts) -> Named:
    """The autocorrelation of the residual at `LAGS`, over pairs of pixels of one part."""
    residual = x - smooth(x, seen, 2.6)
    found: Named = {}
    for name, part in parts.items():
        for dy, dx in LAGS:
            one, other = _shifted(dy, dx)
            both = part[one] & part[other]
            here, there = residual[one][both], residual[other][both]
            power = (here**2).sum() + (there**2).sum()
            known = len(here) >= FEWEST and power > SMALLEST
            found[f"lag{dy}{dx}_{name}"] = float(2 * (here * there).sum() / power) if known else np.nan
    return found


def _lattice(x: np.ndarray, place: Place, parts: Parts) -> Named:
    """How the steps between neighbors depend on their phase in a latent cell: log of a phase's mean, less the mean."""
    found: Named = {}
    name = "core" if "core" in parts else "rim"
    for cell in CELLS:
        sums, counts = np.zeros(cell), np.zeros(cell)
        for axis, start in ((0, place.top), (1, place.left)):
            steps = np.abs(np.diff(x, axis=axis))
            one, other = (np.s_[:-1], np.s_[1:]) if axis == 0 else (np.s_[:, :-1], np.s_[:, 1:])
            both = parts[name][one] & parts[name][other]
            phase = (np.arange(x.shape[axis] - 1) + start) % cell
            phases = np.broadcast_to(phase[:, None] if axis == 0 else phase, steps.shape)
            sums += np.bincount(phases[both], steps[both], minlength=cell)
            counts += np.bincount(phases[both], minlength=cell)
        known = counts.min() >= 1 and sums.min() > 0
        means = np.log(sums / np.maximum(counts, 1)) if known else np.full(cell, np.nan)
        found |= {f"cell{cell}_phase{i}": float(means[i] - means.mean()) for i in range(cell)}
        found[f"cell{cell}_spread"] = float(means.std())
    return found


def _contrast(x: np.ndarray, place: Place, parts: Parts) -> Named:
    """The profile across the outline, in steps of depth, and the means of the parts."""
    inside, outside = ndimage.distance_transform_edt(place.mask), ndimage.distance_transform_edt(~place.mask)
    depth = np.where(place.mask, 0.5 - inside, outside - 0.5)
    shown = np.logical_or.reduce(list(parts.values()))
    means = []
    for low, high in zip((-np.inf, *DEPTHS), (*DEPTHS, np.inf), strict=True):
        values = x[shown & (depth >= low) & (depth < high)]
        means.append(values.mean() if len(values) >= FEWEST else np.nan)
    found = {f"mean_{name}": _mean(x, part) for name, part in parts.items()}
    found |= {f"step{i}": float(after - before) for i, (before, after) in enumerate(pairwise(means))}
    if {"core", "around"} <= set(parts):
        spread = x[parts["around"]].std() + 1e-3
        found["contrast"] = found["mean_core"] - found["mean_around"]
        found["contrast_to_spread"] = found["contrast"] / spread
    return found


def _histogram(x: np.ndarray, parts: Parts) -> Named:
    found: Named = {}
    for name, part in parts.items():
        found |= zip((f"sd_{name}", f"skewness_{name}", f"kurtosis_{name}"), _moments(x[part]), strict=True)
        levels = _quantiles(x[part], (0.5, *LEVELS))
        found |= {f"quantile{level}_{name}": value - levels[0] for level, value in zip(LEVELS, levels[1:], strict=True)}
    return found


def _shape(x: np.ndarray, parts: Parts) -> Named:
    """The largest bright region of the first part by Otsu's threshold; the mask's own shape, which is equal in both."""
    part = next(iter(parts.values()))
    found = {"area": float(np.log(max(part.sum(), 1)))}
    names = ("share", "eccentricity", "extent")
    values = x[part]
    if len(values) < FEWEST or np.ptp(values) < 1e-6:
        return found | dict.fromkeys(names, np.nan)
    regions = regionprops(label(part & (x > threshold_otsu(values))))
    largest = max(regions, key=lambda region: region.area)
    shape = (largest.area / part.sum(), largest.eccentricity, largest.extent)
    return found | dict(zip(names, map(float, shape), strict=True))


def _log_power(x: np.ndarray, part: np.ndarray) -> float:
    return float(np.log((x[part] ** 2).mean() + SMALLEST)) if part.sum() >= FEWEST else np.nan


def _peakedness(x: np.ndarray, part: np.ndarray) -> float:
    """Log of the root mean square over the mean absolute value: 0.23 for a normal distribution."""
    if part.sum() < FEWEST:
        return np.nan
    values = x[part]
    return float(np.log(((values**2).mean() ** 0.5 + SMALLEST**0.5) / (np.abs(values).mean() + SMALLEST**0.5)))


def _moments(values: np.ndarray) -> tuple[float, float, float]:
    """Standard deviation, skewness and excess kurtosis; NaN for few or equal values."""
    if len(values) < FEWEST or (sd := values.std()) < SMALLEST**0.5:
        return np.nan, np.nan, np.nan
    z = (values - values.mean()) / sd
    return float(sd), float((z**3).mean()), float((z**4).mean() - 3)


def _quantiles(values: np.ndarray, levels: tuple[float, ...]) -> list[float]:
    return np.quantile(values, levels).tolist() if len(values) >= FEWEST else [np.nan] * len(levels)


def _mean(x: np.ndarray, part: np.ndarray) -> float:
    return float(x[part].mean()) if part.sum() >= FEWEST else np.nan


def _shifted(dy: int, dx: int) -> tuple[tuple[slice, slice], tuple[slice, slice]]:
    """Two views of an image whose pixels are (`dy`, `dx`) apart; `dy` is not negative."""
    rows = (slice(0, -dy or None), slice(dy, None))
    if dx >= 0:
        return (rows[0], slice(0, -dx or None)), (rows[1], slice(dx, None))
    return (rows[0], slice(-dx, None)), (rows[1], slice(0, dx))
