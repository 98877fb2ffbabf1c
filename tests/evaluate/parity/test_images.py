"""The tiers' gates, on images made to lie just inside and just outside of each."""

import math

import pytest
import torch

from gbci_fast.errors import GBCIError
from gbci_fast.evaluate.metrics import PSNR_LIMIT
from gbci_fast.evaluate.parity.images import (
    RMS_FLOOR,
    Gate,
    Output,
    candidate_output,
    measure,
    narrowed,
    parity,
    reference_output,
)

SIZE, BATCH = 48, 3
MASKS = torch.zeros(BATCH, 1, SIZE, SIZE)
MASKS[:, :, 12:34, 10:30] = 1
TEMPLATES = torch.rand(BATCH, 1, SIZE, SIZE, generator=torch.Generator().manual_seed(0)) / 2
PAINTED = torch.where(MASKS > 0, TEMPLATES.flip(-1), TEMPLATES)  # the eager pipeline's images
LATENTS = torch.randn(BATCH, 4, 12, 12, generator=torch.Generator().manual_seed(1))
REFERENCE = Output(images=PAINTED, latents=LATENTS)
# Of the pixels that a gate sees, the rim around the mask has no error: 22 x 20 of these.
ROI = 22 * 20 + 4 * (22 + 20) + 4 * 1


def off_by(error: float, image: int = 1) -> Output:
    """One image whose root mean square error in the region is `error`, of alternating sign; the others are equal."""
    pattern = error * math.sqrt(ROI / (22 * 20)) * (1 - 2 * (torch.arange(SIZE) % 2)) * MASKS[image]
    images = PAINTED.double()
    images[image] += pattern
    return Output(images=images)


def judge(tier, candidate, **more):
    return parity(tier, candidate, REFERENCE, templates=TEMPLATES, masks=MASKS, **more)


def violated(found):
    return [gate.name for gate in found.violated]


def decibels(value: float) -> float:
    return 10 ** (-value / 20)


def test_the_reference_itself_is_within_every_tier():
    for tier in ("exact", "tolerance", "approximate"):
        found = judge(tier, REFERENCE, narrow=REFERENCE)
        assert found.holds
        assert found.worst.psnr == PSNR_LIMIT
        assert found.worst.rms == 0
        assert found.sentence().startswith(f"tier {tier} holds on 3 images: pixels changed outside the mask 0")


def test_distance_is_that_of_the_worst_image_in_the_grown_mask():
    found = judge("tolerance", off_by(0.01), narrow=REFERENCE)
    assert [round(one.psnr, 2) for one in found.distances] == [round(PSNR_LIMIT, 2), 40.0, round(PSNR_LIMIT, 2)]
    assert found.worst.rms == pytest.approx(0.01, rel=1e-6)
    assert found.worst.ssim == min(one.ssim for one in found.distances) < 1


@pytest.mark.parametrize(("relative", "holds"), [(0.99e-5, True), (1.01e-5, False)])
def test_exact_is_judged_by_each_image_s_latents(relative, holds):
    latents = LATENTS.double()
    latents[2, 0, 3, 3] += relative * LATENTS[2].abs().max()
    found = judge("exact", Output(images=PAINTED, latents=latents))
    assert found.holds is holds
    assert violated(found) == ([] if holds else ["latents' largest relative error"])


@pytest.mark.parametrize("tier", ["exact", "tolerance", "approximate"])
def test_one_changed_bit_outside_the_mask_is_seen(tier):
    images = PAINTED.clone()
    images[0, 0, 0, 0] = torch.nextafter(images[0, 0, 0, 0], torch.tensor(1.0))
    found = judge(tier, Output(images=images, latents=LATENTS), narrow=REFERENCE)
    assert violated(found) == ["pixels changed outside the mask"]
    assert found.violated[0].value == 1


@pytest.mark.parametrize(("psnr", "missed"), [(39.1, []), (38.9, ["RoI PSNR"])])
def test_tolerance_allows_one_decibel_below_eager_s_own(psnr, missed):
    narrow = off_by(decibels(40), image=0)  # 40 - 1 < 40: the bound is 39
    assert violated(judge("tolerance", off_by(decibels(psnr)), narrow=narrow)) == missed


@pytest.mark.parametrize(("psnr", "missed"), [(40.05, []), (39.95, ["RoI PSNR"])])
def test_tolerance_asks_for_no_more_than_40_decibels(psnr, missed):
    narrow = off_by(decibels(42))  # its RMS error times 1.5 is 38.5 dB
    assert violated(judge("tolerance", off_by(decibels(psnr)), narrow=narrow)) == missed


@pytest.mark.parametrize(("factor", "missed"), [(1.49, []), (1.51, ["RoI RMS error"])])
def test_tolerance_allows_half_again_eager_s_own_error(factor, missed):
    own = decibels(60)
    assert violated(judge("tolerance", off_by(factor * own), narrow=off_by(own))) == missed


