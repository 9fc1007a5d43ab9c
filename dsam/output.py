"""What is printed, to readers who may have seen enough."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class _Output:
    """A stream whose reader may leave; what is written after that is lost."""

    def __init__(self, wrapped: Any):
        self.wrapped = wrapped

    def __getattr__(self, name: str) -> Any:
        return getattr(self.wrapped, name)

    def write(self, text: str) -> int:
        try:
            return self.wrapped.write(text)
        except BrokenPipeError:
            return self._left(len(text))

    def flush(self) -> None:
        try:
            self.wrapped.flush()
        except BrokenPipeError:
            self._left(0)

    def _left(self, written: int) -> int:
        os.dup2(os.open(os.devnull, os.O_WRONLY), self.wrapped.fileno())
        return written


@contextmanager
def reader_may_leave() -> Iterator[None]:
    """Inside, a reader of output or messages that leaves (`| head -1`, or `2>&1 | tee` at Ctrl-C) ends nothing."""
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = _Output(sys.stdout), _Output(sys.stderr)  # type: ignore[assignment]
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        sys.stdout, sys.stderr = before
