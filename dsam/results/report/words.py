"""What a table says, in sentences: made from its numbers alone."""

import pandas as pd

from dsam.results.tables.build import Tables
from dsam.text import counted


def in_words(built: Tables, baseline: str = "adamw") -> list[str]:
    """A paragraph for each model: which method is ahead of `baseline` and by how much, whether that can be told from
    chance, and at what compute."""
    found = []
    for model, rows in built.statistics.values.groupby("model", sort=False):
        compared = rows.dropna(subset=["low"])
        if compared.empty:
            if rows["difference"].notna().any():
                what = (
                    f"with so few seeds there is no interval, and no difference to {baseline} can be told from chance"
                )
            else:
                what = f"no method has runs on the same tasks and seeds as {baseline}"
            found.append(f"{model}: {what}.")
            continue
        cost = built.cost.values[built.cost.values["model"] == model].set_index("method")
        first = compared.loc[compared["difference"].idxmax()]
        told = compared[(compared["low"] > 0) | (compared["high"] < 0)]
        plain = [name for name in compared["method"] if name.startswith(baseline)]
        sentences = [
            f"{model}: over {counted(int(first['tasks']), 'task')}, {first['method']} has the highest mean: "
            f"{_points(first)} beside {baseline}, from {counted(int(first['pairs']), 'pair')} of equal task and seed, "
            f"at {_compute(cost, first['method'])} its compute."
        ]
        if told.empty:
            sentences.append(f"No method can be told from {baseline}: every interval contains 0.")
        else:
            ahead = ", ".join(told.loc[told["low"] > 0, "method"]) or "none"
            behind = ", ".join(told.loc[told["high"] < 0, "method"]) or "none"
            sentences.append(f"By their intervals these differ from {baseline}: above it {ahead}; below it {behind}.")
        if (compared["p_holm"] < 0.05).any():
            names = ", ".join(compared.loc[compared["p_holm"] < 0.05, "method"])
            sentences.append(f"The sign-flip test, corrected for {len(compared)} methods, says so of {names}.")
        else:
            corrected = min(1.0, first["smallest_p"] * len(compared))
            could = "" if corrected < 0.05 else f", and could not with so few runs: its p is at least {corrected:.2g}"
            many = counted(len(compared), "method")
            sentences.append(f"The sign-flip test, corrected for {many}, tells none of them apart{could}.")
        for name in plain if first["method"] not in plain else []:
            row = compared.set_index("method").loc[name]
            sentences.append(f"{name}, plain training, has {_points(row)} at {_compute(cost, name)} the compute.")
        found.append(" ".join(sentences))
    return found


def _points(row: pd.Series) -> str:
    low, high = 100 * row["low"], 100 * row["high"]
    return f"{100 * row['difference']:+.1f} points (95 % interval {low:+.1f} to {high:+.1f})"


def _compute(cost: pd.DataFrame, method: str) -> str:
    ratio = cost["compute_ratio"].get(method, float("nan"))
    return "an unknown multiple of" if pd.isna(ratio) else f"{ratio:.2f} times"
