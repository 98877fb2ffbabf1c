"""The choice of a plan's lesions: evenly over categories and BI-RADS, or with the frequencies of the priors' data."""

import itertools
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from gbci_fast.attributes import FINDING_CATEGORIES, NO_FINDING
from gbci_fast.errors import GBCIError
from gbci_fast.generate.priors import Priors
from gbci_fast.jobs.files import digest_of

NATURAL = "natural"
LEARNED_CATEGORIES = ("Mass",)  # the packaged weights were trained on more than a few real cases of these only
# VinDr-Mammo marks findings from BI-RADS 3 on: 1 and 2 need no further examination.
BALANCED_VALUES = {"finding_categories": tuple((name,) for name in FINDING_CATEGORIES), "finding_birads": (3, 4, 5)}


@dataclass(frozen=True, kw_only=True)
class Balance:
    """Chooses the lesions of a plan. The choice is a pure function of the job's seed and the item's index.

    Attributes:
        lesions: every combination of the balanced attributes' values; empty = lesions are drawn from `priors`.
        given: attributes that the user has set; they are not drawn.
        priors: frequencies of categories and BI-RADS.
    """

    lesions: tuple[Mapping[str, Any], ...] = ()
    given: Mapping[str, Any] = field(default_factory=dict)
    priors: Priors

    @classmethod
    def parse(cls, text: str, given: Mapping[str, Any], priors: Priors) -> "Balance":
        """Reads "natural", or the names of the attributes to balance, separated by commas.

        "natural" draws the category by its frequency in the priors, and the BI-RADS by its share in that category.
        Attributes in `given` are not drawn.

        Raises:
            GBCIError: an attribute that cannot be balanced (density and view belong to the template), is named twice
                or is in `given`; or "natural" with priors that count no box.
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
        if given.get("finding_categories") == ():
            raise GBCIError(f"{NO_FINDING!r} is set, which has no finding_birads to balance; choose one")
        values = [BALANCED_VALUES[name] for name in names]
        lesions = tuple(dict(zip(names, lesion, strict=True)) for lesion in itertools.product(*values))
        return cls(lesions=lesions, given=given, priors=priors)

    def of(self, job_seed: int, index: int) -> dict[str, Any]:
        """The chosen attributes of item `index`.

        Every block of ``len(lesions)`` items holds each lesion once, in a random order. A fixed order would tie lesions
        to views, because templates come in a fixed order too.
        """
        if self.lesions:
            block, place = divmod(index, len(self.lesions))
            order = _stream("balance", job_seed, block).permutation(len(self.lesions))
            return dict(self.lesions[order[place]])
        return {name: value for name, value in self._draw(job_seed, index).items() if name not in self.given}

    def _draw(self, job_seed: int, index: int) -> dict[str, Any]:
        rng = _stream(NATURAL, job_seed, index)
        frequencies = np.array([prior.frequency for prior in self.priors.categories.values()])
        names = tuple(self.priors.categories)
        category = (names[rng.choice(len(names), p=frequencies / frequencies.sum())],)
        categories = self.given.get("finding_categories", category)
        shares = self.priors.of(categories).birads
        total = sum(shares.values())
        grade = int(rng.choice(list(shares), p=[share / total for share in shares.values()]))
        return {"finding_categories": category, "finding_birads": None if categories == () else grade}


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
