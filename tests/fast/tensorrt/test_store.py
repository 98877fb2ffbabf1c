"""Engines of a module, from the cache or built; and TensorRT-RTX engines of the packaged checkpoint."""

from collections import Counter
from dataclasses import replace

import pytest
import torch

from gbci_fast.errors import GBCIError
from gbci_fast.fast.export import Bucket
from gbci_fast.fast.tensorrt.cache import EngineCache
from gbci_fast.fast.tensorrt.flavor import FLAVORS
from gbci_fast.fast.tensorrt.run import Engine
from gbci_fast.fast.tensorrt.store import Recipe, decoder_recipe, digest, obtain, unet_recipe
from gbci_fast.model.pipeline import GBCIPipeline

CPU = torch.device("cpu")


@pytest.fixture
def recipe(onnx_writer):
    """``recipe(weight, **changes)``: a recipe of `write_onnx`'s file, with the weight as its digest."""

    def make(weight, **changes):
        options = {"part": "unet", "shape": "b2", "dtype": "float32", "graph": "g"} | changes
        return Recipe(**options, weights=str(weight), write=lambda path: onnx_writer(path, weight=weight))

    return make


@pytest.fixture
def cache(tmp_path):
    return EngineCache(tmp_path)


def output(engine):
    return Engine(engine, FLAVORS["fake"], CPU)({"x": torch.ones(2, 3, 8, 8)})["y"][0, 0, 4, 4].item()


def test_a_hit_exports_nothing(fake, recipe, cache):
    engine = obtain(recipe(1.0), FLAVORS["fake"], cache, "8.6")

    def write(path):
        raise AssertionError("it was exported again")

    again = Recipe(**{**vars(recipe(1.0)), "write": write})
    assert obtain(again, FLAVORS["fake"], cache, "8.6") == engine
    assert len(fake.Behavior.built) == 1


def test_what_was_built_is_reported_once(fake, recipe, cache, caplog):
    built, steps = [], []
    for _ in range(2):
        engine = obtain(
            recipe(1.0), FLAVORS["fake"], cache, "8.0+8.6",
            on_progress=lambda *step: steps.append(step), on_built=built.append,
        )  # fmt: skip
    (only,) = built
    assert only.engine == engine
    assert steps[-1] == ("building", 2, 2)
    lines = [record.getMessage() for record in caplog.records]
    assert lines == ["building unet-b2-float32 with fake 10.13.0, which may take minutes"]


@pytest.mark.parametrize(
    "changes", [{"weights": "2"}, {"shape": "b4"}, {"dtype": "float16"}, {"graph": "h"}, {"part": "decoder"}], ids=str
)
def test_another_module_has_an_engine_of_its_own(fake, recipe, cache, changes):
    obtain(recipe(1.0), FLAVORS["fake"], cache, "8.6")
    obtain(replace(recipe(2.0), **({"weights": "1.0"} | changes)), FLAVORS["fake"], cache, "8.6")
    assert len(fake.Behavior.built) == 2


def test_a_failed_build_is_not_kept(fake, recipe, cache):
    fake.Behavior.build_error = "out of memory"
    with pytest.raises(GBCIError, match=r"ran out of memory while it built unet-b2-float32.onnx"):
        obtain(recipe(1.0), FLAVORS["fake"], cache, "8.6")
    fake.Behavior.build_error = None
    assert output(obtain(recipe(1.0), FLAVORS["fake"], cache, "8.6")) == 27.0


@pytest.fixture(scope="module")
def pipe():
    return GBCIPipeline.from_pretrained()


def test_the_graph_is_that_of_config_and_code(pipe, monkeypatch):
    bucket = Bucket(batch=1, height=56, width=56, tokens=224)
    graph = unet_recipe(pipe.unet, bucket, "w").graph
    assert unet_recipe(pipe.unet, bucket, "other weights").graph == graph
    assert decoder_recipe(pipe.vae, 1, 56, 56, "w").graph != graph
    monkeypatch.setattr(torch, "__version__", "99")
    assert unet_recipe(pipe.unet, bucket, "w").graph != graph


CONVOLVED = ("CONVOLUTION", "MATRIX_MULTIPLY")  # kinds of layers that multiply
ISLANDS = ("NORMALIZATION", "SOFTMAX")  # kinds that sum up, or take exponentials


@pytest.mark.parametrize(
    ("part", "dtype", "convolutions"), [("unet", torch.float16, 30), ("decoder", torch.bfloat16, 20)], ids=str
)
def test_real_engines_of_the_packaged_checkpoint(pipe, cache, part, dtype, convolutions, capsys):
    """Built by TensorRT-RTX for two compute capabilities, on any machine: header, log, and types."""
    pytest.importorskip("tensorrt_rtx_bindings")
    module = torch.nn.Module.to(getattr(pipe, {"unet": "unet", "decoder": "vae"}[part]), dtype)
    if part == "unet":
        recipe = unet_recipe(module, Bucket(batch=8, height=56, width=56, tokens=224), digest(module))
    else:
        recipe = decoder_recipe(module, 8, 56, 56, digest(module))
    built = []
    engine = obtain(recipe, FLAVORS["tensorrt-rtx"], cache, "8.0+8.6", on_built=built.append)
    (made,) = built
    assert engine[:4] == b"vtrt"
    assert int.from_bytes(engine[16:24], "little") == len(engine)
    weights = sum(parameter.numel() for parameter in (module if part == "unet" else module.decoder).parameters())
    assert len(engine) > weights  # in bytes: the engine contains the weights
    for record in made.log:
        assert record.severity in ("INFO", "VERBOSE"), record
        assert not any(word in record.text.lower() for word in ("fallback", "falling back", "unsupported")), record
    kinds = Counter((layer.kind, dtype) for layer in made.layers for dtype in layer.dtypes.values())
    narrow = str(dtype).removeprefix("torch.")
    assert {kind for layer, kind in kinds if layer in CONVOLVED} == {narrow}
    assert {kind for layer, kind in kinds if layer in ISLANDS} == {"float32"}
    assert kinds["CONVOLUTION", narrow] >= convolutions
    assert made.inputs["latents"] == narrow
    assert obtain(recipe, FLAVORS["tensorrt-rtx"], cache, "8.6", on_built=built.append) == engine
    assert len(built) == 1
    with capsys.disabled():  # for the log of the tests
        print(f"\n{recipe}: {len(engine)} bytes in {made.seconds:.1f} s, {len(made.layers)} layers", end=" ")
