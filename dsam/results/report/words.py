"""What a table says, in sentences: made from its numbers alone."""

import pandas as pd

from dsam.results.statistics import baseline_label
from dsam.results.tables.build import Tables
from dsam.text import counted


def in_words(built: Tables, baseline: str = "adamw") -> list[str]:
    """A paragraph for each model: which method is ahead of `baseline` and by how much, whether that can be told from
    chance, and at what compute."""
    costs, cells = built.cost.values, built.cells
    return [
        " ".join(
            [
                f"{model}:",
                *_sentences(rows, costs[costs["model"] == model].set_index("method"), own, baseline),
                *_lost(own),
            ]
        )
        for model, rows in built.statistics.values.groupby("model", sort=False)
        for own in [cells[cells["model"] == model]]
    ]


def _sentences(rows: pd.DataFrame, cost: pd.DataFrame, cells: pd.DataFrame, baseline: str) -> list[str]:
    compared = rows.dropna(subset=["difference"])
    if compared.empty:
        variants = [name for name in rows["method"] if name.startswith(f"{baseline} (")]
        if len(variants) > 1:
            return [f"nothing is compared: {baseline} was run in {len(variants)} variants, {'; '.join(variants)}."]
        return [f"no method has runs on the same tasks and seeds as {baseline}."]
    first = compared.loc[compared["difference"].idxmax()]
    ahead = f"{first['method']} is furthest above {baseline}"
    if first["difference"] <= 0:
        ahead = f"no method is above {baseline}, the nearest is {first['method']}"
    return [
        f"over {counted(int(first['tasks']), 'task')}, {ahead}: {_points(first)}, from "
        f"{counted(int(first['pairs']), 'pair')} of equal task and seed, at {_compute(cost, first['method'])} its "
        "compute.",
        *_unequal(compared, cells, baseline),
        *_by_interval(compared, baseline),
        _by_test(compared, baseline),
        *_plain(compared, cost, first, baseline),
    ]


def _lost(cells: pd.DataFrame) -> list[str]:
    """What became of runs that count nowhere: a method that diverges would look its best without them."""
    lost = cells[cells["score"].isna()]
    if lost.empty:
        return []
    told = []
    for method, own in lost.groupby("method", sort=False):
        fates = own["status"].replace("finished", "without score").value_counts()
        what = ", ".join(f"{count} {fate}" for fate, count in fates.items())
        told.append(f"{method} {what} of {(cells['method'] == method).sum()}")
    return [f"Not in these figures: {'; '.join(told)}."]


def _unequal(compared: pd.DataFrame, cells: pd.DataFrame, baseline: str) -> list[str]:
    """Differences that come from other cells are no order of the methods."""
    scored = cells.dropna(subset=["score"])
    of = {method: set(zip(own["task"], own["seed"], strict=True)) for method, own in scored.groupby("method")}
    reference = of.get(baseline_label(list(of), baseline) or "", set())
    if len({frozenset(of[method] & reference) for method in compared["method"]}) == 1:
        return []
    pairs = ", ".join(f"{row.method} {row.pairs} on {counted(int(row.tasks), 'task')}" for row in compared.itertuples())
    return [f"The methods do not share all of these pairs ({pairs}), so that their differences do not order them."]


def _by_interval(compared: pd.DataFrame, baseline: str) -> list[str]:
    known = compared.dropna(subset=["low"])
    unknown = compared.loc[compared["low"].isna(), "method"]
    found = []
    if len(known):
        ahead, behind = known.loc[known["low"] > 0, "method"], known.loc[known["high"] < 0, "method"]
        if len(ahead) or len(behind):
            many = "" if len(known) == 1 else f", which are not corrected for {len(known)} methods,"
            found.append(
                f"By their 95 % intervals{many} these differ from {baseline}: above it {', '.join(ahead) or 'none'}; "
                f"below it {', '.join(behind) or 'none'}."
            )
        else:
            found.append(f"No method can be told from {baseline}: every interval contains 0.")
    if len(unknown):
        found.append(
            f"There is no interval where a task has a single pair, or all pairs are equal: {', '.join(unknown)}."
        )
    return found


def _by_test(compared: pd.DataFrame, baseline: str) -> str:
    tested = compared.dropna(subset=["p_holm"])
    below = tested.loc[tested["p_holm"] < 0.05, "method"]
    many = counted(len(tested), "method")
    if len(below):
        return f"By the sign-flip test, corrected for {many}, these differ from {baseline}: {', '.join(below)}."
    corrected = min(1.0, tested["smallest_p"].min() * len(tested))
    could = "" if corrected < 0.05 else f", and could not with so few runs: its p is at least {corrected:.2g}"
    return f"The sign-flip test, corrected for {many}, tells none apart from {baseline}{could}."


def _plain(compared: pd.DataFrame, cost: pd.DataFrame, first: pd.Series, baseline: str) -> list[str]:
    """Plain training in another form, as of twice the steps, belongs beside what is ahead."""
    one_pass = cost["passes_per_step"].reindex(compared["method"]).fillna(1).to_numpy() == 1
    plain = [name for name in compared.loc[one_pass, "method"] if name.startswith(baseline)]
    if first["method"] in plain:
        return []
    rows = compared.set_index("method")
    return [
        f"{name}, plain training, has {_points(rows.loc[name])} at {_compute(cost, name)} the compute."
        for name in plain
    ]


def _points(row: pd.Series) -> str:
    points = f"{100 * row['difference']:+.1f} points"
    if pd.isna(row["low"]):
        return points
    return f"{points} (95 % interval {100 * row['low']:+.1f} to {100 * row['high']:+.1f})"


def _compute(cost: pd.DataFrame, method: str) -> str:
    ratio = cost["compute_ratio"].get(method, float("nan"))
    return "an unknown multiple of" if pd.isna(ratio) else f"{ratio:.2f} times"
