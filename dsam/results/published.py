"""Published figures (results/reference, each row with its source) beside the runs on the same GLUE task and metric."""

from functools import cache
from pathlib import Path

import pandas as pd

from dsam.glue.tasks import TASKS
from dsam.results.formatting import percent
from dsam.results.rendering import Table
from dsam.results.settings import PREFIX, selection_note
from dsam.results.statistics import methods, scored

REFERENCE = Path(__file__).parents[2] / "results" / "reference"
LIMITS = [f"{PREFIX}max_steps", f"{PREFIX}max_train_examples"]


@cache
def reference() -> pd.DataFrame:
    """Every published figure: model, task, metric, value (×100), statistic, source."""
    return pd.concat([pd.read_csv(path) for path in sorted(REFERENCE.glob("*.csv"))], ignore_index=True)


def beside_published(frame: pd.DataFrame, which: str = "best", baseline: str = "adamw") -> Table | None:
    """A row per model, task and metric: what each method reached here, and after it what was published.

    Only runs on the whole of an official GLUE task count. A model's published figures are those whose name begins
    with its own (bert_base: bert-base-uncased); if there are none, those of all models. None if nothing is beside.
    """
    official = [name for name, task in TASKS.items() if "builtin" not in task.sources]
    runs = frame[frame["task"].isin(official)]
    for limit in LIMITS:
        runs = runs[runs[limit].isna()] if limit in runs else runs
    runs = scored(runs, which)
    rows, sources, alone = [], {}, []
    for model, own in runs.groupby("model", sort=False):
        same = reference()["model"].str.startswith(model.replace("_", "-"))
        published = reference()[same] if same.any() else reference()
        alone += [] if same.any() else [model]
        for (task, metric), figures in published.groupby(["task", "metric"], sort=False):
            here = own[own["task"] == task]
            scores = _scores(here, task, metric, which).groupby(here["method_label"]).mean().dropna()
            if len(scores):
                row = {"model": model, "task": task, "metric": metric}
                row |= {("here", method): scores.get(method) for method in methods(own, baseline)}
                row |= {("published", name): value / 100 for name, value in figures[["model", "value"]].to_numpy()}
                rows.append(row)
                for figure in figures.itertuples():
                    sources.setdefault((figure.model, figure.source), {}).setdefault(figure.statistic, []).append(task)
    if not rows:
        return None
    values = pd.DataFrame(rows)
    numbers = [column for column in values if isinstance(column, tuple)]
    numbers = sorted(numbers, key=lambda column: column[0] != "here")
    values = values[["model", "task", "metric", *numbers]]
    text = values.astype(dict.fromkeys(numbers, object))
    for column in numbers:
        text[column] = values[column].astype(float).map(percent)
    heads = {column: ": ".join(column) for column in numbers}
    notes = [
        selection_note(runs, which),
        f"Here: mean over the finished runs of the {which} epoch. Published: other code, recipes and versions of the "
        "data; single figures without a spread, so a difference to them is no result.",
        *(f"There are no published figures for {model}: those of other models are shown." for model in alone),
        *(f"{model}: {_statistics(statistics)}; {source}" for (model, source), statistics in sources.items()),
    ]
    caption = f"Beside published figures on the GLUE development sets ({which} epoch), ×100"
    text, values = text.rename(columns=heads), values.rename(columns=heads)
    return Table("beside_published", caption, notes, values, text).without_single_model()


def _scores(runs: pd.DataFrame, task: str, metric: str, which: str) -> pd.Series:
    """Each run's `metric` as published: of MNLI's 'accuracy (matched)' one set, of 'accuracy' the mean of both."""
    name, _, group = metric.removesuffix(")").partition(" (")
    splits = [f"dev_{group}"] if group else TASKS[task].evaluation_splits
    columns = [f"{which}.{split}.{name}" for split in splits]
    return runs.reindex(columns=columns).mean(axis=1, skipna=False)


def _statistics(statistics: dict[str, list[str]]) -> str:
    if len(statistics) == 1:
        return next(iter(statistics))
    return "; ".join(f"{text} ({', '.join(dict.fromkeys(tasks))})" for text, tasks in statistics.items())
