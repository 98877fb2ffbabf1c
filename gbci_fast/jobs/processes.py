"""Pools of worker processes: how they start, what they make of signals, and how they end."""

import os
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import forkserver, get_context, parent_process, resource_tracker
from multiprocessing.process import BaseProcess
from threading import Thread
from typing import Any

SIGNALS = {signal.SIGINT, signal.SIGTERM}
LIMIT = 60.0  # seconds that a pool has to end
_UNKNOWN = 255  # what multiprocessing says of a process of a fork server whose status it could not read


def start_worker() -> None:
    """What every worker does first: it leaves Ctrl-C and a polite kill of the whole group to the parent.

    It ends with the parent, and when the parent terminates it: a worker that was killed would leave a pool, whose queue
    of results ends in half a message, waiting.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    parent = parent_process()
    assert parent is not None, "start_worker is called in a worker"
    Thread(target=_end_with, args=(parent,), daemon=True).start()
    Thread(target=_end_by, args=(parent.pid,), daemon=True).start()


def worker_pool(
    workers: int, module: str, initializer: Callable[..., None] = start_worker, initargs: Sequence[Any] = ()
) -> ProcessPoolExecutor:
    """A pool whose processes fork from a server that has imported `module`: quick to start, and without threads.

    Args:
        initializer: calls `start_worker`.
    """
    context = get_context("forkserver")
    context.set_forkserver_preload([module])
    resource_tracker.ensure_running()  # which the next call would do first, and that unblocks the signals
    with _blocked():  # a process blocks what the one that started it does: nothing reaches a worker before it starts
        forkserver.ensure_running()
    return ProcessPoolExecutor(workers, context, initializer=initializer, initargs=tuple(initargs))


def processes_of(pool: ProcessPoolExecutor) -> list[BaseProcess]:
    """The processes that a pool has started."""
    return list((pool._processes or {}).values())


def close_pool(pool: ProcessPoolExecutor, limit: float = LIMIT) -> None:
    """Cancels the calls that have not begun, and waits for the others; kills what takes longer than `limit` seconds."""
    processes, results = processes_of(pool), pool._result_queue
    closing = Thread(target=pool.shutdown, kwargs={"cancel_futures": True}, daemon=True)
    closing.start()
    closing.join(limit)
    if closing.is_alive():
        for process in processes:
            process.kill()
        results._writer.close()  # the last end that can write: whoever reads half a message sees its end
        closing.join()


def how_it_ended(processes: Sequence[BaseProcess]) -> str:
    """What became of the first of the processes of a closed pool that ended by itself, as a predicate."""
    codes = sorted(process.exitcode for process in processes if process.exitcode)
    if not codes or codes[0] == _UNKNOWN:
        return "died (out of memory, or a decoder's crash)"
    if codes[0] > 0:
        return f"ended with status {codes[0]}"
    name = signal.Signals(-codes[0]).name
    return f"was killed by {name}, as where memory runs out" if name == "SIGKILL" else f"crashed ({name})"


@contextmanager
def _blocked() -> Iterator[None]:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _end_with(parent: BaseProcess) -> None:
    parent.join()
    os._exit(1)


def _end_by(parent: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass  # to the group, which the parent answers
    os._exit(1)
