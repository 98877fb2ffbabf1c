"""What --resume does about a job that lost something: it ends in the bytes of a run that lost nothing."""

import shutil
from pathlib import Path

import pytest

from gbci_fast.data.deidentify import Deidentifier, KeptIdentifiers
from gbci_fast.data.vindr import VinDr
from gbci_fast.errors import GBCIError
from gbci_fast.generate.identities import Identities
from gbci_fast.model.pipeline import GBCIPipeline

SHARDS = {"formats": ("webdataset",), "shard_size": 4}


KEPT = Identities(KeptIdentifiers())


def flip(path, where=0.5):
    content = bytearray(path.read_bytes())
    content[int(where * len(content))] ^= 1
    path.write_bytes(content)


def cut(path):
    path.write_bytes(path.read_bytes()[:-1])


def first(output, pattern):
    return sorted(output.glob(pattern))[0]


@pytest.fixture(scope="module")
def sharded(make_job, phantom, tmp_path_factory):
    """A finished job over the phantom as one shard of two batches."""
    output = tmp_path_factory.mktemp("sharded") / "data"
    make_job(phantom, output, settings=SHARDS)
    return output


@pytest.fixture
def calls(monkeypatch):
    """Sizes of the batches that are sampled from here on."""
    sizes, call = [], GBCIPipeline.__call__

    def counted(self, image, *args, **options):
        sizes.append(len(image))
        return call(self, image, *args, **options)

    monkeypatch.setattr(GBCIPipeline, "__call__", counted)
    return sizes


@pytest.mark.parametrize("interrupted", [False, True])
@pytest.mark.parametrize("pattern", ["images/*/*.dicom", "images/*/*.png", "masks/*/*.png"])
@pytest.mark.parametrize("damage", [lambda path: path.unlink(), cut, flip], ids=["gone", "cut", "flipped"])
def test_damaged_files_are_made_again(
    make_job, phantom, finished, tree, tmp_path, calls, stop_after, pattern, damage, interrupted
):
    output = tmp_path / "data"
    if interrupted:
        with pytest.raises(KeyboardInterrupt):
            make_job(phantom, output, on_batch=stop_after(2))
    else:
        shutil.copytree(finished, output)
    calls.clear()
    damage(first(output, pattern))
    make_job(phantom, output, resume=True)
    assert tree(output) == tree(finished)
    assert calls == [2] * (1 + interrupted)


@pytest.mark.parametrize(
    "name", ["manifest.parquet", "finding_annotations.csv", "preview.png", ".finished/panels-000002.png"]
)
def test_damaged_tables_are_compiled_again(make_job, phantom, finished, tree, tmp_path, calls, name):
    output = shutil.copytree(finished, tmp_path / "data")
    flip(output / name)
    make_job(phantom, output, resume=True)
    assert tree(output) == tree(finished)
    assert calls == [2] * name.startswith(".")  # a panel is drawn of the pasted image


@pytest.mark.parametrize("damage", [cut, flip, lambda path: path.unlink()], ids=["cut", "flipped", "gone"])
@pytest.mark.parametrize("where", ["first", "last"])
def test_a_damaged_shard_is_made_again_from_there(make_job, phantom, sharded, tree, tmp_path, calls, damage, where):
    output = shutil.copytree(sharded, tmp_path / "data")
    shard = output / "shards" / "000000.tar"
    if damage is flip:
        flip(shard, 0.1 if where == "first" else 0.7)
    else:
        damage(shard)
    make_job(phantom, output, resume=True, settings=SHARDS)
    assert tree(output) == tree(sharded)
    last_alone = damage is cut or (damage is flip and where == "last")
    assert calls == [2] if last_alone else calls == [2, 2]


def test_sizes_alone_find_what_is_gone_and_not_what_is_flipped(make_job, phantom, finished, tree, tmp_path, calls):
    output = shutil.copytree(finished, tmp_path / "data")
    flip(first(output, "images/*/*.png"))
    make_job(phantom, output, resume=True, check="sizes")
    assert calls == []
    cut(first(output, "images/*/*.png"))
    make_job(phantom, output, resume=True, check="sizes")
    assert tree(output) == tree(finished)


def test_images_of_a_template_that_is_another_now_are_made_again(make_job, phantom, tree, tmp_path, calls):
    root, output = shutil.copytree(phantom, tmp_path / "root"), tmp_path / "data"
    names = Identities(Deidentifier(bytes(16)))  # a key of its own, which does not follow from the files
    make_job(root, output, identities=names)
    one, other = VinDr(root).images[0].path, VinDr(root).images[1].path
    one.write_bytes(other.read_bytes())
    calls.clear()
    make_job(root, output, resume=True, identities=names)
    assert calls == [2]
    make_job(root, tmp_path / "fresh", identities=names)
    assert tree(output) == tree(tmp_path / "fresh")


def test_a_finished_image_needs_no_template(make_job, phantom, finished, tree, tmp_path):
    root, output = shutil.copytree(phantom, tmp_path / "root"), tmp_path / "data"
    make_job(root, output)
    VinDr(root).images[0].path.unlink()
    make_job(root, output, resume=True)
    assert tree(output) == tree(finished)
    shutil.rmtree(output / "images")
    with pytest.raises(GBCIError, match="does not exist; expected every image of the input"):
        make_job(root, output, resume=True)


