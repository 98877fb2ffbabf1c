"""Changes of a fast pipeline's modules take effect at any time, as in the eager pipeline."""

import copy
import functools
import pickle

import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor2_0
from torch import nn

from gbci_fast.errors import GBCIError
from gbci_fast.fast import pipeline as fast_pipeline
from gbci_fast.fast.accelerate import accelerate
from gbci_fast.fast.runtimes.compile import CompiledDenoiser
from gbci_fast.fast.watch import Watch
from gbci_fast.model.few_step import FewStepLoRA
from gbci_fast.model.pipeline import GBCIPipeline

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers' own


@pytest.fixture
def pipe(tiny_pipeline):
    return tiny_pipeline(spread=0.05)


@pytest.fixture
def sample(sample):
    return functools.partial(sample, output_type="pt", paste_back=False)


def far(ours, reference):
    return (ours - reference).abs().max().item()


class Turned(AttnProcessor2_0):
    def __call__(self, *args, **kwargs):
        return -super().__call__(*args, **kwargs)


def noisy(module):
    generator = torch.Generator().manual_seed(7)
    return {
        name: value + 0.1 * torch.randn(value.shape, generator=generator) for name, value in module.state_dict().items()
    }


@torch.no_grad()
def in_place(pipe):
    for name, weight in pipe.unet.named_parameters():
        if "to_k" in name:
            weight.mul_(3)


def as_an_average_is_copied(pipe):
    for (_, value), weight in zip(noisy(pipe.unet).items(), pipe.unet.parameters(), strict=True):
        weight.data.copy_(value)


@torch.no_grad()
def exchanged_part(pipe):
    old = pipe.unet.mid_block.resnets[0].conv1
    new = nn.Conv2d(old.in_channels, old.out_channels, 3, padding=1)
    new.load_state_dict(noisy(old))
    pipe.unet.mid_block.resnets[0].conv1 = new


def one_processor(pipe):
    pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn1.processor = Turned()


def hook(pipe):
    pipe.unet.mid_block.resnets[0].conv2.register_forward_hook(lambda *given: -9 * given[-1])


@torch.no_grad()
def decoder_in_place(pipe):
    for weight in pipe.vae.decoder.parameters():
        weight.mul_(1.1)


def decoder_as_an_average(pipe):
    for (_, value), weight in zip(noisy(pipe.vae).items(), pipe.vae.parameters(), strict=True):
        weight.data.copy_(value)


def decoder_hook(pipe):
    pipe.vae.decoder.conv_out.register_forward_hook(lambda *given: -given[-1])


WEIGHTS = {
    "load_state_dict": lambda pipe: pipe.unet.load_state_dict(noisy(pipe.unet)),
    "load_state_dict, assigned": lambda pipe: pipe.unet.load_state_dict(noisy(pipe.unet), assign=True),
    "written to in place": in_place,
    "written to through data": as_an_average_is_copied,
    "a part exchanged": exchanged_part,
    "decoder written to in place": decoder_in_place,
    "a hook in the decoder": decoder_hook,
    "autoencoder written to through data": decoder_as_an_average,
    "autoencoder loaded": lambda pipe: pipe.vae.load_state_dict(noisy(pipe.vae)),
    "conditioner loaded": lambda pipe: pipe.conditioner.load_state_dict(noisy(pipe.conditioner)),
}
SAVED = {name: change for name, change in WEIGHTS.items() if change is not decoder_hook}
# The fused blocks reproduce none of these.
FOREIGN = {
    "set_attn_processor": lambda pipe: pipe.unet.set_attn_processor(Turned()),
    "one processor": one_processor,
    "a hook": hook,
    "FreeU": lambda pipe: pipe.unet.enable_freeu(0.5, 0.5, 1.5, 1.5),
}


