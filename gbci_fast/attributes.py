"""The vocabulary that describes a mammogram and a lesion: the values of VinDr-Mammo's annotations."""

import ast
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from gbci_fast.errors import GBCIError

LATERALITIES = ("L", "R")
VIEW_POSITIONS = ("CC", "MLO")
BREAST_DENSITIES = ("A", "B", "C", "D")
BIRADS = (1, 2, 3, 4, 5)
NO_FINDING = "No Finding"
FINDING_CATEGORIES = (
    "Mass",
    "Suspicious Calcification",
    "Focal Asymmetry",
    "Architectural Distortion",
    "Asymmetry",
    "Skin Thickening",
    "Suspicious Lymph Node",
    "Nipple Retraction",
    "Global Asymmetry",
    "Skin Retraction",
)
SHAPES = ("round", "oval", "lobulated", "irregular")
MARGINS = ("circumscribed", "obscured", "microlobulated", "indistinct", "spiculated")
PATHOLOGIES = ("benign", "malignant")
SUBTLETIES = (1, 2, 3, 4, 5)
UNKNOWN_TEXT = ("", "nan", "none", "unknown")
# What a condition encoder can be told, in the order of its tokens. A checkpoint's config names those that it knows.
CONDITIONED = (
    "laterality",
    "view_position",
    "breast_density",
    "breast_birads",
    "finding_birads",
    "finding_categories",
    "age",
    "pixel_spacing",
    "shape",
    "margin",
    "pathology",
    "subtlety",
)
OF_MASSES = ("shape", "margin")  # attributes that the BI-RADS lexicon gives masses alone
OF_FINDINGS = ("finding_birads", *OF_MASSES, "pathology", "subtlety")  # attributes that "No Finding" has not


