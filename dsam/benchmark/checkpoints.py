"""What a checkpoint costs a run: seconds that its training waits, and how much slower its steps are meanwhile."""

import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from ..config import Config
from ..runs.run import prepare
from ..training.batches import epoch_order
from ..training.checkpoint import Checkpoints
from .steps import Steps


@dataclass
class Saved:
    """What one checkpoint takes, in AdamW's training: medians, in seconds."""

    bytes: int  # on disk: weights and two moments
    waited: float  # by the training, which goes on once the state is copied
    written: float  # until the end of the step in which it was on disk, the training going on beside it
    lost: float  # by the training in all: the copy, and what its steps took longer until then
    at_once: float  # copied and written while the training waits
    step: float  # with no checkpoint beside it


def measure(config: Config, count: int, rounds: int) -> list[Saved]:
    """In turn: steps over the first `count` batches of an epoch, a checkpoint with such steps beside it, and one that
    is waited for; `rounds` times after one that does not count. They are written where TMPDIR says."""
    ready = prepare(config)
    steps = Steps(config, ready)
    order = epoch_order(len(ready.data[ready.task.train[0]]), config.seeds.data, 0)[: count * config.train.batch_size]
    batches = [order[k : k + steps.size] for k in range(0, len(order), steps.size)]
    found: list[dict[str, float]] = []
    with tempfile.TemporaryDirectory(prefix="dsam-") as folder, Checkpoints(Path(folder)) as checkpoints:
        for turn in range(1 - steps.unsteady, rounds + 1):
            print(f"{config.task.name}: checkpoints, round {max(turn, 0)}/{rounds}", file=sys.stderr, flush=True)
            figures = _turn(steps, batches, ready.network, checkpoints, turn)
            found += [figures] if turn > 0 else []
        size = next(Path(folder).glob("*.pt")).stat().st_size
    return [Saved(size, **{name: statistics.median(figures[name] for figures in found) for name in found[0]})]


def _turn(steps: Steps, batches, network, checkpoints: Checkpoints, turn: int) -> dict[str, float]:
    """The figures of one checkpoint beside steps and one that is waited for."""
    step = statistics.mean(steps(batch) for batch in batches)
    state = {"model": network.state_dict(), "optimizer": steps.optimizer.state_dict()}
    began = time.perf_counter()
    checkpoints.save(turn, state)
    waited = time.perf_counter() - began
    taken = 0
    while checkpoints.writing():
        steps(batches[taken % len(batches)])
        taken += 1
    written = time.perf_counter() - began
    began = time.perf_counter()
    checkpoints.save(turn, state)
    checkpoints.wait()
    at_once = time.perf_counter() - began
    return dict(waited=waited, written=written, lost=written - taken * step, at_once=at_once, step=step)
