"""Where the time of a run goes: a SAM step's parts, and its operators by PyTorch's profiler; evaluation; the start."""

import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.autograd import DeviceType
from torch.nn.utils import clip_grads_with_norm_
from torch.profiler import ProfilerActivity, profile

from ..config import Config
from ..methods import SAM, ExampleLosses
from ..methods.perturbation import perturbed, total_norm
from ..runs.run import make_method, prepare, trained_examples
from ..training.batches import epoch_order
from ..training.loop import evaluate
from .steps import Stepper, batches

OPERATORS = 10  # how many are named
PARTS = ("norm of the ascent", "perturb and restore", "clip", "AdamW")  # of a step, beside its passes


@dataclass
class Share:
    """A part of something longer; medians over rounds."""

    name: str
    seconds: float
    whole: str
    whole_seconds: float


def measure(config: Config, count: int, rounds: int) -> list[Share]:
    """All parts in turn, `rounds` times after a round that does not count; steps on the first `count`
    batches of an epoch."""
    run = _Run(config, count)
    ways: dict[str, Callable[[], float | None]] = {
        "SAM step": run.sam_steps,
        "AdamW step": run.plain_steps,
        "batch": run.make_batches,
        "perturb and restore": run.perturb_and_restore,
        "norm of the ascent": lambda: total_norm(run.ascent),
        "clip": lambda: clip_grads_with_norm_(run.params, 1.0, run.norm),
        "AdamW": run.sam.optimizer.step,
        "evaluation": lambda: evaluate(
            run.ready.task, run.ready.data, run.ready.network, run.ready.device, run.autocast
        ),
        "start": lambda: make_method(config, prepare(config).network),
    }
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for turn in range(rounds + 1):
        print(f"{config.task.name}: shares, round {turn}/{rounds}", file=sys.stderr, flush=True)
        for way, once in ways.items():
            run.set_gradients(of_a_step=way in ("clip", "AdamW"))
            began = time.perf_counter()
            spent = once()
            if run.ready.device.type == "cuda":
                torch.cuda.synchronize()
            if turn:
                seconds[way].append(spent if isinstance(spent, float) else time.perf_counter() - began)
    found = {way: statistics.median(values) for way, values in seconds.items()}
    epoch = found["AdamW step"] * run.steps_per_epoch
    whole = "a SAM step", found["SAM step"]
    batch = "making a batch, beside a step"
    rest = found["SAM step"] - sum(found[name] for name in PARTS)
    return [
        Share(batch, found["batch"], *whole),
        *(Share(name, found[name], *whole) for name in PARTS),
        Share("SAM's two passes (the rest)", rest, *whole),
        Share("evaluation", found["evaluation"], "an epoch of AdamW", epoch),
        Share("data and model to the first step, warm cache", found["start"], "an epoch of AdamW", epoch),
        Share("importing the libraries, once a sweep", _imports(rounds), "an epoch of AdamW", epoch),
        *_operators(run, found["SAM step"], rounds),
    ]


class _Run:
    """A run's data and model, its first batches, and steps over them."""

    def __init__(self, config: Config, count: int):
        self.config, self.ready = config, prepare(config)
        examples = self.ready.data[self.ready.task.train[0]]
        self.order = epoch_order(len(examples), config.seeds.data, 0)[: count * config.train.batch_size]
        self.steps_per_epoch = -(-trained_examples(config, examples) // config.train.batch_size)
        self.autocast = torch.bfloat16 if config.train.precision == "bfloat16" else None
        model = self.ready.network.train()
        self.sam, self.plain = Stepper(model, "sam", {}), Stepper(model, "plain", {})
        self.params = self.sam.params
        self.gradient = [torch.randn_like(p) for p in self.params]
        self.norm = total_norm(self.gradient)
        self.batches = self._batches()
        keeping = _Keeping(model)
        keeping.backward(self.batches[0])
        self.ascent = keeping.ascent_gradient

    def _batches(self) -> list[list[ExampleLosses]]:
        return list(batches(self.ready, self.config, self.order, self.autocast))

    def sam_steps(self) -> float:
        return statistics.mean(self.sam(closures) for closures in self.batches)

    def plain_steps(self) -> float:
        return statistics.mean(self.plain(closures) for closures in self.batches)

    def make_batches(self) -> float:
        began = time.perf_counter()
        self._batches()
        return (time.perf_counter() - began) / len(self.batches)

    def perturb_and_restore(self) -> None:
        with perturbed(self.params, self.ascent, 1e-3):
            pass

    def set_gradients(self, of_a_step: bool) -> None:
        for p, g in zip(self.params, self.gradient, strict=True):
            p.grad = g.clone() if of_a_step else None


class _Keeping(SAM):
    """Keeps the gradient along which it ascends."""

    def descent(self, step, losses, ascent):
        self.ascent_gradient = ascent
        return super().descent(step, losses, ascent)


def _operators(run: _Run, seconds: float, rounds: int) -> list[Share]:
    """The operators that take most of a SAM step's own time, as shares of what the profiler saw (medians over rounds:
    its clock is the wall's, so what interrupts a round falls on the operator that it met); `seconds` a step."""
    rows = [_own_times(run) for _ in range(rounds)]
    times = {name: statistics.median(row.get(name, 0.0) for row in rows) for row in rows for name in row}
    total = sum(times.values())
    most = sorted(times, key=times.get, reverse=True)[:OPERATORS]
    return [Share(f"operator {name}", seconds * times[name] / total, "a SAM step", seconds) for name in most]


def _own_times(run: _Run) -> dict[str, float]:
    """Each operator's own time in `run`'s SAM steps, in microseconds."""
    on_gpu = run.ready.device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities) as seen:
        run.sam_steps()
    which = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    # A GPU's kernels, and annotations on it, are rows of their own beside the operators that have their time already.
    operators = [event for event in seen.key_averages() if event.device_type == DeviceType.CPU]
    return {event.key: getattr(event, which) for event in operators}


def _imports(rounds: int) -> float:
    """Seconds that `import dsam.runs.run` takes in a fresh interpreter, its start included."""
    spent = []
    for turn in range(rounds + 1):
        began = time.perf_counter()
        subprocess.run([sys.executable, "-c", "import dsam.runs.run"], check=True)
        if turn:
            spent.append(time.perf_counter() - began)
    return statistics.median(spent)
