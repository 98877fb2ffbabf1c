"""Priors: size, aspect and position of lesions per finding category, and pathology, shape and margin of masses.

They are statistics of annotations in a JSON file that `fit_priors` (`gbci_fast.generate.prior_fit`,
``gbci-fast priors``) makes. Automatic masks and ``--balance natural`` draw from them.
"""

import hashlib
import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

import msgspec
import numpy as np
from msgspec import Meta
from scipy.special import ndtr, ndtri

from gbci_fast.attributes import FINDING_CATEGORIES, MARGINS, PATHOLOGIES, SHAPES, VIEW_POSITIONS
from gbci_fast.errors import GBCIError
from gbci_fast.jobs.files import atomically

PACKAGED = Path(__file__).parent / "priors.json"
FORMAT = "gbci_fast lesion priors 2"
FORMAT_WITHOUT_MASSES = "gbci_fast lesion priors 1"
POOLED = "all categories"
# Findings of the skin, the nipple or the axilla. A box that also names another category outlines the other one.
SURFACE_CATEGORIES = ("Skin Thickening", "Suspicious Lymph Node", "Nipple Retraction", "Skin Retraction")
BIRADS_OF_FINDINGS = (2, 3, 4, 5)
GRID = 8  # cells of a position map along each side


Count = Annotated[int, Meta(ge=0)]
# A whole number stays one, because the digest of the priors is that of their JSON text.
Share = Annotated[int, Meta(ge=0, le=1)] | Annotated[float, Meta(ge=0, le=1)]
Amount = Annotated[int, Meta(ge=0, le=10**12)] | Annotated[float, Meta(ge=0, le=1e12)]
Positive = Annotated[int, Meta(ge=1, le=10**6)] | Annotated[float, Meta(ge=1e-6, le=1e6)]
Cells = Annotated[list[Positive], Meta(min_length=GRID, max_length=GRID)]


