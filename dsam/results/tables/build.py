"""The tables of an experiment, built from collected runs, and the cells behind them."""

from dataclasses import dataclass, replace
from pathlib import Path

import pandas as pd

from dsam.results.statistics import ROUNDING, baseline_label, compare, methods, scored, summarise, worse_than_best
from dsam.results.tables import rendering
from dsam.results.tables.by_task import by_task_table
from dsam.results.tables.cost import cost_table, per_step, seconds_note
from dsam.results.tables.formatting import DASH, interval, percent, score_cell
from dsam.results.tables.formatting import number as formatted
from dsam.results.tables.labels import data_set
from dsam.results.tables.memorised import memorised_table
from dsam.results.tables.pairwise import pairwise_table
from dsam.results.tables.published import beside_published
from dsam.results.tables.rendering import BOLD, UNDERLINED, Table, styled
from dsam.results.tables.sensitivity import rho_table
from dsam.results.tables.settings import chosen_table, selection_note, settings_table
from dsam.results.tables.unlike import unlike_notes

NAMED_RUNS = 12  # how many runs without a score the main table names before it points to cells.csv


@dataclass(frozen=True)
class Tables:
    """What `build` makes; `cells` has every run behind the tables.

    `equal_compute` compares with plain training of more steps, the fair baseline of methods that take several passes a
    step; None where there is no such run. `by_task` compares on each task by itself; None with one. `pairwise`
    compares every two methods; None without three on several seeds. `last_epoch`, `by_task_last_epoch` and
    `pairwise_last_epoch` are without a choice of the epoch; None where the others are. `chosen` is None where no
    settings were chosen by another sweep, `rho` where no method was run with several, `memorised` without label noise,
    `beside_published` where nothing published is comparable.
    """

    main: Table
    last_epoch: Table | None
    memorised: Table | None
    per_task: Table
    statistics: Table
    equal_compute: Table | None
    by_task: Table | None
    by_task_last_epoch: Table | None
    pairwise: Table | None
    pairwise_last_epoch: Table | None
    cost: Table
    hyperparameters: Table
    chosen: Table | None
    rho: Table | None
    beside_published: Table | None
    cells: pd.DataFrame

    def each(self) -> list[Table]:
        """The tables that there are, in the order of a report."""
        return [table for table in vars(self).values() if isinstance(table, Table)]


def build(frame: pd.DataFrame, which: str = "best", baseline: str = "adamw") -> Tables:
    """The tables of collected runs, from the `which` ('best' or 'last') epoch, compared with `baseline`."""
    summary, comparison = summarise(frame, which), compare(frame, baseline, which)
    cost = cost_table(frame, baseline)
    return Tables(
        main=_main(frame, summary, comparison, cost, which, baseline),
        last_epoch=_last_epoch(frame, cost, baseline) if which == "best" else None,
        memorised=memorised_table(frame, baseline),
        per_task=_per_task(frame, summary, which),
        statistics=_statistics(frame, comparison, which, baseline),
        equal_compute=_equal_compute(frame, which, baseline),
        by_task=_by_task(frame, which, baseline),
        by_task_last_epoch=_by_task_last_epoch(frame, baseline) if which == "best" else None,
        pairwise=_pairwise(frame, which, baseline),
        pairwise_last_epoch=_pairwise_last_epoch(frame, baseline) if which == "best" else None,
        cost=cost,
        hyperparameters=settings_table(frame, which, baseline),
        chosen=chosen_table(frame.attrs.get("chosen", [])),
        rho=rho_table(frame, which, baseline),
        beside_published=beside_published(frame, which, baseline),
        cells=cells(frame, which),
    )


