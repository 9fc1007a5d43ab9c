"""What a sweep looks like while it runs."""

import sys
import time
from collections.abc import Sequence

from rich.console import Console
from rich.live import Live
from rich.table import Table

from ..text import duration
from .planned import Planned, counts, unfinished


class Display:
    """A live table on a terminal, a line per ended run elsewhere."""

    def __init__(self, runs: Sequence[Planned]):
        self.runs, self.done = runs, 0
        self.todo = len(unfinished(runs))
        self.work = self.took = 0.0  # of the runs that ended well: in the unit of `weight`, and in seconds
        self.slots = 1  # runs at once, as seen so far
        self.console = Console(stderr=True)
        self.live = Live(console=self.console, auto_refresh=False, transient=True) if self.console.is_terminal else None

    def __enter__(self):
        if self.live:
            self.live.start()
        return self

    def __exit__(self, *exc):
        if self.live:
            self.live.stop()

    def left(self) -> str:
        if not self.work:
            return "time left: unknown until a run has ended"
        pace, now = self.took / self.work, time.monotonic()
        left = [
            max(0.0, pace * weight(r) - (now - r.started if r.status == "running" else 0.0))
            for r in self.runs
            if r.status in ("missing", "running", "elsewhere")
        ]
        # No schedule is shorter than its longest run.
        return f"about {duration(max(sum(left) / self.slots, *left, 0.0))} left"

    def show(self) -> None:
        self.slots = max(self.slots, sum(r.status == "running" for r in self.runs))
        if self.live:
            table = Table("running", "for", box=None, title=f"{counts(self.runs)}; {self.left()}", title_justify="left")
            for r in self.runs:
                if r.status == "running":
                    table.add_row(r.title, duration(time.monotonic() - r.started))
            self.live.update(table, refresh=True)

    def ended(self, r: Planned) -> None:
        self.done += 1
        result = r.record.result()
        if result and r.seconds:  # not one that ended elsewhere
            # One that went on from a checkpoint trained for longer than it ran here.
            self.work, self.took = self.work + weight(r), self.took + max(r.seconds, result["train"]["seconds"])
        line = f"[{self.done}/{self.todo}] {r.status}: {r.title} in {r.seconds:.1f} s"
        if r.status == "failed":
            line += f": {r.reason}"
        elif result and result["best"] and result["best"]["score"] is not None:
            line += f": {result['metric']} {result['best']['score']:.4f}"
        elif r.status == "finished":
            line += ": no score"
        self.note(line if self.live else f"{line}; {self.left()}")

    def note(self, line: str) -> None:
        """One line that stays."""
        if self.live:
            self.console.print(line, markup=False, highlight=False)
        else:
            print(line, file=sys.stderr, flush=True)


def weight(r: Planned) -> float:
    """How much of the sweep's work a run is."""
    return r.cost or 1.0
