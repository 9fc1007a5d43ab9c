"""From the study's measurements to its table and figure: differences to uniform weights, paired by batch."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from dsam.errors import UserError
from dsam.results.statistics import sign_flip_test, t_interval

from .study import read_rows

MEASURES = (
    "cosine",
    "error",
    "correction_cosine",
    "correction_error",
    "rise",
    "guardedness_mean",
    "guardedness_min",
    "ess",
)
OF_WRONG = ("wrong", "wrong_weight", "wrong_pull")
"""Measured where labels are wrong."""
DECIDING = ("cosine", "error")
"""Of which both say whether a weighting is nearer."""
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")


LEVEL = 0.05
RESAMPLES = 4999  # a test is made of every weighting, measure and setting


def compared(differences: pd.Series) -> dict[str, float]:
    """The mean of a setting's differences, by batch, its 95 % t-interval, and p of the sign-flip test; batches are what
    is drawn, as seeds are elsewhere."""
    low, high = t_interval(differences)
    return {"difference": differences.mean(), "low": low, "high": high, "p": sign_flip_test(differences, RESAMPLES)[0]}


def summarise(measured: pd.DataFrame, measures: Sequence[str] = (*MEASURES, *OF_WRONG)) -> pd.DataFrame:
    """One row per task, phase, ρ, weighting and measure: mean, and mean difference to uniform with interval and p."""
    rows = []
    for (task, phase, rho), group in measured.groupby(["task", "phase", "rho"], sort=False):
        for measure in (name for name in measures if name in measured):
            table = group.pivot(index="batch", columns="weighting", values=measure)
            scores = {name: table[name].to_numpy(dtype=float) for name in group["weighting"].unique()}
            for weighting, mine in scores.items():
                both = ~np.isnan(mine) & ~np.isnan(scores["uniform"])
                rows.append(
                    {
                        "task": task,
                        "phase": phase,
                        "rho": rho,
                        "weighting": weighting,
                        "measure": measure,
                        "batches": int(both.sum()),
                        "mean": mine[both].mean() if both.any() else np.nan,
                        **compared(pd.Series((mine - scores["uniform"])[both], table.index[both])),
                    }
                )
    return pd.DataFrame(rows)


def overview(summary: pd.DataFrame) -> pd.DataFrame:
    """One row per weighting: in how many of the settings (task, phase, ρ) of several batches it is nearer to the
    per-instance gradient than uniform weights, or farther: by cosine and by relative error alike, each p ≤ 0.05."""
    shown = summary[summary["measure"].isin(DECIDING) & (summary["weighting"] != "uniform")]
    rows = []
    for weighting, mine in shown[shown["batches"] > 1].groupby("weighting", sort=False):
        table = mine.pivot(index=["task", "phase", "rho"], columns="measure", values=["difference", "p"])
        table = table[table.notna().all(axis=1)]
        told = (table["p"] <= LEVEL).all(axis=1)
        cosine, error = table["difference", "cosine"], table["difference", "error"]
        nearer, farther = told & (cosine > 0) & (error < 0), told & (cosine < 0) & (error > 0)
        rows.append(
            {
                "weighting": weighting,
                "settings": len(table),
                "nearer": int(nearer.sum()),
                "tasks where nearer": ", ".join(dict.fromkeys(table.index[nearer].get_level_values("task"))) or "–",
                "farther": int(farther.sum()),
            }
        )
    return pd.DataFrame(rows)


def confirmation(measured: pd.DataFrame, looked_at: Mapping[str, int]) -> pd.DataFrame:
    """The overview on the batches that no choice was made by: all but the first `looked_at[task]` of each task."""
    return overview(summarise(measured[measured["batch"] >= measured["task"].map(looked_at).fillna(0)], DECIDING))


def as_markdown(summary: pd.DataFrame, confirmed: pd.DataFrame | None = None, times: pd.DataFrame | None = None) -> str:
    """The overview, and that of the confirmation; then a table per task, phase and ρ, bold where the difference is on
    the better side and its p at most 0.05, with each weighting's extra time from `times` (task, weighting, extra).
    """
    extra = {} if times is None else times.set_index(["task", "weighting"])["extra"].to_dict()
    parts = [
        "Differences to uniform weights (SAM), paired by batch, with 95 % t-intervals; bold on the better side where a "
        "sign-flip test has p ≤ 0.05. Settings in which a weighting is nearer to the per-instance gradient or farther, "
        "by cosine and relative error alike, p ≤ 0.05 each:",
        overview(summary).to_markdown(index=False),
    ]
    if confirmed is not None:
        parts += ["The same on the batches that were not looked at before:", confirmed.to_markdown(index=False)]
    for (task, phase, rho), group in summary.groupby(["task", "phase", "rho"], sort=False):
        rows = []
        for weighting, mine in group.groupby("weighting", sort=False):
            by = mine.set_index("measure")
            row = {"weighting": weighting, "batches": int(by.loc["cosine", "batches"])}
            for measure, better in (("cosine", 1), ("error", -1), ("correction_cosine", 1), ("correction_error", -1)):
                row[measure.replace("_", " ")] = _cell(by.loc[measure], better, weighting == "uniform")
            for measure in ("rise", "guardedness_mean", "guardedness_min", "ess"):
                row[measure.replace("_", " ")] = f"{by.loc[measure, 'mean']:.3g}"
            for measure in OF_WRONG[1:]:
                if measure in by.index:
                    row[measure.replace("_", " ")] = _cell(by.loc[measure], 0, weighting == "uniform")
            if extra:
                spent = extra.get((task, weighting))
                row["extra time"] = "–" if spent is None else f"{spent:+.0%}"
            rows.append(row)
        title = f"### {task} at {phase} % of the fine-tuning, ρ = {rho:g}"
        wrong = group[(group["measure"] == "wrong") & (group["weighting"] == "uniform")]["mean"]  # it has all batches
        title += f"; {wrong.item():.1%} of the labels are wrong" if len(wrong) else ""
        parts.append(f"{title}\n\n{pd.DataFrame(rows).to_markdown(index=False)}")
    return "\n\n".join(parts) + "\n"


def _cell(row: pd.Series, better: int, uniform: bool) -> str:
    if uniform:
        return f"{row['mean']:.3f}"
    text = f"{row['difference']:+.3f} [{row['low']:+.3f}, {row['high']:+.3f}]"
    return f"**{text}**" if better * row["difference"] > 0 and row["p"] <= LEVEL else text


def figure(summary: pd.DataFrame) -> Figure:
    """Differences to uniform of the gradient's cosine, a panel per task and ρ, a mark per phase."""
    shown = summary[(summary["measure"] == "cosine") & (summary["weighting"] != "uniform")]
    tasks, rhos = list(shown["task"].unique()), sorted(shown["rho"].unique())
    names, phases = list(shown["weighting"].unique()), sorted(shown["phase"].unique())
    drawn = Figure(figsize=(3.1 * len(rhos) + 1.6, 0.2 * len(names) * len(tasks) + 1.2), layout="constrained")
    axes = drawn.subplots(len(tasks), len(rhos), sharey=True, squeeze=False)
    for i, task in enumerate(tasks):
        for j, rho in enumerate(rhos):
            ax = axes[i][j]
            here = shown[(shown["task"] == task) & (shown["rho"] == rho)]
            for phase, mine in here.groupby("phase"):
                k = phases.index(phase)
                place = np.array([names.index(w) for w in mine["weighting"]]) + 0.18 * (k - 0.5)
                lengths = np.nan_to_num(np.array([mine["difference"] - mine["low"], mine["high"] - mine["difference"]]))
                ax.errorbar(
                    mine["difference"],
                    place,
                    xerr=lengths,
                    fmt="os^D"[k % 4],
                    ms=3,
                    lw=1,
                    color=COLOURS[k % len(COLOURS)],
                    label=f"{phase} %",
                )
            ax.axvline(0, color="0.4", lw=0.8)
            ax.set_title(f"{task}, ρ = {rho:g}", fontsize=9)
            ax.set_yticks(range(len(names)), names, fontsize=7)
            ax.tick_params(axis="x", labelsize=7)
            ax.xaxis.set_major_locator(MaxNLocator(5))
            ax.grid(axis="x", lw=0.3)
    axes[0][0].invert_yaxis()
    marks = {}  # a task may have been measured at some of the phases alone
    for ax in axes.flat:
        marks |= dict(zip(*ax.get_legend_handles_labels()[::-1], strict=True))
    shown_phases = [f"{phase} %" for phase in phases]
    axes[0][-1].legend(
        [marks[name] for name in shown_phases], shown_phases, title="of fine-tuning", fontsize=7, title_fontsize=7
    )
    drawn.supxlabel(
        "difference to uniform (SAM) of the cosine with the per-instance gradient, 95 % interval", fontsize=8
    )
    return drawn


