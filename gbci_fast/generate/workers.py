"""The work beside the sampler: opening templates, drawing masks, pasting and writing lesions.

A `Worker` handles a share of every batch, in a thread or a process of its own (`start_workers`). For small images
processes are faster: most of the time is spent in Python code, and threads would wait for the interpreter lock.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
import torch

from gbci_fast.attributes import Attributes
from gbci_fast.errors import GBCIError
from gbci_fast.generate.copies import CopyGate
from gbci_fast.generate.plan import PlanItem
from gbci_fast.generate.template import (
    Extent,
    Synthesis,
    Template,
    completed_attributes,
    draw_masks,
    naming,
    open_template,
    paste,
)
from gbci_fast.jobs.processes import LIMIT, close_pool, how_it_ended, processes_of, start_worker, worker_pool

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True, eq=False)
class Request:
    """The sampler's input for one image.

    Attributes:
        pixels: float32 [S, S], the template in model space.
        mask: bool [S, S], the pixels to paint.
        attributes: the description for the tables, completed from the opened file.
    """

    pixels: np.ndarray
    mask: np.ndarray
    attributes: Attributes


@dataclass(frozen=True, kw_only=True, eq=False)
class _Prepared:
    """An item with its open template, description, masks (bool [S, S] and native [H, W]) and lesion."""

    item: PlanItem
    template: Template
    attributes: Attributes
    model_mask: np.ndarray
    mask: np.ndarray
    lesion: Extent


class Worker(Generic[T]):
    """Handles its share of one batch after another: `begin` before sampling, `finish` after it.

    Args:
        use: called with every image; `finish` returns its results.
        gate: checks every image before `use`.
        guidance_scale: of the sampler, for an error message.
    """

    def __init__(self, use: Callable[[Synthesis], T], gate: CopyGate | None, guidance_scale: float):
        self._use = use
        self._gate = gate
        self._guidance_scale = guidance_scale
        self._opened: dict[Path, Template | GBCIError] = {}
        self._prepared: dict[int, _Prepared] = {}
        self._last: dict[int, tuple[_Prepared, np.ndarray]] = {}

    def begin(self, items: Sequence[PlanItem]) -> list[Request | GBCIError]:
        """Opens templates and draws masks; returns a request or an error per item.

        A template stays open as long as consecutive calls use it.
        """
        paths = {item.template.path for item in items}
        self._opened = {path: template for path, template in self._opened.items() if path in paths}
        return [self._begin(item) for item in items]

    def finish(self, images: Mapping[int, np.ndarray]) -> list[T | GBCIError]:
        """Pastes the sampled images and calls `use` on each; returns a result or an error per image.

        Args:
            images: {plan index: float32 [S, S] in [0, 1]} of items that were begun.
        """
        self._last = {index: (self._prepared.pop(index), image) for index, image in images.items()}
        return [self._finish(index) for index in images]

    def synthesis(self, index: int) -> Synthesis:
        """An image of the last call of `finish`, pasted anew, since native pixels are not kept.

        Raises:
            GBCIError: the image holds NaN or infinity, the gate rejects it (a `CopyError`), or it cannot be pasted.
        """
        part, image = self._last[index]
        path = part.item.template.path
        if not np.isfinite(image).all():
            raise GBCIError(
                f"{path}: the sampled image holds NaN or infinity; guidance_scale {self._guidance_scale:g} may be too "
                "large"
            )
        if self._gate is not None:
            self._gate.check(part.item, part.template, part.model_mask, image)
        with naming(path):
            stored = paste(part.template, image, part.mask)
        return Synthesis(
            item=part.item,
            template=part.template,
            attributes=part.attributes,
            stored=stored,
            mask=part.mask,
            lesion=part.lesion,
        )

    def _begin(self, item: PlanItem) -> Request | GBCIError:
        path = item.template.path
        try:
            template = self._opened[path] if path in self._opened else open_template(item.template)
        except GBCIError as error:
            template = error  # kept, so that other variants do not read the file again
        self._opened[path] = template
        if isinstance(template, GBCIError):
            return template
        try:
            with naming(path):
                model_mask, mask, lesion = draw_masks(item, template)
                attributes = completed_attributes(item, template)
        except GBCIError as error:
            return error
        self._prepared[item.index] = _Prepared(
            item=item, template=template, attributes=attributes, model_mask=model_mask, mask=mask, lesion=lesion
        )
        return Request(pixels=template.pixels, mask=model_mask, attributes=attributes)

    def _finish(self, index: int) -> T | GBCIError:
        try:
            return self._use(self.synthesis(index))
        except GBCIError as error:
            return error


class Lane:
    """A worker in a thread or a process of its own; calls run in order."""

    def __init__(self, executor: ThreadPoolExecutor | ProcessPoolExecutor, call: Callable[..., Any]):
        self._executor = executor
        self._call = call
        self._futures: list[Future] = []
        self.processes: list[BaseProcess] = []

    def submit(self, method: str, *args: Any) -> Future:
        """Calls a method of the worker; returns the future of its result.

        Raises:
            BrokenProcessPool: the worker's process is dead. If it dies later, the future raises this error.
        """
        future = self._executor.submit(self._call, method, *args)
        if isinstance(self._executor, ProcessPoolExecutor):
            self.processes = processes_of(self._executor) or self.processes
        self._futures = [*(one for one in self._futures if not one.done()), future]
        return future

    def cancel(self) -> None:
        """Cancels the calls that have not begun; in a process, the next call can no longer be cancelled."""
        for future in self._futures:
            future.cancel()

    def close(self, limit: float) -> None:
        """Waits for the calls that are not cancelled; a process that takes longer than `limit` seconds is killed."""
        if isinstance(self._executor, ProcessPoolExecutor):
            close_pool(self._executor, limit)
        else:
            self._executor.shutdown(cancel_futures=True)


def close_lanes(lanes: Sequence[Lane]) -> None:
    """Cancels the calls that have not begun, and waits for the rest, up to `LIMIT` seconds in all."""
    for lane in lanes:
        lane.cancel()
    end = time.monotonic() + LIMIT
    for lane in lanes:
        lane.close(max(end - time.monotonic(), 0))


def dead_worker(lanes: Sequence[Lane]) -> GBCIError:
    """Closes the lanes after a worker process has died; returns the error to raise."""
    close_lanes(lanes)
    ended = how_it_ended([process for lane in lanes for process in lane.processes])
    return GBCIError(f"a worker process {ended}; use fewer --workers, or a smaller --batch-size")


def start_workers(processes: int, threads: int, *args: Any) -> list[Lane]:
    """Starts `processes` processes with a ``Worker(*args)`` each; if 0, `threads` threads."""
    if not processes:
        return [_thread(Worker(*args)) for _ in range(threads)]
    return [Lane(worker_pool(1, __name__, _start, args), _call) for _ in range(processes)]


def _thread(worker: Worker) -> Lane:
    executor = ThreadPoolExecutor(1, thread_name_prefix="gbci-fast")
    return Lane(executor, lambda method, *args: getattr(worker, method)(*args))


_worker: Worker | None = None  # set in worker processes only


def _start(*args: Any) -> None:
    global _worker
    start_worker()
    torch.set_num_threads(1)
    _worker = Worker(*args)


def _call(method: str, *args: Any) -> Any:
    return getattr(_worker, method)(*args)
