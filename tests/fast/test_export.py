"""Exported UNets and decoders, run by onnxruntime and compared with PyTorch over trajectories; types; refusals."""

import sys

import onnx
import pytest
import torch

from gbci_fast import GBCIPipeline, accelerate
from gbci_fast.errors import GBCIError
from gbci_fast.evaluate.parity.images import measure, worst
from gbci_fast.evaluate.parity.onnx import OnnxEngines, OnnxFunction, check_decoder, check_unet
from gbci_fast.fast import export as module
from gbci_fast.fast.export import OPSET, Bucket, UNetCore, export_decoder, export_unet
from gbci_fast.fast.runtimes.eager import EagerDenoiser
from gbci_fast.fast.tensorrt.denoiser import EngineAutoencoder, TensorRTDenoiser
from gbci_fast.model.conditioning import Conditioning

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers' own
SIDE = 16  # latent cells per side of the tiny model


@pytest.fixture(scope="module")
def tiny(tiny_pipeline):
    return tiny_pipeline(4 * SIDE, shared=True)


@pytest.fixture(scope="module")
def engines():
    """Engines of the tiny UNet, exported once per shape for all tests."""
    return OnnxEngines()


@pytest.fixture(scope="module")
def half(tiny, tmp_path_factory):
    """The tiny UNet in float16, without guidance."""
    path = tmp_path_factory.mktemp("half") / "unet.onnx"
    bucket = Bucket(batch=2, height=SIDE, width=SIDE, tokens=32, guided=False)
    export_unet(tiny.unet, bucket, torch.float16, path)
    return path, bucket


def call(pipe, denoiser, latents, constant, tokens=24, padded=False, guided=True):
    """One step at timestep 501 of two images, with a random context."""
    generator = torch.Generator().manual_seed(1)
    null = pipe.conditioner.null(1)
    mask = torch.ones(2, tokens, dtype=torch.bool)
    if padded:
        mask[1, 5:] = False
    context = torch.randn(2, tokens, null.tokens.shape[-1], generator=generator)
    conditioning = Conditioning(context, mask, torch.randn(2, null.pooled.shape[-1], generator=generator))
    with torch.no_grad():
        state = denoiser.prepare(conditioning, null, constant, torch.tensor([501]))
        outputs = denoiser(latents, 0, state, guided)
    return torch.cat(outputs) if guided else outputs


def relative(ours, reference):
    return ((ours - reference).abs().max() / reference.abs().max()).item()


def test_all_nine_channels_of_the_input_are_there(tiny, engines):
    """Each channel in turn changes the exported UNet's output as it changes the stock UNet's."""
    ours, stock = TensorRTDenoiser(tiny.unet, engines), EagerDenoiser(tiny.unet)
    generator = torch.Generator().manual_seed(0)
    sample = torch.randn(2, 9, SIDE, SIDE, generator=generator)
    before = call(tiny, ours, sample[:, :4], sample[:, 4:])
    assert relative(before, call(tiny, stock, sample[:, :4], sample[:, 4:])) < 1e-4
    for channel in range(9):
        changed = sample.clone()
        changed[:, channel] += 3
        after = call(tiny, ours, changed[:, :4], changed[:, 4:])
        assert relative(after, before) > 1e-3
        assert relative(after, call(tiny, stock, changed[:, :4], changed[:, 4:])) < 1e-4


def test_what_is_padding_does_not_count(tiny, engines):
    ours, stock = TensorRTDenoiser(tiny.unet, engines), EagerDenoiser(tiny.unet)
    latents, constant = torch.randn(2, 4, SIDE, SIDE), torch.randn(2, 5, SIDE, SIDE)
    padded = call(tiny, ours, latents, constant, padded=True)
    assert relative(padded, call(tiny, stock, latents, constant, padded=True)) < 1e-4
    assert relative(padded, call(tiny, ours, latents, constant)) > 1e-4


