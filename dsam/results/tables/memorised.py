"""The table of runs with label noise: how far each method has fitted the wrong labels, beside the right ones."""

import pandas as pd

from dsam.results.statistics import methods
from dsam.results.tables.formatting import DASH, percent
from dsam.results.tables.formatting import number as formatted
from dsam.results.tables.rendering import Table

FITTED = {"wrong labels fitted (%)": ("flipped", "accuracy"), "right labels fitted (%)": ("clean", "accuracy")}
PULL = {"wrong ones' share of Σ‖∇ℓ‖ (%)": ("pull",)}
LOSSES = {"loss on wrong labels": ("flipped", "loss"), "loss on right labels": ("clean", "loss")}
FITTED_NOTE = (
    "Fitted: the model answers, without dropout, what it was trained to answer. A model that has learned the rule "
    "and no exception fits the right labels and none of the wrong; one that knows each example by heart, all."
)
MEASURED = FITTED | PULL | LOSSES
"""Column -> where it stands in what `dsam.training.memorised.memorised` found."""


def memorised_table(frame: pd.DataFrame, baseline: str = "adamw") -> Table | None:
    """A row per model, task with wrong training labels and method: the last evaluations of the finished runs, mean ± sd
    over seeds. None where no run has wrong labels."""
    looked = frame["memorised"].map(lambda points: isinstance(points, list) and len(points) > 0)
    noisy = frame[(frame["status"] == "finished") & looked.astype(bool)]
    values, text = [], []
    for (model, task), runs in noisy.groupby(["model", "task"], sort=False):
        for method in methods(runs, baseline):
            own = runs[runs["method_label"] == method]
            points = [points[-1][1] for points in own["memorised"]]
            row = {"model": model, "task": task, "method": method, "runs": len(own)}
            shown = row | {"development set": _spread(own["last"], percent)}
            row |= {"score mean": own["last"].mean(), "score sd": own["last"].std()}
            for column, place in MEASURED.items():
                found = pd.Series([_at(point, place) for point in points], dtype=float)
                name = " ".join(place)
                row |= {f"{name} mean": found.mean(), f"{name} sd": found.std()}
                shown[column] = _spread(found, formatted if column in LOSSES else percent)
            values.append(row)
            text.append(shown)
    if not values:
        return None
    table = pd.DataFrame(text)
    table = table.drop(columns=[column for column in MEASURED if (table[column] == DASH).all()])
    wrong = noisy["memorised"].map(lambda points: points[-1][1].get("wrong")).groupby(noisy["task"], sort=False).mean()
    notes = [
        "Wrong labels among the examples looked at: "
        + ", ".join(f"{task} {percent(share)} %" for task, share in wrong.items())
        + "; the development sets have none.",
        *([FITTED_NOTE] if set(FITTED) & set(table.columns) else []),
        _seen_on(noisy["memorised"].map(lambda points: points[-1][1].get("examples", 2000))),
        *not_measured(frame),
    ]
    caption = "How far wrong labels are fitted (last epoch): mean ± sd over seeds"
    return Table("memorised", caption, notes, pd.DataFrame(values), table).without_single_model()


def not_measured(frame: pd.DataFrame) -> list[str]:
    """A note on the finished runs of the tasks of this table that have no such measurement, as those of an earlier
    version have not."""
    looked = frame["memorised"].map(lambda points: isinstance(points, list) and len(points) > 0).astype(bool)
    tasks = frame.loc[looked, "task"].unique()
    without = frame[(frame["status"] == "finished") & ~looked & frame["task"].isin(tasks)]
    if not len(without):
        return []
    several = len(tasks) > 1
    each = [
        (f"{task}: " if several else "")
        + ", ".join(f"{label} ({number})" for label, number in own["method_label"].value_counts(sort=False).items())
        for task, own in without.groupby("task", sort=False)
    ]
    return [f"Not measured in these finished runs (their number): {'; '.join(each)}."]


def _seen_on(examples: pd.Series) -> str:
    least, most = examples.min(), examples.max()
    many = f"{most:,}" if least == most else f"{least:,} to {most:,}"
    return f"Seen on the first {many} training examples, gradients on the first {min(most, 256)}."


def _at(point: dict | float | None, place: tuple[str, ...]) -> float:
    for name in place:
        point = point.get(name) if isinstance(point, dict) else None
    return float("nan") if point is None or isinstance(point, dict) else point


def _spread(values: pd.Series, form) -> str:
    mean = form(values.mean())
    return mean if values.count() < 2 or mean == DASH else f"{mean} ± {form(values.std())}"
