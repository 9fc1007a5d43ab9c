"""What a model's numbers depend on, and whether a folder holds a model, without transformers."""

import functools
import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path

from .. import hub
from ..config import Model
from ..errors import UserError
from ..glue.builtin import VOCABULARY

WEIGHT_FILES = (
    *("model.safetensors", "model.safetensors.index.json"),
    *("pytorch_model.bin", "pytorch_model.bin.index.json"),
)
"""In the order in which transformers looks for them."""
TOKENIZER_FILES = ("tokenizer.json", "vocab.txt", "vocab.json")
PARTS = (("configuration", ("config.json",)), ("weights", WEIGHT_FILES), ("tokenizer", TOKENIZER_FILES))
"""What a model consists of, and the files of which one must be there."""
ADAPTER = "adapter_config.json"
READ_FROM_HUB = (
    *("config.json", "tokenizer*.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.*", "merges.txt", "bpe.codes", "*.model", "*.tiktoken"),
)
"""Patterns of all that is read of a repository besides its weights."""


def fingerprint(model: Model) -> str:
    """What the model's numbers depend on: the bytes of a folder's files, or id and revision, or the architecture."""
    if model.path:
        return f"sha256:{_folder_digest(str(check_folder(model.path)))}"
    if model.id:
        hub.require_commit("model", model.id, model.revision, "model.revision")
        return f"{model.id}@{model.revision}"
    described = json.dumps(model.architecture, sort_keys=True).encode() + VOCABULARY.read_bytes()
    return f"sha256:{hashlib.sha256(described).hexdigest()}"


@functools.cache
def _folder_digest(path: str) -> str:
    digest = hashlib.sha256()
    with _readable(path, path):
        files = sorted(Path(path).iterdir())
    for file in files:
        with _readable(path, file.name):
            if file.suffix in (".json", ".safetensors", ".bin", ".txt", ".model") and file.is_file():
                with file.open("rb") as stream:
                    digest.update(f"{file.name} {hashlib.file_digest(stream, 'sha256').hexdigest()}\n".encode())
    return digest.hexdigest()


@contextmanager
def _readable(path: str, what: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"model.path={path}: {what} cannot be read: {error.strerror or error}") from None


def folder_of(model: Model) -> Path:
    """The complete folder of a model: its own, or of the hub's files at its commit, checked and downloaded if need be.

    Raises UserError where something is missing.
    """
    if model.path:
        return check_folder(model.path)
    assert model.id and model.revision
    name = f"model {model.id} at {model.revision}"
    return _without_adapter(hub.snapshot("model", model.id, model.revision, functools.partial(_needed, name))[0], name)


def _needed(model: str, names: Iterable[str]) -> list[str]:
    """Of a repository's files those that transformers reads: of the weights one kind, safetensors where there are."""
    top = [name for name in names if "/" not in name]
    _check(model, top)
    weights = next(w for w in WEIGHT_FILES if w in top)
    shards = f"{weights.split('.')[0]}-*-of-*.{weights.split('.')[1]}" if weights.endswith(".index.json") else weights
    return sorted(n for n in top if any(fnmatchcase(n, p) for p in (*READ_FROM_HUB, weights, shards)))


def check_folder(path: str) -> Path:
    """The folder, if it holds a configuration, weights and a tokenizer; else UserError that names what is missing."""
    folder = Path(os.path.expanduser(path))
    if not folder.is_dir():
        raise UserError(f"model.path={path} is not a folder")
    with _readable(path, path):
        names = [file.name for file in folder.iterdir() if file.is_file()]
    _check(f"model.path={path}", names)
    return _without_adapter(folder, f"model.path={path}")


def _without_adapter(folder: Path, model: str) -> Path:
    """The folder. UserError where transformers, with peft installed, would put an adapter in and freeze all else."""
    if (folder / ADAPTER).exists():
        raise UserError(
            f"{model}: {folder} has an adapter beside its weights ({ADAPTER}): merge it into them (peft's "
            "merge_and_unload), or take it away"
        )
    return folder


def _check(model: str, names: list[str]) -> None:
    for what, one_of in PARTS:
        if not set(one_of) & set(names):
            raise UserError(f"{model} has no {what} ({' or '.join(one_of)})")