def sampled(pipe, seed=3, **options):
    size = pipe.unet.config.sample_size * pipe.vae_scale_factor
    generator = torch.Generator().manual_seed(seed)
    mask = torch.zeros(1, 1, size, size)
    mask[..., size // 4 : size // 2, size // 4 : size // 2] = 1
    image = torch.rand(1, 1, size, size, generator=generator)
    return pipe(image, mask, report="a mass", seed=seed, output_type="pt", **options).images, mask


@pytest.mark.parametrize("which", ["tiny", "packaged"])
def test_a_whole_trajectory_is_the_eager_one_s(tiny, which):
    pipe = tiny if which == "tiny" else GBCIPipeline.from_pretrained()
    pipe.set_progress_bar_config(disable=True)
    fast = accelerate(pipe, runtime="fused", dtype=torch.float32)
    fast._built = TensorRTDenoiser(fast.unet, OnnxEngines()), None
    fast.vae = EngineAutoencoder.of(pipe.vae, OnnxEngines())
    options = {"num_inference_steps": 4, "guidance_scale": 3.0}
    (ours, mask), (reference, _) = sampled(fast, **options), sampled(pipe, **options)
    assert worst(measure(ours, reference, mask > 0.5)).psnr >= 60
    assert not torch.equal(reference, sampled(pipe, seed=4, **options)[0])


def test_half_precision_is_half_but_for_norms_and_softmax(tiny, half):
    path, bucket = half
    assert check_unet(path, tiny.unet, bucket, torch.float16) < 1e-2
    model = onnx.shape_inference.infer_shapes(onnx.load(path))
    values = (*model.graph.value_info, *model.graph.output)
    types = {value.name: value.type.tensor_type.elem_type for value in values}
    wide, narrow = onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16
    for node in model.graph.node:
        assert node.domain in ("", "ai.onnx")
        for output in node.output:
            if node.op_type in ("Conv", "MatMul", "Gelu"):
                assert types[output] == narrow
            if node.op_type in ("InstanceNormalization", "LayerNormalization", "Softmax"):
                assert types[output] == wide
    assert {node.op_type for node in model.graph.node} >= {"Conv", "MatMul", "Softmax", "LayerNormalization"}
    assert model.opset_import[0].version == OPSET


def test_bfloat16_has_its_types(tiny, tmp_path):
    path = tmp_path / "vae.onnx"
    export_decoder(tiny.vae, 1, SIDE, SIDE, torch.bfloat16, path)
    model = onnx.load(path)
    large = [part for part in model.graph.initializer if len(part.dims) == 4]
    assert large
    assert {part.data_type for part in large} == {onnx.TensorProto.BFLOAT16}
    assert model.graph.input[0].type.tensor_type.elem_type == onnx.TensorProto.BFLOAT16


def test_extreme_inputs_stay_finite_in_half_precision(tiny, half):
    """Scores of a thousand, and squares beyond 65504 in the norms: the float32 parts of the graph hold them."""
    path, bucket = half
    core = UNetCore(tiny.unet)
    given = core.example_inputs(bucket)
    generator = torch.Generator().manual_seed(0)
    for name, part in given.items():
        if part.is_floating_point():
            scale = {"latents": 1000.0, "first": 1000.0}.get(name, 100.0 if name.startswith("key") else 1.0)
            given[name] = scale * torch.randn(part.shape, generator=generator)
    with torch.no_grad():
        [expected] = core(*given.values())
    rounded = {name: part.half() if part.is_floating_point() else part for name, part in given.items()}
    found = OnnxFunction(path)(rounded)["conditional"].float()
    assert found.isfinite().all()
    assert relative(found, expected) < 0.2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_the_decoder_is_pytorch_s(tiny, tiny_pipeline, tmp_path, dtype):
    path = tmp_path / "new" / "decoder.onnx"
    export_decoder(tiny.vae, 2, SIDE, 8, dtype, path)
    assert [file.name for file in path.parent.iterdir()] == ["decoder.onnx"]
    assert check_decoder(path, tiny.vae, (2, SIDE, 8), dtype) <= {torch.float32: 1e-4, torch.float16: 1e-2}[dtype]
    other = tiny_pipeline(4 * SIDE, seed=1).vae
    with pytest.raises(GBCIError, match=r"decoder.onnx differs from PyTorch by .*; expected at most"):
        check_decoder(path, other, (2, SIDE, 8), dtype)
    with pytest.raises(GBCIError, match=r"is torch.bfloat16; expected torch.float32 or torch.float16"):
        check_decoder(path, tiny.vae, (2, SIDE, 8), torch.bfloat16)


def test_nothing_half_written_is_left(tiny, tmp_path, monkeypatch):
    def broken(path):
        raise RuntimeError("not a model")

    monkeypatch.setattr(onnx.checker, "check_model", broken)
    with pytest.raises(RuntimeError, match="not a model"):
        export_decoder(tiny.vae, 1, 8, 8, torch.float32, tmp_path / "decoder.onnx")
    assert list(tmp_path.iterdir()) == []


def test_an_operator_that_is_not_onnx_s_is_refused(tiny, tmp_path, monkeypatch):
    trace = module._trace

    def foreign(*args):
        model = trace(*args)
        model.graph.node[0].domain = "com.example"
        return model

    monkeypatch.setattr(module, "_trace", foreign)
    with pytest.raises(GBCIError, match=r"operators that are not ONNX's: com\.example\."):
        export_decoder(tiny.vae, 1, 8, 8, torch.float32, tmp_path / "decoder.onnx")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("package", "extra"), [("onnx", "export"), ("onnxscript", "export")])
def test_what_is_not_installed_is_named(tiny, tmp_path, monkeypatch, package, extra):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(GBCIError, match=rf"{package} is not installed: pip install 'gbci_fast\[{extra}\]'"):
        export_decoder(tiny.vae, 1, 8, 8, torch.float32, tmp_path / "decoder.onnx")


def test_without_onnxruntime_nothing_runs(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(GBCIError, match=r"onnxruntime is not installed: pip install 'gbci_fast\[export\]'"):
        OnnxFunction(tmp_path / "any.onnx")


def test_bad_arguments_are_named(tiny, tmp_path):
    with pytest.raises(GBCIError, match="tokens is 0; expected at least 1"):
        Bucket(batch=1, height=8, width=8, tokens=0)
    with pytest.raises(GBCIError, match=r"dtype is torch\.float64; expected torch\.float32, "):
        export_decoder(tiny.vae, 1, 8, 8, torch.float64, tmp_path / "decoder.onnx")
    names = Bucket(batch=2, height=8, width=4, tokens=32), Bucket(batch=2, height=8, width=4, tokens=32, guided=False)
    assert [str(name) for name in names] == ["b2-8x4-t32-guided", "b2-8x4-t32-unguided"]