@pytest.fixture
def runtime(request, monkeypatch, recorder):
    if request.param == "recorded":
        monkeypatch.setattr(fast_pipeline, "_recorder", lambda *_: recorder)
        return "fused"
    if request.param == "compile":
        build = functools.partial(CompiledDenoiser, backend="eager")
        monkeypatch.setattr(fast_pipeline, "_BUILDERS", fast_pipeline._BUILDERS | {"compile": build})
    return request.param


@pytest.mark.parametrize(
    ("runtime", "first"),
    [*((runtime, "sampled before") for runtime in ("eager", "fused", "recorded", "compile")), ("fused", "not before")],
    indirect=["runtime"],
)
@pytest.mark.parametrize("change", WEIGHTS.values(), ids=WEIGHTS)
def test_other_weights_count(pipe, sample, change, first, runtime):
    fast = accelerate(pipe, runtime, "exact")
    before = sample(pipe)
    if first == "sampled before":
        assert far(sample(fast), before) < 1e-4
    change(fast)
    assert torch.equal(sample(pipe), before)  # not those of the eager pipeline
    change(pipe)
    reference = sample(pipe)
    assert far(reference, before) > 1e-3
    assert far(sample(fast), reference) < 1e-4


@pytest.mark.parametrize("first", ["sampled before", "not sampled before"])
@pytest.mark.parametrize("change", FOREIGN.values(), ids=FOREIGN)
def test_what_the_fused_blocks_lack_is_run_by_the_eager_runtime_or_refused(pipe, sample, change, first):
    auto, fused = accelerate(pipe, tier="exact"), accelerate(pipe, "fused", "exact")
    before = sample(pipe)
    if first == "sampled before":
        assert far(sample(auto), before) < 1e-4 > far(sample(fused), before)
    for made in (pipe, auto, fused):
        change(made)
    reference = sample(pipe)
    assert far(reference, before) > 1e-3
    assert far(sample(auto), reference) < 1e-4
    assert auto.decision.runtime == "eager"
    assert "not the fused runtime: " in auto.describe()
    with pytest.raises(GBCIError, match="the fused runtime cannot run this UNet: "):
        sample(fused)


def test_in_a_narrower_dtype_too(pipe, sample):
    fast = accelerate(pipe, "fused", dtype=torch.bfloat16)
    before = sample(fast)
    other = noisy(pipe.unet)
    fast.unet.load_state_dict(other)
    pipe.unet.load_state_dict(other)
    fresh = accelerate(pipe, "fused", dtype=torch.bfloat16)
    assert torch.equal(sample(fast), sample(fresh))
    assert far(sample(fast), before) > 1e-2


def test_what_a_callback_changes_counts_from_the_next_step_on(pipe, sample):
    def callback(made, step, timestep, tensors):
        if step == 1:
            in_place(made)
        return {}

    fast, others = accelerate(pipe, tier="exact"), [copy.deepcopy(pipe) for _ in range(2)]
    call = {"num_inference_steps": 4, "output_type": "latent"}
    unchanged = sample(others[0], **call)
    in_place(others[1])
    ours, reference = (sample(made, callback_on_step_end=callback, **call) for made in (fast, pipe))
    assert far(ours, reference) < 1e-4
    assert min(far(reference, unchanged), far(reference, sample(others[1], **call))) > 1e-3


def test_nothing_is_built_again_if_nothing_changes(pipe, sample):
    fast = accelerate(pipe, tier="exact")
    sample(fast)
    built = fast._built
    sample(fast, seed=6)
    fast.unet.to("cpu")
    sample(fast)
    assert fast._built is built


def test_what_a_call_under_autocast_builds_is_in_full_precision(pipe, sample):
    fast = accelerate(pipe, tier="exact")
    with torch.autocast("cpu", torch.bfloat16):
        sample(fast)
    assert far(sample(fast), sample(pipe)) < 1e-5


