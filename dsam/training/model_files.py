"""What a model's numbers depend on, and whether a folder holds a model, without transformers."""

import functools
import hashlib
import json
from pathlib import Path

from ..config import Model
from ..errors import UserError
from ..glue.builtin import VOCABULARY

WEIGHT_FILES = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin")
TOKENIZER_FILES = ("tokenizer.json", "vocab.txt", "vocab.json")


def fingerprint(model: Model) -> str:
    """What the model's numbers depend on: the bytes of a folder's files, or id and revision, or the architecture."""
    if model.path:
        return f"sha256:{_folder_digest(str(check_folder(model.path)))}"
    if model.id:
        return f"{model.id}@{model.revision}"
    described = json.dumps(model.architecture, sort_keys=True).encode() + VOCABULARY.read_bytes()
    return f"sha256:{hashlib.sha256(described).hexdigest()}"


@functools.cache
def _folder_digest(path: str) -> str:
    digest = hashlib.sha256()
    for file in sorted(Path(path).iterdir()):
        if file.suffix in (".json", ".safetensors", ".bin", ".txt", ".model") and file.is_file():
            with file.open("rb") as stream:
                digest.update(f"{file.name} {hashlib.file_digest(stream, 'sha256').hexdigest()}\n".encode())
    return digest.hexdigest()


def check_folder(path: str) -> Path:
    """The folder, if it holds a configuration, weights and a tokenizer; else UserError that names what is missing."""
    folder = Path(path).expanduser()
    if not folder.is_dir():
        raise UserError(f"model.path={path} is not a folder")
    for what, names in (("configuration", ("config.json",)), ("weights", WEIGHT_FILES), ("tokenizer", TOKENIZER_FILES)):
        if not any((folder / name).is_file() for name in names):
            raise UserError(f"model.path={path} has no {what} ({' or '.join(names)})")
    return folder
