"""The engine cache: whole files or none, whatever happens to them and whoever else uses it."""

import json
import logging
import os
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from gbci_fast.errors import GBCIError
from gbci_fast.fast.tensorrt.build import Built
from gbci_fast.fast.tensorrt.cache import FORMAT, EngineCache, EngineKey, default_folder

KEY = EngineKey(
    part="unet", shape="b8-56x56-t224-guided", dtype="bfloat16", weights="w" * 64, graph="g" * 64,
    flavor="tensorrt-rtx", version="1.7.1.116", capability="8.6",
)  # fmt: skip
PLAN = bytes(range(256)) * 40


def built(plan=PLAN, structure=None):
    return Built(plan=plan, seconds=1.0, log=(), layers=(), inputs={}, structure=structure)


def never():
    raise AssertionError("it was built again")


@pytest.fixture
def cache(tmp_path):
    return EngineCache(tmp_path / "engines")


def test_what_was_built_is_found_again(cache):
    assert cache.get(KEY) is None
    assert not cache.folder.exists()  # to ask makes nothing
    assert cache.get_or_build(KEY, built) == PLAN
    assert EngineCache(cache.folder).get_or_build(KEY, never) == PLAN
    assert [path.name for path in cache.folder.glob("*")] != []
    assert not list(cache.folder.glob("*.tmp"))


@pytest.mark.parametrize(
    "change",
    [
        {"weights": "v"},
        {"graph": "h"},
        {"shape": "b1"},
        {"dtype": "float16"},
        {"flavor": "tensorrt"},
        {"part": "decoder"},
    ],
    ids=str,
)
def test_every_part_of_the_key_tells_plans_apart(cache, change):
    cache.get_or_build(KEY, built)
    assert cache.get(replace(KEY, **change)) is None
    assert cache.get_or_build(replace(KEY, **change), lambda: built(b"other")) == b"other"
    assert cache.get(KEY) == PLAN


def test_a_plan_for_several_capabilities_answers_for_each(cache):
    cache.get_or_build(replace(KEY, capability="8.0+8.6"), built)
    assert cache.get(KEY) == cache.get(replace(KEY, capability="8.0")) == PLAN
    for other in ("8.9", "8.0+8.9", "6"):
        assert cache.get(replace(KEY, capability=other)) is None


def truncate(path):
    path.write_bytes(path.read_bytes()[:-100])


def grow(path):
    path.write_bytes(path.read_bytes() + b"more")


def flip(path):
    data = bytearray(path.read_bytes())
    data[-50] ^= 1
    path.write_bytes(data)


def foreign(path):
    path.write_bytes(b"ftrt" + bytes(1000))


def empty(path):
    path.write_bytes(b"")


def no_header(path):
    path.write_bytes(FORMAT + b"{not JSON\n" + PLAN)


def other_header(path):
    path.write_bytes(FORMAT + json.dumps({"size": 1, "sha256": "", "structure": None, "key": {}}).encode() + b"\n")


def a_list_for_a_header(path):
    path.write_bytes(FORMAT + b"[1]\n" + PLAN)


DAMAGES = {
    truncate: f"its plan has {len(PLAN) - 100} bytes, and {len(PLAN)} were written",
    grow: f"its plan has {len(PLAN) + 4} bytes, and {len(PLAN)} were written",
    flip: "its bytes have changed since it was written",
    foreign: "it is no engine of gbci_fast",
    empty: "it is no engine of gbci_fast",
    no_header: "its header is damaged",
    other_header: "its header is damaged",
    a_list_for_a_header: "its header is damaged",
}


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_a_damaged_file_is_built_again_and_one_line_says_why(cache, damage, caplog):
    cache.get_or_build(KEY, built)
    damage(cache.path(KEY))
    assert cache.get_or_build(KEY, lambda: built(b"new")) == b"new"
    lines = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert lines == [f"{cache.path(KEY)} is not used and will be built again: {DAMAGES[damage]}"]
    assert cache.get(KEY) == b"new"


def test_one_of_another_version_is_replaced(cache, caplog):
    cache.get_or_build(KEY, built)
    newer = replace(KEY, version="1.8.0.1")
    assert cache.get_or_build(newer, lambda: built(b"new")) == b"new"
    assert "is not used and will be built again: it is of version 1.7.1.116, not 1.8.0.1" in caplog.text
    assert len(list(cache.folder.glob("*.engine"))) == 1


