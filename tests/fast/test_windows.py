"""Windowed denoising: windows that hold all changing cells, the noise of the whole run, untouched surroundings."""

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    LCMScheduler,
    UniPCMultistepScheduler,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from gbci_fast.fast import pipeline as fast_pipeline
from gbci_fast.fast import windows
from gbci_fast.fast.accelerate import accelerate
from gbci_fast.model.masks import feather_latent_mask
from gbci_fast.model.noise import STREAM_SCHEDULER, seeded_normal
from gbci_fast.model.pipeline import LATENT_FEATHER

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers' own
DRAWS = [  # a scheduler that adds noise (DDIM with eta), and who draws it
    (DDIMScheduler, "seed"), (LCMScheduler, "seed"), (EulerAncestralDiscreteScheduler, "generator"),
]  # fmt: skip
SIZE = 96  # pixels; 24 latent cells of 4 pixels
CELLS = SIZE // 4


@pytest.fixture(autouse=True)
def narrow_halo(monkeypatch):
    """A narrow halo, so that small latents hold windows of several sizes."""
    monkeypatch.setattr(windows, "HALO", 2)


@pytest.fixture
def pipe(tiny_pipeline):
    return tiny_pipeline(SIZE, shared=True)


@pytest.fixture
def fast(pipe):
    return accelerate(pipe, tier="approximate", dtype=torch.float32)


