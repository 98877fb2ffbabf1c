"""The eager pipeline: sampling, noise, conditioning, callbacks, storage. Its inputs are in test_pipeline_inputs.py."""

import functools
import json
import os
import signal
import subprocess
import sys
import threading

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    LCMScheduler,
    UniPCMultistepScheduler,
)
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.models.attention_processor import Attention
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from gbci_fast.errors import GBCIError
from gbci_fast.fast.accelerate import accelerate
from gbci_fast.model import pipeline
from gbci_fast.model.arguments import as_attributes
from gbci_fast.model.conditioning import ConditionEncoder
from gbci_fast.model.masks import feather_latent_mask, latent_mask
from gbci_fast.model.noise import seeded_normal
from gbci_fast.model.pipeline import GBCIPipeline
from gbci_fast.training.ldm import build_pipeline
from gbci_fast.training.stages import ldm_preset, vae_preset
from gbci_fast.training.vae import build_vae

# diffusers' own, of its schedulers under NumPy 2 and of the older spelling of `dtype`
pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:__array_wrap__ must accept:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:`torch_dtype` is deprecated:FutureWarning"),
]
SCHEDULERS = {
    "ddim": DDIMScheduler,
    "euler": EulerDiscreteScheduler,
    "dpmpp_2m": DPMSolverMultistepScheduler,
    "unipc": UniPCMultistepScheduler,
    "lcm": LCMScheduler,
}
DESCRIPTIONS = (
    {"view_position": "CC", "finding_categories": ["Mass"], "finding_birads": 5, "age": 61.0},
    {"laterality": "R", "breast_density": "D", "finding_categories": []},
    None,
    {"finding_categories": ["Suspicious Calcification", "Asymmetry"], "pixel_spacing": 0.35},
)
REPORTS = ("irregular spiculated mass of 12 mm in the upper outer quadrant", None, "calcifications", "a b c d")


@pytest.fixture
def pipe(tiny_pipeline):
    """A pipeline of random weights for 64 x 64 pixels, 16 x 16 cells."""
    made = tiny_pipeline()
    made.vae.register_to_config(shift_factor=0.2, scaling_factor=1.5)
    return made


