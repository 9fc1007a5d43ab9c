"""Many runs: planned before the first one starts, each in a process of its own, none able to stop the others."""

import contextlib
import faulthandler
import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from ..config import Config, Launcher
from ..errors import OutOfMemory, Stopped, UserError
from ..runs import lease, manifest
from ..runs.identity import identify
from ..runs.lease import Busy
from ..runs.record import Record
from ..signals import StopSignals
from ..text import counted, duration
from . import estimate, server
from .display import Display
from .planned import STATUSES, Planned, counts, unfinished
from .room import Place, Room, placed

BUSY = 75  # exit status of a run that another process is working on (EX_TEMPFAIL)
OUT_OF_MEMORY = 71  # and of one whose device had not enough of it (EX_OSERR)
GRACE = 60.0  # seconds between asking a run to stop and killing it


def plan(configs: list[Config]) -> list[Planned]:
    """What a sweep would do: each distinct run once, finished ones marked. Reads, and changes nothing."""
    runs: dict[str, Planned] = {}
    for config in configs:
        identity = identify(config)
        if identity.id in runs:
            known = runs[identity.id].config
            if (names := _names(config)) != _names(known):  # one would be missing in the tables
                both = f"{' '.join(_names(known))} and {' '.join(names)}"
                raise UserError(f"{both} have the same settings and so are one run: leave one out")
            one, other = known.checkpoint, config.checkpoint
            for name, value in vars(one).items():
                if value != vars(other)[name]:
                    raise UserError(
                        f"checkpoint.{name} is {value} and {vars(other)[name]} for one and the same run "
                        f"({runs[identity.id].title}): give it one value"
                    )
            continue
        planned = runs[identity.id] = Planned(config, identity)
        if (identity.folder / "result.json").exists():
            result = planned.outcome()
            planned.status = result["status"] if result else "missing"
        elif failure := planned.record.failure():
            planned.status, planned.reason = "failed", failure["reason"]
        if planned.status in ("missing", "failed") and lease.alive(lease.path_in(identity.folder)):
            planned.status = "elsewhere"
    estimate.from_finished(list(runs.values()))
    return list(runs.values())


def _names(config: Config) -> tuple[str, ...]:
    """What tables tell runs apart by, beside their settings."""
    return config.task_label, config.model.name, config.optimizer.name, f"seed={config.seed}"


def parents(configs: list[Config]) -> list[Config]:
    """The runs that these start from."""
    return [Config.resolved(config.parent) for config in configs if config.parent]


def orphans(runs: list[Planned], parents: list[Planned]) -> list[Planned]:
    """The unfinished runs whose parent did not finish, or diverged before its first evaluation: marked as failed, with
    the parent's reason."""
    lost = {r.identity.id: (r, "failed", r.reason) for r in unfinished(parents)}
    for r in parents:
        if r.status == "diverged" and (result := r.record.result()) and not result["best"]:
            lost[r.identity.id] = r, "diverged", result["diverged"]
    found = []
    for r in unfinished(runs):
        of = lost.get(identify(Config.resolved(r.config.parent)).id) if r.config.parent else None
        if of is not None:
            parent, became, reason = of
            r.status, r.reason = "failed", f"the run that it starts from {became}: {parent.title}: {reason}"
            found.append(r)
    return found


def show_plan(runs: list[Planned], workers: int) -> None:
    columns = ("task", "model", "optimizer", "seed", "status", "expected", "memory", "from", "folder")
    table = Table(*columns, box=None, header_style="bold")
    for r in runs:
        c, e = r.config, r.expected
        time_ = "" if e.seconds is None else duration(e.seconds)
        memory = "" if e.memory_bytes is None else f"{e.memory_bytes / 1e9:.1f} GB"
        cells = (c.task_label, c.model.name, c.optimizer.name, str(c.seed), STATUSES[r.status], time_, memory, e.source)
        table.add_row(*cells, str(r.identity.folder))
    Console(width=None if sys.stdout.isatty() else 200).print(table)
    starting = sum(r.status in ("missing", "failed") for r in runs)
    print(f"{counted(len(runs), 'run')}: {counts(runs)}. {starting} would start.")
    if line := estimate.total(runs, workers):
        print(line)


