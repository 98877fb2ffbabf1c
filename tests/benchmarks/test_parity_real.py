"""The script that compares the tiers on real lesions, run on phantoms and an untrained model."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch

from gbci_fast.model.few_step import FewStepLoRA
from gbci_fast.model.pipeline import GBCIPipeline
from gbci_fast.phantom import generate_phantom

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "parity_real.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("parity_real", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def arguments(tiny_pipeline, tmp_path_factory):
    """Two phantom studies, all of the split "test", and weights that mean nothing."""
    folder = tmp_path_factory.mktemp("parity")
    generate_phantom(folder / "phantom", studies=3, seed=3, size=128)
    for table in (folder / "phantom").glob("*.csv"):
        table.write_text(table.read_text().replace(",training,", ",test,"))
    tiny_pipeline(shared=True).save_pretrained(folder / "weights")
    return [
        str(folder / "phantom"),
        "--weights",
        str(folder / "weights"),
        "--steps",
        "2",
        "--limit",
        "3",
        "--split",
        "test",
    ]


def run(script, arguments, monkeypatch, tmp_path, *more):
    output = tmp_path / "summary.json"
    monkeypatch.setattr("sys.argv", ["parity_real.py", *arguments, "--batch-size", "2", "--output", str(output), *more])
    return script.main(), output.read_text()


def test_the_summary_has_every_tier_and_nobody_s_name(script, arguments, monkeypatch, tmp_path, capsys):
    status, text = run(script, arguments, monkeypatch, tmp_path, "--tiers", "exact", "tolerance")
    summary = json.loads(text)
    assert status == 0
    assert summary["num_images"] == 3
    assert list(summary["tiers"]) == ["exact", "tolerance"]
    exact = summary["tiers"]["exact"]
    assert exact["holds"]
    assert exact["gates_hold"]
    assert [gate["bound"] for gate in exact["gates"]] == [0, 1e-5]
    assert abs(exact["held_out"]["psnr"]["mean"]) < 1e-3
    ids = [line.split(",")[:3] for line in (Path(arguments[0]) / "finding_annotations.csv").read_text().splitlines()]
    assert not any(name in text for row in ids[1:] for name in row)
    assert "| exact | hold |" in capsys.readouterr().out


def test_a_missed_gate_is_the_exit_status(script, arguments, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("gbci_fast.evaluate.parity.images.EXACT_LATENTS", 0.0)
    status, text = run(script, arguments, monkeypatch, tmp_path, "--tiers", "exact")
    assert status == 1
    assert not json.loads(text)["tiers"]["exact"]["holds"]
    assert "| exact | MISSED |" in capsys.readouterr().out


def test_the_student_is_held_against_the_eager_student(script, arguments, monkeypatch, tmp_path, capsys):
    with pytest.raises(SystemExit):
        run(script, arguments, monkeypatch, tmp_path, "--tiers", "few_step")
    assert "has no student at guidance 2" in capsys.readouterr().err
    pipe = GBCIPipeline.from_pretrained(arguments[2])
    bias = pipe.unet.conv_out.weight  # what the student changes is large: it paints otherwise
    tensors = {"conv_out.up": torch.ones(len(bias), 1), "conv_out.down": torch.ones(1, bias[0].numel())}
    pipe.register_modules(few_step=FewStepLoRA.of(tensors, guidance_scale=2.0, steps=4))
    pipe.save_pretrained(tmp_path / "weights")
    given = [arguments[0], "--weights", str(tmp_path / "weights"), *arguments[3:]]
    _, text = run(script, given, monkeypatch, tmp_path)
    tiers = json.loads(text)["tiers"]
    assert list(tiers) == ["exact", "tolerance", "approximate", "few_step"]
    assert "few-step" in tiers["few_step"]["plan"]
    assert not any("few-step" in tiers[tier]["plan"] for tier in ("exact", "tolerance", "approximate"))


@pytest.mark.parametrize(("error", "holds"), [(0.05, True), (0.4, False)])
def test_held_out_data_decide_where_an_approximation_misses_its_gates(script, arguments, error, holds):
    """Under the mask, eager is 0.2 above the truth, and the candidate `error` below it."""
    settings = script.PairedSettings(split="test", limit=3)
    cases, _ = script.load_cases([Path(arguments[0])], settings, 64, lambda *_: None)
    templates, masks = script.images_and_masks(cases)
    eager, candidate = (script.Output(images=templates + offset * masks) for offset in (0.2, -error))
    found = script.judge("approximate", candidate, eager, eager, cases)
    assert not found["gates_hold"]
    assert found["holds"] is holds
    assert (found["held_out"]["psnr"]["mean"] > 0) is holds
