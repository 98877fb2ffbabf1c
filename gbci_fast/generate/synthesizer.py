"""Runs the batches of a plan through the sampler, while workers prepare its inputs and finish its outputs."""

import os
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from typing import Generic, TypeVar

import numpy as np
import torch

from gbci_fast.attributes import Attributes
from gbci_fast.errors import GBCIError
from gbci_fast.generate.copies import CopyGate
from gbci_fast.generate.plan import PlanItem
from gbci_fast.generate.settings import SamplerSettings
from gbci_fast.generate.template import Synthesis
from gbci_fast.generate.workers import Lane, Request, close_lanes, dead_worker, start_workers
from gbci_fast.model.pipeline import GBCIPipeline

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True, eq=False)
class Made(Generic[T]):
    """One image that was made.

    Attributes:
        value: what `use` returned for the image.
        again: pastes the image once more, since native pixels are not kept; valid until the next batch is requested.
    """

    value: T
    again: Callable[[], Synthesis]


class Synthesizer:
    """Makes the images of a plan, batch by batch.

    Args:
        pipe: the pipeline that samples.
        settings: of the sampler.
        gate: checks every image after sampling, so that a rejection changes no other image.
        workers: processes that open templates, paste and use images beside the sampler; 0 = threads of this process.
        threads: their number where `workers` is 0; None = one per core.
    """

    def __init__(
        self,
        pipe: GBCIPipeline,
        settings: SamplerSettings,
        gate: CopyGate | None = None,
        *,
        workers: int = 0,
        threads: int | None = None,
    ):
        self._pipe = pipe
        self._settings = settings
        self._gate = gate
        self._workers = workers
        self._threads = threads or len(os.sched_getaffinity(0))

    def stream(
        self, batches: Iterable[Sequence[PlanItem]], use: Callable[[Synthesis], T], *, skip_bad: bool = True
    ) -> Generator[list[Made[T] | GBCIError], None, None]:
        """Yields a list per batch, in order, with one entry per item: the image as `use` returned it, or an error.

        While a batch is sampled, workers open the templates of the next batch and call `use` on the images of the
        previous one, so templates and images of three batches are in memory. `use` never works on two batches at once.
        In processes, a copy of `use` is called. If sampling fails (Ctrl-C, memory), the batch that is being finished is
        yielded before the exception is raised. Close the generator before touching what `use` has written.

        An item's error is a `GBCIError` that names the file: the template cannot be read or shows no breast, the mask
        lies outside it, the image cannot be pasted, or the gate rejected the image (a `CopyError`). Other exceptions
        of `use` are raised.

        Args:
            batches: the items to make; taken one batch ahead of the sampler.
            use: called with every image.
            skip_bad: sample a batch without the items that cannot be prepared, instead of raising the first error.

        Raises:
            GBCIError: an item cannot be prepared and `skip_bad` is not set, or a worker process died.
        """
        lanes = start_workers(self._workers, self._threads, use, self._gate, self._settings.guidance_scale)
        try:
            source = iter(batches)
            upcoming, before = _begin(source, lanes), None
            while upcoming is not None:
                failure = None
                try:
                    batch, upcoming = upcoming, _begin(source, lanes)
                    images = self._sample(batch.items, batch.requests(skip_bad=skip_bad))
                except BaseException as error:
                    failure = error
                if before is not None:
                    yield before.results(failure)
                if failure is not None:
                    raise failure
                batch.finish(images)
                before = batch
            if before is not None:
                yield before.results()
        except BrokenProcessPool as error:
            raise dead_worker(lanes) from error
        finally:
            close_lanes(lanes)  # after this, no worker writes

    def _sample(self, items: Sequence[PlanItem], requests: Sequence[Request | GBCIError]) -> dict[int, np.ndarray]:
        """{plan index: sampled image, float32 [S, S] in [0, 1]} of the items that have a request."""
        ready = [(item, ask) for item, ask in zip(items, requests, strict=True) if isinstance(ask, Request)]
        if not ready:
            return {}
        images = self._pipe(
            torch.from_numpy(np.stack([ask.pixels for _, ask in ready]))[:, None],
            torch.from_numpy(np.stack([ask.mask for _, ask in ready]).astype(np.float32))[:, None],
            attributes=[self._told(item, ask) for item, ask in ready],
            report=[item.report for item, _ in ready],
            num_inference_steps=self._settings.num_inference_steps,
            guidance_scale=self._settings.guidance_scale,
            seed=[item.seed for item, _ in ready],
            paste_back=False,  # `paste` composites, on the native grid
            output_type="pt",
        ).images
        return {item.index: image for (item, _), image in zip(ready, images[:, 0].cpu().numpy(), strict=True)}

    def _told(self, item: PlanItem, request: Request) -> Attributes:
        """The description for the model, which warns of attributes that it does not know: they are left out.

        A file's age and spacing go into the tables, not into the model: no real training image stated either.
        """
        told = replace(request.attributes, age=item.attributes.age, pixel_spacing=item.attributes.pixel_spacing)
        return self._pipe.conditioner.without_ignored(told)


class _Batch:
    """The items of a batch, divided among the workers in equal runs of consecutive items."""

    def __init__(self, items: Sequence[PlanItem], lanes: Sequence[Lane]):
        self.items = items = list(items)
        self._lanes = lanes
        share = -(-len(items) // len(lanes))
        self._shares = [items[first : first + share] for first in range(0, len(items), max(share, 1))]
        self._begun = self._submit("begin", self._shares)
        self._finished: list[Future] = []
        self._errors: dict[int, GBCIError] = {}

    def requests(self, *, skip_bad: bool) -> list[Request | GBCIError]:
        """Waits for all items; returns a request or an error per item, or raises the first error without `skip_bad`."""
        requests = [request for future in self._begun for request in future.result()]
        pairs = zip(self.items, requests, strict=True)
        self._errors = {item.index: found for item, found in pairs if isinstance(found, GBCIError)}
        if self._errors and not skip_bad:
            raise next(iter(self._errors.values()))
        return requests

    def finish(self, images: dict[int, np.ndarray]) -> None:
        """Gives the sampled images to the workers."""
        chosen = [{item.index: images[item.index] for item in part if item.index in images} for part in self._shares]
        self._finished = self._submit("finish", chosen)

    def results(self, failure: BaseException | None = None) -> list[Made | GBCIError]:
        """Waits for all items; returns an image or an error per item. Raises `failure`, if given, on a dead worker."""
        try:
            return self._results()
        except BrokenProcessPool as error:
            raise failure or error from None

    def _results(self) -> list[Made | GBCIError]:
        made: dict[int, Made | GBCIError] = dict(self._errors)
        for lane, part, future in zip(self._lanes, self._shares, self._finished, strict=False):
            indices = [item.index for item in part if item.index not in self._errors]
            for index, value in zip(indices, future.result(), strict=True):
                made[index] = value if isinstance(value, GBCIError) else _made(lane, index, value)
        return [made[item.index] for item in self.items]

    def _submit(self, method: str, parts: Sequence) -> list[Future]:
        return [lane.submit(method, part) for lane, part in zip(self._lanes, parts, strict=False)]


def _begin(source: Iterator[Sequence[PlanItem]], lanes: Sequence[Lane]) -> _Batch | None:
    """The next batch, given to the workers; None after the last."""
    items = next(source, None)
    return None if items is None else _Batch(items, lanes)


def _made(lane: Lane, index: int, value: T) -> Made[T]:
    def again() -> Synthesis:
        try:
            return lane.submit("synthesis", index).result()
        except BrokenProcessPool as error:
            raise dead_worker([lane]) from error

    return Made(value=value, again=again)
