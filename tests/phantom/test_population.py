"""The population: rates of categories, prevalence, and a hazard that a risk model can recover."""

from collections import Counter

import numpy as np
import pytest

from gbci_fast.attributes import FINDING_CATEGORIES
from gbci_fast.errors import GBCIError
from gbci_fast.phantom.population import (
    AGE_SHARES,
    AGES,
    DENSITIES,
    VINDR_ROWS,
    draw_categories,
    log_hazard,
    rates,
    relative_hazard,
)
from gbci_fast.phantom.settings import Population
from gbci_fast.phantom.study import draw_study

STUDIES = 200


@pytest.fixture(scope="module")
def plans():
    return [draw_study(0, index) for index in range(STUDIES)]


def count_rows(plans) -> Counter:
    """Rows of the finding table per category: one per view."""
    rows = Counter()
    for plan in plans:
        for breast in plan.breasts:
            for finding in breast.findings:
                rows.update({category: len(finding.views) for category in finding.categories})
    return rows


def test_categories_occur_at_the_rates_of_vindr(plans):
    rows = count_rows(plans)
    total, expected_total = sum(rows.values()), sum(count for count, _ in VINDR_ROWS.values())
    assert set(rows) <= set(FINDING_CATEGORIES) == set(VINDR_ROWS)
    for category, (count, views) in VINDR_ROWS.items():
        expected = total * count / expected_total
        # Findings are drawn, not rows: four standard deviations of their number, plus 10 % for the model's shares.
        slack = 4 * np.sqrt(expected * views) + 0.1 * expected + 2
        assert rows[category] == pytest.approx(expected, abs=slack), category


def test_balance_draws_rare_categories_as_often():
    population = Population(prevalence=1.0, balance=True)
    assert set(rates(population).values()) == {0.1}
    rows = count_rows([draw_study(0, index, population) for index in range(80)])
    lesions = {category: rows[category] / VINDR_ROWS[category][1] for category in FINDING_CATEGORIES}
    assert min(lesions.values()) > 0.3 * max(lesions.values())
    assert sum(rates(Population()).values()) == pytest.approx(1)
    assert min(rates(Population()).values()) > 0


@pytest.mark.parametrize("prevalence", [0.0, 0.2, 0.5])
def test_prevalence(prevalence):
    rng = np.random.default_rng(0)
    population = Population(prevalence=prevalence)
    hazards = [
        relative_hazard(rng.choice(list(DENSITIES), p=[row[0] for row in DENSITIES.values()]), age)
        for age in rng.choice(AGES, 4000, p=AGE_SHARES)
    ]
    number = np.mean([len(draw_categories(population, rng, hazard)) for hazard in hazards])
    assert number == pytest.approx(prevalence, abs=0.04)


def test_prevalence_is_checked():
    with pytest.raises(GBCIError, match=r"prevalence is 1\.5; expected findings per breast from 0 to 1"):
        Population(prevalence=1.5)


def test_densities_splits_and_ages(plans):
    counts = Counter(plan.breast_density for plan in plans)
    for density, (share, _, _) in DENSITIES.items():
        assert counts[density] / STUDIES == pytest.approx(share, abs=0.11)
    assert 0.14 < np.mean([plan.split == "test" for plan in plans]) < 0.26
    ages = [plan.age for plan in plans]
    assert 40 <= min(ages) < max(ages) <= 75


def test_hazard_is_log_linear_and_one_on_average():
    assert log_hazard("D", 55) - log_hazard("A", 55) == pytest.approx(np.log(4.64))
    assert log_hazard("C", 55) - log_hazard("B", 55) == pytest.approx(log_hazard("B", 55) - log_hazard("A", 55))
    assert log_hazard("A", 72) - log_hazard("A", 42) == pytest.approx(np.log(3))
    mean = sum(
        share * (AGE_SHARES * [relative_hazard(density, age) for age in AGES]).sum()
        for density, (share, _, _) in DENSITIES.items()
    )
    assert mean == pytest.approx(1)


def test_a_risk_model_recovers_the_hazard():
    """Complementary log-log: log(-log(1 - P(malignant))) has slope 1 in the log hazard."""
    rng = np.random.default_rng(1)
    population = Population()
    points = []
    for density, age in (("A", 45), ("B", 55), ("D", 70)):
        hazard = relative_hazard(density, age)
        drawn = [draw_categories(population, rng, hazard) for _ in range(5000)]
        malignant = np.mean([any(is_malignant for _, is_malignant in findings) for findings in drawn])
        benign = np.mean([any(not is_malignant for _, is_malignant in findings) for findings in drawn])
        points.append((np.log(hazard), np.log(-np.log(1 - malignant)), benign))
    x, y, benign = map(np.array, zip(*points, strict=True))
    assert np.polyfit(x, y, 1)[0] == pytest.approx(1, abs=0.12)
    assert np.ptp(benign) < 0.05  # benign findings do not depend on the hazard
