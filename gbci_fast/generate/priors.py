"""Priors: size, aspect and position of lesions per finding category, as statistics of annotations in a JSON file.

`fit_priors` (`gbci_fast.generate.prior_fit`, ``gbci-fast priors``) makes them. Automatic masks and
``--balance natural`` draw from them.
"""

import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from scipy.special import ndtr, ndtri

from gbci_fast.attributes import FINDING_CATEGORIES, VIEW_POSITIONS
from gbci_fast.errors import GBCIError
from gbci_fast.jobs.files import atomically

PACKAGED = Path(__file__).parent / "priors.json"
FORMAT = "gbci_fast lesion priors 1"
POOLED = "all categories"
# Findings of the skin, the nipple or the axilla. A box that also names another category outlines the other one.
SURFACE_CATEGORIES = ("Skin Thickening", "Suspicious Lymph Node", "Nipple Retraction", "Skin Retraction")
BIRADS_OF_FINDINGS = (2, 3, 4, 5)
GRID = 8  # cells of a position map along each side


@dataclass(frozen=True, kw_only=True)
class LogNormal:
    """A log-normal distribution cut to what was observed.

    Attributes:
        median: of the uncut distribution.
        log_sd: standard deviation of the natural logarithm.
        low, high: nothing is drawn outside.
    """

    median: float
    log_sd: float
    low: float
    high: float

    def draw(self, rng: np.random.Generator, limits: tuple[float, float] = (0.0, math.inf)) -> float:
        """Draws a value within `low` to `high` and `limits`; returns the nearer limit where the two do not overlap."""
        low, high = np.clip((self.low, self.high), *limits)
        inside = ndtr((np.log((low, high)) - np.log(self.median)) / self.log_sd)
        value = self.median * np.exp(self.log_sd * ndtri(rng.uniform(*inside)))
        return float(np.clip(value, low, high))

    def to_json(self) -> dict[str, float]:
        return {"median": self.median, "log_sd": self.log_sd, "low": self.low, "high": self.high}


@dataclass(frozen=True, kw_only=True, eq=False)
class CategoryPrior:
    """One category, or all of them together.

    Attributes:
        category: name of the category, or `POOLED`.
        boxes: number of annotated boxes per source.
        own_weight: weight of the category's own boxes in the figures below; the rest is `POOLED` (see `fit_priors`).
        diameter: sqrt(width * height) of the box, in pixels of the whole-breast view (`MODEL_SIZE`).
        diameter_mm: {"boxes", "p05", "median", "p95"} of the boxes of known pixel spacing; None without any.
        aspect: height / width of the box.
        position: {view: float [GRID, GRID]}; rows go from the top of the breast to the bottom, columns from the chest
            wall to the nipple. The frequency of lesion centers, relative to an even spread over the tissue.
        birads: share of each BI-RADS category.
        frequency: share of this category among the boxes of its source.
    """

    category: str
    boxes: Mapping[str, int]
    own_weight: float
    diameter: LogNormal
    diameter_mm: Mapping[str, float] | None
    aspect: LogNormal
    position: Mapping[str, np.ndarray]
    birads: Mapping[int, float]
    frequency: float

    def position_weights(self, breast: np.ndarray, view: str | None) -> np.ndarray:
        """The density of lesion centers over a breast, float64 [S, S], up to a factor.

        Args:
            breast: bool [S, S] in model space (chest wall left), not empty.
            view: "CC" or "MLO"; None = their mean.
        """
        grid = np.mean([self.position[name] for name in ([view] if view else VIEW_POSITIONS)], axis=0)
        vertical = _interpolation(np.flatnonzero(breast.any(1)), breast.shape[0])
        horizontal = _interpolation(np.flatnonzero(breast.any(0)), breast.shape[1])
        return vertical @ grid @ horizontal.T

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the content."""
        return _digest(self.to_json())

    def to_json(self) -> dict[str, Any]:
        """The inverse of `_parse_prior`."""
        return {
            "boxes": dict(self.boxes),
            "own_weight": self.own_weight,
            "diameter": self.diameter.to_json(),
            "diameter_mm": dict(self.diameter_mm) if self.diameter_mm else None,
            "aspect": self.aspect.to_json(),
            "position": {view: np.asarray(grid).tolist() for view, grid in self.position.items()},
            "birads": {str(grade): share for grade, share in self.birads.items()},
            "frequency": self.frequency,
        }


@dataclass(frozen=True, kw_only=True, eq=False)
class Priors:
    """The priors of every category of `FINDING_CATEGORIES`, and the sources they were fitted from.

    Attributes:
        notes: text for readers of the file: formulas, sources, attribution.
        sources: {name: {"images", "boxes"}}.
        shrinkage: k of the weight n / (n + k) of a category of n boxes.
        pooled: all boxes, whatever their category.
        categories: {category: its prior}.
    """

    notes: tuple[str, ...]
    sources: Mapping[str, Mapping[str, int]]
    shrinkage: float
    pooled: CategoryPrior
    categories: Mapping[str, CategoryPrior]

    def of(self, finding_categories: tuple[str, ...] | None) -> CategoryPrior:
        """The prior of the first category that is not in `SURFACE_CATEGORIES`, else of the first category.

        Without a category (unknown, or "No Finding"), it is the pooled prior.
        """
        if not finding_categories:
            return self.pooled
        inner = [name for name in finding_categories if name not in SURFACE_CATEGORIES]
        return self.categories[(inner or finding_categories)[0]]

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the content, without white space."""
        return _digest(self.to_json())

    def to_json(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "notes": list(self.notes),
            "sources": {name: dict(counts) for name, counts in self.sources.items()},
            "shrinkage": self.shrinkage,
            "categories": {
                POOLED: self.pooled.to_json(),
                **{name: prior.to_json() for name, prior in self.categories.items()},
            },
        }

    def save(self, path: Path) -> None:
        """Writes a JSON file with lists of numbers on one line; equal priors give equal bytes."""
        text = json.dumps(self.to_json(), indent=1, allow_nan=False)
        text = re.sub(r"\[\s+(-?[\d.][^\[\]\"]*?)\s+\]", lambda found: f"[{' '.join(found[1].split())}]", text)
        atomically(path, lambda temporary: temporary.write_text(text + "\n", encoding="utf-8"))


