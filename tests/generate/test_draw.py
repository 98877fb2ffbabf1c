"""Drawn lesions: values go together, what is given stays, and what the priors do not know stays unknown."""

import dataclasses
from collections import Counter

import numpy as np
import pytest

from gbci_fast.attributes import MARGINS, PATHOLOGIES, SHAPES
from gbci_fast.errors import GBCIError
from gbci_fast.generate.draw import draw_lesion
from gbci_fast.generate.priors import load_priors
from gbci_fast.lesion.lesion import Growth, Lesion


@pytest.fixture(scope="module")
def priors():
    return load_priors()


@pytest.fixture(scope="module")
def draw(priors):
    """`draw(count, **given)`: lesions drawn from the packaged priors."""

    def call(count, priors=priors, **given):
        rng = np.random.default_rng(0)
        return [draw_lesion(priors, rng, given) for _ in range(count)]

    return call


def shares(lesions, name):
    counts = Counter(getattr(lesion, name) for lesion in lesions)
    return {value: count / len(lesions) for value, count in counts.items()}


def test_masses_follow_the_priors(priors, draw):
    """Every marginal of 4,000 masses is that of the priors, within 4 standard errors."""
    lesions = draw(4000, finding_categories=("Mass",))
    joint = priors.masses.joint(priors.of(("Mass",)).birads)
    joint /= joint.sum()
    for axis, (name, values) in enumerate(
        {"finding_birads": (2, 3, 4, 5), "pathology": PATHOLOGIES, "shape": SHAPES, "margin": MARGINS}.items()
    ):
        expected = joint.sum(axis=tuple(i for i in range(4) if i != axis))
        drawn = shares(lesions, name)
        np.testing.assert_allclose([drawn[value] for value in values], expected, atol=0.032)
    spiculated = [lesion for lesion in lesions if lesion.margin == "spiculated"]
    assert shares(spiculated, "shape")["irregular"] == pytest.approx(
        joint[:, :, 3, 4].sum() / joint[:, :, :, 4].sum(), abs=0.06
    )


def test_draws_are_conditional_in_both_directions(draw):
    spiculated, circumscribed = draw(400, margin="spiculated"), draw(400, margin="circumscribed")
    assert {lesion.finding_categories for lesion in spiculated} == {("Mass",)}
    assert shares(spiculated, "pathology")["malignant"] > 0.85
    assert shares(circumscribed, "pathology")["benign"] > 0.8
    assert shares(spiculated, "finding_birads")[5] > 3 * shares(circumscribed, "finding_birads").get(5, 0)
    benign = draw(400, finding_categories=("Mass",), pathology="benign")
    assert shares(benign, "margin")["spiculated"] < 0.1 < shares(draw(400, finding_birads=5), "margin")["spiculated"]


def test_what_is_given_stays(draw):
    given = {
        "finding_categories": ("Mass",),
        "finding_birads": 2,
        "pathology": "malignant",
        "shape": "irregular",
        "margin": "spiculated",
        "subtlety": 3,
        "axes": (12.0, 10.0, 8.0),
        "growth": Growth(doubling_days=100.0),
        "laterality": "R",
    }
    assert draw(1, **given) == [Lesion(**given)]
    unknown = draw(50, finding_categories=("Mass",), margin=None, growth=None, finding_birads=None)
    assert {(lesion.margin, lesion.growth, lesion.finding_birads) for lesion in unknown} == {(None, None, None)}
    assert None not in shares(unknown, "shape")
    # BI-RADS 1 is in no table, and restricts nothing.
    assert shares(draw(300, finding_categories=("Mass",), finding_birads=1), "pathology")["benign"] > 0.3


def test_only_malignant_lesions_have_a_growth(draw):
    lesions = draw(3000, finding_categories=("Mass",))
    assert {lesion.growth for lesion in lesions if lesion.pathology == "benign"} == {None}
    days = np.array([lesion.growth.doubling_days for lesion in lesions if lesion.pathology == "malignant"])
    assert np.median(days) == pytest.approx(258, rel=0.06)
    assert np.std(np.log(days)) == pytest.approx(0.53, rel=0.06)


def test_other_findings_have_no_form(draw):
    lesions = draw(100, finding_categories=("Asymmetry",))
    assert {(each.pathology, each.shape, each.margin, each.growth) for each in lesions} == {(None, None, None, None)}
    assert len(shares(lesions, "finding_birads")) > 1
    assert draw(1, finding_categories=()) == [Lesion(finding_categories=())]
    assert {each.finding_categories for each in draw(20, calcification="amorphous")} == {("Suspicious Calcification",)}


def test_priors_without_masses_leave_the_form_unknown(priors, draw):
    old = dataclasses.replace(priors, masses=None)
    lesions = draw(50, priors=old, finding_categories=("Mass",))
    assert {(each.pathology, each.shape, each.margin) for each in lesions} == {(None, None, None)}
    assert draw(1, priors=old, shape="oval")[0].shape == "oval"


def test_refusals(priors, draw):
    with pytest.raises(GBCIError, match="'view' is no property of a lesion that can be given"):
        draw(1, view="CC")
    with pytest.raises(GBCIError, match="margin is 'obscured' beside 'No Finding'; expected none"):
        draw(1, finding_categories=(), margin="obscured")
    forms = {name: dict.fromkeys((2, 3, 4, 5), np.eye(4, 5)) for name in PATHOLOGIES}
    rounded = dataclasses.replace(priors, masses=dataclasses.replace(priors.masses, forms=forms))
    with pytest.raises(GBCIError, match="the priors know no mass of shape oval, margin spiculated; set fewer of these"):
        draw(1, priors=rounded, shape="oval", margin="spiculated")
