"""The samplers' loop: noise, guidance, callbacks, dtypes, refusals; and a comparison with the eager pipeline."""

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    LCMScheduler,
    UniPCMultistepScheduler,
)

from gbci_fast.attributes import Attributes
from gbci_fast.errors import GBCIError
from gbci_fast.fast import samplers
from gbci_fast.fast.samplers import (
    ANY,
    adds_noise,
    sample_ddim,
    sample_dpmpp_2m,
    sample_euler,
    sample_euler_ancestral,
    sample_lcm,
    sample_unipc,
    sampler_for,
    sampler_of,
    takes_eta,
)
from gbci_fast.fast.sampling import KnownRegion
from gbci_fast.model.conditioning import Conditioning
from gbci_fast.model.masks import feather_latent_mask, latent_mask
from gbci_fast.model.noise import STREAM_SCHEDULER, seed_tensor, seeded_normal
from gbci_fast.model.pipeline import GBCIPipeline
from gbci_fast.training.ldm import build_scheduler

# diffusers' own, of its schedulers under NumPy 2
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

SAMPLERS = {
    DDIMScheduler: sample_ddim,
    EulerDiscreteScheduler: sample_euler,
    EulerAncestralDiscreteScheduler: sample_euler_ancestral,
    DPMSolverMultistepScheduler: sample_dpmpp_2m,
    UniPCMultistepScheduler: sample_unipc,
    LCMScheduler: sample_lcm,
}
STOCHASTIC = [(DDIMScheduler, {"eta": 0.5}), (EulerAncestralDiscreteScheduler, {}), (LCMScheduler, {})]
SEEDS = [3, 2**64 - 1]


def scheduler_of(kind, steps=4, **config):
    """A scheduler like the packaged one's, with timesteps."""
    made = kind.from_config(build_scheduler().config, **config)
    made.set_timesteps(steps)
    return made


def halves(latents, i):
    """A denoiser that depends on the step."""
    return torch.tanh(0.5 * latents + 0.1 * i)


