"""Job folders: notes that survive, damaged pieces of work, and exclusive use of the folder."""

import json
import os
import shutil
import tracemalloc
import zlib

import pytest

from gbci_fast.errors import GBCIError
from gbci_fast.jobs.files import locked
from gbci_fast.jobs.folder import JOURNAL, JobFolder, Kept

IDENTITY = {"seed": 1, "sizes": (2, 3), "digest": "ab" * 32}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "job"


def begin(path, **options):
    return JobFolder(path, IDENTITY, **options)


def make(path, *keys):
    """A job that notes a file per key, and is not finished."""
    job = begin(path)
    with job.claimed(resume=True):
        for key in keys:
            file = path / f"{key}.bin"
            file.write_bytes(f"content {key}".encode())
            job.note(key, {"key": key}, [Kept.of(path, file)])
    return job


def reopened(path):
    job = begin(path)
    assert job.begun(resume=True)
    return job


def journal(path):
    return path / ".progress" / JOURNAL


def test_notes_come_back_in_order(path):
    make(path, 10, 2, "end", 1)
    job = reopened(path)
    assert list(job) == [1, 2, 10, "end"]
    assert job.entry(10) == {"key": 10}
    assert 3 not in job
    assert job.damaged("digests") == []


def test_a_note_takes_little_memory(path):
    """8 bytes; the place of a line as an object of Python takes some 200."""
    make(path, 0)
    line = journal(path).read_bytes()
    text = line.split(b" ", 1)[1].rstrip(b"\n")
    with journal(path).open("wb") as file:
        for number in range(20_000):
            numbered = text.replace(b"[0,", b"[%d," % number, 1)
            file.write(b"%08x %s\n" % (zlib.crc32(numbered), numbered))
    tracemalloc.start()
    job = reopened(path)
    assert sum(1 for _ in job) == 20_000
    assert 19_999 in job
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert held < 500_000
    assert job.entry(19_999) == job.entry(0)


def test_the_last_note_of_a_key_counts(path):
    job = make(path, 1, 2)
    with job.claimed(resume=True):
        job.note(1, "again")
        job.forget([2])
    assert [(key, reopened(path).entry(key)) for key in reopened(path)] == [(1, "again")]


def test_a_note_that_is_cut_or_damaged_was_never_written(path):
    make(path, 1, 2, 3)
    lines = journal(path).read_bytes().splitlines(keepends=True)
    journal(path).write_bytes(lines[0] + lines[1].replace(b'"key"', b'"kez"') + lines[2])
    assert list(reopened(path)) == [1, 3]
    journal(path).write_bytes(b"".join(lines)[:-1])
    job = reopened(path)
    assert list(job) == [1, 2]
    with job.claimed(resume=True):
        job.note(3, "once more")  # overwrites the truncated line
    assert [reopened(path).entry(key) for key in (2, 3)] == [{"key": 2}, "once more"]
    journal(path).write_bytes(b"\0" * 4096)
    assert list(reopened(path)) == []


@pytest.mark.parametrize("damage", ["gone", "short", "long", "flipped"])
def test_work_whose_file_is_another_is_damaged(path, damage):
    make(path, 1, 2)
    file = path / "2.bin"
    content = file.read_bytes()
    if damage == "gone":
        file.unlink()
    else:
        file.write_bytes({"short": content[:-1], "long": content + b"x", "flipped": b"C" + content[1:]}[damage])
    job = reopened(path)
    assert job.damaged("digests") == [2]
    assert job.damaged("sizes") == ([] if damage == "flipped" else [2])
    assert (job.is_damaged(1), job.is_damaged(2)) == (False, True)


def test_a_part_of_a_file_may_be_followed_by_more(path):
    job = begin(path)
    with job.claimed(resume=False):
        (path / "growing").write_bytes(b"onetwo")
        job.note(1, None, [Kept.of(path, path / "growing", span=(0, 3))])
        job.note(2, None, [Kept.of(path, path / "growing", span=(3, 6))])
    (path / "growing").write_bytes(b"onetwothree")
    assert reopened(path).damaged("digests") == []
    (path / "growing").write_bytes(b"oneTWOthree")
    assert reopened(path).damaged("digests") == [2]
    (path / "growing").write_bytes(b"one")
    assert reopened(path).damaged("sizes") == [2]


def test_a_finished_job_keeps_its_notes_and_can_be_unfinished_again(path):
    job = make(path, 2, 1)
    with job.claimed(resume=True):
        (job.progress / "panel").write_bytes(b"x")
        job.note(3, None, [Kept.of(path, job.progress / "panel")])
        job.finish()
    assert job.finished
    assert not job.progress.exists()
    job = reopened(path)
    assert (job.finished, list(job), job.damaged("digests")) == (True, [1, 2, 3], [])
    with job.claimed(resume=True):
        assert not job.finished
        assert list(job) == [1, 2, 3]
        job.finish()
    assert reopened(path).finished


def test_the_notes_of_a_finished_job_do_not_tell_how_it_came_about(tmp_path):
    texts = []
    for keys in ((1, 2), (2, 2, 1)):
        path = tmp_path / f"job{len(keys)}"
        with make(path, *keys).claimed(resume=True):
            reopened(path).finish()
        texts.append((path / ".finished" / JOURNAL).read_bytes())
    assert texts[0] == texts[1]


