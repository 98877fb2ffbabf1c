"""Processes beside the sampler: the same bytes as threads, errors by name, and an end when one dies."""

import multiprocessing
import shutil
import threading
from concurrent.futures import wait
from concurrent.futures.process import BrokenProcessPool
from operator import attrgetter

import numpy as np
import pandas as pd
import pytest
from pydicom import dcmread
from pydicom.uid import ExplicitVRLittleEndian

from gbci_fast.data.vindr import VinDr, find_inputs
from gbci_fast.errors import GBCIError
from gbci_fast.generate.plan import make_plan
from gbci_fast.generate.settings import SamplerSettings
from gbci_fast.generate.synthesizer import Synthesizer
from gbci_fast.generate.workers import Lane, Request, Worker

QUICK = SamplerSettings(num_inference_steps=1, guidance_scale=1.0)
INDEX = attrgetter("item.index")


@pytest.fixture(scope="module")
def plan(phantom):
    return make_plan(find_inputs(phantom), variants=2, seed=0)


@pytest.mark.parametrize("workers", [1, 3])
def test_the_same_bytes_as_threads(make_job, phantom, finished, tree, tmp_path, workers):
    make_job(phantom, tmp_path / "data", workers=workers)
    assert tree(tmp_path / "data") == tree(finished)


def test_the_same_shards_as_threads(make_job, phantom, tree, tmp_path):
    settings = {"formats": ("webdataset",), "shard_size": 3}
    for workers in (0, 2):
        make_job(phantom, tmp_path / str(workers), workers=workers, settings=settings)
    assert tree(tmp_path / "0") == tree(tmp_path / "2")


@pytest.mark.parametrize("workers", [0, 2])
def test_interrupted_then_resumed(make_job, phantom, finished, tree, tmp_path, workers, stop_after):
    with pytest.raises(KeyboardInterrupt):
        make_job(phantom, tmp_path / "data", workers=workers, on_batch=stop_after(2))
    assert len(pd.read_parquet(tmp_path / "data" / "manifest.parquet")) == 2
    make_job(phantom, tmp_path / "data", workers=workers, resume=True)
    assert tree(tmp_path / "data") == tree(finished)
    assert not multiprocessing.active_children()


def test_what_a_process_cannot_read_is_skipped_and_named(make_job, phantom, tmp_path):
    root = tmp_path / "root"
    shutil.copytree(phantom, root)
    first = VinDr(root).images[0].path
    dataset = dcmread(first)
    dataset.PixelData = bytes(2 * dataset.Rows * dataset.Columns)  # a fault that the header does not show
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.save_as(first)
    make_job(root, tmp_path / "data", workers=2, skip_bad=True)
    skipped = pd.read_csv(tmp_path / "data" / "skipped.csv")
    assert skipped.file.tolist() == [first.name]
    assert skipped.reason[0].startswith("every pixel displays as one and the same value")
    with pytest.raises(GBCIError, match=rf"{first.name}: every pixel displays as one and the same value"):
        make_job(root, tmp_path / "other", workers=2)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_batch_is_handed_out_although_the_next_cannot_be_sampled(pipe, plan, workers):
    calls = []

    def second_fails(*args, **options):
        calls.append(args)
        if len(calls) == 2:
            raise MemoryError
        return pipe(*args, **options)

    second_fails.conditioner = pipe.conditioner
    stream = Synthesizer(second_fails, QUICK, workers=workers).stream([plan[:2], plan[2:4], plan[4:6]], INDEX)
    assert [made.value for made in next(stream)] == [0, 1]
    with pytest.raises(MemoryError):
        next(stream)
    assert not multiprocessing.active_children()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("gbci-fast")]