def preflight(runs: list[Planned]) -> None:
    """Loads every distinct data set and model of the runs once, in a process of its own, so that mistakes are found
    before the first starts and the tokenised data are in the cache; learns how large each run is."""
    if not runs:
        return
    try:
        costs = server.call(_survey, [r.config for r in runs])
    except server.Killed:
        raise UserError(
            "loading the data and models was killed, probably for want of memory: take a smaller model, or free some"
        ) from None
    for r, cost in zip(runs, costs, strict=True):
        r.cost = cost


def _survey(configs: list[Config]) -> list[float]:
    """Each run's `Planned.cost`. Prints notes on the data."""
    import torch

    from ..runs.run import make_method, prepare, trained_examples
    from ..runs.tracking import connect
    from ..training import model as models
    from ..training.device import check_devices, find_device
    from ..training.device import notes as notes_of_device
    from ..training.loop import total_steps

    launcher = configs[0].launcher
    if launcher.name == "local" and launcher.per_device != 1 and not launcher.devices:
        raise UserError(
            f"launcher.per_device={launcher.per_device} is a number of runs on each of launcher.devices, which names "
            "none: add launcher.devices=[0], or take launcher.workers=N"
        )
    if launcher.name == "local" and launcher.devices and configs[0].device.name != "cpu":
        check_devices(launcher.devices)
    elif launcher.name == "local":
        distinct = {(c.device, c.train.precision): c for c in configs}.values()
        for config in distinct:
            find_device(config)
        at_once = min(len(configs), launcher.at_once(len(configs)))
        for note in dict.fromkeys(note for config in distinct for note in notes_of_device(config, at_once)):
            print(note, flush=True)
    if any(c.tracking.mode == "online" for c in configs):
        try:
            connect("online")
        except UserError as error:
            print(f"note: {error}; the runs go without W&B, and make wandb-sync uploads them later", flush=True)
    alike: dict[tuple, list[int]] = {}
    for i, c in enumerate(configs):
        model = (c.model.path, c.model.id, c.model.revision, str(c.model.architecture))  # and not its ρ and rate
        key = (c.task.name, str(c.data), *model, c.train.max_length, c.train.dropout, c.selection, c.paths.cache,
               c.device.name)  # fmt: skip
        alike.setdefault(key, []).append(i)
    costs = [0.0] * len(configs)
    for group in alike.values():  # of which one model at a time is in memory
        ready = prepare(configs[group[0]], torch.device("cpu"))  # which has room for all of them
        for note in ready.notes:
            print(note, flush=True)
        network, tokenizer, examples = ready.network, ready.tokenizer, ready.data[ready.task.train[0]]
        del ready
        for c in {(configs[i].train.precision, configs[i].optimizer.method): configs[i] for i in group}.values():
            models.require_precision(c, network, tokenizer)
            models.require_words(c, network, tokenizer)
        work = float(examples.lengths.mean()) * sum(p.numel() for p in network.parameters())
        for i in group:
            c = configs[i]
            make_method(c, network)
            steps = total_steps(c, trained_examples(c, examples))[0] / c.optimizer.steps_factor
            costs[i] = steps * c.train.batch_size * work * estimate.passes(c)
        del network
    return costs


def require_clean(configs: list[Config]) -> None:
    """Raises UserError where a run asks for committed code and the code that would run is not, or may not be."""
    from ..runs.provenance import git

    if not any(c.launcher.require_clean for c in configs):
        return
    dirty = git()["dirty"]
    if dirty is None:
        raise UserError(
            "this code lies in no git repository of its own (or git is missing), and the results could not be traced "
            "to code: run from a clone, or set launcher.require_clean=false"
        )
    if dirty:
        raise UserError(
            "files differ from the last commit, or are new, and the results could not be traced to code: commit first, "
            "or set launcher.require_clean=false"
        )


