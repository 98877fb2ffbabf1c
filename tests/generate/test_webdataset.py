"""WebDataset shards: their content, readers that open them, and recovery after a job was stopped."""

import io
import json
import shutil
import tarfile

import numpy as np
import pandas as pd
import pytest
import webdataset
from PIL import Image

from gbci_fast.data.vindr import VinDr
from gbci_fast.errors import GBCIError
from gbci_fast.generate.manifest import MANIFEST_SCHEMA
from gbci_fast.generate.plan import make_plan
from gbci_fast.generate.sinks import png
from gbci_fast.generate.sinks.webdataset import close_shard, open_shard
from gbci_fast.jobs.files import sha256_of

SHARDS = {"formats": ("webdataset",), "shard_size": 2}


class StopError(Exception):
    """Something that nobody expects."""


@pytest.fixture(scope="module")
def sharded(make_job, phantom, tmp_path_factory):
    """The four images of `finished` in two shards, one per batch."""
    output = tmp_path_factory.mktemp("sharded") / "data"
    make_job(phantom, output, settings=SHARDS)
    return output


def members(path):
    with tarfile.open(path) as tar:
        return {member.name: tar.extractfile(member).read() for member in tar}


def shards_of(output):
    return sorted(path.relative_to(output).as_posix() for path in (output / "shards").iterdir())


def test_a_sample_is_what_the_files_would_be(sharded, finished):
    files = pd.read_parquet(finished / "manifest.parquet")
    assert shards_of(sharded) == ["shards/000000.tar", "shards/000001.tar"]
    samples = [(name, content) for path in shards_of(sharded) for name, content in members(sharded / path).items()]
    assert [name for name, _ in samples] == [
        f"{image_id}.{suffix}" for image_id in files.image_id for suffix in ("png", "mask.png", "findings.png", "json")
    ]
    contents = dict(samples)
    for row in files.itertuples():
        assert contents[f"{row.image_id}.png"] == (finished / row.png_file).read_bytes()
        assert contents[f"{row.image_id}.mask.png"] == (finished / row.mask_file).read_bytes()
        planes = np.asarray(Image.open(io.BytesIO(contents[f"{row.image_id}.findings.png"])))
        masks = json.loads(row.finding_masks)
        assert [mask["finding"] for mask in masks] == list(range(1, len(masks) + 1))
        assert planes.max() < 2 ** len(masks)
        for mask in masks:
            own = np.asarray(Image.open(finished / mask["file"])) == 255
            np.testing.assert_array_equal(planes >> (mask["finding"] - 1) & 1, own)


def test_the_json_is_the_row_of_the_manifest(sharded):
    rows = pd.read_parquet(sharded / "manifest.parquet").to_dict("records")
    told = [
        json.loads(content)
        for path in shards_of(sharded)
        for name, content in members(sharded / path).items()
        if name.endswith(".json")
    ]
    assert told == rows
    assert [list(each) for each in told] == [MANIFEST_SCHEMA.names] * 4


def test_members_have_no_date_and_no_owner(sharded):
    with tarfile.open(sharded / "shards" / "000000.tar") as tar:
        assert {(one.mtime, one.uid, one.gid, one.uname, one.gname, one.mode) for one in tar} == {
            (0, 0, 0, "", "", 0o644)
        }


def test_the_manifest_names_the_shard_and_the_tables_are_the_same(sharded, finished):
    manifest, files = (pd.read_parquet(folder / "manifest.parquet") for folder in (sharded, finished))
    assert manifest.webdataset_file.tolist() == ["shards/000000.tar"] * 2 + ["shards/000001.tar"] * 2
    assert manifest.webdataset_sha256.tolist() == files.png_sha256.tolist()
    assert set(manifest[["png_file", "dicom_file", "mask_file", "mask_sha256"]].to_numpy().ravel()) == {""}
    assert [(mask["file"], mask["sha256"]) for masks in manifest.finding_masks for mask in json.loads(masks)] == [
        ("", "")
    ] * 6
    assert set(manifest.shard_size) == {2}
    for name in ("breast-level_annotations.csv", "finding_annotations.csv"):
        tables = [pd.read_csv(folder / name, dtype=str, keep_default_na=False) for folder in (sharded, finished)]
        if name.startswith("finding"):
            assert [list(table.pop("mask_file") == "") for table in tables] == [[True] * 6, [False] * 6]
        pd.testing.assert_frame_equal(*tables)
    assert {path.name for path in sharded.iterdir()} == {
        "shards", "job.json", "preview.png", "manifest.parquet", "breast-level_annotations.csv",
        "finding_annotations.csv", ".finished",
    }  # fmt: skip


