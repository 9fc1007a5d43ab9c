"""Figures that read in print and without colour vision: scores per seed, differences, curves, rho."""

import math
import re
import textwrap
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dsam.results.statistics import compare, compare_by_task, methods, not_compared, pairs_left_out, scored
from dsam.results.tables.formatting import first_of
from dsam.results.tables.labels import without as label_without
from dsam.results.tables.memorised import not_measured
from dsam.results.tables.sensitivity import against_rho

# Okabe and Ito's palette without its yellow, which vanishes on white; markers and dashes tell methods apart in grey.
COLOURS = ["#000000", "#E69F00", "#0072B2", "#009E73", "#D55E00", "#56B4E9", "#CC79A7"]
MARKERS = ["o", "s", "^", "D", "v", "P", "X"]
DASHES = ["-", "--", "-.", ":"]
METHODS = [
    *("adamw", "adamw_2x", "sam", "dsam", "per_instance", "asam", "m_sam"),
    *("rw_sam", "dsam_curvature", "gsam", "sam_low_lr", "esam", "adamw_low_lr", "adamw_quarter_lr"),
    *("looksam", "fsam", "msam", "sam_quarter_lr", "adamw_eighth_lr", "sam_on", "ae_sam"),
    *("rdrop", "r3f", "per_instance_quarter_lr", "freelb", "smart"),
]
"""Each has the look of its place here in every figure; others have those that follow. Rows of seven: a column shares a
colour, and so what is often drawn together stands in different ones."""


