"""Many runs: planned before the first one starts, each in a process of its own, none able to stop the others."""

import contextlib
import json
import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.live import Live
from rich.table import Table

from ..config import Config
from ..errors import UserError
from .identity import Identity, identify
from .record import Record, write_atomically


@dataclass
class Planned:
    """One run of a sweep; its configuration is frozen here."""

    config: Config
    identity: Identity
    status: str = "missing"  # or finished, diverged, failed, running
    reason: str = ""
    started: float = 0.0
    seconds: float = 0.0

    @property
    def title(self) -> str:
        c = self.config
        return f"{c.task.name} {c.model.name} {c.optimizer.name} seed {c.seed} [{self.identity.id}]"

    @property
    def record(self) -> Record:
        return Record(self.identity.folder)


def plan(configs: list[Config]) -> list[Planned]:
    """What a sweep would do: each distinct run once, finished ones marked. Reads, and changes nothing."""
    runs: dict[str, Planned] = {}
    for config in configs:
        identity = identify(config)
        if identity.id in runs:
            continue
        planned = runs[identity.id] = Planned(config, identity)
        if (identity.folder / "result.json").exists():
            result = planned.record.result(set_aside=False)
            planned.status = result["status"] if result else "missing"
        elif planned.record.failure():
            planned.status, planned.reason = "failed", planned.record.failure()["reason"]
    return list(runs.values())


def counts(runs: list[Planned]) -> str:
    number = {s: sum(r.status == s for r in runs) for s in ("finished", "diverged", "failed", "missing", "running")}
    return ", ".join(f"{n} {status}" for status, n in number.items() if n)


def show_plan(runs: list[Planned]) -> None:
    table = Table("task", "model", "optimizer", "seed", "status", "folder", box=None, header_style="bold")
    for r in runs:
        c = r.config
        table.add_row(c.task.name, c.model.name, c.optimizer.name, str(c.seed), r.status, str(r.identity.folder))
    Console(width=None if sys.stdout.isatty() else 160).print(table)
    print(f"{len(runs)} runs: {counts(runs)}. {sum(r.status in ('missing', 'failed') for r in runs)} would start.")


def preflight(runs: list[Planned]) -> None:
    """Loads every distinct data set and model of the runs once, so that mistakes are found before the first starts
    and the tokenised data are in the cache."""
    from .run import prepare

    seen = set()
    for r in runs:
        c = r.config
        key = (c.task.name, str(c.data), str(c.model), c.train.max_length, c.paths.cache)
        if key not in seen:
            seen.add(key)
            for note in prepare(c).notes:
                print(note)


def write_manifest(runs: list[Planned], name: str, command: str) -> Path:
    """`<runs>/.sweeps/<name>.json`: which runs belong to the sweep, so that tables can show what is missing."""
    from .run import hyperparameters

    root = Path(runs[0].config.paths.runs)
    contents = {
        "experiment": name,
        "command": command,
        "runs": [
            {
                "id": r.identity.id,
                "task": r.config.task.name,
                "model": r.config.model.name,
                "optimizer": r.config.optimizer.name,
                "seed": r.config.seed,
                "folder": str(r.identity.folder.relative_to(root)),
                "hyperparameters": hyperparameters(r.config),
            }
            for r in runs
        ],
    }
    path = root / ".sweeps" / f"{name}.json"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps(contents, indent=1))
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}; set paths.runs=DIR") from None
    return path


def run_all(runs: list[Planned], workers: int) -> list[Planned]:
    """Starts what is not finished, `workers` at once, and returns the runs that failed.

    Each run is forked from a server process that has imported torch and transformers and done nothing else: it starts
    at once and inherits no state. Ctrl-C and SIGTERM stop the runs at a checkpoint and leave with 130 or 143.
    """
    todo = [r for r in runs if r.status in ("missing", "failed")]
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["dsam.runs.run", "wandb"])
    display = Display(runs, len(todo))
    waiting, running = list(todo), {}
    stop = _Stop()
    with stop, display:
        while waiting or running:
            while waiting and len(running) < workers and not stop.signum:
                r = waiting.pop(0)
                process = context.Process(target=_child, args=(r.config, str(r.identity.folder)), name=r.identity.id)
                process.start()
                r.status, r.started = "running", time.monotonic()
                running[process.sentinel] = process, r
                display.show()
            if stop.signum:
                waiting.clear()
                for process, _ in running.values():
                    process.terminate()
            for sentinel in multiprocessing.connection.wait(list(running), timeout=0.5):
                process, r = running.pop(sentinel)
                process.join()
                _conclude(r, process.exitcode)
                display.ended(r)
            display.show()
    if stop.signum:
        print("stopped; the same command goes on", file=sys.stderr)
        raise SystemExit(128 + stop.signum)
    return [r for r in runs if r.status == "failed"]


