"""Each method beside the baseline on one task at a time: what a mean over tasks, which adds points of several metrics,
can hide."""

import pandas as pd

from dsam.results.statistics import compare, compare_by_task, methods, not_compared, pairs_left_out, scored
from dsam.results.tables.formatting import DASH, first_of, interval
from dsam.results.tables.rendering import Table
from dsam.results.tables.unlike import unlike_notes


def by_task_table(frame: pd.DataFrame, which: str, baseline: str, notes: list[str]) -> Table | None:
    """A row per model and method, a column per task; `values` have a row per model, task and method.

    None without a model whose methods are compared on two tasks. `notes` go before its own.
    """
    values, text, without, lacking = [], [], [], []
    several = frame["model"].nunique() > 1
    for model, runs in frame.groupby("model", sort=False):
        found = compare_by_task(runs, baseline, which)
        if len(found) < 2:
            continue
        left = not_compared(runs, baseline, which).items()
        lacking += [f"{f'{model}, ' * several}{task} ({why})" for task, why in left]
        for task, comparison in found.items():
            values.append(comparison.assign(task=task))
        compared = compare(runs[runs["task"].isin(found)], baseline, which)  # with the methods that have no pair
        without += [f"{model}, " * several + pair for pair in pairs_left_out(compared)]
        rows = {task: comparison.set_index("method") for task, comparison in found.items()}
        for method in methods(runs, baseline):
            cells = {task: interval(own.loc[method]) for task, own in rows.items() if method in own.index}
            if cells:
                text.append({"model": model, "method": method} | cells)
    if not values:
        return None
    tasks = [task for task in frame["task"].unique() if any(task in row for row in text)]
    shown = pd.DataFrame(text, columns=["model", "method", *tasks], dtype=object).fillna(DASH)
    columns = ["model", "task", "method", "difference", "low", "high", "p", "p_holm", "smallest_p", "pairs"]
    own_notes = [
        "The row's method minus the baseline: means of the differences paired by seed, ×100 of each task's own metric, "
        f"with 95 % t-interval. The {sum(map(len, values))} intervals are not corrected for their number: if no method "
        "differed, one in twenty would still leave out 0.",
        *unlike_notes(scored(frame, which), baseline),
    ]
    if lacking:
        own_notes.append(f"Without differences: {'; '.join(lacking)}.")
    if without:
        own_notes.append(f"Pairs that are left out: {first_of(without)}.")
    caption = f"Difference to {baseline} on each task ({which} epoch)"
    return Table("by_task", caption, [*notes, *own_notes], pd.concat(values)[columns], shown).without_single_model()