def write(tables: Tables, folder: str | Path) -> list[Path]:
    """Every table as CSV, Markdown, LaTeX and HTML, and cells.csv; returns the paths."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    paths = [path for table in tables.each() for path in rendering.write(table, folder)]
    tables.cells.to_csv(folder / "cells.csv", index=False, lineterminator="\n")
    return [*paths, folder / "cells.csv"]


def cells(frame: pd.DataFrame, which: str = "best") -> pd.DataFrame:
    """One row per run; `score` only where it counts in a mean, so that the tables can be rebuilt from it."""
    score = scored(frame, which)["score"].reindex(frame.index)
    columns = ["model", "task", "method_label", "seed", "id", "folder", "status"]
    return frame[columns].assign(score=score).rename(columns={"method_label": "method"})


def _main(frame, summary, comparison, cost, which, baseline) -> Table:
    values, text, styles = [], [], []
    averaged = {}
    compute = cost.values.set_index(["model", "method"])["compute_ratio"]
    for model, runs in frame.groupby("model", sort=False):
        rows = summary[summary["model"] == model].set_index(["method_label", "task"])
        means = rows["mean"].unstack("task")
        # A method without any score has no average; it must not take everyone else's away.
        with_scores = means.dropna(how="all")
        complete = with_scores.dropna(axis=1).columns if len(with_scores) else []
        averaged[model] = [task for task in frame["task"].unique() if task in complete]
        marks = _marks(runs, means, which)
        for method in methods(runs, baseline):
            versus = comparison[(comparison["model"] == model) & (comparison["method"] == method)].iloc[0]
            average = means.loc[method, averaged[model]].mean() if averaged[model] else float("nan")
            ratio = compute.get((model, method), float("nan"))
            number = {"model": model, "method": method, "compute": ratio}
            shown = {"model": model, "method": method, f"compute / {baseline}": formatted(ratio)}
            for task in frame["task"].unique():
                row = rows.loc[(method, task)] if (method, task) in rows.index else None
                for name in ("mean", "sd", "count", "expected"):
                    number[f"{task} {name}"] = None if row is None else row[name]
                shown[task] = DASH if row is None else score_cell(row)
            number["average"] = average
            shown["average"] = percent(average)
            number |= versus[["difference", "low", "high", "p_holm", "smallest_p"]].to_dict()
            shown[f"difference to {baseline}"] = interval(versus)
            shown["Holm p"] = formatted(versus["p_holm"], "p")
            values.append(number)
            text.append(shown)
            styles.append({task: marks[task].get(method, "") for task in marks})
    text = pd.DataFrame(text)
    caption = f"Scores on the development sets ({which} epoch): mean ± sd over seeds (number of runs), ×100"
    notes = [selection_note(frame, which), *_main_notes(frame, comparison, averaged, which, baseline)]
    return Table("main", caption, notes, pd.DataFrame(values), text, styled(styles, text)).without_single_model()


def _last_epoch(frame, cost, baseline) -> Table:
    table = _main(frame, summarise(frame, "last"), compare(frame, baseline, "last"), cost, "last", baseline)
    return replace(table, name="last_epoch")


def _by_task(frame, which, baseline) -> Table | None:
    return by_task_table(frame, which, baseline, [selection_note(frame, which)])


def _by_task_last_epoch(frame, baseline) -> Table | None:
    table = _by_task(frame, "last", baseline)
    return table and replace(table, name="by_task_last_epoch")


def _pairwise(frame, which, baseline) -> Table | None:
    return pairwise_table(frame, which, baseline, [selection_note(frame, which), *_one_data_set(frame)])


def _pairwise_last_epoch(frame, baseline) -> Table | None:
    table = _pairwise(frame, "last", baseline)
    return table and replace(table, name="pairwise_last_epoch")


def _marks(runs, means, which) -> dict[str, dict[str, str]]:
    """Task -> method -> style: the best mean, and what isn't significantly worse; none where one method has a score."""
    scores = scored(runs, which)
    marks = {}
    for task, own in means.items():
        own = own.dropna()
        if len(own) > 1:
            table = scores[scores["task"] == task].pivot(index="seed", columns="method_label", values="score")
            worse = worse_than_best(table)
            marks[task] = {
                method: BOLD if own.max() - mean < ROUNDING else "" if worse[method] else UNDERLINED
                for method, mean in own.items()
            }
    return marks


