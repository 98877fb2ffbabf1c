"""Recordings of whole loops: padding, keys, capacity, threads, no wait for the device; and CUDA graphs."""

import copy
import functools
import threading

import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, LCMScheduler
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensor, FakeTensorMode

from gbci_fast.fast import graph
from gbci_fast.fast import pipeline as fast_pipeline
from gbci_fast.fast.accelerate import accelerate
from gbci_fast.fast.graph import BATCH_SIZES, CudaRecorder, LoopGraphs, padded_size
from gbci_fast.fast.modules import blocks
from gbci_fast.fast.runtimes.compile import CompiledDenoiser
from gbci_fast.fast.runtimes.fused import FusedDenoiser
from gbci_fast.fast.samplers import on_host, tables
from gbci_fast.model.conditioning import Conditioning
from gbci_fast.model.pipeline import Trajectory
from gbci_fast.training.ldm import build_scheduler

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers' own
ON_A_GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.fixture
def full_float32():
    """Turns TF32 off, as tier "exact" requires on a GPU."""
    backends = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [backend.allow_tf32 for backend in backends]
    for backend in backends:
        backend.allow_tf32 = False
    yield
    for backend, allowed in zip(backends, before, strict=True):
        backend.allow_tf32 = allowed


def double_plus(given):
    return 2 * given["x"] + given["shift"]


def run(graphs, x, shift=1.0, key="key", loop=double_plus):
    return graphs(key, loop, {"x": x}, {"shift": torch.tensor([shift])})


def test_a_batch_goes_into_the_smallest_bucket_that_holds_it():
    assert [padded_size(batch) for batch in (1, 2, 3, 4, 9, 200, 256)] == [1, 2, 4, 4, 16, 256, 256]
    assert list(BATCH_SIZES) == sorted(BATCH_SIZES)


@pytest.mark.parametrize("batch", [1, 3, 5])
def test_a_recording_computes_the_loop(recorder, batch):
    graphs = LoopGraphs(recorder)
    for shift in (1.0, 2.0):  # recorded, and replayed with other values
        x = torch.randn(batch, 4, 3)
        assert torch.equal(run(graphs, x, shift), 2 * x + shift)
    assert (recorder.recorded, recorder.replayed) == (1, 2)


def test_the_places_behind_a_batch_hold_its_last_sample(recorder):
    seen = []

    def loop(given):
        seen.append(given["x"].clone())
        return given["x"]

    graphs = LoopGraphs(recorder)
    run(graphs, torch.arange(4.0)[:, None], loop=loop)
    run(graphs, torch.arange(10.0, 13.0)[:, None], loop=loop)
    assert seen[-1].flatten().tolist() == [10, 11, 12, 12]


def test_a_result_outlives_the_next_call(recorder):
    graphs = LoopGraphs(recorder)
    first = run(graphs, torch.ones(2, 1), loop=lambda given: given["x"])
    run(graphs, torch.zeros(2, 1), loop=lambda given: given["x"])
    assert torch.equal(first, torch.ones(2, 1))


def test_what_is_recorded_anew(recorder):
    graphs, x = LoopGraphs(recorder), torch.randn(3, 4)
    run(graphs, x)
    run(graphs, torch.randn(4, 4), shift=7.0)
    assert recorder.recorded == 1
    for change in ({"x": torch.randn(5, 4)}, {"x": torch.randn(3, 5)}, {"x": x.double()}, {"key": "another"}):
        before = recorder.recorded
        run(graphs, **{"x": x, **change})
        run(graphs, **{"x": x, **change})
        assert recorder.recorded == before + 1


def test_the_least_recently_used_is_dropped(recorder):
    graphs, x = LoopGraphs(recorder, capacity=2), torch.randn(1, 4)
    for key in ("a", "b", "a", "c"):  # c makes b go
        run(graphs, x, key=key)
    assert (len(graphs), recorder.recorded) == (2, 3)
    run(graphs, x, key="a")
    assert recorder.recorded == 3
    run(graphs, x, key="b")
    assert recorder.recorded == 4


def test_a_recording_that_fails_leaves_nothing(recorder):
    def broken(given):
        raise RuntimeError("no memory")

    graphs = LoopGraphs(recorder)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="no memory"):
            run(graphs, torch.ones(1, 1), loop=broken)
    assert len(graphs) == 0


