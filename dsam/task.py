"""What a task is: where its examples lie, which columns they have, how they are labelled and measured.

Each is one file of `conf/task/`, GLUE's own in the same form as a user's.
"""

import functools
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import yaml
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from .errors import UserError, did_you_mean

METRICS = ("accuracy", "f1", "f1_macro", "matthews_correlation", "pearson", "spearman")
"""What `dsam.glue.metrics` knows: f1 is that of label 1, f1_macro the mean over the labels."""

GENERATED = ("agreement", "entailment", "majority", "similarity")
"""What `dsam.glue.builtin` makes."""

HELD_OUT = "heldout"
"""The split that a run with selection=heldout makes of the training set."""

GLUE = "nyu-mll/glue"
"""The hub's data set with GLUE's tasks."""
GLUE_REVISION = "bcdcba79d07bc864c1c254ccfcedcce55bcc9a8c"
"""Its commit that conf/data/hub.yaml names."""
SUFFIXES = (".tsv", ".csv", ".jsonl", ".json", ".parquet")
SHIPPED = Path(__file__).parent.parent / "conf" / "task"

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.+-]*$")]
Texts = Annotated[tuple[str, ...], Field(min_length=1, max_length=2)]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class File(_Part):
    """One file of a split, below data.root; what is not said here is as the task says it."""

    path: str
    header: tuple[str, ...] | None = None
    """The columns of a .tsv or .csv file that has no header line."""
    text: Texts | None = None
    label: str | None = None
    """The labels' column. Without it those of a test split are hidden, whatever columns its file has."""


class Hub(_Part):
    """A data set of the Hugging Face hub that keeps its splits in Parquet files."""

    dataset: str
    subset: str | None = None
    """The folder of its files in the data set; None: they are at the top, or in data/."""
    revision: str | None = None
    """A commit; None: data.revision, which is GLUE's."""
    text: Texts | None = None
    label: str = "label"
    splits: dict[str, str] = {}
    """Our split -> its name there, where they differ (dev: validation)."""

    def split(self, name: str) -> str:
        return self.splits.get(name, name)


