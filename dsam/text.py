"""Wording that messages share."""

import re
import shlex
from collections.abc import Sequence


def counted(number: int, what: str) -> str:
    """1 run, 2 runs."""
    return f"{number} {what}{'' if number == 1 else 's'}"


def duration(seconds: float) -> str:
    """For people: 45 s, 12 min, 3.4 h."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def filesize(count: int) -> str:
    """Bytes for people: 12 kB, 3.4 MB, 440 MB."""
    if count < 1e6:
        return f"{count / 1e3:.0f} kB"
    return f"{count / 1e6:.{1 if count < 1e8 else 0}f} MB"


def first_line(error: object, otherwise: str = "") -> str:
    """The first line of an error's message that says something; `otherwise` where it has none."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), otherwise)


def described(error: Exception) -> str:
    """An error of another library in one line: its kind and all that it says."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def split_command(command: str) -> list[str]:
    """The words of a command line as it was recorded, by a shell's rules where they hold."""
    try:
        return shlex.split(command)
    except ValueError:  # recorded without quotes, as once was done
        return command.split(" ")


def published(command: Sequence[str]) -> str:
    """The command line of these words for others, who can type it: see `public_word`."""
    return shlex.join(map(public_word, command))


def public_word(word: str) -> str:
    """A word of a command or of a text for others: a folder of this machine is DIR, and a script is named from the
    project's root."""
    name, sign, value = word.partition("=")
    if not sign:
        name, value = "", word
    if not re.match(r"['\"]?(/.|~[\w.-]*/)", value):
        return word
    return f"{name}{sign}" + ("/".join(value.split("/")[-2:]) if value.endswith(".py") else "DIR")
