"""The study: the oracle over tasks, phases of fine-tuning and batches; resumable, one line of CSV a measurement."""

import itertools
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from .. import glue
from ..config import Config, Train, without_tf32
from ..errors import UserError
from ..files import write_atomically
from ..methods import ExampleLosses, make_weighting
from ..methods.taps import Unsupported
from ..runs.identity import identify
from ..runs.run import Ready, prepare, run, take_up_parent
from ..text import first_line
from ..training.batches import pieces, training_subset
from ..training.device import memory_said
from .oracle import HINDSIGHT, Oracle

BLOCK = 10  # batches of a task and phase in a row
WEIGHTINGS: dict[str, tuple[str, dict]] = {
    "uniform": ("uniform", {}),
    "probe": ("probe", {}),
    "probe (top 2 layers)": ("probe", {"layers": 2}),
    "curvature": ("curvature", {}),
    "gibbs": ("gibbs", {"norms": "exact"}),
    "gap": ("gap", {}),
    "relative_gap": ("relative_gap", {}),
    "gauss_newton": ("gauss_newton", {}),
    "gauss_newton^0.5": ("gauss_newton", {"power": 0.5}),
    "confidence^0.5": ("confidence", {"power": 0.5}),
    "exact_curvature": ("exact_curvature", {}),
    "exact_curvature^0.5": ("exact_curvature", {"power": 0.5}),
    "equalised": ("equalised", {}),
}
"""What is measured: label → (name, options)."""


@dataclass(frozen=True)
class Cell:
    """One batch of one phase of one task's fine-tuning."""

    task: str
    phase: int  # per cent of the fine-tuning
    batch: int


def study(
    configs: Sequence[Config], phases: Sequence[int], rhos, batches: int, batch_size: int, headroom: int, csv_path: Path
) -> None:
    """Measures every cell that `csv_path` does not hold yet and appends its rows. Raises UserError for what cannot be.

    Args:
        configs: one fine-tuning per task; its `checkpoint.keep_at` must hold the phases above 0.
        headroom: on so many of the batches also the best weights in hindsight, which cost B more passes.

    Raises:
        UserError: the file holds one of the tasks measured in another way: another run's weights, radii, batches.
    """
    weightings = {label: make_weighting(name, **options) for label, (name, options) in WEIGHTINGS.items()}
    done = finished_cells(csv_path, configs, rhos, batch_size, headroom)
    cells = [Cell(c.task.name, phase, b) for c in configs for phase in phases for b in range(batches)]
    todo = [cell for cell in cells if cell not in done]
    print(f"{len(cells)} batches: {len(cells) - len(todo)} measured already", flush=True)
    began, ended = time.monotonic(), 0
    # In blocks over all tasks, so that a study that is stopped early is even.
    for start, config, phase in itertools.product(range(0, batches, BLOCK), configs, phases):
        block = range(start, start + BLOCK)
        mine = [c for c in todo if (c.task, c.phase) == (config.task.name, phase) and c.batch in block]
        if not mine:
            continue
        ready, examples = at_phase(config, phase)
        made = {"run": identify(config).id, "seed": config.seed, "batch_size": batch_size}
        for cell in mine:
            closure, parts, wrong = batch_of(cell, ready, examples, batch_size, config.train)
            try:
                with memory_said(ready.device, "take a smaller --batch-size"):
                    oracle = Oracle(closure, rhos, parts, seed=cell.batch, wrong=wrong)
                    rows = oracle.measure(weightings, cell.batch < headroom)
            except Unsupported as error:
                raise UserError(
                    f"{config.model.name} has no exact per-example gradients to measure by: {error}"
                ) from None
            append(csv_path, [vars(cell) | made | row for row in rows])
            ended += 1
            left = (time.monotonic() - began) / ended * (len(todo) - ended)
            print(
                f"{cell.task} at {cell.phase} %, batch {cell.batch + 1}/{batches}; {left / 60:.0f} min left",
                file=sys.stderr,
                flush=True,
            )