def _conclude(r: Planned, exit_code: int | None) -> None:
    """What became of a run, from its record and its process's exit."""
    r.seconds = time.monotonic() - r.started
    result = r.record.result()
    if result is not None:
        r.status = result["status"]
        return
    failure = r.record.failure()
    if failure is None:
        failure = {"reason": describe_exit(exit_code), "log": str(r.identity.folder / "log.txt")}
        r.record.write("failure.json", failure)
    r.status, r.reason = "failed", failure["reason"]


def describe_exit(code: int | None) -> str:
    if code is not None and code < 0:
        name = signal.Signals(-code).name
        return f"killed by signal {-code} ({name})" + ("; out of memory?" if name == "SIGKILL" else "")
    return f"left with status {code} and no result"


def _child(config: Config, folder: str) -> None:
    """The body of a run's own process: everything it prints goes to its log."""
    from ..training.loop import Stopped
    from .run import run

    _die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the sweep passes on one SIGTERM
    record = Record(Path(folder))
    record.folder.mkdir(parents=True, exist_ok=True)
    log = os.open(record.folder / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(log, 1)
    os.dup2(log, 2)
    try:
        run(config)
    except Stopped as stopped:
        print(stopped, flush=True)
        raise SystemExit(128 + stopped.signum) from None
    except BaseException as error:
        sys.stderr.flush()
        record.fail(error)
        raise SystemExit(1) from None


def _die_with_parent() -> None:
    """A run does not outlive its sweep: the kernel sends SIGTERM when the server process goes (Linux only)."""
    import ctypes

    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)


@dataclass
class _Stop:
    signum: int | None = None
    earlier: dict = field(default_factory=dict)

    def __enter__(self):
        for signum in (signal.SIGTERM, signal.SIGINT):
            self.earlier[signum] = signal.signal(signum, lambda number, frame: setattr(self, "signum", number))
        return self

    def __exit__(self, *exc):
        for signum, handler in self.earlier.items():
            signal.signal(signum, handler)


class Display:
    """A live table on a terminal, a line per ended run elsewhere."""

    def __init__(self, runs: list[Planned], todo: int):
        self.runs, self.todo, self.done = runs, todo, 0
        self.console = Console(stderr=True)
        self.begin = time.monotonic()
        self.live = Live(console=self.console, auto_refresh=False, transient=True) if self.console.is_terminal else None

    def __enter__(self):
        if self.live:
            self.live.start()
        return self

    def __exit__(self, *exc):
        if self.live:
            self.live.stop()

    def left(self) -> str:
        if not self.done:
            return "time left: unknown until a run has ended"
        return f"about {(time.monotonic() - self.begin) / self.done * (self.todo - self.done):.0f} s left"

    def show(self) -> None:
        if self.live:
            table = Table("running", "for", box=None, title=f"{counts(self.runs)}; {self.left()}", title_justify="left")
            for r in self.runs:
                if r.status == "running":
                    table.add_row(r.title, f"{time.monotonic() - r.started:.0f} s")
            self.live.update(table, refresh=True)

    def ended(self, r: Planned) -> None:
        self.done += 1
        line = f"[{self.done}/{self.todo}] {r.status}: {r.title} in {r.seconds:.1f} s"
        if r.status == "failed":
            line += f": {r.reason}"
        elif (result := r.record.result()) and result["best"]:
            line += f": {result['metric']} {result['best']['score']:.4f}"
        if self.live:
            self.console.print(line, markup=False, highlight=False)
        else:
            print(f"{line}; {self.left()}", file=sys.stderr, flush=True)
