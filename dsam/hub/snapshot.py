"""Complete, checked local folders of the Hugging Face hub's repositories at a pinned commit."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..files import write_atomically
from ..progress import Downloads
from ..text import filesize
from .cache import Choose, Entry, Listing, Place, is_sound
from .requests import Patience, Repo, offline, time_limit, why

COMMIT = re.compile("[0-9a-f]{40}")


class Damaged(Exception):
    """A file that came twice with other bytes than the list of files states."""


def require_commit(kind: str, repo_id: str, revision: str | None, setting: str) -> None:
    """Raises UserError for a branch, a tag or a part of a hash, naming its commit: numbers may not change unseen."""
    if revision and COMMIT.fullmatch(revision):
        return
    repo, now = Repo(kind, repo_id, str(revision)), ""
    if not offline(repo):
        with contextlib.suppress(UserError), Downloads() as progress:
            now = f" (that is {setting}={_ask(repo, Patience(repo, progress.say, limit=10))[0]} now)"
    raise UserError(f"{setting}={revision} may come to mean another commit: give a commit's 40 hex digits{now}")


def snapshot(kind: str, repo_id: str, commit: str, choose: Choose) -> tuple[Path, list[str]]:
    """(a local folder, the files in it that `choose` takes), each there with the size and hash that the hub states.

    What is missing or damaged in the hub's cache is fetched. With a full cache nothing is asked or written.

    Args:
        kind: "dataset" or "model".
        commit: 40 hexadecimal digits.

    Raises:
        UserError: what cannot be had, and why.
    """
    repo = Repo(kind, repo_id, commit)
    place = Place(repo)
    kept = place.listing()
    if kept is not None:
        chosen = choose(kept)
        if all(is_sound(place.file(name), kept[name]) for name in chosen):
            return place.checked(choose, chosen)
    if forbids := offline(repo):
        raise repo.unavailable(f"{forbids} is set, and {place.lack(kept, choose)}")
    with Downloads() as progress:
        patience = Patience(repo, progress.say)
        problem = ""
        for known in (kept, None) if kept is not None else (None,):  # a list that was kept may be what is wrong
            try:
                listing = known if known is not None else _listing(repo, place, patience)
                return place.checked(choose, _complete(repo, place, listing, choose, patience, progress))
            except Damaged as damaged:
                problem = str(damaged)
    raise repo.unavailable(problem)


def _ask(repo: Repo, patience: Patience) -> tuple[str, Any]:
    """(the commit that the revision means, what the hub tells about its files)."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]

    what = f"the list of files of the {repo}"
    while True:
        try:
            with patience.answer_to(what):
                told: Any = HfApi().repo_info(
                    repo.id, revision=repo.revision, repo_type=repo.kind, files_metadata=True, timeout=time_limit()
                )
            patience.reached = True
            patience.renewed()
            return str(told.sha), told.siblings
        except HTTPError as error:
            patience.after(error, what)
        except Exception as error:  # no name of a repository, no address, no JSON
            raise repo.unavailable(why(error, repo)) from None


def _listing(repo: Repo, place: Place, patience: Patience) -> Listing:
    """The commit's files as the hub tells them; kept in the cache, where it can be written."""
    commit, files = _ask(repo, patience)
    if commit != repo.revision:
        raise repo.unavailable(f"the hub answered with another commit, {commit}")
    try:
        kept = {
            file.rfilename: {"size": file.size, "blob_id": file.blob_id}
            | ({"lfs_sha256": file.lfs.sha256, "lfs_size": file.lfs.size} if file.lfs else {})
            for file in files
        }
        listing = {name: Entry(file["size"], file.get("lfs_sha256") or file["blob_id"]) for name, file in kept.items()}
    except (TypeError, ValueError, AttributeError) as error:
        raise repo.unavailable(f"the hub does not tell its files' sizes and hashes ({error})") from None
    with contextlib.suppress(OSError):  # a cache that cannot be written is the downloads' to report
        (place.folder / "trees").mkdir(parents=True, exist_ok=True)
        tree = place.folder / "trees" / f"{commit}.json"
        write_atomically(tree, json.dumps({"format_version": 1, "files": kept}, indent=1))
    return listing


