"""Times of whole training steps, all methods in turn on the same batches, so that a machine's moods hit all alike."""

import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from importlib.util import find_spec

import numpy as np
import torch
from torch import nn

from ..config import Config
from ..errors import UserError
from ..glue import Tokenised
from ..methods import METHODS, ExampleLosses
from ..runs.run import Ready, make_method, packing_of, peak_memory, prepare
from ..training.backward import Backward
from ..training.batches import epoch_order, pieces
from ..training.device import Outcomes, to
from ..training.loop import parameter_groups

CONTENDERS: dict[str, tuple[str, dict]] = {
    "adamw": ("plain", {}),
    "sam": ("sam", {}),
    "asam": ("asam", {}),
    "per_instance": ("per_instance", {}),
    "per_instance, one by one": ("m_sam", {"m": 1}),
    "dsam probe": ("delta_sam", {"weighting": "probe"}),
    "dsam probe, top 2 layers": ("delta_sam", {"weighting": "probe", "layers": 2}),
    "dsam curvature": ("delta_sam", {"weighting": "curvature"}),
    "dsam gibbs (exact norms)": ("delta_sam", {"weighting": "gibbs", "norms": "exact"}),
    "dsam gap": ("delta_sam", {"weighting": "gap"}),
    "dsam relative_gap": ("delta_sam", {"weighting": "relative_gap"}),
    "dsam gauss_newton": ("delta_sam", {"weighting": "gauss_newton"}),
    "dsam confidence": ("delta_sam", {"weighting": "confidence"}),
    "dsam exact_curvature": ("delta_sam", {"weighting": "exact_curvature"}),
}
"""What is timed: label → (method, options)."""
THEIRS = "sam of pytorch_optimizer"
"""Timed beside them where that package is installed (`pip install pytorch_optimizer`; the tests' extras have it)."""


def contenders() -> list[str]:
    """All that can be timed here."""
    return [*CONTENDERS, *([THEIRS] if find_spec("pytorch_optimizer") else [])]


@dataclass
class Timed:
    """One method's figures over the batches of one setting."""

    name: str
    seconds: float  # a step, the median over rounds of the mean over batches
    passes: float  # forward-backward passes of a step, a no-grad forward being a third
    peak_memory_bytes: int | None  # of a process that takes a few steps of this method alone; None: it died of them


def batches(
    ready: Ready, config: Config, order: np.ndarray, autocast: torch.dtype | None
) -> Iterator[list[ExampleLosses]]:
    """The examples `order` in batches, each cut and moved as the training loop does it. UserError where that cuts
    none."""
    examples, train = ready.data[ready.task.train[0]], config.train
    if train.padding == "free":
        raise UserError("train.padding=free is timed by --what padding and --what throughput, beside the other way")
    for k in range(0, len(order), train.batch_size):
        batch = order[k : k + train.batch_size]
        width = int(examples.lengths[batch].max()) if ready.whole else 1
        parts = pieces(batch, examples.lengths, train, ready.device, by_length=not ready.whole)
        yield [ExampleLosses(ready.network, to(examples.batch(part, width), ready.device), autocast) for part in parts]


def batches_of(config: Config, count: int) -> tuple[nn.Module, torch.device, list[list[ExampleLosses]]]:
    """(model in training mode, device, the first `count` batches of an epoch, each cut as a run would cut it)."""
    ready = prepare(config)
    examples = ready.data[ready.task.train[0]]
    order = epoch_order(len(examples), config.seeds.data, 0)[: count * config.train.batch_size]
    autocast = torch.bfloat16 if config.train.precision == "bfloat16" else None
    return ready.network.train(), ready.device, list(batches(ready, config, order, autocast))


class Stepper:
    """A method's training step: backward, clipping, AdamW, each waited for, without a run's CUDA graphs.

    Steppers of one model may share an `optimizer`, whose state is twice the weights.
    """

    def __init__(self, model: nn.Module, name: str, options: dict, optimizer: torch.optim.Optimizer | None = None):
        self.model = model
        self.params = [p for p in model.parameters() if p.requires_grad]
        self.method = METHODS[name](model, **options)
        self.optimizer = optimizer or torch.optim.AdamW(parameter_groups(model, 0.01), lr=1e-6, fused=True)

    def __call__(self, closures: Sequence[ExampleLosses]) -> float:
        """Seconds of one step."""
        began = time.perf_counter()
        self.method.backward(list(closures))
        nn.utils.clip_grads_with_norm_(self.params, 1.0, self.method.report["gradient_norm"])
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.params[0].device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - began

    @property
    def passes(self) -> float:
        """Forward-backward passes of the latest step, a no-grad forward being a third."""
        return (self.method.report["forwards"] + 2 * self.method.report["backwards"]) / 3


