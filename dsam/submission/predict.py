"""A finished run's answers to test sets, given only where its weights give the development score that it recorded."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from transformers import PreTrainedTokenizerFast

from .. import glue
from ..config import without_tf32
from ..errors import UserError
from ..task import get_task
from ..training import model as models
from ..training.device import choose_device, memory_said
from ..training.loop import predict
from .choose import WEIGHTS, Run

TOLERANCE = 0.02  # of the development score: other hardware turns an answer or two


@dataclass(frozen=True)
class Prepared:
    """A run and what it is to answer: all that can be wrong with the data has been found."""

    run: Run
    tokenizer: PreTrainedTokenizerFast
    data: dict[str, dict[str, glue.Tokenised]]
    """By task and split."""
    fingerprints: dict[str, str]
    """Of the data, by task."""

    @property
    def examples(self) -> int:
        return sum(len(rows) for splits in self.data.values() for rows in splits.values())


@dataclass(frozen=True)
class Answered:
    """`predictions[task, split]` has shape (N,); `development` is the score that they come to."""

    predictions: dict[tuple[str, str], np.ndarray]
    development: float


def prepare(run: Run, others: Mapping[str, tuple[str, ...]]) -> Prepared:
    """Reads and tokenises the run's development sets and the splits of `others`, by task.

    Raises:
        UserError: data that are missing or broken, or a test set that is not the official one.
    """
    config, source = run.config, run.config.data
    wanted = {run.task: get_task(run.task).evaluation}
    for task, splits in others.items():
        wanted[task] = wanted.get(task, ()) + splits
    tokenizer = models.load_tokenizer(config.model)
    data, fingerprints = {}, {}
    for name, splits in wanted.items():
        task = get_task(name)
        place = {"root": source.root, "revision": source.revision, "splits": splits}
        rows = glue.load(task, source.source, **place)
        for split in task.test:
            if split in rows and len(rows[split]) != task.rows[split]:
                raise UserError(f"{name} {split}: found {len(rows[split])} rows, expected {task.rows[split]}")
        fingerprints[name] = glue.fingerprint(task, source.source, **place)
        data[name] = glue.tokenise(
            task, rows, tokenizer, config.train.max_length, config.paths.cache, fingerprints[name]
        )
    return Prepared(run, tokenizer, data, fingerprints)


def recognise(prepared: Prepared, passed: Callable[[int], None] = lambda examples: None) -> Answered:
    """The answers to the run's own development sets. Calls `passed` with the size of each batch.

    Raises:
        UserError: weights that cannot be read, or do not give the run's development score.
    """
    run, task = prepared.run, get_task(prepared.run.task)
    found = _predictions(prepared, [(task.name, split) for split in task.evaluation], passed)
    metrics = {}
    for split in task.evaluation:
        metrics[split] = glue.compute(task, found[task.name, split], prepared.data[task.name][split].labels)
    score = glue.headline(task, metrics)
    if not abs(score - run.score) <= TOLERANCE:
        raise UserError(
            f"{run.folder}: {WEIGHTS}/ scores {score:.4f} on the development set where the run recorded "
            f"{run.score:.4f}: the weights or the data are not those of the run"
        )
    return Answered(found, score)


def answer(prepared: Prepared, recognised: Answered, passed: Callable[[int], None] = lambda examples: None) -> Answered:
    """All answers, by the weights that `recognise` knew. Calls `passed` with the size of each batch."""
    others = [(name, split) for name, splits in prepared.data.items() for split in splits]
    others = [both for both in others if both not in recognised.predictions]
    return replace(recognised, predictions=recognised.predictions | _predictions(prepared, others, passed))


def _predictions(
    prepared: Prepared, wanted: Sequence[tuple[str, str]], passed: Callable[[int], None]
) -> dict[tuple[str, str], np.ndarray]:
    """By task and split."""
    config = without_tf32(prepared.run.config)
    device = choose_device(config)
    network = models.build(config, get_task(prepared.run.task).num_labels, prepared.tokenizer)
    autocast = torch.bfloat16 if config.train.precision == "bfloat16" else None
    with memory_said(device, "free some, or take --device cpu"):
        network = network.to(device)
        return {
            (name, split): predict(get_task(name), prepared.data[name][split], network, device, autocast, passed)[0]
            for name, split in wanted
        }


def score_on_ax(prepared: Prepared, answered: Answered) -> float | None:
    """Matthews correlation on AX, GLUE's figure for it; None where its labels are not in the data."""
    ax = get_task("ax")
    labels = prepared.data["ax"]["test"].labels
    if labels is None:
        return None
    return glue.compute(ax, answered.predictions["ax", "test"], labels)["matthews_correlation"]
