"""The eager pipeline: sampling, noise, conditioning. Its inputs are in test_pipeline_inputs.py."""

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    EulerDiscreteScheduler,
    LCMScheduler,
    UniPCMultistepScheduler,
)

from gbci_fast.model.arguments import as_attributes
from gbci_fast.model.conditioning import ConditionEncoder
from gbci_fast.model.masks import feather_latent_mask, latent_mask
from gbci_fast.model.noise import seeded_normal
from gbci_fast.model.pipeline import GBCIPipeline

# diffusers' own, of its schedulers under NumPy 2 and of the older spelling of `dtype`
pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:__array_wrap__ must accept:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:`torch_dtype` is deprecated:FutureWarning"),
]
DESCRIPTIONS = (
    {"view_position": "CC", "finding_categories": ["Mass"], "finding_birads": 5, "age": 61.0},
    {"laterality": "R", "breast_density": "D", "finding_categories": []},
    None,
    {"finding_categories": ["Suspicious Calcification", "Asymmetry"], "pixel_spacing": 0.35},
)
REPORTS = ("irregular spiculated mass of 12 mm in the upper outer quadrant", None, "calcifications", "a b c d")


def relative(ours, reference):
    return ((ours - reference).abs().max() / reference.abs().max()).item()


def use(pipe, scheduler):
    pipe.scheduler = scheduler.from_config(pipe.scheduler.config)


@pytest.mark.parametrize(
    ("scheduler", "eta"),
    [(DDIMScheduler, 1.0), (EulerDiscreteScheduler, 0.0), (UniPCMultistepScheduler, 0.0), (LCMScheduler, 0.0)],
)
def test_batch_of_four_equals_four_of_one(pipe, paint, image, mask, scheduler, eta):
    use(pipe, scheduler)
    options = {"seed": [9, 2**63, 1, 4], "eta": eta, "output_type": "latent"}
    together = paint(pipe, image, mask, attributes=DESCRIPTIONS, report=REPORTS, **options)
    for i, seed in enumerate(options["seed"]):
        alone = {**options, "seed": [seed], "attributes": DESCRIPTIONS[i], "report": REPORTS[i]}
        assert relative(together[i : i + 1], paint(pipe, image[i : i + 1], mask[i : i + 1], **alone)) < 1e-5


def test_eta_adds_noise_to_ddim(pipe, paint, image, mask):
    calm, noisy, again = (paint(pipe, image[:1], mask[:1], eta=eta) for eta in (0.0, 0.8, 0.8))
    assert torch.equal(noisy, again)
    assert (calm - noisy).abs().max() > 1e-3


