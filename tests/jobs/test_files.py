"""Atomic writes of files and folders, and the file name in the error of a full disk."""

import os
import shutil

import pytest

from gbci_fast.jobs.files import atomically, hash_weights, is_empty, remove_temporaries


def fill(descriptor):
    raise OSError(28, "No space left on device")


def test_a_file_appears_whole_or_not_at_all(tmp_path):
    path = tmp_path / "deep" / "file"
    atomically(path, lambda temporary: temporary.write_text("one"), mode=0o600)
    assert (path.read_text(), path.stat().st_mode & 0o777) == ("one", 0o600)

    def half(temporary):
        temporary.write_text("tw")
        raise ValueError("no more")

    with pytest.raises(ValueError, match="no more"):
        atomically(path, half)
    assert [each.name for each in path.parent.iterdir()] == ["file"]
    assert path.read_text() == "one"


def test_a_full_disk_names_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", fill)
    with pytest.raises(OSError, match=r"No space left on device: '.*table\.csv'"):
        atomically(tmp_path / "table.csv", lambda temporary: temporary.write_text("x"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("names", [False, True])
def test_a_power_cut_leaves_the_old_file_or_the_new_one(recorded_disk, tmp_path, names):
    path = recorded_disk.root / "folder" / "file"
    for text in ("old", "new"):
        atomically(path, lambda temporary, text=text: temporary.write_text(text))
    found = []
    for count in range(1, len(recorded_disk.states) + (not names)):
        recorded_disk.cut(count, tmp_path / f"cut{count}", names=names)
        file = tmp_path / f"cut{count}" / "folder" / "file"
        found.append(file.read_text() if file.exists() else None)
    assert set(found) == {None, "old", "new"}
    assert found == sorted(found, key=[None, "old", "new"].index)


def test_names_of_users_are_no_temporaries(tmp_path):
    for name in (".hidden", "a.12.tmp", ".a.tmp", ".a.x12.tmp"):
        (tmp_path / name).write_text("mine")
    (tmp_path / ".a.12.tmp").write_text("half")
    assert not is_empty(tmp_path)
    remove_temporaries(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".a.tmp", ".a.x12.tmp", ".hidden", "a.12.tmp"]


def test_the_digest_of_weights_sees_through_links(tmp_path):
    for name in ("unet/config.json", "unet/model.safetensors", "model_index.json"):
        (tmp_path / "plain" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "plain" / name).write_text(name)
    (tmp_path / "linked").mkdir()
    for name in ("unet", "model_index.json"):
        (tmp_path / "linked" / name).symlink_to(tmp_path / "plain" / name)
    before = hash_weights(tmp_path / "plain")
    assert hash_weights(tmp_path / "linked") == before
    # Two names of one file count as two files. A loop of links ends.
    (tmp_path / "plain" / "vae").mkdir()
    (tmp_path / "plain" / "vae" / "config.json").symlink_to(tmp_path / "plain" / "unet" / "config.json")
    (tmp_path / "plain" / "vae" / "up").symlink_to(tmp_path / "plain")
    assert hash_weights(tmp_path / "plain") != before
    shutil.rmtree(tmp_path / "plain" / "vae")
    (tmp_path / "plain" / "unet" / "model.safetensors").write_text("other")
    assert hash_weights(tmp_path / "linked") == hash_weights(tmp_path / "plain") != before
