"""Checkpoints that survive a kill at any moment: written aside, synced, renamed; the last two are kept."""

import hashlib
import shutil
import sys
from pathlib import Path

import torch

from ..files import replacing
from ..text import first_line

KEPT = 2


class Checkpoints:
    """The checkpoints in `folder`, named by step; a damaged newest one is said, set aside and passed over."""

    def __init__(self, folder: Path):
        self.folder = folder

    def save(self, step: int, state: dict) -> None:
        """Raises OSError where the disk refuses; the earlier checkpoints are then still there."""
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            for left in self.folder.glob(".writing.*"):  # by a process that was killed while it wrote
                left.unlink(missing_ok=True)
            named = self.folder / f"{step:09d}-"
            with replacing(self.folder / "writing", lambda file: Path(f"{named}{_digest(file)}.pt")) as stream:
                torch.save(state, stream)
        except RuntimeError as error:  # torch does not say why it could not write
            full = shutil.disk_usage(self.folder).free < 2**20
            why = f"no space left on {self.folder}" if full else first_line(error)
            raise OSError(f"checkpoint at step {step} could not be written: {why}") from None
        for old in self._newest_first()[KEPT:]:
            old.unlink(missing_ok=True)

    def load(self, device: str = "cpu") -> dict | None:
        """The state of the newest checkpoint that is whole and was written on such a device, or None."""
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
        """Removes all of them: the run is finished."""
        if self.folder.is_dir():
            for path in self.folder.iterdir():
                path.unlink(missing_ok=True)
            self.folder.rmdir()

    def _newest_first(self) -> list[Path]:
        return sorted(self.folder.glob("*-*.pt"), reverse=True)


def _digest(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()[:16]