@pytest.fixture
def with_student(pipe):
    generator, tensors = torch.Generator().manual_seed(2), {}
    for name in ("conv_in", "mid_block.resnets.0.conv1"):
        weight = pipe.unet.get_submodule(name).weight
        tensors[f"{name}.up"] = 0.2 * torch.randn(len(weight), 2, generator=generator)
        tensors[f"{name}.down"] = 0.2 * torch.randn(2, weight[0].numel(), generator=generator)
    few_step = FewStepLoRA.of(tensors, guidance_scale=2.0, steps=4)
    made = GBCIPipeline(**{**pipe.components, "few_step": few_step})
    made.set_progress_bar_config(disable=True)
    return made


def exchanged_unet(pipe):
    other = copy.deepcopy(pipe.unet)
    other.load_state_dict(noisy(other))
    pipe.unet = other


STUDENT = WEIGHTS | {
    "UNet exchanged": exchanged_unet,
    "few-step weights loaded": lambda pipe: pipe.few_step.load_state_dict(noisy(pipe.few_step)),
    "set_attn_processor": FOREIGN["set_attn_processor"],
}


@pytest.mark.parametrize("change", STUDENT.values(), ids=STUDENT)
def test_the_few_step_student_follows(with_student, sample, change):
    pipe, call = with_student, {"guidance_scale": 2.0, "known_region": False}
    fast = accelerate(pipe, tier="approximate", dtype=torch.float32)
    student = lambda: sample(pipe.few_step_pipeline(), **call | {"guidance_scale": 1.0})  # noqa: E731
    before = student()
    assert far(sample(fast, **call), before) < 1e-4
    for made in (pipe, fast):
        change(made)
    reference = student()
    assert far(reference, before) > 1e-3
    assert far(sample(fast, **call), reference) < 1e-4


def test_a_student_that_is_made_late_is_that_of_the_pipeline_as_it_was(with_student, sample):
    pipe, call = with_student, {"guidance_scale": 2.0, "known_region": False}
    fast = accelerate(pipe, tier="approximate", dtype=torch.float32)
    expected = sample(accelerate(pipe, tier="approximate", dtype=torch.float32), **call)
    pipe.unet.load_state_dict(noisy(pipe.unet))
    for made in (pickle.loads(pickle.dumps(fast)), copy.deepcopy(fast), fast):
        assert far(sample(made, **call), expected) < 1e-4


@pytest.mark.parametrize("change", SAVED.values(), ids=SAVED)
def test_other_weights_are_not_saved_as_the_eager_ones(pipe, sample, change, tmp_path):
    fast = accelerate(pipe, dtype=torch.bfloat16)
    sample(fast)
    fast.save_pretrained(tmp_path / "same")
    change(fast)
    with pytest.raises(
        GBCIError, match="has other weights than that of the eager pipeline, which is what would be saved"
    ):
        fast.save_pretrained(tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_a_watch_sees_what_it_says():
    def module():
        return nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Dropout(0.1))

    def data(model):
        model[0].weight.data.mul_(2)

    def grow(model):
        model.append(nn.ReLU())

    for change in (
        data,
        grow,
        lambda model: model.eval(),
        lambda model: setattr(model[2], "p", 0.2),
        lambda model: setattr(model[0], "weight", nn.Parameter(model[0].weight.detach().clone())),
        lambda model: model[1].running_mean.add_(1),
        lambda model: model[0].register_forward_pre_hook(lambda *_: None),
        lambda model: model.double(),
        lambda model: setattr(model[0], "extra", torch.zeros(2)),
        lambda model: model[2].register_buffer("extra", torch.zeros(2)),
        lambda model: model[2].register_parameter("extra", nn.Parameter(torch.zeros(2))),
    ):
        model = module()
        watch = Watch(model)
        assert not watch.changed()
        change(model)
        assert watch.changed()
        assert not Watch(model).changed()
    model = module()
    model[0].weight.data.fill_(torch.nan)
    assert not Watch(model).changed()  # NaN counts as unchanged
