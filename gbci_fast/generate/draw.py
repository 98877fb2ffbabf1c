"""Draws lesions from priors, with some of their properties given."""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import numpy as np

from gbci_fast.attributes import MARGINS, OF_MASSES, PATHOLOGIES, SHAPES
from gbci_fast.errors import GBCIError
from gbci_fast.generate.priors import BIRADS_OF_FINDINGS, LogNormal, MassPrior, Priors
from gbci_fast.lesion.lesion import CALCIFIED, Growth, Lesion

# Volume doubling time of cancers in days. Median and deviation give the mean of 297 and the standard deviation of 169
# that were measured in Malmö's screening program; the range is that of Fournier et al. (Cancer 45, 1980).
DOUBLING_DAYS = LogNormal(median=258, log_sd=0.53, low=44, high=1869)
# The axes of `MassPrior.joint`.
_JOINT = {"finding_birads": BIRADS_OF_FINDINGS, "pathology": PATHOLOGIES, "shape": SHAPES, "margin": MARGINS}


def draw_lesion(priors: Priors, rng: np.random.Generator, given: Mapping[str, Any]) -> Lesion:
    """Draws what is not given: category, BI-RADS, pathology, shape, margin and growth; the rest stays unknown.

    Every value is drawn given all the others, so that a spiculated mass is mostly malignant and a benign one mostly
    circumscribed. Pathology, shape and margin are drawn for masses alone, and growth for malignant lesions: of others
    the priors know nothing. A given shape or margin makes the lesion a mass.

    Args:
        priors: the frequencies.
        rng: the generator of all draws.
        given: values of `Lesion` fields; None = unknown, and not drawn.

    Raises:
        GBCIError: an unknown name, or values that do not go together.
    """
    if unknown := set(given) - {field.name for field in fields(Lesion)}:
        raise GBCIError(f"{min(unknown)!r} is no property of a lesion that can be given")
    known = {name: value for name, value in given.items() if value is not None}
    drawn: dict[str, Any] = {"finding_categories": _draw_category(priors, rng, known)}
    categories = given.get("finding_categories", drawn["finding_categories"])
    if categories == ():
        return Lesion(**given)
    shares = priors.of(categories).birads
    if categories is not None and "Mass" in categories and priors.masses is not None:
        drawn |= _draw_mass(priors.masses, shares, rng, known)
    else:
        drawn["finding_birads"] = _choose(rng, list(shares), np.array([*shares.values()]))
    if given.get("pathology", drawn.get("pathology")) == "malignant":
        drawn["growth"] = Growth(doubling_days=DOUBLING_DAYS.draw(rng))
    return Lesion(**{**drawn, **given})


def _draw_category(priors: Priors, rng: np.random.Generator, known: Mapping[str, Any]) -> tuple[str, ...]:
    drawn = _choose(rng, list(priors.categories), np.array([each.frequency for each in priors.categories.values()]))
    if any(name in known for name in OF_MASSES):
        return ("Mass",)
    return (CALCIFIED,) if {"calcification", "distribution"} & set(known) else (drawn,)


def _draw_mass(
    masses: MassPrior, birads: Mapping[int, float], rng: np.random.Generator, known: Mapping[str, Any]
) -> dict[str, Any]:
    """Draws BI-RADS, pathology, shape and margin from their joint shares, one after the other, given what is known."""
    # The frequency of a given grade does not matter, and may be 0.
    joint = masses.joint(dict.fromkeys(birads, 1.0) if known.get("finding_birads") in birads else birads)
    for axis, (name, values) in enumerate(_JOINT.items()):
        if known.get(name) in values:  # BI-RADS 1 is no grade of a finding: it says nothing of the others
            np.moveaxis(joint, axis, 0)[np.arange(len(values)) != values.index(known[name])] = 0
    if not joint.any():
        told = ", ".join(f"{name} {known[name]}" for name in _JOINT if name in known)
        raise GBCIError(f"the priors know no mass of {told}; set fewer of these")
    drawn = {}
    for name, values in _JOINT.items():
        drawn[name] = _choose(rng, values, joint.sum(axis=tuple(range(1, joint.ndim))))
        joint = joint[values.index(drawn[name])]
    return drawn


def _choose(rng: np.random.Generator, values: Any, shares: np.ndarray) -> Any:
    return values[rng.choice(len(values), p=shares / shares.sum())]