def test_webdataset_reads_them(sharded, finished):
    files = pd.read_parquet(finished / "manifest.parquet")
    samples = list(webdataset.WebDataset(f"{sharded}/shards/{{000000..000001}}.tar", shardshuffle=False))
    assert [sample["__key__"] for sample in samples] == files.image_id.tolist()
    for sample, row in zip(samples, files.itertuples(), strict=True):
        pixels = np.asarray(Image.open(io.BytesIO(sample["png"])))
        assert pixels.dtype == np.uint16
        assert pixels.shape == (row.height, row.width)
        np.testing.assert_array_equal(pixels, np.asarray(Image.open(finished / row.png_file)))
        assert json.loads(json.loads(sample["json"])["attributes"])["finding_birads"] == 4


def test_beside_files(make_job, phantom, sharded, finished, tree, tmp_path):
    make_job(phantom, tmp_path / "data", settings={"formats": ("dicom", "png", "webdataset"), "shard_size": 2})
    both, files = tree(tmp_path / "data"), tree(finished)
    per_image = ("images/", "masks/", "finding_masks/")
    assert {name: one for name, one in both.items() if name.startswith(per_image)} == {
        name: one for name, one in files.items() if name.startswith(per_image)
    }
    manifest = pd.read_parquet(tmp_path / "data" / "manifest.parquet")
    for kind in ("dicom", "png", "mask"):
        assert manifest[f"{kind}_sha256"].tolist() == [sha256_of(finished / name) for name in manifest[f"{kind}_file"]]
    assert manifest.webdataset_sha256.tolist() == manifest.png_sha256.tolist()
    written = members(tmp_path / "data" / "shards" / "000001.tar")
    assert {name: one for name, one in written.items() if name.endswith("png")} == {
        name: one for name, one in members(sharded / "shards" / "000001.tar").items() if name.endswith("png")
    }


