"""Checkpoints that survive a kill at any moment: written aside, synced, renamed; the last two are kept."""

import hashlib
import os
import shutil
import sys
from pathlib import Path

import torch

from ..config import first_line

KEPT = 2


class Checkpoints:
    """The checkpoints in `folder`, named by step; a damaged newest one is said, set aside and passed over."""

    def __init__(self, folder: Path):
        self.folder = folder

    def save(self, step: int, state: dict) -> None:
        """Raises OSError where the disk refuses; the earlier checkpoints are then still there."""
        self.folder.mkdir(parents=True, exist_ok=True)
        temporary = self.folder / "writing"
        try:
            with temporary.open("wb") as stream:
                torch.save(state, stream)
                stream.flush()
                os.fsync(stream.fileno())
            with temporary.open("rb") as stream:
                digest = hashlib.file_digest(stream, "sha256").hexdigest()
            temporary.rename(self.folder / f"{step:09d}-{digest[:16]}.pt")
        except RuntimeError as error:  # torch does not say why it could not write
            full = shutil.disk_usage(self.folder).free < 2**20
            why = f"no space left on {self.folder}" if full else first_line(error)
            raise OSError(f"checkpoint at step {step} could not be written: {why}") from None
        finally:
            temporary.unlink(missing_ok=True)
        for old in self._newest_first()[KEPT:]:
            old.unlink(missing_ok=True)

    def load(self) -> dict | None:
        """The state of the newest checkpoint that is whole, or None."""
        for path in self._newest_first():
            with path.open("rb") as stream:
                digest = hashlib.file_digest(stream, "sha256").hexdigest()
            if digest[:16] == path.stem.split("-")[1]:
                return torch.load(path, map_location="cpu", weights_only=True)
            print(f"checkpoint {path} is damaged; going on from the one before", file=sys.stderr)
            path.rename(path.with_suffix(".damaged"))
        return None

    def clear(self) -> None:
        """Removes all of them: the run is finished."""
        if self.folder.is_dir():
            for path in self.folder.iterdir():
                path.unlink(missing_ok=True)
            self.folder.rmdir()

    def _newest_first(self) -> list[Path]:
        return sorted(self.folder.glob("*-*.pt"), reverse=True)
