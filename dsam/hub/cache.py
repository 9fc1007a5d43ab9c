"""The Hugging Face hub's files on this disk: where each lies, and whether it is what the hub states.

The cache is that of huggingface_hub and has its layout: `blobs/` holds contents under the names that the hub states for
them (sha256, or git's sha1 of small files), `snapshots/COMMIT/` links to them by file name, and `trees/COMMIT.json` is
the list of the commit's files, by which all are checked.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from .requests import Repo


@dataclass(frozen=True)
class Entry:
    """What the hub states of a file: its size in bytes, and the name of its content (sha256, or git's sha1)."""

    size: int
    name: str

    def __post_init__(self) -> None:
        if not (isinstance(self.size, int) and re.fullmatch("[0-9a-f]{40}|[0-9a-f]{64}", str(self.name))):
            raise ValueError(f"no size and hash: {self.size!r}, {self.name!r}")


Listing = dict[str, Entry]
Choose = Callable[[Iterable[str]], list[str]]
"""Which of a commit's files are needed."""


class Place:
    """Where a repository's files lie in the hub's cache."""

    def __init__(self, repo: Repo):
        from huggingface_hub import constants
        from huggingface_hub.file_download import repo_folder_name

        self.repo = repo
        self.cache = Path(constants.HF_HUB_CACHE).expanduser().absolute()
        try:
            name = repo_folder_name(repo_id=repo.id, repo_type=repo.kind)
        except ValueError as error:  # no name of a repository
            raise repo.unavailable(" ".join(str(error).split())) from None
        self.folder, self.locks = self.cache / name, self.cache / ".locks" / name
        self.snapshot = self.folder / "snapshots" / repo.revision

    def file(self, name: str) -> Path:
        return self.snapshot / name

    def blob(self, entry: Entry) -> Path:
        return self.folder / "blobs" / entry.name

    def listing(self) -> Listing | None:
        """The list of files as it was kept; None where it was not, or cannot be read."""
        try:
            known = json.loads((self.folder / "trees" / f"{self.repo.revision}.json").read_text(encoding="utf-8"))
            if known["format_version"] == 1:
                files = known["files"].items()
                return {name: Entry(file["size"], file.get("lfs_sha256") or file["blob_id"]) for name, file in files}
        except (OSError, ValueError, LookupError, TypeError, AttributeError):
            pass
        return None

    def lack(self, kept: Listing | None, choose: Choose) -> str:
        """What is wrong with the cache, for an error."""
        if kept is None:
            return f"{self.cache} does not have it, or not with the list of its files"
        wrong = [name for name in choose(kept) if not is_sound(self.file(name), kept[name])]
        there = [name for name in wrong if self.file(name).exists()]
        if there:
            return f"{self.file(there[0])} is damaged"
        return f"{self.cache} has {wrong[0]}{f' and {len(wrong) - 1} others' if wrong[1:] else ''} not"

    def checked(self, choose: Choose, chosen: list[str]) -> tuple[Path, list[str]]:
        """The folder, unless it has further files that would be read as if they were of the commit."""
        names = [p.relative_to(self.snapshot).as_posix() for p in self.snapshot.rglob("*") if not p.is_dir()]
        if strays := set(choose({*names, *chosen})) - set(chosen):
            raise self.repo.unavailable(f"{self.file(min(strays))} is not of that commit: delete it")
        return self.snapshot, chosen

    def link(self, name: str, entry: Entry) -> None:
        """Has the snapshot's file be the blob."""
        file, blob = self.file(name), self.blob(entry)
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary = file.with_name(f".{file.name}.{os.getpid()}")
        temporary.unlink(missing_ok=True)
        try:
            temporary.symlink_to(os.path.relpath(blob, file.parent))
        except OSError:  # a file system without links
            shutil.copyfile(blob, temporary)
        temporary.replace(file)


_sound: set[tuple] = set()


def is_sound(file: Path, entry: Entry) -> bool:
    """Whether the file is there with this size and hash. A file that has not changed is read once in a process."""
    try:
        stat = file.stat()
        seen = (str(file), entry, stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)
        if stat.st_size != entry.size:
            return False
        if seen not in _sound:
            with file.open("rb") as stream:
                if len(entry.name) == 64:
                    digest = hashlib.file_digest(stream, "sha256")
                else:  # as git names a file
                    digest = hashlib.sha1(b"blob %d\0" % entry.size + stream.read())
            if digest.hexdigest() != entry.name:
                return False
            _sound.add(seen)
    except OSError:
        return False
    return True
