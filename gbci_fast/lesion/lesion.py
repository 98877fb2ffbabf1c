"""`Lesion`: what is known of one lesion, independent of the pictures that show it."""

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from numbers import Real
from typing import Any

import msgspec

from gbci_fast.attributes import FINDING_CATEGORIES, NO_FINDING, Attributes, check_consistent
from gbci_fast.errors import GBCIError
from gbci_fast.jobs.files import digest_of

# BI-RADS atlas, 5th edition: morphology and distribution of calcifications. "round" and "punctate" are benign as a
# rule, the others suspicious.
CALCIFICATIONS = (
    "round",
    "punctate",
    "amorphous",
    "coarse heterogeneous",
    "fine pleomorphic",
    "fine linear branching",
)
DISTRIBUTIONS = ("diffuse", "regional", "grouped", "linear", "segmental")
CALCIFIED = "Suspicious Calcification"
DEPTHS = ("anterior", "middle", "posterior")
HOURS = range(1, 13)
LARGEST = 300.0  # mm, of an axis and of the distance from the nipple
SHORTEST, LONGEST = 1.0, 1e5  # days, of a doubling time


@dataclass(frozen=True, kw_only=True)
class Growth:
    """Exponential growth of a lesion's volume: after d days every axis is longer by 2^(d / (3 T)), and the shape stays.

    Attributes:
        doubling_days: T, in which the volume doubles; None = the lesion does not grow.

    Raises:
        GBCIError: a doubling time outside of 1 to 100,000 days.
    """

    doubling_days: float | None

    def __post_init__(self):
        _as_number(self, "doubling_days", SHORTEST, LONGEST, f"days from {SHORTEST:g} to {LONGEST:g}")


@dataclass(frozen=True, kw_only=True)
class Lesion:
    """One lesion, or with no category the place where none is; ``None`` means unknown.

    ``finding_categories``, ``finding_birads``, ``shape``, ``margin``, ``pathology``, ``subtlety`` and ``laterality``
    are as in `Attributes`.

    Attributes:
        axes: the three diameters in mm, the longest first.
        orientation: of the longest axis in the picture, in degrees from 0 up to 180, clockwise on the screen from the
            horizontal, with the chest wall at the left. The BI-RADS lexicon has an orientation ("parallel") for
            ultrasound alone.
        calcification, distribution: one of `CALCIFICATIONS`, one of `DISTRIBUTIONS`.
        clock: the hour of the place as seen by the examiner who faces the patient, 1 to 12.
        nipple_distance: distance from the nipple in mm.
        depth: the third of the breast, from the nipple to the chest wall: one of `DEPTHS`.
        growth: see `Growth`.

    Raises:
        GBCIError: a value outside of its vocabulary or range, or one that the categories cannot have.
    """

    finding_categories: tuple[str, ...] | None = None
    finding_birads: int | None = None
    pathology: str | None = None
    axes: tuple[float, float, float] | None = None
    shape: str | None = None
    margin: str | None = None
    orientation: float | None = None
    calcification: str | None = None
    distribution: str | None = None
    subtlety: int | None = None
    laterality: str | None = None
    clock: int | None = None
    nipple_distance: float | None = None
    depth: str | None = None
    growth: Growth | None = None

    def __post_init__(self):
        for name in ("finding_birads", "subtlety", "clock"):
            _as_whole(self, name)
        check_consistent(self.attributes())
        if self.finding_categories:  # equal lesions have equal digests
            named = tuple(name for name in FINDING_CATEGORIES if name in self.finding_categories)
            object.__setattr__(self, "finding_categories", named)
        _check_axes(self)
        _as_number(self, "orientation", 0, math.nextafter(180, 0), "degrees from 0 up to 180, without 180")
        _as_number(self, "nipple_distance", 0, LARGEST, f"mm from 0 to {LARGEST:g}")
        for name, choices in (
            ("calcification", CALCIFICATIONS),
            ("distribution", DISTRIBUTIONS),
            ("clock", HOURS),
            ("depth", DEPTHS),
        ):
            value = getattr(self, name)
            if value is not None and value not in choices:
                raise GBCIError(f"{name} is {value!r}; expected one of {', '.join(map(str, choices))}")
        for name in ("calcification", "distribution"):
            if getattr(self, name) is not None and CALCIFIED not in (self.finding_categories or (CALCIFIED,)):
                raise GBCIError(f"{name} is {getattr(self, name)!r}; expected it of {CALCIFIED} alone")
        for name in ("calcification", "distribution", "growth"):
            if self.finding_categories == () and getattr(self, name) is not None:
                raise GBCIError(f"{name} is stated beside {NO_FINDING!r}; expected none")

    def attributes(self, base: Attributes | None = None) -> Attributes:
        """The description of a picture that shows this lesion.

        Args:
            base: what is known of the picture and its breast: view, density, age, spacing. Its description of a lesion
                is replaced by this lesion's. Its side stays where this lesion's is unknown.

        Raises:
            GBCIError: the lesion lies in the other breast.
        """
        base = base or Attributes()
        if None not in (self.laterality, base.laterality) and self.laterality != base.laterality:
            raise GBCIError(f"laterality is {base.laterality!r}; the lesion lies in the breast {self.laterality!r}")
        return replace(
            base,
            laterality=self.laterality or base.laterality,
            finding_categories=self.finding_categories,
            finding_birads=self.finding_birads,
            shape=self.shape,
            margin=self.margin,
            pathology=self.pathology,
            subtlety=self.subtlety,
        )

    def to_json(self) -> dict[str, Any]:
        """The known values only, with lists instead of tuples."""
        known = {name: value for name, value in msgspec.to_builtins(self).items() if value is not None}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in known.items()}

    @classmethod
    def from_json(cls, content: Any) -> "Lesion":
        """The inverse of `to_json`.

        Raises:
            GBCIError: not an object, an unknown key, or a value of another type or outside of its range.
        """
        _check_keys("lesion", content, cls)
        if content.get("growth") is not None:
            _check_keys("growth", content["growth"], Growth)
        try:
            return msgspec.convert(content, cls)
        except msgspec.ValidationError as error:
            if isinstance(error.__cause__, GBCIError):
                raise error.__cause__ from None
            said, _, place = str(error).partition(" - at `$")
            raise GBCIError(f"{place.strip('.`') or 'lesion'}: {said[0].lower()}{said[1:].replace('`', '')}") from None


