"""How long and how large a run will be: from finished runs of the plan, from its arithmetic, or from a few steps."""

import contextlib
import json
import statistics
import tempfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

from ..config import Config, made
from ..errors import OutOfMemory
from ..text import counted, duration
from . import server
from .planned import Expected, Planned, unfinished
from .room import placed

WARM_UP, MEASURED = 2, 4  # steps of a short measurement
# What does not change a step's cost.
FREE = ("lr", "weight_decay", "warmup_ratio", "betas", "eps", "dropout", "max_grad_norm")


def setting(config: Config) -> tuple:
    """Runs with equal settings train equal models on equally many batches of the same sizes, by as many threads."""
    train = {k: v for k, v in config.train.model_dump().items() if k not in FREE}
    model = config.model.model_dump(exclude={"rho", *FREE})
    device = config.device.name, config.device.threads
    return config.task.name, str(config.data), config.selection, json.dumps(model), *device, json.dumps(train)


def kind(config: Config) -> tuple:
    """Runs of one kind differ in seed and in what does not change the cost."""
    options = {k: v for k, v in config.optimizer.options.items() if k not in ("rho", "mask")}
    return *setting(config), config.optimizer.method, config.optimizer.steps_factor, json.dumps(options)


def passes(config: Config) -> float:
    """Forward-backward passes per step of the recipe: a method's own, times how many steps it takes for one."""
    return made(config.optimizer.method, tuple(config.optimizer.options.items())).passes * config.optimizer.steps_factor


def from_finished(runs: Sequence[Planned]) -> None:
    """Fills in `expected` of the unfinished runs: the median of finished ones of their kind, or, scaled by the passes,
    of other methods' in the same setting."""
    same: dict[tuple, list[dict]] = {}
    others: dict[tuple, list[tuple[float, int]]] = {}
    for r in runs:
        result = r.record.result(set_aside=False) if r.done else None
        if result is not None and result["status"] == "finished":
            r.expected = Expected(result["train"]["seconds"], result["train"]["peak_memory_bytes"], "this run")
            same.setdefault(kind(r.config), []).append(result["train"])
            others.setdefault(setting(r.config), []).append(
                (result["train"]["seconds"] / passes(r.config), result["train"]["peak_memory_bytes"])
            )
    for r in runs:
        if r.expected.seconds is not None:
            continue
        if trained := same.get(kind(r.config)):
            seconds = statistics.median(t["seconds"] for t in trained)
            r.expected = Expected(seconds, max(t["peak_memory_bytes"] for t in trained), "runs like it")
        elif likewise := others.get(setting(r.config)):
            seconds = statistics.median(s for s, _ in likewise) * passes(r.config)
            r.expected = Expected(seconds, max(m for _, m in likewise), "other methods' runs")


def order(runs: Iterable[Planned]) -> list[Planned]:
    """Longest first, by the expected seconds; the arithmetic (`cost`) stands in, on the same scale, where they are
    unknown."""
    runs = list(runs)
    known = [r.expected.seconds / r.cost for r in runs if r.expected.seconds is not None and r.cost]
    rate = statistics.median(known) if known else 1.0
    return sorted(runs, key=lambda r: -(r.expected.seconds if r.expected.seconds is not None else rate * r.cost))


def measure(runs: Sequence[Planned]) -> None:
    """A few steps of each kind of run of which nothing is known, each in a process of its own, on the first of
    launcher.devices."""
    unknown: dict[tuple, list[Planned]] = {}
    for r in runs:
        if r.expected.seconds is None and not r.done:
            unknown.setdefault(kind(r.config), []).append(r)
    for number, group in enumerate(unknown.values(), 1):
        print(f"measuring {number}/{len(unknown)}: {group[0].title}", flush=True)
        try:
            seconds, memory = server.call(_few_steps, group[0].config)
        except server.Killed:
            print(f"{group[0].title}: the measurement was killed, probably for want of memory", flush=True)
            continue
        except (OutOfMemory, Diverged) as error:
            print(f"{group[0].title}: {error}", flush=True)
            continue
        for r in group:
            r.expected = Expected(seconds, memory, "measured")


class _Enough(Exception):
    """The measurement is over."""


class Diverged(Exception):
    """The training ended before its steps could be timed."""


def _few_steps(config: Config) -> tuple[float, int]:
    """(seconds of training, peak memory in bytes) of the whole run, from its first steps."""
    from ..runs.run import make_method, packing_of, peak_memory, prepare, trained_examples
    from ..training.checkpoint import Checkpoints
    from ..training.device import check_devices, memory_said
    from ..training.loop import fine_tune, total_steps

    if config.launcher.devices and config.device.name != "cpu":
        check_devices(config.launcher.devices)
        config = placed(config, config.launcher.devices[0])
    ready = prepare(config)
    method = make_method(config, ready.network)
    total = total_steps(config, trained_examples(config, ready.data[ready.task.train[0]]))[0]
    times: list[float] = []

    def note() -> None:
        times.append(time.perf_counter())
        if len(times) == 2:
            raise _Enough

    first = min(WARM_UP, total - 1) if total > 1 else 0
    last = min(WARM_UP + MEASURED, total)
    if first == 0:
        times.append(time.perf_counter())
    with (
        tempfile.TemporaryDirectory(prefix="dsam-") as folder,
        contextlib.suppress(_Enough),
        memory_said(ready.device),
    ):
        ended = fine_tune(
            config,
            ready.task,
            ready.data,
            ready.network,
            method,
            ready.device,
            Checkpoints(Path(folder)),
            log=lambda line: None,
            resume=lambda state: None,
            phases={step: [note] for step in (first, last) if step},
            whole=ready.whole,
            packing=packing_of(config, ready, method)[0],
        )
        if len(times) < 2:
            raise Diverged(f"nothing was measured, as the training ends early: {ended.diverged}")
    return (times[1] - times[0]) / (last - first) * total, peak_memory(ready.device)


def total(runs: Sequence[Planned], workers: int) -> str:
    """One sentence on what the unfinished runs will take."""
    todo = unfinished(runs)
    known = [r.expected.seconds for r in todo if r.expected.seconds is not None]
    if not todo:
        return ""
    if not known:
        return "No run like these is finished: launcher.measure=true times a few steps of each kind."
    seconds = sum(known)
    # No schedule is shorter than its longest run.
    wall = max(seconds / workers, *known, 0.0)
    text = f"About {seconds / 3600:.2f} h of training, {duration(wall)} on {counted(workers, 'worker')}"
    missing = len(todo) - len(known)
    return text + (
        f"; {counted(missing, 'run')} of unknown length not counted (launcher.measure=true)." if missing else "."
    )
