"""`gbci-fast train`: both tiny stages end to end, Ctrl-C and resume, and what is refused."""

import io
import os
import re
import shutil
import signal
from contextlib import redirect_stdout
from dataclasses import replace

import pytest
import torch
from diffusers import AutoencoderKL

from gbci_fast.attributes import MARGINS, Attributes
from gbci_fast.cli import main
from gbci_fast.errors import GBCIError
from gbci_fast.model.conditioning import FIRST_ATTRIBUTES
from gbci_fast.model.pipeline import GBCIPipeline
from gbci_fast.training import stages
from gbci_fast.training.bank import BANK_FILE
from gbci_fast.training.ldm import LDMTask, build_pipeline
from gbci_fast.training.loop import STATE_FILE
from gbci_fast.training.vae import VAETask

STEPS = ("--steps", 30, "--save-every", 10, "--seed", 3)


@pytest.fixture(scope="module", autouse=True)
def restore_handlers():
    """`main` sets a handler for SIGTERM, as befits a process of its own."""
    kept = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, kept)


def train(*arguments):
    return main(["train", *map(str, arguments)])


def losses(printed):
    return [float(value) for value in re.findall(r"loss (\d+\.\d+)", printed)]


@pytest.fixture(scope="module")
def vae_run(phantom_root, tmp_path_factory):
    """A finished tiny autoencoder, and what its training printed."""
    folder = tmp_path_factory.mktemp("stages") / "vae"
    with redirect_stdout(io.StringIO()) as printed:
        status = train("vae", "--data", phantom_root, "--output", folder, "--preset", "tiny", *STEPS)
    assert status == 0
    return folder, printed.getvalue()


def test_autoencoder(vae_run):
    folder, printed = vae_run
    first, *_, last = losses(printed)
    assert last < 0.75 * first
    assert sorted(path.name for path in folder.iterdir()) == [".finished", "job.json", "samples", STATE_FILE, "vae"]
    assert [path.name for path in (folder / "samples").iterdir()] == ["0000030.png"]


def test_latent_diffusion(vae_run, phantom_root, tmp_path, capsys, monkeypatch):
    options = ("--data", phantom_root, "--vae", vae_run[0], "--preset", "tiny", *STEPS[2:], "--latent-crops", 12, 16)
    assert train("ldm", *options, "--output", tmp_path / "ldm", "--steps", 30) == 0
    first, *_, last = losses(capsys.readouterr().out)
    assert last < 0.85 * first
    assert sorted(path.name for path in (tmp_path / "ldm").iterdir()) == [
        ".finished", BANK_FILE, "job.json", "pipeline", "samples", STATE_FILE,
    ]  # fmt: skip
    trained = GBCIPipeline.from_pretrained(tmp_path / "ldm" / "pipeline")
    vae = AutoencoderKL.from_pretrained(vae_run[0] / "vae").state_dict()
    assert all(torch.equal(value, vae[name]) for name, value in trained.vae.state_dict().items())

    # --init begins where that run's average ended
    monkeypatch.setattr(LDMTask, "sample_sheet", lambda self, path: None)  # slow, and seen above
    further = (*options, "--output", tmp_path / "more", "--init", tmp_path / "ldm" / "pipeline")
    assert train("ldm", *further, "--steps", 1, "--learning-rate", 1e-9) == 0
    begun = GBCIPipeline.from_pretrained(tmp_path / "more" / "pipeline")
    for name, value in trained.unet.state_dict().items():
        torch.testing.assert_close(begun.unet.state_dict()[name], value, rtol=0, atol=1e-6)


def test_a_checkpoint_of_fewer_attributes_is_trained_on_with_all(vae_run, phantom_root, tmp_path, monkeypatch):
    """New attributes get tokens that one step moves, and that differ between margins."""
    monkeypatch.setattr(LDMTask, "sample_sheet", lambda self, path: None)
    vae = AutoencoderKL.from_pretrained(vae_run[0] / "vae")
    old = build_pipeline(replace(stages.ldm_preset("tiny")[0], attributes=FIRST_ATTRIBUTES), vae, 224)
    old.save_pretrained(tmp_path / "old")
    options = ("--data", phantom_root, "--vae", vae_run[0], "--preset", "tiny", "--init", tmp_path / "old")
    assert train("ldm", *options, "--output", tmp_path / "new", "--steps", 1, "--learning-rate", 1e-2) == 0
    new = GBCIPipeline.from_pretrained(tmp_path / "new" / "pipeline").conditioner
    assert new.ignores == ()
    margins = [Attributes(margin=name) for name in (None, *MARGINS)]
    tokens = new.encode_attributes(margins)[:, list(new.config.attributes).index("margin")]
    distances = torch.cdist(tokens, tokens) + 10 * torch.eye(len(tokens))
    assert distances.min() > 0.1
    torch.manual_seed(3)  # of the run: its conditioner before the step
    fresh = build_pipeline(stages.ldm_preset("tiny")[0], vae, 224).conditioner
    told = fresh.categorical["margin"].weight != new.categorical["margin"].weight
    assert told.any()
    known = Attributes(view_position="CC", finding_birads=5)
    rows = slice(0, len(FIRST_ATTRIBUTES))
    torch.testing.assert_close(
        new.encode_attributes([known])[:, rows], old.conditioner.encode_attributes([known]), rtol=0, atol=0.05
    )