def test_threads_take_turns(recorder):
    graphs, wrong = LoopGraphs(recorder), []

    def work(seed):
        generator = torch.Generator().manual_seed(seed)
        for _ in range(50):
            x = torch.randn(1 + seed, 64, generator=generator)
            if not torch.equal(run(graphs, x, float(seed)), 2 * x + seed):
                wrong.append(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert recorder.replayed == 200
    assert recorder.recorded == 3  # buckets 1, 2 and 4


def test_inference_mode_does_not_spoil_the_next_call(recorder):
    graphs, x = LoopGraphs(recorder), torch.randn(2, 3)
    with torch.inference_mode():
        run(graphs, x)
    assert torch.equal(run(graphs, x, 3.0), 2 * x + 3)


@pytest.fixture(scope="module")
def pipe(tiny_pipeline):
    return tiny_pipeline(shared=True)


@pytest.fixture
def recorded(pipe, monkeypatch, recorder):
    monkeypatch.setattr(fast_pipeline, "_recorder", lambda *_: recorder)
    return accelerate(pipe, tier="exact")


def image(seed=0, size=64):
    return torch.rand(2, 1, size, size, generator=torch.Generator().manual_seed(seed))


def mask(seed=0, size=64):
    return (image(seed + 100, size // 16).repeat_interleave(16, 2).repeat_interleave(16, 3) > 0.6).float()


def sample(pipe, which=0, size=64, **options):
    options = {
        "image": image(which, size), "mask_image": mask(which, size), "report": ["a mass", None],
        "attributes": [{"finding_birads": 5}, None], "num_inference_steps": 3, "output_type": "latent",
    } | options  # fmt: skip
    if "generator" not in options:
        options.setdefault("seed", [which, 2**63])
    return pipe(**options).images


def test_a_recorded_pipeline_gives_the_same_bits(pipe, recorded, recorder):
    plain = accelerate(pipe, runtime="fused", tier="exact")
    plain._built = plain._denoiser_here()[0], None
    for scheduler in (DDIMScheduler, DPMSolverMultistepScheduler, LCMScheduler):
        plain.scheduler = recorded.scheduler = scheduler.from_config(pipe.scheduler.config)
        for seed in (0, 1):
            assert torch.equal(*(sample(p, seed, report=None) for p in (recorded, plain)))  # reports are padded
    assert recorder.recorded == 3


def test_a_compiled_loop_is_recorded_too(pipe, recorded, recorder, monkeypatch):
    builder = functools.partial(CompiledDenoiser, backend="eager")
    monkeypatch.setitem(fast_pipeline._BUILDERS, "compile", builder)
    compiled = accelerate(pipe, runtime="compile", tier="exact")
    expected = sample(recorded)
    assert torch.allclose(sample(compiled), expected, rtol=0, atol=1e-5 * expected.abs().max().item())
    assert recorder.recorded == 2


def test_what_asks_for_values_has_no_recorder(pipe, monkeypatch):
    assert fast_pipeline._recorder("fused", pipe.unet) is None  # on the CPU nothing is recorded
    monkeypatch.setattr(type(pipe.unet), "device", torch.device("cuda"))
    monkeypatch.setattr(fast_pipeline, "CudaRecorder", lambda device: f"records on {device}")
    assert fast_pipeline._recorder("fused", pipe.unet) == "records on cuda"
    assert fast_pipeline._recorder("compile", pipe.unet) == "records on cuda"
    assert fast_pipeline._recorder("eager", pipe.unet) is None
    monkeypatch.setattr(fast_pipeline, "fused_refusals", lambda unet: ["it has a part of its own"])
    assert fast_pipeline._recorder("compile", pipe.unet) is None  # compiles the stock UNet


def test_nothing_that_a_call_brings_is_recorded_anew(recorded, recorder):
    first = sample(recorded)
    for changes in (
        {"seed": [8, 9]},
        {"attributes": {"finding_categories": ["Mass"]}},
        {"report": "spiculated"},
        {"report": ["an irregular spiculated mass", "two words"]},  # of four words at most, 32 tokens in all
        {"mask_image": mask(5)},
        {"image": image(6)},
        {"generator": torch.Generator().manual_seed(1)},
    ):
        assert not torch.equal(sample(recorded, **changes), first)
    # With a generator, the loop reads no seeds.
    assert recorder.recorded == 2
    assert torch.equal(sample(recorded), first)


@pytest.mark.parametrize(
    "changes",
    [
        {"num_inference_steps": 4}, {"guidance_scale": 3.0}, {"guidance_scale": 1.0}, {"eta": 0.5}, {"strength": 0.7},
        {"known_region": False}, {"size": 96}, {"num_images_per_prompt": 2, "seed": [1, 2, 3, 4]},
    ],
    ids=str,
)  # fmt: skip
def test_what_is_baked_in_is_recorded_anew(pipe, recorded, recorder, changes):
    sample(recorded)
    again = sample(recorded, **changes)
    assert recorder.recorded == 2
    assert torch.allclose(again, sample(pipe, **changes), rtol=0, atol=1e-5 * again.abs().max().item())


def test_a_loop_under_autocast_is_another_recording(recorded, recorder):
    with torch.autocast("cpu", torch.bfloat16):
        rounded = sample(recorded)
    assert not torch.equal(sample(recorded), rounded)
    assert recorder.recorded == 2


@pytest.mark.parametrize(
    "options",
    [{"callback_on_step_end": lambda *_: {}}, {"eta": 0.5, "generator": torch.Generator().manual_seed(0)}],
    ids=["callback", "noise of a generator"],
)
def test_what_cannot_be_recorded_runs_step_by_step(recorded, recorder, options):
    sample(recorded, **options)
    assert recorder.recorded == 0


@pytest.mark.parametrize("scheduler", [DDIMScheduler, DPMSolverMultistepScheduler, LCMScheduler])
def test_a_recorded_loop_never_asks_for_a_value(recorded, recorder, monkeypatch, scheduler):
    """Recorded with fake inputs, which have no values: an operation that reads a value from the device fails."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)

    def allocate(tensors, shapes):
        with mode:
            return {name: torch.empty(shape, dtype=tensors[name].dtype) for name, shape in shapes.items()}

    monkeypatch.setattr(graph, "_allocate", allocate)
    recorded.scheduler = scheduler.from_config(recorded.scheduler.config)
    for options in ({}, {"report": None}, {"guidance_scale": 1.0}):
        assert isinstance(sample(recorded, **options), FakeTensor)
    assert recorder.recorded == 3
    with pytest.raises(DataDependentOutputException):
        run(recorded._built[1], torch.ones(1, 1), loop=lambda given: given["x"] * given["x"].sum().item())


@pytest.mark.parametrize("padded", [True, False])
def test_with_triton_s_operators_it_never_asks_for_a_value_either(pipe, monkeypatch, padded):
    """The CUDA path on the meta device, whose tensors have no values."""
    asked = []
    monkeypatch.setattr(blocks, "use_triton", lambda x: asked.append(x) is None)
    fast = accelerate(pipe, runtime="fused", dtype=torch.bfloat16)
    fast.scheduler.set_timesteps(3)
    fast._guidance_scale, fast._interrupt = 3.0, False
    config, unet = pipe.conditioner.config, copy.deepcopy(fast.unet).to("meta")
    tokens, pooled = torch.empty(2, 40, config.width, device="meta"), torch.empty(2, config.pooled_dim, device="meta")
    conditioning = Conditioning(tokens, torch.empty(2, 40, dtype=torch.bool, device="meta"), pooled)
    vars(conditioning)["padded"] = padded
    null = Conditioning(tokens[:1, :1], conditioning.token_mask[:1, :1], pooled[:1])
    four = torch.empty(2, 4, 16, 16, device="meta")
    trajectory = Trajectory(
        latents=four, noise=four, image_latents=four, masked_image_latents=four, mask_latents=four[:, :1],
        conditioning=conditioning, timesteps=torch.empty(3, dtype=torch.long, device="meta"), eta=1.0, generator=None,
        seeds=[1, 2], known_region=True, callback=None, callback_inputs=(),
    )  # fmt: skip
    seeds = torch.empty(2, dtype=torch.long, device="meta")
    with torch.no_grad():
        out = fast._loop(trajectory, FusedDenoiser(unet), null, fast.scheduler, {"seeds": seeds}, lambda: None)
    assert (out.shape, out.dtype, out.device.type) == (four.shape, torch.float32, "meta")
    assert asked
    with pytest.raises(RuntimeError, match="cannot be called on meta tensors"):
        out.sum().item()


def test_the_compiled_unet_never_asks_for_a_value_either(pipe):
    """On the meta device. As within a recording, the mask's values are unknown."""
    config, unet = pipe.conditioner.config, copy.deepcopy(pipe.unet).to("meta")
    tokens, pooled = torch.empty(2, 40, config.width, device="meta"), torch.empty(2, config.pooled_dim, device="meta")
    conditioning = Conditioning(tokens, torch.empty(2, 40, dtype=torch.bool, device="meta"), pooled)
    null = Conditioning(tokens[:1, :1], conditioning.token_mask[:1, :1], pooled[:1])
    denoiser = CompiledDenoiser(unet, backend="eager")
    with torch.no_grad():
        constant, timesteps = torch.empty(2, 5, 16, 16, device="meta"), torch.empty(3, dtype=torch.long, device="meta")
        state = denoiser.prepare(conditioning, null, constant, timesteps)
        outputs = denoiser(torch.empty(2, 4, 16, 16, device="meta"), 0, state, True)
    assert [output.device.type for output in outputs] == ["meta", "meta"]


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=ON_A_GPU)])
def test_two_pipelines_record_at_once(pipe, device):
    """Two threads, each with its own recorder: the process captures one graph at a time."""
    fast = [accelerate(pipe, runtime="fused", device=device) for _ in range(2)]
    expected, found = [sample(one) for one in fast], [None, None]
    fresh = [accelerate(pipe, runtime="fused", device=device) for _ in range(2)]

    def work(i):
        found[i] = sample(fresh[i])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(one, other) for one, other in zip(expected, found, strict=True))