def lesion_id(lesion: Lesion, *of: object) -> str:
    """32 hexadecimal digits that stay the same for the same lesion, on every machine.

    Args:
        lesion: its description counts.
        of: what tells this lesion from others of the same description, such as the job's seed and a number.
    """
    return digest_of("lesion", json.dumps(lesion.to_json(), sort_keys=True), *of)[:32]


def _check_keys(name: str, content: Any, kind: type) -> None:
    names = [field.name for field in fields(kind)]
    if not isinstance(content, Mapping):
        raise GBCIError(f"{name} is {content!r}; expected an object with keys out of {', '.join(names)}")
    for key in content:
        if key not in names:
            raise GBCIError(f"{name} has the key {key!r}; expected out of {', '.join(names)}")


def _check_axes(lesion: Lesion) -> None:
    if lesion.axes is None:
        return
    given = list(lesion.axes) if isinstance(lesion.axes, Iterable) else []
    sizes = [float(size) for size in given if _is_number(size)]
    falling = sizes == sorted(sizes, reverse=True)
    if not len(given) == len(sizes) == 3 or not falling or not all(0 < size <= LARGEST for size in sizes):
        found = given or lesion.axes
        raise GBCIError(f"axes is {found!r}; expected three lengths in mm up to {LARGEST:g}, the longest first")
    object.__setattr__(lesion, "axes", tuple(sizes))


def _as_number(owner: Any, name: str, low: float, high: float, expected: str) -> None:
    """Makes a known value a float, so that equal lesions have equal digests; checks its range."""
    value = getattr(owner, name)
    if value is None:
        return
    if not _is_number(value) or not low <= value <= high:
        raise GBCIError(f"{name} is {value!r}; expected {expected}")
    object.__setattr__(owner, name, float(value) + 0.0)  # no negative zero


def _as_whole(owner: Any, name: str) -> None:
    """Makes a known whole number an int, so that equal lesions have equal digests and JSON."""
    value = getattr(owner, name)
    if value is None:
        return
    if not _is_number(value) or value != value // 1:
        raise GBCIError(f"{name} is {value!r}; expected a whole number")
    object.__setattr__(owner, name, int(value))


def _is_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)
