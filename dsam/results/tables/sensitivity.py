"""Scores against rho, where a method was run with several."""

import pandas as pd

from dsam.results.statistics import ROUNDING, baseline_label, scored, summarise, t_interval
from dsam.results.tables.formatting import DASH, score_cell
from dsam.results.tables.labels import value_text, without
from dsam.results.tables.rendering import BOLD, Table, styled
from dsam.results.tables.settings import selection_note

KEY = ["model", "task", "method_label"]


def against_rho(frame: pd.DataFrame, which: str = "best", baseline: str = "adamw") -> pd.DataFrame:
    """`summarise`'s rows of the methods that were run with several rho, and of the baseline, whose `rho` is NaN.

    Further columns: `method` (the label without rho), `rho`, `low` and `high` (95 % t-interval of the mean over
    seeds). Empty where no method was run with several rho.
    """
    summary = summarise(frame, which)
    summary["method"] = summary["method_label"].map(lambda label: without(label, "rho"))
    varied = summary["method"] != summary["method_label"]
    if not varied.any():
        return summary.assign(rho=float("nan"), low=float("nan"), high=float("nan"))[varied]
    rho = frame.groupby(KEY)["hyperparameters.rho"].first().astype(float)
    summary = summary.join(rho.rename("rho"), on=KEY)
    runs = scored(frame, which).groupby(KEY)
    scores = {key: t_interval(own.set_index(["task", "seed"])["score"]) for key, own in runs}
    ends = [scores.get(tuple(row), (float("nan"),) * 2) for row in summary[KEY].to_numpy()]
    summary[["low", "high"]] = pd.DataFrame(ends, index=summary.index, dtype=float)
    references = {
        model: baseline_label(runs["method_label"].unique(), baseline) for model, runs in frame.groupby("model")
    }
    reference = summary["method_label"] == summary["model"].map(references)
    summary.loc[reference, "rho"] = float("nan")
    models = summary.loc[varied, "model"].unique()
    return summary[(varied & summary["rho"].notna()) | (reference & summary["model"].isin(models))]


def rho_table(frame: pd.DataFrame, which: str = "best", baseline: str = "adamw") -> Table | None:
    """A row per model, task and method, a column per rho, the baseline's score beside them; None without a sweep."""
    values = against_rho(frame, which, baseline)
    rows = values[values["rho"].notna()]
    if rows.empty:
        return None
    references = values[values["rho"].isna()].set_index(["model", "task"])
    columns = {rho: f"ρ = {value_text(rho)}" for rho in sorted(rows["rho"].unique())}
    text, styles = [], []
    for (model, task, method), own in rows.groupby(["model", "task", "method"], sort=False):
        row = {"model": model, "task": task, "method": method}
        if (model, task) in references.index:
            row[baseline] = score_cell(references.loc[(model, task)])
        best = own["mean"].max() if own["mean"].count() > 1 else float("nan")
        text.append(row | {columns[rho.rho]: score_cell(rho) for _, rho in own.iterrows()})
        styles.append({columns[rho]: BOLD for rho in own.loc[best - own["mean"] < ROUNDING, "rho"]})
    order = ["model", "task", "method", *([baseline] if len(references) else []), *columns.values()]
    shown = pd.DataFrame(text).reindex(columns=order).fillna(DASH)
    notes = [
        selection_note(frame, which),
        "Bold: the best ρ of a row. A ρ that is picked by these scores flatters its method.",
    ]
    kept = ["model", "task", "method", "rho", "mean", "sd", "low", "high", "count", "expected"]
    caption = f"Scores against ρ ({which} epoch): mean ± sd over seeds (number of runs), ×100"
    return Table("rho", caption, notes, values[kept], shown, styled(styles, shown)).without_single_model()
