"""Calls of the eager pipeline: by several threads and processes, with callbacks, interrupted."""

import functools
import os
import signal
import threading

import pytest
import torch
from diffusers import EulerDiscreteScheduler, UniPCMultistepScheduler
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback

from gbci_fast.errors import GBCIError
from gbci_fast.fast.accelerate import accelerate
from gbci_fast.model.masks import feather_latent_mask, latent_mask
from gbci_fast.model.pipeline import GBCIPipeline

# diffusers' own, of its schedulers under NumPy 2 and of the older spelling of `dtype`
pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:__array_wrap__ must accept:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:`torch_dtype` is deprecated:FutureWarning"),
]


def use(pipe, scheduler):
    pipe.scheduler = scheduler.from_config(pipe.scheduler.config)


def alone_and_together(calls):
    """The results of functions called one after the other, and of the same functions in one thread each."""
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


@pytest.mark.parametrize("scheduler", [EulerDiscreteScheduler, UniPCMultistepScheduler])  # of one step, of several
def test_threads_get_the_images_that_they_would_get_alone(pipe, paint, image, mask, scheduler):
    use(pipe, scheduler)
    calls = [
        functools.partial(
            paint,
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


def test_threads_of_pipelines_that_share_a_scheduler(pipe, paint, image, mask):
    use(pipe, UniPCMultistepScheduler)
    pipes = [pipe, GBCIPipeline.from_pipe(pipe)]
    for one in pipes:
        one.set_progress_bar_config(disable=True)
    assert pipes[1].scheduler is pipe.scheduler
    calls = [functools.partial(paint, one, image, mask, num_inference_steps=3 + i) for i, one in enumerate(pipes)]
    alone, together = alone_and_together(calls)
    assert all(torch.equal(one, other) for one, other in zip(alone, together, strict=True))


def test_a_callback_sees_its_own_call_while_another_thread_waits(pipe, paint, image, mask):
    def call(steps, scale):
        seen = []

        def note(pipe, step, timestep, tensors):
            seen.append((pipe.num_timesteps, pipe.guidance_scale, len(pipe.scheduler.timesteps)))
            pipe._interrupt = steps == 5 and step == 1
            return {}

        paint(pipe, image[:1], mask[:1], num_inference_steps=steps, guidance_scale=scale, callback_on_step_end=note)
        return seen

    alone, together = alone_and_together([lambda: call(5, 3.0), lambda: call(4, 1.0)])
    assert alone == together == [[(5, 3.0, 5)] * 2, [(4, 1.0, 4)] * 4]


def test_a_callback_may_call_its_own_pipeline(pipe, paint, image, mask):
    inner = []

    def paint_again(pipe, step, timestep, tensors):
        if step == 2:  # the last step, after which the scheduler's state is not needed
            inner.append(paint(pipe, image[:1], mask[:1], seed=7))
        return {}

    paint(pipe, image[:1], mask[:1], callback_on_step_end=paint_again)
    assert torch.equal(inner[0], paint(pipe, image[:1], mask[:1], seed=7))


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
@pytest.mark.parametrize("made", [lambda pipe: pipe, accelerate], ids=["eager", "fast"])
def test_a_process_that_is_forked_during_a_call_makes_its_own(pipe, paint, image, mask, made):
    pipe = made(pipe)
    inside, forked = threading.Event(), threading.Event()

    def wait(pipe, step, timestep, tensors):
        inside.set()
        assert forked.wait(60)
        return {}

    thread = threading.Thread(target=paint, args=(pipe, image[:1], mask[:1]), kwargs={"callback_on_step_end": wait})
    thread.start()
    assert inside.wait(60)
    if not (child := os.fork()):
        signal.alarm(20)  # ends a child that waits for a thread of its parent
        try:
            paint(pipe, image[:1], mask[:1], eta=7.0)
        except GBCIError as error:
            os._exit(0 if str(error) == "eta is 7.0; expected 0 to 1" else 2)
        finally:
            os._exit(1)
    forked.set()
    thread.join()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_callback_sees_every_step(pipe, paint, image, mask):
    calls = []

    def note(called, step, timestep, tensors):
        calls.append((called is pipe, step, int(timestep), sorted(tensors), tensors["latents"].shape))

    silent = paint(pipe, image[:1], mask[:1])
    watched = paint(
        pipe, image[:1], mask[:1], callback_on_step_end=note,
        callback_on_step_end_tensor_inputs=["latents", "noise", "image_latents"],
    )  # fmt: skip
    names, shape = ["image_latents", "latents", "noise"], (1, 4, 16, 16)
    assert calls == [(True, i, t, names, shape) for i, t in enumerate((999, 666, 332))]
    assert torch.equal(silent, watched)


def test_callback_changes_tensors(pipe, paint, image, mask):
    def at_the_end(called, step, timestep, tensors):
        return {"latents": torch.full_like(tensors["latents"], 0.25)} if step == called.num_timesteps - 1 else {}

    latents = paint(pipe, image[:1], mask[:1], callback_on_step_end=at_the_end, output_type="latent")
    assert torch.equal(latents, torch.full((1, 4, 16, 16), 0.25))

    def known_from_now_on(called, step, timestep, tensors):
        return {"image_latents": torch.zeros_like(tensors["image_latents"])}

    latents = paint(
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


def test_callback_objects(pipe, paint, image, mask):
    plain = paint(pipe, image[:1], mask[:1], num_inference_steps=1, output_type="latent")
    for callback, share in ((Halve(), 0.5), (MultiPipelineCallbacks([Halve(), Halve()]), 0.25)):
        changed = paint(
            pipe, image[:1], mask[:1], num_inference_steps=1, output_type="latent", callback_on_step_end=callback
        )
        assert torch.equal(changed, plain * share)


def test_callback_turns_guidance_off(pipe, paint, image, mask):
    def cut(called, step, timestep, tensors):
        called._guidance_scale = 0.0

    batches = []
    hook = pipe.unet.register_forward_pre_hook(lambda module, args: batches.append(len(args[0])))
    try:
        paint(pipe, image[:2], mask[:2], callback_on_step_end=cut)
    finally:
        hook.remove()
    assert batches == [4, 2, 2]


def test_interrupt_skips_the_rest(pipe, paint, image, mask):
    steps = []

    def stop(called, step, timestep, tensors):
        steps.append(step)
        called._interrupt = step == 1

    paint(pipe, image[:1], mask[:1], num_inference_steps=5, callback_on_step_end=stop)
    assert steps == [0, 1]
    paint(pipe, image[:1], mask[:1], num_inference_steps=5, callback_on_step_end=lambda *_: steps.append(9))
    assert steps == [0, 1, 9, 9, 9, 9, 9]  # the next call starts afresh