@pytest.fixture(scope="module")
def image():
    return torch.rand(3, 1, SIZE, SIZE, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def mask():
    """A small lesion in the middle, one at the border, and a large one."""
    masks = torch.zeros(3, 1, SIZE, SIZE)
    masks[0, :, 49:51, 42:44] = 1
    masks[1, :, 70:72, 93:] = 1
    masks[2, :, 30:60, 35:65] = 1
    return masks


def sample(pipe, image, mask, **options):
    options = {"num_inference_steps": 3, "output_type": "latent"} | options
    if "generator" not in options:
        options.setdefault("seed", [5, 2**63, 7][: len(image)])
    return pipe(image, mask, **options).images


def relative(ours, reference):
    return ((ours - reference).abs().max() / reference.abs().max()).item()


def rectangles(height, width):
    """Latent masks [B, 1, h, w] with a rectangle each, or none."""

    def sides(extent):
        return st.tuples(st.integers(0, extent), st.integers(0, extent)).map(sorted)

    def made(boxes):
        masks = torch.zeros(len(boxes), 1, height, width)
        for one, ((y0, y1), (x0, x1)) in zip(masks, boxes, strict=True):
            one[:, y0:y1, x0:x1] = 1
        return masks

    return st.lists(st.tuples(sides(height), sides(width)), min_size=1, max_size=4).map(made)


@given(
    masks=st.sampled_from([(8, 8), (56, 56), (16, 56), (32, 12), (64, 64)]).flatmap(lambda size: rectangles(*size)),
    halo=st.integers(0, 6),
    stride=st.sampled_from([1, 2, 4]),
    together=st.booleans(),
)
@settings(max_examples=150, deadline=None)
def test_windows_hold_the_weight_and_its_halo(masks, halo, stride, together):
    groups = windows.choose(masks, halo, stride, together=together)
    height, width = masks.shape[2:]
    assert sorted(row for group in groups for row in group.rows) == list(range(len(masks)))
    assert len({(group.height, group.width) for group in groups}) == len(groups) <= (1 if together else len(masks))
    weights = feather_latent_mask(masks, LATENT_FEATHER)
    for group in groups:
        side = max(group.height, group.width)
        assert (side in windows.SIDES and side % stride == 0) or side == max(height, width)
        assert (group.height, group.width) == (min(side, height), min(side, width))
        for row, (top, left) in zip(group.rows, group.corners, strict=True):
            assert 0 <= top <= height - group.height
            assert 0 <= left <= width - group.width
            if weights[row].any():
                ys, xs = weights[row, 0].nonzero().T
                assert top <= max(int(ys.min()) - halo, 0)
                assert left <= max(int(xs.min()) - halo, 0)
                assert top + group.height >= min(int(ys.max()) + 1 + halo, height)
                assert left + group.width >= min(int(xs.max()) + 1 + halo, width)


def test_a_window_is_no_larger_than_it_must_be():
    masks = torch.zeros(4, 1, 56, 56)
    masks[0, :, 20:22, 24:28] = 1  # with feather 2 and halo 2: 16 to 26 by 20 to 32
    masks[1, :, 3:50, 5:6] = 1
    masks[2, :, 53:, 0:1] = 1  # 49 to 56 by 0 to 5
    small, medium, large = windows.choose(masks, 2, 4)
    assert (small.rows, small.corners, small.height, small.width) == ([2, 3], [(48, 0), (0, 0)], 8, 8)
    assert (medium.rows, medium.corners, medium.height, medium.width) == ([0], [(15, 20)], 12, 12)
    assert (large.rows, large.corners, large.height, large.width) == ([1], [(0, 0)], 56, 56)


def test_cropping_and_pasting_are_inverse():
    batch = torch.arange(1, 1 + 2 * 3 * 16 * 24.0).view(2, 3, 16, 24)
    group = windows.Group(rows=[1, 0], corners=[(2, 3), (1, 7)], height=4, width=5)
    cut = group.crop(batch)
    assert torch.equal(cut[0], batch[1, :, 2:6, 3:8])
    assert torch.equal(cut[1], batch[0, :, 1:5, 7:12])
    pasted = group.paste(cut, torch.zeros_like(batch))
    assert torch.equal(group.crop(pasted), cut)
    assert pasted.count_nonzero() == cut.count_nonzero()


@pytest.mark.parametrize(
    ("scheduler", "options"),
    [
        (DDIMScheduler, {"eta": 0.7}),
        (LCMScheduler, {}),
        (UniPCMultistepScheduler, {}),
        (EulerAncestralDiscreteScheduler, {"generator": 3}),
    ],
)
def test_a_mask_of_everything_gives_the_bits_of_tier_tolerance(pipe, image, scheduler, options):
    pipe.scheduler = scheduler.from_config(pipe.scheduler.config)
    images = []
    for tier in ("approximate", "tolerance"):
        given = {name: torch.Generator().manual_seed(v) if name == "generator" else v for name, v in options.items()}
        fast = accelerate(pipe, tier=tier, dtype=torch.float32)
        images.append(sample(fast, image[:2], torch.ones_like(image[:2]), output_type="pt", **given))
    assert torch.equal(*images)


@pytest.mark.parametrize(("scheduler", "drawn_by"), DRAWS)
def test_the_noise_of_a_window_is_that_of_the_whole_run(fast, image, mask, scheduler, drawn_by, monkeypatch):
    fast.scheduler = scheduler.from_config(fast.scheduler.config)
    drawn = {}

    def split(run, stride):
        parts = split_(run, stride)
        for part in parts:
            assert torch.equal(part.noise, part.group.crop(run.noise))
            part.draw = lambda step, part=part, draw=part.draw: drawn.setdefault((step, *part.group.rows), draw(step))
        split.groups = [part.group for part in parts]
        return parts

    split_ = windows.split
    monkeypatch.setattr(windows, "split", split)
    shape = (3, 4, CELLS, CELLS)
    if drawn_by == "seed":
        sample(fast, image, mask, eta=0.7)
        expected = [seeded_normal([5, 2**63, 7], shape[1:], step=i, stream=STREAM_SCHEDULER) for i in range(3)]
    else:
        sample(fast, image, mask, eta=0.7, generator=torch.Generator().manual_seed(3))
        torch_noise = torch.Generator().manual_seed(3)
        expected = [torch.randn(shape, generator=torch_noise) for _ in range(4)][1:]  # the first is the initial noise
    assert len(split.groups) == 2
    steps = {step for step, *_ in drawn}
    assert steps >= {0, 1}
    for step in steps:
        for group in split.groups:
            torch.testing.assert_close(drawn[step, *group.rows], group.crop(expected[step]), rtol=1e-6, atol=0)


@pytest.mark.parametrize(("given", "options"), [(False, {"eta": 1.0}), (True, {"strength": 0.7})], ids=str)
def test_a_batch_of_several_sizes_equals_its_samples_alone(fast, image, mask, given, options):
    noise = torch.randn(3, 4, CELLS, CELLS, generator=torch.Generator().manual_seed(2)) if given else None
    together = sample(fast, image, mask, latents=noise, **options)
    for i, seed in enumerate([5, 2**63, 7]):
        own = None if noise is None else noise[i : i + 1]
        alone = sample(fast, image[i : i + 1], mask[i : i + 1], seed=seed, latents=own, **options)
        assert relative(together[i : i + 1], alone) < 1e-5


def test_permuting_the_batch_permutes_the_output(fast, image, mask):
    order = [2, 0, 1]
    ours = sample(fast, image[order], mask[order], seed=[7, 5, 2**63], output_type="pt")
    assert relative(ours, sample(fast, image, mask, output_type="pt")[order]) < 1e-5


def test_what_is_known_stays_as_it_is(fast, pipe, image, mask):
    out = sample(fast, image, mask, output_type="pt")
    assert torch.equal(out[mask == 0], image[mask == 0])
    for i in range(3):
        assert (out - image)[i][mask[i] > 0].abs().max() > 1e-3
    latents, whole = sample(fast, image, mask), sample(pipe, image, mask)
    weight = feather_latent_mask(torch.nn.functional.max_pool2d(mask, 4), LATENT_FEATHER).expand_as(latents)
    torch.testing.assert_close(latents[weight == 0], whole[weight == 0], rtol=1e-5, atol=1e-5)
    assert relative(latents, whole) > 1e-5  # a window is not the whole


@pytest.mark.parametrize("tier", ["exact", "tolerance"])
def test_no_other_tier_windows(pipe, image, mask, tier, monkeypatch):
    monkeypatch.setattr(windows, "choose", lambda *_, **__: pytest.fail("it chose windows"))
    fast = accelerate(pipe, tier=tier)
    sample(fast, image, mask, output_type="pt")
    assert "windowed" not in fast.describe()


def test_the_decision_says_so(fast, pipe):
    assert fast.describe().splitlines() == ["runtime fused, tier approximate, float32", windows.NOTE]
    assert "no mask to put a window around" in accelerate(pipe.unet, tier="approximate").describe()


def test_without_a_known_region_all_is_sampled(fast, pipe, image, mask):
    tolerance = accelerate(pipe, dtype=torch.float32)
    ours, reference = (sample(p, image, mask, known_region=False) for p in (fast, tolerance))
    assert torch.equal(ours, reference)


@pytest.mark.parametrize("scheduler", [DDIMScheduler, EulerDiscreteScheduler, UniPCMultistepScheduler])
def test_a_callback_gets_and_changes_whole_latents(pipe, image, mask, scheduler):
    pipe.scheduler = scheduler.from_config(pipe.scheduler.config)
    fast = accelerate(pipe, tier="approximate", dtype=torch.float32)

    def run(pipe):
        kept = []

        def callback(pipe, step, timestep, tensors):
            kept.append(tensors)
            return {"image_latents": tensors["image_latents"] + 0.1, "latents": tensors["latents"] * 1.1}

        names = ("latents", "noise", "image_latents")
        last = sample(pipe, image, mask, callback_on_step_end=callback, callback_on_step_end_tensor_inputs=names)
        return kept, last

    (ours, last), (reference, last_reference) = run(fast), run(pipe)
    assert len(ours) == len(reference) == 3
    known = feather_latent_mask(torch.nn.functional.max_pool2d(mask, 4), LATENT_FEATHER) == 0
    for a, b in zip(ours, reference, strict=True):
        for name in b:
            assert a[name].shape == b[name].shape
        assert relative(a["latents"] * known, b["latents"] * known) < 1e-5
        assert relative(a["image_latents"], b["image_latents"]) < 1e-5
    # The callback's change of the last latents is visible in the windows.
    assert relative(last, last_reference) < 1


@pytest.mark.parametrize(("options", "recordings"), [({}, 2), ({"eta": 1.0}, 0)], ids=str)
def test_each_size_of_window_is_recorded_once(fast, image, mask, options, recordings, recorder, monkeypatch):
    expected = sample(fast, image, mask, **options)
    monkeypatch.setattr(fast_pipeline, "_recorder", lambda *_: recorder)
    recording = accelerate(fast.eager, tier="approximate", dtype=torch.float32)
    for _ in range(2):
        assert relative(sample(recording, image, mask, **options), expected) < 1e-5
    assert recorder.recorded == recordings  # noise that is drawn beforehand is not recorded


def test_an_interrupt_ends_it(fast, image, mask):
    def stop(pipe, step, timestep, tensors):
        steps.append(step)
        pipe._interrupt = step == 1
        return tensors

    steps = []
    sample(fast, image, mask, callback_on_step_end=stop)
    assert steps == [0, 1]


def test_the_progress_bar_counts_the_steps_of_all_windows(fast, image, mask, capsys):
    fast.set_progress_bar_config(disable=False)
    sample(fast, image, mask)
    assert "6/6" in capsys.readouterr().err  # 3 steps of 2 sizes
