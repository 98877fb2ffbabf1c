"""Fits `Priors` from annotated boxes in the VinDr layout."""

import math
from collections import Counter
from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from scipy import ndimage

from gbci_fast.attributes import FINDING_CATEGORIES, MARGINS, PATHOLOGIES, SHAPES, VIEW_POSITIONS
from gbci_fast.choices import MODEL_SIZE
from gbci_fast.data.vindr import Finding, ImageRecord, VinDr
from gbci_fast.errors import GBCIError
from gbci_fast.generate.priors import (
    BIRADS_OF_FINDINGS,
    GRID,
    POOLED,
    SURFACE_CATEGORIES,
    CategoryPrior,
    LogNormal,
    MassPrior,
    Priors,
)
from gbci_fast.generate.template import Template, open_template

SHRINKAGE = 20.0  # boxes at which a category's own figures weigh as much as the pooled ones
ENOUGH = 30  # boxes at which a category needs no fallback
SMOOTHING = 0.8  # of position maps, in cells
QUANTILES = (0.02, 0.98)  # where distributions are cut
FORMULA = (
    "Diameters are sqrt(width * height) of the annotated box in pixels of the whole-breast view at 224 pixels; "
    "aspect is height / width. A category of n boxes is shrunk toward all boxes: figure = w * own + (1 - w) * pooled "
    "with w = n / (n + shrinkage) (for positions with the n of the view), for medians, standard deviations and cuts "
    "(in logarithms), BI-RADS shares and positions alike; where skin, nipple and lymph node findings lie, other "
    "findings do not tell, so their positions are not shrunk. Positions are relative to the tissue (1 = as often as if "
    "spread evenly), chest wall left, left and right breasts together."
)
MASS_FORMULA = (
    "Masses: the share of malignant ones of a BI-RADS category is (malignant + 0.5) / (boxes + 1). Shape (rows) and "
    "margin (columns: " + ", ".join(MARGINS) + ") are shares of one table per pathology and BI-RADS category, shrunk "
    "as above toward the table of the pathology, which is shrunk toward that of all masses, whose counts are raised by "
    "1 / 40 each. A box that states one of the two counts for the other in proportion to all masses. Sources whose "
    "boxes all have one pathology do not count: they tell how cases were selected."
)


@dataclass(frozen=True, kw_only=True)
class Observation:
    """One annotated box in model space.

    Attributes:
        categories: the categories that the box counts for; see `counted_categories`.
        source: name of the data set.
        view: "CC", "MLO" or None = unknown.
        diameter, aspect: see `CategoryPrior`.
        diameter_mm: None where the spacing is unknown.
        place: (height, depth) of the center in the breast's bounding box, each in [0, 1].
        birads, pathology, shape, margin: None where unknown.
    """

    categories: tuple[str, ...]
    source: str
    view: str | None
    diameter: float
    aspect: float
    diameter_mm: float | None
    place: tuple[float, float]
    birads: int | None
    pathology: str | None = None
    shape: str | None = None
    margin: str | None = None


@dataclass(kw_only=True)
class Sample:
    """Observations with their reference: the number of all boxes, and the distribution of the tissue.

    Attributes:
        observations: the measured boxes.
        images: number of images per source, opened or not.
        boxes: number of boxes in all of these images.
        tissue: {view: float64 [GRID, GRID]}, the sum over the opened images of each cell's share of the tissue.
    """

    observations: list[Observation] = field(default_factory=list)
    images: Counter = field(default_factory=Counter)
    boxes: int = 0
    tissue: dict[str, np.ndarray] = field(default_factory=lambda: {view: _no_cells() for view in VIEW_POSITIONS})

    def of(self, category: str) -> list[Observation]:
        """The observations of a category."""
        return [each for each in self.observations if category in each.categories]