def test_a_stop_while_damage_is_mended_leaves_a_valid_set(
    images_of, make_job, phantom, finished, tree, tmp_path, monkeypatch
):
    output = shutil.copytree(finished, tmp_path / "data")
    cut(first(output, "masks/*/*.png"))

    def stop(*args, **options):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(GBCIPipeline, "__call__", stop)
        with pytest.raises(KeyboardInterrupt):
            make_job(phantom, output, resume=True)
    assert len(VinDr(output).images) == 4
    assert VinDr(output).missing() == []
    assert images_of(output).keys() == images_of(finished).keys()
    make_job(phantom, output, resume=True)
    assert tree(output) == tree(finished)


def test_a_stop_while_a_job_of_one_batch_is_mended_takes_nothing(
    images_of, make_job, phantom, tree, tmp_path, monkeypatch
):
    output, settings = tmp_path / "data", {"batch_size": 4}
    make_job(phantom, output, settings=settings)
    whole = tree(output)
    lost = first(output, "images/*/*.png")
    lost.unlink()

    def stop(*args, **options):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(GBCIPipeline, "__call__", stop)
        with pytest.raises(KeyboardInterrupt):
            make_job(phantom, output, resume=True, settings=settings)
    gone = {lost.relative_to(output).as_posix()}
    assert images_of(output).keys() | gone == {name for name in whole if name.startswith(("images/", "masks/"))}
    assert (output / "manifest.parquet").exists()
    make_job(phantom, output, resume=True, settings=settings)
    assert tree(output) == whole


def test_without_its_notes_a_job_is_not_begun_again(make_job, phantom, finished, tree, tmp_path):
    """As where hidden files were left behind by a copy."""
    output = shutil.copytree(finished, tmp_path / "data")
    shutil.rmtree(output / ".finished")
    before = tree(output)
    with pytest.raises(GBCIError, match=r"has neither \.progress nor \.finished, the notes of its job, and cannot be"):
        make_job(phantom, output, resume=True)
    assert tree(output) == before


@pytest.mark.parametrize("damage", [lambda tar: tar[:-600], lambda tar: tar + b"garbage"], ids=["cut", "longer"])
def test_a_whole_shard_of_an_unfinished_job_is_looked_at(make_job, phantom, tree, tmp_path, stop_after, damage):
    settings = {**SHARDS, "shard_size": 2}
    make_job(phantom, tmp_path / "whole", settings=settings, variants=2)
    output = tmp_path / "data"
    with pytest.raises(KeyboardInterrupt):
        make_job(phantom, output, settings=settings, variants=2, on_batch=stop_after(4))
    shard = output / "shards" / "000000.tar"
    shard.write_bytes(damage(shard.read_bytes()))
    make_job(phantom, output, settings=settings, variants=2, resume=True)
    assert tree(output) == tree(tmp_path / "whole")


def test_a_hole_that_was_filled_is_in_no_table(make_job, phantom, finished, tree, tmp_path):
    root, output = Path(shutil.copytree(phantom, tmp_path / "root")), tmp_path / "data"
    record = VinDr(root).images[0]
    content = record.path.read_bytes()
    record.path.write_bytes(content[:5000])
    make_job(root, output, skip_bad=True, identities=KEPT)
    assert (output / "skipped.csv").exists()
    record.path.write_bytes(content)
    shutil.rmtree(output / "images")
    make_job(root, output, resume=True, skip_bad=True, identities=KEPT)
    assert not (output / "skipped.csv").exists()
    make_job(root, tmp_path / "fresh", identities=KEPT)
    assert tree(output) == tree(tmp_path / "fresh")


def test_other_tables_of_the_input_are_another_job(make_job, phantom, tmp_path, stop_after):
    root = Path(shutil.copytree(phantom, tmp_path / "root"))
    with pytest.raises(KeyboardInterrupt):
        make_job(root, tmp_path / "data", on_batch=stop_after(2))
    table = root / "finding_annotations.csv"
    table.write_text(table.read_text().replace("benign", "malignant").replace("BI-RADS 3", "BI-RADS 5"))
    with pytest.raises(GBCIError, match="holds another job: other descriptions"):
        make_job(root, tmp_path / "data", resume=True)


def test_sizes_are_not_enough_for_what_is_read(make_job, phantom, finished, tree, tmp_path):
    output = shutil.copytree(finished, tmp_path / "data")
    flip(output / "manifest.parquet")
    make_job(phantom, output, resume=True, check="sizes")
    assert tree(output) == tree(finished)


@pytest.mark.parametrize("names", [False, True])
@pytest.mark.parametrize("settings", [{}, {**SHARDS, "shard_size": 2}], ids=["files", "shards"])
def test_a_power_cut_loses_no_batch_that_was_noted(
    make_job, phantom, finished, tree, tmp_path, recorded_disk, calls, names, settings
):
    """A cut after any call of fsync; here after a few of them."""
    output, done = recorded_disk.root / "data", []
    make_job(phantom, output, settings=settings, on_batch=lambda images: done.append(len(recorded_disk.states)))
    whole, total = tree(output), len(recorded_disk.states) - names
    moments = sorted({2, done[1] - 1, done[1], (done[1] + done[2]) // 2, done[2], total - 2, total})
    for count in moments:
        recorded_disk.cut(count, tmp_path / f"cut{count}", names=names)
        calls.clear()
        make_job(phantom, tmp_path / f"cut{count}" / "data", settings=settings, resume=True)
        made = tree(tmp_path / f"cut{count}" / "data")
        made.pop(".lock", None)  # which may stay
        assert made == whole, count
        assert sum(calls) <= 4 - 2 * sum(count >= noted for noted in done[1:]), count
