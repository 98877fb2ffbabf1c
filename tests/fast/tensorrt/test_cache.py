"""The engine cache: whole files or none, also after damage, and with several processes."""

import logging
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from gbci_fast.fast.tensorrt.cache import EngineCache, EngineKey, default_folder

KEY = EngineKey(
    part="unet", shape="b8-56x56-t224-guided", dtype="bfloat16", weights="w" * 64, graph="g" * 64,
    flavor="tensorrt-rtx", version="1.7.1.116", capability="8.6",
)  # fmt: skip
ENGINE = bytes(range(256)) * 40


def built():
    return ENGINE


def never():
    raise AssertionError("it was built again")


@pytest.fixture
def cache(tmp_path):
    return EngineCache(tmp_path / "engines")


@pytest.fixture
def file(cache):
    """The file of an engine in the cache."""
    cache.get_or_build(KEY, built)
    return cache.folder / KEY.file_name


def test_what_was_built_is_found_again(cache, file):
    assert EngineCache(cache.folder).get_or_build(KEY, never) == ENGINE
    assert list(cache.folder.glob("*.engine")) == [file]
    assert not list(cache.folder.glob("*.tmp"))


@pytest.mark.parametrize(
    "change",
    [
        {"weights": "v"},
        {"graph": "h"},
        {"shape": "b1"},
        {"dtype": "float16"},
        {"flavor": "tensorrt"},
        {"version": "1.8.0.1"},
        {"part": "decoder"},
    ],
    ids=str,
)
def test_every_part_of_the_key_tells_engines_apart(cache, file, change):
    assert cache.get_or_build(replace(KEY, **change), lambda: b"other") == b"other"
    assert cache.get_or_build(replace(KEY, **change), never) == b"other"
    assert cache.get_or_build(KEY, never) == ENGINE


def test_an_engine_for_several_capabilities_answers_for_each(cache):
    cache.get_or_build(replace(KEY, capability="8.0+8.6"), built)
    assert cache.get_or_build(KEY, never) == cache.get_or_build(replace(KEY, capability="8.0"), never) == ENGINE
    for other in ("8.9", "8.0+8.9", "6"):
        assert cache.get_or_build(replace(KEY, capability=other), lambda: b"other") == b"other"


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


@pytest.mark.parametrize("damage", [truncate, grow, flip, foreign, empty], ids=lambda damage: damage.__name__)
def test_a_damaged_file_is_built_again_and_one_line_says_so(cache, file, damage, caplog):
    damage(file)
    assert cache.get_or_build(KEY, lambda: b"new") == b"new"
    lines = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert lines == [f"{file} is damaged and will be built again"]
    assert cache.get_or_build(KEY, never) == b"new"


def test_a_failed_build_leaves_nothing(cache):
    def fail():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cache.get_or_build(KEY, fail)
    assert not list(cache.folder.glob("*.engine"))
    assert cache.get_or_build(KEY, built) == ENGINE


def test_what_a_killed_process_left_is_removed(cache):
    cache.folder.mkdir(parents=True)
    left = cache.folder / f".{KEY.file_name}.12345.tmp"
    left.write_bytes(b"half")
    cache.get_or_build(KEY, built)
    assert not left.exists()


def test_the_folder_is_the_user_s(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_folder() == tmp_path / "gbci_fast" / "engines" == EngineCache().folder
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_folder() == tmp_path / ".cache" / "gbci_fast" / "engines"


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
    return test_cache.ENGINE

print(len(EngineCache(folder).get_or_build(test_cache.KEY, build)))
"""


def test_two_processes_build_once(tmp_path):
    """The second process starts while the first builds, waits, and reads the first one's engine."""
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
    assert [process.communicate()[0] for process in processes] == [f"{len(ENGINE)}\n"] * 2
    watchdog.cancel()
    assert (tmp_path / "built").read_text() == "once\n"
    assert EngineCache(tmp_path / "engines").get_or_build(KEY, never) == ENGINE