def fit_priors(
    roots: Sequence[Path],
    fallbacks: Sequence[Path] = (),
    *,
    split: str = "training",
    notes: Sequence[str] = (),
    on_image: Callable[[int, int], None] = lambda done, total: None,
) -> Priors:
    """Reads every annotated image of `split` and fits the figures of every category, and the forms of masses.

    Args:
        roots: folders in the VinDr layout.
        fallbacks: further folders (such as phantoms), used only for categories with fewer than `ENOUGH` boxes in
            `roots`.
        split: name of the split to read.
        notes: text kept in the result, such as the attribution of the data.
        on_image: called as ``f(images read, images to read)``, first for `roots`, then for `fallbacks`.

    Raises:
        GBCIError: an unreadable folder or image, or no box in `roots`.
    """
    records, others = ([record for root in group for record in _records(root, split)] for group in (roots, fallbacks))
    main = observe(records, on_image=on_image)
    if not main.observations:
        raise GBCIError(f"no annotated box in the {split} split of {', '.join(map(str, roots))}; nothing to fit")
    pooled = _Figures.of(main.observations, main.tissue)
    scarce = {name for name in FINDING_CATEGORIES if len(main.of(name)) < ENOUGH}
    fallback = observe(others, only=scarce, on_image=on_image)
    categories = {}
    for name in FINDING_CATEGORIES:
        samples = [main, fallback] if name in scarce else [main]
        categories[name] = _category_prior(name, samples, pooled)
    boxes = Counter(observation.source for observation in (*main.observations, *fallback.observations))
    masses = _mass_prior(main.of("Mass"))
    return Priors(
        notes=(FORMULA, *([] if masses is None else [MASS_FORMULA]), *notes),
        sources={
            name: {"images": count, "boxes": boxes[name]} for name, count in (main.images + fallback.images).items()
        },
        shrinkage=SHRINKAGE,
        pooled=_prior(POOLED, main.observations, 1.0, pooled, _frequency([(main, main.observations)])),
        categories=categories,
        masses=masses,
    )


def observe(
    records: Sequence[ImageRecord],
    *,
    only: Set[str] | None = None,
    on_image: Callable[[int, int], None] = lambda done, total: None,
) -> Sample:
    """Opens the images with findings, one after the other, and measures their boxes and their tissue.

    Args:
        records: all images; those without findings are counted but not opened.
        only: categories to measure; other boxes are counted but not measured. None = all boxes.
        on_image: see `fit_priors`.

    Raises:
        GBCIError: an image cannot be read.
    """
    sample = Sample(
        images=Counter(record.extra["source"] for record in records),
        boxes=sum(len(record.findings) for record in records),
    )
    measured = [(record, [each for each in record.findings if _wanted(each, only)]) for record in records]
    opened = [(record, findings) for record, findings in measured if findings]
    for done, (record, findings) in enumerate(opened, 1):
        template = open_template(record)
        view = template.mammogram.view_position
        if view:
            cells = _histogram(_normalized(np.argwhere(template.tissue) + 0.5, template.breast))
            sample.tissue[view] += cells / cells.sum()
        source = record.extra["source"]
        sample.observations += [_observation(each, template, view, source) for each in findings]
        on_image(done, len(opened))
    return sample


def _wanted(finding: Finding, only: Set[str] | None) -> bool:
    return only is None or not only.isdisjoint(counted_categories(finding.attributes.finding_categories))


def counted_categories(categories: tuple[str, ...] | None) -> tuple[str, ...]:
    """The categories that a box with these labels counts for.

    A box with an inner and a surface category, such as "Mass" and "Nipple Retraction", outlines the inner one.
    """
    inner = tuple(name for name in categories or () if name not in SURFACE_CATEGORIES)
    return inner or categories or ()


@dataclass(frozen=True, kw_only=True)
class _Figures:
    """Every number of a prior that is shrunk, as arrays that can be averaged."""

    boxes: int
    views: Counter  # boxes per view
    diameter: np.ndarray  # [4] of the logarithm: median, standard deviation, low, high
    aspect: np.ndarray  # [4]
    birads: np.ndarray  # [4] shares
    position: dict[str, np.ndarray]  # [GRID, GRID] relative to the tissue

    @classmethod
    def of(cls, observations: Sequence[Observation], tissue: dict[str, np.ndarray]) -> "_Figures":
        grades = Counter(each.birads for each in observations)
        counts = np.array([grades[grade] for grade in BIRADS_OF_FINDINGS], float)
        return cls(
            boxes=len(observations),
            views=Counter(each.view for each in observations),
            diameter=_log_figures([each.diameter for each in observations]),
            aspect=_log_figures([each.aspect for each in observations]),
            birads=counts / counts.sum() if counts.any() else np.full(len(counts), 1 / len(counts)),
            position={view: _relative_density(observations, view, tissue[view]) for view in VIEW_POSITIONS},
        )

    def shrunk(self, pooled: "_Figures", *, surface: bool) -> "_Figures":
        """Empirical Bayes: w * own + (1 - w) * pooled with w = n / (n + `SHRINKAGE`); for positions, n is the view's.

        Args:
            pooled: the figures of all boxes.
            surface: the category is one of `SURFACE_CATEGORIES`. Other categories lie elsewhere, so its own positions
                are not shrunk where there are any.
        """

        def mix(own: np.ndarray, all_boxes: np.ndarray, boxes: float) -> np.ndarray:
            return all_boxes + _weight(boxes) * (own - all_boxes)

        places = {view: math.inf if surface and self.views[view] else self.views[view] for view in VIEW_POSITIONS}
        return replace(
            self,
            diameter=mix(self.diameter, pooled.diameter, self.boxes),
            aspect=mix(self.aspect, pooled.aspect, self.boxes),
            birads=mix(self.birads, pooled.birads, self.boxes),
            position={v: mix(self.position[v], pooled.position[v], places[v]) for v in VIEW_POSITIONS},
        )