def test_tables_are_read_on_the_host():
    """A tensor subclass stands in for tables on another device."""

    class Elsewhere(torch.Tensor):
        def cpu(self):
            return self.as_subclass(torch.Tensor)

    scheduler = build_scheduler()
    scheduler.set_timesteps(3)
    scheduler.timesteps, scheduler.alphas_cumprod = (
        table.as_subclass(Elsewhere) for table in (scheduler.timesteps, scheduler.alphas_cumprod)
    )
    host = on_host(scheduler)
    assert type(host.timesteps) is type(host.alphas_cumprod) is torch.Tensor
    assert type(scheduler.timesteps) is Elsewhere
    assert tables(host) == tables(scheduler)
    host.set_timesteps(4)
    assert tables(host) != tables(scheduler)


def test_a_copy_records_for_itself(recorded, recorder):
    first = sample(recorded)
    assert torch.equal(sample(copy.deepcopy(recorded)), first)
    assert recorder.recorded == 2


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=ON_A_GPU)])
def test_cuda_graphs_give_the_same_bits(pipe, full_float32, device):
    fast = accelerate(pipe, runtime="fused", tier="exact", device=device)
    plain = accelerate(pipe, runtime="fused", tier="exact", device=device)
    plain._built = plain._denoiser_here()[0], None
    for seed in (0, 1, 2):
        for options in (
            {},
            {"guidance_scale": 1.0},
            {"strength": 0.7},  # add_noise moves the scheduler's tables to the device
            {"num_images_per_prompt": 2, "seed": [1, 2, 3, seed]},
        ):
            assert torch.equal(*(sample(p, seed, report=None, **options) for p in (fast, plain)))
    assert len(fast._built[1]) == 4


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=ON_A_GPU)])
def test_threads_on_streams_of_their_own_take_turns(device):
    graphs, wrong = LoopGraphs(CudaRecorder(torch.device(device))), []

    def loop(given):
        out = given["x"]
        for _ in range(50):
            out = out + given["shift"]
        return out

    def work(seed):
        with torch.cuda.stream(torch.cuda.Stream()):
            for i in range(20):
                x = torch.full((1 + seed, 1 << 16), float(i), device=device)
                result = graphs("key", loop, {"x": x}, {"shift": torch.tensor([float(seed)], device=device)})
                if not torch.equal(result, x + 50 * seed):
                    wrong.append(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