def _complete(
    repo: Repo, place: Place, listing: Listing, choose: Choose, patience: Patience, progress: Downloads
) -> list[str]:
    """Fetches what is missing of the chosen files, and returns their names. Raises Damaged."""
    chosen = choose(listing)
    missing = []
    for name in chosen:
        if is_sound(place.file(name), listing[name]):
            continue
        if place.file(name).exists():
            progress.say(f"{place.file(name)} is damaged: fetching it again")
        missing.append(name)
    if not missing:
        return chosen
    with _writable(repo, place, missing):
        for folder in (place.folder / "blobs", place.snapshot, place.locks):
            folder.mkdir(parents=True, exist_ok=True)
        size = sum(listing[name].size for name in missing if not place.blob(listing[name]).exists())
        free = shutil.disk_usage(place.folder).free + sum(p.stat().st_size for p in _partial(place, listing, missing))
        if size > free:
            room = f"its files need {filesize(size)} and {place.cache} has {filesize(free)} left"
            raise repo.unavailable(f"{room}: make room, or set HF_HOME=DIR")
        for name in missing:
            with _alone(place, listing[name], name, progress):
                if not is_sound(place.blob(listing[name]), listing[name]):
                    _fetch(repo, place, name, listing[name], patience, progress)
                place.link(name, listing[name])
    return chosen


def _partial(place: Place, listing: Listing, names: list[str]) -> list[Path]:
    found = (place.folder / "blobs" / f"{listing[name].name}.incomplete" for name in names)
    return [path for path in found if path.exists()]


@contextlib.contextmanager
def _writable(repo: Repo, place: Place, missing: list[str]) -> Iterator[None]:
    """Inside, a cache that cannot be written is one line."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise repo.unavailable(f"no space left in {place.cache}: make room, or set HF_HOME=DIR") from None
        said = error.strerror or str(error)
        raise repo.unavailable(
            f"the cache {place.cache} cannot be written ({said}), and {missing[0]} is to be fetched: set HF_HOME=DIR"
        ) from None


@contextlib.contextmanager
def _alone(place: Place, entry: Entry, name: str, progress: Downloads) -> Iterator[None]:
    """Inside, no other process fetches this file."""
    from filelock import Timeout
    from huggingface_hub.utils import WeakFileLock

    path = place.locks / f"{entry.name}.lock"
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(WeakFileLock(path, timeout=1))
        except Timeout:
            progress.say(f"another process fetches {name} of {place.repo.id}: waiting for it")
            stack.enter_context(WeakFileLock(path))
        yield


def _fetch(repo: Repo, place: Place, name: str, entry: Entry, patience: Patience, progress: Downloads) -> None:
    """Downloads a file into its blob, going on where an earlier attempt stopped. Raises Damaged after two."""
    partial = place.blob(entry).with_name(f"{entry.name}.incomplete")
    for attempt in (1, 2):
        with partial.open("ab") as stream, progress.file(f"{repo.id} {name}", entry.size):
            _download(repo, name, entry, stream, patience, progress)
        if is_sound(partial, entry):
            partial.replace(place.blob(entry))
            return
        partial.unlink()
        if attempt == 1:
            progress.say(f"{name} of {repo.id} came damaged: fetching it again")
    raise Damaged(f"{name} came twice with other bytes than the hub states for it (hash {entry.name})")


def _download(repo: Repo, name: str, entry: Entry, stream: Any, patience: Patience, progress: Downloads) -> None:
    """Adds what is missing to the file behind `stream`."""
    from huggingface_hub import get_session, hf_hub_url
    from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]
    from huggingface_hub.utils import build_hf_headers, hf_raise_for_status

    address = hf_hub_url(repo.id, name, repo_type=repo.kind, revision=repo.revision)
    what = f"{name} of {repo.id}"
    while True:
        there = stream.seek(0, os.SEEK_END)
        if there >= entry.size:
            return
        # Plain bytes: a range of a compressed answer would be another range.
        headers = build_hf_headers() | {"Accept-Encoding": "identity"} | ({"Range": f"bytes={there}-"} if there else {})
        try:
            with contextlib.ExitStack() as stack:
                with patience.answer_to(what):
                    streamed = get_session().stream("GET", address, headers=headers, timeout=time_limit())
                    response = stack.enter_context(streamed)
                hf_raise_for_status(response)
                patience.reached = True
                if there and response.status_code != 206:  # the whole file once more
                    stream.truncate(0)
                    there = 0
                progress.at(there)
                for part in response.iter_bytes():
                    stream.write(part)
                    there += len(part)
                    progress.at(there)
                    patience.renewed()
                    if there > entry.size:
                        return
            return
        except HTTPError as error:
            if getattr(getattr(error, "response", None), "status_code", None) == 416:  # no such range
                stream.truncate(0)
            else:
                patience.after(error, what)
        except OSError:  # of the file
            raise
        except Exception as error:  # whatever an address or an answer that is none raises
            raise repo.unavailable(why(error, repo)) from None