class Task(_Part):
    """One task. Labels are numbered in their order here; a task with `score_range` is a regression and has none."""

    name: Name
    title: str = ""
    labels: tuple[str, ...] = ()
    score_range: tuple[float, float] | None = None
    metrics: Annotated[tuple[str, ...], Field(min_length=1)]
    headline: tuple[str, ...] = ()
    """The metrics whose mean is the task's score; by default all."""
    text: Texts
    """The text's columns: one, or two for a pair. One with braces is put together, as in "{word}: {sentence}"."""
    label: str = "label"
    written: tuple[str, ...] = ()
    """How the files write the labels, in their order; by default as they are named."""
    files: dict[str, str | File | Annotated[tuple[str | File, ...], Field(min_length=1)]] = {}
    """Split -> its file below data.root; of several, the first that is there."""
    incomplete_rows: Annotated[int, Field(ge=0)] = 0
    """Rows of a .tsv or .csv file with columns or label missing that are left out, and said; one more is an error."""
    hub: Hub | None = None
    builtin: bool = False
    """Generated here (`dsam.glue.builtin`)."""
    rows: dict[str, int] = {}
    """Official number of rows of each split, where there is one; others are reported."""
    train: Annotated[tuple[str, ...], Field(max_length=1)] = ("train",)
    evaluation: Annotated[tuple[str, ...], Field(min_length=1)] = ("dev",)
    test: tuple[str, ...] = Field(
        default_factory=lambda given: () if "test" in given.get("evaluation", ()) else ("test",)
    )
    """Splits without labels: "test", unless it serves for evaluation. A file's own `label` is read all the same."""

    @model_validator(mode="after")
    def _consistent(self) -> "Task":
        if bool(self.labels) == bool(self.score_range):
            raise ValueError("needs either labels (a classification) or score_range (a regression)")
        if self.labels and len(self.labels) < 2:
            raise ValueError(f"labels={list(self.labels)} must be two or more")
        if len(set(self.labels)) < len(self.labels):
            raise ValueError(f"labels={list(self.labels)} must differ")
        if self.score_range and not -math.inf < self.score_range[0] < self.score_range[1] < math.inf:
            raise ValueError(f"score_range={list(self.score_range)} must be finite and rise")
        if self.written and len(set(self.written)) != len(self.labels):
            raise ValueError(
                f"written={list(self.written)} must be as many different texts as {len(self.labels)} labels"
            )
        for metric in (*self.metrics, *self.headline):
            if metric not in METRICS:
                raise ValueError(f"unknown metric '{metric}'; {did_you_mean(metric, METRICS)}")
            if (metric in ("pearson", "spearman")) != self.regression:
                kind = "regression" if self.regression else "classification"
                raise ValueError(f"metric '{metric}' is none of a {kind}")
            if metric == "f1" and len(self.labels) != 2:
                raise ValueError(f"f1 is that of label 1 of two; with {len(self.labels)} labels take f1_macro")
        if strange := set(self.headline) - set(self.metrics):
            raise ValueError(f"headline '{min(strange)}' is not among metrics={list(self.metrics)}")
        if self.builtin and self.name not in GENERATED:
            raise ValueError(f"is built in, and only {', '.join(GENERATED)} are")
        if self.builtin == bool(self.files or self.hub):
            raise ValueError("needs files or hub" if not self.builtin else "is built in: it has neither files nor hub")
        if both := sorted({*self.train} & {*self.evaluation}):
            raise ValueError(f"evaluation names '{both[0]}', which is trained on: take another split, or "
                             "selection=heldout, which keeps a part of the training set")  # fmt: skip
        if len(set(self.evaluation)) < len(self.evaluation):
            raise ValueError(f"evaluation={list(self.evaluation)} names a split twice")
        known = {*self.train, *self.evaluation, *self.test}
        if HELD_OUT in known:
            raise ValueError(f"'{HELD_OUT}' is what selection=heldout calls its part of the training set: name the "
                             "split otherwise")  # fmt: skip
        for split in (*self.files, *self.rows, *(self.hub.splits if self.hub else ())):
            if split not in known:
                raise ValueError(f"unknown split '{split}'; {did_you_mean(split, known)}")
        for split in (*self.train, *self.evaluation):
            if self.files and split not in self.files:
                raise ValueError(f"files has no '{split}'")
            if self.files and not any(file.label for file in self.files_of(split)):
                raise ValueError(f"test hides the labels of '{split}', which training or scores need: leave it out of "
                                 "test, or give its file a label of its own")  # fmt: skip
        for file in (file for split in self.files for file in self.files_of(split)):
            if Path(file.path).suffix.lower() not in SUFFIXES:
                raise ValueError(f"file '{file.path}' must end in one of {', '.join(SUFFIXES)}")
        return self

    @field_validator("files", mode="before")
    @classmethod
    def _alternatives(cls, files):
        return (
            {k: tuple(v) if isinstance(v, list) else v for k, v in files.items()}
            if isinstance(files, Mapping)
            else files
        )

    @property
    def regression(self) -> bool:
        return not self.labels

    @property
    def as_written(self) -> tuple[str, ...]:
        """The labels as the files, and GLUE's server, write them, in their order."""
        return self.written or self.labels

    @property
    def scored_by(self) -> tuple[str, ...]:
        """The metrics whose mean is the task's score."""
        return self.headline or self.metrics

    @property
    def num_labels(self) -> int:
        """Outputs of the model's head: one per label, 1 for a regression."""
        return len(self.labels) or 1

    @property
    def splits(self) -> tuple[str, ...]:
        """All splits, each once (those of AX serve for evaluation and test alike)."""
        return tuple(dict.fromkeys(self.train + self.evaluation + self.test))

    @property
    def sources(self) -> tuple[str, ...]:
        """What `data=` can be."""
        there = {"builtin": self.builtin, "local": self.files, "hub": self.hub}
        return tuple(name for name, it in there.items() if it)

    def files_of(self, split: str) -> tuple[File, ...]:
        """The files of a split, of which the first that is there is read. UserError where the task has none."""
        if split not in self.files:
            raise UserError(f"task '{self.name}' has no file for its split '{split}': name one in files")
        given = self.files[split]
        several = given if isinstance(given, tuple) else (given,)
        files = [File(path=file) if isinstance(file, str) else file for file in several]
        hidden = None if split in self.test else self.label
        return tuple(
            file.model_copy(update={"text": file.text or self.text, "label": file.label or hidden}) for file in files
        )

    @property
    def has_own_places(self) -> bool:
        """Whether all its files are named in full, so that it needs no data.root."""
        files = [file for split in self.files for file in self.files_of(split)]
        return bool(files) and all(os.path.isabs(os.path.expanduser(file.path)) for file in files)

    @property
    def folder(self) -> str:
        """What data.root is said to hold: the folder, or else the file, that the first file lies in."""
        first = self.files_of(next(iter(self.files)))[0].path if self.files else ""
        return re.sub(r"/[^/]*$", "/", first)


@functools.cache
def shipped() -> dict[str, Task]:
    """The tasks of this project's own `conf/task/`, by name."""
    return {file.stem: parse(file) for file in sorted(SHIPPED.glob("*.yaml"))}


def parse(file: Path) -> Task:
    return Task.model_validate(yaml.safe_load(file.read_text(encoding="utf-8")))


def get_task(name: str) -> Task:
    """The project's own task of that name.

    Raises:
        UserError: there is none; the message gives the nearest name.
    """
    if name not in shipped():
        raise UserError(f"unknown task '{name}': {did_you_mean(name, shipped())}")
    return shipped()[name]
