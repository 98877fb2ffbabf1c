"""The tensorrt runtime: on the CPU with a stand-in that runs the exported files, on a GPU with TensorRT."""

import copy
import logging
import pickle
import sys
from pathlib import Path

import pytest
import torch

from gbci_fast.errors import GBCIError
from gbci_fast.fast import decision as fast_decision
from gbci_fast.fast import pipeline as fast_pipeline
from gbci_fast.fast.accelerate import accelerate
from gbci_fast.fast.graph import LoopGraphs
from gbci_fast.fast.tensorrt.build import build
from gbci_fast.fast.tensorrt.cache import EngineCache
from gbci_fast.fast.tensorrt.denoiser import EngineAutoencoder, TensorRTDenoiser, tensorrt_refusals
from gbci_fast.fast.tensorrt.flavor import FLAVORS, pick_flavor
from gbci_fast.fast.tensorrt.store import Engines, digest

pytest.importorskip("onnxruntime", reason="the stand-in for TensorRT runs ONNX files")
DESCRIPTIONS = ({"view_position": "CC", "finding_birads": 5}, None)
REPORTS = ("irregular spiculated mass", None)
FLAVORS_THERE = {name: flavor for name, flavor in FLAVORS.items() if flavor.refusals(torch.device("cuda")) == []}
FAKE = Path(__file__).parent


@pytest.fixture
def pipe(tiny_pipeline):
    return tiny_pipeline(32, spread=0.05, shared=True)


