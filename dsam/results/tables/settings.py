"""The hyperparameter table: what each method ran with, and on which examples settings and epoch were chosen."""

import pandas as pd

from dsam.results.statistics import methods
from dsam.results.tables.formatting import DASH, percent
from dsam.results.tables.labels import rate_used, value_text, without
from dsam.results.tables.rendering import Table
from dsam.task import HELD_OUT

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


def held_out_note(runs: pd.DataFrame) -> list[str]:
    """That runs which chose on a part of the training set were not trained on it, where there are such."""
    rule = runs.get(SELECTION, pd.Series(index=runs.index, dtype=object))
    labels = runs.loc[rule == HELD_OUT, "method_label"].unique()
    if not len(labels):
        return []
    which = "The runs here" if (rule == HELD_OUT).all() else f"Those of {', '.join(labels)}"
    return [f"{which} were trained on nine tenths of the training set or a little more: the rest chose their epoch."]


def chosen_table(rows: list[dict]) -> Table | None:
    """The variants that the settings were chosen from (rows of `dsam.sweeps.choose.choose`), or None."""
    if not rows:
        return None
    on = {"dev": "the development set, which flatters", "heldout": "a split of the training set"}[rows[0]["selection"]]
    values = pd.DataFrame(rows).assign(settings=[_assignments(row["settings"]) for row in rows])
    scores = [percent(r["mean"]) + (f" ± {percent(r['sd'])}" if r["sd"] is not None else "") for r in rows]
    text = values[["model", "task", "optimizer", "settings"]].assign(
        score=scores,
        runs=[f"{row['runs']}/{row['expected']}" for row in rows],
        chosen=["yes" if row["chosen"] else DASH for row in rows],
    )
    notes = [
        f"Per task, model and optimizer the highest mean score (×100, best epoch) on {on}. The main table's runs have "
        "other seeds than these. A variant that lacks a run is not chosen."
    ]
    return Table("chosen", "What the settings were chosen from", notes, values, text).without_single_model()


def _assignments(settings: dict) -> str:
    return ", ".join(f"{name}={value_text(value)}" for name, value in settings.items()) or DASH


def settings_table(frame: pd.DataFrame, which: str = "best", baseline: str = "adamw") -> Table:
    """A row per model and method: a column for each setting that all of them have and that differs somewhere, one for
    rho, one for the options of few methods; what is equal for all is a note. Variants in rho alone share a row.
    `values` has everything: a row per model, variant and task.
    """
    names = [column.removeprefix(PREFIX) for column in frame.columns if column.startswith(PREFIX)]
    names = [name for name in names if name not in ("method", "seed", "selection")]
    names = sorted(names, key=lambda name: (ORDER.index(name) if name in ORDER else len(ORDER), name))
    # A run of which nothing is known but its folder has no settings to show.
    known = frame[frame[[PREFIX + name for name in names]].notna().any(axis=1)]
    known, names = _with_the_rate_used(known, names)
    rows = []
    for model, runs in known.groupby("model", sort=False):
        labels = methods(runs, baseline)
        for method in dict.fromkeys(without(label, "rho") for label in labels):
            own = runs[runs["method_label"].isin([label for label in labels if without(label, "rho") == method])]
            rows.append({"model": model, "method": method} | {name: _shown(own, PREFIX + name) for name in names})
    values = known.drop_duplicates(["model", "method_label", "task"])
    values = values.rename(columns={"method_label": "method"} | {PREFIX + name: name for name in names})
    values = values[["model", "method", "task", *names]]
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
        same = "; ".join(f"{name.replace('_', ' ')} {shown[name].iloc[0]}" for name in equal)
        notes.append(f"Equal for all methods: {same}.")
    notes += otherwise_notes(frame)
    return Table("hyperparameters", "Settings of the methods", notes, values, text).without_single_model()


def otherwise_notes(frame: pd.DataFrame) -> list[str]:
    """What finished runs did otherwise than their settings say, each thing with the methods and how many of their
    runs."""
    finished = frame[frame["status"] == "finished"]
    counts = finished.groupby("method_label", sort=False).size()
    said: dict[str, dict[str, int]] = {}
    for label, notes in zip(finished["method_label"], finished["notes"], strict=True):
        for note in notes if isinstance(notes, list) else []:
            own = said.setdefault(note, {})
            own[label] = own.get(label, 0) + 1
    if not said:
        return []
    each = [
        f"{', '.join(f'{label} ({number} of {counts[label]} runs)' for label, number in own.items())}: {note}"
        for note, own in said.items()
    ]
    return [f"Otherwise than their settings say ran {'; '.join(each)}."]


def _with_the_rate_used(runs: pd.DataFrame, names: list[str]) -> tuple[pd.DataFrame, list[str]]:
    """The runs with `lr` as the optimizer had it, in place of that of the recipe and a method's factor."""
    if not {"lr", "lr_factor"} <= set(names):
        return runs, names
    factors = runs[f"{PREFIX}lr_factor"].astype(float).fillna(1)
    used = [rate_used(rate, factor) for rate, factor in zip(runs[f"{PREFIX}lr"], factors, strict=True)]
    return runs.assign(**{f"{PREFIX}lr": used}), [name for name in names if name != "lr_factor"]


def _shown(runs: pd.DataFrame, column: str) -> str:
    """The value that all tasks share, or each value with its tasks; several of one task in a row; a dash for none."""
    tasks: dict[str, list[str]] = {}
    for task, values in runs.groupby("task", sort=False)[column]:
        values = values.sort_values() if pd.api.types.is_numeric_dtype(values) else values
        seen = dict.fromkeys(value_text(value) for value in values if isinstance(value, list) or pd.notna(value))
        tasks.setdefault(", ".join(seen) or DASH, []).append(task)
    if len(tasks) == 1:
        return next(iter(tasks))
    return " or ".join(f"{value} ({', '.join(names)})" for value, names in tasks.items())
