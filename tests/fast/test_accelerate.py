"""accelerate(pipe): the eager images within the tier, the same call, and an untouched eager pipeline."""

import copy
import re

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    LCMScheduler,
    UniPCMultistepScheduler,
)

from gbci_fast.errors import GBCIError
from gbci_fast.fast import decision
from gbci_fast.fast.accelerate import accelerate
from gbci_fast.fast.pipeline import FastPipeline
from gbci_fast.model.pipeline import GBCIPipeline

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers' own
SCHEDULERS = [
    DDIMScheduler, EulerDiscreteScheduler, DPMSolverMultistepScheduler, UniPCMultistepScheduler, LCMScheduler,
]  # fmt: skip
DESCRIPTIONS = ({"view_position": "CC", "finding_categories": ["Mass"], "finding_birads": 5}, None)
REPORTS = ("irregular spiculated mass", None)


@pytest.fixture
def pipe(tiny_pipeline):
    return tiny_pipeline(shared=True)


@pytest.fixture(scope="module")
def image():
    return torch.rand(2, 1, 64, 64, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def mask():
    masks = torch.zeros(2, 1, 64, 64)
    masks[0, :, 12:30, 10:33] = 1
    masks[1, :, 30:50, 20:44] = 1
    return masks


def sample(pipe, image, mask, **options):
    options = {
        "attributes": DESCRIPTIONS, "report": REPORTS, "num_inference_steps": 4, "output_type": "latent",
    } | options  # fmt: skip
    if "generator" not in options:
        options.setdefault("seed", [5, 2**63])
    return pipe(image, mask, **options).images


def relative(ours, reference):
    return ((ours - reference).abs().max() / reference.abs().max()).item()


@pytest.mark.parametrize("runtime", ["eager", "fused"])
@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_exact_is_eager_to_float32_rounding(pipe, image, mask, scheduler, runtime):
    pipe.scheduler = scheduler.from_config(pipe.scheduler.config)
    fast = accelerate(pipe, runtime=runtime, tier="exact")
    assert relative(sample(fast, image, mask), sample(pipe, image, mask)) < 1e-5


@pytest.mark.parametrize(
    "options",
    [
        {"eta": 1.0},
        {"guidance_scale": 1.0},
        {"strength": 0.5},
        {"known_region": False},
        {"num_images_per_prompt": 2, "seed": [1, 2, 3, 4]},
        {"attributes": None, "report": None},
    ],
    ids=str,
)
def test_every_option_of_the_call_means_the_same(pipe, image, mask, options):
    fast = accelerate(pipe, tier="exact")
    assert relative(sample(fast, image, mask, **options), sample(pipe, image, mask, **options)) < 1e-5


@pytest.mark.parametrize("scheduler", [*SCHEDULERS, EulerAncestralDiscreteScheduler])
def test_a_generator_draws_as_it_does_in_the_eager_pipeline(pipe, image, mask, scheduler):
    pipe.scheduler = scheduler.from_config(pipe.scheduler.config)
    fast = accelerate(pipe, tier="exact")
    generators = [torch.Generator().manual_seed(3) for _ in range(2)]
    for _ in range(2):  # the second call draws on from where the first one ended
        ours, reference = (
            sample(p, image, mask, eta=0.7, generator=generator)
            for p, generator in zip((fast, pipe), generators, strict=True)
        )
        assert relative(ours, reference) < 1e-5


def test_pixels_outside_the_mask_are_the_input_s(pipe, image, mask):
    for tier in ("exact", "tolerance"):
        out = sample(accelerate(pipe, tier=tier), image, mask, output_type="pt")
        assert torch.equal(out[mask == 0], image[mask == 0])
        assert (out - image)[mask > 0].abs().max() > 1e-3


def test_tolerance_is_within_its_bound(pipe, image, mask):
    reference = sample(pipe, image, mask)
    narrow = accelerate(pipe, runtime="eager", dtype=torch.bfloat16)
    fast = accelerate(pipe, runtime="fused", dtype=torch.bfloat16)
    errors = [(sample(p, image, mask) - reference).square().mean().sqrt() for p in (fast, narrow)]
    assert 0 < errors[0] <= 1.5 * errors[1]


def test_callbacks_may_keep_and_change_what_they_get(pipe, image, mask):
    def run(pipe):
        kept = []

        def callback(pipe, step, timestep, tensors):
            kept.append(tensors["latents"])
            pipe._guidance_scale = (3.0, 1.0, 2.0)[step % 3]
            if step == 1:
                return {"latents": tensors["latents"] * 1.1, "image_latents": tensors["image_latents"] + 0.1}
            return None

        names = ("latents", "noise", "image_latents")
        last = sample(pipe, image, mask, callback_on_step_end=callback, callback_on_step_end_tensor_inputs=names)
        return [*kept, last]

    ours, reference = run(accelerate(pipe, tier="exact")), run(pipe)
    assert len(ours) == 5
    for a, b in zip(ours, reference, strict=True):
        assert relative(a, b) < 1e-5


def test_an_interrupt_ends_both_alike(pipe, image, mask):
    def stop(pipe, step, timestep, tensors):
        pipe._interrupt = step == 1
        return tensors

    ours, reference = (
        sample(p, image, mask, callback_on_step_end=stop) for p in (accelerate(pipe, tier="exact"), pipe)
    )
    assert relative(ours, reference) < 1e-5


def test_the_eager_pipeline_stays_as_it_is(pipe, image, mask, tmp_path):
    before = sample(pipe, image, mask)
    weights = {name: part.clone() for name, part in pipe.unet.state_dict().items()}
    fast = accelerate(pipe, dtype=torch.bfloat16)
    sample(fast, image, mask)
    assert fast.eager is pipe
    assert pipe.unet.dtype == torch.float32
    assert all(torch.equal(part, weights[name]) for name, part in pipe.unet.state_dict().items())
    assert torch.equal(sample(pipe, image, mask), before)
    fast.save_pretrained(tmp_path)
    assert torch.equal(sample(quiet(GBCIPipeline.from_pretrained(tmp_path)), image, mask), before)


def quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_moving_it_leaves_the_eager_one_where_it_is(pipe):
    narrow = accelerate(pipe, dtype=torch.bfloat16)
    narrow.to("meta")
    assert {part.device.type for part in (pipe.unet, pipe.vae, pipe.conditioner)} == {"cpu"}


def test_weights_that_went_away_and_came_back_are_looked_at_again(pipe, image, mask):
    """Weights that were moved away and back are other tensors, on the same device and in the same dtype."""
    fast = accelerate(pipe, tier="exact")
    fast.unet = copy.deepcopy(fast.unet)
    before = sample(fast, image, mask)
    fast.unet.to(torch.bfloat16).to(torch.float32)
    assert not torch.equal(sample(fast, image, mask), before)
    rounded = copy.deepcopy(pipe)
    rounded.unet = fast.unet
    assert torch.equal(sample(fast, image, mask), sample(accelerate(rounded, tier="exact"), image, mask))


def test_it_can_be_copied_and_is_made_by_accelerate_alone(pipe, image, mask, tmp_path):
    fast = accelerate(pipe, tier="exact")
    first = sample(fast, image, mask)
    assert torch.equal(sample(copy.deepcopy(fast), image, mask), first)
    for make in (lambda: FastPipeline.from_pretrained(tmp_path), lambda: FastPipeline.from_pipe(pipe)):
        with pytest.raises(GBCIError, match="a FastPipeline is made by accelerate"):
            make()


def test_a_scheduler_that_was_swapped_in_is_saved(pipe, tmp_path):
    fast = accelerate(pipe, tier="exact")
    fast.scheduler = UniPCMultistepScheduler.from_config(fast.scheduler.config)
    fast.save_pretrained(tmp_path)
    assert type(GBCIPipeline.from_pretrained(tmp_path).scheduler) is UniPCMultistepScheduler
    assert type(pipe.scheduler) is DDIMScheduler


def test_a_device_without_kernels_is_refused(pipe):
    with pytest.raises(GBCIError, match="gbci_fast was built without kernels for xpu; install nvcc and build it again"):
        accelerate(pipe, device="xpu")


def test_another_unet_is_noticed(pipe, image, mask, tiny_pipeline):
    fast = accelerate(pipe, tier="exact")
    first = sample(fast, image, mask)
    fast.unet = tiny_pipeline(seed=1).unet
    assert relative(sample(fast, image, mask), first) > 1e-2


def test_the_decision_says_what_runs_and_why(pipe, monkeypatch):
    monkeypatch.setattr(decision, "has_bfloat16_units", lambda _: False)
    assert accelerate(pipe).describe() == (
        "runtime fused, tier tolerance, float32\nfloat32, because this CPU is no faster in bfloat16"
    )
    monkeypatch.setattr(decision, "has_bfloat16_units", lambda _: True)
    assert accelerate(pipe).describe() == "runtime fused, tier tolerance, bfloat16"
    assert accelerate(pipe, runtime="eager", tier="exact").describe() == "runtime eager, tier exact, float32"


def test_a_gpu_without_triton_is_noted(pipe, monkeypatch):
    monkeypatch.setattr(torch._C, "_dispatch_has_kernel_for_dispatch_key", lambda *_: True)
    note = "norms and feed-forwards run in PyTorch, because triton is not installed"

    def notes(runtime, device):
        return decision.decide(pipe, runtime, "tolerance", torch.float32, torch.device(device)).notes

    monkeypatch.setattr(decision, "triton", None)
    assert note in notes("auto", "cuda")
    assert note not in (*notes("eager", "cuda"), *notes("auto", "cpu"))
    monkeypatch.setattr(decision, "triton", object())
    assert note not in notes("auto", "cuda")


def test_on_a_gpu_tier_exact_refuses_tf32(pipe, monkeypatch):
    monkeypatch.setattr(torch._C, "_dispatch_has_kernel_for_dispatch_key", lambda *_: True)
    backends = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [backend.allow_tf32 for backend in backends]
    try:
        for allowed in ((True, False), (False, True)):
            for backend, value in zip(backends, allowed, strict=True):
                backend.allow_tf32 = value
            name = ("cuda.matmul", "cudnn")[allowed.index(True)]
            with pytest.raises(GBCIError, match=f"needs float32; set torch.backends.{name}.allow_tf32 = False"):
                decision.decide(pipe, "fused", "exact", None, torch.device("cuda"))
            decision.decide(pipe, "fused", "exact", None, torch.device("cpu"))
    finally:
        for backend, value in zip(backends, before, strict=True):
            backend.allow_tf32 = value


def test_an_unknown_part_is_left_to_the_eager_runtime_and_said(pipe, image, mask):
    pipe.unet.set_attention_slice(1)
    try:
        fast = accelerate(pipe, tier="exact")
        assert fast.decision.runtime == "eager"
        note = "not the fused runtime: down_blocks.1.attentions.0.transformer_blocks.0.attn1.processor is a Sliced"
        assert fast.describe().splitlines()[1].startswith(note)
        assert relative(sample(fast, image, mask), sample(pipe, image, mask)) < 1e-5
        with pytest.raises(GBCIError, match=r"the fused runtime cannot run this UNet: .* is a SlicedAttnProcessor"):
            accelerate(pipe, runtime="fused")
    finally:
        pipe.unet.set_default_attn_processor()


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"runtime": "magic"}, "runtime is 'magic'; expected one of auto, eager, fused, compile"),
        ({"tier": "best"}, "tier is 'best'; expected one of exact, tolerance"),
        ({"device": "gpu"}, "device is 'gpu'; expected cpu or cuda"),
        ({"device": "meta"}, "device is 'meta'; expected cpu or cuda"),
        ({"dtype": torch.int8}, "dtype is torch.int8; expected torch.float32, torch.bfloat16, torch.float16"),
        (
            {"tier": "exact", "dtype": torch.bfloat16},
            "dtype is torch.bfloat16 with tier 'exact'; expected torch.float32 of a float32 pipeline",
        ),
    ],
    ids=str,
)
def test_bad_arguments_are_named(pipe, options, sentence):
    with pytest.raises(GBCIError, match=re.escape(sentence)):
        accelerate(pipe, **options)


def test_a_scheduler_without_a_sampler_is_refused(pipe):
    pipe.scheduler = HeunDiscreteScheduler.from_config(pipe.scheduler.config)
    with pytest.raises(GBCIError, match="scheduler is a HeunDiscreteScheduler; expected one of DDIMScheduler"):
        accelerate(pipe)


def test_an_option_without_a_sampler_is_refused_before_anything_is_made(pipe, image, mask):
    refused = "DPMSolverMultistepScheduler has algorithm_type 'sde-dpmsolver++'; expected 'dpmsolver++'"
    scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config, algorithm_type="sde-dpmsolver++")
    fast = accelerate(pipe)
    pipe.scheduler = fast.scheduler = scheduler
    for attempt in (lambda: accelerate(pipe), lambda: sample(fast, image, mask)):
        with pytest.raises(GBCIError, match=re.escape(refused)):
            attempt()
