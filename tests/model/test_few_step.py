"""The few-step student: checkpoints carry it; only `few_step_pipeline` and tier "approximate" use it."""

import copy
import pickle

import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler

from gbci_fast.choices import GUIDANCE_SCALE
from gbci_fast.errors import GBCIError
from gbci_fast.fast.accelerate import accelerate
from gbci_fast.model.few_step import FewStepLoRA
from gbci_fast.model.pipeline import GBCIPipeline

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers' own
GUIDANCE = 2.5


@pytest.fixture(scope="module")
def image():
    return torch.rand(2, 1, 64, 64, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def mask():
    masks = torch.zeros(2, 1, 64, 64)
    masks[:, :, 24:36, 20:33] = 1
    return masks


@pytest.fixture(scope="module")
def plain(tiny_pipeline):
    return tiny_pipeline(shared=True)


@pytest.fixture(scope="module")
def change(plain):
    generator = torch.Generator().manual_seed(2)
    tensors = {}
    for name in ("conv_in", "mid_block.resnets.0.conv1", "mid_block.attentions.0.transformer_blocks.0.attn2.to_q"):
        weight = plain.unet.get_submodule(name).weight
        tensors[f"{name}.up"] = 0.3 * torch.randn(len(weight), 2, generator=generator)
        tensors[f"{name}.down"] = 0.3 * torch.randn(2, weight[0].numel(), generator=generator)
    return FewStepLoRA.of(tensors, guidance_scale=GUIDANCE, steps=4)


@pytest.fixture
def pipe(plain, change):
    made = GBCIPipeline(**{**plain.components, "few_step": change})
    made.set_progress_bar_config(disable=True)
    return made


def sample(pipe, image, mask, **options):
    given = {"num_inference_steps": 4, "guidance_scale": GUIDANCE, "seed": [5, 6], "output_type": "latent"}
    return pipe(image, mask, **(given | options)).images


def relative(ours, reference):
    return ((ours - reference).abs().max() / reference.abs().max()).item()


class TestComponent:
    def test_weights_gain_the_product(self, plain, change):
        before, after = plain.unet.state_dict(), change.apply_to(plain.unet).state_dict()
        changed = {name for name in before if not torch.equal(before[name], after[name])}
        assert changed == {f"{name}.weight" for name in change.config.layers}
        part = change.get_submodule("conv_in")
        product = torch.einsum("or,ri->oi", part.up, part.down).view_as(before["conv_in.weight"])
        torch.testing.assert_close(after["conv_in.weight"], before["conv_in.weight"] + product)

    def test_a_checkpoint_keeps_it(self, pipe, change, tmp_path):
        pipe.save_pretrained(tmp_path)
        loaded = GBCIPipeline.from_pretrained(tmp_path).few_step
        assert loaded.config.guidance_scale == GUIDANCE
        assert {name: part.tolist() for name, part in loaded.state_dict().items()} == {
            name: part.tolist() for name, part in change.state_dict().items()
        }
        loaded.apply_to(pipe.unet)

    def test_a_checkpoint_needs_none(self, plain, tmp_path):
        plain.save_pretrained(tmp_path)
        assert GBCIPipeline.from_pretrained(tmp_path).few_step is None
        with pytest.raises(GBCIError, match="has no few_step component"):
            plain.few_step_pipeline()

    def test_the_eager_pipeline_does_not_use_it(self, plain, pipe, image, mask):
        assert torch.equal(sample(pipe, image, mask), sample(plain, image, mask))

    @pytest.mark.parametrize(
        ("layer", "sentence"),
        [
            ("conv_up", "the few-step weights change conv_up, which this UNet lacks"),
            ("conv_in", r"the few-step weights change conv_in as 7 x 9; it is \[32, 9, 3, 3\] in this UNet"),
        ],
    )
    def test_of_another_unet(self, plain, layer, sentence):
        tensors = {f"{layer}.up": torch.zeros(7, 1), f"{layer}.down": torch.zeros(1, 9)}
        with pytest.raises(GBCIError, match=sentence):
            FewStepLoRA.of(tensors, guidance_scale=3.0, steps=4).apply_to(plain.unet)

    def test_it_is_made_in_full_precision_under_autocast(self, plain, change):
        with torch.autocast("cpu", torch.bfloat16):
            ours = change.apply_to(plain.unet).state_dict()
        expected = change.apply_to(plain.unet).state_dict()
        assert all(torch.equal(ours[name], expected[name]) for name in expected)


class TestAccelerated:
    @pytest.mark.parametrize("runtime", ["eager", "fused"])
    def test_few_steps_are_the_students(self, pipe, image, mask, runtime):
        fast = accelerate(pipe, runtime, "approximate", torch.float32)
        student = pipe.few_step_pipeline()
        assert isinstance(student.scheduler, DDIMScheduler)
        student.set_progress_bar_config(disable=True)
        # Windowed like any other call of the tier, also in the student's own fast pipeline.
        expected = sample(accelerate(student, runtime, "approximate", torch.float32), image, mask, guidance_scale=1.0)
        assert relative(sample(fast, image, mask), expected) < 1e-5
        whole = sample(student, image, mask, guidance_scale=1.0, known_region=False)
        assert relative(sample(fast, image, mask, known_region=False), whole) < 1e-5

    @pytest.mark.parametrize("other", [{"num_inference_steps": 5}, {"guidance_scale": 3.0}, {"eta": 0.5}])
    def test_other_calls_are_the_teachers(self, pipe, plain, image, mask, other):
        ours = sample(accelerate(pipe, "fused", "approximate", torch.float32), image, mask, **other)
        assert torch.equal(ours, sample(accelerate(plain, "fused", "approximate", torch.float32), image, mask, **other))

    @pytest.mark.parametrize("options", [{"tier": "tolerance"}, {"tier": "approximate", "few_step": False}])
    def test_only_where_the_tier_and_the_caller_allow_it(self, pipe, plain, image, mask, options):
        fast = accelerate(pipe, "fused", dtype=torch.float32, **options)
        teacher = accelerate(plain, "fused", dtype=torch.float32, tier=options["tier"])
        assert "few-step" not in fast.describe()
        assert torch.equal(sample(fast, image, mask), sample(teacher, image, mask))

    def test_it_says_so(self, pipe):
        described = accelerate(pipe, tier="approximate").describe()
        assert "few-step weights: up to 4 steps at guidance 2.5 and eta 0" in described

    def test_it_tells_which_scheduler_samples(self, pipe):
        pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config)
        fast = accelerate(pipe, tier="approximate")
        assert isinstance(fast.scheduler_for(4, GUIDANCE), DDIMScheduler)
        assert fast.scheduler_for(5, GUIDANCE) is fast.scheduler
        assert [fast.uses_few_step(steps, GUIDANCE) for steps in (4, 5)] == [True, False]
        assert accelerate(pipe).scheduler_for(4, GUIDANCE).config == pipe.scheduler.config

    def test_the_packaged_one_takes_calls_with_the_default_guidance(self):
        fast = accelerate(GBCIPipeline.from_pretrained(), tier="approximate")
        assert [fast.uses_few_step(steps, GUIDANCE_SCALE) for steps in (4, 5)] == [True, False]

    def test_the_eager_one_is_untouched_and_saved(self, pipe, change, image, mask, tmp_path):
        kept = copy.deepcopy(pipe.unet.state_dict())
        fast = accelerate(pipe, tier="approximate")
        sample(fast, image, mask)
        assert all(torch.equal(value, kept[name]) for name, value in pipe.unet.state_dict().items())
        fast.save_pretrained(tmp_path)
        assert set(GBCIPipeline.from_pretrained(tmp_path).few_step.state_dict()) == set(change.state_dict())

    def test_moved_and_copied(self, pipe, image, mask):
        fast = accelerate(pipe, "fused", "approximate", torch.float32)
        expected = sample(fast, image, mask)
        for other in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
            assert torch.equal(sample(other, image, mask), expected)
        fast.to(torch.bfloat16)
        assert pipe.few_step.dtype == torch.float32
        assert 0 < relative(sample(fast, image, mask), expected) < 0.1

    def test_a_callback_may_stop_it(self, pipe, image, mask):
        seen = []

        def stop(student, step, timestep, tensors):
            seen.append(step)
            student._interrupt = True

        sample(accelerate(pipe, tier="approximate"), image, mask, callback_on_step_end=stop)
        assert seen == [0]

    def test_wrong_arguments_are_one_sentence(self, pipe, image, mask):
        fast = accelerate(pipe, tier="approximate")
        for options, sentence in (
            ({"num_inference_steps": "four"}, "num_inference_steps is 'four'; expected a whole number"),
            ({"num_inference_steps": 0}, "num_inference_steps is 0; expected at least 1"),
        ):
            with pytest.raises(GBCIError, match=sentence):
                sample(fast, image, mask, **options)
