"""The records of an experiment's runs in one file that can be committed: what its tables are made of, no weights."""

import json
import os
import zipfile
from pathlib import Path, PurePosixPath

from ..errors import UserError
from .record import write_atomically

RESULT = "result.json"
FILES = (RESULT, "config.yaml", "provenance.json", "metrics.jsonl", "failure.json")
MANIFEST = ".sweeps"


def pack(runs_dir: Path, experiment: str, path: Path) -> tuple[int, int]:
    """Writes the sweep's manifest and its runs' records to the zip `path`, beside the runs that are in it already.

    The same records give the same bytes. Returns (runs in the file, runs of the sweep that have no result).

    Raises:
        UserError: there is no such sweep, or a file cannot be read or written.
    """
    manifest = runs_dir / MANIFEST / f"{experiment}.json"
    try:
        contents = _members(path) if path.exists() else {}
        contents[f"{MANIFEST}/{experiment}.json"] = manifest.read_bytes()
        folders = [run["folder"] for run in json.loads(contents[f"{MANIFEST}/{experiment}.json"])["runs"]]
        for folder in folders:
            for name in FILES:
                if (runs_dir / folder / name).is_file():
                    contents[f"{folder}/{name}"] = (runs_dir / folder / name).read_bytes()
        path.parent.mkdir(parents=True, exist_ok=True)
        # Whole or not at all: a kill leaves the file of before.
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            with zipfile.ZipFile(temporary, "w") as archive:
                for name in sorted(contents):
                    entry = zipfile.ZipInfo(name)  # of 1980: no time of ours in the bytes
                    entry.external_attr = 0o644 << 16
                    archive.writestr(entry, contents[name], zipfile.ZIP_DEFLATED, 9)
            temporary.rename(path)
        finally:
            temporary.unlink(missing_ok=True)
    except FileNotFoundError:
        raise UserError(
            f"no sweep '{experiment}' under '{runs_dir}': `make reproduce EXPERIMENT={experiment}`"
        ) from None
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{manifest} cannot be read ({error!r}): start the sweep again") from None
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}; set paths.records=DIR") from None
    missing = sum(f"{folder}/{RESULT}" not in contents for folder in folders)
    return sum(name.endswith(f"/{RESULT}") for name in contents), missing


def unpack(path: Path, runs_dir: Path) -> tuple[int, int]:
    """Writes the runs of the zip `path` that have no result under `runs_dir`, and the manifest if there is none.

    Returns (runs written, runs that were there already and stay as they are). A run's result comes last, so that one
    that a kill left half written counts as unfinished.

    Raises:
        UserError: the file is missing or damaged, or the runs cannot be written.
    """
    if not path.is_file():
        raise UserError(f"no records at '{path}': `make pack` writes them")
    contents = _members(path)
    folders = {str(PurePosixPath(name).parent) for name in contents if name.endswith(f"/{RESULT}")}
    there = {folder for folder in folders if (runs_dir / folder / RESULT).exists()}
    try:
        for name in sorted(contents, key=lambda name: (name.endswith(f"/{RESULT}"), name)):
            target = runs_dir / name
            if str(PurePosixPath(name).parent) in there or (name.startswith(MANIFEST) and target.exists()):
                continue
            target.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(target, contents[name].decode("utf-8"))
    except OSError as error:
        raise UserError(f"cannot write {runs_dir}: {error.strerror or error}; set paths.runs=DIR") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is damaged ({error})") from None
    return len(folders - there), len(there)


def _members(path: Path) -> dict[str, bytes]:
    """File -> contents. UserError where the archive is damaged or holds what no run has."""
    try:
        with zipfile.ZipFile(path) as archive:
            contents = {name: archive.read(name) for name in archive.namelist()}
    except (zipfile.BadZipFile, OSError, EOFError, NotImplementedError) as error:
        raise UserError(f"{path} cannot be read ({error}): take it from version control again") from None
    for name in contents:
        parts = name.split("/")  # <task>/<model>/<optimizer>/<id>/<file>: nothing may be written elsewhere
        run = len(parts) == 5 and parts[-1] in FILES and not any(p in ("", ".", "..") or "\\" in p for p in parts)
        if not run and not (len(parts) == 2 and parts[0] == MANIFEST and parts[1].endswith(".json")):
            raise UserError(f"{path} holds '{name}', which is no run's record")
    return contents