@pytest.mark.parametrize(("factor", "missed"), [(0.99, []), (1.01, ["RoI RMS error"])])
def test_in_float32_tolerance_allows_one_step_of_16_bits(factor, missed):
    assert violated(judge("tolerance", off_by(factor * RMS_FLOOR), narrow=REFERENCE)) == missed


def faded(keep: float) -> Output:
    """One image whose contrast under the mask is `keep` of what it was: structure is lost at a small error."""
    flat = PAINTED.clone()
    flat[1] = torch.where(MASKS[1] > 0, 0.25 + keep * (PAINTED[1] - 0.25), PAINTED[1])
    return Output(images=flat)


def with_ssim(target: float) -> Output:
    """An image of this SSIM in the region, found by bisection of its contrast."""
    low, high = 0.0, 1.0
    for _ in range(16):
        keep = (low + high) / 2
        ssim = measure(faded(keep).images[1:2], PAINTED[1:2], MASKS[1:2] > 0)[0].ssim
        low, high = (keep, high) if ssim < target else (low, keep)
    return faded(high)


@pytest.mark.parametrize(("margin", "missed"), [(1e-4, False), (-1e-4, True)])
def test_ssim_of_both_tiers(margin, missed):
    own = with_ssim(0.98)
    found = judge("tolerance", with_ssim(0.975 + margin), narrow=own)  # 0.98 - 0.005
    assert ("RoI SSIM" in violated(found)) is missed
    found = judge("tolerance", with_ssim(0.99 + margin), narrow=with_ssim(0.999))
    assert ("RoI SSIM" in violated(found)) is missed
    found = judge("approximate", with_ssim(0.9 + margin))
    assert ("RoI SSIM" in violated(found)) is missed


@pytest.mark.parametrize(("psnr", "missed"), [(30.1, False), (29.9, True)])
def test_approximate_asks_for_30_decibels(psnr, missed):
    assert ("RoI PSNR" in violated(judge("approximate", off_by(decibels(psnr))))) is missed


@pytest.mark.parametrize("tier", ["exact", "tolerance", "approximate"])
def test_nan_passes_nowhere(tier):
    images, latents = PAINTED.clone(), LATENTS.clone()
    images[1, 0, 20, 20] = latents[1, 0, 0, 0] = math.nan
    found = judge(tier, Output(images=images, latents=latents), narrow=REFERENCE)
    assert len(found.violated) == len(found.gates) - 1  # all but the pixels outside


def test_one_template_and_mask_serve_all_images():
    one, mask = TEMPLATES[:1], MASKS[:1]
    painted = one.expand(BATCH, -1, -1, -1).clone()
    found = parity("approximate", Output(images=painted), Output(images=painted), templates=one, masks=mask)
    assert found.holds
    assert len(found.distances) == BATCH


def test_the_sentence_names_what_is_missed_alone():
    sentence = judge("approximate", off_by(decibels(20))).sentence()
    assert sentence.startswith("tier approximate is violated on 3 images: RoI PSNR 20 (at least 30)")
    assert "outside" not in sentence
    assert str(Gate(name="RoI RMS error", value=0.5, bound=0.25, at_least=False)) == "RoI RMS error 0.5 (at most 0.25)"


@pytest.mark.parametrize(
    ("tier", "sentence"),
    [
        ("exact", "tier 'exact' is judged by latents; expected those of candidate and reference"),
        ("tolerance", "tier 'tolerance' is judged by the eager pipeline's own rounding; expected narrow"),
        ("best", "tier is 'best'; expected exact, tolerance or approximate"),
    ],
)
def test_what_is_missing_is_named(tier, sentence):
    with pytest.raises(GBCIError, match=sentence):
        judge(tier, Output(images=PAINTED))


def test_outputs_of_a_pipeline(tiny_pipeline):
    pipe = tiny_pipeline(shared=True)
    call = {
        "image": torch.rand(2, 1, 64, 64), "mask_image": torch.ones(1, 1, 64, 64), "num_inference_steps": 2,
        "seed": [1, 2],
    }  # fmt: skip
    reference = reference_output(pipe, **call)
    again = candidate_output(pipe, latents=True, **call)
    assert torch.equal(reference.images, again.images)
    assert torch.equal(reference.latents, again.latents)
    assert candidate_output(pipe, **call).latents is None
    narrow = narrowed(pipe, torch.bfloat16)
    assert (narrow.unet.dtype, narrow.vae.dtype, pipe.unet.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)
    assert not torch.equal(candidate_output(narrow, **call).images, reference.images)


def test_latents_need_noise_that_can_be_drawn_again():
    with pytest.raises(GBCIError, match="a generator was given; expected seed"):
        candidate_output(None, latents=True, generator=torch.Generator())
