"""Tasks from data sets of the Hugging Face hub: the Parquet files of their splits at a pinned commit."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from .. import hub
from ..errors import UserError
from ..task import Hub, Task
from . import files
from .split import Split


def fingerprint(task: Task, revision: str | None) -> str:
    """Data set and commit, which is its content. UserError where the revision is no commit."""
    source, commit = _source(task, revision)
    subset = f"/{source.subset}" if source.subset else ""
    return f"hub {source.dataset}{subset}@{commit}"


def read(task: Task, splits: tuple[str, ...], revision: str | None) -> dict[str, tuple[Split, list[str]]]:
    """These splits, from the hub's cache or the hub, each with notes on its rows.

    Raises:
        UserError: files that cannot be had or read, or whose columns or labels are not the task's.
    """
    source, commit = _source(task, revision)
    title = f"data set {source.dataset} at {commit}"
    there = {split: source.split(split) for split in splits}
    choose = functools.partial(_needed, title, source, tuple(there.values()))
    folder, names = hub.snapshot("dataset", source.dataset, commit, choose)
    return {
        split: _read(task, source, split, [folder / n for n in _needed(title, source, (name,), names)])
        for split, name in there.items()
    }


def _source(task: Task, revision: str | None) -> tuple[Hub, str]:
    """(where the task's data are, the commit)."""
    assert task.hub is not None
    commit = task.hub.revision or revision
    setting = "data.revision" if task.hub.revision is None else f"hub.revision of the task '{task.name}'"
    hub.require_commit("dataset", task.hub.dataset, commit, setting)
    assert commit is not None
    return task.hub, commit


def _needed(title: str, source: Hub, splits: tuple[str, ...], names: Iterable[str]) -> list[str]:
    """The files of these splits, as their names are there. UserError where some are missing."""
    names, found = list(names), []
    folder = f"{re.escape(source.subset)}/" if source.subset else "(?:data/)?"
    for split in splits:
        form = re.compile(rf"{folder}{re.escape(split)}(?:-(\d+)-of-(\d+)[^/]*)?\.parquet")
        matches = sorted((match for name in names if (match := form.fullmatch(name))), key=lambda match: match[0])
        counts = {match[2] for match in matches}
        if not matches or len(counts) > 1 or len(matches) != int(matches[0][2] or 1):
            wanted = f"{f'{source.subset}/' if source.subset else ''}{split}-*.parquet"
            lacks = f"{len(matches)} files {wanted} of another number" if matches else f"no file {wanted}"
            others = sorted({name.split("/")[0] for name in names if name.endswith(".parquet") and "/" in name})
            known = f"; folders with Parquet files: {', '.join(others)}" if others and not matches else ""
            raise UserError(
                f"{title} has {lacks}{known}: is it this task's? data=local data.root=DIR takes local files"
            )
        found += [match[0] for match in matches]
    return found


def _read(task: Task, source: Hub, split: str, paths: list[Path]) -> tuple[Split, list[str]]:
    parts, notes = [], []
    for path in paths:
        label, numbered = _labels(task, source, split, path)
        layout = files.Layout(path, source.text or task.text, label)
        as_numbers = {"written": tuple(str(number) for number in range(len(task.labels)))} if numbered else {}
        part, found = files.read(task.model_copy(update=as_numbers), layout)
        parts.append(part)
        notes += found
    if len(parts) == 1:
        return parts[0], notes
    labels = None if any(part.labels is None for part in parts) else np.concatenate([part.labels for part in parts])
    text2 = None if parts[0].sentence2 is None else [text for part in parts for text in part.sentence2 or ()]
    return Split([text for part in parts for text in part.sentence1], text2, labels), notes


def _labels(task: Task, source: Hub, split: str, path: Path) -> tuple[str | None, bool]:
    """(the labels' column, None where they are hidden; whether it holds the labels' numbers instead of their names)."""
    import pyarrow
    import pyarrow.parquet

    try:
        schema = pyarrow.parquet.read_schema(path)
        if split in task.test:
            if split not in task.evaluation or source.label not in schema.names:
                return None, False
            values = pyarrow.parquet.read_table(path, columns=[source.label])[0].to_pylist()
            if all(value in (None, -1) for value in values):
                return None, False
        if source.label not in schema.names:
            return source.label, False  # for `files.read` to report
        names = _class_names(schema, source.label)
        integers = pyarrow.types.is_integer(schema.field(source.label).type)
    except (OSError, pyarrow.ArrowException) as error:
        raise UserError(f"{path} cannot be read as Parquet ({str(error).splitlines()[0]})") from None
    if names is not None and tuple(names) not in (task.labels, task.written):
        raise UserError(f"{path}: labels {tuple(names)} where {task.labels} are expected")
    # Numbers without names are the labels' numbers, unless the task says that numbers are how labels are written.
    written = any(re.fullmatch(r"-?\d+", label) for label in task.as_written)
    return source.label, names is not None or (integers and not task.regression and not written)


def _class_names(schema: Any, column: str) -> list[str] | None:
    """The names of the numbered labels as `datasets` notes them in the file, if it does."""
    try:
        features = json.loads(schema.metadata[b"huggingface"])["info"]["features"]
        names = features[column].get("names")
    except (KeyError, TypeError, ValueError, AttributeError):
        return None
    return names if isinstance(names, list) else None
