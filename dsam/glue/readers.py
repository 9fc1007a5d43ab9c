"""Reads a task's splits from one of three sources: generated here, official local files, the Hugging Face hub."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ..errors import UserError, did_you_mean
from ..task import GLUE_REVISION, Task, shipped
from . import builtin, files, hub
from .split import Split

SOURCES = ("builtin", "local", "hub")


class Splits(dict[str, Split]):
    """Splits by name, and `notes`: lines for the user about rows that are not as many as the official ones."""

    def __init__(self, splits: dict[str, Split], notes: list[str]):
        super().__init__(splits)
        self.notes = notes


def load(
    task: Task,
    source: str,
    root: str | Path | None = None,
    revision: str | None = GLUE_REVISION,
    splits: Sequence[str] | None = None,
) -> Splits:
    """The rows of a task's splits.

    Args:
        source: "builtin", "local" or "hub".
        root: the folder of GLUE's official files, for "local".
        revision: the commit of the hub's data set, for "hub", where the task itself names none.
        splits: which; by default those for training and evaluation.

    Raises:
        UserError: the source does not offer the task or a split, or the data are missing or broken.
    """
    splits = _check(task, source, splits)
    if source == "builtin":
        read: dict[str, tuple[Split, list[str]]] = {split: (_builtin(task, split), []) for split in splits}
    elif source == "local":
        layouts = files.find(task, root, splits)
        read = {split: files.read(task, layout) for split, layout in layouts.items()}
    else:
        read = hub.read(task, splits, revision)
    rows = {split: those for split, (those, _) in read.items()}
    notes = [note for _, found in read.values() for note in found]
    for split, those in rows.items():
        official = task.rows.get(split, len(those))
        if len(those) != official:
            notes.append(f"{task.name} {split}: {len(those)} rows, official {official}")
    return Splits(rows, notes)


def fingerprint(
    task: Task,
    source: str,
    root: str | Path | None = None,
    revision: str | None = GLUE_REVISION,
    splits: Sequence[str] | None = None,
) -> str:
    """What identifies these splits' data, without parsing them: takes `load`'s arguments.

    The generator's version, parameters and seed for "builtin"; the sha256 of the files' bytes for "local", never
    their path; data set and revision for "hub".

    Raises:
        UserError: as `load`, for all that shows without parsing or a network.
    """
    splits = _check(task, source, splits)
    if source == "builtin":
        return builtin.fingerprint(task.name)
    if source == "local":
        return f"local {task.name} {files.digest(files.find(task, root, splits))}"
    return hub.fingerprint(task, revision)


def _check(task: Task, source: str, splits: Sequence[str] | None) -> tuple[str, ...]:
    if source not in SOURCES:
        raise UserError(f"unknown data source '{source}': {did_you_mean(source, SOURCES)}")
    if source not in task.sources:
        if source == "builtin":
            own = ", ".join(name for name, other in shipped().items() if "builtin" in other.sources)
            raise UserError(
                f"task '{task.name}' is not built in: use data=local data.root=DIR or data=hub "
                f"(data=builtin has the tasks {own})"
            )
        if task.builtin:
            raise UserError(f"task '{task.name}' is built in, data={source} does not have it: use data=builtin")
        what = {"local": "files", "hub": "data set of the hub"}[source]
        other = {"local": "hub", "hub": "local data.root=DIR"}[source]
        raise UserError(
            f"task '{task.name}' names no {what} for data={source}: add it to its file, or use data={other}"
        )
    if splits is None:
        return tuple(dict.fromkeys(task.train + task.evaluation))
    for split in splits:
        if split not in task.splits:
            raise UserError(f"task '{task.name}' has no split '{split}': {did_you_mean(split, task.splits)}")
    if len(set(splits)) != len(splits):
        raise UserError(f"task '{task.name}': a split is named twice in {', '.join(splits)}: name each once")
    return tuple(splits)


def _builtin(task: Task, split: str) -> Split:
    sentence1, sentence2, labels = zip(*builtin.generate(task.name)[split], strict=True)
    return Split(
        list(sentence1),
        list(sentence2) if len(task.text) == 2 else None,
        np.array(labels, dtype=np.float32 if task.regression else np.int64),
    )
