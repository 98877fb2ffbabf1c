"""A stand-in for the recorder of CUDA graphs (`gbci_fast.fast.graph`)."""

import contextlib

import pytest


class Rerun:
    """Replays by calling the loop again, on the CPU. Counts recordings, and detects turns that overlap."""

    def __init__(self):
        self.recorded = self.replayed = self.inside = 0

    def record(self, loop):
        self.recorded += 1
        loop()

        def replay():
            self.replayed += 1
            return loop()

        return replay

    @contextlib.contextmanager
    def turn(self):
        assert self.inside == 0
        self.inside += 1
        try:
            yield
        finally:
            self.inside -= 1


@pytest.fixture
def recorder():
    """A `Rerun`."""
    return Rerun()