def load_priors(path: Path | None = None) -> Priors:
    """Reads and checks a file of `Priors.save`; None = the packaged one.

    Raises:
        GBCIError: the file is absent or not such a file, or a value is out of range; names the file, the place in it
            and the value.
    """
    path = PACKAGED if path is None else path
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise GBCIError(f"{path} does not exist; expected lesion priors as gbci-fast priors writes them") from None
    except (OSError, ValueError, RecursionError) as error:
        raise GBCIError(f"{path} cannot be read as lesion priors: {error}") from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        found = content.get("format") if isinstance(content, dict) else content
        raise GBCIError(f"{path}: format is {str(found)[:60]!r}; expected {FORMAT!r}")
    reader = _Reader(path)
    names = (POOLED, *FINDING_CATEGORIES)
    entries = reader.mapping(content, "categories", names)
    priors = {name: _parse_prior(reader.inside("categories", name), name, entries[name]) for name in names}
    sources = reader.mapping(content, "sources")
    return Priors(
        notes=tuple(reader.texts(content, "notes")),
        sources={name: reader.inside("sources").counts(sources, name) for name in sources},
        shrinkage=reader.number(content, "shrinkage", low=0),
        pooled=priors.pop(POOLED),
        categories=priors,
    )


def _parse_prior(reader: "_Reader", category: str, entry: object) -> CategoryPrior:
    grades = tuple(map(str, BIRADS_OF_FINDINGS))
    shares = reader.mapping(entry, "birads", grades)
    birads = {int(grade): reader.inside("birads").number(shares, grade, low=0, high=1) for grade in grades}
    if not math.isclose(sum(birads.values()), 1, abs_tol=0.01):
        raise reader.error("birads", shares, "shares that add up to 1")
    views = reader.mapping(entry, "position", VIEW_POSITIONS)
    millimeters = None
    if entry.get("diameter_mm") is not None:
        quantiles = reader.mapping(entry, "diameter_mm", ("boxes", "p05", "median", "p95"))
        millimeters = {key: reader.inside("diameter_mm").number(quantiles, key, low=0) for key in quantiles}
    return CategoryPrior(
        category=category,
        boxes=reader.counts(entry, "boxes"),
        own_weight=reader.number(entry, "own_weight", low=0, high=1),
        diameter=_parse_log_normal(reader, entry, "diameter"),
        diameter_mm=millimeters,
        aspect=_parse_log_normal(reader, entry, "aspect"),
        position={view: reader.inside("position").grid(views, view) for view in VIEW_POSITIONS},
        birads=birads,
        frequency=reader.number(entry, "frequency", low=0),
    )


