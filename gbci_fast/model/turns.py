"""Locks for pipeline calls, which change the pipeline's state: one thread at a time."""

import functools
import os
import threading
from collections.abc import Callable
from typing import Any, Concatenate, ParamSpec, TypeVar
from weakref import WeakKeyDictionary

from gbci_fast.errors import GBCIError

Pipe = TypeVar("Pipe")
Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")
# Not attributes of their owners, because owners are copied and pickled, and locks cannot be.
_LOCKS: WeakKeyDictionary[Any, threading.RLock] = WeakKeyDictionary()
_LOCKS_LOCK = threading.Lock()


def _renew_locks() -> None:
    """Makes new locks in a forked process, where the threads that held the old ones do not exist."""
    global _LOCKS, _LOCKS_LOCK
    _LOCKS, _LOCKS_LOCK = WeakKeyDictionary(), threading.Lock()


os.register_at_fork(after_in_child=_renew_locks)


def in_turn(call: Callable[Concatenate[Pipe, Arguments], Result]) -> Callable[Concatenate[Pipe, Arguments], Result]:
    """Decorates a pipeline's method so that one thread at a time runs it per pipeline and per scheduler.

    A call sets the scheduler's timesteps, its step counter and its earlier model outputs, and the pipeline's guidance
    scale, which callbacks read and change. The decorated method raises GBCIError if a required component is None.
    """

    @functools.wraps(call)
    def wrapper(pipe: Any, *args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        missing = [name for name, part in pipe.components.items() if part is None]
        if missing := [name for name in missing if name not in pipe._optional_components]:
            raise GBCIError(f"the pipeline's {missing[0]} is None; set {' and '.join(missing)} before it is called")
        with _lock_of(pipe), _lock_of(pipe.scheduler):
            return call(pipe, *args, **kwargs)

    return wrapper


def _lock_of(owner: Any) -> threading.RLock:
    with _LOCKS_LOCK:
        return _LOCKS.setdefault(owner, threading.RLock())