def test_a_job_without_notes_leaves_nothing(path):
    with pytest.raises(KeyboardInterrupt), begin(path).claimed(resume=False):
        raise KeyboardInterrupt
    assert not path.exists()
    path.mkdir()
    with pytest.raises(KeyboardInterrupt), begin(path).claimed(resume=False):
        raise KeyboardInterrupt
    assert list(path.iterdir()) == []


def test_what_a_killed_run_leaves_counts_as_nothing(path):
    """A kill before the identity file is renamed, and a kill during a write."""
    (path / "images").mkdir(parents=True)
    for name in (".lock", ".job.json.123.tmp", "images/.a.png.7.tmp"):
        (path / name).write_bytes(b"")
    (path / ".pipeline.9.tmp" / "vae").mkdir(parents=True)
    (path / ".pipeline.9.tmp" / ".config.json.9.tmp").write_bytes(b"{")
    job = begin(path)
    assert not job.begun(resume=False)
    with job.claimed(resume=False):
        job.note(1, None)
    assert {file.relative_to(path).as_posix() for file in path.rglob("*")} == {
        "images", "job.json", ".progress", f".progress/{JOURNAL}",
    }  # fmt: skip


def test_the_identity_is_private_and_compared(path):
    job = begin(path, private={"key": "secret"})
    with job.claimed(resume=False):
        job.note(1, None)
    assert (path / "job.json").stat().st_mode & 0o777 == 0o600
    assert json.loads((path / "job.json").read_text())["key"] == "secret"
    job = begin(path, private={"key": "another"})
    assert job.begun(resume=True)
    assert job.stored["key"] == "secret"
    with pytest.raises(GBCIError, match="is not empty; pass --resume to continue the job there"):
        begin(path).begun(resume=False)
    other = JobFolder(path, {**IDENTITY, "seed": 2, "digest": "cd" * 32})
    said = (
        "holds another job: seed 1, not 2, other digest; resume with the same arguments, or choose another folder, ok$"
    )
    with pytest.raises(GBCIError, match=said):
        other.begun(resume=True, hint=lambda changed: ", ok" if changed == ["seed", "digest"] else "")


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff", b"[" * 100_000], ids=str)
def test_a_damaged_identity_is_one_sentence(path, content):
    make(path, 1)
    (path / "job.json").write_bytes(content)
    with pytest.raises(GBCIError, match=r"job\.json cannot be read, so .* holds no job to resume"):
        begin(path).begun(resume=True)


def test_other_files_are_refused_unless_they_are_shared(path):
    path.mkdir()
    (path / "bank.pt").write_bytes(b"latents")
    with pytest.raises(GBCIError, match="is not empty"):
        begin(path).begun(resume=False)
    with pytest.raises(GBCIError, match="holds no job to resume"):
        begin(path).begun(resume=True)
    job = begin(path, shared=True)
    assert not job.begun(resume=False)
    with pytest.raises(KeyboardInterrupt), job.claimed(resume=False):
        raise KeyboardInterrupt
    assert [file.name for file in path.iterdir()] == ["bank.pt"]


def test_one_process_at_a_time(path):
    job = make(path, 1)
    for holder in (job.claimed(resume=True), locked(path)):
        with holder, pytest.raises(GBCIError, match="job is in use by another run"):
            reopened(path).claimed(resume=True).__enter__()
    assert not (path / ".lock").exists()


def test_without_notes_nothing_is_resumed(path):
    job = make(path, 1)
    with job.claimed(resume=True):
        job.finish()
    shutil.rmtree(path / ".finished")
    with pytest.raises(GBCIError, match=r"has neither \.progress nor \.finished, the notes of its job"):
        begin(path).begun(resume=True)


def test_an_identity_that_is_a_pipe_is_not_waited_for(path):
    make(path, 1)
    (path / "job.json").unlink()
    os.mkfifo(path / "job.json")
    with pytest.raises(GBCIError, match=r"job\.json cannot be read"):
        begin(path).begun(resume=True)


def test_a_file_that_cannot_be_read_now_is_not_taken_for_lost(path, monkeypatch):
    make(path, 1)

    def refused(self, *args, **options):
        raise PermissionError(13, "Permission denied", str(self))

    job = reopened(path)
    monkeypatch.setattr("pathlib.Path.stat", refused)
    with pytest.raises(PermissionError):
        job.is_damaged(1)


@pytest.mark.parametrize("names", [False, True])
def test_a_power_cut_keeps_what_was_noted(recorded_disk, tmp_path, names):
    path, done = recorded_disk.root / "deep" / "job", []
    job = begin(path)
    with job.claimed(resume=False):
        for key in range(3):
            job.note(key, key)
            done.append(len(recorded_disk.states))
        job.finish()
    for count in range(1, len(recorded_disk.states) + (not names)):
        recorded_disk.cut(count, tmp_path / f"cut{count}", names=names)
        cut = begin(tmp_path / f"cut{count}" / "deep" / "job")
        begun = cut.begun(resume=True)
        assert begun or count < done[0]
        assert list(cut)[: len([each for each in done if each <= count])] == list(range(sum(x <= count for x in done)))
        if begun:
            assert [cut.entry(key) for key in cut] == list(cut)


def test_a_full_disk_names_the_journal(path, monkeypatch):
    job = make(path, 1)

    def full(descriptor):
        raise OSError(28, "No space left on device")

    with job.claimed(resume=True):
        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match=r"No space left on device: '.*journal\.jsonl'"):
            job.note(2, None)
        monkeypatch.undo()
        assert 2 not in job
        job.note(3, None)
    assert list(reopened(path)) == [1, 3]