@pytest.mark.parametrize("workers", [0, 2])
def test_without_skip_bad_nothing_is_sampled_behind_what_cannot_be_begun(
    pipe, plan, breast, write_template, tmp_path, workers
):
    """The spacing is impossible for a mammogram in model space, which only the opened file shows."""
    path = write_template(tmp_path / "coarse_LCC.dcm", np.round(60000 * breast(600, 450)).astype(np.uint16))
    dataset = dcmread(path)
    dataset.ImagerPixelSpacing = dataset.PixelSpacing = [10, 10]
    dataset.save_as(path)
    items = [*plan[:2], *make_plan(find_inputs(path), variants=3, seed=0)[2:], *plan[3:6]]
    calls = []

    def counted(*args, **options):
        calls.append(options)
        return pipe(*args, **options)

    counted.conditioner = pipe.conditioner

    def stream(**options):
        batches = [items[:2], items[2:4], items[4:]]
        return Synthesizer(counted, QUICK, workers=workers).stream(batches, INDEX, **options)

    strict = stream(skip_bad=False)
    assert [made.value for made in next(strict)] == [0, 1]
    with pytest.raises(GBCIError, match=r"coarse_LCC.dcm: .*pixel_spacing"):
        next(strict)
    assert len(calls) == 1
    first, second, third = stream(skip_bad=True)
    assert isinstance(second[0], GBCIError)
    assert [made.value for made in (*first, second[1], *third)] == [0, 1, 3, 4, 5]


def test_a_process_that_dies_ends_the_job_with_a_sentence(pipe, plan):
    stream = Synthesizer(pipe, QUICK, workers=2).stream([plan[:2], plan[2:4], plan[4:6]], INDEX)
    next(stream)
    for child in multiprocessing.active_children():
        child.kill()
    with pytest.raises(GBCIError, match="a worker process was killed by SIGKILL, as where memory runs out; use fewer"):
        list(stream)


def test_what_was_made_is_handed_out_although_processes_die_idle(pipe, plan, monkeypatch):
    """Batch 0 is finished when the third is to be begun."""

    def noted(lane, *args):
        submitted.append((lane, submit(lane, *args)))
        return submitted[-1][1]

    def idle(*args, **options):
        images = pipe(*args, **options)
        if len(calls) == 1:
            wait([future for _, future in submitted])  # batch 0 is pasted
            for child in multiprocessing.active_children():
                child.kill()
            for lane in {lane for lane, _ in submitted}:
                with pytest.raises(BrokenProcessPool):
                    submit(lane, "begin", []).result()
        calls.append(args)
        return images

    idle.conditioner = pipe.conditioner
    calls, submitted, submit = [], [], Lane.submit
    monkeypatch.setattr(Lane, "submit", noted)
    stream = Synthesizer(idle, QUICK, workers=2).stream([plan[:2], plan[2:4], plan[4:6], plan[6:]], INDEX)
    assert [made.value for made in next(stream)] == [0, 1]
    with pytest.raises(GBCIError, match="a worker process was killed by SIGKILL"):
        list(stream)


def test_no_batches_no_images(pipe):
    assert list(Synthesizer(pipe, QUICK).stream([], INDEX)) == []
    assert list(Synthesizer(pipe, QUICK).stream([[]], INDEX)) == [[]]


def test_more_workers_than_images(pipe, plan):
    (made,) = Synthesizer(pipe, QUICK, threads=5).stream([plan[:2]], INDEX)
    assert [image.value for image in made] == [0, 1]


class TestWorker:
    def test_asks_for_what_it_then_pastes(self, plan):
        worker = Worker(lambda synthesis: synthesis, None, 1.0)
        asked = worker.begin(plan[:2])
        assert all(isinstance(request, Request) for request in asked)
        painted = {
            item.index: np.clip(ask.pixels + 0.2 * ask.mask, 0, 1) for item, ask in zip(plan, asked, strict=False)
        }
        for made, item in zip(worker.finish(painted), plan, strict=False):
            assert made.item.image_id == item.image_id
            template = made.template.mammogram.stored
            np.testing.assert_array_equal(made.stored[~made.mask], template[~made.mask])
            assert (made.stored[made.mask] > template[made.mask]).mean() > 0.5
            np.testing.assert_array_equal(worker.synthesis(item.index).stored, made.stored)

    def test_keeps_no_batch_but_the_last(self, plan):
        worker = Worker(INDEX, None, 1.0)
        for first in (0, 2):
            asked = worker.begin(plan[first : first + 2])
            worker.finish({first + i: ask.pixels for i, ask in enumerate(asked)})
        with pytest.raises(KeyError):
            worker.synthesis(0)
        assert worker.synthesis(2).item.image_id == plan[2].image_id

    def test_nan_is_a_sentence(self, plan):
        worker = Worker(INDEX, None, 7.5)
        (ask,) = worker.begin(plan[:1])
        (error,) = worker.finish({0: np.full_like(ask.pixels, np.nan)})
        assert str(error) == (
            f"{plan[0].template.path}: the sampled image holds NaN or infinity; guidance_scale 7.5 may be too large"
        )