class Steps:
    """A method's steps as a run takes them: batches made, moved and cut, the gradient, clipping, AdamW, with the waits
    for a device and the CUDA graphs that a run has.

    `method`: a name of `METHODS`, with its default options; None: what `config.optimizer` describes. Those of one model
    may share an `optimizer`. `examples`: others than the task's.
    """

    def __init__(
        self,
        config: Config,
        ready: Ready,
        method: str | None = "plain",
        optimizer: torch.optim.Optimizer | None = None,
        examples: Tokenised | None = None,
    ):
        self.device, self.size = ready.device, config.train.batch_size
        model, examples = ready.network.train(), examples or ready.data[ready.task.train[0]]
        self.optimizer = optimizer or torch.optim.AdamW(parameter_groups(model, 0.01), lr=1e-6, fused=True)
        self.outcomes = Outcomes(ready.device)
        made = METHODS[method](model) if method else make_method(config, model)
        packing, notes = packing_of(config, ready, made)
        for note in notes:
            print(note, file=sys.stderr)
        wait = not self.outcomes.later
        self.backward = Backward(config, examples, model, made, ready.device, ready.whole, wait, packing)

    def tokens(self, order: np.ndarray) -> int:
        """That go through the layers for the examples `order`, padding included (what a CUDA graph pads to a multiple
        of 16 is not counted)."""
        lengths = self.backward.examples.lengths
        if self.backward.packing is not None:
            return int(lengths[order].sum())
        batches = [order[k : k + self.size] for k in range(0, len(order), self.size)]
        return sum(len(part) * int(lengths[part].max()) for batch in batches for part in self.backward.parts(batch))

    @property
    def unsteady(self) -> int:
        """Rounds over the same batches before their times are what they stay: a graph is captured by the third."""
        return 1 if self.backward.graphs is None else 3

    def __call__(self, order: np.ndarray) -> float:
        """Seconds for the examples `order`."""
        began = time.perf_counter()
        for step, k in enumerate(range(0, len(order), self.size)):
            self.outcomes.add(step, self.backward(order[k : k + self.size]), self.backward.method.report)
            if self.outcomes.later:
                self.optimizer.found_inf = self.outcomes.found  # type: ignore[attr-defined]
            self.optimizer.step()
            self.optimizer.zero_grad()
            for _ in self.outcomes.read(all_of_them=False):
                pass
        for _ in self.outcomes.read(all_of_them=True):
            pass
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - began


class TheirStepper:
    """The same step by pytorch_optimizer's SAM around the same AdamW, on the same pieces."""

    passes = 2.0

    def __init__(self, model: nn.Module):
        from pytorch_optimizer import SAM  # for comparison only: the library does without

        self.params = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = SAM(parameter_groups(model, 0.01), torch.optim.AdamW, rho=0.05, lr=1e-6, fused=True)

    def __call__(self, closures: Sequence[ExampleLosses]) -> float:
        """Seconds of one step."""
        began = time.perf_counter()
        self._backward(closures)
        self.optimizer.first_step(zero_grad=True)
        self._backward(closures)
        nn.utils.clip_grad_norm_(self.params, 1.0)
        self.optimizer.second_step(zero_grad=True)
        if self.params[0].device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - began

    def _backward(self, closures: Sequence[ExampleLosses]) -> None:
        examples = sum(len(closure) for closure in closures)
        for closure in closures:
            (closure().sum() / examples).backward()


def stepper(model: nn.Module, name: str) -> Stepper | TheirStepper:
    """What takes the steps of the contender `name`."""
    return TheirStepper(model) if name == THEIRS else Stepper(model, *CONTENDERS[name])


def measure(config: Config, names: Sequence[str], batches: int, rounds: int) -> list[Timed]:
    """Times `names` of `contenders()` in one alternating run after a round that does not count."""
    model, _, data = batches_of(config, batches)
    steppers = {name: stepper(model, name) for name in names}
    seconds: dict[str, list[float]] = {name: [] for name in names}
    passes = {}
    for turn in range(rounds + 1):
        print(f"{config.task.name}: round {turn}/{rounds}", file=sys.stderr, flush=True)
        # A method's place in the order changes, so that none always follows the same one.
        for name in [*names[turn % len(names) :], *names[: turn % len(names)]]:
            spent = [steppers[name](closures) for closures in data]
            if turn:
                seconds[name].append(statistics.mean(spent))
            passes[name] = steppers[name].passes
    memory = {name: memory_of(config, name) for name in names}
    return [Timed(name, statistics.median(seconds[name]), passes[name], memory[name]) for name in names]


def memory_of(config: Config, name: str) -> int | None:
    """Peak bytes of a fresh process that takes two steps: a GPU's allocator's, or on a CPU everything resident. None,
    said, where it had not enough: the times that were taken before stay."""
    with process() as apart:
        try:
            return apart.submit(_two_steps, config, name).result()
        except (BrokenProcessPool, torch.OutOfMemoryError):
            print(f"{config.task.name}: {name}'s memory is not known: a process of its own died of it", file=sys.stderr)
            return None


def process(start: Callable | None = None, *arguments) -> ProcessPoolExecutor:
    """A fresh process, which calls `start` first, for work whose memory is measured or may not suffice. Its death, as
    for want of memory, raises BrokenProcessPool."""
    return ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), start, arguments)


def _two_steps(config: Config, name: str) -> int:
    model, device, data = batches_of(config, 2)
    step = stepper(model, name)
    for closures in data:
        step(closures)
    return peak_memory(device)