def _main_notes(frame, comparison, averaged, which, baseline) -> list[str]:
    metrics = frame.dropna(subset="metric").groupby("task", sort=False)["metric"].first()
    notes = ["Metrics: " + ", ".join(f"{task} {metric}" for task, metric in metrics.items()) + "."]
    if metrics.nunique() > 1:
        notes.append("Average and difference weigh a point of each metric alike, as GLUE's own average does; with "
                     "several seeds the table by_task has each task's difference.")  # fmt: skip
    for model, tasks in averaged.items():
        over = f"over {', '.join(tasks)}" if tasks else f"{DASH} (no task that every method has a score on)"
        notes.append(f"Average for {model}: {over}.")
    notes += _unequal_seeds(scored(frame, which), baseline)
    pairs = scored(frame, which).groupby(["model", "task", "method_label"]).size().max()
    notes.append(_marks_note(pairs))
    notes.append(f"Compute / {baseline}: forward-backward passes of a whole run (passes per step × steps), as a ratio.")
    for model, runs in frame.groupby("model", sort=False):
        labels = runs["method_label"].unique()
        if baseline_label(labels, baseline) is None:
            variants = [label for label in labels if label.startswith(f"{baseline} (")]
            why = "was not run"
            if variants:
                why = f"has several variants ({'; '.join(variants)}); `build(frame, baseline=…)` takes one of them"
            notes.append(f"No differences for {model}: the baseline {baseline} {why}.")
    smallest = comparison["smallest_p"].dropna()
    if len(smallest):
        notes.append(
            f"Difference: mean over tasks of the differences to {baseline} paired by seed, with 95 % t-interval, not "
            "corrected for the number of methods; p: sign-flip test over task × seed cells, Holm-corrected over "
            f"methods. Before correction no p can be below {_from_to(smallest)} with these cells."
        )
    notes += _one_data_set(frame)
    notes += unlike_notes(scored(frame, which), baseline)
    notes += _other_tasks(scored(frame, which), baseline)
    if summarise(frame, which)["degenerate"].any():
        notes.append(f"Degenerate: the run's score ({which} epoch) is at or below the majority answer; it counts.")
    lost = frame.loc[~frame.index.isin(scored(frame, which).index)]
    several = frame["model"].nunique() > 1
    named = [
        f"{run.model} " * several
        + f"{run.method_label} {run.task} seed {run.seed} {run.status.replace('finished', 'without score')}"
        for run in lost.head(NAMED_RUNS).itertuples()
    ]
    if named:
        more = f"; {len(lost) - NAMED_RUNS} more in cells.csv" if len(lost) > NAMED_RUNS else ""
        notes.append(f"Not in the means: {'; '.join(named)}{more}.")
    return notes


def _from_to(values: pd.Series) -> str:
    low, high = f"{values.min():.2g}", f"{values.max():.2g}"
    return low if low == high else f"{low} to {high}, by method,"


def _one_data_set(frame: pd.DataFrame) -> list[str]:
    """A note where tasks are levels of label noise of one data set."""
    labels = pd.Series(frame["task"].unique())
    several = [name for name, own in labels.groupby(labels.map(data_set), sort=False) if len(own) > 1]
    if not several:
        return []
    return [f"{', '.join(several)}: one seed's runs on several levels of noise are no independent pairs. Interval and "
            "test take them for one cell."]  # fmt: skip


def _other_tasks(runs: pd.DataFrame, baseline: str) -> list[str]:
    """A note on each model whose methods are compared with the baseline on different tasks."""
    notes = []
    for model, own in runs.groupby("model", sort=False):
        reference = baseline_label(own["method_label"].unique(), baseline)
        cells = own.set_index(["task", "seed"])
        there = cells.index[cells["method_label"] == reference]
        shared = {
            method: tuple(dict.fromkeys(task for task, seed in of_method.index if (task, seed) in there))
            for method, of_method in cells.groupby("method_label", sort=False)
            if method != reference
        }
        shared = {method: tasks for method, tasks in shared.items() if tasks}
        if len({frozenset(tasks) for tasks in shared.values()}) > 1:
            over = "; ".join(f"{method} over {', '.join(tasks)}" for method, tasks in shared.items())
            notes.append(
                f"{model}: the differences to {baseline} are not over the same tasks ({over}), so that they do not "
                "order the methods, and need not agree with the averages."
            )
    return notes


def _unequal_seeds(runs: pd.DataFrame, baseline: str) -> list[str]:
    """A note on each model whose methods' scores come from other seeds on some task."""
    notes = []
    for model, own in runs.groupby("model", sort=False):
        seeds = own.groupby(["task", "method_label"])["seed"].agg(frozenset)
        tasks = [task for task, sets in seeds.groupby("task", sort=False) if sets.nunique() > 1]
        if tasks:
            notes.append(
                f"{model} on {', '.join(tasks)}: the methods do not have the same seeds. Means and averages are over "
                f"each one's own, marks and the difference to {baseline} over those that two share, so that one can "
                "point where the other does not."
            )
    return notes


def _marks_note(seeds: int) -> str:
    note = (
        "Bold: the best mean of a task. Underlined (italic in Markdown): not significantly worse than it (one-sided "
        "paired t-test over the seeds, level 5 % divided by the number of other methods; with fewer than 3 pairs "
        "nothing is called worse). If differences are about normal, the truly best method is among the marked with "
        "95 % confidence. "
        "One with a lower mean whose seeds scatter more can be marked where a steadier one is not."
    )
    if 1 < seeds < 6:
        note += (
            f" A sign-flip test, which assumes less, could not call anything worse on one task with {seeds} seeds: its "
            f"smallest p is {2 / 2**seeds:.2g}."
        )
    return note


