"""The ways in which a run stops on purpose, and wording that messages share."""

import argparse
import difflib
import signal
import zipfile
import zlib
from collections.abc import Iterable

LONGEST = 1000  # characters of an error's line


class UserError(Exception):
    """A mistake that the user can mend: one line that says what is wrong, with what value, and what to do.

    Entry points print it without a traceback and leave with status 2. It stays one line whatever was given: what
    cannot be printed (line ends, control characters) is escaped, and the middle of what is too long is left out.
    """

    def __init__(self, message: str):
        line = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(message))
        half = LONGEST // 2
        super().__init__(line if len(line) <= LONGEST else f"{line[:half]} … {line[-half:]}")


class NothingFinished(UserError):
    """Tables were asked for of an experiment of which no run is finished."""


class Note(UserWarning):
    """Something is done otherwise than was asked, and right."""


class NonFiniteGradient(FloatingPointError):
    """A loss or gradient became infinite or NaN: the step was not taken and the weights are as they were."""


class OutOfMemory(UserError):
    """The device's memory did not suffice, which another run on it may have had a part in."""


class Stopped(Exception):
    """The run was asked to stop (SIGTERM, Ctrl-C) and has left a checkpoint."""

    def __init__(self, signum: int):
        super().__init__(signum)
        self.signum = signum

    def __str__(self) -> str:
        return f"stopped by {signal.Signals(self.signum).name}; the same command goes on from the checkpoint"


UNREADABLE_ZIP = (OSError, zipfile.BadZipFile, zipfile.LargeZipFile, zlib.error, RuntimeError, EOFError)
"""What reading a damaged or foreign zip can raise."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The end of an error message: the nearest known name if there is one, else all of them."""
    known = sorted(set(map(str, known)))
    near = difflib.get_close_matches(str(name), known, n=1, cutoff=0.6)
    return f"did you mean '{near[0]}'?" if near else f"known: {', '.join(known)}"


class Parser(argparse.ArgumentParser):
    """Raises UserError where argparse would print its usage and leave."""

    def error(self, message: str):
        raise UserError(f"{message}; see --help")
