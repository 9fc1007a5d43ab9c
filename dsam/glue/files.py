"""A task's local files: where each lies, its columns, and readers that report file and line of what is wrong."""

import csv
import hashlib
import io
import json
import math
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import UserError
from ..task import File, Task
from ..text import counted
from .split import Split

HALF = re.compile("[\ud800-\udfff]")
"""A surrogate without its other one, as JSON can write it: in no encoding a character."""
FIELD = re.compile(r"\{([^{}]+)\}")
"""A column in a text that is put together from several."""

csv.field_size_limit(2**31 - 1)  # passages are longer than its default of 128 kB


@dataclass(frozen=True)
class Layout:
    """One file and the names of the columns to take from it."""

    path: Path
    text: tuple[str, ...]
    label: str | None
    header: tuple[str, ...] | None = None
    """The columns of a file that has no header line; None where the first line names them."""

    @property
    def columns(self) -> tuple[str, ...]:
        """What is read: the text's columns, each once, then the label's."""
        text = [name for part in self.text for name in (FIELD.findall(part) or [part])]
        return tuple(dict.fromkeys([*text, *([self.label] if self.label else [])]))


Row = tuple[int, list[Any]]
"""A line's number, from 1, and the values of `Layout.columns`."""


def find(task: Task, root: str | Path | None, splits: tuple[str, ...]) -> dict[str, Layout]:
    """The files of these splits below the folder `root`.

    Raises:
        UserError: no root, or a folder or file that is not there.
    """
    wanted = {split: task.files_of(split) for split in splits}
    if root is None and not task.has_own_places:
        raise UserError(f"{task.name}: data=local needs data.root=DIR, the folder that holds {task.folder}")
    folder = Path(os.path.expanduser(root or "/"))  # which leaves a user that there is not as it is
    if not folder.is_dir():
        raise UserError(f"data.root '{folder}' is not a folder: give the folder that holds {task.folder}")
    return {split: _layout(task, folder, files) for split, files in wanted.items()}


def _layout(task: Task, root: Path, files: tuple[File, ...]) -> Layout:
    paths = [root / os.path.expanduser(file.path) for file in files]
    for path, file in zip(paths, files, strict=True):
        if path.is_file():
            return Layout(path, file.text or task.text, file.label, file.header)
    hint = "put GLUE's official files there" if _is_glue(task) else f"the task '{task.name}' names it"
    missing = (
        paths[-2] if task.name == "ax" and len(paths) > 1 else paths[0]
    )  # of AX's, the one that GLUE itself gives out
    raw = sorted(p.name for p in missing.parent.glob("msr_paraphrase_*.txt")) if missing.parent.is_dir() else []
    if raw:
        hint = f"{raw[0]} is the raw download, from which GLUE's train.tsv and dev.tsv are cut by its own dev_ids.tsv"
    if task.name == "ax" and any((folder / "AX.tsv").is_file() for folder in (root, missing.parent)):
        hint = f"AX.tsv is what GLUE's server takes as answers; the questions are in {missing.name}"
    if any((root.parent / file.path).is_file() for file in files):
        hint = f"it lies one level up: take data.root={root.parent}"
    raise UserError(f"{task.name}: file '{missing}' is missing: {hint}")


