"""Pools of worker processes: their start, their handling of signals, and their end."""

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
LIMIT = 60.0  # seconds after which a closing pool is killed
_UNKNOWN = 255  # multiprocessing's exit code for a process of a fork server whose status it could not read


def start_worker() -> None:
    """Initializer of every worker: Ctrl-C and a SIGTERM to the whole process group are left to the parent.

    The worker ends when the parent ends or itself sends SIGTERM. A SIGKILL may leave half a message in the queue of
    results, on which the pool waits for ever.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    parent = parent_process()
    assert parent is not None, "start_worker is called in a worker"
    Thread(target=_end_with, args=(parent,), daemon=True).start()
    Thread(target=_end_by, args=(parent.pid,), daemon=True).start()


def worker_pool(
    workers: int, module: str, initializer: Callable[..., None] = start_worker, initargs: Sequence[Any] = ()
) -> ProcessPoolExecutor:
    """A pool whose processes fork from a server that has imported ``module``: workers start fast, without threads.

    Args:
        workers: number of processes.
        module: importable name of the module to preload.
        initializer: called first in each worker with ``initargs``; it must call `start_worker`.
    """
    context = get_context("forkserver")
    context.set_forkserver_preload([module])
    resource_tracker.ensure_running()  # otherwise the next call starts it, and that unblocks the signals
    with _blocked():  # children inherit blocked signals, so none reaches a worker before `start_worker`
        forkserver.ensure_running()
    return ProcessPoolExecutor(workers, context, initializer=initializer, initargs=tuple(initargs))


def processes_of(pool: ProcessPoolExecutor) -> list[BaseProcess]:
    """The processes that a pool has started so far."""
    return list((pool._processes or {}).values())


def close_pool(pool: ProcessPoolExecutor, limit: float = LIMIT) -> None:
    """Cancels the calls that have not begun and waits for the others; kills the processes after ``limit`` seconds."""
    processes, results = processes_of(pool), pool._result_queue
    closing = Thread(target=pool.shutdown, kwargs={"cancel_futures": True}, daemon=True)
    closing.start()
    closing.join(limit)
    if closing.is_alive():
        for process in processes:
            process.kill()
        results._writer.close()  # the last writing end: a thread that reads half a message then gets end of file
        closing.join()


def how_it_ended(processes: Sequence[BaseProcess]) -> str:
    """A predicate such as "was killed by SIGKILL" on the process of a closed pool that ended abnormally."""
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
        pass  # a signal to the whole group: the parent handles it
    os._exit(1)
