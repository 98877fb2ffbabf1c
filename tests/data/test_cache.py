"""Opening a cache: refused caches, memory mapping, and packed masks."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gbci_fast.data.cache import CACHE_FILE, INDEX, MASKS, PIXELS, Cache, is_cache, pack_masks, unpack_masks
from gbci_fast.data.prepare import prepare
from gbci_fast.data.settings import PrepareSettings
from gbci_fast.errors import GBCIError
from gbci_fast.jobs.files import sha256_of
from gbci_fast.phantom import generate_phantom


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    parent = tmp_path_factory.mktemp("cache")
    generate_phantom(parent / "phantom", studies=1, seed=3, size=128)
    prepare([parent / "phantom"], parent / "cache", PrepareSettings(size=33), workers=1)
    return parent / "cache"


@pytest.fixture
def copy(folder, tmp_path):
    return Path(shutil.copytree(folder, tmp_path / "cache"))


@given(size=st.integers(1, 40), count=st.integers(1, 4), seed=st.integers(0, 99))
@settings(max_examples=25, deadline=None)
def test_masks_survive_packing(size, count, seed):
    masks = np.random.default_rng(seed).random((count, size, size)) < 0.5
    packed = pack_masks(list(masks))
    assert packed.shape == (count, -(-size * size // 8))
    np.testing.assert_array_equal(unpack_masks(packed, size), masks)


def test_images_stay_on_the_disk(folder):
    cache = Cache(folder)
    first, again = cache[0].image, cache[0].image
    assert isinstance(cache._pixels, np.memmap)
    assert np.shares_memory(first, cache._pixels)
    assert np.shares_memory(first, again)
    assert not first.flags.writeable
    assert cache[0].breast.dtype == bool


def test_it_is_a_sequence(folder):
    cache = Cache(folder)
    images = [item.image for item in cache]
    assert len(images) == len(cache) == len(cache.index)
    np.testing.assert_array_equal(cache[-1].image, images[-1])
    part = cache[1:3]
    assert len(part) == 2
    np.testing.assert_array_equal(part[1].image, images[2])
    np.testing.assert_array_equal(part[1:][0].image, images[2])
    with pytest.raises(IndexError):
        cache[len(cache)]


def test_folds_are_of_the_training_split(folder):
    cache = Cache(folder)
    splits, folds = (cache.index.column(name).to_pylist() for name in ("split", "fold"))
    for wanted in ("A", "B", "C", "AB"):
        rows = enumerate(zip(splits, folds, strict=True))
        expected = [i for i, (split, fold) in rows if split == "training" and fold in wanted]
        chosen = cache.of_folds(wanted)
        assert len(chosen) == len(expected)
        for item, position in zip(chosen, expected, strict=True):
            np.testing.assert_array_equal(item.image, cache[position].image)
    assert 0 < len(cache.of_folds("ABC")) == splits.count("training")


def rewrite(folder, **changes):
    file = folder / CACHE_FILE
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_foreign_and_damaged_caches_are_refused(copy, tmp_path):
    assert is_cache(copy)
    assert not is_cache(tmp_path)
    for change, sentence in (
        ({"format": 1}, "is a cache of format 1; expected 2: prepare it again"),
        ({"files": {}}, f"does not describe {INDEX}, {PIXELS} and {MASKS}; prepare the cache again"),
        ({"size": "large"}, "cannot be read as the description of a cache (TypeError)"),
    ):
        text = (copy / CACHE_FILE).read_text()
        rewrite(copy, **change)
        with pytest.raises(GBCIError, match=re.escape(sentence) + "$"):
            Cache(copy)
        (copy / CACHE_FILE).write_text(text)
    Cache(copy)
    (copy / CACHE_FILE).write_text("{")
    with pytest.raises(GBCIError, match=r"cannot be read as the description of a cache \(JSONDecodeError\)$"):
        Cache(copy)
    (copy / CACHE_FILE).unlink()
    with pytest.raises(GBCIError, match=rf"holds no {CACHE_FILE}; expected a folder written by `gbci-fast prepare`$"):
        Cache(copy)


@pytest.mark.parametrize("name", [PIXELS, MASKS, INDEX])
def test_cut_and_absent_files_are_refused(copy, name):
    content = (copy / name).read_bytes()
    (copy / name).write_bytes(content[:-1])
    with pytest.raises(
        GBCIError, match=rf"{name} is absent or cut; expected {len(content)} bytes as {CACHE_FILE} says$"
    ):
        Cache(copy)
    (copy / name).unlink()
    with pytest.raises(GBCIError, match=rf"{name} is absent or cut"):
        Cache(copy)


@pytest.mark.parametrize("name", [PIXELS, MASKS])
def test_damaged_headers_are_refused(copy, name):
    content = bytearray((copy / name).read_bytes())
    content[:8] = bytes(8)
    (copy / name).write_bytes(content)
    with pytest.raises(GBCIError, match=rf"{name} is damaged; prepare the cache again$"):
        Cache(copy)


def test_an_index_of_other_rows_is_not_read(copy):
    """A Parquet file of a few bytes can claim any number of equal rows."""
    pq.write_table(pa.table({"study_id": ["x"] * 100_000}), copy / INDEX)
    info = json.loads((copy / CACHE_FILE).read_text())
    info["files"][INDEX] = {"bytes": (copy / INDEX).stat().st_size, "sha256": sha256_of(copy / INDEX)}
    (copy / CACHE_FILE).write_text(json.dumps(info))
    with pytest.raises(GBCIError, match=rf"{INDEX} has 100000 rows; expected \d+, one per field of view$"):
        Cache(copy)


def test_changed_files_are_found(copy):
    """A change of the index is found on opening, a change of a large array by `verify`."""
    for name, opens in ((PIXELS, True), (INDEX, False)):
        content = bytearray((copy / name).read_bytes())
        content[-1000] ^= 1
        (copy / name).write_bytes(content)
        sentence = rf"{name} is not the file that {CACHE_FILE} describes; prepare the cache again$"
        with pytest.raises(GBCIError, match=sentence):
            Cache(copy).verify() if opens else Cache(copy)
