"""`gbci-fast prepare`: options, exit status, and messages."""

import signal

import numpy as np
import pytest
from PIL import Image

from gbci_fast.cli import main
from gbci_fast.cli.progress import image_progress
from gbci_fast.data.cache import Cache
from gbci_fast.jobs.folder import PROGRESS_FOLDER


@pytest.fixture(autouse=True)
def restore_handler():
    """Restores the handler of SIGTERM, which `main` replaces."""
    kept = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, kept)


@pytest.fixture
def folder(tmp_path):
    """A folder with two mammograms and another file."""
    folder = tmp_path / "in"
    folder.mkdir()
    half_disk = (np.hypot(*np.ogrid[-64:64, :128]) < 60) * (3000 + np.arange(128))
    for name in ("a_LCC.png", "c_LMLO.png"):
        Image.fromarray(half_disk.astype(np.uint16)).save(folder / name)
    return folder


def run(*arguments):
    return main(["prepare", *map(str, arguments)])


def test_prepares_and_says_where_to_look(folder, tmp_path, capsys):
    output = tmp_path / "cache"
    options = ("--size", 32, "--views", "whole", "--split", "training", "--workers", 1)
    assert run(folder, "--output", output, *options) == 0
    said = capsys.readouterr()
    assert said.out == f"2 fields of view of 2 images in {output}; look at {output / 'qc' / 'report.html'}\n"
    assert said.err.splitlines()[-1].startswith("2/2 images  ")
    assert (Cache(output).size, len(Cache(output).of_folds("ABC"))) == (32, 2)

    assert run(folder, "--output", output, *options) == 1
    assert capsys.readouterr().err == (
        f"gbci-fast prepare: {output} is not empty; pass --resume to continue the job there, or choose another folder\n"
    )
    assert run(folder, "--output", output, *options, "--resume") == 0


def test_bad_files(folder, tmp_path, capsys):
    (folder / "b.png").write_bytes(b"no image")
    options = ("--output", tmp_path / "cache", "--size", 32, "--workers", 1)
    assert run(folder, *options) == 1
    *_, kept, sentence = capsys.readouterr().err.splitlines()
    assert kept == f"1 of 3 images are finished in {tmp_path / 'cache'}; --resume continues"
    assert sentence.startswith(f"gbci-fast prepare: {folder / 'b.png'}: neither DICOM nor PNG")
    assert run(folder, *options, "--skip-bad", "--resume") == 0
    first, _ = capsys.readouterr().out.splitlines()
    assert first == f"skipped 1 of 3, see {tmp_path / 'cache' / 'skipped.csv'}"


def test_usage(capsys):
    for arguments in ((), ("in",), ("in", "--output", "out", "--size", "x"), ("in", "--output", "o", "--split", "all")):
        with pytest.raises(SystemExit) as exit_info:
            run(*arguments)
        assert exit_info.value.code == 2
    with pytest.raises(SystemExit) as exit_info:
        run("--help")
    assert exit_info.value.code == 0
    assert "gbci-fast prepare VINDR_ROOT out/phantom --output out/cache" in capsys.readouterr().out


def test_a_log_has_a_bounded_number_of_lines(tmp_path, capsys):
    with image_progress("preparing", tmp_path) as on_image:
        for done in range(1001):
            on_image(done, 1000)
    lines = capsys.readouterr().err.splitlines()
    assert [line.split()[0] for line in lines] == [f"{50 * i}/1000" for i in range(1, 21)]
    assert all("images/s" in line and "left" in line for line in lines)


def test_a_slow_job_has_a_line_a_minute(tmp_path, capsys, monkeypatch):
    now = 0.0
    monkeypatch.setattr("gbci_fast.cli.progress.time.monotonic", lambda: now)
    with image_progress("preparing", tmp_path) as on_image:
        for done in range(10):
            on_image(done, 1_000_000)
            now += 25.0
    assert [line.split()[0] for line in capsys.readouterr().err.splitlines()] == [f"{n}/1000000" for n in (3, 6, 9)]


def test_a_stopped_job_says_what_is_finished(tmp_path, capsys):
    def stop():
        with image_progress("preparing", tmp_path) as on_image:
            on_image(0, 90)
            on_image(3, 90)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stop()
    assert capsys.readouterr().err == ""  # nothing to resume
    (tmp_path / PROGRESS_FOLDER).mkdir()
    with pytest.raises(KeyboardInterrupt):
        stop()
    assert capsys.readouterr().err == f"3 of 90 images are finished in {tmp_path}; --resume continues\n"
