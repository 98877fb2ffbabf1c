"""A whole denoising loop as one CUDA graph, whose kernels are launched at once.

For small batches a GPU computes a kernel faster than Python launches the next. A graph launches all kernels: those of
every step, and those that run once before the loop. Coefficients and scales are constants of the graph. Masks,
templates, attributes and seeds of a call are copied into tensors that the graph reads, so that new values need no new
recording.
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
TOKEN_MULTIPLE = 32
"""A context with a report is padded to a multiple of this many tokens."""
CAPACITY = 64
"""Number of recordings that are kept: windows of nine sizes, in the seven batch sizes up to 64."""
# A process can capture one graph at a time, and a capture begins by waiting for the device.
_RECORDING = threading.Lock()


class Recorder(Protocol):
    """Records a loop and replays it."""

    def record(self, loop: Callable[[], Tensor]) -> Callable[[], Tensor]:
        """A function that repeats `loop` on the same tensors, and returns the same tensor."""
        ...

    def turn(self) -> AbstractContextManager[None]:
        """Inside this context, work waits for the work of earlier turns, on any stream."""
        ...


class CudaRecorder:
    """See `Recorder`. Its CUDA graphs share one memory pool, because only one of them runs at a time."""

    def __init__(self, device: torch.device):
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()
        with torch.cuda.device(device):
            self._stream = torch.cuda.Stream()
            self._done = torch.cuda.Event()

    def record(self, loop: Callable[[], Tensor]) -> Callable[[], Tensor]:
        """Runs `loop` once, so that libraries are initialized and kernels are tuned, and then captures it.

        One thread of a process records at a time. A thread that waits for the whole device breaks a capture under way.
        """
        graph = torch.cuda.CUDAGraph()
        with _RECORDING, torch.cuda.device(self._device):
            self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream):
                loop()
            torch.cuda.current_stream().wait_stream(self._stream)
            # The recording then allocates a workspace in its own pool, which torch.compile's recordings cannot clear.
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
        """See `Recorder`. The stream of a turn waits for an event that the turn before recorded."""
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
    """Recordings of loops, looked up by their constants and shapes. The least recently used one is dropped first.

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
            key: identifies the loop: loops with equal keys compute the same from equal inputs.
            loop: the function to record. It must not wait for the device, write to its inputs, or read their values on
                the CPU.
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
            # The capture above waited for the device, so the recording that is dropped here has finished.
            if len(self._recordings) > self._capacity:
                self._recordings.popitem(last=False)
            return recording.replay()[:batch].clone()


def padded_size(batch: int) -> int:
    """The smallest of `BATCH_SIZES` that is at least `batch`."""
    return next(size for size in BATCH_SIZES if size >= batch)


def _allocate(tensors: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    with torch.inference_mode(False):  # so that calls outside of inference mode can write to these tensors
        return {
            name: torch.empty(shape, dtype=tensors[name].dtype, device=tensors[name].device)
            for name, shape in shapes.items()
        }


def _fill(buffer: Tensor, tensor: Tensor) -> None:
    """Copies a tensor to the front of a buffer, and its last sample to the rest, so that all samples are valid."""
    buffer[: len(tensor)].copy_(tensor)
    if len(buffer) > len(tensor):
        buffer[len(tensor) :].copy_(tensor[-1:].expand_as(buffer[len(tensor) :]))
