"""GLUE from the Hugging Face hub, at a pinned revision, or one line at once where it cannot be reached."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import UserError
from ..task import Task
from ..text import first_line
from .split import Split

if TYPE_CHECKING:  # a second to import, and only runs with data=hub need it
    import datasets

DATASET = "nyu-mll/glue"
REVISION = "bcdcba79d07bc864c1c254ccfcedcce55bcc9a8c"
PATIENCE = 5.0
"""Seconds to wait for the hub's first answer."""


def read(task: Task, splits: tuple[str, ...], revision: str | None) -> dict[str, Split]:
    """These splits, from the local cache of `datasets` where it holds the revision, else downloaded.

    Raises:
        UserError: the hub cannot be reached or does not give the data, or its labels are not the task's.
    """
    import datasets

    names = {split: split.replace("dev", "validation") for split in splits}
    rows = _cached(task, names, revision)
    if rows is None:
        problem = _problem(revision)
        if problem is None:
            try:
                rows = datasets.load_dataset(DATASET, task.name, revision=revision)
            except Exception as error:  # whatever kind: the user needs the way round, not the library's traceback
                problem = f"{type(error).__name__}: {first_line(error, 'no details')}"
        if problem is not None:
            raise UserError(
                f"cannot get {DATASET}/{task.name} from the Hugging Face hub ({problem}): "
                "use data=local data.root=DIR with GLUE's official files"
            )
    assert rows is not None
    return {split: _split(task, split, rows[name]) for split, name in names.items()}


def _cached(task: Task, names: dict[str, str], revision: str | None) -> dict[str, datasets.Dataset] | None:
    """The splits as `datasets` keeps them, or None. Its own loader asks the hub even when all is here."""
    import datasets

    folder = Path(datasets.config.HF_DATASETS_CACHE) / DATASET.replace("/", "___") / task.name / "0.0.0" / str(revision)
    files = {name: folder / f"glue-{name}.arrow" for name in names.values()}
    if not all(file.is_file() for file in files.values()):
        return None
    return {name: datasets.Dataset.from_file(str(file)) for name, file in files.items()}


def _problem(revision: str | None) -> str | None:
    return why_unreachable(f"datasets/{DATASET}/revision/{revision}")


def why_unreachable(path: str) -> str | None:
    """Why the hub does not answer for this path of its API, found out within `PATIENCE`; None if it does."""
    import huggingface_hub

    if huggingface_hub.constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set and the local cache lacks it"
    address = f"{huggingface_hub.constants.ENDPOINT}/api/{path}"
    outcome: list[str | None] = [f"no answer within {PATIENCE:g} s"]

    def ask() -> None:
        try:
            status = huggingface_hub.get_session().get(address, timeout=PATIENCE).status_code
            outcome[0] = None if status < 400 else f"it answered {status}"
        except Exception as error:
            outcome[0] = f"{type(error).__name__}: {first_line(error, 'no details')}"

    # A thread, because looking up a name has no time limit of its own.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(PATIENCE)
    return outcome[0]


def _split(task: Task, split: str, rows: datasets.Dataset) -> Split:
    names = getattr(rows.features["label"], "names", ())
    if tuple(names) != task.labels:
        raise UserError(f"{DATASET}/{task.name}: labels {tuple(names)} where {task.labels} are expected")
    labels: Any = np.asarray(rows["label"][:], dtype=np.float32 if task.regression else np.int64)
    if split in task.test and (labels == -1).all():
        labels = None
    elif not task.regression and not ((labels >= 0) & (labels < len(task.labels))).all():
        raise UserError(f"{DATASET}/{task.name} {split}: row {int(np.argmin(labels))} has no label")
    text = [list(rows[column][:]) for column in ((task.hub and task.hub.text) or task.text)]
    return Split(text[0], text[1] if len(text) == 2 else None, labels)
