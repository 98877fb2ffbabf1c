"""Files below a folder, also through links: each listed once; entries that cannot be inspected are listed, too."""

import errno
from pathlib import Path

import pytest

from gbci_fast.data.walk import fault_of, walk_files


@pytest.fixture
def tree(tmp_path):
    """`tree("a/x", "b/y", ...)` makes empty files and returns the folder above them."""

    def make(*names):
        for name in names:
            (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "in" / name).touch()
        (tmp_path / "in").mkdir(exist_ok=True)
        return tmp_path / "in"

    return make


def names(folder):
    return [found.path.relative_to(folder).as_posix() for found in walk_files(folder)]


def test_folders_and_files_behind_links(tree, tmp_path):
    folder = tree("a/x", "y")
    (tmp_path / "else" / "deep").mkdir(parents=True)
    for name in ("else/z", "else/deep/w", "single"):
        (tmp_path / name).touch()
    (folder / "linked").symlink_to(tmp_path / "else")
    (folder / "a" / "file").symlink_to(tmp_path / "single")
    assert names(folder) == ["a/file", "a/x", "linked/deep/w", "linked/z", "y"]


def test_a_file_is_listed_once_by_the_path_without_a_link(tree):
    folder = tree("m/x", "m/y")
    (folder / "a").symlink_to(folder / "m")
    (folder / "b").symlink_to(folder / "a")
    (folder / "first").symlink_to(folder / "m" / "x")
    assert names(folder) == ["m/x", "m/y"]


def test_of_several_links_to_a_file_the_first_counts(tree, tmp_path):
    folder = tree("m/x")
    (tmp_path / "single").touch()
    for name in ("m/c", "m/b", "z"):
        (folder / name).symlink_to(tmp_path / "single")
    assert names(folder) == ["m/b", "m/x"]


def test_hard_links_are_files_of_their_own(tree):
    folder = tree("x")
    (folder / "y").hardlink_to(folder / "x")
    assert names(folder) == ["x", "y"]


@pytest.mark.parametrize("target", ["..", ".", "../..", "../other"])
def test_loops_end(tree, tmp_path, target):
    folder = tree("a/x", "other/y")
    (folder / "a" / "loop").symlink_to(target)
    (folder / "other" / "back").symlink_to("../a")
    assert names(folder) == ["a/x", "other/y"]


def test_a_link_that_leads_nowhere_and_one_to_itself(tree):
    folder = tree("x")
    (folder / "gone").symlink_to("absent")
    (folder / "self").symlink_to("self")
    assert [(found.path.name, found.fault) for found in walk_files(folder)] == [
        ("gone", "is a link that leads nowhere"),
        ("self", "cannot be read: Too many levels of symbolic links"),
        ("x", None),
    ]


def test_a_folder_that_cannot_be_listed(tree, monkeypatch):
    folder, listed = tree("a/x", "b/y", "c/z"), Path.iterdir

    def refuse(path):
        if path.name == "b":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return listed(path)

    monkeypatch.setattr(Path, "iterdir", refuse)
    assert [(found.path.name, found.fault) for found in walk_files(folder)] == [
        ("x", None),
        ("b", "cannot be read: Permission denied"),
        ("z", None),
    ]
    assert fault_of(folder / "b") == "cannot be read: Permission denied"


def test_what_is_wrong_with_one_path(tree):
    folder = tree("x")
    (folder / "gone").symlink_to("absent")
    assert [fault_of(folder / name) for name in ("x", "gone", "absent", ".")] == [
        None,
        "is a link that leads nowhere",
        "does not exist",
        "is a folder; expected a file",
    ]