def work(
    runs: list[Planned],
    name: str,
    command: str,
    run_all: Callable[[list[Planned], Launcher], list[Planned]],
    chosen: Sequence[dict] = (),
    chosen_of: Sequence[Planned] = (),
) -> list[Planned]:
    """One sweep from its plan to its end, with the runs that its own start from first; returns what failed.

    `run_all` is this module's or Slurm's; the latter, with launcher.wait=false, returns before the runs are done.
    """
    launcher, before = runs[0].config.launcher, plan(parents([r.config for r in unfinished(runs)]))
    print(f"{counted(len(runs), 'run')}: {counts(runs)}")
    preflight(unfinished([*before, *runs]))
    grid = [r.identity.id for r in chosen_of]
    manifest.write([r.config for r in runs], [r.identity for r in runs], name, command, chosen, grid)
    failed = []
    if unfinished(before):
        print(f"first {counted(len(before), 'other run')} that they start from: {counts(before)}")
        failed = run_all(before, launcher)
        if unfinished(before) and not failed:  # launcher.wait=false
            print("the same command submits the runs that start from them, once those are finished")
            return []
    lost = orphans(runs, before)
    able = [r for r in runs if r not in lost]
    failed += lost + (run_all(able, launcher) if able else [])
    print(f"{counted(len(runs), 'run')}: {counts(runs)}")
    return failed


def run_all(runs: list[Planned], launcher: Launcher) -> list[Planned]:
    """Starts what is not finished, longest first, as many at once as there is room for, and returns what failed.

    Each run is forked from `server`. One whose process is killed is continued up to `launcher.retries` times; one that
    another sweep is working on is waited for. One whose device was out of memory beside others is tried once more,
    alone on it. Ctrl-C and SIGTERM stop the runs at a checkpoint and leave with 130 or 143.
    """
    waiting = estimate.order(r for r in runs if r.status in ("missing", "failed"))
    elsewhere = [r for r in runs if r.status == "elsewhere"]
    display = Display(runs)
    room = Room(launcher)
    running: dict[Any, _Running] = {}  # by what tells that the process has ended
    stop = StopSignals(patience=None)
    with stop, display:
        while waiting or running or elsewhere:
            while not stop.signum and (next_one := _next(waiting, room)) is not None:
                r, place = next_one
                with contextlib.suppress(OSError):  # an earlier attempt's; where that fails, so does the run
                    (r.identity.folder / "failure.json").unlink(missing_ok=True)
                r.status, r.started, r.attempts = "running", time.monotonic(), r.attempts + 1
                try:
                    process = server.start(_child, r.config, str(r.identity.folder), place.device, place.most)
                except server.Killed as error:
                    room.leave(place)
                    _fail(r, str(error))
                    display.ended(r)
                    continue
                trains = not (r.identity.folder / "result.json").exists()  # else it comes for the weights alone
                running[process.sentinel] = _Running(process, r, place, trains)
                display.show()
            if stop.signum:
                waiting.clear()
                elsewhere.clear()
                for one in running.values():
                    one.stop("")
            for one in running.values():
                one.keep_to(launcher)
            for sentinel in multiprocessing.connection.wait(list(running), timeout=0.5):
                one = running.pop(sentinel)
                room.leave(one.place)
                r = one.run
                one.process.join()
                if stop.signum:  # it may have reached the whole group, and this run before it was asked
                    one.stop("")
                _conclude(one)
                if learnt := room.learn(one.place, one.memory):
                    display.note(learnt)
                if r.status == "elsewhere":
                    elsewhere.append(r)
                elif r.status == "killed" and r.attempts <= launcher.retries and not stop.signum:
                    r.status = "missing"
                    display.note(f"{r.reason}: {r.title}; it goes on from its checkpoint")
                    waiting.insert(0, r)
                elif one.out_of_memory and one.place.most > 1 and not r.alone and not stop.signum:
                    r.status, r.alone = "missing", True
                    fewer = room.lower(one.place)
                    display.note(f"{r.reason}: {r.title}; it is tried once more, alone on its device{fewer}")
                    waiting.append(r)
                elif r.status != "missing":
                    r.status = "failed" if r.status == "killed" else r.status
                    display.ended(r)
            for r in [r for r in elsewhere if not lease.alive(lease.path_in(r.identity.folder))]:
                elsewhere.remove(r)
                result = r.outcome(set_aside=True)
                r.status = result["status"] if result is not None else "missing"
                if result is None:
                    waiting.append(r)
                else:
                    display.ended(r)
            display.show()
    if stop.signum:
        print("stopped; the same command goes on", file=sys.stderr)
        raise SystemExit(128 + stop.signum)
    return [r for r in runs if r.status == "failed"]


def _next(waiting: list[Planned], room: Room) -> tuple[Planned, Place] | None:
    """The run to start now, removed from `waiting`, and where; or None."""
    for r in waiting:
        place = room.take(r.alone)
        if place is not None:
            waiting.remove(r)
            return r, place
    return None


