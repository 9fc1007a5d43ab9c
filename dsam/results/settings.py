"""The hyperparameter table: what each method ran with, and on which examples settings and epoch were chosen."""

import pandas as pd

from dsam.results.formatting import DASH
from dsam.results.labels import value_text
from dsam.results.rendering import Table
from dsam.results.statistics import methods

PREFIX = "hyperparameters."
SELECTION = f"{PREFIX}selection"
# In this order; what else varies stands after them by name.
ORDER = ["lr", "batch_size", "epochs", "steps_factor", "warmup_ratio", "weight_decay", "rho"]
RULES = {
    ("best", "dev"): "Best epoch on the development set, chosen and reported on the same examples, as are any settings "
    "that were picked: this flatters all methods.",
    (
        "best",
        "heldout",
    ): "Best epoch and any settings that were picked: chosen on a split of the training set, reported "
    "on the development set.",
    (
        "last",
        "dev",
    ): "Last epoch: nothing was chosen on the development set within a run; any settings that were picked "
    "by its scores flatter.",
    ("last", "heldout"): "Last epoch: nothing was chosen within a run; any settings that were picked were chosen on a "
    "split of the training set. Reported on the development set.",
}


def selection_note(frame: pd.DataFrame, which: str = "best") -> str:
    """On which examples the `which` epoch and the settings of the finished runs were chosen; by method if they differ.

    A run that doesn't say (its `hyperparameters.selection` is absent) chose on the development set.
    """
    finished = frame[frame["status"] == "finished"]
    rule = finished.get(SELECTION, pd.Series(index=finished.index, dtype=object)).fillna("dev")
    chosen = finished.groupby(rule, sort=False)["method_label"].unique()
    if len(chosen) < 2:
        return RULES[which, chosen.index[0] if len(chosen) else "dev"]
    return " ".join(f"{', '.join(labels)}: {RULES[which, name]}" for name, labels in chosen.items())


def settings_table(frame: pd.DataFrame, which: str = "best", baseline: str = "adamw") -> Table:
    """A row per model and method: a column for each setting that all of them have and that differs somewhere, one for
    rho, one for the options of few methods; what is equal everywhere is a note. `values`: a row per task, everything.
    """
    names = [column.removeprefix(PREFIX) for column in frame.columns if column.startswith(PREFIX)]
    names = [name for name in names if name not in ("method", "seed", "selection")]
    names = sorted(names, key=lambda name: (ORDER.index(name) if name in ORDER else len(ORDER), name))
    # A run of which nothing is known but its folder has no settings to show.
    known = frame[frame[[PREFIX + name for name in names]].notna().any(axis=1)]
    rows, long = [], []
    for model, runs in known.groupby("model", sort=False):
        for label in methods(runs, baseline):
            own = runs[runs["method_label"] == label]
            by_task = own.groupby("task", sort=False)[[PREFIX + name for name in names]].first()
            rows.append({"model": model, "method": label} | {name: _by_task(by_task[PREFIX + name]) for name in names})
            long.append(
                by_task.rename(columns=lambda name: name.removeprefix(PREFIX)).assign(method=label, model=model)
            )
    values = pd.concat(long).reset_index() if long else pd.DataFrame(columns=["task", "method", "model"])
    values = values[["model", "method", "task", *(name for name in names if name in values)]]
    shown = pd.DataFrame(rows, columns=["model", "method", *names])
    shared = [name for name in names if (shown[name] != DASH).all()]
    equal = [name for name in shared if shown[name].nunique() == 1]
    columns = [name for name in names if name not in equal and (name in shared or name == "rho")]
    options = [name for name in names if name not in equal + columns]
    text = shown[["model", "method", *columns]].rename(columns=lambda name: name.replace("_", " "))
    further = [
        ", ".join(f"{name}={row[name]}" for name in options if row[name] != DASH) or DASH for _, row in shown.iterrows()
    ]
    if set(further) - {DASH}:
        text["further options"] = further
    notes = [selection_note(frame, which)]
    if equal:
        same = ", ".join(f"{name.replace('_', ' ')} {shown[name].iloc[0]}" for name in equal)
        notes.append(f"Equal in all runs: {same}.")
    return Table("hyperparameters", "Settings of the methods", notes, values, text).without_single_model()


def _by_task(values: pd.Series) -> str:
    """The value that all tasks share, or each value with its tasks; a dash where none is set."""
    tasks = {}
    for task, value in values.items():
        missing = not isinstance(value, list) and pd.isna(value)
        tasks.setdefault(DASH if missing else value_text(value), []).append(task)
    if len(tasks) == 1:
        return next(iter(tasks))
    return "; ".join(f"{value} ({', '.join(names)})" for value, names in tasks.items())
