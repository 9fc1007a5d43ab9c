"""What each of the study's weightings takes beside SAM: whole backward passes, in turn on the study's batches."""

import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
import torch

from ..config import Config
from ..methods import SAM, DeltaSAM
from ..runs.identity import identify
from ..runs.run import Ready, prepare
from ..training.device import memory_said
from .study import WEIGHTINGS, Cell, batch_of, keep, read_rows

ROUNDS, BATCHES = 3, 2


def measure(configs: Sequence[Config], batch_size: int, path: Path) -> None:
    """Times the tasks that `path` does not hold for these runs and batches, dropout on, and writes its rows: task, run,
    batch_size, weighting, seconds (the median over rounds of the mean over batches), and extra, the share by which they
    exceed SAM's."""
    done = read_rows(path) if path.exists() else pd.DataFrame()
    for config in configs:
        made = {"task": config.task.name, "run": identify(config).id, "batch_size": batch_size}
        of_this = done["task"] == made["task"] if len(done) else pd.Series(dtype=bool)
        if not len(done) or not (done.reindex(columns=list(made))[of_this] == pd.Series(made)).all(axis=1).any():
            rows = pd.DataFrame([made | row for row in of_task(config, batch_size)])
            done = pd.concat([done[~of_this], rows]) if len(done) else rows
            keep(path, done.to_csv(index=False, float_format="%.4g"))


def of_task(config: Config, batch_size: int) -> list[dict]:
    """weighting, seconds, extra: one alternating run over all weightings, after a round that does not count."""
    ready = prepare(config)
    with memory_said(ready.device, "take a smaller --batch-size"):
        return _times(config, ready, batch_size)


def _times(config: Config, ready: Ready, batch_size: int) -> list[dict]:
    model, examples = ready.network.train(), ready.data[ready.task.train[0]]
    closures = [
        batch_of(Cell(config.task.name, 0, k), ready, examples, batch_size, config.train)[0] for k in range(BATCHES)
    ]
    methods = {
        label: SAM(model) if name == "uniform" else DeltaSAM(model, weighting=name, **options)
        for label, (name, options) in WEIGHTINGS.items()
    }
    seconds: dict[str, list[float]] = {label: [] for label in methods}
    for turn in range(ROUNDS + 1):
        print(f"{config.task.name}: times, round {turn}/{ROUNDS}", file=sys.stderr, flush=True)
        labels = list(methods)
        for label in [*labels[turn % len(labels) :], *labels[: turn % len(labels)]]:
            began = time.perf_counter()
            for closure in closures:
                methods[label].backward(closure)
                model.zero_grad()
            if ready.device.type == "cuda":
                torch.cuda.synchronize()
            if turn:
                seconds[label].append((time.perf_counter() - began) / len(closures))
    medians = {label: statistics.median(values) for label, values in seconds.items()}
    sam = medians["uniform"]
    return [{"weighting": label, "seconds": spent, "extra": spent / sam - 1} for label, spent in medians.items()]