@pytest.mark.parametrize(("size", "counts"), [(1, [2, 2]), (2, [2, 2]), (3, [4]), (1000, [4])])
def test_a_shard_holds_whole_batches(make_job, phantom, tmp_path, size, counts):
    make_job(phantom, tmp_path / "data", settings={**SHARDS, "shard_size": size})
    assert [len(members(tmp_path / "data" / path)) // 4 for path in shards_of(tmp_path / "data")] == counts


@pytest.mark.parametrize("size", [2, 4])
def test_interrupted_then_resumed(make_job, phantom, tree, tmp_path, size, stop_after):
    settings = {**SHARDS, "shard_size": size}
    make_job(phantom, tmp_path / "whole", settings=settings)

    with pytest.raises(KeyboardInterrupt):
        make_job(phantom, tmp_path / "cut", settings=settings, on_batch=stop_after(2))
    assert len(pd.read_parquet(tmp_path / "cut" / "manifest.parquet")) == 2
    assert len(members(tmp_path / "cut" / "shards" / "000000.tar")) == 8
    make_job(phantom, tmp_path / "cut", settings=settings, resume=True)
    assert tree(tmp_path / "cut") == tree(tmp_path / "whole")


@pytest.mark.parametrize("size", [2, 4])
def test_a_stop_within_a_batch_leaves_a_whole_shard_without_it(make_job, phantom, tree, tmp_path, monkeypatch, size):
    settings = {**SHARDS, "shard_size": size}
    make_job(phantom, tmp_path / "whole", settings=settings)
    output, calls, encode = tmp_path / "cut", [], png.encode_synthesis

    def fourth_fails(synthesis):
        calls.append(synthesis)
        if synthesis.item.index == 3:
            raise StopError
        return encode(synthesis)

    with monkeypatch.context() as patch:
        patch.setattr(png, "encode_synthesis", fourth_fails)
        with pytest.raises(StopError):
            make_job(phantom, output, settings=settings)
    assert shards_of(output) == ["shards/000000.tar"]
    assert len(members(output / "shards" / "000000.tar")) == 8
    # As if it had been killed in the middle of the second batch: more members, and no end.
    shard = output / f"shards/{2 // size:06d}.tar"
    shard.write_bytes((tmp_path / "whole" / "shards" / shard.name).read_bytes()[:-11000])
    make_job(phantom, output, settings=settings, resume=True)
    assert tree(output) == tree(tmp_path / "whole")


def test_stopped_in_the_first_batch_nothing_stays(make_job, phantom, tmp_path, monkeypatch):
    def stop(made):
        raise KeyboardInterrupt

    monkeypatch.setattr("gbci_fast.generate.job.preview_panels", stop)
    with pytest.raises(KeyboardInterrupt):
        make_job(phantom, tmp_path / "data", settings=SHARDS)
    assert list(tmp_path.iterdir()) == []


def test_images_that_are_skipped_are_in_no_shard(make_job, phantom, tree, tmp_path):
    root = tmp_path / "root"
    shutil.copytree(phantom, root)
    first = VinDr(root).images[0].path
    first.write_bytes(first.read_bytes()[:5000])
    plan = make_plan(VinDr(root).images, variants=2, seed=0)
    make_job(root, tmp_path / "data", variants=2, skip_bad=True, settings=SHARDS)
    # The first batch made nothing, so its shard is absent.
    assert shards_of(tmp_path / "data") == [f"shards/{number:06d}.tar" for number in (1, 2, 3)]
    keys = [
        name.partition(".")[0] for path in shards_of(tmp_path / "data") for name in members(tmp_path / "data" / path)
    ]
    assert list(dict.fromkeys(keys)) == [item.image_id for item in plan[2:]]
    # In a shard of several batches the others go on behind it.
    make_job(root, tmp_path / "one", variants=2, skip_bad=True, settings={**SHARDS, "shard_size": 8})
    assert [name.partition(".")[0] for name in members(tmp_path / "one" / "shards" / "000000.tar")] == keys


def test_another_size_of_shard_is_another_job(make_job, phantom, sharded):
    with pytest.raises(GBCIError, match="holds another job: shard_size 2, not 3"):
        make_job(phantom, sharded, resume=True, settings={**SHARDS, "shard_size": 3})


def test_a_size_below_one_is_refused(make_job, phantom, tmp_path):
    with pytest.raises(GBCIError, match="shard_size is 0; expected at least 1"):
        make_job(phantom, tmp_path / "data", settings={**SHARDS, "shard_size": 0})


def test_a_shard_that_is_gone_on_with_is_the_shard_at_once(tmp_path):
    samples = {"a": {"png": b"1" * 700, "json": b"{}"}, "b": {"png": b"", "json": b"[]"}}
    with open_shard(tmp_path / "whole.tar", 0) as shard:
        for key, sample in samples.items():
            shard.add(key, sample)
    with open_shard(tmp_path / "parts.tar", 0) as shard:
        shard.add("a", samples["a"])
        end = shard.end
    assert members(tmp_path / "parts.tar") == {"a.png": b"1" * 700, "a.json": b"{}"}
    (tmp_path / "parts.tar").write_bytes((tmp_path / "parts.tar").read_bytes()[:end] + b"half of a member" * 1000)
    close_shard(tmp_path / "parts.tar", end)
    assert members(tmp_path / "parts.tar") == {"a.png": b"1" * 700, "a.json": b"{}"}
    with open_shard(tmp_path / "parts.tar", end) as shard:
        shard.add("b", samples["b"])
    assert (tmp_path / "parts.tar").read_bytes() == (tmp_path / "whole.tar").read_bytes()
    close_shard(tmp_path / "parts.tar", 0)
    assert not (tmp_path / "parts.tar").exists()


@pytest.mark.parametrize("left", [None, 0, 700])
def test_a_shard_that_lost_something_is_made_again(make_job, phantom, tree, tmp_path, left, stop_after):
    """For example, because somebody moved the shard away."""
    settings = {**SHARDS, "shard_size": 4}
    make_job(phantom, tmp_path / "whole", settings=settings)
    with pytest.raises(KeyboardInterrupt):
        make_job(phantom, tmp_path / "data", settings=settings, on_batch=stop_after(2))
    shard = tmp_path / "data" / "shards" / "000000.tar"
    shard.unlink() if left is None else shard.write_bytes(shard.read_bytes()[:left])
    make_job(phantom, tmp_path / "data", settings=settings, resume=True)
    assert tree(tmp_path / "data") == tree(tmp_path / "whole")
