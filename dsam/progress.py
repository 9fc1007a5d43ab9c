"""What a person sees while work goes on: a bar on a terminal, a line now and then in a log."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.table import Column

from .text import duration, filesize


class Bar:
    """Of a training. Context manager; `update` shows step, loss, score, rate (steps/s) and time left."""

    def __init__(self, title: str, total: int, every_seconds: float = 10):
        self.title, self.total, self.every = title, total, every_seconds
        self.console = Console(stderr=True)
        self.score = ""

    def __enter__(self) -> "Bar":
        self.start = self.said = time.monotonic()
        self.first_step: int | None = None
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"),
            TimeRemainingColumn(),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        self.task = self.progress.add_task(self.title, total=self.total, figures="")
        self.progress.start()
        return self

    def __exit__(self, *exc) -> None:
        self.progress.stop()

    def update(self, step: int, loss: float) -> None:
        now = time.monotonic()
        if self.first_step is None:  # how long it took is not known: the training began before the bar was told of it
            self.first_step, self.start = step, now
        passed = now - self.start
        rate = (step - self.first_step) / passed if step > self.first_step and passed > 0 else None
        pace = "" if rate is None else f"  {rate:.3g} steps/s"
        figures = f"loss {loss:.4f}{pace}{self.score}"
        self.progress.update(self.task, completed=step, figures=figures)
        if not self.console.is_terminal and now - self.said >= self.every:
            self.said = now
            left = "" if rate is None else f"  {duration((self.total - step) / rate)} left"
            print(f"{self.title}  step {step}/{self.total}  {figures}{left}", file=sys.stderr, flush=True)

    def evaluated(self, metric: str, score: float) -> None:
        self.score = f"  {metric} {score:.4f}"


class Stages:
    """One bar over all stages, with the time left: on a terminal it moves, in a log it speaks now and then."""

    def __init__(self, title: str, total: int, every_seconds: float = 10):
        self.title, self.total, self.every = title, total, every_seconds
        self.console = Console(stderr=True)
        self.done = self.stage_start = self.planned = 0
        self.stage = ""

    def __enter__(self) -> "Stages":
        self.start = self.said = time.monotonic()
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TaskProgressColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        self.task = self.progress.add_task(self.title, total=self.total)
        self.progress.start()
        return self

    def __exit__(self, *exc) -> None:
        self.progress.stop()

    def enter(self, stage: str, planned: int = 0) -> None:
        """`planned`: the cost that the total holds for a stage whose real cost shows only at its end."""
        self._correct()
        self.stage, self.stage_start, self.planned = stage, self.done, planned
        self.progress.update(self.task, description=f"{self.title}: {stage}")

    def _correct(self) -> None:
        if self.planned:
            self.total += (self.done - self.stage_start) - self.planned
            self.progress.update(self.task, total=self.total)

    def passed(self, forwards: int) -> None:
        self.done += forwards
        self.progress.update(self.task, completed=self.done)
        now = time.monotonic()
        if not self.console.is_terminal and now - self.said >= self.every:
            self.said = now
            share = min(1.0, self.done / self.total)
            left = duration((now - self.start) * (1 / share - 1))
            print(f"{self.title}: {self.stage}  {100 * share:.0f} %  {left} left", file=sys.stderr, flush=True)


class Downloads:
    """Of files, one after the other. On a terminal a bar for each, with bytes, rate and time left; in a log a line for
    each once it is there. Context manager."""

    def __init__(self) -> None:
        self.console = Console(stderr=True)

    def __enter__(self) -> "Downloads":
        self.progress = Progress(
            TextColumn("{task.description}", markup=False, table_column=Column(no_wrap=True, max_width=32)),
            BarColumn(bar_width=12),
            DownloadColumn(table_column=Column(no_wrap=True, min_width=14)),
            TransferSpeedColumn(table_column=Column(no_wrap=True, min_width=10)),
            TimeRemainingColumn(table_column=Column(no_wrap=True, min_width=7)),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        self.progress.start()
        return self

    def __exit__(self, *exc) -> None:
        self.progress.stop()

    @contextmanager
    def file(self, name: str, size: int) -> Iterator[None]:
        """Around the download of one file of `size` bytes; `name` is the repository's and its own."""
        self.task = self.progress.add_task(name.split()[-1], total=size)  # all on one line of 80 columns
        start = time.monotonic()
        yield
        if not self.console.is_terminal:
            self.say(f"{name}: {filesize(size)} in {duration(time.monotonic() - start)}")

    def at(self, size: int) -> None:
        """So many bytes of the file are there."""
        self.progress.update(self.task, completed=size)

    def say(self, line: str) -> None:
        if self.console.is_terminal:  # above the bars
            self.console.print(line, markup=False, highlight=False, soft_wrap=True)
        else:
            print(line, file=sys.stderr, flush=True)