def _category_prior(name: str, samples: Sequence[Sample], pooled: _Figures) -> CategoryPrior:
    found = [(sample, sample.of(name)) for sample in samples]
    observations = [each for _, group in found for each in group]
    tissue = {view: sum((each.tissue[view] for each, group in found if group), _no_cells()) for view in VIEW_POSITIONS}
    figures = (
        _Figures.of(observations, tissue).shrunk(pooled, surface=name in SURFACE_CATEGORIES) if observations else pooled
    )
    return _prior(name, observations, _weight(len(observations)), figures, _frequency(found))


def _mass_prior(masses: Sequence[Observation]) -> MassPrior | None:
    """Pathology and form of masses; None with fewer than `ENOUGH` boxes of known pathology, shape and margin."""
    found = {source: {each.pathology for each in masses if each.source == source} for source in _sources(masses)}
    told = [each for each in masses if each.pathology and found[each.source].issuperset(PATHOLOGIES)]
    if sum(None not in (each.shape, each.margin) for each in told) < ENOUGH:
        return None
    pooled = _form_counts(told, np.zeros((len(SHAPES), len(MARGINS)))) + 0.5 / (len(SHAPES) * len(MARGINS))
    pooled /= pooled.sum()

    def shrunk(group: Sequence[Observation], toward: np.ndarray) -> np.ndarray:
        counts = _form_counts(group, pooled)
        return (counts + SHRINKAGE * toward) / (counts.sum() + SHRINKAGE)

    malignant, forms = {}, {pathology: {} for pathology in PATHOLOGIES}
    for grade in BIRADS_OF_FINDINGS:
        graded = Counter(each.pathology for each in told if each.birads == grade)
        malignant[grade] = _short((graded["malignant"] + 0.5) / (graded.total() + 1))
    for pathology in PATHOLOGIES:
        group = [each for each in told if each.pathology == pathology]
        own = shrunk(group, pooled)
        for grade in BIRADS_OF_FINDINGS:
            form = shrunk([each for each in group if each.birads == grade], own)
            forms[pathology][grade] = np.vectorize(_short)(form)
    return MassPrior(boxes=_sources(told), malignant=malignant, forms=forms)


def _sources(observations: Sequence[Observation]) -> dict[str, int]:
    return dict(sorted(Counter(each.source for each in observations).items()))


def _form_counts(observations: Sequence[Observation], shares: np.ndarray) -> np.ndarray:
    """Number of boxes per shape and margin, float64 [4, 5]; where one of the two is unknown, divided by `shares`."""
    counts = np.zeros_like(shares)
    for each in observations:
        rows = slice(None) if each.shape is None else [SHAPES.index(each.shape)]
        columns = slice(None) if each.margin is None else [MARGINS.index(each.margin)]
        if None not in (each.shape, each.margin):
            counts[rows, columns] += 1
        elif each.shape or each.margin:
            counts[rows, columns] += shares[rows, columns] / (shares[rows, columns].sum() or 1)
    return counts


