"""The records of an experiment's runs in one file that can be committed: what its tables are made of, no weights."""

import io
import json
import shutil
import zipfile
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import yaml

from ..errors import UNREADABLE_ZIP, UserError
from ..files import write_atomically
from ..text import counted, public_word, published, split_command
from . import lease, manifest
from .record import Record

RESULT = "result.json"
FILES = ("config.yaml", "provenance.json", "metrics.jsonl", "failure.json", RESULT)  # as they are unpacked


class Packed(NamedTuple):
    """What a file of records holds after `pack`."""

    finished: int
    """Runs with a result in it."""
    missing: int
    """Runs of its sweep without one."""
    notes: list[str]
    """What was not taken as it was found, in a line each."""


class Unpacked(NamedTuple):
    """What `unpack` found of a file's finished runs."""

    written: int
    """Those that were brought here."""
    there: int
    """Those that were here already, or are being worked on, and were left alone."""
    other: int
    """Those among `there` whose result here is not the file's: trained again, or by other code."""


def pack(runs_dir: Path, experiment: str, path: Path) -> Packed:
    """Writes the sweep's manifest and its runs' records to the zip `path`, beside the runs that are in it already.

    Nothing that the file holds is lost: a finished run stays as it is, and the runs that the manifest names join those
    of this sweep. The same records give the same bytes. Folders of the machine that ran are DIR in it.

    Raises:
        UserError: there is no such sweep, or a file cannot be read or written.
    """
    listed = manifest.path_in(runs_dir, experiment)
    folders = [run["folder"] for run in manifest.read(runs_dir, experiment)["runs"]]
    held = _read(path) if path.exists() else {}
    earlier = held.get(manifest.FOLDER, {}).get(listed.name, b"")
    notes, other = [], 0
    try:
        here = set(folders)
        if here < (planned := _planned(earlier).keys()):
            notes.append(
                f"{path} keeps its sweep of {len(planned)} runs, of which the one here has {len(folders)}; remove it "
                "first to pack these alone"
            )
            folders = sorted(planned)
        elif planned - here:  # another part of one study: other seeds, another machine's model
            before, now = manifest.parsed(earlier), manifest.parsed(listed.read_bytes())
            both = _planned(earlier) | _planned(listed.read_bytes())
            chosen, others = _both_choices(before.get("chosen", []), now.get("chosen", []))
            replaced = "{} keeps the runs of another choice for {}, which the one here replaces"
            notes += [replaced.format(path, cell) for cell in others]
            of = [part.get("chosen_of", []) for part in (before, now)]  # of no manifest from before there was one
            of = sorted({*of[0], *of[1]}) if all(of) else []
            notes.append(
                f"{path} names {counted(len(planned - here), 'run')} of its own beside the {len(here)} here; remove it "
                "first to pack these alone"
            )
            joined = now | {"chosen": chosen, "chosen_of": of, "runs": list(both.values())}
            held[manifest.FOLDER] = {listed.name: json.dumps(joined, indent=1).encode()}
            folders = sorted(both)
        else:
            held[manifest.FOLDER] = {listed.name: listed.read_bytes()}
        for folder in folders:
            record = {name: (runs_dir / folder / name) for name in FILES if (runs_dir / folder / name).is_file()}
            if RESULT in record and Record(runs_dir / folder).result(set_aside=False) is None:
                notes.append(f"{record.pop(RESULT)} is damaged or was edited, and is not taken")
            if (packed := held.get(folder, {}).get(RESULT)) is not None:
                other += RESULT in record and record[RESULT].read_bytes() != packed
            elif record:
                held[folder] = {name: file.read_bytes() for name, file in record.items()}
        if other:
            notes.append(
                f"{path} keeps its own result of {counted(other, 'run')} that here {'has' if other == 1 else 'have'} "
                "another; to pack those of here `make unpack` the rest, remove the file and pack again"
            )
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, _zipped({folder: _for_others(files) for folder, files in held.items()}))
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}; set paths.records=DIR") from None
    finished = {folder for folder, record in held.items() if RESULT in record}
    return Packed(len(finished), len(set(folders) - finished), notes)


def unpack(path: Path, runs_dir: Path) -> Unpacked:
    """Writes the runs of the zip `path` that are not under `runs_dir`, or have no result there and one in the file.

    What is there stays as it is: finished runs, runs that are being worked on, and the sweep's manifest unless it
    cannot be read or the file's names all of its runs and more. A run's result is written last, so that one that a
    kill left half written counts as unfinished; a damaged one is set aside. Weights and checkpoints that an unfinished
    attempt left in a folder are removed: they are not those of the result.

    Raises:
        UserError: the file is missing or damaged, or the runs cannot be written.
    """
    if not path.is_file():
        raise UserError(f"no records at '{path}': `make pack` writes them")
    held = _read(path)
    sweeps = held.pop(manifest.FOLDER, {})
    finished = {folder for folder, record in held.items() if RESULT in record}
    written, other = set(), 0
    try:
        for folder, record in held.items():
            there = runs_dir / folder
            if folder in finished:
                if lease.alive(lease.path_in(there)):
                    continue
                if Record(there).result(then=f"{path} has it whole"):
                    other += (there / RESULT).read_bytes() != record[RESULT]
                    continue
                written.add(folder)
            elif there.exists():
                continue
            # What another attempt left here half way is no weights of this result: they can be trained for it.
            for stale in (there / "best", there / "last", there / "checkpoint", *there.glob("at-*")):
                if stale.is_dir():
                    shutil.rmtree(stale)
            there.mkdir(parents=True, exist_ok=True)
            for name in FILES:
                if name in record:
                    write_atomically(there / name, record[name])
        for name, contents in sweeps.items():
            (runs_dir / manifest.FOLDER).mkdir(parents=True, exist_ok=True)
            there = runs_dir / manifest.FOLDER / name
            if not there.exists() or _planned(there.read_bytes()).keys() < _planned(contents).keys():
                write_atomically(there, contents)
    except OSError as error:
        raise UserError(f"cannot write {runs_dir}: {error.strerror or error}; set paths.runs=DIR") from None
    return Unpacked(len(written), len(finished - written), other)


