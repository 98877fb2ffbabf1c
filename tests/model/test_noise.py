"""The definition of the noise: published Philox vectors, the layout of counters, moments and distribution."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from gbci_fast.errors import GBCIError
from gbci_fast.model.noise import STREAM_INITIAL, STREAM_SCHEDULER, philox4x32, seed_tensor, seeded_normal

# Random123's kat_vectors for philox4x32-10: counter, key, expected.
KNOWN_ANSWERS = {
    "zeros": ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    "ones": ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    "pi": (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
}


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS.values(), ids=KNOWN_ANSWERS)
def test_philox_gives_the_published_words(counter, key, expected):
    words = philox4x32(np.array(counter, np.uint32), np.array(key, np.uint32))
    assert words.dtype == np.uint32
    assert words.tolist() == expected


def test_keys_broadcast_against_counters():
    counters = np.array([c for c, _, _ in KNOWN_ANSWERS.values()], np.uint32)
    keys = np.array([k for _, k, _ in KNOWN_ANSWERS.values()], np.uint32)
    table = philox4x32(counters, keys[:, None])
    assert table.shape == (3, 3, 4)
    assert np.diagonal(table).T.tolist() == [e for _, _, e in KNOWN_ANSWERS.values()]


def test_an_element_is_the_documented_function_of_seed_index_step_and_stream():
    seed, step, stream, element = 0x0123456789ABCDEF, 7, 3, 4 * 5 + 3
    words = philox4x32(np.array([5, step, stream, 0]), np.array([seed & 0xFFFFFFFF, seed >> 32]))
    radius = math.sqrt(-2 * math.log((int(words[2]) >> 8) * 2**-24 + 2**-24))
    expected = radius * math.sin(2 * math.pi * (int(words[3]) >> 8) * 2**-24)
    sample = seeded_normal([seed], (2, 3, 4), step=step, stream=stream, dtype=torch.float64)
    assert sample.flatten()[element].item() == pytest.approx(expected, rel=1e-14)


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=5), st.integers(0, 2**32 - 1), st.data())
def test_a_sample_does_not_depend_on_its_batch(seeds, step, data):
    index = data.draw(st.integers(0, len(seeds) - 1))
    batch = seeded_normal(seeds, (2, 5), step=step)
    assert torch.equal(batch[index], seeded_normal([seeds[index]], (2, 5), step=step)[0])


def test_a_shorter_sample_is_the_beginning_of_a_longer_one():
    assert torch.equal(seeded_normal([9], (3, 7))[0].flatten(), seeded_normal([9], (40,))[0, :21])


def test_seeds_steps_and_streams_give_different_noise():
    draws = [
        seeded_normal([seed], (64,), step=step, stream=stream)[0]
        for seed in (0, 1, 2**32, 2**63)
        for step in (0, 1)
        for stream in (STREAM_INITIAL, STREAM_SCHEDULER)
    ]
    correlation = np.corrcoef(torch.stack(draws).numpy())
    assert np.abs(correlation - np.eye(len(draws))).max() < 0.7  # a standard deviation is 0.125; equal rows give 1


def test_a_million_draws_are_standard_normal():
    draws = seeded_normal(range(10), (100_000,), dtype=torch.float64)
    flat = draws.flatten().numpy()
    assert abs(flat.mean()) < 4e-3
    assert abs(flat.var() - 1) < 6e-3
    assert abs(stats.skew(flat)) < 0.01
    assert abs(stats.kurtosis(flat)) < 0.02
    assert stats.kstest(flat, "norm").pvalue > 1e-3
    assert np.abs(np.corrcoef(draws.numpy()) - np.eye(10)).max() < 0.02
    assert abs(np.corrcoef(flat[:-1], flat[1:])[0, 1]) < 5e-3
    assert np.abs(flat).max() <= math.sqrt(48 * math.log(2))


def test_each_dtype_is_one_rounding_of_float64():
    exact = seeded_normal([3], (1000,), dtype=torch.float64)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert torch.equal(seeded_normal([3], (1000,), dtype=dtype), exact.to(dtype))


@pytest.mark.parametrize("shape", [(0, 4), (1,), (), (3, 5, 7)])
def test_the_batch_axis_comes_first(shape):
    assert seeded_normal([1, 2], shape).shape == (2, *shape)
    assert seeded_normal([], shape).shape == (0, *shape)


def test_seed_tensor_keeps_all_64_bits():
    assert seed_tensor([0, 1, 2**63, 2**64 - 1]).tolist() == [0, 1, -(2**63), -1]
    assert seed_tensor([]).shape == (0,)


@pytest.mark.parametrize("seed", [-1, 2**64, 0.5, True, "1", None])
def test_a_bad_seed_is_named(seed):
    for make in (seed_tensor, lambda seeds: seeded_normal(seeds, (4,))):
        with pytest.raises(GBCIError, match=rf"^seed {seed!r} is not an integer from 0 to 2\^64 - 1$"):
            make([0, seed])


def test_other_fields_out_of_range_are_named():
    with pytest.raises(GBCIError, match=r"^step 4294967296 is not an integer from 0 to 2\^32 - 1$"):
        seeded_normal([0], (4,), step=2**32)
    with pytest.raises(GBCIError, match=r"^stream -1 is not an integer"):
        seeded_normal([0], (4,), stream=-1)
    with pytest.raises(GBCIError, match=r"^a sample of shape \(17179869185,\) has more elements"):
        seeded_normal([0], (2**34 + 1,))