def _is_glue(task: Task) -> bool:
    return task.hub is not None and task.hub.dataset == "nyu-mll/glue"


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
    """One file's rows, and a note if incomplete ones were left out (`Task.incomplete_rows`).

    By the name's end: .tsv (GLUE's: quote characters are text), .csv (quoted as spreadsheets do), .jsonl or .json (an
    object on each line), .parquet. A byte-order mark, CRLF line ends, blank last lines and a missing last line end are
    taken as they come.

    Raises:
        UserError: broken UTF-8, no rows, a wrong header, column count, text, label or score: with file and line.
    """
    rows = {".csv": _csv, ".tsv": _tsv, ".parquet": _parquet}.get(layout.path.suffix.lower(), _json_lines)
    broken: list[int] = []
    blank: list[int] = []
    columns = layout.columns
    text: tuple[list[str], ...] = tuple([] for _ in layout.text)
    labels: list[int | float] = []
    for number, values in rows(task, layout, broken):
        row = dict(zip(columns, values, strict=True))
        for part, column in zip(layout.text, text, strict=True):
            column.append(_text(layout, number, part, row))
        if not all(column[-1].strip() for column in text):
            blank.append(number)
        if layout.label:
            labels.append(_label(task, layout, number, row[layout.label]))
    if not text[0]:
        raise UserError(f"{layout.path}: no {'complete row' if broken else 'rows'}: download the file again")
    notes = []
    if broken:
        notes.append(f"{layout.path}: left out {len(broken)} incomplete rows, the first in line {broken[0]}")
    if blank:
        notes.append(
            f"{layout.path}: the text of {counted(len(blank), 'row')} is empty, the first in line {blank[0]}: as empty "
            "they are used"
        )
    numbers = np.array(labels, dtype=np.float32 if task.regression else np.int64) if layout.label else None
    return Split(text[0], text[1] if len(text) == 2 else None, numbers), notes


def _tsv(task: Task, layout: Layout, broken: list[int]) -> Iterator[Row]:
    lines = _lines(layout.path)
    header = layout.header or tuple(lines[0].split("\t"))
    places = _places(task, layout, header)
    for number, line in enumerate(lines[layout.header is None :], 1 + (layout.header is None)):
        row = line.split("\t")
        cut = len(row) < len(header) or (layout.label and task.incomplete_rows and not row[places[-1]])
        if cut and len(broken) < task.incomplete_rows:
            broken.append(number)
        elif cut or len(row) > len(header):
            raise _miscounted(layout, number, row, header)
        else:
            yield number, [row[place] for place in places]


def _csv(task: Task, layout: Layout, broken: list[int]) -> Iterator[Row]:
    reader = csv.reader(io.StringIO(_decoded(layout.path), newline=""), strict=True)
    number = 0
    try:
        header = layout.header or tuple(next(reader, ()))
        if not header:
            raise UserError(f"{layout.path}: the file is empty: download it again")
        places = _places(task, layout, header)
        while True:
            number = reader.line_num + 1
            row = next(reader, None)
            if row is None:
                return
            if not row:  # a blank line
                continue
            if len(row) != len(header):
                if len(row) > len(header) or len(broken) == task.incomplete_rows:
                    raise _miscounted(layout, number, row, header)
                broken.append(number)
                continue
            values = [row[place] for place in places]
            if layout.label and not values[-1] and len(broken) < task.incomplete_rows:
                broken.append(number)
                continue
            yield number, values
    except csv.Error as error:
        raise UserError(f"{layout.path}:{number or 1}: not CSV ({error}): mend the quotes") from None