def unlisted(path: Path, runs_dir: Path) -> int:
    """Runs that a sweep of `path` names and the one of that name under `runs_dir` does not: no table has them."""
    count = 0
    for name, contents in _read(path).get(manifest.FOLDER, {}).items():
        there = runs_dir / manifest.FOLDER / name
        count += len(_planned(contents).keys() - _planned(there.read_bytes()).keys()) if there.is_file() else 0
    return count


def _planned(contents: bytes) -> dict[str, dict]:
    """Folder -> what a sweep's manifest says of the run there; empty where it cannot be read."""
    try:
        return {run["folder"]: run for run in manifest.parsed(contents)["runs"]}
    except (ValueError, KeyError, TypeError):
        return {}


def _both_choices(before: list[dict], now: list[dict]) -> tuple[list[dict], list[str]]:
    """The rows of two choices as one, in which the later's stand for each cell (task, model, optimizer) that it has,
    and the cells of which the earlier had chosen other settings."""

    def winners(rows: list[dict]) -> dict[tuple, dict]:
        return {_cell(row): row["settings"] for row in rows if row["chosen"]}

    later, cells = winners(now), {_cell(row) for row in now}
    others = [
        " ".join(cell)
        for cell, settings in winners(before).items()
        if any(later[cell][name] != settings[name] for name in later.get(cell, {}) if name in settings)
    ]
    return [row for row in before if _cell(row) not in cells] + now, others


def _cell(row: dict) -> tuple[str, str, str]:
    return row["task"], row["model"], row["optimizer"]


def _for_others(files: dict[str, bytes]) -> dict[str, bytes]:
    """The files with DIR for folders of this machine, which whoever takes the records has not and need not know."""

    def masked(value: Any, key: str = "") -> Any:
        if isinstance(value, dict):  # what names the run stays as it was hashed
            return {key: there if key == "identity" else masked(there, key) for key, there in value.items()}
        if isinstance(value, list):
            return [masked(part) for part in value]
        if not isinstance(value, str):
            return value
        if key == "command":
            return published(split_command(value))
        place = value.startswith("/") and len(value) > 1
        return "DIR" if place else " ".join(map(public_word, value.split(" ")))

    shown = dict(files)
    for name, contents in files.items():
        if name in (RESULT, "metrics.jsonl"):  # the first is sealed; neither names a folder
            continue
        try:
            if name.endswith(".yaml"):
                there = yaml.safe_load(contents)
                text = yaml.safe_dump(masked(there), sort_keys=False, allow_unicode=True)
            else:
                there = json.loads(contents)
                text = json.dumps(masked(there), indent=1, ensure_ascii=False) + "\n" * contents.endswith(b"\n")
            if masked(there) != there:
                shown[name] = text.encode()
        except (ValueError, yaml.YAMLError):
            continue  # damaged: as it is
    return shown


def _zipped(held: dict[str, dict[str, bytes]]) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as file:
        for folder in sorted(held):
            for name in sorted(held[folder]):
                entry = zipfile.ZipInfo(f"{folder}/{name}")  # of 1980: no time of ours in the bytes
                entry.external_attr = 0o644 << 16
                file.writestr(entry, held[folder][name], zipfile.ZIP_DEFLATED, 9)
    return stream.getvalue()


def _read(path: Path) -> dict[str, dict[str, bytes]]:
    """Folder -> file -> contents. UserError where the archive is damaged or holds what no run has."""
    held: dict[str, dict[str, bytes]] = {}
    try:
        with zipfile.ZipFile(path) as file:
            for name in file.namelist():
                parts = name.split("/")  # <task>/<model>/<optimizer>/<id>/<file>: nothing is written elsewhere
                run = len(parts) == 5 and parts[-1] in FILES and not any(p in ("", ".", "..") for p in parts)
                if not run and not (len(parts) == 2 and parts[0] == manifest.FOLDER and parts[1].endswith(".json")):
                    raise UserError(f"{path} holds '{name}', which is no run's record")
                held.setdefault(str(PurePosixPath(name).parent), {})[parts[-1]] = file.read(name)
    except UNREADABLE_ZIP as error:
        raise UserError(f"{path} cannot be read ({error}): take it from version control again") from None
    return held
