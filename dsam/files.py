"""Files that a kill at any moment leaves whole: the old one or the new one."""

import hashlib
import math
import os
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO


@contextmanager
def replacing(path: Path, name: Callable[[], Path] | None = None) -> Iterator[BinaryIO]:
    """A file beside `path` that takes its place once the block has ended and all of it is on disk.

    Args:
        name: called once all is written, says where the file goes in place of `path` (a name that holds its hash).
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}{secrets.randbelow(10**6):06d}")
    try:
        with temporary.open("wb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        temporary.rename(path if name is None else name())
    finally:
        temporary.unlink(missing_ok=True)


class Hashed:
    """A stream to write to that knows the sha256 of all that was written, so that nobody reads it again."""

    def __init__(self, stream: BinaryIO):
        self.stream, self.sha256 = stream, hashlib.sha256()

    def write(self, data: bytes | memoryview) -> int:
        self.sha256.update(data)
        return self.stream.write(data)

    def flush(self) -> None:
        self.stream.flush()


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