@pytest.fixture
def latents():
    return torch.randn(2, 4, 6, 5, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def known():
    image_latents, noise = torch.randn(2, 2, 4, 6, 5, generator=torch.Generator().manual_seed(1))
    weight = torch.zeros(2, 1, 6, 5)
    weight[..., 2:4], weight[..., 4:] = 0.4, 1
    return KnownRegion(latents=image_latents, noise=noise, weight=weight)


@pytest.mark.parametrize("kind", SAMPLERS)
def test_a_scheduler_finds_its_sampler(kind):
    assert sampler_for(scheduler_of(kind)) is SAMPLERS[kind]


def test_a_new_sampler_is_a_function_and_a_decorator(monkeypatch, latents):
    class Backwards(DDIMScheduler):
        pass

    monkeypatch.setattr(samplers, "_REGISTERED", samplers._REGISTERED.copy())

    @sampler_of(Backwards, adds_noise=True, prediction_type=("epsilon",), clip_sample=ANY)
    def sample_backwards(denoise, latents, scheduler, *, begin_index, **options):
        return denoise(latents, begin_index)

    scheduler = scheduler_of(Backwards, prediction_type="epsilon", clip_sample=True)
    assert sampler_for(scheduler) is sample_backwards
    assert adds_noise(scheduler, eta=0.0)
    assert not takes_eta(scheduler)
    assert torch.equal(sample_backwards(halves, latents, scheduler, begin_index=2), halves(latents, 2))
    with pytest.raises(GBCIError, match="Backwards has prediction_type 'sample'; expected 'epsilon'"):
        sampler_for(scheduler_of(Backwards, prediction_type="sample"))
    with pytest.raises(GBCIError, match=r"Backwards has clip_sample_range 0\.5; expected 1\.0"):
        sample_backwards(halves, latents, scheduler_of(Backwards, prediction_type="epsilon", clip_sample_range=0.5))


@pytest.mark.parametrize(("kind", "options"), STOCHASTIC)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
def test_seeds_draw_the_noise_of_the_eager_pipeline(latents, kind, options, dtype, tolerance):
    def drawn(i):
        return seeded_normal(SEEDS, (4, 6, 5), step=i, stream=STREAM_SCHEDULER, dtype=dtype)

    sample, latents = SAMPLERS[kind], latents.to(dtype)
    seeded = sample(halves, latents, scheduler_of(kind), seeds=seed_tensor(SEEDS), **options)
    given = sample(halves, latents, scheduler_of(kind), noise=drawn, **options)
    torch.testing.assert_close(seeded, given, rtol=0, atol=tolerance * given.abs().max().item())
    other = sample(halves, latents, scheduler_of(kind), seeds=seed_tensor([3, 4]), **options)
    torch.testing.assert_close(other[:1], seeded[:1], rtol=0, atol=0)
    assert (other[1:] - seeded[1:]).abs().max() > 1e-2


@pytest.mark.parametrize(("kind", "options"), STOCHASTIC)
def test_noise_is_asked_for_where_diffusers_draws_some(latents, kind, options):
    asked = []
    SAMPLERS[kind](halves, latents, scheduler_of(kind), noise=lambda i: asked.append(i) or latents, **options)
    assert asked == ([0, 1, 2] if kind is LCMScheduler else [0, 1, 2, 3])  # LCM adds none in the last step


@pytest.mark.parametrize(("kind", "options"), STOCHASTIC)
def test_a_stochastic_solver_needs_noise(latents, kind, options):
    def refused(**noise):
        with pytest.raises(GBCIError) as raised:
            SAMPLERS[kind](halves, latents, scheduler_of(kind), **noise, **options)
        return str(raised.value)

    assert refused() == f"{kind.__name__} adds noise in its steps; expected seeds or noise"
    assert refused(seeds=seed_tensor(SEEDS), noise=lambda i: latents) == (
        "seeds and noise were both given; expected one of them"
    )


@pytest.mark.parametrize("kind", SAMPLERS)
def test_what_is_passed_in_is_left_alone(latents, known, kind):
    tensors = [latents, known.latents, known.noise, known.weight]
    before = [tensor.clone() for tensor in tensors]
    result = SAMPLERS[kind](halves, latents, scheduler_of(kind), known=known, seeds=seed_tensor(SEEDS))
    assert all(torch.equal(*pair) for pair in zip(tensors, before, strict=True))
    assert torch.equal(result[..., :2], known.latents[..., :2])
    assert not torch.equal(result[..., 2:], known.latents[..., 2:])


@pytest.mark.parametrize(
    ("kind", "count"),
    [(DDIMScheduler, 0), (EulerDiscreteScheduler, 1), (DPMSolverMultistepScheduler, 1), (UniPCMultistepScheduler, 3)],
)
def test_buffers_are_allocated_once_and_read_after_they_were_written(latents, kind, count, monkeypatch):
    expected, made = SAMPLERS[kind](halves, latents, scheduler_of(kind, 9)), []

    def garbage(like, **options):
        made.append(torch.full_like(like, torch.nan, **options))
        return made[-1]

    monkeypatch.setattr(torch, "empty_like", garbage)
    assert torch.equal(SAMPLERS[kind](halves, latents, scheduler_of(kind, 9)), expected)
    assert len(made) == count


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kind", SAMPLERS)
def test_cuda_equals_the_cpu(latents, known, kind):
    def pair(x, i):
        return halves(x, i), halves(-x, i)

    results = []
    for device in ("cpu", "cuda"):
        region = KnownRegion(**{name: tensor.to(device) for name, tensor in vars(known).items()})
        options = {"known": region, "guidance_scale": 2.0, "seeds": seed_tensor(SEEDS, device)}
        options |= {"eta": 0.5} if kind is DDIMScheduler else {}
        scheduler = scheduler_of(kind, 6)
        results.append(SAMPLERS[kind](pair, latents.to(device), scheduler, **options).cpu())
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=1e-5 * results[0].abs().max().item())


def test_latents_that_need_gradients_and_channels_last(latents):
    for kind in (EulerDiscreteScheduler, UniPCMultistepScheduler):
        plain = SAMPLERS[kind](halves, latents, scheduler_of(kind))
        strided = latents.clone(memory_format=torch.channels_last).requires_grad_()
        result = SAMPLERS[kind](halves, strided, scheduler_of(kind))
        assert result.is_contiguous(memory_format=torch.channels_last)
        assert not result.requires_grad
        assert torch.equal(result, plain)


@pytest.mark.parametrize("kind", [DDIMScheduler, EulerDiscreteScheduler, UniPCMultistepScheduler])
def test_the_model_sees_scaled_latents_in_its_dtype(latents, kind):
    inputs, outputs, scheduler = [], [latents], scheduler_of(kind)

    def denoise(model_input, i):
        inputs.append(model_input.clone())
        return halves(model_input, i)

    def keep(i, latents):
        outputs.append(latents.clone())

    result = SAMPLERS[kind](denoise, latents, scheduler, model_dtype=torch.bfloat16, callback=keep)
    assert result.dtype == torch.float32
    assert torch.equal(result, outputs[-1])
    scales = (scheduler.sigmas.double() ** 2 + 1) ** -0.5 if kind is EulerDiscreteScheduler else torch.ones(5)
    for model_input, before, scale in zip(inputs, outputs, scales.tolist(), strict=False):
        assert torch.equal(model_input, (scale * before).to(torch.bfloat16))
    assert len(inputs) == 4


