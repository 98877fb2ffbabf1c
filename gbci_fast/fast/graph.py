"""A whole denoising loop as one CUDA graph, which is launched at once however many kernels it holds.

For small batches a GPU computes a kernel faster than Python launches the next. A graph launches all of them: every step
of the loop, with what is hoisted out of it. Coefficients and scales are numbers in it; whatever else a call brings
(masks, templates, attributes, seeds) is copied into tensors that it reads, and so records nothing anew.
"""

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

BATCH_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
"""Batch sizes that are recorded. A batch is padded to the next size. Larger batches are not launch-bound."""
TOKENS = 32
"""A context with a report is padded to a multiple of this many tokens."""
CAPACITY = 64
"""Recordings that are kept: windows of nine sizes, in the seven buckets of batches up to 64."""
_RECORDING = threading.Lock()  # a process can capture one graph at a time: the next begins with waiting for the device


class Recorder(Protocol):
    """What records a loop, and replays it."""

    def record(self, loop: Callable[[], Tensor]) -> Callable[[], Tensor]:
        """A function that does again, on the same tensors, what `loop` does, and returns the same tensor."""
        ...

    def turn(self) -> AbstractContextManager[None]:
        """Inside it, work comes after that of earlier turns, whichever streams they were on."""
        ...


class CudaRecorder:
    """See `Recorder`: CUDA graphs that share one memory pool, as no two of them ever run at once."""

    def __init__(self, device: torch.device):
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()
        with torch.cuda.device(device):
            self._stream = torch.cuda.Stream()
            self._done = torch.cuda.Event()

    def record(self, loop: Callable[[], Tensor]) -> Callable[[], Tensor]:
        """Runs `loop` once, so that libraries set themselves up and kernels are tuned, and then captures it.

        One thread of a process at a time; but a thread that waits for the whole device meanwhile breaks the capture.
        """
        graph = torch.cuda.CUDAGraph()
        with _RECORDING, torch.cuda.device(self._device):
            self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream):
                loop()
            torch.cuda.current_stream().wait_stream(self._stream)
            # So that the recording gets one in its own pool, and keeps it when torch.compile's recordings clear them.
            torch._C._cuda_clearCublasWorkspaces()
            # Other threads may allocate meanwhile: "thread_local".
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
                output = loop()
            torch._C._cuda_clearCublasWorkspaces()

        def replay() -> Tensor:
            graph.replay()
            return output

        return replay

    @contextmanager
    def turn(self) -> Iterator[None]:
        """By an event, for which the turn's stream waits."""
        with torch.cuda.device(self._device):
            stream = torch.cuda.current_stream()
            stream.wait_event(self._done)
            try:
                yield
            finally:
                self._done.record(stream)


@dataclass(frozen=True, kw_only=True)
class _Recording:
    inputs: dict[str, Tensor]
    replay: Callable[[], Tensor]


class LoopGraphs:
    """Recordings of loops, by what is baked into them; the least recently used one makes room for a new one.

    Threads take turns.
    """

    def __init__(self, recorder: Recorder, capacity: int = CAPACITY):
        self._recorder = recorder
        self._capacity = capacity
        self._recordings: OrderedDict[Hashable, _Recording] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._recordings)

    def __call__(
        self,
        key: Hashable,
        loop: Callable[[Mapping[str, Tensor]], Tensor],
        batched: Mapping[str, Tensor],
        shared: Mapping[str, Tensor],
    ) -> Tensor:
        """``loop(batched | shared)``, from a recording.

        Args:
            key: tells loops apart: what one computes must follow from its key and its inputs' shapes and values.
            loop: neither waits for the device, nor writes to its inputs, nor asks for their values.
            batched: tensors ``[B, ...]`` of up to ``BATCH_SIZES[-1]`` independent samples.
            shared: tensors that are the same for all samples.

        Returns:
            A new tensor ``[B, ...]``.
        """
        batch = len(next(iter(batched.values())))
        size = padded_size(batch)
        shapes = {name: (size, *tensor.shape[1:]) for name, tensor in batched.items()}
        shapes |= {name: tuple(tensor.shape) for name, tensor in shared.items()}
        given = {**batched, **shared}
        key = key, tuple((name, shape, given[name].dtype) for name, shape in shapes.items())
        with self._lock, self._recorder.turn():
            recording = self._recordings.pop(key, None)
            inputs = _allocate(given, shapes) if recording is None else recording.inputs
            for name, tensor in given.items():
                _fill(inputs[name], tensor)
            if recording is None:
                recording = _Recording(inputs=inputs, replay=self._recorder.record(lambda: loop(inputs)))
            self._recordings[key] = recording
            # A capture begins with waiting for the device: what is dropped after it runs no more.
            if len(self._recordings) > self._capacity:
                self._recordings.popitem(last=False)
            return recording.replay()[:batch].clone()


def padded_size(batch: int) -> int:
    """The smallest of `BATCH_SIZES` that holds a batch."""
    return next(size for size in BATCH_SIZES if size >= batch)


def _allocate(tensors: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    with torch.inference_mode(False):  # or else later calls outside of it could not write to them
        return {
            name: torch.empty(shape, dtype=tensors[name].dtype, device=tensors[name].device)
            for name, shape in shapes.items()
        }


def _fill(buffer: Tensor, tensor: Tensor) -> None:
    """Copies a tensor to the front of a buffer, and its last sample to the places behind, as valid as any other."""
    buffer[: len(tensor)].copy_(tensor)
    if len(buffer) > len(tensor):
        buffer[len(tensor) :].copy_(tensor[-1:].expand_as(buffer[len(tensor) :]))