@dataclass
class _Running:
    """A run's process, and why it was asked to stop, if it was."""

    process: BaseProcess
    run: Planned
    place: Place
    trains: bool = True
    why: str = ""
    asked: float | None = None
    out_of_memory: bool = False
    memory: dict[str, int] | None = None  # of its device, as its result has it

    def stop(self, why: str) -> None:
        """Asks once, kindly: the run leaves a checkpoint. Kills what has not gone after a while."""
        if self.asked is None:
            self.why, self.asked = why, time.monotonic()
            self.process.terminate()
        elif time.monotonic() - self.asked > GRACE:
            self.process.kill()

    def keep_to(self, launcher: Launcher) -> None:
        minutes, gigabytes = launcher.minutes, launcher.memory_gb
        if minutes is not None and time.monotonic() - self.run.started > 60 * minutes:
            self.stop(f"no result after launcher.minutes={minutes:g}")
        if gigabytes is not None and not self.why and resident_bytes(self.process.pid) > gigabytes * 1e9:
            self.why = f"memory grew beyond launcher.memory_gb={gigabytes:g}"
            self.process.kill()


def resident_bytes(pid: int | None) -> int:
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    except (OSError, ValueError, IndexError):
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")


def _conclude(one: _Running) -> None:
    """What became of a run, from its record and its process's exit."""
    r, code = one.run, one.process.exitcode
    r.seconds = time.monotonic() - r.started
    result, failure = r.outcome(set_aside=True), r.record.failure()
    if result is not None:
        r.status = result["status"]
        if code == 0 and one.trains:  # it was this process that came to it
            one.memory = result["train"].get("device_memory_bytes")
    elif failure is not None:
        r.status, r.reason = "failed", failure["reason"]
        one.out_of_memory = code == OUT_OF_MEMORY
    elif code == BUSY:
        r.status = "elsewhere"
    elif one.asked is not None and not one.why:  # with the whole sweep; its checkpoint is there
        r.status = "missing"
    else:
        killed = not one.why and code is not None and (code < 0 or code in (128 + signal.SIGTERM, server.GONE))
        _fail(r, one.why or describe_exit(code), "killed" if killed else "failed")


def _fail(r: Planned, reason: str, status: str = "failed") -> None:
    """Here and in the folder of a run that has begun, where the tables look for it."""
    r.status, r.reason = status, reason
    try:
        r.record.write("failure.json", {"reason": reason, "log": str(r.identity.folder / "log.txt")})
    except FileNotFoundError:
        pass
    except OSError as error:  # which may be what it failed of, and could not leave there either
        r.reason = f"{reason}; nothing can be written to its folder: {error.strerror}"


def describe_exit(code: int | None) -> str:
    if code == server.GONE:
        return "killed with the process that it was forked from; out of memory?"
    if code is not None and code < 0:
        name = signal.Signals(-code).name
        return f"killed by signal {-code} ({name})" + ("; out of memory?" if name == "SIGKILL" else "")
    return f"left with status {code} and no result"


def _child(config: Config, folder: str, device: str | None, at_once: int) -> None:
    """The body of a run's own process: everything it prints goes to its log."""
    from ..runs.run import run

    if device is not None:
        config = placed(config, device)
        launcher = config.launcher.model_copy(update={"per_device": at_once})  # which share the cores
        config = config.model_copy(update={"launcher": launcher})
    record = Record(Path(folder))
    with contextlib.suppress(OSError):  # a folder that cannot be written is the run's to report
        record.folder.mkdir(parents=True, exist_ok=True)
        log = os.open(record.folder / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(log, 1)
        os.dup2(log, 2)
        faulthandler.enable()
    try:
        run(config)
    except Busy as busy:
        print(busy, flush=True)
        raise SystemExit(BUSY) from None
    except Stopped as stopped:
        print(stopped, flush=True)
        raise SystemExit(128 + stopped.signum) from None
    except KeyboardInterrupt:  # asked twice, or before it had begun
        raise SystemExit(128 + signal.SIGTERM) from None
    except BaseException as error:
        sys.stderr.flush()
        record.fail(error)
        raise SystemExit(OUT_OF_MEMORY if isinstance(error, OutOfMemory) else 1) from None
