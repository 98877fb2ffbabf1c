"""`gbci-fast export onnx`: files, what is said of them, and bad usage."""

import importlib.util

import onnx
import pytest
import torch

from gbci_fast.cli import main
from gbci_fast.errors import GBCIError
from gbci_fast.evaluate import onnx_parity
from gbci_fast.training.ldm import build_pipeline
from gbci_fast.training.stages import ldm_preset, vae_preset
from gbci_fast.training.vae import build_vae

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers' own


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("checkpoint") / "tiny"
    build_pipeline(ldm_preset("tiny")[0], build_vae(vae_preset("tiny")[0]).eval(), 64).save_pretrained(path)
    return path


def export(folder, output, *options):
    return main(["export", "onnx", str(folder), "--output", str(output), "--batch", "1", *options])


def test_it_writes_what_it_compared(folder, tmp_path, capsys):
    assert export(folder, tmp_path, "--tokens", "40") == 0
    unet, decoder = capsys.readouterr().out.splitlines()
    assert unet.startswith(f"{tmp_path}/unet-b1-16x16-t40-guided-float32.onnx: ")
    assert decoder.startswith(f"{tmp_path}/decoder-b1-16x16-float32.onnx: ")
    for line in (unet, decoder):
        path, _, said = line.partition(": ")
        onnx.checker.check_model(path)
        assert float(said.split("largest error ")[1].split()[0]) < 1e-4


def test_the_context_is_as_long_as_without_a_report(folder, tmp_path, capsys, monkeypatch):
    exported = []

    def write(unet, bucket, dtype, path):
        exported.append(bucket)
        path.write_bytes(b"")

    monkeypatch.setattr("gbci_fast.export.export_unet", write)
    monkeypatch.setattr(onnx_parity, "check_unet", lambda *_: 0.0)
    assert export(folder, tmp_path, "--part", "unet", "--no-guidance", "--size", "32") == 0
    [bucket] = exported
    assert (bucket.batch, bucket.height, bucket.width, bucket.guided) == (1, 8, 8, False)
    assert bucket.tokens % 32 == 0


def test_what_cannot_be_compared_is_said(folder, tmp_path, capsys, monkeypatch):
    assert export(folder, tmp_path, "--part", "decoder", "--dtype", "bfloat16") == 0
    assert "not compared: onnxruntime has no bfloat16 on a CPU" in capsys.readouterr().out
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "onnxruntime" else found(name))
    assert export(folder, tmp_path, "--part", "decoder") == 0
    assert "not compared: onnxruntime is not installed: pip install onnxruntime" in capsys.readouterr().out


def test_a_file_that_computes_something_else_is_taken_back(folder, tmp_path, capsys, monkeypatch):
    def differs(path, *_):
        raise GBCIError(f"{path.name} differs from PyTorch by 1; expected at most 0.0001")

    monkeypatch.setattr(onnx_parity, "check_decoder", differs)
    assert export(folder, tmp_path, "--part", "decoder") == 1
    assert "differs from PyTorch by 1" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (("--size", "50"), "--size is 50; expected a multiple of "),
        (("--tokens", "0"), "tokens is 0; expected at least 1"),
        (("--batch", "0"), "batch is 0; expected at least 1"),
    ],
)
def test_bad_sizes_are_named(folder, tmp_path, capsys, options, sentence):
    assert export(folder, tmp_path, *options) == 1
    assert sentence in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_folder_without_a_pipeline_is_named(tmp_path, capsys):
    assert export(tmp_path, tmp_path / "out") == 1
    assert "has no model_index.json" in capsys.readouterr().err