class LogNormal(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A log-normal distribution, cut to the observed range.

    Attributes:
        median: of the distribution before the cut.
        log_sd: standard deviation of the natural logarithm.
        low, high: the range of drawn values.

    Raises:
        GBCIError: the median does not lie between `low` and `high`.
    """

    median: Positive
    log_sd: Positive
    low: Positive
    high: Positive

    def __post_init__(self):
        if not self.low <= self.median <= self.high:
            raise GBCIError("Expected low <= median <= high")

    def draw(self, rng: np.random.Generator, limits: tuple[float, float] = (0.0, math.inf)) -> float:
        """Draws a value within `low` to `high` and `limits`; returns the nearer limit where the two do not overlap."""
        low, high = np.clip((self.low, self.high), *limits)
        inside = ndtr((np.log((low, high)) - np.log(self.median)) / self.log_sd)
        value = self.median * np.exp(self.log_sd * ndtri(rng.uniform(*inside)))
        return float(np.clip(value, low, high))


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
        """As in the file, see `_Entry`."""
        return {
            "boxes": dict(self.boxes),
            "own_weight": self.own_weight,
            "diameter": msgspec.structs.asdict(self.diameter),
            "diameter_mm": dict(self.diameter_mm) if self.diameter_mm else None,
            "aspect": msgspec.structs.asdict(self.aspect),
            "position": {view: np.asarray(grid).tolist() for view, grid in self.position.items()},
            "birads": {str(grade): share for grade, share in self.birads.items()},
            "frequency": self.frequency,
        }


@dataclass(frozen=True, kw_only=True, eq=False)
class MassPrior:
    """Pathology, shape and margin of masses.

    Attributes:
        boxes: number of boxes of known pathology per source.
        malignant: share of malignant masses, by BI-RADS.
        forms: {pathology: {BI-RADS: float [4, 5]}}, shares of `SHAPES` (rows) and `MARGINS` (columns), which add up
            to 1.
    """

    boxes: Mapping[str, int]
    malignant: Mapping[int, float]
    forms: Mapping[str, Mapping[int, np.ndarray]]

    def joint(self, birads: Mapping[int, float]) -> np.ndarray:
        """Shares of BI-RADS, pathology, shape and margin, float64 [4, 2, 4, 5], up to a factor.

        Args:
            birads: shares of the BI-RADS categories (`CategoryPrior.birads`).
        """
        benign, malignant = PATHOLOGIES
        return np.array(
            [
                [
                    birads[grade] * (1 - self.malignant[grade]) * self.forms[benign][grade],
                    birads[grade] * self.malignant[grade] * self.forms[malignant][grade],
                ]
                for grade in BIRADS_OF_FINDINGS
            ]
        )

    def to_json(self) -> dict[str, Any]:
        """As in the file, see `Masses`."""
        return {
            "boxes": dict(self.boxes),
            "malignant": {str(grade): share for grade, share in self.malignant.items()},
            "forms": {
                pathology: {
                    str(grade): dict(zip(SHAPES, np.asarray(form).tolist(), strict=True))
                    for grade, form in forms.items()
                }
                for pathology, forms in self.forms.items()
            },
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
        masses: pathology and form of masses; None = unknown, as in files of `FORMAT_WITHOUT_MASSES`.
    """

    notes: tuple[str, ...]
    sources: Mapping[str, Mapping[str, int]]
    shrinkage: float
    pooled: CategoryPrior
    categories: Mapping[str, CategoryPrior]
    masses: MassPrior | None = None

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
            "format": FORMAT_WITHOUT_MASSES if self.masses is None else FORMAT,
            "notes": list(self.notes),
            "sources": {name: dict(counts) for name, counts in self.sources.items()},
            "shrinkage": self.shrinkage,
            **({} if self.masses is None else {"masses": self.masses.to_json()}),
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
    found = content.get("format") if isinstance(content, dict) else content
    if found not in (FORMAT, FORMAT_WITHOUT_MASSES):
        raise GBCIError(f"{path}: format is {str(found)[:60]!r}; expected {FORMAT!r}")
    try:
        file: Any = msgspec.convert(content, _FileWithMasses if found == FORMAT else _File)
    except msgspec.ValidationError as error:
        raise GBCIError(f"{path}: {_sentence(str(error), content)}") from None
    entries = dict(zip((POOLED, *FINDING_CATEGORIES), msgspec.structs.astuple(file.categories), strict=True))
    priors = {name: entry.prior(name) for name, entry in entries.items()}
    return Priors(
        notes=tuple(file.notes),
        sources=file.sources,
        shrinkage=file.shrinkage,
        pooled=priors.pop(POOLED),
        categories=priors,
        masses=_masses(file.masses) if found == FORMAT else None,
    )


def _object(names: Iterable[str], value: Any, **methods: Any) -> type[msgspec.Struct]:
    """The type of a JSON object of exactly these keys, every one with a value of that type."""
    fields = [(f"field_{i}", value, msgspec.field(name=name)) for i, name in enumerate(names)]
    return msgspec.defstruct("Object", fields, namespace=methods, forbid_unknown_fields=True)


def _add_up(shares: msgspec.Struct) -> None:
    if not math.isclose(sum(msgspec.structs.astuple(shares)), 1, abs_tol=0.01):
        raise ValueError("Expected shares that add up to 1")


Views = _object(VIEW_POSITIONS, Annotated[list[Cells], Meta(min_length=GRID, max_length=GRID)])
Grades = _object(map(str, BIRADS_OF_FINDINGS), Share, __post_init__=_add_up)


def _form(table: msgspec.Struct) -> None:
    if not math.isclose(sum(map(sum, msgspec.structs.astuple(table))), 1, abs_tol=0.01):
        raise ValueError("Expected shares that add up to 1")


Form = _object(
    SHAPES, Annotated[list[Share], Meta(min_length=len(MARGINS), max_length=len(MARGINS))], __post_init__=_form
)


class _Quantiles(msgspec.Struct, forbid_unknown_fields=True):
    boxes: Count
    p05: Amount
    median: Amount
    p95: Amount


class _Entry(msgspec.Struct):
    """`CategoryPrior` in the file."""

    boxes: dict[str, Count]
    own_weight: Share
    diameter: LogNormal
    aspect: LogNormal
    position: Views
    birads: Grades
    frequency: Amount
    diameter_mm: _Quantiles | None = None

    def prior(self, category: str) -> CategoryPrior:
        grids = map(np.array, msgspec.structs.astuple(self.position))
        return CategoryPrior(
            category=category,
            boxes=self.boxes,
            own_weight=self.own_weight,
            diameter=self.diameter,
            diameter_mm=None if self.diameter_mm is None else msgspec.structs.asdict(self.diameter_mm),
            aspect=self.aspect,
            position=dict(zip(VIEW_POSITIONS, grids, strict=True)),
            birads=dict(zip(BIRADS_OF_FINDINGS, msgspec.structs.astuple(self.birads), strict=True)),
            frequency=self.frequency,
        )


def _masses(file: Any) -> MassPrior:
    """`MassPrior` of its place in the file."""
    by_pathology = [
        {
            grade: np.array(msgspec.structs.astuple(form))
            for grade, form in zip(BIRADS_OF_FINDINGS, msgspec.structs.astuple(forms), strict=True)
        }
        for forms in msgspec.structs.astuple(file.forms)
    ]
    return MassPrior(
        boxes=file.boxes,
        malignant=dict(zip(BIRADS_OF_FINDINGS, msgspec.structs.astuple(file.malignant), strict=True)),
        forms=dict(zip(PATHOLOGIES, by_pathology, strict=True)),
    )


Masses = msgspec.defstruct(
    "Masses",
    [
        ("boxes", dict[str, Count]),
        ("malignant", _object(map(str, BIRADS_OF_FINDINGS), Share)),
        ("forms", _object(PATHOLOGIES, _object(map(str, BIRADS_OF_FINDINGS), Form))),
    ],
    forbid_unknown_fields=True,
)


class _File(msgspec.Struct):
    """`Priors` in the file of `FORMAT_WITHOUT_MASSES`."""

    notes: list[str]
    sources: dict[str, dict[str, Count]]
    shrinkage: Amount
    categories: _object((POOLED, *FINDING_CATEGORIES), _Entry)


_FileWithMasses = msgspec.defstruct("_FileWithMasses", [("masses", Masses)], bases=(_File,), kw_only=True)
"""`Priors` in the file of `FORMAT`."""


def _sentence(error: str, content: Any) -> str:
    """The sentence for an error of msgspec: the place of the value, the value, and what was expected."""
    said, _, place = error.replace("[...]", "").partition(" - at `$")
    said = said.replace("int | float", "number").replace(
        "`int` >= 1", "number >= 1e-06"
    )  # the whole part of `Positive`
    place = place.strip(".`")
    for name, index in re.findall(r"([^.\[\]]+)|\[(\d+)\]", place):
        content = content[name] if name else content[int(index)]
    for message, expected in (("missing required", "expected the"), ("contains unknown", "expected no")):
        if said.startswith(f"Object {message}"):
            said, content = said.replace(f"Object {message}", expected), list(content)
    shown = json.dumps(content)
    shown = shown if len(shown) <= 80 else f"{shown[:77]}..."
    return f"{place or 'it'} is {shown}; {said[0].lower()}{said[1:].replace('`', '')}"


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
