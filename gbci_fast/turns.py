"""Calls that change what they are made of: one thread at a time."""

import functools
import threading
from collections.abc import Callable
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

Call = TypeVar("Call", bound=Callable[..., Any])
# Beside their owners, which are copied and pickled as locks cannot be.
_LOCKS: WeakKeyDictionary[Any, threading.RLock] = WeakKeyDictionary()
_LOCKS_LOCK = threading.Lock()


def in_turn(call: Call) -> Call:
    """A pipeline's method that other threads wait for, be it of this pipeline or of another with its scheduler.

    A call sets the scheduler's timesteps, its step counter and its earlier model outputs, and the pipeline's guidance
    scale, which callbacks read and change.
    """

    @functools.wraps(call)
    def wrapper(pipe: Any, *args: Any, **kwargs: Any) -> Any:
        with _lock_of(pipe), _lock_of(pipe.scheduler):
            return call(pipe, *args, **kwargs)

    return wrapper  # type: ignore[return-value]


def _lock_of(owner: Any) -> threading.RLock:
    with _LOCKS_LOCK:
        return _LOCKS.setdefault(owner, threading.RLock())
