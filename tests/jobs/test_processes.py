"""Worker pools: their handling of signals, the time limit of closing, and the message on a dead worker."""

import os
import signal
import time
from concurrent.futures.process import BrokenProcessPool

import pytest

from gbci_fast.jobs.processes import close_pool, how_it_ended, processes_of, worker_pool


@pytest.fixture
def pool():
    pool = worker_pool(1, __name__)
    yield pool
    close_pool(pool, limit=0.1)


def test_a_worker_leaves_signals_to_its_parent(pool):
    pid = pool.submit(os.getpid).result()
    for number in (signal.SIGINT, signal.SIGTERM):
        sent = worker_pool(1, __name__)  # a process other than the parent, to send the signal from
        sent.submit(os.kill, pid, number).result()
        close_pool(sent)
    assert pool.submit(os.getpid).result() == pid


def test_a_worker_ends_where_its_parent_terminates_it(pool):
    pool.submit(os.getpid).result()
    (process,) = processes_of(pool)
    process.terminate()
    process.join(20)
    assert process.exitcode == 1


def test_closing_waits_for_a_call_and_has_a_limit(pool):
    slow = pool.submit(sum, range(20_000_000))
    slow.cancel() or close_pool(pool)
    assert slow.done()
    endless = worker_pool(1, __name__)
    never = endless.submit(signal.pause)
    while not never.running():
        pass
    start = time.monotonic()
    close_pool(endless, limit=0.2)
    assert time.monotonic() - start < 30
    assert isinstance(never.exception(), BrokenProcessPool)


@pytest.mark.parametrize(
    ("end", "said"),
    [
        ((os._exit, 3), "ended with status 3"),
        ((signal.raise_signal, signal.SIGKILL), "was killed by SIGKILL, as where memory runs out"),
        ((signal.raise_signal, signal.SIGSEGV), "crashed (SIGSEGV)"),
    ],
)
def test_what_is_said_of_a_dead_worker(pool, end, said):
    future = pool.submit(*end)
    processes = processes_of(pool)
    with pytest.raises(BrokenProcessPool):
        future.result()
    close_pool(pool)
    assert how_it_ended(processes) == said


def test_nothing_is_known_of_a_pool_that_did_not_start():
    assert how_it_ended([]) == "died (out of memory, or a decoder's crash)"
