"""How a command that handles many images tells where it is."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

from gbci_fast.jobs.folder import PROGRESS_FOLDER

LINES = 20  # in a log, for the whole job
SILENCE = 60.0  # seconds without a line, at most, while images are done


@contextmanager
def image_progress(verb: str, output: Path) -> Iterator[Callable[[int, int], None]]:
    """A progress bar, or where there is no terminal `LINES` lines and more where these come slowly.

    Says what is finished when it is stopped.

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
