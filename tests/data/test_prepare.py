"""A cache holds what reading the images gives, has reproducible bytes, and survives every interruption."""

import csv
import hashlib
import json
import multiprocessing
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor, wait
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from gbci_fast.data.cache import CACHE_FILE, INDEX, MASKS, PIXELS, Cache
from gbci_fast.data.fields import read_fields
from gbci_fast.data.folds import patient_fold
from gbci_fast.data.prepare import SKIPPED, open_sources, prepare
from gbci_fast.data.prepare_image import prepare_image
from gbci_fast.data.segmentation import pectoral_mask
from gbci_fast.data.settings import PrepareSettings
from gbci_fast.data.vindr import BREAST_TABLE, VinDr
from gbci_fast.errors import GBCIError
from gbci_fast.jobs.files import locked
from gbci_fast.jobs.folder import JOB_FILE, JOURNAL, PROGRESS_FOLDER
from gbci_fast.phantom import generate_phantom

SMALL = PrepareSettings(size=64)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("prepare") / "phantom"
    generate_phantom(root, studies=2, seed=1, size=128)
    return root


@pytest.fixture(scope="module")
def straight(root, tmp_path_factory):
    """The cache made by one worker without interruption."""
    output = tmp_path_factory.mktemp("prepare") / "cache"
    prepare([root], output, SMALL, workers=1)
    return output


@pytest.fixture
def copied(root, tmp_path):
    """A copy of the root, of the same name, for tests that damage it."""
    return Path(shutil.copytree(root, tmp_path / "copy" / root.name))


def digests(folder):
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


class Stop:
    """An `on_image` that calls a function once, when `count` images are done."""

    def __init__(self, count, action):
        self.count, self.action = count, action
        self.seen = []

    def __call__(self, done, total):
        self.seen.append(done)
        if done == self.count:
            self.action()


def interrupt():
    raise KeyboardInterrupt


def interrupted(root, output, count, **options):
    with pytest.raises(KeyboardInterrupt):
        prepare([root], output, SMALL, workers=1, on_image=Stop(count, interrupt), **options)
    return output / PROGRESS_FOLDER


def test_the_cache_holds_what_reading_gives(root, straight):
    cache, position = Cache(straight), 0
    for record in VinDr(root).images:
        reading = read_fields(record, root, 64)
        pectoral = pectoral_mask(reading.mammogram.unit(), reading.breast, record.view_position)
        for placed in reading.fields:
            item, row = cache[position], cache.row(position)
            np.testing.assert_array_equal(item.image, placed.field.image)
            np.testing.assert_array_equal(item.breast, placed.field.breast)
            assert (item.attributes, item.patient) == (placed.field.attributes, placed.field.patient)
            assert len(item.lesions) == len(placed.field.lesions)
            for lesion, expected in zip(item.lesions, placed.field.lesions, strict=True):
                np.testing.assert_array_equal(lesion.pixels, expected.pixels)
                assert (lesion.attributes, lesion.report) == (expected.attributes, expected.report)
                assert lesion.finding == expected.finding
            np.testing.assert_array_equal(
                cache.pectoral(position), (placed.frame.to_model(pectoral) > 0.5) & placed.field.breast
            )
            assert (row["kind"], cache.frame(position)) == (placed.kind, placed.frame)
            position += 1
    assert position == len(cache)
    assert {row["kind"] for row in cache.index.to_pylist()} == {"whole", "lesion"}
    assert any(cache.pectoral(i).any() for i in range(len(cache)))


def test_the_index_has_what_an_image_gives(root, straight):
    rows = iter(Cache(straight).index.to_pylist())
    for record in VinDr(root).images:
        made = prepare_image(record, root, root.name, SMALL)
        assert made.pixels.shape == (len(made.rows), 64, 64)
        assert len(made.masks) == len(made.rows)
        for ours in made.rows:
            row = next(rows)
            assert {name: row[name] for name in ("image_id", "kind", "sha256", "fold", "brightness")} == {
                name: ours[name] for name in ("image_id", "kind", "sha256", "fold", "brightness")
            }
    assert next(rows, None) is None