def batches_in(table: pd.DataFrame) -> dict[str, int]:
    """{task: batches measured}"""
    return {str(task): int(batch) + 1 for task, batch in table.groupby("task", sort=False)["batch"].max().items()}


def require_looked_at(looked_at: Mapping[str, int], batches: Mapping[str, int], measurements: Path) -> None:
    """UserError where `looked_at` names a task that `measurements` does not hold, or leaves none of its `batches`."""
    if unknown := sorted(set(looked_at) - set(batches)):
        raise UserError(
            f"--looked-at {unknown[0]}: {measurements} has {', '.join(batches)} alone: leave it out until its rows are "
            "there"
        )
    if looked_at and all(looked_at.get(task, 0) >= count for task, count in batches.items()):
        raise UserError(f"--looked-at leaves no batch of {measurements} for a confirmation: give fewer")


def write(
    measurements: Path, folder: Path, looked_at: Mapping[str, int] | None = None, times: Path | None = None
) -> list[Path]:
    """summary.csv, summary.md and approximation.png/.pdf beside each other; returns their paths.

    With `looked_at` ({task: batches that candidates were chosen by}) the rest is shown apart, as a confirmation; with
    `times` (a CSV) every weighting has its extra time beside SAM's.
    """
    table = read_rows(measurements)
    require_looked_at(looked_at or {}, batches_in(table), measurements)
    summary = summarise(table)
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / name for name in ("summary.csv", "summary.md", "approximation.png", "approximation.pdf")]
    summary.to_csv(paths[0], index=False, float_format="%.6g")
    confirmed = confirmation(table, looked_at) if looked_at else None
    extra = read_rows(times) if times is not None else None
    paths[1].write_text(as_markdown(summary, confirmed, extra), encoding="utf-8")
    drawn = figure(summary)
    drawn.savefig(paths[2], dpi=160)
    drawn.savefig(paths[3])
    return paths