def _json_lines(task: Task, layout: Layout, broken: list[int]) -> Iterator[Row]:
    for number, line in enumerate(_lines(layout.path), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{layout.path}:{number}: not JSON ({error}): each line is to be one object") from None
        if not isinstance(row, dict):
            raise UserError(f"{layout.path}:{number}: {_short(row)} is no object: each line is to be one, not an array")
        for name in layout.columns:
            if name not in row:
                raise _without(task, layout, number, tuple(row))
        yield number, [row[name] for name in layout.columns]


def _parquet(task: Task, layout: Layout, broken: list[int]) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        names = tuple(pyarrow.parquet.read_schema(layout.path).names)
        _places(task, layout, names)
        table = pyarrow.parquet.read_table(layout.path, columns=list(layout.columns))
    except (OSError, pyarrow.ArrowException) as error:
        raise UserError(f"{layout.path} cannot be read as Parquet ({str(error).splitlines()[0]})") from None
    values = [table.column(name).to_pylist() for name in layout.columns]
    for number, row in enumerate(zip(*values, strict=True), 1):
        yield number, list(row)


def _places(task: Task, layout: Layout, header: tuple[str, ...]) -> list[int]:
    for name in layout.columns:
        if header.count(name) != 1:
            raise _without(task, layout, 1, header)
    return [header.index(name) for name in layout.columns]


def _without(task: Task, layout: Layout, number: int, header: tuple[str, ...]) -> UserError:
    if layout.path.suffix.lower() in (".csv", ".tsv") and (separated := _separated(header)):
        return UserError(
            f"{layout.path}:{number}: found no column '{layout.columns[0]}' in {_short(header)}: {separated}"
        )
    ask = (
        f"is this {task.title.split(':')[0]}'s official file?"
        if _is_glue(task)
        else "name them in the task's text: and label:, of a hub data set in those under hub:"
    )
    return UserError(
        f"{layout.path}:{number}: expected each of the columns {', '.join(layout.columns)} once, found "
        f"{_short(header)}: {ask}"
    )


def _separated(header: tuple[str, ...]) -> str | None:
    """What is wrong with a header whose columns were not told apart, if that is it."""
    if any("\r" in name for name in header):
        return "its lines end in \\r alone: write \\n or \\r\\n"
    for mark, name in ((";", "semicolons"), ("\t", "tabs, as of a .tsv"), (",", "commas, as of a .csv")):
        if len(header) == 1 and mark in header[0]:
            return f"its columns stand between {name}: a .tsv's are to stand between tabs, and a .csv's between commas"
    return None


def _miscounted(layout: Layout, number: int, row: list[str], header: tuple[str, ...]) -> UserError:
    return UserError(
        f"{layout.path}:{number}: {len(row)} columns where {len(header)} are expected: mend this line or download the "
        "file again"
    )


def _decoded(path: Path) -> str:
    data = _bytes(path)
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start + 3 * data.startswith(b"\xef\xbb\xbf")].count(b"\n") + 1
        raise UserError(
            f"{path}:{line}: not UTF-8 (byte 0x{error.object[error.start]:02x}): convert the file"
        ) from None


def _lines(path: Path) -> list[str]:
    # Not splitlines(), which also splits at the Unicode separators that sentences hold.
    lines = [line.removesuffix("\r") for line in _decoded(path).split("\n")]
    while lines and not lines[-1].strip():
        lines.pop()
    if not lines:
        raise UserError(f"{path}: the file is empty: download it again")
    return lines


def _text(layout: Layout, number: int, part: str, row: dict[str, Any]) -> str:
    def value(name: str) -> str:
        if not isinstance(row[name], str):
            raise UserError(f"{layout.path}:{number}: column '{name}' holds {_short(row[name])}, which is no text")
        if HALF.search(row[name]):
            raise UserError(f"{layout.path}:{number}: column '{name}' holds half a character: {_short(row[name])}")
        return row[name]

    return FIELD.sub(lambda field: value(field[1]), part) if FIELD.search(part) else value(part)


def _label(task: Task, layout: Layout, number: int, value: Any) -> int | float:
    if not task.regression:
        text = (
            value if isinstance(value, str) else json.dumps(value, default=str)
        )  # true and 1 as JSON and Parquet hold them
        if text not in task.as_written:
            hint = "" if task.written else " (written= says how the files write them)"
            known = ", ".join(task.as_written)
            raise UserError(f"{layout.path}:{number}: unknown label {_short(value)}: known: {known}{hint}")
        return task.as_written.index(text)
    low, high = task.score_range or (-math.inf, math.inf)
    try:
        score = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        score = math.nan
    if not low <= score <= high:
        raise UserError(f"{layout.path}:{number}: score {_short(value)} is not a number from {low:g} to {high:g}")
    return score


def _short(value: object) -> str:
    """A value as an error shows it: on one line, and not longer than one."""
    text = repr(value)
    return text if len(text) <= 120 else f"{text[:117]}..."
