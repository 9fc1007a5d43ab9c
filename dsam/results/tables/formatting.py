"""Numbers as a reader sees them; a missing one is a dash, never a zero."""

from collections.abc import Sequence

import pandas as pd

from dsam.results.statistics import STATUSES

DASH = "–"


def percent(value: float, sign: str = "") -> str:
    """A fraction ×100 with 2 decimals."""
    return DASH if pd.isna(value) else f"{round(100 * value, 2) + 0.0:{sign}.2f}"  # + 0.0: no -0.00


def number(value: float, kind: str = "") -> str:
    """A figure with 2 decimals; kind 'p' is a probability, 'seconds' a duration of any size."""
    if pd.isna(value):
        return DASH
    if kind == "p":
        return "<0.0001" if value < 1e-4 else f"{value:.4f}"
    return f"{value:#.3g}" if kind == "seconds" and value < 99.95 else f"{value:.2f}"


def interval(row: pd.Series) -> str:
    """A difference with its interval: '+0.52 [-0.10, +1.14]'."""
    if pd.isna(row["difference"]) or pd.isna(row["low"]):
        return percent(row["difference"], "+")
    return f"{percent(row['difference'], '+')} [{percent(row['low'], '+')}, {percent(row['high'], '+')}]"


def first_of(items: Sequence[str], most: int = 6) -> str:
    """The first few of a list in a note; the tables have them all."""
    rest = f"; and {len(items) - most} more" if len(items) > most else ""
    return "; ".join(items[:most]) + rest


def score_cell(row: pd.Series) -> str:
    """Mean ± sd and the runs behind it, with all that did not end well: '66.10 ± 1.20 (4/5, 1 diverged)'."""
    mean = percent(row["mean"]) + (f" ± {percent(row['sd'])}" if pd.notna(row["sd"]) else "")
    runs = [str(row["count"]) if row["count"] == row["expected"] else f"{row['count']}/{row['expected']}"]
    for name in ("degenerate", *STATUSES, "no_score"):
        if row[name]:
            runs.append(f"{row[name]} {name.replace('no_score', 'without score')}")
    return f"{mean} ({', '.join(runs)})"
