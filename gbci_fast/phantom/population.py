"""The population of women: densities, ages, the hazard of cancer, and the frequency of each finding."""

import numpy as np

from gbci_fast.attributes import FINDING_CATEGORIES
from gbci_fast.phantom.settings import Population

# Per density class: share of women, fat fraction, compressed thickness in mm.
DENSITIES = {"A": (0.1, 0.95, 60.0), "B": (0.4, 0.85, 55.0), "C": (0.4, 0.66, 45.0), "D": (0.1, 0.40, 35.0)}
AGES = np.arange(40, 76)
_AGE_SHARES = np.exp(-(((AGES - 55) / 9) ** 2) / 2)
AGE_SHARES = _AGE_SHARES / _AGE_SHARES.sum()

# Log-linear relative hazard. Density: 4.64-fold between the extreme classes (McCormack and dos Santos Silva, Cancer
# Epidemiol. Biomarkers Prev. 15, 2006). Age: threefold from 42 to 72 years, about what screening registries report.
LOG_HAZARD_PER_CLASS = np.log(4.64) / 3
LOG_HAZARD_PER_YEAR = np.log(3) / 30

# Per category: approximate number of rows in VinDr-Mammo's finding annotations (Nguyen et al., Sci. Data 10, 277,
# 2023), not checked against its restricted tables; and the number of views in which the phantom shows one such finding.
VINDR_ROWS = {
    "Mass": (1226, 2),
    "Suspicious Calcification": (543, 2),
    "Focal Asymmetry": (269, 2),
    "Architectural Distortion": (119, 2),
    "Asymmetry": (97, 1),
    "Skin Thickening": (57, 2),
    "Suspicious Lymph Node": (57, 1),
    "Nipple Retraction": (37, 2),
    "Global Asymmetry": (26, 2),
    "Skin Retraction": (18, 2),
}
# Share of malignant findings per category, chosen to follow the usual order of positive predictive values.
MALIGNANT = {
    "Mass": 0.3,
    "Suspicious Calcification": 0.3,
    "Focal Asymmetry": 0.1,
    "Architectural Distortion": 0.5,
    "Asymmetry": 0.05,
    "Skin Thickening": 0.4,
    "Suspicious Lymph Node": 0.6,
    "Nipple Retraction": 0.4,
    "Global Asymmetry": 0.05,
    "Skin Retraction": 0.6,
}
# Findings associated with a malignant mass, and their probabilities. A distortion shares the mass's row, others have
# their own.
ASSOCIATED = {
    "Architectural Distortion": 0.15,
    "Suspicious Calcification": 0.20,
    "Suspicious Lymph Node": 0.15,
    "Skin Thickening": 0.08,
    "Nipple Retraction": 0.05,
    "Skin Retraction": 0.03,
}


def rates(population: Population) -> dict[str, float]:
    """The share of each category among primary findings.

    For VinDr-Mammo's rates, findings associated with malignant masses are subtracted, so that the rates of all
    findings together agree.
    """
    if population.balance:
        return dict.fromkeys(FINDING_CATEGORIES, 1 / len(FINDING_CATEGORIES))
    lesions = {category: rows / views for category, (rows, views) in VINDR_ROWS.items()}
    brought = MALIGNANT["Mass"] * lesions["Mass"]
    primary = {category: lesions[category] - brought * ASSOCIATED.get(category, 0) for category in lesions}
    total = sum(primary.values())
    return {category: count / total for category, count in primary.items()}


def draw_categories(population: Population, rng: np.random.Generator, hazard: float) -> list[tuple[str, bool]]:
    """Draws zero to two primary findings of one breast: (category, whether malignant) each.

    A malignant finding occurs with probability 1 - exp(-hazard x baseline), so that a proportional-hazards model
    (complementary log-log link) recovers `log_hazard`. A benign finding does not depend on the hazard.
    """
    per_category = rates(population)
    shares = {
        True: {category: rate * MALIGNANT[category] for category, rate in per_category.items()},
        False: {category: rate * (1 - MALIGNANT[category]) for category, rate in per_category.items()},
    }
    drawn = []
    for malignant, share in shares.items():
        expected = population.prevalence * sum(share.values())
        probability = 1 - np.exp(-hazard * expected) if malignant else expected
        chance, weights = rng.uniform(), np.array(list(share.values()))
        category = str(rng.choice(list(share), p=weights / weights.sum()))
        if chance < probability:
            drawn.append((category, malignant))
    return drawn


def log_hazard(breast_density: str, age: float) -> float:
    """Log hazard of breast cancer relative to density A at 55 years: linear in density class and age."""
    return float(LOG_HAZARD_PER_CLASS * "ABCD".index(breast_density) + LOG_HAZARD_PER_YEAR * (age - 55))


def relative_hazard(breast_density: str, age: float) -> float:
    """The hazard of breast cancer relative to the population's mean."""
    return float(np.exp(log_hazard(breast_density, age)) / _MEAN_HAZARD)


_MEAN_HAZARD = sum(
    share * (AGE_SHARES * np.exp([log_hazard(density, float(age)) for age in AGES])).sum()
    for density, (share, _, _) in DENSITIES.items()
)
