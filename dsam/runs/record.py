"""A run's folder: written so that a kill at any moment leaves either the old file or the new one."""

import hashlib
import json
import sys
import traceback
from contextlib import ExitStack, contextmanager
from pathlib import Path

import yaml

from ..errors import UserError
from ..files import for_json, write_atomically
from ..text import first_line
from .lease import Busy, Lease


def seal(result: dict) -> str:
    """sha256 of a result's contents: tells one that was edited from one that a run left."""
    contents = {k: v for k, v in result.items() if k != "result_sha256"}
    return hashlib.sha256(json.dumps(contents, sort_keys=True).encode()).hexdigest()


class Record:
    """The folder of one run. It is finished exactly when `result.json` exists."""

    def __init__(self, folder: Path):
        self.folder = Path(folder)
        self.metrics = self.folder / "metrics.jsonl"
        self._lease: Lease | None = None

    def result(self, set_aside: bool = True, then: str = "the run is done again") -> dict | None:
        """The finished run's result, or None. A file that is not one is set aside, and that is said, with what then
        happens."""
        path = self.folder / "result.json"
        try:
            result = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(result, dict) or result.get("id") != self.folder.name:
                reason = "is not this run's result"
            elif result.get("result_sha256") != seal(result):
                reason = "was edited"
            else:
                return result
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:  # which says nothing of what is in it: to do the run again might lose it
            raise UserError(f"{path} cannot be read: {error.strerror or error}") from None
        except (ValueError, UnicodeDecodeError) as error:
            reason = f"cannot be read ({error})"
        if not set_aside:
            return None
        print(f"{path} {reason}: set aside as result.json.damaged; {then}", flush=True)
        path.rename(path.with_name("result.json.damaged"))
        return None

    def failure(self) -> dict | None:
        """Why the latest attempt failed, or None."""
        return self._read("failure.json")

    def provenance(self) -> dict | None:
        """What the latest attempt was made with, or None."""
        return self._read("provenance.json")

    def _read(self, name: str) -> dict | None:
        try:
            found = json.loads((self.folder / name).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return found if isinstance(found, dict) else None

    def fail(self, error: BaseException) -> str:
        """Notes why the attempt failed, with the traceback in log.txt where the disk allows; returns the reason."""
        reason = f"{type(error).__name__}: {first_line(error, 'no message')}"
        log = self.folder / "log.txt"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with log.open("a", encoding="utf-8") as stream:
                traceback.print_exception(error, file=stream)
            self.write("failure.json", {"reason": reason, "log": str(log)})
        except OSError as refused:
            print(f"{log} could not be written: {refused}", file=sys.stderr)
        return reason

    @contextmanager
    def worked_on(self):
        """Inside, no other process works on the run: Busy, a UserError, says who does."""
        with ExitStack() as stack:
            try:
                self._lease = stack.enter_context(Lease(self.folder))
            except OSError as error:
                raise self._unwritable(error) from None
            yield

    def require_held(self) -> None:
        """Busy where another process has taken the run over: what is written from here on is theirs to write."""
        if self._lease is not None and self._lease.lost:
            raise Busy(f"{self.folder} was taken over by another process while this one did not answer")

    def open(self, config: dict, provenance: dict) -> None:
        """Makes the folder and writes what is known before work starts. Raises UserError where it cannot."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            for left in self.folder.glob(".*.*[0-9]"):  # by a process that was killed while it wrote
                if left.suffix[1:].isdigit():
                    left.unlink(missing_ok=True)
            write_atomically(
                self.folder / "config.yaml", yaml.safe_dump(for_json(config), sort_keys=False, allow_unicode=True)
            )
            self.write("provenance.json", provenance)
            (self.folder / "failure.json").unlink(missing_ok=True)
        except OSError as error:
            raise self._unwritable(error) from None

    def _unwritable(self, error: OSError) -> UserError:
        return UserError(f"cannot write the run folder {self.folder}: {error.strerror or error}; set paths.runs=DIR")

    def write(self, name: str, contents: dict) -> None:
        write_atomically(
            self.folder / name, json.dumps(for_json(contents), indent=1, ensure_ascii=False, allow_nan=False) + "\n"
        )

    def finish(self, result: dict) -> None:
        """Writes result.json, after which the run is finished."""
        self.require_held()
        result = for_json(result)
        self.write("result.json", result | {"result_sha256": seal(result)})

    def log(self, line: dict) -> None:
        """Appends one line to metrics.jsonl."""
        self.require_held()
        with self.metrics.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(for_json(line), allow_nan=False) + "\n")

    def cut_log(self, step: int) -> list[dict]:
        """Drops the lines after `step`, which a resumed run writes again, and returns them."""
        kept, dropped = [], []
        if self.metrics.exists():
            for line in self.metrics.read_text(encoding="utf-8").splitlines(keepends=True):
                try:
                    found = json.loads(line)
                    if found["step"] <= step and line.endswith("\n"):
                        kept.append(line)
                    else:
                        dropped.append(found)
                except (ValueError, KeyError):
                    continue  # a line half written when the run was killed
            write_atomically(self.metrics, "".join(kept))
        return dropped