def test_one_that_was_renamed_is_not_taken_for_another(cache, caplog):
    cache.get_or_build(KEY, built)
    other = replace(KEY, weights="v" * 64)
    cache.path(KEY).rename(cache.path(other))
    assert cache.get(other) is None
    assert f"it is of weights {'w' * 64}, not {'v' * 64}" in caplog.text


def test_a_failed_build_leaves_nothing(cache):
    def fail():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cache.get_or_build(KEY, fail)
    assert not list(cache.folder.glob("*.engine"))
    assert cache.get_or_build(KEY, built) == PLAN


def test_what_a_killed_process_left_is_removed(cache):
    cache.folder.mkdir(parents=True)
    left = cache.folder / f".{KEY.file_name}.12345.tmp"
    left.write_bytes(b"half")
    cache.get_or_build(KEY, built)
    assert not left.exists()


def test_the_least_recently_used_make_room_but_never_the_new_one(tmp_path):
    keys = [replace(KEY, shape=f"b{i}") for i in range(4)]
    size = len(PLAN) + 1000
    cache = EngineCache(tmp_path, max_bytes=3 * size)
    for i, key in enumerate(keys[:3]):
        cache.get_or_build(key, built)
        os.utime(cache.path(key), (i, i))
    assert cache.get(keys[0]) == PLAN  # used: now the latest
    cache.get_or_build(keys[3], built)
    assert [cache.get(key) is not None for key in keys] == [True, False, True, True]
    tiny = EngineCache(tmp_path, max_bytes=1)
    assert tiny.get_or_build(KEY, built) == PLAN
    assert [path.name for path in tmp_path.glob("*.engine")] == [KEY.file_name]


def test_siblings_take_the_weights_of_the_same_structure(cache):
    cache.get_or_build(replace(KEY, weights="other"), lambda: built(structure="s"))
    cache.get_or_build(replace(KEY, weights="third"), lambda: built(b"fixed"))
    cache.get_or_build(replace(KEY, weights="fourth", dtype="float16"), lambda: built(b"narrow", "s"))
    (cache.folder / "damaged.engine").write_bytes(b"")
    assert list(cache.siblings(KEY, "s")) == [PLAN]
    assert list(cache.siblings(KEY, "t")) == []


def test_the_folder_is_the_user_s(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_folder() == tmp_path / "gbci_fast" / "engines" == EngineCache().folder
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_folder() == tmp_path / ".cache" / "gbci_fast" / "engines"


def test_a_limit_must_be_one():
    with pytest.raises(GBCIError, match="max_bytes is 0; expected more than 0"):
        EngineCache(max_bytes=0)


BUILDER = """
import logging, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
import test_cache
from gbci_fast.fast.tensorrt.cache import EngineCache
logging.basicConfig(level=logging.INFO)
folder = Path({folder!r})

def build():
    with (folder.parent / "built").open("a") as file:
        file.write("once\\n")
    print("building", flush=True)
    sys.stdin.readline()
    return test_cache.built()

print(len(EngineCache(folder).get_or_build(test_cache.KEY, build)))
"""


def test_two_processes_build_once(tmp_path):
    """The second comes while the first builds, waits, and reads what that one has written."""
    code = BUILDER.format(tests=str(Path(__file__).parent), folder=str(tmp_path / "engines"))
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    start = lambda: subprocess.Popen([sys.executable, "-c", code], text=True, **pipes)  # noqa: E731
    processes = [start()]
    watchdog = threading.Timer(60, lambda: [process.kill() for process in processes])  # a pipe ends with its process
    watchdog.start()
    assert processes[0].stdout.readline() == "building\n"
    processes.append(start())
    assert "waiting for another process" in processes[1].stderr.readline()
    processes[0].stdin.write("\n")
    assert [process.communicate()[0] for process in processes] == [f"{len(PLAN)}\n"] * 2
    watchdog.cancel()
    assert (tmp_path / "built").read_text() == "once\n"
    assert EngineCache(tmp_path / "engines").get(KEY) == PLAN
