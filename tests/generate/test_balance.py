"""Balanced plans: evenly over values, or as frequent as in the priors, and independent of everything else."""

import dataclasses
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from gbci_fast.attributes import FINDING_CATEGORIES, MARGINS, PATHOLOGIES, Attributes
from gbci_fast.data.vindr import Finding, ImageRecord
from gbci_fast.errors import GBCIError
from gbci_fast.generate.plan import make_plan
from gbci_fast.generate.priors import load_priors

RECORDS = [ImageRecord(study_id="s", image_id=f"{i}", path=Path(f"{i}.dcm")) for i in range(12)]


def lesions(variants=5, seed=0, **options):
    plan = make_plan(RECORDS, variants=variants, seed=seed, **options)
    return [(item.attributes.finding_categories, item.attributes.finding_birads) for item in plan]


def test_every_combination_equally_often():
    counts = Counter(lesions(balance="finding_categories, finding_birads"))
    assert counts == {((name,), grade): 2 for name in FINDING_CATEGORIES for grade in (3, 4, 5)}
    assert Counter(category for category, _ in lesions(balance="finding_categories")) == {
        (name,): 6 for name in FINDING_CATEGORIES
    }
    assert Counter(lesions(balance="finding_birads", overrides={"finding_categories": "Asymmetry"})) == {
        (("Asymmetry",), grade): 20 for grade in (3, 4, 5)
    }


def described(**options):
    return [item.attributes for item in make_plan(RECORDS, **{"variants": 5, "seed": 0, **options})]


def test_forms_are_balanced_too():
    counts = Counter((each.margin, each.pathology) for each in described(balance="margin,pathology"))
    assert counts == {(margin, pathology): 6 for margin in MARGINS for pathology in PATHOLOGIES}
    # A margin is a mass's alone: the nine other categories stand once, without one.
    found = described(balance="finding_categories,margin", variants=7)
    counts = Counter((each.finding_categories, each.margin) for each in found)
    masses = {(("Mass",), margin): 6 for margin in MARGINS}
    assert counts == masses | {((name,), None): 6 for name in FINDING_CATEGORIES if name != "Mass"}


def test_natural_draws_forms_that_go_with_what_is_set():
    lesions = described(balance="natural", overrides={"margin": "spiculated", "breast_density": "A"})
    assert {(each.finding_categories, each.margin, each.breast_density) for each in lesions} == {
        (("Mass",), "spiculated", "A")
    }
    assert Counter(each.pathology for each in lesions)["malignant"] > 45
    assert Counter(each.shape for each in lesions)["irregular"] > 30
    others = described(balance="natural", overrides={"finding_categories": "Asymmetry"})
    assert {(each.shape, each.margin, each.pathology) for each in others} == {(None, None, None)}
    # Without --balance, nothing is drawn.
    assert {(each.shape, each.pathology) for each in described(overrides={"margin": "obscured"})} == {(None, None)}


def test_natural_replaces_the_annotation_s_description():
    mass = Attributes(finding_categories=("Mass",), finding_birads=2, shape="round", pathology="benign", subtlety=5)
    records = [dataclasses.replace(RECORDS[0], findings=(Finding(box=(1, 2, 3, 4), attributes=mass),))]
    plan = make_plan(records, variants=40, seed=0, mask="annotations", balance="natural")
    assert {item.attributes.subtlety for item in plan} == {None}
    assert len({item.attributes.shape for item in plan}) > 2


def test_every_template_gets_every_category_where_it_has_as_many_variants():
    found = lesions(variants=10, balance="finding_categories")
    for start in range(0, 120, 10):
        assert {category for (category,), _ in found[start : start + 10]} == set(FINDING_CATEGORIES)


def test_balance_is_tied_to_no_template():
    """With a fixed order of ten categories, every other template would get the same five of them."""
    found = lesions(balance="finding_categories")
    assert len({category for start in range(0, 60, 10) for category, _ in found[start : start + 5]}) > 7


def test_balance_depends_on_the_seed_and_the_index_alone():
    assert lesions(balance="natural") == lesions(balance="natural") != lesions(balance="natural", seed=1)
    assert lesions(balance="finding_categories")[:20] == lesions(balance="finding_categories", variants=9)[:20]


def test_the_mask_has_the_prior_of_the_drawn_category():
    plan = make_plan(RECORDS, variants=2, seed=0, balance="finding_categories")
    assert [(item.mask.prior.category,) for item in plan] == [item.attributes.finding_categories for item in plan]


def test_natural_is_as_frequent_as_the_priors_say():
    priors = load_priors()
    rates = dict(zip(FINDING_CATEGORIES, (5, 0, 0, 0, 3, 0, 0, 0, 2, 0), strict=True))
    shares = {"Mass": {2: 0.0, 3: 0.25, 4: 0.75, 5: 0.0}}
    categories = {
        name: dataclasses.replace(prior, frequency=rates[name], birads=shares.get(name, prior.birads))
        for name, prior in priors.categories.items()
    }
    priors = dataclasses.replace(priors, categories=categories)
    found = lesions(variants=100, seed=1, balance="natural", priors=priors)
    counts = Counter(category for (category,), _ in found)
    np.testing.assert_allclose([counts[name] / 1200 for name in rates], np.array([*rates.values()]) / 10, atol=0.04)
    graded = Counter(grade for category, grade in found if category == ("Mass",))
    assert set(graded) == {3, 4}
    assert graded[4] / counts["Mass"] == pytest.approx(0.75, abs=0.06)
    # Attributes that are set are not drawn.
    assert {grade for _, grade in lesions(balance="natural", overrides={"finding_birads": 5}, priors=priors)} == {5}
    masses = lesions(variants=20, balance="natural", overrides={"finding_categories": "Mass"}, priors=priors)
    assert {category for category, _ in masses} == {("Mass",)}
    assert {grade for _, grade in masses} == {3, 4}
    healthy = lesions(balance="natural", overrides={"finding_categories": "No Finding"}, priors=priors)
    assert set(healthy) == {((), None)}


@pytest.mark.parametrize(
    ("balance", "overrides", "sentence"),
    [
        (
            "breast_density",
            {},
            "balance is 'breast_density'; expected natural or out of finding_categories",
        ),
        ("", {}, "balance is ''; expected natural or out of"),
        ("natural,finding_birads", {}, "balance is 'natural'; expected natural or out of"),
        ("finding_birads,finding_birads", {}, "balance names finding_birads twice; expected each attribute once"),
        ("finding_birads", {"finding_birads": 4}, "finding_birads is both set and balanced; choose one"),
        ("finding_birads", {"finding_categories": "No Finding"}, "'No Finding' is set, which has no finding_birads"),
        ("margin", {"finding_categories": "No Finding"}, "'No Finding' is set, which has no margin to balance"),
        (
            "finding_birads,shape",
            {"finding_categories": "Asymmetry"},
            "'Asymmetry' is set, which has no shape to balance; choose one",
        ),
    ],
)
def test_bad_balance(balance, overrides, sentence):
    with pytest.raises(GBCIError, match=sentence):
        lesions(balance=balance, overrides=overrides)


def test_priors_without_any_box_have_no_natural_frequency():
    priors = load_priors()
    empty = {name: dataclasses.replace(prior, frequency=0) for name, prior in priors.categories.items()}
    with pytest.raises(GBCIError, match="the priors count no box in any category"):
        lesions(balance="natural", priors=dataclasses.replace(priors, categories=empty))