def _parse_log_normal(reader: "_Reader", entry: object, key: str) -> LogNormal:
    names = ("median", "log_sd", "low", "high")
    values = reader.mapping(entry, key, names)
    inside = reader.inside(key)
    numbers = {name: inside.number(values, name, low=1e-6, high=1e6) for name in names}
    if not numbers["low"] <= numbers["median"] <= numbers["high"]:
        raise reader.error(key, values, "low <= median <= high")
    return LogNormal(**numbers)


@dataclass(frozen=True)
class _Reader:
    """Takes values out of parsed JSON and says where one is wrong."""

    path: Path
    place: tuple[str, ...] = ()

    def inside(self, *names: str) -> "_Reader":
        return _Reader(self.path, (*self.place, *names))

    def error(self, key: str, value: object, expected: str) -> GBCIError:
        text = json.dumps(value, default=str)
        shown = text if len(text) <= 80 else f"{text[:77]}..."
        return GBCIError(f"{self.path}: {'.'.join((*self.place, key))} is {shown}; expected {expected}")

    def get(self, entry: object, key: str) -> object:
        if not isinstance(entry, dict):
            raise GBCIError(f"{self.path}: {'.'.join(self.place) or 'it'} holds no {key}; expected a JSON object")
        if key not in entry:
            raise GBCIError(f"{self.path}: {'.'.join((*self.place, key))} is missing")
        return entry[key]

    def mapping(self, entry: object, key: str, names: tuple[str, ...] | None = None) -> dict[str, Any]:
        """A JSON object; with `names`, with exactly these keys."""
        value = self.get(entry, key)
        if not isinstance(value, dict) or (names is not None and set(value) != set(names)):
            expected = "a JSON object" if names is None else f"an object of {', '.join(names)}"
            raise self.error(key, list(value) if isinstance(value, dict) else value, expected)
        return value

    def number(self, entry: object, key: str, *, low: float, high: float = 1e12) -> float:
        value = self.get(entry, key)
        if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
            raise self.error(key, value, f"a number from {low:g} to {high:g}")
        return value

    def counts(self, entry: object, key: str) -> dict[str, int]:
        value = self.mapping(entry, key)
        if not all(isinstance(count, int) and not isinstance(count, bool) and count >= 0 for count in value.values()):
            raise self.error(key, value, "whole numbers")
        return value

    def texts(self, entry: object, key: str) -> list[str]:
        value = self.get(entry, key)
        if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
            raise self.error(key, value, "a list of texts")
        return value

    def grid(self, entry: object, key: str) -> np.ndarray:
        """Weights of a position map, all positive: no place is impossible."""
        value = self.get(entry, key)
        rows = value if isinstance(value, list) and all(isinstance(row, list) for row in value) else []
        if [len(row) for row in rows] != [GRID] * GRID:
            raise self.error(key, value, f"{GRID} rows of {GRID} numbers")
        cells = {f"{row} {column}": weight for row, line in enumerate(rows) for column, weight in enumerate(line)}
        weights = [self.inside(key).number(cells, name, low=1e-6, high=1e6) for name in cells]
        return np.array(weights, np.float64).reshape(GRID, GRID)


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _interpolation(occupied: np.ndarray, size: int) -> np.ndarray:
    """Linear interpolation from cell centers to pixel centers, float64 [size, GRID]; constant beyond the outer cells.

    Args:
        occupied: indices of the rows (or columns) where the breast is; the first and last span the cells.
    """
    begin, end = occupied[0], occupied[-1] + 1
    cell = np.clip((np.arange(size) + 0.5 - begin) / (end - begin) * GRID - 0.5, 0, GRID - 1)
    return np.maximum(0.0, 1 - np.abs(cell[:, None] - np.arange(GRID)))
