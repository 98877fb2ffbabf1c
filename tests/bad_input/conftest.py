"""A valid example of everything the commands take, and `refused`, which runs a command that must fail."""

import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from gbci_fast.cli import main
from gbci_fast.data.prepare import prepare
from gbci_fast.data.settings import PrepareSettings
from gbci_fast.data.vindr import VinDr
from gbci_fast.model.pipeline import GBCIPipeline
from gbci_fast.phantom import generate_phantom


@pytest.fixture(scope="session")
def world(tiny_checkpoint, tmp_path_factory):
    """{name: path}: weights (a pipeline folder), vae (a run of `train vae`), root, image, cache, text, mask, plan."""
    folder = tmp_path_factory.mktemp("world")
    shutil.copytree(tiny_checkpoint(224) / "vae", folder / "vae" / "vae")
    generate_phantom(folder / "root", studies=1, seed=0, size=(192, 160))
    records = VinDr(folder / "root").images
    prepare([folder / "root"], folder / "cache", PrepareSettings(split="training"), workers=1)
    (folder / "text.dcm").write_text("no image" * 100)
    Image.new("L", (8, 8), 255).save(folder / "mask.png")
    (folder / "plan.csv").write_text(f"image\n{records[0].image_id}\n")
    return {
        **{name: folder / name for name in ("vae", "root", "cache")},
        "weights": tiny_checkpoint(224),
        "text": folder / "text.dcm",
        "mask": folder / "mask.png",
        "plan": folder / "plan.csv",
        "image": records[0].path,
    }


@pytest.fixture(scope="session")
def opened_pipeline(world):
    pipe = GBCIPipeline.from_pretrained(world["weights"])
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def copy_of(world, tmp_path):
    """`copy_of("root")`: one of the examples, to be damaged."""

    def copy(name):
        source, target = world[name], tmp_path / world[name].name
        shutil.copytree(source, target) if source.is_dir() else shutil.copy(source, target)
        return target

    return copy


@pytest.fixture
def refused(world, opened_pipeline, tmp_path, capfd, monkeypatch):
    """`refused("generate {image} --variants 0")`: the one sentence of a command that fails and leaves nothing behind.

    Names in braces are those of `world`, {tmp}, and {out}, which does not exist. The end of `--output` and `--weights`
    may be left to this fixture. Exit status 2 has a usage text before its sentence.
    """

    def run(command, status=1, **names):
        arguments = [part.format(**world, **names, tmp=tmp_path, out=tmp_path / "out") for part in command.split(" ")]
        runs = status == 1 and "--write-plan" not in arguments
        if arguments[0] == "generate" and "--steps" not in arguments and runs:
            arguments += ["--steps", "1"]  # should it not be refused, it ends soon
        if arguments[0] == "generate" and "--weights" not in arguments:
            arguments += ["--weights", str(world["weights"])]
            monkeypatch.setattr("gbci_fast.model.checkpoint.load_pipeline", lambda folder, **options: opened_pipeline)
        if arguments[0] != "evaluate" and "{out}" not in command and "--output" not in arguments and runs:
            arguments += ["--output", str(tmp_path / "out")]
        before = _listing(tmp_path)
        handler = signal.getsignal(signal.SIGTERM)
        try:
            code = main(arguments)
        except SystemExit as error:
            code = error.code
        finally:
            signal.signal(signal.SIGTERM, handler)
        out, err = capfd.readouterr()
        assert code == status, (code, err)
        assert out == ""
        assert "Traceback" not in err
        *usage, sentence = err.splitlines()
        if status == 2:
            assert usage[0].startswith("usage: gbci-fast")
        else:
            assert usage == []
            assert sentence.startswith(f"gbci-fast {arguments[0]}: ")
        assert sentence.isprintable()
        assert 20 < len(sentence) < 1100
        assert _listing(tmp_path) == before
        return sentence

    return run


def _listing(folder: Path) -> dict[str, int]:
    """Every file and folder below, hidden and temporary ones too, with its time of change."""
    return {str(path): path.lstat().st_mtime_ns for path in sorted(folder.rglob("*"))}


@pytest.fixture
def grain():
    """uint16 [64, 64] of 12 bits."""
    return np.random.default_rng(0).integers(0, 4096, (64, 64)).astype(np.uint16)