@pytest.mark.parametrize("kind", [DDIMScheduler, EulerDiscreteScheduler])
def test_a_callback_replaces_the_latents(latents, kind):
    """After the replacement, the trajectory continues from the new latents."""
    replacement = torch.full_like(latents, 0.25)

    def replace(i, live):
        return replacement if i == 1 else None

    def replace_in_place(i, live):
        return live.fill_(0.25) if i == 1 else None

    scheduler = scheduler_of(kind)
    rest = SAMPLERS[kind](lambda x, i: halves(x, i + 2), replacement, scheduler, begin_index=2)
    for callback in (replace, replace_in_place):
        assert torch.equal(SAMPLERS[kind](halves, latents, scheduler, callback=callback), rest)
    assert (replacement == 0.25).all()


def test_an_interrupted_trajectory_ends_before_the_next_step(latents):
    steps, kept = [], []

    def keep(i, live):
        steps.append(i)
        kept.append(live.clone())

    result = sample_ddim(
        halves, latents, scheduler_of(DDIMScheduler), callback=keep, interrupted=lambda: len(steps) == 2
    )
    assert steps == [0, 1]
    assert torch.equal(result, kept[-1])
    never = sample_ddim(halves, latents, scheduler_of(DDIMScheduler), interrupted=lambda: True)
    assert torch.equal(never, latents)


def test_guidance_and_known_region_are_read_at_every_step(latents, known):
    def pair(x, i):
        return halves(x, i), halves(-x, i)

    asked = iter((3.0, 0.0, 0.0, 0.0))
    scheduler, changed = scheduler_of(DDIMScheduler), torch.zeros_like(latents)

    def change(i, live):
        known.latents = changed

    ours = sample_ddim(pair, latents, scheduler, guidance_scale=lambda: next(asked), known=known, callback=change)
    assert next(asked, None) is None
    assert torch.equal(ours[..., :2], changed[..., :2])
    known.latents, first = torch.randn(2, 2, 4, 6, 5, generator=torch.Generator().manual_seed(1))[0], []
    sample_ddim(
        pair, latents, scheduler, guidance_scale=3.0, known=known, callback=lambda i, live: first.append(live.clone())
    )
    known.latents = changed
    rest = sample_ddim(lambda x, i: pair(x, i + 1)[1], first[0], scheduler, known=known, begin_index=1)
    assert torch.equal(ours, rest)


def test_rescaled_guidance(latents):
    """Lin et al. 2024, eq. 15 and 16."""

    def pair(x, i):
        return halves(x, i), halves(-x, i)

    def rescaled(x, i):
        conditional, unconditional = pair(x, i)
        guided = unconditional + 4 * (conditional - unconditional)
        spread = conditional.std((1, 2, 3), keepdim=True) / guided.std((1, 2, 3), keepdim=True)
        return 0.7 * spread * guided + 0.3 * guided

    scheduler = scheduler_of(UniPCMultistepScheduler)
    ours = sample_unipc(pair, latents, scheduler, guidance_scale=4.0, guidance_rescale=0.7)
    torch.testing.assert_close(ours, sample_unipc(rescaled, latents, scheduler), rtol=0, atol=2e-6)