@pytest.fixture(scope="module")
def cache_folder(tmp_path_factory):
    """One folder for all tests, because building takes most of the time."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def fake(monkeypatch, cache_folder):
    """The stand-in, as the only flavor."""
    monkeypatch.syspath_prepend(str(FAKE))
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache_folder))
    import fake_tensorrt

    with fake_tensorrt.installed():
        yield fake_tensorrt


@pytest.fixture(scope="module")
def image():
    return torch.rand(2, 1, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def mask():
    masks = torch.zeros(2, 1, 32, 32)
    masks[0, :, 6:20, 4:17] = 1
    masks[1, :, 12:30, 10:24] = 1
    return masks


def sample(pipe, image, mask, **options):
    options = {
        "attributes": DESCRIPTIONS, "report": REPORTS, "num_inference_steps": 3, "seed": [5, 6],
        "output_type": "latent",
    } | options  # fmt: skip
    return pipe(image, mask, **options).images


def relative(ours, reference):
    return ((ours - reference).abs().max() / reference.abs().max()).item()


def test_the_whole_pipeline_equals_eager(pipe, image, mask, fake, caplog, tmp_path):
    """Latents and decoded pixels, with padded reports and guidance. No engine is built twice."""
    fast = accelerate(pipe, runtime="tensorrt", dtype=torch.float32)
    assert fast.describe() == f"runtime tensorrt, tier tolerance, float32\nengines of fake {FLAVORS['fake'].version}"
    with caplog.at_level(logging.WARNING):
        assert relative(sample(fast, image, mask), sample(pipe, image, mask)) < 1e-4
    assert "building unet-b2-8x8-" in caplog.text
    assert "which may take minutes" in caplog.text
    ours, reference = (sample(p, image, mask, output_type="pt") for p in (fast, pipe))
    assert relative(ours, reference) < 1e-4
    assert torch.equal(ours[mask == 0], image[mask == 0])
    built = len(fake.Behavior.built)
    assert built == 2  # the core and the decoder
    if (rtx := FLAVORS_THERE.get("tensorrt-rtx")) is not None:  # TensorRT-RTX takes the same files
        for name, data in zip(("core.onnx", "decoder.onnx"), fake.Behavior.built, strict=True):
            (tmp_path / name).write_bytes(data)
            real = build(tmp_path / name, rtx, capabilities=("8.0", "8.6"))
            assert real.engine[:4] == b"vtrt"
            assert {record.severity for record in real.log} <= {"INFO", "VERBOSE"}
            assert set(real.dtypes.values()) <= {"float32", "int32", "int64", "bool"}
    sample(accelerate(pipe, runtime="tensorrt", dtype=torch.float32), image, mask, output_type="pt")
    assert len(fake.Behavior.built) == built


def test_a_batch_is_padded_to_its_bucket(pipe, image, mask, fake, monkeypatch):
    """Three images in an engine for four, without guidance. A decoder for two images decodes them in pairs."""
    monkeypatch.setattr("gbci_fast.fast.tensorrt.denoiser.DECODED", 2)
    fast = accelerate(pipe, runtime="tensorrt", dtype=torch.float32)
    images, masks = (torch.cat([part, part[:1]]) for part in (image, mask))
    options = {"attributes": None, "report": None, "seed": [1, 2, 3], "guidance_scale": 1.0, "output_type": "pt"}
    ours, reference = (sample(p, images, masks, **options) for p in (fast, pipe))
    assert ours.shape == reference.shape
    assert relative(ours, reference) < 1e-4


def test_it_runs_inside_recorded_loops(pipe, image, mask, fake, monkeypatch):
    """With a recorder that only runs the loop again. (On a GPU the recorder makes a CUDA graph.)"""

    class Recorder:
        recorded = 0

        def record(self, loop):
            loop()
            Recorder.recorded += 1
            return loop

        def turn(self):
            return torch.no_grad()

    monkeypatch.setattr(fast_pipeline, "_recorder", lambda *_: Recorder())
    fast = accelerate(pipe, runtime="tensorrt", dtype=torch.float32)
    assert relative(sample(fast, image, mask), sample(pipe, image, mask)) < 1e-4
    assert Recorder.recorded == 1
    assert isinstance(fast._built[1], LoopGraphs)


def test_too_large_a_batch_is_refused(pipe, fake):
    denoiser = TensorRTDenoiser(pipe.unet)
    conditioning, constant = pipe.conditioner.null(1), torch.zeros(257, 5, 8, 8)
    with pytest.raises(GBCIError, match="the batch has 257 images; expected at most 256 with the tensorrt runtime"):
        denoiser.prepare(conditioning, conditioning, constant, torch.tensor([1]))


def test_the_decoder_is_that_of_an_autoencoder_in_every_other_way(pipe, fake):
    stock = copy.deepcopy(pipe.vae)
    ours = EngineAutoencoder.of(stock)
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        reference = stock.decode(latents).sample
        assert relative(ours.decode(latents).sample, reference) < 1e-4
        assert relative(ours.decode(latents, return_dict=False)[0], reference) < 1e-4
        ours.enable_slicing()
        assert relative(ours.decode(latents).sample, reference) < 1e-4
        ours.enable_tiling()
        assert torch.equal(ours._decode(latents).sample, reference)
        pixels = torch.rand(1, 1, 32, 32)
        assert torch.equal(ours.encode(pixels).latent_dist.mode(), stock.encode(pixels).latent_dist.mode())
    assert next(ours.parameters()) is next(stock.parameters())
    ours.disable_tiling()
    twin = copy.deepcopy(ours)
    with torch.no_grad():
        twin.decoder.conv_out.bias.add_(1)
        twin.to(torch.float32)  # a move makes the engines be looked up again
        assert (twin.decode(latents).sample - reference).mean() == pytest.approx(1, abs=1e-3)
        assert relative(ours.decode(latents).sample, reference) < 1e-4


def test_engines_of_other_weights_are_not_used(pipe, image, mask, fake):
    pipe = copy.deepcopy(pipe)
    fast = accelerate(pipe, runtime="tensorrt", dtype=torch.float32)
    before = sample(fast, image, mask, output_type="pt")
    for change in ("unet", "vae"):
        for made in (pipe, fast):
            with torch.no_grad():
                for name, weight in getattr(made, change).named_parameters():
                    if "conv" in name:
                        weight.mul_(1.5)
        ours, reference = (sample(made, image, mask, output_type="pt") for made in (fast, pipe))
        assert relative(ours, reference) < 1e-4
        assert relative(ours, before) > 1e-3
        before = ours


def test_a_decoder_with_a_hook_decodes_without_an_engine(pipe, fake, caplog):
    stock = copy.deepcopy(pipe.vae)
    ours = EngineAutoencoder.of(copy.deepcopy(stock))
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = ours.decode(latents).sample
        hooks = [vae.decoder.conv_out.register_forward_hook(lambda *given: -given[-1]) for vae in (stock, ours)]
        assert relative(ours.decode(latents).sample, stock.decode(latents).sample) < 1e-5
        assert relative(ours.decode(latents).sample, -before) < 1e-4
        for hook in hooks:
            hook.remove()
        assert relative(ours.decode(latents).sample, before) < 1e-5
    assert "the autoencoder decodes without an engine: conv_out has hooks" in caplog.text


def test_engines_are_copied_without_what_they_have_loaded(fake, tmp_path):
    engines = Engines(FLAVORS["fake"], EngineCache(tmp_path))
    engines._loaded["shape", torch.device("cpu")] = object()
    for other in (copy.deepcopy(engines), pickle.loads(pickle.dumps(engines))):
        assert (other.flavor, other.cache.folder) == (engines.flavor, tmp_path)
        assert not other._loaded


def test_the_digest_is_of_values_and_not_of_where_they_lie(pipe):
    first = digest(pipe.unet)
    assert digest(copy.deepcopy(pipe.unet).to(memory_format=torch.channels_last)) == first
    other = copy.deepcopy(pipe.unet)
    other.conv_out.bias.data[0] += 1e-3
    assert digest(other) != first
    assert digest(torch.nn.Module.to(copy.deepcopy(pipe.unet), torch.bfloat16)) != first


def test_it_is_refused_with_the_remedy_where_it_cannot_run(pipe, monkeypatch):
    reasons = tensorrt_refusals(torch.device("cpu"))
    assert len(reasons) == len(FLAVORS)
    with pytest.raises(GBCIError, match=r"the tensorrt runtime cannot be used: .*tensorrt"):
        accelerate(pipe, runtime="tensorrt")
    monkeypatch.setitem(sys.modules, "tensorrt_rtx_bindings", None)
    with pytest.raises(GBCIError, match=r"tensorrt-rtx is not installed: pip install 'gbci_fast\[tensorrt-rtx\]'"):
        pick_flavor("tensorrt-rtx", torch.device("cpu"))


def test_exact_excludes_it(pipe, fake):
    with pytest.raises(GBCIError, match="the tensorrt runtime cannot be used: tier 'exact' excludes it"):
        accelerate(pipe, runtime="tensorrt", tier="exact")


def test_a_unet_alone_is_refused(pipe):
    with pytest.raises(GBCIError, match="the tensorrt runtime runs whole pipelines, not a UNet alone"):
        accelerate(pipe.unet, runtime="tensorrt")


def test_a_unet_that_the_fused_runtime_cannot_run_is_refused(pipe, fake):
    pipe.unet.set_attention_slice(1)
    try:
        with pytest.raises(GBCIError, match=r"the tensorrt runtime cannot run this UNet: .* is a SlicedAttnProcessor"):
            accelerate(pipe, runtime="tensorrt")
    finally:
        pipe.unet.set_default_attn_processor()


def test_auto_takes_the_next_runtime_and_says_so(pipe, monkeypatch):
    assert "tensorrt" not in fast_decision.AUTO  # TensorRT is not measured yet
    monkeypatch.setattr(fast_decision, "AUTO", ("tensorrt", *fast_decision.AUTO))
    made = accelerate(pipe).decision
    assert made.runtime == "fused"
    notes = [note for note in made.notes if note.startswith("not the tensorrt runtime: ")]
    assert len(notes) == len(tensorrt_refusals(torch.device("cpu")))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", FLAVORS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_on_a_gpu_it_is_within_the_tolerance_of_the_fused_runtime(
    pipe, image, mask, tmp_path, monkeypatch, name, dtype
):
    """Recorded as a CUDA graph: the error to eager float32 is at most 1.5 times that of eager in this dtype."""
    reasons = FLAVORS[name].refusals(torch.device("cuda"))
    if reasons:
        pytest.skip(reasons[0])
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("gbci_fast.fast.tensorrt.denoiser.pick_flavor", lambda *_: FLAVORS[name])
    device = torch.device("cuda")
    exact = sample(accelerate(pipe, runtime="eager", dtype=torch.float32, device=device), image, mask)
    narrow = sample(accelerate(pipe, runtime="eager", dtype=dtype, device=device), image, mask)
    fast = accelerate(pipe, runtime="tensorrt", dtype=dtype, device=device)
    for _ in range(2):  # recorded, and replayed
        error, own = ((out - exact).square().mean().sqrt() for out in (sample(fast, image, mask), narrow))
        assert 0 < error <= 1.5 * own