def _per_task(frame, summary, which) -> Table:
    key = ["model", "task", "method_label"]
    further = [name for name in frame.columns if name.startswith(f"{which}.")]
    means = scored(frame, which).groupby(key)[further].mean()
    # Per task: the cost table's mean over tasks hides that one task's sentences are three times another's.
    seconds = per_step(frame)["train.seconds_per_step"].rename("seconds_per_step")
    values = summary.join(means.add_suffix(" mean"), on=key).join(seconds, on=list(seconds.index.names))
    values = values.rename(columns={"method_label": "method"})
    measures = {name: f"{name} mean" for name in further}
    text = pd.DataFrame(
        {
            "model": values["model"],
            "task": values["task"],
            "method": values["method"],
            "metric": values["metric"].map(lambda metric: DASH if pd.isna(metric) else metric),
            "mean ± sd (runs)": [score_cell(row) for _, row in values.iterrows()],
            "median": values["median"].map(percent),
            "range": values["min"].map(percent) + " to " + values["max"].map(percent),
            "majority": values["majority"].map(percent),
            "seconds per step": values["seconds_per_step"].map(lambda value: formatted(value, "seconds")),
            "all metrics": [
                ", ".join(
                    f"{name.removeprefix(f'{which}.')} {percent(row[column])}"
                    for name, column in measures.items()
                    if pd.notna(row[column])
                )
                or DASH
                for _, row in values.iterrows()
            ],
        }
    )
    caption = f"Each task ({which} epoch): scores ×100"
    notes = [selection_note(frame, which), seconds_note(frame)]
    return Table("per_task", caption, notes, values, text).without_single_model()


def _equal_compute(frame, which, baseline) -> Table | None:
    longer = frame.get("hyperparameters.steps_factor", pd.Series(1, frame.index)) > 1
    plain = frame.get("hyperparameters.method", pd.Series("plain", frame.index)) == "plain"
    names = [
        name
        for name in frame.loc[longer & plain, "optimizer"].unique()
        if any(baseline_label(own.unique(), name) for _, own in frame.groupby("model")["method_label"])
    ]
    others = frame.loc[~(longer & plain) & (frame["optimizer"] != baseline)]
    if not names or others.empty:
        return None
    return _statistics(frame, compare(frame, names[0], which), which, names[0], name="equal_compute")


def _statistics(frame, comparison, which, baseline, name="statistics") -> Table:
    text = pd.DataFrame(
        {
            "model": comparison["model"],
            "method": comparison["method"],
            f"difference to {baseline}": [interval(row) for _, row in comparison.iterrows()],
            "pairs": comparison["pairs"].map(lambda pairs: DASH if pd.isna(pairs) else str(pairs)),
            "tasks": comparison["tasks"].map(lambda tasks: DASH if pd.isna(tasks) else str(tasks)),
            "p": comparison["p"].map(lambda p: formatted(p, "p")),
            "Holm p": comparison["p_holm"].map(lambda p: formatted(p, "p")),
            "smallest p": comparison["smallest_p"].map(lambda p: formatted(p, "p")),
            "effect size": comparison["effect_size"].map(formatted),
            "P(improvement)": comparison["probability_of_improvement"].map(formatted),
            "average rank": comparison["average_rank"].map(formatted),
            "missing pairs": comparison["missing_pairs"].map(lambda pairs: DASH if pd.isna(pairs) else pairs or DASH),
        }
    )
    notes = [
        selection_note(frame, which),
        "Differences ×100, paired by task and seed, each task weighing the same; 95 % t-interval (over tasks with "
        "Welch's and Satterthwaite's degrees of freedom).",
        "p: two-sided sign-flip test pooled over task × seed cells; smallest p: what these cells could give at best.",
        *_one_data_set(frame),
        *unlike_notes(scored(frame, which), baseline),
        *_other_tasks(scored(frame, which), baseline),
        "Effect size: paired Cohen's d over the cells. P(improvement): Agarwal et al. 2021. Rank 1 is the best, over "
        "the tasks that every method with a score has.",
    ]
    return Table(name, f"Methods compared with {baseline}", notes, comparison, text).without_single_model()
