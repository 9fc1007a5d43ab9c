"""The eleven files that the GLUE server takes (https://gluebenchmark.com/submit): written, packed and checked."""

import math
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..errors import UNREADABLE_ZIP, UserError
from ..task import Task, get_task

HEADER = "index\tprediction"
ARCHIVE = "submission.zip"


@dataclass(frozen=True)
class File:
    """The answers to one test set, one row per example in the order of its official file."""

    name: str
    task: str
    constant: str
    """The training set's most frequent answer, of STS-B its mean score. MNLI's and QNLI's labels are equally frequent:
    entailment stands for them."""
    split: str = "test"

    @property
    def trained_on(self) -> str:
        """The task whose runs answer it."""
        return "mnli" if self.task == "ax" else self.task

    @property
    def rows(self) -> int:
        return get_task(self.task).rows[self.split]


FILES = (
    File("CoLA.tsv", "cola", "1"),
    File("SST-2.tsv", "sst2", "1"),
    File("MRPC.tsv", "mrpc", "1"),
    File("STS-B.tsv", "stsb", "2.701"),
    File("QQP.tsv", "qqp", "0"),
    File("MNLI-m.tsv", "mnli", "entailment", "test_matched"),
    File("MNLI-mm.tsv", "mnli", "entailment", "test_mismatched"),
    File("QNLI.tsv", "qnli", "entailment"),
    File("RTE.tsv", "rte", "entailment"),
    File("WNLI.tsv", "wnli", "0"),
    File("AX.tsv", "ax", "entailment"),
)


def answers(task: Task, predictions: np.ndarray) -> list[str]:
    """Predictions of shape (N,) as the server takes them: the official files' names of the labels, or scores in the
    task's range with three decimals."""
    if task.regression:
        return [f"{score:.3f}" for score in np.clip(predictions, *task.score_range) + 0.0]  # + 0.0: no "-0.000"
    return [task.as_written[label] for label in predictions]


def write(folder: Path, contents: Mapping[str, Sequence[str]]) -> Path:
    """Writes the files, whose answers `contents` holds by name, and their archive, whose path it returns.

    The archive's bytes depend on the answers alone.
    """
    texts = {
        file.name: "".join(f"{line}\n" for line in [HEADER, *(f"{i}\t{a}" for i, a in enumerate(contents[file.name]))])
        for file in FILES
    }
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8", newline="")
    with zipfile.ZipFile(folder / ARCHIVE, "w") as archive:
        for name, text in texts.items():
            entry = zipfile.ZipInfo(name)  # of 1980, and not compressed, which zlib's versions do differently
            entry.create_system, entry.external_attr = 3, 0o100644 << 16
            archive.writestr(entry, text)
    return folder / ARCHIVE


def validate(path: str | Path) -> dict[str, list[str]]:
    """The answers of each file in a folder or zip, by its name.

    Raises:
        UserError: a file is missing, or has another header, number of rows, index or answer than the server takes:
            names the file and line, what is there and what is expected.
    """
    path = Path(path)
    contents = _folder(path) if path.is_dir() else _archive(path)
    missing = [file.name for file in FILES if file.name not in contents]
    if missing:
        there = ", ".join(sorted(contents)[:20]) or "nothing"
        raise UserError(f"{path} has no {', '.join(missing)}: found {there}")
    return {file.name: _check(file, f"{path}/{file.name}", contents[file.name]) for file in FILES}


def _folder(path: Path) -> dict[str, bytes]:
    try:
        return {p.name: p.read_bytes() for p in path.iterdir() if p.suffix == ".tsv"}
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error}") from None


def _archive(path: Path) -> dict[str, bytes]:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            twice = sorted({name for name in names if names.count(name) > 1})
            if twice:
                raise UserError(f"{path} holds {', '.join(twice)} more than once")
            return {name: archive.read(name) for name in names}
    except FileNotFoundError:
        raise UserError(f"{path} is neither a folder nor a file") from None
    except UNREADABLE_ZIP as error:
        raise UserError(f"{path} cannot be read as a zip: {error}") from None


def _check(file: File, where: str, content: bytes) -> list[str]:
    try:
        lines = content.decode("ascii").removesuffix("\n").split("\n")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise UserError(f"{where}:{line}: found byte 0x{content[error.start]:02x}, expected ASCII text") from None
    if lines[0] != HEADER:
        raise UserError(f"{where}:1: found header {lines[0]!r}, expected {HEADER!r}")
    if len(lines) - 1 != file.rows:
        raise UserError(f"{where}: found {len(lines) - 1} rows, expected {file.rows}")
    task = get_task(file.task)
    found = []
    for number, line in enumerate(lines[1:]):
        index, _, answer = line.partition("\t")
        if index != str(number):
            raise UserError(f"{where}:{number + 2}: found index {index!r}, expected '{number}'")
        if not (_is_score(task, answer) if task.regression else answer in task.as_written):
            limits = task.score_range
            expected = f"a number from {limits[0]:g} to {limits[1]:g}" if limits else " or ".join(task.as_written)
            raise UserError(f"{where}:{number + 2}: found prediction {answer!r}, expected {expected}")
        found.append(answer)
    return found


def _is_score(task: Task, answer: str) -> bool:
    low, high = task.score_range or (-math.inf, math.inf)
    try:
        return "_" not in answer and answer == answer.strip() and low <= float(answer) <= high
    except ValueError:
        return False