def at_phase(config: Config, phase: int) -> tuple[Ready, glue.Tokenised]:
    """(the model after `phase` per cent of the fine-tuning, dropout off, what it is trained on); fine-tunes first where
    that is not done."""
    if phase == 0:
        ready = prepare(without_tf32(config))
        take_up_parent(config, ready)
    else:
        result = run(config)
        folder = identify(config).folder / f"at-{phase}"
        diverged = f"{folder.parent} diverged ({result['diverged']})" if result["status"] == "diverged" else None
        if diverged and not folder.is_dir():
            raise UserError(f"{diverged} before {phase} % of its steps: take a lower train.lr")
        if diverged:
            print(f"note: {diverged}, after the {phase} % of its steps at which it is measured", file=sys.stderr)
        if not folder.is_dir():
            raise UserError(
                f"{folder} is not there: the run was finished without checkpoint.keep_at=[{phase}]; set paths.runs=DIR"
            )
        model = vars(config.model) | {"path": str(folder), "id": None, "revision": None, "architecture": None}
        there = Config.resolved(config.to_dict() | {"model": model})
        ready = prepare(without_tf32(there))
    examples = ready.data[ready.task.train[0]]
    if examples.clean_labels is not None:  # wrong labels that were not trained on have not been fitted
        examples = examples.take(training_subset(len(examples), config.train.max_train_examples, config.seeds.data))
    ready.network.eval()
    return ready, examples


def batch_of(cell: Cell, ready: Ready, examples: glue.Tokenised, size: int, train: Train):
    """(losses, parts, which labels are wrong) of one batch of the training set, drawn for the task and the batch's
    number alone; None for the parts of a model whose outputs depend on padding, and for the last without
    `data.label_noise`."""
    generator = torch.Generator().manual_seed(10_007 * cell.batch + sum(map(ord, cell.task)))
    indices = torch.randperm(len(examples), generator=generator)[:size].numpy()
    batch = {name: value.to(ready.device) for name, value in examples.batch(indices).items()}
    parts = None
    if not ready.whole:
        parts = [p.tolist() for p in pieces(np.arange(len(indices)), examples.lengths[indices], train)]
    wrong = None
    if examples.labels is not None and examples.clean_labels is not None:
        wrong = torch.from_numpy(examples.labels != examples.clean_labels)[indices]
    return ExampleLosses(ready.network, batch), parts, wrong


def finished_cells(
    path: Path, configs: Sequence[Config], rhos: Sequence[float], batch_size: int, headroom: int
) -> set[Cell]:
    """Cells that the file holds, measured as is asked: `append` writes a batch's rows all or none. UserError where it
    holds one of these tasks measured otherwise."""
    if not path.exists():
        return set()
    held = read_rows(path)
    if "run" not in held:
        raise UserError(f"{path} does not say whose weights it measured, so that nothing can join it: set --out DIR")
    if ("wrong" in held) != any(config.data.label_noise for config in configs):
        raise UserError(f"{path} was measured {'with' if 'wrong' in held else 'without'} label noise: set --out DIR")
    cells = set()
    for config in configs:
        own = held[held["task"] == config.task.name]
        here = {
            "run": [identify(config).id],
            "batch_size": [batch_size],
            "rho": sorted({float(f"{rho:.6g}") for rho in rhos}),
        }
        for name, asked in here.items():
            if len(own) and (found := sorted(own[name].unique())) != asked:
                was, now = (", ".join(map(str, values)) for values in (found, asked))
                raise UserError(
                    f"{path} holds {config.task.name} measured with {name} {was}, and this is {now}: set --out DIR"
                )
        for (phase, batch), rows in own.groupby(["phase", "batch"]):
            lacking = {*WEIGHTINGS, *(HINDSIGHT if batch < headroom else [])} - set(rows["weighting"])
            if lacking:
                raise UserError(
                    f"{path} holds {config.task.name}, batch {batch}, without {', '.join(sorted(lacking))}: "
                    "set --out DIR, or the --headroom that it was made with"
                )
            cells.add(Cell(config.task.name, int(phase), int(batch)))
    return cells


def read_rows(path: Path) -> pd.DataFrame:
    """What the file holds, a row per batch, ρ and weighting. UserError where it is missing or cannot be read."""
    try:
        return pd.read_csv(path, dtype={"run": str})
    except (OSError, ValueError) as error:  # pandas' own are ValueErrors
        raise UserError(f"{path} cannot be read: {first_line(error)}") from None


def keep(path: Path, text: str) -> None:
    """Writes a file of the study, whole or not at all. UserError where it cannot."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, text)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}; set --out DIR") from None


def append(path: Path, rows: list[dict]) -> None:
    new = not path.exists()
    lines = [",".join(rows[0])] if new else []
    lines += [
        ",".join(f"{v:.6g}" if isinstance(v, float) else json.dumps(v).strip('"') for v in row.values()) for row in rows
    ]
    # The whole file anew, so that a kill leaves all rows of a batch or none.
    before = "" if new else path.read_text(encoding="utf-8")
    keep(path, before + "\n".join(lines) + "\n")
