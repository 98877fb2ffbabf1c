"""Boosting on features: planted differences, groups left out, and columns that say nothing."""

import sys

import numpy as np
import pytest

from gbci_fast.errors import GBCIError
from gbci_fast.evaluate.realism.boosting import BoostedJudge, Table, check_boosting, measure
from gbci_fast.evaluate.realism.regions import REGIONS
from gbci_fast.evaluate.realism.texture import features


def table(count, seed, shift=0.0, group="finest"):
    rng = np.random.default_rng(seed)
    names = ("finest/a", "finest/b", "bands/a", "shape/a")
    values = rng.normal(size=(count, len(names)))
    values[:, names.index(f"{group}/a")] += shift
    return Table(names=names, values=values)


def auc(judge, first, second):
    return (judge.score(first)[:, None] > judge.score(second)).mean()


def test_a_shifted_feature_tells_the_sets_apart_until_its_group_is_left_out():
    train, test = [[table(150, seed + i, 2.0 * i) for i in range(2)] for seed in (0, 10)]
    assert auc(BoostedJudge(*train, seed=0), *test) > 0.8
    train, test = ([one.columns(("bands", "shape")) for one in pair] for pair in (train, test))
    assert train[0].names == ("bands/a", "shape/a")
    assert abs(auc(BoostedJudge(*train, seed=0), *test) - 0.5) < 0.12


def test_unknown_and_constant_columns_are_no_obstacle():
    first, second = table(60, 0), table(60, 1, 3.0)
    for one in (first, second):
        one.values[:, 1] = np.nan
        one.values[:, 2] = 5
        one.values[::3, 3] = np.nan
    assert auc(BoostedJudge(first, second, seed=0), first, second) > 0.9


def test_equal_seeds_give_equal_scores():
    first, second = table(50, 0), table(50, 1)
    one, two, other = (BoostedJudge(first, second, seed=seed).score(first) for seed in (0, 0, 1))
    np.testing.assert_array_equal(one, two)
    assert (one != other).any()


def test_tables_hold_the_features_of_every_lesion_in_every_region(noisy_cases, side):
    found = side(noisy_cases(3))
    tables = measure(found.cases, found.places, found.fillings["real"], REGIONS)
    for region, one in tables.items():
        row = features(found.places[1], found.cases[1].pixels, region)
        assert one.names == tuple(row)
        np.testing.assert_array_equal(one.of(np.array([1])).values[0], list(row.values()))


def test_without_scikit_learn_one_sentence_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(GBCIError, match=r"scikit-learn is not installed; install it by `pip install 'gbci_fast\[eval"):
        check_boosting()
