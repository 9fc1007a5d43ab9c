"""The cache of results already read: one line per result.json, valid while the file is the same."""

import contextlib
import json
import os
import tempfile
from pathlib import Path

NAME = ".index.jsonl"
VERSION = 3  # raise it whenever collect.read keeps something else of a result.json


def stamp(status: os.stat_result) -> list[int]:
    """What tells one state of a file from the next; the inode catches a replacement within one clock tick."""
    return [status.st_mtime_ns, status.st_size, status.st_ino]


def load(runs_dir: Path) -> dict[str, dict]:
    """Folder -> {"stamp": ..., "row": ...}; empty where there is no cache, or one of another version."""
    entries = {}
    try:
        with open(runs_dir / NAME, encoding="utf-8") as file:
            if json.loads(file.readline()) != {"index_version": VERSION}:
                return {}
            for line in file:
                entry = json.loads(line)
                entries[entry["folder"]] = entry
    except (OSError, ValueError, KeyError, TypeError):
        return {}  # a cache that cannot be read costs time, never a result
    return entries


def save(runs_dir: Path, entries: dict[str, dict]) -> None:
    """Replace the cache as a whole: a reader sees the old one or the new one, whoever else is writing."""
    # A folder of results may be read-only for whoever reads it: then every reading is a cold one.
    with contextlib.suppress(OSError):
        handle, temporary = tempfile.mkstemp(prefix=NAME, suffix=".tmp", dir=runs_dir)
        try:
            with open(handle, "w", encoding="utf-8") as file:
                file.write(json.dumps({"index_version": VERSION}) + "\n")
                file.writelines(json.dumps(entry) + "\n" for entry in entries.values())
            os.replace(temporary, runs_dir / NAME)
        except BaseException:
            os.unlink(temporary)
            raise
