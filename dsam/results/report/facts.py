"""What the runs' own files say of where they come from: provenance.json of each, config.yaml of one of a kind."""

import json
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import yaml

from dsam.text import counted

DONE = ["finished", "diverged"]


@dataclass(frozen=True)
class Facts:
    """`values`: fact (as 'versions.torch') -> its values with how many of the `runs` had each."""

    runs: int
    values: dict[str, Counter]

    @classmethod
    def read(cls, frame: pd.DataFrame, runs_dir: Path) -> "Facts":
        """Of the runs in `frame` that have a result."""
        values: dict[str, Counter] = defaultdict(Counter)
        folders = frame.loc[frame["status"].isin(DONE), "folder"]
        for folder in folders:
            try:
                content = json.loads((runs_dir / folder / "provenance.json").read_text(encoding="utf-8"))
                flat = dict(_flat(content))
            except (OSError, ValueError, AttributeError):
                flat = {"provenance.json": "cannot be read"}
            for name, value in flat.items():
                values[name][str(value)] += 1
        return cls(len(folders), values)

    def text(self, name: str, most: int = 3) -> str:
        """The fact's value; where runs differ, at most so many values with the number of their runs."""
        counts = self.values.get(name, Counter())
        if len(counts) == 1 and counts.total() == self.runs:
            return next(iter(counts))
        shown = [f"{value} ({counted(count, 'run')})" for value, count in counts.most_common(most)]
        more = [f"{len(counts) - most} more"] if len(counts) > most else []
        return "; ".join(shown + more) or "not recorded"

    def span(self, name: str) -> str:
        """The first and the last of the fact's values, which are times."""
        times = sorted(self.values.get(name, ()))
        return " to ".join(dict.fromkeys([*times[:1], *times[-1:]])) or "not recorded"


def _flat(content: dict, prefix: str = ""):
    for name, value in content.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def configurations(frame: pd.DataFrame, runs_dir: Path) -> dict[tuple[str, str], dict]:
    """(model, task) -> the config.yaml of the first of its runs that has one."""
    found = {}
    for run in frame[frame["status"].isin(DONE)].itertuples():
        if (run.model, run.task) not in found:
            try:
                text = (runs_dir / run.folder / "config.yaml").read_text(encoding="utf-8")
                found[run.model, run.task] = dict(yaml.safe_load(text))
            except (OSError, ValueError, TypeError, yaml.YAMLError):
                continue
    return found


def whole_numbers(values: Iterable[int]) -> str:
    """Numbers in order, three or more that follow each other as '0 to 24'."""
    groups: list[list[int]] = []
    for value in sorted(map(int, values)):
        if groups and value == groups[-1][-1] + 1:
            groups[-1].append(value)
        else:
            groups.append([value])
    return ", ".join(f"{g[0]} to {g[-1]}" if len(g) > 2 else ", ".join(map(str, g)) for g in groups) or "none"
