"""The eager pipeline drives any scheduler of diffusers that can inpaint, and refuses the others."""

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

from gbci_fast.errors import GBCIError
from gbci_fast.model.pipeline import GBCIPipeline

# diffusers' own, of its schedulers under NumPy 2 and of the older spelling of `dtype`
pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:__array_wrap__ must accept:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:`torch_dtype` is deprecated:FutureWarning"),
]


def use(pipe, scheduler):
    pipe.scheduler = scheduler.from_config(pipe.scheduler.config)


SCHEDULERS = {
    "ddim": DDIMScheduler,
    "euler": EulerDiscreteScheduler,
    "dpmpp_2m": DPMSolverMultistepScheduler,
    "unipc": UniPCMultistepScheduler,
    "lcm": LCMScheduler,
}


@pytest.mark.parametrize("scheduler", SCHEDULERS.values(), ids=SCHEDULERS)
def test_every_scheduler_is_finite_in_range_and_a_function_of_the_seed(pipe, paint, image, mask, scheduler):
    use(pipe, scheduler)
    before = torch.get_rng_state()
    first, again, other = (paint(pipe, image[:2], mask[:2], seed=seed) for seed in (5, 5, 50))
    assert first.shape == (2, 1, 64, 64)
    assert first.isfinite().all()
    assert first.min() >= 0
    assert first.max() <= 1
    assert torch.equal(first, again)
    assert (first - other)[mask[:2] > 0].abs().mean() > 1e-3
    assert torch.equal(torch.get_rng_state(), before)  # torch's own generator is not touched


@pytest.mark.parametrize("scheduler", SCHEDULERS.values(), ids=SCHEDULERS)
def test_every_scheduler_follows_a_torch_generator(pipe, paint, image, mask, scheduler):
    use(pipe, scheduler)
    first, again, other = (
        paint(pipe, image[:1], mask[:1], seed=None, generator=torch.Generator().manual_seed(seed)) for seed in (2, 2, 3)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_schedulers_that_only_take_generators(pipe, paint, image, mask):
    use(pipe, EulerAncestralDiscreteScheduler)
    with pytest.raises(GBCIError) as raised:
        paint(pipe, image[:1], mask[:1], seed=1)
    assert str(raised.value) == (
        "EulerAncestralDiscreteScheduler takes its noise from a torch generator alone; pass generator instead of seed"
    )
    draws = [paint(pipe, image[:1], mask[:1], seed=None, generator=torch.Generator().manual_seed(2)) for _ in range(2)]
    assert torch.equal(*draws)


def every_scheduler():
    """Name and class of every diffusers scheduler that can be made from a noise schedule alone."""
    import diffusers

    for name in sorted(name for name in dir(diffusers) if name.endswith("Scheduler")):
        kind = getattr(diffusers, name)
        if isinstance(kind, type) and issubclass(kind, diffusers.SchedulerMixin):
            yield name, kind


@pytest.mark.parametrize(("name", "kind"), list(every_scheduler()))
def test_any_scheduler_of_diffusers_is_driven_and_stored_or_refused(pipe, paint, image, mask, name, kind, tmp_path):
    try:
        made = kind.from_config(pipe.scheduler.config)
    except (TypeError, ValueError):  # the scheduler needs more arguments
        made = kind() if name == "UnCLIPScheduler" else None
    if made is None:
        pytest.skip("cannot be made of a noise schedule alone")
    pipe.scheduler = made

    def painted(pipe):
        options = {"seed": None, "generator": torch.Generator().manual_seed(0), "num_inference_steps": 4}
        return paint(pipe, image[:1], mask[:1], **options)

    result, said = None, None
    try:
        result = painted(pipe)
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
    assert torch.equal(painted(loaded), result)


@pytest.mark.parametrize("name", ["FlowMatchEulerDiscreteScheduler", "IPNDMScheduler", "DDIMInverseScheduler"])
def test_schedulers_of_other_models_are_refused(pipe, paint, image, mask, name):
    import diffusers

    pipe.scheduler = getattr(diffusers, name)()
    with pytest.raises(
        GBCIError, match=f"^scheduler is a {name}, which inpainting cannot drive: it has no .*add_noise"
    ):
        paint(pipe, image, mask)


@pytest.mark.parametrize("scheduler", [DDIMScheduler, EulerDiscreteScheduler])
def test_a_number_of_steps_that_overruns_the_timesteps_is_refused(pipe, paint, image, mask, scheduler):
    """Trailing spacing gives 62 timesteps instead of 61, and the last is -1."""
    use(pipe, scheduler)
    sentence = f"num_inference_steps 61 takes {scheduler.__name__} to timestep -1; expected another number"
    with pytest.raises(GBCIError, match=sentence):
        paint(pipe, image[:1], mask[:1], num_inference_steps=61)
