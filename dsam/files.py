"""Files that a kill at any moment leaves whole: the old one or the new one."""

import math
import os
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO


@contextmanager
def replacing(path: Path, name: Callable[[Path], Path] | None = None) -> Iterator[BinaryIO]:
    """A file beside `path` that takes its place once the block has ended and all of it is on disk.

    Args:
        name: called with the complete file, says where it goes in place of `path` (a name that holds its hash).
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}{secrets.randbelow(10**6):06d}")
    try:
        with temporary.open("wb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        temporary.rename(path if name is None else name(temporary))
    finally:
        temporary.unlink(missing_ok=True)


def write_atomically(path: Path, contents: str | bytes) -> None:
    with replacing(path) as stream:
        stream.write(contents.encode() if isinstance(contents, str) else contents)


def for_json(value: Any) -> Any:
    """`value` with NaN and infinities as null, never as 0."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {k: for_json(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [for_json(v) for v in value]
    return value
