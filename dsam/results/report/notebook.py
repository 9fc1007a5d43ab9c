"""What the results notebook shows beside the tables: the runs, their figures and provenance, what failed."""

import html
import os
from base64 import b64encode
from io import BytesIO
from pathlib import Path

import pandas as pd
from IPython.display import HTML

from dsam.errors import UserError
from dsam.results import plots
from dsam.results.collect import collect
from dsam.results.report.facts import Facts, whole_numbers
from dsam.results.report.words import in_words
from dsam.results.tables.build import Tables
from dsam.results.tables.formatting import DASH, percent
from dsam.results.tables.rendering import Table

ROOT = Path(__file__).parents[3]
IDENTITY = ["data", "model", "record_version"]  # of what names a run; the rest are its settings
NUMBERS = ["seed", "score", "best epoch", "last", "seconds"]


def runs_from_environment() -> tuple[pd.DataFrame, Path, str | None, str]:
    """The collected runs, their folder, the experiment (None: all runs) and the epoch ('best' or 'last').

    Read from DSAM_RUNS, DSAM_EXPERIMENT and DSAM_EPOCH; opened by hand, every run under results/runs. DSAM_COLLECTED is
    a file of runs that were collected already, those of the tables that are made beside the page.
    """
    runs_dir = Path(os.environ.get("DSAM_RUNS", ROOT / "results" / "runs")).resolve()
    experiment = os.environ.get("DSAM_EXPERIMENT") or None
    collected = os.environ.get("DSAM_COLLECTED")
    frame = pd.read_pickle(collected) if collected else collect(runs_dir, experiment)
    if frame.empty:
        raise UserError(f"no runs at '{runs_dir}': run `make reproduce` first")
    return frame, runs_dir, experiment, os.environ.get("DSAM_EPOCH", "best")


def overview(frame: pd.DataFrame, experiment: str | None) -> Table:
    """What was run: per model and method the tasks, the seeds and how the runs ended."""
    rows = []
    for (model, method), runs in frame.groupby(["model", "method_label"], sort=False):
        row = {"model": model, "method": method, "tasks": ", ".join(runs["task"].unique())}
        row |= {"seeds": whole_numbers(runs["seed"].dropna().unique()), "runs": len(runs)}
        rows.append(row | {status: (runs["status"] == status).sum() for status in frame["status"].unique()})
    values = pd.DataFrame(rows)
    title = f"Runs of the experiment {experiment}" if experiment else "All runs found"
    return Table("overview", title, [], values, values)


def opening(frame: pd.DataFrame, built: Tables, which: str = "best") -> HTML:
    """What was found, in words, with the figure of differences beside it."""
    words = "".join(f"<p>{html.escape(text)}</p>" for text in in_words(built))
    drawn = [
        _figure(text, figure)
        for name, text, figure in plots.figures(frame, which)
        if name.startswith("differences_") and "by_task" not in name
    ]
    return HTML(f'<div class="opening"><div>{words}</div><div>{"".join(drawn)}</div></div>')


def images(frame: pd.DataFrame, which: str = "best") -> list[HTML]:
    """The figures, each with its caption."""
    return [HTML(_figure(text, figure)) for _, text, figure in plots.figures(frame, which)]


def _figure(text: str, figure) -> str:
    shown, data = html.escape(text), b64encode(_png(figure)).decode()
    source = f"data:image/png;base64,{data}"
    return f'<figure><img alt="{shown}" src="{source}"><figcaption>{shown}</figcaption></figure>'


def _png(figure) -> bytes:
    buffer = BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    return buffer.getvalue()


def provenance(frame: pd.DataFrame, runs_dir: Path) -> Table:
    """Each fact of the runs' provenance.json with its values; where they differ, how many runs had each.

    Without what the table of settings tells, and without the numbers of processes.
    """
    found = Facts.read(frame, runs_dir)
    rows = []
    for name in found.values:
        fact = name.removeprefix("identity.")
        if fact in IDENTITY or (fact == name and name != "pid"):
            rows.append({"fact": fact, "value": found.span(name) if name == "started" else found.text(name)})
    values = pd.DataFrame(rows, columns=["fact", "value"])
    return Table("provenance", f"Provenance of {found.runs} runs", [], values, values)


def run_table(frame: pd.DataFrame, runs_dir: Path) -> str:
    """An HTML table of every run with a link to its folder, which the report's page lets a reader sort and filter."""
    shown = {
        "task": frame["task"],
        "model": frame["model"],
        "method": frame["method_label"],
        "seed": frame["seed"].map(lambda seed: DASH if pd.isna(seed) else seed),
        "status": frame["status"],
        "score": frame["best"].map(percent),
        "best epoch": frame["best_epoch"].map(lambda epoch: DASH if pd.isna(epoch) else f"{epoch:g}"),
        "last": frame["last"].map(percent),
        "seconds": frame["train.seconds"].map(lambda seconds: DASH if pd.isna(seconds) else f"{seconds:.1f}"),
    }
    numbers = [' class="number"' if name in NUMBERS else "" for name in shown]
    head = "".join(f"<th{kind}>{name}</th>" for name, kind in zip(shown, numbers, strict=True))
    rows = []
    for run, *values in zip(frame.itertuples(), *shown.values(), strict=True):
        cells = "".join(f"<td{kind}>{html.escape(str(v))}</td>" for kind, v in zip(numbers, values, strict=True))
        rows.append(f"<tr>{cells}<td>{_link(run, runs_dir, run.id)}</td></tr>")
    table = f'<table class="sortable"><thead><tr>{head}<th>run</th></tr></thead><tbody>{"".join(rows)}</tbody></table>'
    return f'<div class="long" role="region" aria-label="Every run" tabindex="0">{table}</div>'


def without_result(frame: pd.DataFrame, runs_dir: Path) -> str:
    """An HTML list of the runs that did not finish with a score, each with its reason and a link to its folder."""
    lost = frame[(frame["status"] != "finished") | frame["best"].isna()]
    items = []
    for run in lost.itertuples():
        reason = run.reason if isinstance(run.reason, str) else ""
        status = "finished without a score" if run.status == "finished" else run.status
        seed = DASH if pd.isna(run.seed) else run.seed
        what = html.escape(f"{run.task}, {run.model}, {run.method_label}, seed {seed}: {status}. {reason}")
        items.append(f"<li>{what} {_link(run, runs_dir, run.folder)}</li>")
    return f'<ul class="long">{"".join(items)}</ul>' if items else "<p>Every run finished with a score.</p>"


def _link(run, runs_dir: Path, text: str) -> str:
    """`text`, leading to the run's folder where there is one."""
    folder, text = runs_dir / run.folder, html.escape(str(text))
    there = run.status != "missing" or folder.is_dir()
    return f'<a href="{folder.as_uri()}">{text}</a>' if there else text
