"""The operator's noise is standard normal and independent: ten million draws, fixed seeds.

Every statistic is scaled to a standard normal, or has an exact distribution. Its bound is the value that an ideal
generator exceeds with probability `ALPHA`. There are some 12,000 statistics, mostly correlations: an ideal generator
would fail with probability 1.2e-5. The deviations due to 24-bit uniforms are a thousandth of the bounds.
"""

import itertools

import numpy as np
import pytest
import torch
from scipy import stats

from gbci_fast.model.noise import seed_tensor
from gbci_fast.ops.philox_normal import philox_normal

ALPHA = 1e-9
BOUND = stats.norm.isf(ALPHA / 2)  # 6.1 standard deviations
ELEMENTS = 110_000  # per row; 96 rows

# Neighbors, seeds that differ in one bit of either word, and seeds with all bits.
SEEDS = sorted({*range(34), *(2**bit for bit in range(64)), 2**32 - 1, 2**64 - 2**32, 2**64 - 1, 0x0123456789ABCDEF})
STEPS = [0, 1, 2, 3, 2**8, 2**31, 2**32 - 1]
STREAMS = [0, 1, 2, 3, 2**31]


@pytest.fixture(scope="module")
def draws() -> np.ndarray:
    """float64 ``[len(SEEDS), ELEMENTS]``: a row per seed."""
    draws = philox_normal(seed_tensor(SEEDS), (ELEMENTS,), step=1, stream=1).double().numpy()
    assert draws.size > 10_000_000
    return draws


def assert_uncorrelated(rows: np.ndarray) -> None:
    """No two rows of ``[n, elements]`` correlate, and no two rows of their squares."""
    for moments in (rows, (rows**2 - 1) / np.sqrt(2)):
        z = moments @ moments.T / np.sqrt(rows.shape[1])  # mean 0 and variance 1 are known, not estimated
        assert np.abs(z[np.triu_indices(len(rows), 1)]).max() < BOUND


@pytest.mark.parametrize(("power", "moment", "variance"), [(1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)])
def test_moments(draws, power, moment, variance):
    assert abs((draws**power).mean() - moment) < BOUND * np.sqrt(variance / draws.size)


def test_distribution(draws):
    flat = np.sort(draws, axis=None)
    assert stats.kstest(flat, "norm").pvalue > ALPHA
    edges = stats.norm.ppf(np.arange(1, 1000) / 1000)
    counts = np.diff(np.searchsorted(flat, edges), prepend=0, append=flat.size)
    assert stats.chisquare(counts).pvalue > ALPHA


@pytest.mark.parametrize("threshold", [2, 3, 4, 4.5, 5])
def test_tails(draws, threshold):
    for count in ((draws > threshold).sum(), (draws < -threshold).sum()):
        assert stats.binomtest(int(count), draws.size, stats.norm.sf(threshold)).pvalue > ALPHA
    assert np.abs(draws).max() <= np.sqrt(48 * np.log(2)) * (1 + 1e-6)


def test_elements_of_a_sample_are_independent(draws):
    squares = (draws**2 - 1) / np.sqrt(2)
    # Lags within a Philox block, between neighboring blocks, vectors and groups of blocks, rows and planes of a latent.
    for lag in [*range(1, 17), 28, 32, 56, 64, 128, 256, 784, 1024, 3136, 12544]:
        for rows in (draws, squares):
            products = np.einsum("ij,ij->", rows[:, :-lag], rows[:, lag:])
            assert abs(products) < BOUND * np.sqrt(rows[:, lag:].size), lag


def test_the_four_normals_of_a_block_are_independent(draws):
    assert_uncorrelated(np.ascontiguousarray(draws.reshape(-1, 4).T))


def test_samples_of_neighboring_seeds_are_independent(draws):
    assert_uncorrelated(draws)


@pytest.mark.parametrize("seed", [0, 2**63 + 1])
def test_steps_and_streams_are_independent(seed):
    rows = [
        philox_normal(seed_tensor([seed]), (ELEMENTS,), step=step, stream=stream)[0]
        for step, stream in itertools.product(STEPS, STREAMS)
    ]
    assert_uncorrelated(torch.stack(rows).double().numpy())
