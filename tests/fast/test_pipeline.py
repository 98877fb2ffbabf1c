"""A FastPipeline can be moved, offloaded, shared between threads and given other parts, like any diffusers pipeline."""

import functools
import threading

import pytest
import torch
from diffusers import LCMScheduler, UniPCMultistepScheduler

from gbci_fast.errors import GBCIError
from gbci_fast.fast.accelerate import accelerate

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers' own


@pytest.fixture
def pipe(tiny_pipeline):
    return tiny_pipeline()


@pytest.fixture
def sample(sample):
    return functools.partial(sample, num_inference_steps=3, output_type="pt")


def alike(ours, reference):
    return torch.allclose(ours, reference, rtol=0, atol=1e-4)


def test_moving_it_moves_nothing_that_is_shared(pipe):
    fast = accelerate(pipe, tier="exact")
    assert fast.to("meta") is fast
    assert {part.device.type for part in (fast.unet, fast.vae, fast.conditioner)} == {"meta"}
    assert {part.device.type for part in (pipe.unet, pipe.vae, pipe.conditioner)} == {"cpu"}


def test_another_dtype_is_used_and_kept_to_the_tier(pipe, sample):
    reference = sample(pipe)
    fast = accelerate(pipe, dtype=torch.float32).to(torch.bfloat16)
    narrow = sample(fast)
    assert fast.decision.dtype == torch.bfloat16
    assert not torch.equal(narrow, reference)
    assert torch.allclose(narrow, reference, atol=0.1)
    assert pipe.unet.dtype == torch.float32
    exact = accelerate(pipe, tier="exact").to(torch.bfloat16)
    with pytest.raises(GBCIError, match=r"dtype is torch\.bfloat16 with tier 'exact'"):
        sample(exact)


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks what is said where there is no accelerator")
@pytest.mark.parametrize("offload", ["enable_model_cpu_offload", "enable_sequential_cpu_offload"])
def test_offloading_fails_as_it_does_in_the_eager_pipeline(pipe, offload):
    sentences = []
    for one in (pipe, accelerate(pipe)):
        with pytest.raises(RuntimeError, match="requires accelerator, but not found") as error:
            getattr(one, offload)()
        sentences.append(str(error.value))
    assert sentences[0] == sentences[1]


@pytest.mark.parametrize("first", ["sampled before", "not sampled before"])
def test_offloading_runs_the_stock_unet_and_says_so(pipe, sample, first):
    reference = sample(pipe)
    fast = accelerate(pipe, tier="exact")
    if first == "sampled before":
        sample(fast)
    fast.enable_model_cpu_offload(device="cpu")
    assert alike(sample(fast), reference)
    assert alike(sample(fast), reference)
    assert fast.decision.runtime == "eager"
    assert "has hooks" in fast.describe()
    assert not hasattr(pipe.unet, "_hf_hook")
    fast.remove_all_hooks()
    assert alike(sample(fast), reference)
    assert fast.describe() == "runtime fused, tier exact, float32"


def test_a_runtime_that_was_asked_for_is_not_exchanged(pipe, sample):
    fast = accelerate(pipe, runtime="fused", tier="exact")
    fast.enable_model_cpu_offload(device="cpu")
    with pytest.raises(GBCIError, match="the fused runtime cannot run this UNet: it has hooks"):
        sample(fast)


def test_an_exchanged_unet_is_looked_at(pipe, sample, tiny_pipeline):
    fast = accelerate(pipe, tier="exact")
    sample(fast)
    other = tiny_pipeline(seed=1).unet
    other.set_attention_slice(1)
    pipe.unet = fast.unet = other
    assert alike(sample(fast), sample(pipe))
    assert fast.decision.runtime == "eager"
    assert "processor is a SlicedAttnProcessor" in fast.describe()


@pytest.mark.parametrize("scheduler", [UniPCMultistepScheduler, LCMScheduler])
def test_an_exchanged_scheduler_is_sampled_as_it_says(pipe, sample, scheduler):
    fast = accelerate(pipe, tier="exact")
    before = sample(fast)
    pipe.scheduler = fast.scheduler = scheduler.from_config(pipe.scheduler.config)
    after = sample(fast)
    assert alike(after, sample(pipe))
    assert not alike(after, before)


def test_threads_take_turns(pipe, sample):
    fast = accelerate(pipe, tier="exact")
    calls = [{"seed": seed, "num_inference_steps": 2 + seed % 3, "guidance_scale": 1.0 + seed} for seed in range(4)]
    expected = [sample(fast, **call) for call in calls]
    found = [None] * len(calls)

    def work(i):
        found[i] = [sample(fast, **calls[i]) for _ in range(3)]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for images, reference in zip(found, expected, strict=True):
        assert all(torch.equal(image, reference) for image in images)


def test_a_template_that_neighbors_share_is_encoded_once(pipe, monkeypatch):
    fast, encoded = accelerate(pipe, tier="exact"), []
    encode = fast.vae.encode
    monkeypatch.setattr(fast.vae, "encode", lambda pixels: encoded.append(len(pixels)) or encode(pixels))
    a, b = torch.rand(2, 1, 64, 64, generator=torch.Generator().manual_seed(3))
    templates = torch.stack([a, a, b, b, b, a]) * 2 - 1
    assert alike(fast.encode_image(templates), pipe.encode_image(templates))
    assert encoded == [3]
