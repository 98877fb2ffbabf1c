"""The progress of a command that handles many images."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

from gbci_fast.jobs.folder import PROGRESS_FOLDER

LINES = 20  # of a log, for a whole job
SILENCE = 60.0  # longest time between two lines while images are done, in seconds


@contextmanager
def image_progress(verb: str, output: Path) -> Iterator[Callable[[int, int], None]]:
    """A progress bar. Without a terminal, `LINES` lines, and more lines if those come slowly.

    After an exception it prints how many images are finished.

    Args:
        verb: what the command does, such as "drawing".
        output: the job's folder.

    Yields:
        ``on_image(done, total)``, to be called once at the start and whenever images are done.
    """
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=True, soft_wrap=True, markup=False, highlight=False)
    columns = (
        TextColumn(verb),
        BarColumn(),
        TextColumn("{task.completed}/{task.total} images"),
        TimeElapsedColumn(),
        TextColumn("{task.fields[pace]}"),
    )
    start: tuple[float, int] | None = None  # seconds, and images done by an earlier run
    count = of = said = 0
    heard = time.monotonic()
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        bar = progress.add_task(verb, total=None, pace="")

        def on_image(done: int, total: int) -> None:
            nonlocal start, count, of, said, heard
            start = start or (time.monotonic(), done)
            count, of, pace = done, total, ""
            if done > start[1]:
                rate = (done - start[1]) / max(time.monotonic() - start[0], 1e-6)
                pace = f"{rate:.3g} images/s, {timedelta(seconds=round((total - done) / rate))} left"
            progress.update(bar, completed=done, total=total, pace=pace)
            due = LINES * done // total > said or time.monotonic() - heard >= SILENCE
            if not console.is_terminal and due:
                said, heard = LINES * done // total, time.monotonic()
                console.print(f"{done}/{total} images  {pace}".rstrip())

        try:
            yield on_image
        except BaseException:
            if count and (output / PROGRESS_FOLDER).exists():
                console.print(f"{count} of {of} images are finished in {output}; --resume continues")
            raise