LINSPACE = {"timestep_spacing": "linspace"}
REFUSED = [
    (DDIMScheduler, {"thresholding": True}, "thresholding True; expected False"),
    (
        DDIMScheduler,
        {"prediction_type": "flow"},
        "prediction_type 'flow'; expected 'epsilon' or 'v_prediction' or 'sample'",
    ),
    (
        EulerAncestralDiscreteScheduler,
        {"prediction_type": "sample"},
        "prediction_type 'sample'; expected 'epsilon' or 'v_prediction'",
    ),
    (DPMSolverMultistepScheduler, {"solver_order": 3}, "solver_order 3; expected 1 or 2"),
    (
        DPMSolverMultistepScheduler,
        {"algorithm_type": "sde-dpmsolver++"},
        "algorithm_type 'sde-dpmsolver++'; expected 'dpmsolver++'",
    ),
    (
        DPMSolverMultistepScheduler,
        {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"},
        "algorithm_type 'dpmsolver'; expected 'dpmsolver++'",
    ),
    (DPMSolverMultistepScheduler, {"thresholding": True}, "thresholding True; expected False"),
    (DPMSolverMultistepScheduler, {"variance_type": "learned"}, "variance_type 'learned'; expected None"),
    (DPMSolverMultistepScheduler, {"use_flow_sigmas": True}, "use_flow_sigmas True; expected False"),
    (DPMSolverMultistepScheduler, {"use_dynamic_shifting": True}, "use_dynamic_shifting True; expected False"),
    (UniPCMultistepScheduler, {"solver_order": 3}, "solver_order 3; expected 1 or 2"),
    (UniPCMultistepScheduler, {"predict_x0": False}, "predict_x0 False; expected True"),
    (UniPCMultistepScheduler, {"use_flow_sigmas": True}, "use_flow_sigmas True; expected False"),
    (UniPCMultistepScheduler, {"thresholding": True}, "thresholding True; expected False"),
    (LCMScheduler, {"thresholding": True}, "thresholding True; expected False"),
    (
        UniPCMultistepScheduler,
        {"lower_order_final": False},
        "lower_order_final False and final_sigmas_type 'zero', which makes its last step infinite; "
        "expected lower_order_final True or final_sigmas_type 'sigma_min'",
    ),
    *(
        (
            kind,
            {"prediction_type": "epsilon", "rescale_betas_zero_snr": True},
            "prediction_type 'epsilon', which tells nothing of the image where alphas_cumprod is 0; "
            "expected 'v_prediction' or 'sample'",
        )
        for kind in (DDIMScheduler, LCMScheduler)
    ),
]


@pytest.mark.filterwarnings("ignore:`algorithm_types dpmsolver and sde-dpmsolver` is deprecated:FutureWarning")
@pytest.mark.parametrize(("kind", "config", "message"), REFUSED)
def test_options_that_are_not_reproduced_are_named(latents, kind, config, message):
    with pytest.raises(GBCIError) as raised:
        SAMPLERS[kind](halves, latents, scheduler_of(kind, **config), seeds=seed_tensor(SEEDS))
    assert str(raised.value) == f"{kind.__name__} has {message}"


def test_another_solver_as_predictor_is_refused(latents):
    scheduler = scheduler_of(UniPCMultistepScheduler, solver_p=DDIMScheduler())
    with pytest.raises(GBCIError, match=r"^UniPCMultistepScheduler has solver_p DDIMScheduler .*; expected None$"):
        sample_unipc(halves, latents, scheduler)


def test_options_left_over_from_another_scheduler_do_not_matter(latents):
    config = DDIMScheduler.from_config(build_scheduler().config, thresholding=True).config
    scheduler = EulerDiscreteScheduler.from_config(config)
    assert scheduler.config.thresholding
    scheduler.set_timesteps(4)
    expected = sample_euler(halves, latents, scheduler_of(EulerDiscreteScheduler))
    assert torch.equal(sample_euler(halves, latents, scheduler), expected)


class OwnScheduler(DDIMScheduler):
    """A subclass, which might step differently."""


def test_what_cannot_be_sampled_is_named(latents):
    def refused(call, *args, **options):
        with pytest.raises(GBCIError) as raised:
            call(*args, **options)
        return str(raised.value)

    names = ", ".join(kind.__name__ for kind in SAMPLERS)
    for kind in (DDPMScheduler, OwnScheduler):
        assert refused(sampler_for, kind()) == f"scheduler is a {kind.__name__}; expected one of {names}"
    ddim, euler = scheduler_of(DDIMScheduler), scheduler_of(EulerDiscreteScheduler)
    assert refused(sample_ddim, halves, latents, euler) == (
        "scheduler is a EulerDiscreteScheduler; expected DDIMScheduler"
    )
    assert refused(sample_ddim, halves, latents, build_scheduler()) == (
        "DDIMScheduler has no timesteps; expected set_timesteps to be called first"
    )
    assert refused(sample_ddim, halves, latents, ddim, eta=1.5) == "eta is 1.5; expected 0 to 1"
    for begin in (4, -1):
        message = f"begin_index is {begin}; expected 0 to 3"
        assert refused(sample_euler, halves, latents, euler, begin_index=begin) == message
    # diffusers' trailing spacing has 62 timesteps for 61 steps, because of rounding
    assert refused(sample_ddim, halves, latents, scheduler_of(DDIMScheduler, 61)) == (
        "DDIMScheduler has timesteps from 999 to -1; expected them within 999 to 0"
    )
    assert refused(sample_dpmpp_2m, halves, latents, scheduler_of(DPMSolverMultistepScheduler, 1000, **LINSPACE)) == (
        "DPMSolverMultistepScheduler has sigma 2.632477283477783 after 2.632477283477783; "
        "expected less, as of fewer timesteps"
    )


PIPELINE_SCHEDULERS = {
    "ddim": DDIMScheduler,
    "euler": EulerDiscreteScheduler,
    "dpmpp_2m": DPMSolverMultistepScheduler,
    "unipc": UniPCMultistepScheduler,
    "lcm": LCMScheduler,
}


@pytest.fixture(scope="module")
def tiny(tiny_pipeline):
    """A pipeline of random weights for 64 x 64 pixels, and two images and masks."""
    return prepared(tiny_pipeline(shared=True), 64)


@pytest.fixture(scope="module")
def packaged():
    """The packaged checkpoint, and one image and mask."""
    return prepared(GBCIPipeline.from_pretrained(), 224, count=1)


def prepared(pipe, size, count=2):
    pipe.unet.eval()
    pipe.conditioner.eval()
    pipe.set_progress_bar_config(disable=True)
    image = torch.rand(count, 1, size, size, generator=torch.Generator().manual_seed(1))
    mask = torch.zeros(count, 1, size, size)
    mask[..., size // 4 : size // 2, size // 3 : size // 2] = 1
    return pipe, image, mask


@torch.no_grad()
def sample(pipe, image, mask, *, seeds, steps, scale, strength=1.0, eta=None, **options):
    """The latents of `GBCIPipeline.__call__`, sampled by a sampler that combines the halves of guidance itself."""
    count = len(seeds)
    masked = (image * 2 - 1) * (1 - mask)
    cells, image_latents = latent_mask(mask, pipe.vae_scale_factor), pipe.encode_image(image * 2 - 1)
    constant = torch.cat([cells, pipe.encode_image(masked)], 1).repeat(2, 1, 1, 1)
    condition = pipe.encode_condition(masked, mask, [Attributes()] * count, [None] * count)
    both = Conditioning.cat([pipe.conditioner.null(*condition.tokens.shape[:2]), condition])
    timesteps = pipe._timesteps(steps, strength, image.device)
    noise = seeded_normal(seeds, image_latents.shape[1:])
    if strength == 1.0:
        latents = noise * pipe.scheduler.init_noise_sigma
    else:
        latents = pipe.scheduler.add_noise(image_latents, noise, timesteps[:1].expand(count))

    def denoise(model_input, i):
        stacked = torch.cat([model_input.repeat(2, 1, 1, 1), constant], 1)
        output = pipe.unet(stacked, timesteps[i], both.tokens, class_labels=both.pooled).sample
        unconditional, conditional = output.chunk(2)
        return conditional, unconditional

    known = KnownRegion(latents=image_latents, noise=noise, weight=feather_latent_mask(cells, 1))
    options |= {} if eta is None else {"eta": eta}
    return sampler_for(pipe.scheduler)(
        denoise, latents, pipe.scheduler, begin_index=len(pipe.scheduler.timesteps) - len(timesteps),
        guidance_scale=scale, known=known, seeds=seed_tensor(seeds), **options,
    )  # fmt: skip


def compare(prepared, kind, seeds, steps, scale=2.5, strength=1.0, **options):
    pipe, image, mask = prepared
    pipe.scheduler = kind.from_config(build_scheduler().config)
    eager = pipe(
        image, mask, seed=seeds, num_inference_steps=steps, guidance_scale=scale, strength=strength,
        output_type="latent", **options,
    ).images  # fmt: skip
    ours = sample(pipe, image, mask, seeds=seeds, steps=steps, scale=scale, strength=strength, **options)
    # Euler's latents begin at 167 standard deviations, so both sides round at that scale.
    rounding = max(1e-5, 2 * torch.finfo(torch.float32).eps * float(pipe.scheduler.init_noise_sigma))
    assert (ours - eager).abs().max() <= rounding * eager.abs().max()


@pytest.mark.parametrize("kind", PIPELINE_SCHEDULERS.values(), ids=PIPELINE_SCHEDULERS)
def test_equals_the_eager_pipeline(tiny, kind):
    for steps, strength in ((1, 1.0), (3, 1.0), (6, 0.5), (20, 0.3)):
        compare(tiny, kind, SEEDS, steps, strength=strength)


def test_equals_the_eager_pipeline_with_eta(tiny):
    for steps in (3, 6):
        compare(tiny, DDIMScheduler, SEEDS, steps, eta=0.8)


@pytest.mark.parametrize("kind", PIPELINE_SCHEDULERS.values(), ids=PIPELINE_SCHEDULERS)
def test_equals_the_eager_pipeline_of_the_packaged_checkpoint(packaged, kind):
    compare(packaged, kind, [5], 3)
