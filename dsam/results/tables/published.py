"""Published figures (results/reference, each row with its source) beside the runs on the same GLUE task and metric."""

from functools import cache
from pathlib import Path

import pandas as pd

from dsam.results.statistics import methods, scored
from dsam.results.tables.formatting import DASH, percent
from dsam.results.tables.rendering import Table
from dsam.results.tables.settings import PREFIX, held_out_note, selection_note
from dsam.task import shipped

REFERENCE = Path(__file__).parents[3] / "results" / "reference"
LIMITS = [f"{PREFIX}max_steps", f"{PREFIX}max_train_examples"]


@cache
def reference() -> pd.DataFrame:
    """Every published figure: model, task, metric, value (×100), statistic, source."""
    return pd.concat([pd.read_csv(path) for path in sorted(REFERENCE.glob("*.csv"))], ignore_index=True)


def beside_published(frame: pd.DataFrame, which: str = "best", baseline: str = "adamw") -> Table | None:
    """A row per method here, and below them one per model published; a column per task and metric that both have.

    Only runs on the whole of an official GLUE task count, or on all of it but the part that they chose their epoch by,
    which a note says. A model's published figures are those whose name begins
    with its own (bert_base: bert-base-uncased); if there are none, those of all models. None if nothing is beside.
    """
    official = [name for name, task in shipped().items() if "builtin" not in task.sources]
    runs = frame[frame["task"].isin(official)]
    if "own_task" in runs:  # one of the user's own may be called by a name of GLUE's
        runs = runs[runs["own_task"] != True]  # noqa: E712  # nor is it known of every run
    for limit in LIMITS:
        runs = runs[runs[limit].isna()] if limit in runs else runs
    runs = scored(runs, which)
    if runs.empty:
        return None
    published = reference()
    same = {model: published["model"].str.startswith(model.replace("_", "-")) for model in runs["model"].unique()}
    alone = [model for model, own in same.items() if not own.any()]
    if not alone:
        published = published[pd.concat(same, axis=1).any(axis=1)]
    here = {
        (model, method): {
            (task, metric): _score(own[own["task"] == task], task, metric, which)
            for task, metric in published[["task", "metric"]].drop_duplicates().itertuples(index=False)
        }
        for model, group in runs.groupby("model", sort=False)
        for method, own in ((label, group[group["method_label"] == label]) for label in methods(group, baseline))
    }
    numbers = pd.DataFrame.from_dict(here, orient="index").dropna(axis=1, how="all")
    if numbers.empty:
        return None
    theirs = published.assign(value=published["value"] / 100).pivot(
        index="model", columns=["task", "metric"], values="value"
    )
    theirs = theirs.reindex(columns=numbers.columns).dropna(how="all")
    rows = [{"from": "here", "model": model, "method": method} for model, method in numbers.index]
    rows += [{"from": f"published [{k}]", "model": model, "method": DASH} for k, model in enumerate(theirs.index, 1)]
    numbers = pd.concat([numbers, theirs], ignore_index=True)
    numbers.columns = [" ".join(column) for column in numbers.columns]
    labels = pd.DataFrame(rows)
    notes = [
        selection_note(runs, which),
        f"Here: mean over the finished runs, {which} epoch. Published: other code, recipe and versions, and "
        "no runs behind the figures, so that no difference to them can be tested.",
        *held_out_note(runs),
        *(f"There are no published figures for {model}: those of other models are shown." for model in alone),
        *(f"[{k}] {model}: {_origin(published, model)}" for k, model in enumerate(theirs.index, 1)),
    ]
    caption = f"Beside published figures on the GLUE development sets ({which} epoch), ×100"
    return Table("beside_published", caption, notes, labels.join(numbers), labels.join(numbers.map(percent)))


def _score(runs: pd.DataFrame, task: str, metric: str, which: str) -> float:
    """The runs' mean `metric` as published: of MNLI's 'accuracy (matched)' one set, of 'accuracy' the mean of both."""
    name, _, group = metric.removesuffix(")").partition(" (")
    splits = [f"dev_{group}"] if group else shipped()[task].evaluation
    columns = [f"{which}.{split}.{name}" for split in splits]
    return runs.reindex(columns=columns).mean(axis=1, skipna=False).mean()


def _origin(published: pd.DataFrame, model: str) -> str:
    """How a model's figures came about (with their tasks, where that differs), and where they stand."""
    own = published[published["model"] == model]
    tasks = own.groupby("statistic", sort=False)["task"].unique()
    how = [text if len(tasks) == 1 else f"{text} ({', '.join(names)})" for text, names in tasks.items()]
    return "; ".join([*how, *own["source"].unique()])
