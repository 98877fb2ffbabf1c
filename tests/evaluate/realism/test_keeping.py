"""Kept results: not computed again, not mistaken for others, and written again where they are damaged."""

import numpy as np
import pytest

from gbci_fast.evaluate.realism.judging import compare
from gbci_fast.evaluate.realism.keeping import Kept, source_of
from gbci_fast.evaluate.settings import RealismSettings


@pytest.fixture
def counted():
    """A function that counts its calls."""

    def compute():
        compute.calls += 1
        return {"x": np.arange(3) * compute.calls}

    compute.calls = 0
    return compute


def test_a_kept_result_is_taken_for_its_own_key_alone(tmp_path, counted):
    kept = Kept(tmp_path / "runs")
    for _ in range(2):
        np.testing.assert_array_equal(kept.get(["a", 1], counted)["x"], [0, 1, 2])
    np.testing.assert_array_equal(kept.get(["a", 2], counted)["x"], [0, 2, 4])
    assert counted.calls == 2


def test_a_damaged_file_is_computed_again(tmp_path, counted):
    kept = Kept(tmp_path)
    kept.get(["a"], counted)
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:50])
    np.testing.assert_array_equal(kept.get(["a"], counted)["x"], [0, 2, 4])
    np.testing.assert_array_equal(kept.get(["a"], counted)["x"], [0, 2, 4])


def test_without_a_folder_nothing_is_kept(counted):
    for _ in range(2):
        Kept(None).get(["a"], counted)
    assert counted.calls == 2


def test_other_code_is_another_key():
    assert source_of("texture") != source_of("regions") != source_of("texture", "regions")


def test_a_comparison_goes_on_from_what_is_kept(noisy_cases, side, tmp_path, monkeypatch):
    settings = RealismSettings(seeds=1, train_steps=2, train_batch=4)
    sides = [side(cases, painted=[1 - case.pixels for case in cases]) for cases in (noisy_cases(8), noisy_cases(6, 1))]
    first = compare(*sides, settings, Kept(tmp_path))

    def never(*args, **more):
        raise AssertionError("trained or measured again")

    monkeypatch.setattr("gbci_fast.evaluate.realism.judging._train", never)
    monkeypatch.setattr("gbci_fast.evaluate.realism.judging.measure", never)
    assert compare(*sides, settings, Kept(tmp_path)) == first
    with pytest.raises(AssertionError, match="trained or measured again"):
        compare(*sides, RealismSettings(seeds=1, train_steps=3, train_batch=4), Kept(tmp_path))
    with pytest.raises(AssertionError, match="trained or measured again"):
        compare(sides[1], sides[0], settings, Kept(tmp_path))