@dataclass(frozen=True, kw_only=True)
class Attributes:
    """Description of one lesion (or of its absence) and of its breast; ``None`` means unknown.

    ``finding_categories`` is a tuple of `FINDING_CATEGORIES`; the empty tuple means "No Finding".
    ``shape`` and ``margin`` are a mass's, in the words of the BI-RADS lexicon ("lobulated" is the fourth edition's).
    ``pathology`` is what a biopsy would find. ``subtlety`` runs from 1, hardly visible, to 5, obvious, as in CBIS-DDSM.
    ``age`` is in years, ``pixel_spacing`` in mm per pixel of the *model* image.

    Raises:
        GBCIError: a value outside the vocabulary or range.
    """

    laterality: str | None = None
    view_position: str | None = None
    breast_density: str | None = None
    breast_birads: int | None = None
    finding_categories: tuple[str, ...] | None = None
    finding_birads: int | None = None
    shape: str | None = None
    margin: str | None = None
    pathology: str | None = None
    subtlety: int | None = None
    age: float | None = None
    pixel_spacing: float | None = None

    def __post_init__(self):
        _check_choice("laterality", self.laterality, LATERALITIES)
        _check_choice("view_position", self.view_position, VIEW_POSITIONS)
        _check_choice("breast_density", self.breast_density, BREAST_DENSITIES)
        _check_choice("breast_birads", self.breast_birads, BIRADS)
        _check_choice("finding_birads", self.finding_birads, BIRADS)
        _check_choice("shape", self.shape, SHAPES)
        _check_choice("margin", self.margin, MARGINS)
        _check_choice("pathology", self.pathology, PATHOLOGIES)
        _check_choice("subtlety", self.subtlety, SUBTLETIES)
        for category in self.finding_categories or ():
            _check_choice("finding_categories", category, FINDING_CATEGORIES)
        if self.age is not None and not 0 <= self.age <= 120:
            raise GBCIError(f"age is {self.age!r}; expected years from 0 to 120")
        if self.pixel_spacing is not None and not 0.01 <= self.pixel_spacing <= 10:
            raise GBCIError(f"pixel_spacing is {self.pixel_spacing!r}; expected mm per pixel from 0.01 to 10")

    @classmethod
    def from_mapping(cls, mapping: Mapping[str, Any]) -> "Attributes":
        """Attributes from VinDr's spellings ("BI-RADS 4", "DENSITY C", "['Mass']") or plain values (4, "C", ["Mass"]).

        Raises:
            GBCIError: not a mapping, an unknown key, or a value outside the vocabulary.
        """
        if not isinstance(mapping, Mapping):
            raise GBCIError(f"attributes hold {mapping!r}; expected Attributes or a mapping")
        names = [field.name for field in fields(cls)]
        for key in mapping:
            if key not in names:
                raise GBCIError(f"attribute {key!r} is not known; expected one of {', '.join(names)}")
        return cls(**{key: _PARSERS[key](key, value) for key, value in mapping.items()})

    def to_mapping(self) -> dict[str, Any]:
        """The known values only, with lists instead of tuples (for JSON and the manifest)."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        known = {name: value for name, value in values.items() if value is not None}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in known.items()}


def check_consistent(attributes: Attributes) -> None:
    """Checks that a description states nothing that its categories cannot have.

    "No Finding" has none of `OF_FINDINGS`, and a finding that is no mass none of `OF_MASSES`. Unknown categories may
    have any.

    Raises:
        GBCIError: it does.
    """
    categories = attributes.finding_categories
    for name in impossible(categories):
        value = getattr(attributes, name)
        if value is not None and categories:
            raise GBCIError(f"{name} is {value!r} beside {', '.join(categories)}; expected it of a Mass alone")
        if value is not None:
            raise GBCIError(f"{name} is {value!r} beside {NO_FINDING!r}; expected none")


def consistent(attributes: Attributes) -> Attributes:
    """The description, with what its categories cannot have as unknown (see `check_consistent`)."""
    return replace(attributes, **dict.fromkeys(impossible(attributes.finding_categories)))


def impossible(categories: tuple[str, ...] | None) -> tuple[str, ...]:
    """Names of the attributes that findings of these categories cannot have; none where the categories are unknown."""
    if categories is None or "Mass" in categories:
        return ()
    return OF_MASSES if categories else OF_FINDINGS


def parse_categories(key: str, value: Any) -> tuple[str, ...] | None:
    """Finding categories as a tuple in the order of `FINDING_CATEGORIES`; None if unknown.

    ``value`` is a list, a Python list as a string (VinDr's format), or names separated by commas. The empty list and
    "No Finding" both give the empty tuple.

    Raises:
        GBCIError: another type, an unknown category, or "No Finding" beside a finding; the message begins with ``key``.
    """
    if is_unknown(value):
        return None
    if isinstance(value, str):
        text = value.strip()
        if text.startswith("["):
            try:
                value = ast.literal_eval(text)
            except (ValueError, SyntaxError, RecursionError, MemoryError):  # the last two: nested too deeply
                raise GBCIError(f"{key} is {text!r}; expected a list such as ['Mass']") from None
        else:
            value = [part.strip() for part in text.split(",")]
    if not isinstance(value, list | tuple | set | frozenset) or not all(isinstance(v, str) for v in value):
        raise GBCIError(f"{key} is {value!r}; expected a list of category names such as ['Mass']")
    names = [name for name in value if name != NO_FINDING]
    for name in names:
        _check_choice(key, name, FINDING_CATEGORIES)
    if names and len(names) != len(value):
        raise GBCIError(f"{key} is {list(value)!r}; {NO_FINDING!r} cannot stand beside a finding")
    return tuple(name for name in FINDING_CATEGORIES if name in names)


def parse_pathology(key: str, value: Any) -> str | None:
    """ "benign" or "malignant"; None if unknown or undecided.

    In the tables of CBIS-DDSM "benign_without_callback" is benign, and "benign|malignant" stands for two lesions.

    Raises:
        GBCIError: another word; the message begins with ``key``.
    """
    if is_unknown(value):
        return None
    words = {part.strip().removesuffix("_without_callback") for part in str(value).lower().split("|")}
    for word in sorted(words):
        _check_choice(key, word, PATHOLOGIES)
    return words.pop() if len(words) == 1 else None


def is_unknown(value: Any) -> bool:
    """Whether a value means "unknown": None, NaN, blank, or one of `UNKNOWN_TEXT`."""
    if value is None or (isinstance(value, float) and value != value):
        return True
    return isinstance(value, str) and value.strip().lower() in UNKNOWN_TEXT


def _parse_token(key: str, value: Any) -> str | None:
    return None if is_unknown(value) else re.sub(r"^DENSITY\s+", "", str(value).strip().upper())


def _parse_birads(key: str, value: Any) -> int | None:
    if is_unknown(value):
        return None
    text = re.sub(r"^BI-?RADS\s*", "", str(value).strip(), flags=re.IGNORECASE)
    if not re.fullmatch(r"\d(\.0)?", text):
        raise GBCIError(f"{key} is {value!r}; expected a BI-RADS category such as 'BI-RADS 4'")
    return int(float(text))


def _parse_word(key: str, value: Any) -> str | None:
    return None if is_unknown(value) else str(value).strip().lower()


def _parse_subtlety(key: str, value: Any) -> int | None:
    number = _parse_number(key, value)
    if number is not None and number not in SUBTLETIES:
        raise GBCIError(f"{key} is {value!r}; expected a whole number from 1 to 5")
    return None if number is None else int(number)


def _parse_number(key: str, value: Any) -> float | None:
    if is_unknown(value):
        return None
    try:
        return float(value)
    except (TypeError, ValueError):
        raise GBCIError(f"{key} is {value!r}; expected a number") from None


def _check_choice(key: str, value: Any, choices: tuple) -> None:
    if value is not None and value not in choices:
        raise GBCIError(f"{key} is {value!r}; expected one of {', '.join(map(str, choices))}")


_PARSERS = {
    "laterality": _parse_token,
    "view_position": _parse_token,
    "breast_density": _parse_token,
    "breast_birads": _parse_birads,
    "finding_categories": parse_categories,
    "finding_birads": _parse_birads,
    "shape": _parse_word,
    "margin": _parse_word,
    "pathology": parse_pathology,
    "subtlety": _parse_subtlety,
    "age": _parse_number,
    "pixel_spacing": _parse_number,
}
