"""The official GLUE files: where each lies, its columns, and a reader that reports file and line of what is wrong."""

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..errors import UserError
from .split import Split
from .tasks import Task

QQP_BROKEN_ROWS = 100
"""QQP's own files hold a few rows that a line break cut in two; more than this many is another fault."""

AX_FOLDERS = ("diagnostic", "AX")
AX_FILES = ("diagnostic-full.tsv", "diagnostic.tsv")


@dataclass(frozen=True)
class Layout:
    """One file and the names of the columns to take from it."""

    path: Path
    text: tuple[str, ...]
    label: str | None
    header: tuple[str, ...] | None = None
    """The columns of a file that has no header line; None where the first line names them."""


def find(task: Task, root: str | Path | None, splits: tuple[str, ...]) -> dict[str, Layout]:
    """The files of these splits below the folder `root`, in GLUE's official layout.

    Raises:
        UserError: no root, or a folder or file that is not there.
    """
    if root is None:
        raise UserError(f"{task.name}: data=local needs data.root=DIR, the folder that holds {task.folder}/")
    root = Path(root).expanduser()
    if not root.is_dir():
        raise UserError(f"data.root '{root}' is not a folder: give the folder that holds {task.folder}/")
    layouts = {split: _layout(task, root, split) for split in splits}
    for layout in layouts.values():
        if not layout.path.is_file():
            raise UserError(f"{task.name}: file '{layout.path}' is missing: put GLUE's official files there")
    return layouts


def _layout(task: Task, root: Path, split: str) -> Layout:
    if task.name == "ax":
        # The full file holds the labels, and the same pairs in the same order as the one for submissions.
        for path in (root / folder / name for name in AX_FILES for folder in AX_FOLDERS):
            if path.is_file():
                full = path.name == AX_FILES[0]
                return Layout(path, *((("Premise", "Hypothesis"), "Label") if full else (task.columns, None)))
        return Layout(root / AX_FOLDERS[0] / AX_FILES[1], task.columns, None)
    label = None if split in task.test_splits else task.label_column
    headless = task.name == "cola" and label is not None
    return Layout(
        root / task.folder / f"{split}.tsv",
        task.columns,
        label,
        ("source", "label", "star", "sentence") if headless else None,
    )


def digest(layouts: dict[str, Layout]) -> str:
    """sha256 of the files' bytes and of the splits that they serve."""
    total = hashlib.sha256()
    for split, layout in sorted(layouts.items()):
        total.update(f"{split} {hashlib.sha256(_bytes(layout.path)).hexdigest()}\n".encode())
    return total.hexdigest()


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from None


def read(task: Task, layout: Layout) -> tuple[Split, list[str]]:
    """One file's rows, and a note if incomplete ones were left out (QQP only).

    Quote characters are text. A byte-order mark, CRLF line ends, blank last lines and a missing last line end are
    taken as they come.

    Raises:
        UserError: broken UTF-8, no rows, a wrong header, column count, label or score: with file and line.
    """
    lines = _lines(layout.path)
    if layout.header is None:
        header, start = tuple(lines[0].split("\t")), 1
    else:
        header, start = layout.header, 0
    wanted = layout.text + ((layout.label,) if layout.label else ())
    for name in wanted:
        if header.count(name) != 1:
            raise UserError(
                f"{layout.path}:1: expected each of the columns {', '.join(wanted)} once, found {_short(header)}: "
                f"is this {task.title.split(':')[0]}'s official file?"
            )
    if len(lines) == start:
        raise UserError(f"{layout.path}: no rows: download the file again")
    places = [header.index(name) for name in wanted]
    columns: tuple[list, ...] = tuple([] for _ in wanted)
    broken: list[int] = []
    for number, row in _rows(lines, start):
        if len(row) != len(header) or (layout.label and task.name == "qqp" and not row[places[-1]]):
            if task.name != "qqp" or len(row) > len(header) or len(broken) == QQP_BROKEN_ROWS:
                raise UserError(
                    f"{layout.path}:{number}: {len(row)} columns where {len(header)} are expected: mend this line "
                    "or download the file again"
                )
            broken.append(number)
            continue
        for column, place in zip(columns, places, strict=True):
            column.append(row[place])
        if layout.label:
            columns[-1][-1] = _label(task, layout, number, row[places[-1]])
    if not columns[0]:
        raise UserError(f"{layout.path}: no complete row: download the file again")
    labels = np.array(columns[-1], dtype=np.float32 if task.regression else np.int64) if layout.label else None
    notes = []
    if broken:
        notes.append(f"{layout.path}: left out {len(broken)} incomplete rows, the first in line {broken[0]}")
    return Split(columns[0], columns[1] if len(layout.text) == 2 else None, labels), notes


def _lines(path: Path) -> list[str]:
    data = _bytes(path)
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start + 3 * data.startswith(b"\xef\xbb\xbf")].count(b"\n") + 1
        raise UserError(
            f"{path}:{line}: not UTF-8 (byte 0x{error.object[error.start]:02x}): convert the file"
        ) from None
    # Not splitlines(), which also splits at the Unicode separators that sentences hold.
    lines = [line.removesuffix("\r") for line in text.split("\n")]
    while lines and not lines[-1].strip():
        lines.pop()
    if not lines:
        raise UserError(f"{path}: the file is empty: download it again")
    return lines


def _rows(lines: list[str], start: int) -> Iterator[tuple[int, list[str]]]:
    for number, line in enumerate(lines[start:], start + 1):
        yield number, line.split("\t")


def _label(task: Task, layout: Layout, number: int, text: str) -> int | float:
    if not task.regression:
        if text not in task.file_labels:
            known = ", ".join(task.file_labels)
            raise UserError(f"{layout.path}:{number}: unknown label {_short(text)}: known: {known}")
        return task.file_labels.index(text)
    low, high = task.score_range
    try:
        score = float(text)
    except ValueError:
        score = math.nan
    if not low <= score <= high:
        raise UserError(f"{layout.path}:{number}: score {_short(text)} is not a number from {low:g} to {high:g}")
    return score


def _short(value: object) -> str:
    """A value as an error shows it: on one line, and not longer than one."""
    text = repr(value)
    return text if len(text) <= 120 else f"{text[:117]}..."
