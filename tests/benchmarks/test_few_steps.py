"""The script that compares few steps with many, on phantoms and an untrained model."""

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from diffusers import DDIMScheduler

from gbci_fast.evaluate.distribution.distances import KernelPairs
from gbci_fast.evaluate.distribution.evaluation import DistributionSettings, Halvings
from gbci_fast.evaluate.lesions import CROP_SIZE, Crops
from gbci_fast.model.pipeline import GBCIPipeline
from gbci_fast.phantom import generate_phantom
from gbci_fast.training.distill import DistillConfig, low_rank_change, with_low_rank

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "few_steps.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("few_steps", SCRIPT)
    module = sys.modules["few_steps"] = importlib.util.module_from_spec(spec)  # its dataclass looks itself up
    spec.loader.exec_module(module)
    yield module
    del sys.modules["few_steps"]


def test_a_row_holds_up_where_it_is_as_near_as_the_reference(script):
    rng, number = np.random.default_rng(0), 80
    patients = tuple(f"p{i // 2}" for i in range(number))
    shifts = {"real": 0.0, "good": 0.3, script.REFERENCE: 0.3, "bad": 1.5, script.FILLING: 2.0}
    features = {name: rng.normal(shift, 1, (number, 6)) for name, shift in shifts.items()}
    features["good"] = features[script.REFERENCE] + rng.normal(0, 0.01, (number, 6))
    blank = Crops(
        pixels=np.zeros((number, CROP_SIZE, CROP_SIZE), np.float32),
        masks=np.zeros((number, CROP_SIZE, CROP_SIZE), bool),
        patients=patients,
    )
    sets = dict.fromkeys(features, blank)
    found = script.distances(features, sets, Halvings.of(sets, DistributionSettings(resamples=200)))
    assert {name: row["holds_up"] for name, row in found.items()} == {
        "good": True, script.REFERENCE: True, "bad": False, script.FILLING: False,
    }  # fmt: skip
    pairs, everything = KernelPairs.of(features["bad"], features["real"], patients, patients), np.ones((1, number))
    assert found["bad"]["kernel"] == pytest.approx(pairs.distances(everything, everything)[0])
    above = found["bad"]["above_reference"]
    assert above["low"] < above["value"] < above["high"]
    assert above["value"] == pytest.approx(found["bad"]["kernel"] - found[script.REFERENCE]["kernel"])
    assert found["good"]["above_reference"]["high"] < above["low"]  # paired: narrow


def test_it_paints_every_row_and_writes_figures(script, tiny_pipeline, tmp_path, monkeypatch, capsys):
    generate_phantom(tmp_path / "phantom", studies=12, seed=1, size=128)
    for path in (tmp_path / "phantom").glob("*.csv"):
        path.write_text(path.read_text().replace(",training,", ",test,"))
    pipe = tiny_pipeline(224)
    change = low_rank_change(with_low_rank(pipe.unet, 2), DistillConfig(rank=2))
    GBCIPipeline(**{**pipe.components, "few_step": change.float()}).save_pretrained(tmp_path / "weights")
    monkeypatch.setattr(script, "REFERENCE", "DDIM 1")  # fifty steps would take minutes
    monkeypatch.setattr(script, "ROWS", (script.Row(None, 1), script.Row(DDIMScheduler, 1)))
    output = tmp_path / "few_steps.json"
    arguments = f"{tmp_path / 'phantom'} --weights {tmp_path / 'weights'} --limit 12 --split test --output {output}"
    monkeypatch.setattr(sys, "argv", ["few_steps.py", *arguments.split()])
    assert script.main() == 0
    found = json.loads(output.read_text())
    assert list(found["rows"]) == ["ring mean", "student 1", "DDIM 1"]
    assert found["rows"]["DDIM 1"]["distances"]["radiomics"]["above_reference"]["high"] == 0
    # Another sampler, and so another image.
    assert found["rows"]["student 1"]["roi"] != found["rows"]["DDIM 1"]["roi"]
    assert "| student 1 |" in capsys.readouterr().out
