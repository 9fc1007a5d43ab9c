"""The cost table: what a method's steps take, beside the baseline's on the same task."""

import pandas as pd

from dsam.results.collect import SEVERAL
from dsam.results.statistics import baseline_label, methods
from dsam.results.tables.formatting import number
from dsam.results.tables.rendering import Table

OF_A_MACHINE = ["train.seconds_per_step", "train.peak_memory_bytes"]
FIGURES = {
    "train.seconds_per_step": "min",
    "train.passes_per_step": "median",
    "train.peak_memory_bytes": "median",
    "train.passes": "median",
}


def seconds_note(frame: pd.DataFrame) -> str:
    """What the seconds per step of these runs are."""
    note = (
        "Seconds per step: the least over the seeds, since what else a machine does can only add to them. They compare "
        "only between runs of one machine, as many at once, where each method had an undisturbed one: see the "
        "provenance."
    )
    models = list(frame.groupby("model", sort=False))
    for model, runs in models:
        of = f" of {model}" if len(models) > 1 else ""
        several = runs.loc[runs["status"] == "finished", "machine"].nunique() > 1
        machine = main_machine(runs)
        if several and machine is not None:
            note += f" Here they, and memory, are{of} of the runs on {machine} alone."
        elif machine is None and runs["machine"].notna().any():
            note += f" Here each run{of} went on from another machine's checkpoint, so that there are none."
    return note


def main_machine(runs: pd.DataFrame) -> str | None:
    """That on which most (method, task) of one model finished a run; of equals, that of the most runs."""
    finished = runs[(runs["status"] == "finished") & runs["machine"].notna() & (runs["machine"] != SEVERAL)]
    if finished.empty:
        return None
    cells = finished.groupby("machine")[["method_label", "task"]]
    return max(cells, key=lambda one: (len(one[1].drop_duplicates()), len(one[1])))[0]


def per_step(frame: pd.DataFrame) -> pd.DataFrame:
    """What the finished runs of each (model, method, task) took: over the seeds the median, of seconds the least.

    Seconds and memory are of the runs of one machine for each model (`main_machine`), where it is known of any; NaN
    without such.
    """
    finished = frame[frame["status"] == "finished"]
    finished = finished.assign(**{"train.passes": finished["train.passes_per_step"] * finished["train.steps"]})
    for model, runs in finished.groupby("model"):
        if runs["machine"].notna().any():
            elsewhere = (finished["model"] == model) & (finished["machine"] != main_machine(runs))
            finished.loc[elsewhere, OF_A_MACHINE] = float("nan")
    return finished.groupby(["model", "method_label", "task"]).agg(FIGURES)


def _on_all(figures: list[pd.Series], tasks: set[str]) -> set[str] | None:
    """The tasks on which every method that has a figure on any of them has one; None where no method has any."""
    known = [own for of_method in figures if (own := set(of_method.dropna().index) & tasks)]
    return set.intersection(*known) if known else None


def cost_table(frame: pd.DataFrame, baseline: str = "adamw") -> Table:
    """Seconds, forward-backward passes and peak memory per step of the finished runs, and ratios to `baseline`.

    A task's figures are those of `per_step`; a method's is the mean over the tasks that all of the model's methods
    finished (of seconds and memory, on which all that have any have them), and its ratio the mean of the per-task
    ratios. `compute_ratio` is that of all passes of a run, so that
    twice the steps cost as much as two passes per step, over the tasks that it shares with the baseline.
    """
    figures_of = per_step(frame)
    values, fewer = [], []
    for model, runs in frame[frame["status"] == "finished"].groupby("model", sort=False):
        labels = methods(runs, baseline)
        per_task = figures_of.loc[model]
        tasks = set.intersection(*(set(per_task.loc[label].index) for label in labels))
        reference = baseline_label(frame.loc[frame["model"] == model, "method_label"].unique(), baseline)
        reference = reference if reference in labels else None
        measured = {name: _on_all([per_task.loc[label][name] for label in labels], tasks) for name in OF_A_MACHINE}
        if (on := measured["train.seconds_per_step"]) not in (tasks, None):
            fewer.append(f"{model} {', '.join(sorted(on)) or 'no task'}")
        for label in labels:
            row = {"model": model, "method": label, "tasks": ", ".join(sorted(tasks))}
            row["hours"] = runs.loc[runs["method_label"] == label, "train.seconds"].sum(min_count=1) / 3600
            common = per_task.loc[label][per_task.loc[label].index.isin(tasks)].copy()
            for name, on in measured.items():
                common.loc[~common.index.isin(on or ()), name] = float("nan")
            row |= common.mean().rename(lambda name: name.removeprefix("train.")).to_dict()
            for name, figures in (
                ("time_ratio", common["train.seconds_per_step"]),
                ("memory_ratio", common["train.peak_memory_bytes"]),
                ("compute_ratio", per_task.loc[label]["train.passes"]),
            ):
                # A task that only one of the two has drops out.
                row[name] = (figures / per_task.loc[reference][figures.name]).mean() if reference else float("nan")
            values.append(row)
    columns = ["model", "method", "seconds_per_step", "time_ratio", "passes_per_step", "compute_ratio",
               "peak_memory_bytes", "memory_ratio", "hours", "tasks"]  # fmt: skip
    values = pd.DataFrame(values, columns=columns)
    text = pd.DataFrame(
        {
            "model": values["model"],
            "method": values["method"],
            "seconds per step": values["seconds_per_step"].map(lambda value: number(value, "seconds")),
            f"time / {baseline}": values["time_ratio"].map(number),
            "passes per step": values["passes_per_step"].map(number),
            f"compute / {baseline}": values["compute_ratio"].map(number),
            "peak memory (MiB)": (values["peak_memory_bytes"] / 2**20).map(number),
            f"memory / {baseline}": values["memory_ratio"].map(number),
            "hours in all": values["hours"].map(number),
        }
    )
    notes = [
        "Finished runs only: median over seeds (of seconds the least), then mean over the tasks that all methods of a "
        "model finished. One pass is a forward and backward over the batch; compute is passes per step × steps.",
        seconds_note(frame),
    ]
    if fewer:
        notes.append(
            "Seconds and memory are over the tasks alone on which every method that has any has some of that machine: "
            f"{'; '.join(fewer)}."
        )
    return Table("cost", "What the methods cost", notes, values, text).without_single_model()
