"""The choice of a plan's lesions: evenly over values of attributes, or with the frequencies of the priors' data."""

import itertools
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np

from gbci_fast.attributes import (
    FINDING_CATEGORIES,
    MARGINS,
    NO_FINDING,
    OF_FINDINGS,
    PATHOLOGIES,
    SHAPES,
    SUBTLETIES,
    Attributes,
    consistent,
    impossible,
)
from gbci_fast.errors import GBCIError
from gbci_fast.generate.draw import draw_lesion
from gbci_fast.generate.priors import Priors
from gbci_fast.jobs.files import digest_of
from gbci_fast.lesion.lesion import Lesion

NATURAL = "natural"
LEARNED_CATEGORIES = ("Mass",)  # the packaged weights were trained on more than a few real cases of these only
# VinDr-Mammo marks findings from BI-RADS 3 on: 1 and 2 need no further examination.
BALANCED_VALUES = {
    "finding_categories": tuple((name,) for name in FINDING_CATEGORIES),
    "finding_birads": (3, 4, 5),
    "shape": SHAPES,
    "margin": MARGINS,
    "pathology": PATHOLOGIES,
    "subtlety": SUBTLETIES,
}
DRAWN = ("finding_categories", *OF_FINDINGS, "growth")


@dataclass(frozen=True, kw_only=True)
class Balance:
    """Chooses the lesions of a plan. The choice is a pure function of the job's seed and the item's index.

    Attributes:
        lesions: every combination of the balanced attributes' values that a lesion can have; empty = lesions are drawn
            from `priors` (see `draw_lesion`).
        given: attributes that the user has set; they are not drawn.
        priors: frequencies of categories, BI-RADS and forms of masses.
    """

    lesions: tuple[Mapping[str, Any], ...] = ()
    given: Mapping[str, Any] = field(default_factory=dict)
    priors: Priors

    @classmethod
    def parse(cls, text: str, given: Mapping[str, Any], priors: Priors) -> "Balance":
        """Reads "natural", or the names of the attributes to balance, separated by commas.

        "natural" draws the category by its frequency in the priors, the BI-RADS by its share in that category, and of a
        mass pathology, shape and margin. Attributes in `given` are not drawn, and the others are drawn given them.

        Raises:
            GBCIError: an attribute that cannot be balanced (density and view belong to the template), is named twice,
                is in `given`, or is none of the given categories'; or "natural" with priors that count no box.
        """
        if text == NATURAL:
            if not sum(prior.frequency for prior in priors.categories.values()):
                raise GBCIError("the priors count no box in any category; --balance natural has nothing to draw from")
            return cls(given=given, priors=priors)
        names = [name.strip() for name in text.split(",")]
        for name in names:
            if name not in BALANCED_VALUES:
                raise GBCIError(f"balance is {name!r}; expected {NATURAL} or out of {', '.join(BALANCED_VALUES)}")
            if name in given:
                raise GBCIError(f"{name} is both set and balanced; choose one")
            if names.count(name) > 1:
                raise GBCIError(f"balance names {name} twice; expected each attribute once")
        if without := set(names) & set(impossible(given.get("finding_categories"))):
            told = ", ".join(given["finding_categories"]) or NO_FINDING
            raise GBCIError(f"{told!r} is set, which has no {min(without)} to balance; choose one")
        values = [BALANCED_VALUES[name] for name in names]
        chosen = [dict(zip(names, lesion, strict=True)) for lesion in itertools.product(*values)]
        # A shape is none of a calcification's: such combinations are one, without a shape.
        categories = {name: value for name, value in given.items() if name == "finding_categories"}
        possible = [consistent(Attributes(**{**categories, **lesion})) for lesion in chosen]
        lesions = [{name: getattr(lesion, name) for name in names} for lesion in dict.fromkeys(possible)]
        return cls(lesions=tuple(lesions), given=given, priors=priors)

    def of(self, job_seed: int, index: int) -> dict[str, Any]:
        """The chosen properties of item `index`'s lesion (fields of `Lesion`).

        Every block of ``len(lesions)`` items holds each lesion once, in a random order. A fixed order would tie lesions
        to views, because templates come in a fixed order too.
        """
        if self.lesions:
            block, place = divmod(index, len(self.lesions))
            order = _stream("balance", job_seed, block).permutation(len(self.lesions))
            return dict(self.lesions[order[place]])
        named = {each.name for each in fields(Lesion)}
        given = {name: value for name, value in self.given.items() if name in named}
        drawn = draw_lesion(self.priors, _stream(NATURAL, job_seed, index), given)
        return {name: getattr(drawn, name) for name in DRAWN if name not in self.given}


def hardly_learned(categories: Iterable[tuple[str, ...] | None]) -> Counter[str]:
    """Counts the lesions of a plan by category, for categories that the packaged weights have not learned.

    Args:
        categories: the finding categories of every item. Items without a finding, of unknown category, or with at
            least one of `LEARNED_CATEGORIES` are not counted.
    """
    unlike = (names for names in categories if names and not set(names) & set(LEARNED_CATEGORIES))
    return Counter(", ".join(names) for names in unlike)


def _stream(*names: object) -> np.random.Generator:
    """An independent random stream for every tuple of names."""
    return np.random.default_rng(int(digest_of(*names), 16))
