"""Running engines on PyTorch's tensors: with the stand-in on the CPU, and with TensorRT on a GPU."""

import pytest
import torch
import torch.nn.functional as F

from gbci_fast.errors import GBCIError
from gbci_fast.fast.tensorrt.build import build
from gbci_fast.fast.tensorrt.flavor import FLAVORS
from gbci_fast.fast.tensorrt.run import Binding, Engine, deserialize

CPU = torch.device("cpu")


def reference(x, weight=1.0):
    return F.conv2d(x, torch.full((4, 3, 3, 3), weight), padding=1).relu()


@pytest.fixture
def x():
    return torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def engine(fake, small):
    return Engine(build(small, FLAVORS["fake"]).engine, FLAVORS["fake"], CPU)


def test_it_reads_and_writes_tensors_where_they_are(engine, x):
    assert engine.inputs == {"x": Binding((2, 3, 8, 8), torch.float32)}
    assert engine.outputs.keys() == {"y", "z"}
    made = engine({"x": x})
    torch.testing.assert_close(made["y"], reference(x))
    assert torch.equal(made["z"], x)
    given = {name: torch.zeros_like(part) for name, part in made.items()}
    returned = engine({"x": 2 * x}, given)
    assert all(returned[name] is given[name] for name in given)
    torch.testing.assert_close(given["y"], reference(2 * x))
    torch.testing.assert_close(made["y"], reference(x))  # the next call did not overwrite the first output


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda x: {}, "the engine's inputs are x; given or missing by mistake: x"),
        (lambda x: {"x": x, "t": x}, "the engine's inputs are x; given or missing by mistake: t"),
        (lambda x: {"x": x.double()}, "input x is [2, 3, 8, 8] float64; expected [2, 3, 8, 8] float32"),
        (lambda x: {"x": x[:1]}, "input x is [1, 3, 8, 8] float32; expected [2, 3, 8, 8] float32"),
        (lambda x: {"x": x.transpose(2, 3)}, "input x has strides [192, 64, 1, 8]; expected contiguous"),
        (lambda x: {"x": x.to("meta")}, "input x is on meta; expected cpu"),
    ],
)
def test_an_input_that_does_not_fit_is_named(engine, x, change, sentence):
    with pytest.raises(GBCIError) as refused:
        engine(change(x))
    assert sentence in str(refused.value)


def test_an_output_that_does_not_fit_is_named(engine, x):
    with pytest.raises(GBCIError, match="the engine's outputs are y, z; given or missing by mistake: z"):
        engine({"x": x}, {"y": torch.empty(2, 4, 8, 8)})
    with pytest.raises(GBCIError, match=r"the engine's output z is \[1\] float32; expected \[2, 3, 8, 8\] float32"):
        engine({"x": x}, {"y": torch.empty(2, 4, 8, 8), "z": torch.empty(1)})


def test_what_tensorrt_refuses_is_passed_on(engine, x, fake):
    fake.Behavior.refused_address = "y"
    with pytest.raises(GBCIError, match=r"the engine's output y at 0x[0-9a-f]+ is refused by fake"):
        engine({"x": x})
    fake.Behavior.refused_address, fake.Behavior.run_error = None, "illegal\naddress"
    with pytest.raises(GBCIError, match="fake failed to run an engine: illegal address"):
        engine({"x": x})


def test_an_engine_that_cannot_be_loaded_names_reason_and_remedy(fake, small):
    flavor, engine = FLAVORS["fake"], build(small, FLAVORS["fake"]).engine
    remedy = "build it on this machine, or choose the fused runtime"
    with pytest.raises(GBCIError, match=rf"^fake 10.13.0 cannot load the engine here \(wrong magic\); {remedy}$"):
        deserialize(b"junk", flavor)
    bits = fake.EngineInvalidityDiagnostics.UNSUPPORTED_CC | fake.EngineInvalidityDiagnostics.OLD_CUDA_DRIVER
    fake.Behavior.validity = fake.EngineValidity.INVALID, bits
    expected = rf"cannot run the engine here \(unsupported cc, old cuda driver\); {remedy}"
    with pytest.raises(GBCIError, match=expected):
        deserialize(engine, flavor)
    fake.Behavior.validity = fake.EngineValidity.INVALID, 0
    with pytest.raises(GBCIError, match=r"cannot run the engine here \(it says no reason\)"):
        deserialize(engine, flavor)
    fake.Behavior.validity, fake.Behavior.no_context = (fake.EngineValidity.VALID, 0), True
    with pytest.raises(GBCIError, match="fake cannot run an engine on cpu: it says no reason"):
        Engine(engine, flavor, CPU)


def test_a_flavor_that_cannot_tell_whether_an_engine_is_valid_is_asked_to_load_it(fake, small, x, monkeypatch):
    monkeypatch.delattr(fake.Runtime, "get_engine_validity")  # TensorRT for data centers lacks it
    engine = Engine(build(small, FLAVORS["fake"]).engine, FLAVORS["fake"], CPU)
    torch.testing.assert_close(engine({"x": x})["y"], reference(x))


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks what is said where there is no driver")
def test_without_a_driver_the_real_one_says_so(small):
    pytest.importorskip("tensorrt_rtx_bindings")
    flavor = FLAVORS["tensorrt-rtx"]
    engine = build(small, flavor, capabilities=("8.0",)).engine
    with pytest.raises(GBCIError, match=r"tensorrt-rtx .* cannot run the engine here .*GPU driver is installed"):
        deserialize(engine, flavor)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", FLAVORS)
def test_on_a_gpu(name, small, x):
    """Built for this GPU, run, and captured in a CUDA graph."""
    device = torch.device("cuda", torch.cuda.current_device())
    flavor = FLAVORS[name]
    if flavor.refusals(device):
        pytest.skip(flavor.refusals(device)[0])
    made = build(small, flavor, capabilities=(flavor.target(device),), device=device)
    engine, x = Engine(made.engine, flavor, device), x.to(device)
    torch.testing.assert_close(engine({"x": x})["y"].cpu(), reference(x.cpu()), rtol=1e-4, atol=1e-4)
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    with torch.cuda.stream(stream):
        engine({"x": x})
    stream.synchronize()
    with torch.cuda.graph(graph, stream=stream):
        outputs = engine({"x": x})
    x.mul_(2)
    graph.replay()
    torch.testing.assert_close(outputs["y"].cpu(), reference(x.cpu()), rtol=1e-4, atol=1e-4)
    offset = torch.empty(x.numel() + 1, device=device)[1:].view_as(x).copy_(x)
    with pytest.raises(GBCIError, match="expected an address that 256 divides"):
        engine({"x": offset})