@pytest.mark.parametrize("eta", [0.0, 0.7])
@torch.no_grad()
def test_ddim_equals_its_equations(pipe, paint, image, mask, eta):
    """DDIM (Song et al. 2021, eq. 12 and 16) in float64, guidance in two forwards, a null context of one token."""
    seeds, steps, scale = [3, 4], 4, 2.5
    image, mask = image[:2], mask[:2]
    ours = paint(
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


def test_descriptions_and_reports_reach_the_image(pipe, paint, image, mask):
    def latents(**options):
        return paint(pipe, image[:1], mask[:1], output_type="latent", **options)

    plain = latents()
    assert relative(latents(attributes={"finding_categories": ["Mass"]}), plain) > 1e-4
    assert relative(latents(report="irregular mass"), plain) > 1e-4


def test_guidance_of_at_most_one_runs_one_half(pipe, paint, image, mask):
    batches = []
    hook = pipe.unet.register_forward_pre_hook(lambda module, args: batches.append(len(args[0])))
    try:
        for scale in (0.0, 1.0, 1.5):
            paint(pipe, image[:2], mask[:2], guidance_scale=scale, num_inference_steps=1)
    finally:
        hook.remove()
    assert batches == [2, 2, 4]


def test_torch_generators(pipe, paint, image, mask):
    def draw(generator, count=2, **options):
        return paint(pipe, image[:count], mask[:count], seed=None, generator=generator, output_type="latent", **options)

    def make(seed):
        return torch.Generator().manual_seed(seed)

    assert torch.equal(draw(make(3)), draw(make(3)))
    assert not torch.equal(draw(make(3)), draw(make(4)))
    # drawn as diffusers draws: one randn of the latents' shape
    latents = torch.randn(2, 4, 16, 16, generator=make(3))
    assert torch.equal(
        draw(make(3)), paint(pipe, image[:2], mask[:2], seed=None, latents=latents, output_type="latent")
    )
    each = draw([make(7), make(8)], eta=0.5)
    assert torch.equal(each, draw([make(7), make(8)], eta=0.5))
    assert relative(each[:1], draw([make(7)], count=1, eta=0.5)) < 1e-5


def test_one_seed_counts_up(pipe, paint, image, mask):
    listed = paint(pipe, image[:2], mask[:2], seed=[40, 41])
    assert torch.equal(paint(pipe, image[:2], mask[:2], seed=40), listed)


def test_variants_lie_next_to_each_other(pipe, paint, image, mask):
    described = {"attributes": list(DESCRIPTIONS[:2]), "report": list(REPORTS[:2]), "output_type": "latent"}
    variants = paint(pipe, image[:2], mask[:2], num_images_per_prompt=2, seed=[1, 2, 3, 4], **described)
    assert variants.shape == (4, 4, 16, 16)
    for i in range(4):
        k = i // 2
        alone = paint(
            pipe, image[k : k + 1], mask[k : k + 1], seed=i + 1, output_type="latent",
            attributes=DESCRIPTIONS[k], report=REPORTS[k],
        )  # fmt: skip
        assert relative(variants[i : i + 1], alone) < 1e-5


def test_one_image_serves_several_masks(pipe, paint, image, mask):
    together = paint(pipe, image[:1], mask[:3], seed=[1, 2, 3], attributes=DESCRIPTIONS[0], report=REPORTS[0])
    repeated = paint(
        pipe, image[:1].repeat(3, 1, 1, 1), mask[:3], seed=[1, 2, 3],
        attributes=[DESCRIPTIONS[0]] * 3, report=[REPORTS[0]] * 3,
    )  # fmt: skip
    assert torch.equal(together, repeated)
    assert not torch.equal(together[0], together[1])


def test_less_strength_keeps_more_of_the_original(pipe, paint, image, mask):
    original = pipe.encode_image(image[:1] * 2 - 1)
    cells = latent_mask(mask[:1], 4) > 0
    distances, steps = [], []
    for strength in (0.1, 0.3, 0.6, 1.0):
        latents = paint(pipe, image[:1], mask[:1], strength=strength, num_inference_steps=10, output_type="latent")
        distances.append(((latents - original) * cells).square().mean().item())
        steps.append(pipe.num_timesteps)
    assert distances == sorted(distances)
    assert distances[0] < 0.25 * distances[-1]
    assert steps == [1, 3, 6, 10]


def test_known_region_ends_as_the_original(pipe, paint, image, mask):
    original = pipe.encode_image(image[:1] * 2 - 1)
    outside = (feather_latent_mask(latent_mask(mask[:1], 4), 1) == 0).expand_as(original)
    kept = paint(pipe, image[:1], mask[:1], output_type="latent")
    assert torch.equal(kept[outside], original[outside])
    free = paint(pipe, image[:1], mask[:1], output_type="latent", known_region=False)
    assert (free[outside] - original[outside]).abs().mean() > 0.01


def test_given_latents_are_the_noise(pipe, paint, image, mask):
    noise = seeded_normal([6], (4, 16, 16))
    assert torch.equal(paint(pipe, image[:1], mask[:1], latents=noise), paint(pipe, image[:1], mask[:1], seed=6))


def test_external_report_states(pipe, paint, image, mask):
    torch.manual_seed(1)
    encoder = ConditionEncoder(image_size=64, width=64, depth=1, pooled_dim=64, report_width=24)
    pipe = GBCIPipeline(**{**pipe.components, "conditioner": encoder.eval()})
    pipe.set_progress_bar_config(disable=True)
    states = torch.randn(2, 6, 24)
    padding = torch.tensor([[True] * 6, [True] * 2 + [False] * 4])
    both = paint(pipe, image[:2], mask[:2], report_embeds=states, report_mask=padding, output_type="latent")
    short = paint(pipe, image[1:2], mask[1:2], report_embeds=states[1:, :2], seed=1, output_type="latent")
    assert relative(both[1:], short) < 1e-5
    silent = paint(pipe, image[1:2], mask[1:2], seed=1, output_type="latent")
    assert relative(short, silent) > 1e-4
    shared = paint(pipe, image[:2], mask[:2], report_embeds=states[:1])
    assert torch.equal(shared, paint(pipe, image[:2], mask[:2], report_embeds=states[:1].repeat(2, 1, 1)))