def _prior(
    name: str, observations: Sequence[Observation], weight: float, figures: _Figures, frequency: float
) -> CategoryPrior:
    millimeters = [each.diameter_mm for each in observations if each.diameter_mm is not None]
    low, middle, high = np.quantile(millimeters, (0.05, 0.5, 0.95)) if millimeters else (0, 0, 0)
    quantiles = {"boxes": len(millimeters), "p05": _short(low), "median": _short(middle), "p95": _short(high)}
    return CategoryPrior(
        category=name,
        boxes=_sources(observations),
        own_weight=_short(weight),
        diameter=_log_normal(figures.diameter),
        diameter_mm=quantiles if millimeters else None,
        aspect=_log_normal(figures.aspect),
        position={view: np.round(figures.position[view], 2).clip(0.01) for view in VIEW_POSITIONS},
        birads={grade: _short(share) for grade, share in zip(BIRADS_OF_FINDINGS, figures.birads, strict=True)},
        frequency=_short(frequency),
    )


def _observation(finding: Finding, template: Template, view: str | None, source: str) -> Observation:
    xmin, ymin, xmax, ymax = template.frame.box_to_model(finding.box)
    width, height = xmax - xmin, ymax - ymin
    spacing = template.frame.model_spacing(template.mammogram.spacing)
    diameter = float(np.sqrt(width * height))
    return Observation(
        categories=counted_categories(finding.attributes.finding_categories),
        source=source,
        view=view,
        diameter=diameter * MODEL_SIZE / template.frame.size,
        aspect=height / width,
        diameter_mm=None if spacing is None else diameter * spacing,
        place=tuple(_normalized(np.array([[(ymin + ymax) / 2, (xmin + xmax) / 2]]), template.breast)[0]),
        birads=finding.attributes.finding_birads,
        pathology=finding.attributes.pathology,
        shape=finding.attributes.shape,
        margin=finding.attributes.margin,
    )


def _records(root: Path, split: str) -> list[ImageRecord]:
    """A root's images; where the table names no source, the source is the folder's name."""
    name = Path(root).absolute().name
    return [replace(record, extra={"source": name, **record.extra}) for record in VinDr(root).of_split(split)]


def _normalized(points: np.ndarray, breast: np.ndarray) -> np.ndarray:
    """(y, x) points [N, 2] of model space relative to the breast's bounding box, float64 [N, 2] in [0, 1]."""
    spans = [np.flatnonzero(breast.any(axis)) for axis in (1, 0)]
    begin, end = np.array([(span[0], span[-1] + 1) for span in spans], float).T
    return np.clip((points - begin) / (end - begin), 0, 1)


def _histogram(places: np.ndarray) -> np.ndarray:
    """Number of places per cell, float64 [GRID, GRID]."""
    return np.histogram2d(places[:, 0], places[:, 1], bins=GRID, range=((0, 1), (0, 1)))[0]


def _relative_density(observations: Sequence[Observation], view: str, tissue: np.ndarray) -> np.ndarray:
    """Smoothed density of the centers over that of the tissue, float64 [GRID, GRID]; all 1 without observations."""
    places = np.array([each.place for each in observations if each.view == view])
    if not len(places) or not np.any(tissue):
        return np.ones((GRID, GRID))
    lesions, exposed = (
        ndimage.gaussian_filter(cells / cells.sum(), SMOOTHING, mode="nearest")
        for cells in (_histogram(places), tissue)
    )
    floor = 0.03 / GRID**2  # keeps the ratio near 1 in cells with almost no tissue
    return (lesions + floor) / (exposed + floor)


def _weight(boxes: float) -> float:
    return 1.0 if math.isinf(boxes) else boxes / (boxes + SHRINKAGE)


def _frequency(found: Sequence[tuple[Sample, Sequence[Observation]]]) -> float:
    """The sum over samples of a category's share of the sample's boxes."""
    return sum(len(group) / sample.boxes for sample, group in found if group)


def _log_figures(values: Sequence[float]) -> np.ndarray:
    """Median, half the width of the middle 68 % (robust against outliers), and `QUANTILES` of the logarithm."""
    logs = np.log(values)
    below, median, above = np.quantile(logs, (0.16, 0.5, 0.84))
    return np.array([median, (above - below) / 2, *np.quantile(logs, QUANTILES)])


def _log_normal(figures: np.ndarray) -> LogNormal:
    median, log_sd, low, high = figures
    return LogNormal(
        median=_short(np.exp(median)),
        log_sd=max(_short(log_sd), 0.01),
        low=_short(np.exp(low)),
        high=_short(np.exp(high)),
    )


def _short(value: float) -> float:
    return float(f"{value:.4g}")


def _no_cells() -> np.ndarray:
    return np.zeros((GRID, GRID))