def test_an_autoencoder_can_be_trained_on(vae_run, phantom_root, tmp_path, capsys):
    folder = tmp_path / "pipeline"
    vae = AutoencoderKL.from_pretrained(vae_run[0] / "vae")
    build_pipeline(stages.ldm_preset("tiny")[0], vae, 64).save_pretrained(folder)
    options = ("vae", "--data", phantom_root, "--preset", "tiny", "--steps", 1, "--learning-rate", 1e-9)
    assert train(*options, "--output", tmp_path / "more", "--init", folder) == 0
    begun = AutoencoderKL.from_pretrained(tmp_path / "more" / "vae").state_dict()
    for name, value in vae.state_dict().items():
        torch.testing.assert_close(begun[name], value, rtol=0, atol=1e-6)
    said = refusal(capsys, "vae", "--data", phantom_root, "--steps", 1, "--output", tmp_path / "base", "--init", folder)
    assert said == (f"gbci-fast train: {folder} holds a model of another shape; expected that of the chosen --preset\n")


def test_interrupted_and_resumed_is_the_same_run(phantom_root, tmp_path, monkeypatch, capsys):
    options = ("vae", "--data", phantom_root, "--preset", "tiny", "--steps", 4, "--batch-size", 1)
    assert train(*options, "--output", tmp_path / "straight") == 0
    calls, loss = [], VAETask.loss

    def interrupting(self, *args):
        calls.append(1)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return loss(self, *args)

    monkeypatch.setattr(VAETask, "loss", interrupting)
    assert train(*options, "--output", tmp_path / "cut") == 130
    assert capsys.readouterr().err == "gbci-fast train: interrupted\n"
    assert len(calls) == 2
    assert train(*options, "--output", tmp_path / "cut", "--resume") == 0
    assert len(calls) == 4
    straight, cut = (tmp_path / name / "vae" for name in ("straight", "cut"))
    for file in straight.iterdir():
        assert (cut / file.name).read_bytes() == file.read_bytes()


def refusal(capsys, *arguments):
    """What `gbci-fast train` with these arguments says on stderr, having failed."""
    assert train(*arguments) == 1
    return capsys.readouterr().err


def test_an_existing_run_is_refused_before_any_work(vae_run, phantom_root, capsys, monkeypatch):
    folder, _ = vae_run
    monkeypatch.setattr(stages, "load_images", lambda *_: pytest.fail("read the data first"))
    for stage in (("vae",), ("ldm", "--vae", folder)):
        said = refusal(capsys, *stage, "--data", phantom_root, "--output", folder)
        assert said == (
            f"gbci-fast train: {folder} is not empty; "
            "pass --resume to continue the job there, or choose another folder\n"
        )


def test_a_damaged_state_is_one_line(vae_run, phantom_root, tmp_path, capsys):
    folder = shutil.copytree(vae_run[0], tmp_path / "run")
    (folder / STATE_FILE).write_bytes(b"not a checkpoint")
    said = refusal(capsys, "vae", "--data", phantom_root, "--output", folder, "--preset", "tiny", *STEPS, "--resume")
    assert said == (
        f"gbci-fast train: {folder / STATE_FILE} cannot be resumed from: it is not the file that was saved\n"
    )


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (("--steps", 0), "steps is 0; expected at least 1"),
        (("--learning-rate", "-1"), "learning_rate is -1.0; expected a positive number"),
        (("--device", "tpu"), "device is 'tpu'; expected 'auto', 'cpu', or 'cuda' on a machine that has it"),
    ],
)
def test_bad_options(phantom_root, tmp_path, capsys, options, sentence):
    said = refusal(capsys, "vae", "--data", phantom_root, "--output", tmp_path / "run", *options)
    assert said == f"gbci-fast train: {sentence}\n"
    assert not (tmp_path / "run").exists()


def test_ldm_needs_a_trained_autoencoder(phantom_root, tmp_path, capsys):
    said = refusal(capsys, "ldm", "--data", phantom_root, "--output", tmp_path / "run", "--vae", tmp_path)
    assert said == f"gbci-fast train: {tmp_path} has no vae/ folder; expected the output of `gbci-fast train vae`\n"


def test_bank_sizes_are_checked(vae_run, phantom_root, tmp_path, capsys):
    options = ("--data", phantom_root, "--output", tmp_path / "run", "--vae", vae_run[0])
    assert refusal(capsys, "ldm", *options, "--variants", 0) == "gbci-fast train: variants is 0; expected at least 1\n"


def test_absent_data_are_refused(tmp_path, capsys):
    said = refusal(capsys, "vae", "--data", tmp_path / "nowhere", "--output", tmp_path / "run")
    assert said.startswith(f"gbci-fast train: {tmp_path / 'nowhere'}")
    assert said.count("\n") == 1


def test_usage(capsys):
    for arguments in (
        (),
        ("ldm", "--data", "x", "--output", "y"),
        ("vae", "--data", "x", "--output", "y", "--preset", "z"),
    ):
        with pytest.raises(SystemExit) as exit_info:
            train(*arguments)
        assert exit_info.value.code == 2
    with pytest.raises(SystemExit) as exit_info:
        train("ldm", "--help")
    assert exit_info.value.code == 0
    assert "gbci-fast train ldm --data VINDR_ROOT --vae runs/vae" in capsys.readouterr().out


def test_starting_weights_of_another_shape_are_one_sentence(tiny_pipeline, tmp_path):
    small = tiny_pipeline(224, shared=True)
    large = build_pipeline(stages.ldm_preset("base")[0], small.vae, 224)
    small.save_pretrained(tmp_path / "small")
    with pytest.raises(GBCIError, match="small holds a model of another shape; expected that of the chosen --preset"):
        stages._start_from(large, tmp_path / "small")
    with pytest.raises(GBCIError, match=r"absent has no model_index.json; expected a pipeline folder"):
        stages._start_from(small, tmp_path / "absent")