def test_the_index_says_where_everything_came_from(root, straight):
    records = {record.image_id: record for record in VinDr(root).images}
    rows = Cache(straight).index.to_pylist()
    assert [row["image_id"] for row in rows if row["kind"] == "whole"] == list(records)
    for row in rows:
        record = records[row["image_id"]]
        assert (row["source"], row["study_id"], row["split"]) == ("phantom", record.study_id, record.split)
        assert root / row["path"] == record.path
        assert row["sha256"] == hashlib.sha256(record.path.read_bytes()).hexdigest()
        assert (row["patient"], row["fold"]) == (record.extra["patient_id"], patient_fold(row["patient"]))
        assert (row["height"], row["width"], row["findings"]) == (128, 128, len(record.findings))
        assert row["row_spacing"] == pytest.approx(240 / 128)
        assert json.loads(row["extra"]) == record.extra
        for lesion in row["lesions"]:
            assert tuple(lesion["box"]) == record.findings[lesion["finding"]].box
            assert lesion["inside"] > 0.5
    assert any(row["lesions"] for row in rows)
    assert str(root.parent) not in (straight / CACHE_FILE).read_text()


def test_arrays_are_plain_npy_files(straight):
    cache = Cache(straight)
    pixels, masks = (np.load(straight / name) for name in (PIXELS, MASKS))
    assert (pixels.shape, pixels.dtype) == ((len(cache), 64, 64), np.uint16)
    assert masks.shape == (sum(2 + len(row["lesions"]) for row in cache.index.to_pylist()), 512)
    cache.verify()


def test_bytes_do_not_depend_on_the_workers_or_the_place(straight, copied, tmp_path):
    prepare([copied], tmp_path / "cache", SMALL, workers=2)
    assert digests(tmp_path / "cache") == digests(straight)
    assert sorted(digests(straight)) == sorted(
        [CACHE_FILE, INDEX, MASKS, PIXELS, "qc/contact-sheet.png", "qc/report.html", "qc/summary.png"]
    )


def test_interrupted_twice_and_resumed_is_the_same(root, straight, tmp_path):
    output = tmp_path / "cache"
    interrupted(root, output, 3)
    assert [path.name for path in output.iterdir()] == [PROGRESS_FOLDER]
    with pytest.raises(GBCIError, match="is not finished; run `gbci-fast prepare` with the same arguments"):
        Cache(output)
    interrupted(root, output, 5, resume=True)
    stop = Stop(1000, interrupt)
    prepare([root], output, SMALL, workers=2, resume=True, on_image=stop)
    assert stop.seen == list(range(5, 9))
    assert digests(output) == digests(straight)


def test_a_killed_job_is_resumed_from_its_last_whole_image(root, straight, tmp_path):
    """A kill or power loss leaves truncated files, or a journal that is ahead of the arrays."""
    output = tmp_path / "cache"
    progress = interrupted(root, output, 5)
    with (progress / PIXELS).open("ab") as pixels, (progress / JOURNAL).open("ab") as journal:
        pixels.write(b"\1" * 1000)
        journal.write(b'0123abcd [5, {"entr')
    with (progress / MASKS).open("r+b") as masks:  # some image's mask never reached the disk
        masks.seek(-700, os.SEEK_END)
        masks.write(b"\xaa\x55" * 50)
    stop = Stop(1000, interrupt)
    prepare([root], output, SMALL, workers=1, resume=True, on_image=stop)
    assert 0 < stop.seen[0] < 5
    assert digests(output) == digests(straight)


