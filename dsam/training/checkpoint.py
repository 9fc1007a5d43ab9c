"""Checkpoints that survive a kill at any moment: written aside, synced, renamed; the last two are kept. That goes on
beside the training, from a copy of its state."""

import copy
import hashlib
import shutil
import sys
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..files import Hashed, replacing
from ..text import first_line

KEPT = 2


class Checkpoints:
    """The checkpoints in `folder`, named by step; a damaged newest one is said, set aside and passed over.

    Inside `with checkpoints:`, and not after it, one may be being written: who leaves the block waits for it, and gets
    the OSError of one that could not be written, unless something else was raised already.

    Args:
        allowed: raises where no more may be written.
    """

    def __init__(self, folder: Path, allowed: Callable[[], None] = lambda: None):
        self.folder, self._allowed = folder, allowed
        self.worked = 0.0  # processor seconds that writing the last one took, which the training may have lacked
        self._last: Future[None] | None = None
        self._loaded: dict | None = None

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind, *_) -> None:
        with suppress(*([] if kind is None else [Exception])):
            self.wait()

    def save(self, step: int, state: dict) -> None:
        """Copies `state`, which may change once this returns, and begins to write it, after the one before.

        OSError, of this or a later call, where the disk refuses; the earlier checkpoints are then still there.
        """
        self.wait()
        self._allowed()
        writer = ThreadPoolExecutor(1, "checkpoint")  # joined before the interpreter ends, as a daemon would not be
        self._last = writer.submit(self._write, step, on_host(state))
        writer.shutdown(wait=False)

    def writing(self) -> bool:
        """Whether one is being written. OSError where the last could not be."""
        if self._last is not None and self._last.done():
            self.wait()
        return self._last is not None

    def wait(self) -> None:
        """Returns once none is being written. OSError, once, where the last could not be."""
        last = self._last
        if last is not None:
            try:
                last.result()
            finally:  # after Ctrl-C it goes on
                self._last = None if last.done() else last

    def _write(self, step: int, state: dict) -> None:
        began = time.thread_time()
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            for left in self.folder.glob(".writing.*"):  # by a process that was killed while it wrote
                left.unlink(missing_ok=True)
            with replacing(
                self.folder / "writing", lambda: self.folder / f"{step:09d}-{_short(hashed.sha256)}.pt"
            ) as stream:
                hashed = Hashed(stream)
                torch.save(state, hashed)  # type: ignore[arg-type]  # asks for no more than write and flush
        except RuntimeError as error:  # torch does not say why it could not write
            full = shutil.disk_usage(self.folder).free < 2**20
            why = f"no space left on {self.folder}" if full else first_line(error)
            raise OSError(f"checkpoint at step {step} could not be written: {why}") from None
        for old in self._newest_first()[KEPT:]:
            old.unlink(missing_ok=True)
        self.worked = time.thread_time() - began

    def found(self, device: str = "cpu") -> bool:
        """Whether there is one for `load`, which then returns what was read here."""
        self._loaded = self.load(device)
        return self._loaded is not None

    def load(self, device: str = "cpu") -> dict | None:
        """The state of the newest checkpoint that is whole and was written on such a device, or None."""
        loaded, self._loaded = self._loaded, None
        if loaded is not None:
            return loaded
        for path in self._newest_first():
            if _digest(path) == path.stem.split("-")[1]:
                state = torch.load(path, map_location="cpu", weights_only=True)
                if (written := state.get("device", "cpu")) == device:
                    return state
                # Random states do not translate, and a run that began there would repeat on neither.
                print(f"checkpoint {path} is of {written}, and this is {device}: starting afresh", file=sys.stderr)
                path.rename(path.with_suffix(f".{written}"))
                continue
            print(f"checkpoint {path} is damaged; going on from the one before", file=sys.stderr)
            path.rename(path.with_suffix(".damaged"))
        return None

    def clear(self) -> None:
        """Removes all of them, once none is being written: the run is finished."""
        self.wait()
        if self.folder.is_dir():
            for path in self.folder.iterdir():
                path.unlink(missing_ok=True)
            self.folder.rmdir()

    def _newest_first(self) -> list[Path]:
        return sorted(self.folder.glob("*-*.pt"), reverse=True)


def on_host(state: Any, copies: dict[tuple, Tensor] | None = None) -> Any:
    """`state` (nested dicts, lists and tuples) with a copy of each tensor on the CPU; what is one there, as shared
    weights are, stays one."""
    copies = {} if copies is None else copies
    if isinstance(state, Tensor):
        place = state.device, state.data_ptr(), state.dtype, state.shape, state.stride()
        if place not in copies:
            copies[place] = state.detach().to("cpu", copy=True)
        return copies[place]
    if isinstance(state, dict):
        copied = copy.copy(state)  # which keeps what a module's state_dict has beside its items
        for key, value in state.items():
            copied[key] = on_host(value, copies)
        return copied
    if isinstance(state, list | tuple):
        return type(state)(on_host(value, copies) for value in state)
    return state


def _short(sha256) -> str:
    return sha256.hexdigest()[:16]


def _digest(path: Path) -> str:
    with path.open("rb") as stream:
        return _short(hashlib.file_digest(stream, "sha256"))