def write(frame: pd.DataFrame, folder: str | Path, which: str = "best", baseline: str = "adamw") -> list[Path]:
    """Every figure as <folder>/<kind>_<model>.png and .pdf; returns the paths."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, _, figure in figures(frame, which, baseline):
        for suffix, metadata in (("png", {}), ("pdf", {"CreationDate": None})):  # the same figure, the same bytes
            paths.append(folder / f"{name}.{suffix}")
            figure.savefig(paths[-1], dpi=200, metadata=metadata)
    return paths


def figures(frame: pd.DataFrame, which: str = "best", baseline: str = "adamw") -> Iterator[tuple[str, str, Figure]]:
    """(file name, description, figure) for each kind of figure and model that has what it shows."""
    for model, runs in frame.groupby("model", sort=False):
        place = _file_name(model)
        if len(scored(runs, which)):
            text = f"{model}: score of every run at its {which} epoch; bars are means, dashed lines the majority answer"
            yield f"scores_{place}", text, scores(runs, which, baseline)
        every = compare(runs, baseline, which)
        comparison = every.dropna(subset="difference")
        if comparison["low"].notna().any():
            text = f"{model}: mean difference to {baseline}, paired by seed, with {_interval_note([comparison])}"
            text += _lacking(every)
            yield f"differences_{place}", text, differences(comparison, methods(runs, baseline), baseline)
        by_task = compare_by_task(runs, baseline, which)
        if len(by_task) > 1:
            what = _interval_note(by_task.values())
            text = f"{model}: difference to {baseline} on each task, paired by seed, with {what}"
            if left := not_compared(runs, baseline, which):
                text += f"; without {', '.join(f'{task} ({why})' for task, why in left.items())}"
            text += _lacking(compare(runs[runs["task"].isin(by_task)], baseline, which))
            yield f"differences_by_task_{place}", text, differences_by_task(by_task, methods(runs, baseline), baseline)
        if (runs["evaluations"].str.len() > 0).any():
            text = f"{model}: development score by step; thin lines are runs, thick ones the means of those that count"
            yield f"curves_{place}", text, curves(runs, which, baseline)
            if runs["train.passes_per_step"].nunique() > 1:
                text = f"{model}: development score by forward-backward passes, the compute that it took"
                yield f"compute_{place}", text, curves(runs, which, baseline, by="passes")
            if runs["evaluations"].map(lambda points: any(loss is not None for *_, loss in points)).any():
                text = (
                    f"{model}: development loss by forward-backward passes; thin lines are runs, thick ones their means"
                )
                yield f"loss_{place}", text, curves(runs, which, baseline, by="passes", of="loss")
        for task, noisy in runs[runs["memorised"].str.len() > 0].groupby("task", sort=False):
            classes = any("accuracy" in point["flipped"] for points in noisy["memorised"] for _, point in points)
            fitted = "how much of the wrong training labels is fitted, and of the right ones"
            if not classes:
                fitted = "the loss on the wrong training labels, and on the right ones"
            text = (
                f"{model}, {task}: {fitted}, and the wrong labels' share in the gradients' norms, by step; thin "
                "lines are runs, thick ones the means of those that finished"
            )
            if without := not_measured(runs[runs["task"] == task]):
                text += f". {without[0].removesuffix('.')}"
            yield f"memorised_{place}_{_file_name(task)}", text, memorised(noisy, baseline)
        sensitivity = against_rho(runs, which, baseline)
        if sensitivity["mean"].notna().any():
            interval = " and 95 % t-interval" if (sensitivity["count"] > 1).any() else ""
            text = f"{model}: score against ρ, mean{interval} over seeds; the band is {baseline}"
            yield f"rho_{place}", text, rho(runs, sensitivity, baseline)


def _lacking(comparison: pd.DataFrame) -> str:
    pairs = pairs_left_out(comparison)
    return f"; pairs that are left out: {first_of(pairs)}" if pairs else ""


def _file_name(label: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "-", label)


def _interval_note(comparisons: Iterable[pd.DataFrame]) -> str:
    single = any(comparison["low"].isna().any() for comparison in comparisons)
    return "95 % t-interval" + ("; none where a task has a single pair, or all are equal" if single else "")


def scores(frame: pd.DataFrame, which: str = "best", baseline: str = "adamw") -> Figure:
    """One panel per task: a point per seed, a bar at the mean, a dashed line at the majority answer.

    The axis follows the scores; a majority answer far below them is written above it.
    """
    order = methods(frame, baseline)
    looks = styles(order)
    figure, panels = _panels(frame, height=2.3 + 0.05 * max(map(len, order)), width=max(1.6, 0.45 * len(order) + 0.8))
    runs = scored(frame, which)
    for task, axes in panels.items():
        for position, method in enumerate(order):
            values = 100 * runs.loc[(runs["task"] == task) & (runs["method_label"] == method), "score"].to_numpy()
            if len(values):
                look = looks[method] | {"linestyle": ""}
                spread = [position + 0.28 * (2 * (k + 0.5) / len(values) - 1) for k in range(len(values))]
                axes.plot(spread, values, alpha=0.75, **look)
                axes.hlines(values.mean(), position - 0.36, position + 0.36, color=look["color"])
        _mark_majority(axes, 100 * frame.loc[frame["task"] == task, "majority"].dropna())
        axes.set_xticks(range(len(order)), order, rotation=40, ha="right", rotation_mode="anchor")
        axes.set_xlim(-0.6, len(order) - 0.4)
    return figure


def _mark_majority(axes: Axes, majority: pd.Series) -> None:
    low, high = axes.get_ylim()
    if not len(majority):
        return
    value = majority.iloc[0]
    if value > low - (high - low):
        axes.axhline(value, color="#777777", linestyle=(0, (4, 3)), linewidth=0.8, zorder=0)
    else:
        axes.set_title(f"{axes.get_title()}\nmajority {value:.1f}, below the axis", fontsize=9)


def differences(comparison: pd.DataFrame, order: list[str], baseline: str) -> Figure:
    """One row per compared method: its mean difference to the baseline in points, with the 95 % interval.

    `order` is that of `methods`, so that a method looks the same in every figure.
    """
    figure = Figure(figsize=(6, 0.9 + 0.34 * len(comparison)), layout="constrained")
    axes = figure.add_subplot()
    _plain(axes)
    _difference_rows(axes, comparison, list(comparison["method"]), order)
    axes.set_xlabel(f"difference to {baseline} (points, 95 % interval)", fontsize=9)
    return figure


def differences_by_task(comparisons: dict[str, pd.DataFrame], order: list[str], baseline: str) -> Figure:
    """The same for each task by itself, a panel each with common axes; `comparisons` of {task: …}."""
    rows = [method for method in order if any(method in set(found["method"]) for found in comparisons.values())]
    columns = min(len(comparisons), 4)
    lines = math.ceil(len(comparisons) / columns)
    size = (1.2 + 2.2 * columns, lines * (1.0 + 0.3 * len(rows)))
    figure = Figure(figsize=size, layout="constrained")
    panels = list(figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False).flat)
    for axes, (task, comparison) in zip(panels, comparisons.items(), strict=False):
        _plain(axes)
        axes.set_title(task, fontsize=9)
        _difference_rows(axes, comparison, rows, order)
    for place in range(len(comparisons), len(panels)):
        panels[place].set_axis_off()
        panels[place - columns].tick_params(labelbottom=True)  # which the one below would have had
    figure.supxlabel(f"difference to {baseline} (points, 95 % interval)", fontsize=9)
    return figure


def _difference_rows(axes: Axes, comparison: pd.DataFrame, rows: list[str], order: list[str]) -> None:
    axes.axvline(0, color="#777777", linestyle=(0, (4, 3)), linewidth=0.8)
    looks = styles(order)
    for row in comparison.itertuples():
        style, position = looks[row.method], rows.index(row.method)
        axes.plot([100 * row.low, 100 * row.high], [position, position], color=style["color"], linewidth=1.8)
        axes.plot(100 * row.difference, position, **style | {"markersize": 6})
    axes.set_yticks(range(len(rows)), rows)
    axes.set_ylim(len(rows) - 0.5, -0.5)


def curves(
    frame: pd.DataFrame, which: str = "best", baseline: str = "adamw", by: str = "steps", of: str = "score"
) -> Figure:
    """One panel per task: the development score or loss, thin per run, thick for the mean of the runs that count.

    `by` says against what: "steps", or "passes", the forward-backward passes that these steps took.
    """
    scale = 100 if of == "score" else 1
    order = methods(frame, baseline)
    counted = scored(frame, which).index
    figure, panels = _panels(frame, height=2.2, width=2.6, title="development loss" if of == "loss" else None)
    for task, axes in panels.items():
        for method, style in styles(order).items():
            runs = frame[(frame["task"] == task) & (frame["method_label"] == method)]
            # Runs of one method meet at the same steps, but may differ a little in what a step took.
            passes = runs["train.passes_per_step"].mean() if by == "passes" else 1
            lines = runs["evaluations"].map(
                lambda points: pd.Series(
                    {step: score if of == "score" else loss for step, score, loss in points}, dtype=float
                )
            )
            for line in lines:
                axes.plot(passes * line.index, scale * line, color=style["color"], linewidth=0.6, alpha=0.35)
            means = [line for run, line in lines.items() if run in counted]
            if means:
                # A mean over those runs alone that got this far would jump where one stops.
                mean = pd.concat(means, axis=1).dropna().mean(axis=1)
                axes.plot(passes * mean.index, scale * mean, linewidth=1.6, label=method, **style)
        axes.set_xlabel("step" if by == "steps" else "forward-backward passes", fontsize=9)
    _legend(figure, panels)
    return figure


def memorised(frame: pd.DataFrame, baseline: str = "adamw") -> Figure:
    """How fast the runs of a task with label noise fit wrong and right labels, and how much the wrong ones pull."""
    points = [point for points in frame["memorised"] for _, point in points]
    classes = any("accuracy" in point["flipped"] for point in points)
    fitted: dict[str, Callable[[dict], float | None]] = {
        "wrong labels fitted (%)": lambda point: _times(100, point["flipped"].get("accuracy")),
        "right labels fitted (%)": lambda point: _times(100, point["clean"].get("accuracy")),
    }
    losses: dict[str, Callable[[dict], float | None]] = {
        "loss on wrong labels": lambda point: point["flipped"].get("loss"),
        "loss on right labels": lambda point: point["clean"].get("loss"),
    }
    shown = (fitted if classes else losses) | {
        "wrong labels' share of Σ‖gradient‖ (%)": lambda point: _times(100, point.get("pull"))
    }
    shown = {title: value for title, value in shown.items() if any(value(point) is not None for point in points)}
    figure = Figure(figsize=(2.9 * max(1, len(shown)), 2.6), layout="constrained")
    panels = {}
    for column, (title, value) in enumerate(shown.items()):
        axes = panels[title] = figure.add_subplot(1, len(shown), column + 1)
        _plain(axes)
        axes.set_title(title, fontsize=9)
        axes.set_xlabel("step", fontsize=9)
        for method, style in styles(methods(frame, baseline)).items():
            runs = frame[frame["method_label"] == method]
            lines = runs["memorised"].map(
                lambda points, value=value: pd.Series({step: value(point) for step, point in points}, dtype=float)
            )
            for line in lines:
                axes.plot(line.index, line, color=style["color"], linewidth=0.6, alpha=0.35)
            means = list(lines[runs["status"] == "finished"])
            if means:
                mean = pd.concat(means, axis=1).dropna().mean(axis=1)
                axes.plot(mean.index, mean, linewidth=1.6, label=method, **style)
    wrong = frame["memorised"].map(lambda points: points[-1][1].get("pulling")).dropna()
    if len(wrong):  # where each example pulls alike, in the last panel
        axes.axhline(100 * wrong.mean(), color="#777777", linestyle=(0, (4, 3)), linewidth=0.8)
    _legend(figure, panels)
    return figure


def _times(factor: float, value: float | None) -> float | None:
    return None if value is None else factor * value


def rho(frame: pd.DataFrame, sensitivity: pd.DataFrame, baseline: str = "adamw") -> Figure:
    """One panel per task: each method's mean score with its interval against rho, the baseline's as a band."""
    # As the figures of a sweep without these variants would show the methods.
    order = list(dict.fromkeys(label_without(label, "rho") for label in methods(frame, baseline)))
    looks = styles(order)
    varied = sensitivity[sensitivity["rho"].notna()]
    figure, panels = _panels(frame[frame["task"].isin(varied["task"])], height=2.2, width=2.6)
    for task, axes in panels.items():
        for row in sensitivity[(sensitivity["task"] == task) & sensitivity["rho"].isna()].itertuples():
            axes.axhspan(100 * row.low, 100 * row.high, color="#dddddd", linewidth=0, zorder=0)
            axes.axhline(100 * row.mean, color="#777777", linestyle=(0, (4, 3)), linewidth=0.9, label=row.method_label)
        for method, own in varied[varied["task"] == task].groupby("method", sort=False):
            own = own.sort_values("rho")
            ends = 100 * pd.concat([own["mean"] - own["low"], own["high"] - own["mean"]], axis=1).to_numpy().T
            position = order.index(method)
            beside = own["rho"] * 1.03 ** (position - len(order) / 2)  # intervals at one rho don't cover each other
            look = looks[method] | {"linewidth": 1.4, "elinewidth": 1, "capsize": 2.5, "capthick": 1}
            axes.errorbar(beside, 100 * own["mean"], yerr=ends, label=method, **look)
        ticks = sorted(varied.loc[varied["task"] == task, "rho"].unique())
        if min(ticks) > 0:
            axes.set_xscale("log")
        else:
            axes.set_xscale("symlog", linthresh=next((tick for tick in ticks if tick > 0), 1))
        if len(ticks) <= 10:
            axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks], rotation=40 if len(ticks) > 5 else 0)
            axes.minorticks_off()
        axes.set_xlabel("ρ", fontsize=9)
    _legend(figure, panels)
    return figure


def _legend(figure: Figure, panels: dict[str, Axes]) -> None:
    """One legend for all panels, below them, in as many columns as fit; the figure grows by what it takes."""
    labelled = {
        label: line for axes in panels.values() for line, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    for columns in (3, 2, 1):
        # Long enough a sample of a line to tell dashes apart.
        legend = figure.legend(labelled.values(), labelled.keys(), loc="outside lower center", ncols=columns,
                               frameon=False, fontsize=9, handlelength=3.5)  # fmt: skip
        size = legend.get_window_extent()
        if size.width <= figure.bbox.width or columns == 1:
            figure.set_figheight(figure.get_figheight() + size.height / figure.dpi)
            return
        legend.remove()


def _panels(
    frame: pd.DataFrame, height: float, width: float, title: str | None = None
) -> tuple[Figure, dict[str, Axes]]:
    """A figure with an empty panel per task, titled with the task and its metric or `title`."""
    metrics = frame.groupby("task", sort=False)["metric"].first()
    columns = min(len(metrics), 4 if width < 3 else 2)
    rows = math.ceil(len(metrics) / columns)
    figure = Figure(figsize=(max(columns * width, 3.5), rows * height), layout="constrained")
    panels = {}
    for position, (task, metric) in enumerate(metrics.items()):
        axes = figure.add_subplot(rows, columns, position + 1)
        _plain(axes)
        below = f"({title})" if title else f"({metric} ×100)" if isinstance(metric, str) else ""
        axes.set_title("\n".join([task, *textwrap.wrap(below, int(11 * width))]), fontsize=9)
        panels[task] = axes
    return figure, panels


def _plain(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)
    axes.grid(color="#e6e6e6", linewidth=0.6)
    axes.set_axisbelow(True)


def styles(labels: Sequence[str]) -> dict[str, dict]:
    """The look of each method of a figure: that of its optimizer, variants of one in its colour."""
    found: dict[str, dict] = {}
    others = [name for name in dict.fromkeys(_optimizer(label) for label in labels) if name not in METHODS]
    for label in labels:
        position = [*METHODS, *others].index(_optimizer(label))
        looks = (_style(position, variant) for variant in range(len(MARKERS) * len(DASHES)))
        found[label] = next((look for look in looks if look not in found.values()), _style(position))
    return found


def _optimizer(label: str) -> str:
    return label.partition(" (")[0]


def _style(position: int, variant: int = 0) -> dict:
    return {
        "color": COLOURS[position % len(COLOURS)],
        "linestyle": DASHES[(position + variant) % len(DASHES)],
        "marker": MARKERS[(position + position // len(COLOURS) + variant) % len(MARKERS)],
        "markersize": 4.5,
        "markeredgewidth": 0,
    }
