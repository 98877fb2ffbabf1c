"""Progress of a run: a live bar on a terminal, or plain lines in a log."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn


@contextmanager
def counting(description: str, total: int) -> Iterator[Callable[[], None]]:
    """Shows a bar, or ten lines in a log; yields a function to call after each of `total` items.

    `rich.progress.track` is not used, because its thread outlives an item that fails.
    """
    console, done = Console(), 0
    with Progress(console=console, disable=not (total and console.is_terminal)) as progress:
        task = progress.add_task(description, total=total)

        def advance() -> None:
            nonlocal done
            done += 1
            progress.advance(task)
            if not console.is_terminal and done * 10 // total > (done - 1) * 10 // total:
                print(f"{description} {done}/{total}", flush=True)

        yield advance


class TrainingProgress:
    """Context that shows a run's progress; call `advance` after every step, `log` after every save.

    Args:
        name: of the run.
        start, steps: first step and last step.
        batch: images per step.
        silent: show nothing, since another process reports.
    """

    def __init__(self, name: str, start: int, steps: int, batch: int, silent: bool = False):
        self.silent = silent
        self.name, self.start, self.steps, self.batch = name, start, steps, batch
        self.step, self.losses = start, []
        console = Console()
        self.live = console.is_terminal and not silent
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.completed}/{task.total}  loss {task.fields[loss]:.4f}  {task.fields[rate]:.1f} images/s"),
            TimeRemainingColumn(),
            console=console,
            refresh_per_second=2,
            disable=not self.live,
        )
        self.task = self.bar.add_task(name, total=steps, completed=start, loss=float("nan"), rate=0.0)

    def __enter__(self) -> "TrainingProgress":
        self.began = time.perf_counter()
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    def advance(self, loss: float) -> None:
        """Records a finished step and its mean loss."""
        self.step += 1
        self.losses.append(loss)
        self.bar.update(self.task, completed=self.step, loss=loss, rate=self.batch / self._seconds_per_step())

    def log(self) -> None:
        """Without a bar, prints a line: steps, mean loss since the last line, images/s, time to the end."""
        if not self.live and not self.silent:
            seconds = self._seconds_per_step()
            left = timedelta(seconds=round((self.steps - self.step) * seconds))
            loss = sum(self.losses) / len(self.losses)
            rate = self.batch / seconds
            print(f"{self.name} {self.step}/{self.steps}  loss {loss:.4f}  {rate:.1f} images/s  ETA {left}", flush=True)
        self.losses.clear()

    def _seconds_per_step(self) -> float:
        return (time.perf_counter() - self.began) / (self.step - self.start)
