"""`gbci-fast export`: its files, its messages, and bad usage."""

import importlib.util

import onnx
import pytest
import torch

from gbci_fast.cli import main
from gbci_fast.errors import GBCIError
from gbci_fast.evaluate.parity import onnx as onnx_parity

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers' own


@pytest.fixture(scope="module")
def folder(tiny_checkpoint):
    return tiny_checkpoint()


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

    monkeypatch.setattr("gbci_fast.fast.export.export_unet", write)
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

    def interrupted(*_):
        raise KeyboardInterrupt

    for check, status, said in ((differs, 1, "differs from PyTorch by 1"), (interrupted, 130, "interrupted")):
        monkeypatch.setattr(onnx_parity, "check_decoder", check)
        assert export(folder, tmp_path, "--part", "decoder") == status
        assert said in capsys.readouterr().err
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


@pytest.fixture
def tensorrt(folder, tmp_path, monkeypatch, capsys):
    """``tensorrt(*options)``: runs `export tensorrt` with a cache of its own; returns status and output."""
    pytest.importorskip("tensorrt_rtx_bindings")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def run(*options):
        command = ["export", "tensorrt", str(folder), "--output", str(tmp_path / "out"), "--batch", "1"]
        status = main([*command, "--flavor", "tensorrt-rtx", *options])
        return status, capsys.readouterr()

    return run


@pytest.mark.skipif(torch.cuda.is_available(), reason="it would build for this GPU")
def test_engines_are_built_once_and_then_found(tensorrt, tmp_path):
    options = ("--part", "decoder", "--dtype", "float16", "--compute-capability", "8.0, 8.6")
    (first, built), (second, found) = tensorrt(*options), tensorrt(*options)
    assert first == second == 0
    [engine] = (tmp_path / "out").iterdir()
    assert engine.name.startswith("decoder-b1-16x16-float16-tensorrt-rtx-")
    assert engine.name.endswith("-sm8.0+8.6.plan")
    assert engine.read_bytes()[:4] == b"vtrt"
    assert built.out.startswith(f"{engine}: ")
    assert " built in " in built.out
    assert found.out.startswith(f"{engine}: ")
    assert found.out.endswith(" from the cache\n")


@pytest.mark.skipif(torch.cuda.is_available(), reason="it would build for this GPU")
def test_a_unet_is_built_for_any_gpu(tensorrt, tmp_path):
    status, said = tensorrt("--part", "unet", "--tokens", "32", "--no-guidance")
    assert status == 0, said.err
    [engine] = (tmp_path / "out").iterdir()
    assert engine.name.startswith("unet-b1-16x16-t32-unguided-bfloat16-tensorrt-rtx-")
    assert engine.name.endswith("-smgeneric.plan")


@pytest.mark.parametrize(
    ("capability", "sentence"),
    [
        ("1.0", " does not build for compute capability 1.0; expected some of "),
        ("8.0,", "--compute-capability is '8.0,'; expected such as 8.0,8.6"),
        ("../8", "--compute-capability is '../8'; expected such as 8.0,8.6"),
    ],
)
def test_a_gpu_that_cannot_be_built_for_is_named(tensorrt, tmp_path, capability, sentence):
    status, said = tensorrt("--part", "decoder", "--compute-capability", capability)
    assert status == 1
    assert sentence in said.err
    assert not (tmp_path / "out").exists()


def test_a_flavor_that_is_not_installed_names_its_command(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    command = ["export", "tensorrt", str(folder), "--output", str(tmp_path / "out")]
    assert main(command) == 1
    said = capsys.readouterr().err
    assert "tensorrt is not installed: pip install tensorrt" in said
    assert "tensorrt-rtx is not installed: pip install 'gbci_fast[tensorrt-rtx]'" in said
    assert not (tmp_path / "out").exists()