@pytest.fixture(scope="module")
def image():
    return torch.rand(4, 1, 64, 64, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def mask():
    """Four different rectangles, [4, 1, 64, 64]."""
    masks = torch.zeros(4, 1, 64, 64)
    for i, part in enumerate(masks[:, 0]):
        part[12 + 4 * i : 30 + 5 * i, 10 + 3 * i : 33 + 4 * i] = 1
    return masks


def sample(pipe, image, mask, **options):
    options = {"num_inference_steps": 3, "seed": 0, "output_type": "pt"} | options
    return pipe(image, mask, **options).images


def relative(ours, reference):
    return ((ours - reference).abs().max() / reference.abs().max()).item()


def use(pipe, scheduler):
    pipe.scheduler = scheduler.from_config(pipe.scheduler.config)


@pytest.mark.parametrize("scheduler", SCHEDULERS.values(), ids=SCHEDULERS)
def test_every_scheduler_is_finite_in_range_and_a_function_of_the_seed(pipe, image, mask, scheduler):
    use(pipe, scheduler)
    before = torch.get_rng_state()
    first, again, other = (sample(pipe, image[:2], mask[:2], seed=seed) for seed in (5, 5, 50))
    assert first.shape == (2, 1, 64, 64)
    assert first.isfinite().all()
    assert first.min() >= 0
    assert first.max() <= 1
    assert torch.equal(first, again)
    assert (first - other)[mask[:2] > 0].abs().mean() > 1e-3
    assert torch.equal(torch.get_rng_state(), before)  # torch's own generator is not touched


@pytest.mark.parametrize(
    ("scheduler", "eta"),
    [*((scheduler, 0.0) for scheduler in SCHEDULERS.values()), (DDIMScheduler, 1.0)],
    ids=[*SCHEDULERS, "ddim-eta"],
)
def test_batch_of_four_equals_four_of_one(pipe, image, mask, scheduler, eta):
    use(pipe, scheduler)
    options = {"seed": [9, 2**63, 1, 4], "eta": eta, "output_type": "latent"}
    together = sample(pipe, image, mask, attributes=DESCRIPTIONS, report=REPORTS, **options)
    for i, seed in enumerate(options["seed"]):
        alone = {**options, "seed": [seed], "attributes": DESCRIPTIONS[i], "report": REPORTS[i]}
        assert relative(together[i : i + 1], sample(pipe, image[i : i + 1], mask[i : i + 1], **alone)) < 1e-5


def test_eta_adds_noise_to_ddim(pipe, image, mask):
    calm, noisy, again = (sample(pipe, image[:1], mask[:1], eta=eta) for eta in (0.0, 0.8, 0.8))
    assert torch.equal(noisy, again)
    assert (calm - noisy).abs().max() > 1e-3


@pytest.mark.parametrize("eta", [0.0, 0.7])
@torch.no_grad()
def test_ddim_equals_its_equations(pipe, image, mask, eta):
    """DDIM (Song et al. 2021, eq. 12 and 16) in float64, guidance in two forwards, the null context being one token."""
    seeds, steps, scale = [3, 4], 4, 2.5
    image, mask = image[:2], mask[:2]
    ours = sample(
        pipe, image, mask, num_inference_steps=steps, guidance_scale=scale, seed=seeds, eta=eta, output_type="latent",
        attributes=DESCRIPTIONS[:2],
    )  # fmt: skip
    masked = (image * 2 - 1) * (1 - mask)
    known, constant = pipe.encode_image(image * 2 - 1), pipe.encode_image(masked)
    cells = latent_mask(mask, 4)
    blend = feather_latent_mask(cells, 1).double()
    condition = pipe.encode_condition(masked, mask, as_attributes(list(DESCRIPTIONS[:2])), [None, None])
    null = pipe.conditioner.null(2, 1)
    noise = seeded_normal(seeds, (4, 16, 16)).double()

    def predict(z, t, context):
        stacked = torch.cat([z.float(), cells, constant], 1)
        return pipe.unet(stacked, t, context.tokens, class_labels=context.pooled).sample.double()

    z = noise
    alphas = [pipe.scheduler.alphas_cumprod[t].double() for t in (999, 749, 499, 249)] + [torch.tensor(1.0).double()]
    for step, (t, a, a_next) in enumerate(zip((999, 749, 499, 249), alphas, alphas[1:], strict=False)):
        unconditional = predict(z, t, null)
        v = unconditional + scale * (predict(z, t, condition) - unconditional)
        x0, epsilon = a.sqrt() * z - (1 - a).sqrt() * v, a.sqrt() * v + (1 - a).sqrt() * z
        sigma = eta * ((1 - a_next) / (1 - a)).sqrt() * (1 - a / a_next).sqrt()
        z = a_next.sqrt() * x0 + (1 - a_next - sigma**2).sqrt() * epsilon
        z += sigma * seeded_normal(seeds, (4, 16, 16), step=step, stream=1).double()
        z = torch.lerp(a_next.sqrt() * known.double() + (1 - a_next).sqrt() * noise, z, blend)
    assert relative(ours, z) < 1e-5


@torch.no_grad()
def test_one_null_token_equals_its_repetition(pipe):
    z = torch.randn(2, 9, 16, 16, generator=torch.Generator().manual_seed(0))
    one, many = pipe.conditioner.null(2, 1), pipe.conditioner.null(2, 37)
    once, repeated = (pipe.unet(z, 500, null.tokens, class_labels=null.pooled).sample for null in (one, many))
    assert relative(once, repeated) < 1e-5
    assert torch.equal(one.pooled, many.pooled)


@torch.no_grad()
def test_film_and_tokens_change_the_prediction(pipe):
    z = torch.randn(1, 9, 16, 16, generator=torch.Generator().manual_seed(0))
    null = pipe.conditioner.null(1, 1)
    plain = pipe.unet(z, 500, null.tokens, class_labels=null.pooled).sample
    assert relative(pipe.unet(z, 500, null.tokens, class_labels=null.pooled + 1).sample, plain) > 1e-3
    assert relative(pipe.unet(z, 500, null.tokens + 1, class_labels=null.pooled).sample, plain) > 1e-4


def test_descriptions_and_reports_reach_the_image(pipe, image, mask):
    def latents(**options):
        return sample(pipe, image[:1], mask[:1], output_type="latent", **options)

    plain = latents()
    assert relative(latents(attributes={"finding_categories": ["Mass"]}), plain) > 1e-4
    assert relative(latents(report="irregular mass"), plain) > 1e-4


def test_guidance_of_at_most_one_runs_one_half(pipe, image, mask):
    batches = []
    hook = pipe.unet.register_forward_pre_hook(lambda module, args: batches.append(len(args[0])))
    try:
        for scale in (0.0, 1.0, 1.5):
            sample(pipe, image[:2], mask[:2], guidance_scale=scale, num_inference_steps=1)
    finally:
        hook.remove()
    assert batches == [2, 2, 4]


@pytest.mark.parametrize("scheduler", SCHEDULERS.values(), ids=SCHEDULERS)
def test_every_scheduler_follows_a_torch_generator(pipe, image, mask, scheduler):
    use(pipe, scheduler)
    first, again, other = (
        sample(pipe, image[:1], mask[:1], seed=None, generator=torch.Generator().manual_seed(seed))
        for seed in (2, 2, 3)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_torch_generators(pipe, image, mask):
    def draw(generator, count=2, **options):
        return sample(
            pipe, image[:count], mask[:count], seed=None, generator=generator, output_type="latent", **options
        )

    def make(seed):
        return torch.Generator().manual_seed(seed)

    assert torch.equal(draw(make(3)), draw(make(3)))
    assert not torch.equal(draw(make(3)), draw(make(4)))
    # drawn as diffusers draws: one randn of the latents' shape
    latents = torch.randn(2, 4, 16, 16, generator=make(3))
    assert torch.equal(
        draw(make(3)), sample(pipe, image[:2], mask[:2], seed=None, latents=latents, output_type="latent")
    )
    each = draw([make(7), make(8)], eta=0.5)
    assert torch.equal(each, draw([make(7), make(8)], eta=0.5))
    assert relative(each[:1], draw([make(7)], count=1, eta=0.5)) < 1e-5


def test_schedulers_that_only_take_generators(pipe, image, mask):
    use(pipe, EulerAncestralDiscreteScheduler)
    with pytest.raises(GBCIError) as raised:
        sample(pipe, image[:1], mask[:1], seed=1)
    assert str(raised.value) == (
        "EulerAncestralDiscreteScheduler takes its noise from a torch generator alone; pass generator instead of seed"
    )
    draws = [sample(pipe, image[:1], mask[:1], seed=None, generator=torch.Generator().manual_seed(2)) for _ in range(2)]
    assert torch.equal(*draws)


def every_scheduler():
    """Name and class of all that diffusers has and that can be made of nothing but a noise schedule."""
    import diffusers

    for name in sorted(name for name in dir(diffusers) if name.endswith("Scheduler")):
        kind = getattr(diffusers, name)
        if isinstance(kind, type) and issubclass(kind, diffusers.SchedulerMixin):
            yield name, kind


@pytest.mark.parametrize(("name", "kind"), every_scheduler())
def test_any_scheduler_of_diffusers_is_driven_and_stored_or_refused(pipe, image, mask, name, kind, tmp_path):
    try:
        made = kind.from_config(pipe.scheduler.config)
    except (TypeError, ValueError):  # one that wants to be told more
        made = kind() if name == "UnCLIPScheduler" else None
    if made is None:
        pytest.skip("cannot be made of a noise schedule alone")
    pipe.scheduler = made

    def paint(pipe):
        options = {"seed": None, "generator": torch.Generator().manual_seed(0), "num_inference_steps": 4}
        return sample(pipe, image[:1], mask[:1], **options)

    result, said = None, None
    try:
        result = paint(pipe)
    except GBCIError as error:
        said = str(error)
    if result is None:
        assert said.startswith(f"scheduler is a {name}, which inpainting cannot drive: ")
        assert name not in {kind.__name__ for kind in SCHEDULERS.values()}
        return
    assert result.isfinite().all()
    untouched = mask[:1] == 0
    assert torch.equal(result[untouched], image[:1][untouched])
    assert (result - image[:1])[~untouched].abs().mean() > 1e-3
    pipe.save_pretrained(tmp_path)
    loaded = GBCIPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert type(loaded.scheduler) is kind
    assert torch.equal(paint(loaded), result)


@pytest.mark.parametrize("name", ["FlowMatchEulerDiscreteScheduler", "IPNDMScheduler", "DDIMInverseScheduler"])
def test_schedulers_of_other_models_are_refused(pipe, image, mask, name):
    import diffusers

    pipe.scheduler = getattr(diffusers, name)()
    with pytest.raises(
        GBCIError, match=f"^scheduler is a {name}, which inpainting cannot drive: it has no .*add_noise"
    ):
        sample(pipe, image, mask)


def alone_and_together(calls):
    """The results of these functions one after the other, and as one thread each, started at once."""
    alone, together = [call() for call in calls], [None] * len(calls)
    started = threading.Barrier(len(calls))

    def work(i):
        started.wait()
        together[i] = calls[i]()

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return alone, together


@pytest.mark.parametrize("scheduler", SCHEDULERS.values(), ids=SCHEDULERS)
def test_threads_get_the_images_that_they_would_get_alone(pipe, image, mask, scheduler):
    use(pipe, scheduler)
    calls = [
        functools.partial(
            sample,
            pipe,
            image[i : i + 1],
            mask[i : i + 1],
            seed=i,
            num_inference_steps=3 + 2 * i,
            guidance_scale=1.0 + i,
        )
        for i in range(4)
    ]
    alone, together = alone_and_together(calls)
    assert all(torch.equal(one, other) for one, other in zip(alone, together, strict=True))


def test_threads_of_pipelines_that_share_a_scheduler(pipe, image, mask):
    use(pipe, UniPCMultistepScheduler)
    pipes = [pipe, GBCIPipeline.from_pipe(pipe)]
    for one in pipes:
        one.set_progress_bar_config(disable=True)
    assert pipes[1].scheduler is pipe.scheduler
    calls = [functools.partial(sample, one, image, mask, num_inference_steps=3 + i) for i, one in enumerate(pipes)]
    alone, together = alone_and_together(calls)
    assert all(torch.equal(one, other) for one, other in zip(alone, together, strict=True))


def test_a_callback_sees_its_own_call_while_another_thread_waits(pipe, image, mask):
    def call(steps, scale):
        seen = []

        def note(pipe, step, timestep, tensors):
            seen.append((pipe.num_timesteps, pipe.guidance_scale, len(pipe.scheduler.timesteps)))
            pipe._interrupt = steps == 5 and step == 1
            return {}

        sample(pipe, image[:1], mask[:1], num_inference_steps=steps, guidance_scale=scale, callback_on_step_end=note)
        return seen

    alone, together = alone_and_together([lambda: call(5, 3.0), lambda: call(4, 1.0)])
    assert alone == together == [[(5, 3.0, 5)] * 2, [(4, 1.0, 4)] * 4]


def test_a_callback_may_call_its_own_pipeline(pipe, image, mask):
    inner = []

    def paint(pipe, step, timestep, tensors):
        if step == 2:  # the last: what the inner call leaves in the scheduler is not needed any more
            inner.append(sample(pipe, image[:1], mask[:1], seed=7))
        return {}

    sample(pipe, image[:1], mask[:1], callback_on_step_end=paint)
    assert torch.equal(inner[0], sample(pipe, image[:1], mask[:1], seed=7))


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
@pytest.mark.parametrize("made", [lambda pipe: pipe, accelerate], ids=["eager", "fast"])
def test_a_process_that_is_forked_during_a_call_makes_its_own(pipe, image, mask, made):
    pipe = made(pipe)
    inside, forked = threading.Event(), threading.Event()

    def wait(pipe, step, timestep, tensors):
        inside.set()
        assert forked.wait(60)
        return {}

    thread = threading.Thread(target=sample, args=(pipe, image[:1], mask[:1]), kwargs={"callback_on_step_end": wait})
    thread.start()
    assert inside.wait(60)
    if not (child := os.fork()):
        signal.alarm(20)  # ends a child that waits for the thread, which it does not have
        try:
            sample(pipe, image[:1], mask[:1], eta=7.0)
        except GBCIError as error:
            os._exit(0 if str(error) == "eta is 7.0; expected 0 to 1" else 2)
        finally:
            os._exit(1)
    forked.set()
    thread.join()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_one_seed_counts_up(pipe, image, mask):
    listed = sample(pipe, image[:2], mask[:2], seed=[40, 41])
    assert torch.equal(sample(pipe, image[:2], mask[:2], seed=40), listed)


def test_variants_lie_next_to_each_other(pipe, image, mask):
    described = {"attributes": list(DESCRIPTIONS[:2]), "report": list(REPORTS[:2]), "output_type": "latent"}
    variants = sample(pipe, image[:2], mask[:2], num_images_per_prompt=2, seed=[1, 2, 3, 4], **described)
    assert variants.shape == (4, 4, 16, 16)
    for i in range(4):
        k = i // 2
        alone = sample(
            pipe, image[k : k + 1], mask[k : k + 1], seed=i + 1, output_type="latent",
            attributes=DESCRIPTIONS[k], report=REPORTS[k],
        )  # fmt: skip
        assert relative(variants[i : i + 1], alone) < 1e-5


def test_one_image_serves_several_masks(pipe, image, mask):
    together = sample(pipe, image[:1], mask[:3], seed=[1, 2, 3], attributes=DESCRIPTIONS[0], report=REPORTS[0])
    repeated = sample(
        pipe, image[:1].repeat(3, 1, 1, 1), mask[:3], seed=[1, 2, 3],
        attributes=[DESCRIPTIONS[0]] * 3, report=[REPORTS[0]] * 3,
    )  # fmt: skip
    assert torch.equal(together, repeated)
    assert not torch.equal(together[0], together[1])


@pytest.mark.parametrize("scheduler", [DDIMScheduler, EulerDiscreteScheduler])
def test_a_number_of_steps_that_overruns_the_timesteps_is_refused(pipe, image, mask, scheduler):
    """Trailing spacing gives 62 timesteps instead of 61, and the last is -1."""
    use(pipe, scheduler)
    sentence = f"num_inference_steps 61 takes {scheduler.__name__} to timestep -1; expected another number"
    with pytest.raises(GBCIError, match=sentence):
        sample(pipe, image[:1], mask[:1], num_inference_steps=61)


def test_less_strength_keeps_more_of_the_original(pipe, image, mask):
    original = pipe.encode_image(image[:1] * 2 - 1)
    cells = latent_mask(mask[:1], 4) > 0
    distances, steps = [], []
    for strength in (0.1, 0.3, 0.6, 1.0):
        latents = sample(pipe, image[:1], mask[:1], strength=strength, num_inference_steps=10, output_type="latent")
        distances.append(((latents - original) * cells).square().mean().item())
        steps.append(pipe.num_timesteps)
    assert distances == sorted(distances)
    assert distances[0] < 0.25 * distances[-1]
    assert steps == [1, 3, 6, 10]


def test_known_region_ends_as_the_original(pipe, image, mask):
    original = pipe.encode_image(image[:1] * 2 - 1)
    outside = (feather_latent_mask(latent_mask(mask[:1], 4), 1) == 0).expand_as(original)
    kept = sample(pipe, image[:1], mask[:1], output_type="latent")
    assert torch.equal(kept[outside], original[outside])
    free = sample(pipe, image[:1], mask[:1], output_type="latent", known_region=False)
    assert (free[outside] - original[outside]).abs().mean() > 0.01


def test_given_latents_are_the_noise(pipe, image, mask):
    noise = seeded_normal([6], (4, 16, 16))
    assert torch.equal(sample(pipe, image[:1], mask[:1], latents=noise), sample(pipe, image[:1], mask[:1], seed=6))


def test_callback_sees_every_step(pipe, image, mask):
    calls = []

    def note(called, step, timestep, tensors):
        calls.append((called is pipe, step, int(timestep), sorted(tensors), tensors["latents"].shape))

    silent = sample(pipe, image[:1], mask[:1])
    watched = sample(
        pipe, image[:1], mask[:1], callback_on_step_end=note,
        callback_on_step_end_tensor_inputs=["latents", "noise", "image_latents"],
    )  # fmt: skip
    names, shape = ["image_latents", "latents", "noise"], (1, 4, 16, 16)
    assert calls == [(True, i, t, names, shape) for i, t in enumerate((999, 666, 332))]
    assert torch.equal(silent, watched)


def test_callback_changes_tensors(pipe, image, mask):
    def at_the_end(called, step, timestep, tensors):
        return {"latents": torch.full_like(tensors["latents"], 0.25)} if step == called.num_timesteps - 1 else {}

    latents = sample(pipe, image[:1], mask[:1], callback_on_step_end=at_the_end, output_type="latent")
    assert torch.equal(latents, torch.full((1, 4, 16, 16), 0.25))

    def known_from_now_on(called, step, timestep, tensors):
        return {"image_latents": torch.zeros_like(tensors["image_latents"])}

    latents = sample(
        pipe, image[:1], mask[:1], callback_on_step_end=known_from_now_on, output_type="latent",
        callback_on_step_end_tensor_inputs=["image_latents"],
    )  # fmt: skip
    assert (latents[feather_latent_mask(latent_mask(mask[:1], 4), 1).expand_as(latents) == 0] == 0).all()


class Halve(PipelineCallback):
    """A callback object, as diffusers defines them."""

    tensor_inputs = ["latents"]  # noqa: RUF012 - its base class declares a list

    def callback_fn(self, pipeline, step_index, timestep, callback_kwargs):
        callback_kwargs["latents"] = callback_kwargs["latents"] / 2
        return callback_kwargs


def test_callback_objects(pipe, image, mask):
    plain = sample(pipe, image[:1], mask[:1], num_inference_steps=1, output_type="latent")
    for callback, share in ((Halve(), 0.5), (MultiPipelineCallbacks([Halve(), Halve()]), 0.25)):
        changed = sample(
            pipe, image[:1], mask[:1], num_inference_steps=1, output_type="latent", callback_on_step_end=callback
        )
        assert torch.equal(changed, plain * share)


def test_callback_turns_guidance_off(pipe, image, mask):
    def cut(called, step, timestep, tensors):
        called._guidance_scale = 0.0

    batches = []
    hook = pipe.unet.register_forward_pre_hook(lambda module, args: batches.append(len(args[0])))
    try:
        sample(pipe, image[:2], mask[:2], callback_on_step_end=cut)
    finally:
        hook.remove()
    assert batches == [4, 2, 2]


def test_interrupt_skips_the_rest(pipe, image, mask):
    steps = []

    def stop(called, step, timestep, tensors):
        steps.append(step)
        called._interrupt = step == 1

    sample(pipe, image[:1], mask[:1], num_inference_steps=5, callback_on_step_end=stop)
    assert steps == [0, 1]
    sample(pipe, image[:1], mask[:1], num_inference_steps=5, callback_on_step_end=lambda *_: steps.append(9))
    assert steps == [0, 1, 9, 9, 9, 9, 9]  # the next call starts afresh


def test_external_report_states(pipe, image, mask):
    torch.manual_seed(1)
    encoder = ConditionEncoder(image_size=64, width=64, depth=1, pooled_dim=64, report_width=24)
    pipe = GBCIPipeline(**{**pipe.components, "conditioner": encoder.eval()})
    pipe.set_progress_bar_config(disable=True)
    states = torch.randn(2, 6, 24)
    padding = torch.tensor([[True] * 6, [True] * 2 + [False] * 4])
    both = sample(pipe, image[:2], mask[:2], report_embeds=states, report_mask=padding, output_type="latent")
    short = sample(pipe, image[1:2], mask[1:2], report_embeds=states[1:, :2], seed=1, output_type="latent")
    assert relative(both[1:], short) < 1e-5
    silent = sample(pipe, image[1:2], mask[1:2], seed=1, output_type="latent")
    assert relative(short, silent) > 1e-4
    shared = sample(pipe, image[:2], mask[:2], report_embeds=states[:1])
    assert torch.equal(shared, sample(pipe, image[:2], mask[:2], report_embeds=states[:1].repeat(2, 1, 1)))


def test_stored_pipeline_gives_the_same_bits(pipe, image, mask, tmp_path, monkeypatch):
    expected = sample(pipe, image[:1], mask[:1], report="mass")
    pipe.save_pretrained(tmp_path / "whole")
    pipe.save_pretrained(tmp_path / "shards", max_shard_size="400KB")
    assert list((tmp_path / "whole").rglob("*.bin")) == []
    assert len(list((tmp_path / "shards" / "unet").glob("*.safetensors"))) > 1
    assert json.loads((tmp_path / "whole" / "model_index.json").read_text())["conditioner"] == [
        "gbci_fast.conditioning", "ConditionEncoder",
    ]  # fmt: skip
    monkeypatch.setattr(pipeline, "PACKAGED_WEIGHTS", tmp_path / "whole")
    for path in (tmp_path / "whole", str(tmp_path / "shards"), None):
        loaded = GBCIPipeline.from_pretrained(path)
        loaded.set_progress_bar_config(disable=True)
        assert torch.equal(sample(loaded, image[:1], mask[:1], report="mass"), expected)


def test_a_subclass_loads_its_own_folder_and_the_plain_one(pipe, image, mask, tmp_path):
    class Sub(GBCIPipeline):
        pass

    expected = sample(pipe, image[:1], mask[:1])
    pipe.save_pretrained(tmp_path / "plain")
    Sub(**pipe.components).save_pretrained(tmp_path / "sub")
    for folder in ("plain", "sub"):
        loaded = Sub.from_pretrained(tmp_path / folder)
        loaded.set_progress_bar_config(disable=True)
        assert type(loaded) is Sub
        assert torch.equal(sample(loaded, image[:1], mask[:1]), expected)
    with pytest.raises(GBCIError, match=r"model_index\.json names the pipeline 'Sub'; expected 'GBCIPipeline'"):
        GBCIPipeline.from_pretrained(tmp_path / "sub")


@pytest.mark.parametrize("missing", ["scheduler", "unet", "conditioner"])
def test_parts_that_were_given_as_none_are_set_before_a_call(pipe, image, mask, tmp_path, missing):
    expected = sample(pipe, image[:1], mask[:1])
    pipe.save_pretrained(tmp_path)
    loaded = GBCIPipeline.from_pretrained(tmp_path, **{missing: None})
    loaded.set_progress_bar_config(disable=True)
    with pytest.raises(GBCIError, match=f"^the pipeline's {missing} is None; set {missing} before it is called$"):
        sample(loaded, image[:1], mask[:1])
    setattr(loaded, missing, pipe.components[missing])
    assert torch.equal(sample(loaded, image[:1], mask[:1]), expected)


@pytest.mark.parametrize("keyword", ["dtype", "torch_dtype"])
def test_half_precision(pipe, image, mask, tmp_path, keyword):
    pipe.save_pretrained(tmp_path)
    half = GBCIPipeline.from_pretrained(tmp_path, **{keyword: torch.bfloat16})
    half.set_progress_bar_config(disable=True)
    assert {module.dtype for module in (half.vae, half.unet, half.conditioner)} == {torch.bfloat16}
    image, mask = image[:2], mask[:2]
    ours = sample(half, image, mask, attributes=DESCRIPTIONS[:2], report=REPORTS[:2])
    assert ours.dtype == torch.float32
    assert torch.equal(ours[mask == 0], image[mask == 0])
    exact = sample(pipe, image, mask, attributes=DESCRIPTIONS[:2], report=REPORTS[:2])
    assert (ours - exact).abs().mean() < 0.05


def test_offload_order_names_every_module(pipe):
    named = {name for name, part in pipe.components.items() if isinstance(part, nn.Module)}
    assert set(pipe.model_cpu_offload_seq.split("->")) == named


BLOCKED = """
import sys
sys.modules["gbci_fast._C"] = sys.modules["gbci_fast.ops"] = None
import torch
from gbci_fast import GBCIPipeline
pipe = GBCIPipeline.from_pretrained(sys.argv[1])
pipe.set_progress_bar_config(disable=True)
image, mask = torch.full((1, 1, 64, 64), 0.5), torch.zeros(1, 1, 64, 64)
mask[..., 20:40, 20:40] = 1
print(repr(pipe(image, mask, num_inference_steps=2, seed=0, eta=1.0, output_type="pt").images.double().sum().item()))
assert not [name for name in sys.modules if name.startswith("gbci_fast.ops.")]
"""


def test_runs_without_extension_and_kernels(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    ran = subprocess.run([sys.executable, "-c", BLOCKED, tmp_path], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    mask = torch.zeros(1, 1, 64, 64)
    mask[..., 20:40, 20:40] = 1
    here = sample(pipe, torch.full((1, 1, 64, 64), 0.5), mask, num_inference_steps=2, eta=1.0)
    assert float(ran.stdout) == pytest.approx(here.double().sum().item(), rel=1e-6)


@pytest.fixture(scope="module")
def base():
    """The shipped shape, without storage."""
    with torch.device("meta"):
        return build_pipeline(ldm_preset("base")[0], build_vae(vae_preset("base")[0]), 224)


def test_base_preset_is_small_enough(base):
    sizes = {name: sum(p.numel() for p in getattr(base, name).parameters()) for name in ("unet", "conditioner", "vae")}
    assert sizes["unet"] <= 14e6
    assert sizes["conditioner"] <= 2.5e6
    assert sizes["vae"] <= 2.5e6
    with FlopCounterMode(display=False) as counter, torch.device("meta"):
        tokens = 14 * 14 + 8 + 32  # image, attributes, the longest report
        base.unet(torch.empty(1, 9, 56, 56), torch.tensor(0), torch.empty(1, tokens, 128), torch.empty(1, 256))
    assert 4e9 < counter.get_total_flops() <= 16e9


def test_base_preset_has_nine_channels_and_heads_of_32(base):
    assert base.unet.config.in_channels == base.unet.conv_in.weight.shape[1] == 9
    attentions = [module for module in base.unet.modules() if isinstance(module, Attention)]
    assert len(attentions) >= 10
    assert {module.inner_dim // module.heads for module in attentions} == {32}
    encoders = [module for module in base.conditioner.modules() if isinstance(module, nn.MultiheadAttention)]
    assert {module.head_dim for module in encoders} == {32}