@pytest.mark.parametrize("names", [False, True])
def test_a_power_cut_loses_no_image_that_was_noted(root, straight, tmp_path, recorded_disk, names):
    output, done = recorded_disk.root / "cache", []
    prepare([root], output, SMALL, workers=1, on_image=lambda images, total: done.append(len(recorded_disk.states)))
    total = len(recorded_disk.states) - names
    for count in (done[3], done[8] + 2, (done[8] + total) // 2, total - 1):
        recorded_disk.cut(count, tmp_path / f"cut{count}", names=names)
        stop = Stop(1000, interrupt)
        prepare([root], tmp_path / f"cut{count}" / "cache", SMALL, workers=1, resume=True, on_image=stop)
        found = digests(tmp_path / f"cut{count}" / "cache")
        found.pop(".lock", None)  # the lock file may remain
        assert found == digests(straight), count
        assert not stop.seen or stop.seen[0] >= sum(count >= noted for noted in done[1:]), count


@pytest.mark.parametrize("name", [PIXELS, MASKS])
def test_a_finished_cache_that_is_damaged_is_refused(root, straight, tmp_path, name):
    output = Path(shutil.copytree(straight, tmp_path / "cache"))
    content = bytearray((output / name).read_bytes())
    content[-1000] ^= 1
    (output / name).write_bytes(content)
    prepare([root], output, SMALL, resume=True, check="sizes")
    with pytest.raises(GBCIError, match=rf"{name} is not the file that cache.json describes; prepare the cache again"):
        prepare([root], output, SMALL, resume=True)


def test_an_input_of_the_same_size_that_is_another_is_not_resumed(copied, tmp_path):
    interrupted(copied, tmp_path / "cache", 4)
    first = VinDr(copied).images[0].path
    content = bytearray(first.read_bytes())
    content[-1000] ^= 1
    first.write_bytes(content)
    with pytest.raises(GBCIError, match=rf"{first.name} is not the file that it was when it was prepared; start again"):
        prepare([copied], tmp_path / "cache", SMALL, workers=1, resume=True)
    prepare([copied], tmp_path / "cache", SMALL, workers=1, resume=True, check="sizes")


def test_workers_end_with_a_killed_parent(root, straight, tmp_path):
    """The pipe reaches its end when the last process that holds it ends."""
    output = tmp_path / "cache"
    script = (
        "import os, signal, sys; from pathlib import Path; from gbci_fast.data.prepare import *\n"
        "kill = lambda done, total: done < 3 or os.kill(os.getpid(), signal.SIGKILL)\n"
        "prepare([Path(sys.argv[1])], Path(sys.argv[2]), PrepareSettings(size=64), workers=2, on_image=kill)"
    )
    ended = subprocess.run([sys.executable, "-c", script, root, output], capture_output=True, timeout=120)
    assert ended.returncode == -signal.SIGKILL
    assert len((output / PROGRESS_FOLDER / JOURNAL).read_text().splitlines()) == 3
    prepare([root], output, SMALL, workers=1, resume=True)
    assert digests(output) == digests(straight)


@pytest.mark.parametrize("moved", [(PIXELS,), (PIXELS, MASKS, INDEX, "qc")])
def test_killed_while_the_results_move_up(root, straight, tmp_path, moved):
    output = tmp_path / "cache"
    progress = interrupted(root, output, 8)
    for name in moved:
        source = progress / name if name in (PIXELS, MASKS) else straight / name
        (shutil.copytree if source.is_dir() else shutil.copy)(source, output / name)
        if source.parent == progress:
            source.unlink()
    shutil.copy(straight / CACHE_FILE, progress / CACHE_FILE)
    prepare([root], output, SMALL, workers=1, resume=True)
    assert digests(output) == digests(straight)


def test_a_dead_worker_is_one_sentence_and_resumable(root, straight, tmp_path):
    output = tmp_path / "cache"

    def kill():
        for child in multiprocessing.active_children():
            os.kill(child.pid, signal.SIGKILL)

    with pytest.raises(GBCIError, match=r"^a worker process was killed by SIGKILL, .*, at \S+\.dicom or one of"):
        prepare([root], output, SMALL, workers=1, on_image=Stop(2, kill))
    prepare([root], output, SMALL, workers=1, resume=True)
    assert digests(output) == digests(straight)


def test_a_worker_that_dies_behind_good_results_is_one_sentence(root, tmp_path, monkeypatch):
    """If the next result is sound, `submit` is the first call to find the pool broken."""
    submit, died = ProcessPoolExecutor.submit, []

    def submit_to_the_dead(pool, *arguments):
        future = submit(pool, *arguments)
        died.append(future)
        if len(died) == 4:
            wait(died)
            for child in multiprocessing.active_children():
                os.kill(child.pid, signal.SIGKILL)
            wait([submit(pool, os.getpid)])
        return future

    monkeypatch.setattr(ProcessPoolExecutor, "submit", submit_to_the_dead)
    with pytest.raises(GBCIError, match=r"^a worker process was killed by SIGKILL, .*, at \S+\.dicom or one of"):
        prepare([root], tmp_path / "cache", SMALL, workers=1)


def test_a_full_disk_is_one_sentence_and_resumable(root, straight, tmp_path):
    output, limits = tmp_path / "cache", resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large") as raised:
            prepare([root], output, SMALL, workers=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert Path(raised.value.filename).is_relative_to(output)
    assert not (output / CACHE_FILE).exists()
    prepare([root], output, SMALL, workers=1, resume=True)
    assert digests(output) == digests(straight)


def test_a_disk_without_room_is_refused_before_any_work(root, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 10_000))
    with pytest.raises(GBCIError, match=r"has 0 MB of free space; expected at least 27 MB$"):
        prepare([root], tmp_path / "cache", PrepareSettings(size=1250))
    assert not (tmp_path / "cache").exists()


def test_a_finished_cache_is_left_as_it_is(root, straight, tmp_path):
    output = Path(shutil.copytree(straight, tmp_path / "cache"))
    before = (output / PIXELS).stat().st_mtime_ns
    made = prepare([root], output, SMALL, resume=True)
    assert (made.images, made.skipped, made.views) == (8, 0, len(Cache(straight)))
    assert (output / PIXELS).stat().st_mtime_ns == before
    with pytest.raises(GBCIError, match="is not empty; pass --resume to continue the job there"):
        prepare([root], output, SMALL)
    with pytest.raises(GBCIError, match=r"cache holds another job: size 64, not 65; resume with the same arguments"):
        prepare([root], output, PrepareSettings(size=65), resume=True)


def test_changed_inputs_are_not_resumed(copied, tmp_path):
    output = tmp_path / "cache"
    progress = interrupted(copied, output, 4)
    table = copied / BREAST_TABLE
    text = table.read_text()
    table.write_text(re.sub("training|test", lambda match: {"test": "training"}.get(match[0], "test"), text))
    before = digests(output)
    with pytest.raises(GBCIError, match=r"holds another job: other inputs; resume with the same arguments"):
        prepare([copied], output, SMALL, workers=1, resume=True)
    table.write_text(text)
    first = VinDr(copied).images[0].path
    with first.open("ab") as file:
        file.write(b"\0\0")
    size = first.stat().st_size
    with pytest.raises(GBCIError, match=rf"{first.name} has {size} bytes, and had {size - 2} when it was prepared"):
        prepare([copied], output, SMALL, workers=1, resume=True)
    assert digests(output) == before
    (progress / JOB_FILE).write_text("[")
    with pytest.raises(GBCIError, match=r"job.json cannot be read, so \S+ holds no job to resume"):
        prepare([copied], output, SMALL, workers=1, resume=True)


def test_one_job_per_folder(root, tmp_path):
    interrupted(root, tmp_path / "cache", 2)
    before = digests(tmp_path / "cache")
    with (
        locked(tmp_path / "cache"),
        pytest.raises(GBCIError, match=r"cache is in use by another run; wait until it ends, or choose another"),
    ):
        prepare([root], tmp_path / "cache", SMALL, resume=True)
    assert digests(tmp_path / "cache") == before


def spoil(root):
    """Makes one image unreadable, removes another, and returns their records."""
    images = VinDr(root).images
    images[2].path.write_bytes(images[2].path.read_bytes()[:700])
    images[5].path.unlink()
    return images[2], images[5]


def test_bad_files_stop_the_job_or_are_skipped(copied, tmp_path):
    output = tmp_path / "cache"
    damaged, missing = spoil(copied)
    with pytest.raises(GBCIError, match=rf"^{re.escape(str(missing.path))} does not exist; expected every listed"):
        prepare([copied], output, SMALL, workers=1)
    assert not output.exists()

    made = prepare([copied], output, SMALL, workers=2, skip_bad=True)
    assert (made.images, made.skipped) == (6, 2)
    header, *rows = csv.reader((output / SKIPPED).open())
    assert header == ["file", "reason"]
    assert [row[0] for row in rows] == [
        f"phantom/images/{record.study_id}/{record.image_id}.dicom" for record in (damaged, missing)
    ]
    assert all(
        row[1].startswith(f"images/{record.study_id}/") for row, record in zip(rows, (damaged, missing), strict=True)
    )
    ids = {row["image_id"] for row in Cache(output).index.to_pylist()}
    assert len(ids) == 6
    assert not ids & {damaged.image_id, missing.image_id}
    report = (output / "qc" / "report.html").read_text()
    assert f"{damaged.image_id}.dicom" in report
    assert str(copied.parent) not in report + (output / SKIPPED).read_text()


def test_a_damaged_file_may_be_repaired_before_a_resume(root, straight, copied, tmp_path):
    output = tmp_path / "cache"
    record = VinDr(copied).images[2]
    record.path.write_bytes(record.path.read_bytes()[:700])
    with pytest.raises(GBCIError, match=rf"^{re.escape(str(record.path))}: no PixelData"):
        prepare([copied], output, SMALL, workers=1)
    shutil.copy(root / "images" / record.study_id / record.path.name, record.path)
    prepare([copied], output, SMALL, workers=1, resume=True)
    assert digests(output) == digests(straight)


def test_a_link_may_be_repaired_before_a_resume(tmp_path):
    write_png(tmp_path / "in" / "a_LCC.png")
    write_png(tmp_path / "kept.png")
    (tmp_path / "in" / "b_LCC.png").symlink_to(tmp_path / "later.png")
    with pytest.raises(GBCIError, match=r"b_LCC\.png is a link that leads nowhere"):
        prepare([tmp_path / "in"], tmp_path / "cache", PrepareSettings(size=32), workers=1)
    stop = Stop(1, interrupt)
    with pytest.raises(KeyboardInterrupt):
        prepare([tmp_path / "in"], tmp_path / "cache", PrepareSettings(size=32), skip_bad=True, on_image=stop)
    (tmp_path / "kept.png").rename(tmp_path / "later.png")
    made = prepare([tmp_path / "in"], tmp_path / "cache", PrepareSettings(size=32), workers=1, resume=True)
    assert (made.images, made.skipped) == (2, 0)


def test_nothing_but_bad_files_leaves_nothing(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.png").write_bytes(b"no image")
    with pytest.raises(GBCIError, match=r"^none of 1 images gave a field of view; the first: a.png: neither DICOM"):
        prepare([tmp_path / "in"], tmp_path / "cache", SMALL, workers=1, skip_bad=True)
    assert not (tmp_path / "cache").exists()


def write_png(path, radius=60):
    """A half disk as breast at the left border, 128 x 128 pixels of 12 bits."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = (np.hypot(*np.ogrid[-64:64, :128]) < radius) * (3000 + np.arange(128))
    Image.fromarray(image.astype(np.uint16)).save(path)


def test_plain_folders_and_several_roots(tmp_path):
    for name in ("a/x/LEFT_CC.png", "b/x/RIGHT_MLO.png", "b/x/sub/LCC.png"):
        write_png(tmp_path / name)
    roots = [tmp_path / "a" / "x", tmp_path / "b" / "x"]
    made = prepare(roots, tmp_path / "cache", PrepareSettings(size=32, split="test"), workers=1)
    rows = Cache(tmp_path / "cache").index.to_pylist()
    assert made.views == len(rows) == 3
    assert [(row["source"], row["path"], row["view_position"], row["laterality"]) for row in rows] == [
        ("x", "LEFT_CC.png", "CC", "L"),
        ("x-2", "RIGHT_MLO.png", "MLO", "R"),
        ("x-2", "sub/LCC.png", "CC", "L"),
    ]
    assert {row["split"] for row in rows} == {"test"}
    assert {row["row_spacing"] for row in rows} == {None}
    assert "stated to be a right breast, but the chest wall lies on the left" in rows[1]["notes"]
    assert not any("stated" in note for row in (rows[0], rows[2]) for note in row["notes"])


def test_roots_are_told_apart(tmp_path):
    for name in ("x-2/1.png", "1/x/1.png", "2/x/1.png"):
        write_png(tmp_path / name)
    sources = open_sources([tmp_path / "1" / "x", tmp_path / "x-2", tmp_path / "2" / "x"])
    assert [source.name for source in sources] == ["x", "x-2", "x-3"]
    with pytest.raises(GBCIError, match=r"x-2/1.png lies in the folder of an earlier root; expected every folder once"):
        open_sources([tmp_path / "x-2", tmp_path / "x-2" / "1.png"])
    with pytest.raises(GBCIError, match=r"x-2 is given twice; expected every folder once"):
        open_sources([tmp_path / "x-2", tmp_path / "x-2" / ".." / "x-2"])


def test_view_kinds_can_be_chosen(root, straight, tmp_path):
    both = Cache(straight).index.to_pylist()
    for kind in ("whole", "lesion"):
        prepare([root], tmp_path / kind, PrepareSettings(size=64, views=(kind,)), workers=1)
        cache = Cache(tmp_path / kind)
        expected = [i for i, row in enumerate(both) if row["kind"] == kind]
        assert [row["kind"] for row in cache.index.to_pylist()] == [kind] * len(expected)
        np.testing.assert_array_equal(np.load(tmp_path / kind / PIXELS), np.load(straight / PIXELS)[expected])


@pytest.mark.parametrize(
    ("settings", "options", "sentence"),
    [
        ({"size": 8}, {}, "size is 8; expected 16 to 4096 pixels"),
        ({"views": ("whole", "all")}, {}, "views is 'whole,all'; expected one or more of whole, lesion"),
        ({"split": "train"}, {}, "split is 'train'; expected one of training, test"),
        ({}, {"workers": 0}, "workers is 0; expected at least 1"),
        ({}, {"sheets": 0}, "sheets is 0; expected at least 1"),
    ],
)
def test_bad_settings(root, tmp_path, settings, options, sentence):
    with pytest.raises(GBCIError, match=f"^{re.escape(sentence)}$"):
        prepare([root], tmp_path / "cache", PrepareSettings(**settings), **options)
    assert not (tmp_path / "cache").exists()


def test_the_output_may_not_lie_among_the_inputs(copied, tmp_path):
    with pytest.raises(GBCIError, match=r"where images are read from; choose a folder outside$"):
        prepare([copied], copied / "cache", SMALL)
    (tmp_path / "file").write_text("")
    with pytest.raises(GBCIError, match=r"file is a file; expected a folder to write to$"):
        prepare([copied], tmp_path / "file", SMALL)
    (copied / BREAST_TABLE).unlink()
    with pytest.raises(GBCIError, match=rf"{BREAST_TABLE} does not exist; a VinDr-Mammo folder has it"):
        prepare([copied], tmp_path / "cache", SMALL)
    assert not (tmp_path / "cache").exists()
