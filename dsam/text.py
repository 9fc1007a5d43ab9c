"""Wording that messages share."""

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


def published(command: Sequence[str]) -> str:
    """Words of a command line for others: folders of this machine are DIR, and a script is named from the project's
    root."""

    def word(given: str) -> str:
        name, sign, value = given.partition("=")
        if not sign:
            name, value = "", given
        if not value.lstrip("'\"").startswith(("/", "~")) or value == "/":
            return given
        return f"{name}{sign}" + ("/".join(value.split("/")[-2:]) if value.endswith(".py") else "DIR")

    return " ".join(map(word, command))
