"""The tables of an experiment, built from collected runs: main, per task, statistics, cost, and their cells."""

from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from dsam.results import rendering
from dsam.results.cost import cost_table
from dsam.results.formatting import DASH, interval, percent, score_cell
from dsam.results.formatting import number as formatted
from dsam.results.rendering import Table
from dsam.results.statistics import baseline_label, compare, methods, scored, summarise

NAMED_RUNS = 12  # how many runs without a score the main table names before it points to cells.csv
EPOCHS = {
    "best": "Best epoch on the development set, chosen and reported on the same examples: this flatters all methods.",
    "last": "Last epoch: nothing was chosen on the development set within a run.",
}


@dataclass(frozen=True)
class Tables:
    """What `build` makes; `cells` has every run behind the other four."""

    main: Table
    per_task: Table
    statistics: Table
    cost: Table
    cells: pd.DataFrame


def build(frame: pd.DataFrame, which: str = "best", baseline: str = "adamw") -> Tables:
    """The tables of collected runs, from the `which` ('best' or 'last') epoch, compared with `baseline`."""
    summary, comparison = summarise(frame, which), compare(frame, baseline, which)
    return Tables(
        main=_main(frame, summary, comparison, which, baseline),
        per_task=_per_task(frame, summary, which),
        statistics=_statistics(comparison, which, baseline),
        cost=cost_table(frame, baseline),
        cells=cells(frame, which),
    )


def write(tables: Tables, folder: str | Path) -> list[Path]:
    """Every table as CSV, Markdown, LaTeX and HTML, and cells.csv; returns the paths."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    parts = (tables.main, tables.per_task, tables.statistics, tables.cost)
    paths = [path for table in parts for path in rendering.write(table, folder)]
    tables.cells.to_csv(folder / "cells.csv", index=False, lineterminator="\n")
    return [*paths, folder / "cells.csv"]


def cells(frame: pd.DataFrame, which: str = "best") -> pd.DataFrame:
    """One row per run; `score` only where it counts in a mean, so that the tables can be rebuilt from it."""
    score = scored(frame, which)["score"].reindex(frame.index)
    columns = ["model", "task", "method_label", "seed", "id", "folder", "status"]
    return frame[columns].assign(score=score).rename(columns={"method_label": "method"})


def _main(frame, summary, comparison, which, baseline) -> Table:
    values, text, bold = [], [], []
    averaged = {}
    for model, runs in frame.groupby("model", sort=False):
        rows = summary[summary["model"] == model].set_index(["method_label", "task"])
        means = rows["mean"].unstack("task")
        # A method without any score has no average; it must not take everyone else's away.
        complete = means.dropna(how="all").dropna(axis=1).columns
        averaged[model] = [task for task in frame["task"].unique() if task in complete]
        best = means.max()
        for method in methods(runs, baseline):
            versus = comparison[(comparison["model"] == model) & (comparison["method"] == method)].iloc[0]
            average = means.loc[method, averaged[model]].mean() if averaged[model] else float("nan")
            number, shown, stressed = {"model": model, "method": method}, {"model": model, "method": method}, {}
            for task in frame["task"].unique():
                row = rows.loc[(method, task)] if (method, task) in rows.index else None
                for name in ("mean", "sd", "count", "expected"):
                    number[f"{task} {name}"] = None if row is None else row[name]
                shown[task] = DASH if row is None else score_cell(row)
                stressed[task] = row is not None and len(means[task].dropna()) > 1 and row["mean"] == best[task]
            number["average"] = average
            shown["average"] = percent(average)
            number |= versus[["difference", "low", "high", "p_holm", "smallest_p"]].to_dict()
            shown[f"difference to {baseline}"] = interval(versus)
            shown["Holm p"] = formatted(versus["p_holm"], "p")
            values.append(number)
            text.append(shown)
            bold.append(stressed)
    text = pd.DataFrame(text)
    bold = pd.DataFrame(bold).reindex(columns=text.columns).eq(True)
    caption = f"Scores on the development sets ({which} epoch): mean ± sd over seeds (number of runs), ×100"
    notes = [EPOCHS[which], *_main_notes(frame, comparison, averaged, which, baseline)]
    return Table("main", caption, notes, pd.DataFrame(values), text, bold).without_single_model()


def _main_notes(frame, comparison, averaged, which, baseline) -> list[str]:
    metrics = frame.dropna(subset="metric").groupby("task", sort=False)["metric"].first()
    notes = ["Metrics: " + ", ".join(f"{task} {metric}" for task, metric in metrics.items()) + "."]
    for model, tasks in averaged.items():
        over = f"over {', '.join(tasks)}" if tasks else f"{DASH} (no task that every method has a score on)"
        notes.append(f"Average for {model}: {over}.")
    for model, runs in frame.groupby("model", sort=False):
        labels = runs["method_label"].unique()
        if baseline_label(labels, baseline) is None:
            variants = [label for label in labels if label.startswith(f"{baseline} (")]
            why = f"has several variants ({'; '.join(variants)}): name one" if variants else "was not run"
            notes.append(f"No differences for {model}: the baseline {baseline} {why}.")
    smallest = comparison["smallest_p"].dropna()
    if len(smallest):
        notes.append(
            f"Difference: mean over tasks of the differences to {baseline} paired by seed, with 95 % stratified "
            "bootstrap interval (too narrow with few seeds); p: sign-flip test over task × seed cells, "
            f"Holm-corrected over methods. Before correction no p can be below {smallest.min():.2g} with these cells."
        )
    if frame["degenerate"].any():
        notes.append("Degenerate: the run's best score is at or below the majority answer; it counts in the mean.")
    lost = frame.loc[~frame.index.isin(scored(frame, which).index)]
    named = [
        f"{run.method_label} {run.task} seed {run.seed} {run.status.replace('finished', 'without score')}"
        for run in lost.head(NAMED_RUNS).itertuples()
    ]
    if named:
        more = f"; {len(lost) - NAMED_RUNS} more in cells.csv" if len(lost) > NAMED_RUNS else ""
        notes.append(f"Not in the means: {'; '.join(named)}{more}.")
    return notes


def _per_task(frame, summary, which) -> Table:
    further = [name for name in frame.columns if name.startswith(f"{which}.")]
    means = scored(frame, which).groupby(["model", "task", "method_label"])[further].mean()
    values = summary.join(means.add_suffix(" mean"), on=["model", "task", "method_label"])
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
    caption = f"Each task ({which} epoch), ×100"
    return Table("per_task", caption, [EPOCHS[which]], values, text).without_single_model()


def _statistics(comparison, which, baseline) -> Table:
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
        EPOCHS[which],
        "Differences ×100, paired by task and seed, each task weighing the same; 95 % stratified bootstrap interval.",
        "p: two-sided sign-flip test pooled over task × seed cells; smallest p: what these cells could give at best.",
        "Effect size: paired Cohen's d over the cells. P(improvement): Agarwal et al. 2021. Rank 1 is the best.",
    ]
    return Table("statistics", f"Methods compared with {baseline}", notes, comparison, text).without_single_model()
