"""What the results notebook shows beside the tables: the runs, their provenance, what failed, published figures."""

import html
import json
import os
from collections import defaultdict
from io import BytesIO
from pathlib import Path

import pandas as pd
from IPython.display import Image

from dsam.errors import UserError
from dsam.results import plots
from dsam.results.collect import collect
from dsam.results.formatting import DASH
from dsam.results.rendering import Table

ROOT = Path(__file__).parents[2]


def runs_from_environment() -> tuple[pd.DataFrame, Path, str | None, str]:
    """The collected runs, their folder, the experiment (None: all runs) and the epoch ('best' or 'last').

    Read from DSAM_RUNS, DSAM_EXPERIMENT and DSAM_EPOCH; opened by hand, every run under results/runs.
    """
    runs_dir = Path(os.environ.get("DSAM_RUNS", ROOT / "results" / "runs")).resolve()
    experiment = os.environ.get("DSAM_EXPERIMENT") or None
    frame = collect(runs_dir, experiment)
    if frame.empty:
        raise UserError(f"no runs at '{runs_dir}': run `make reproduce` first")
    return frame, runs_dir, experiment, os.environ.get("DSAM_EPOCH", "best")


def overview(frame: pd.DataFrame, experiment: str | None) -> Table:
    """What was run: per model and method the tasks, the seeds and how the runs ended."""
    rows = []
    for (model, method), runs in frame.groupby(["model", "method_label"], sort=False):
        seeds = sorted(runs["seed"].dropna().unique())
        row = {"model": model, "method": method, "tasks": ", ".join(runs["task"].unique())}
        row |= {"seeds": ", ".join(map(str, seeds)), "runs": len(runs)}
        rows.append(row | {status: (runs["status"] == status).sum() for status in frame["status"].unique()})
    values = pd.DataFrame(rows)
    title = f"Runs of the experiment {experiment}" if experiment else "All runs found"
    return Table("overview", title, [], values, values)


def images(frame: pd.DataFrame, which: str = "best") -> list[Image]:
    """The figures, to be shown in a notebook, described for readers who don't see them."""
    return [Image(data=_png(figure), alt=text, format="png") for _, text, figure in plots.figures(frame, which)]


def _png(figure) -> bytes:
    buffer = BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    return buffer.getvalue()


def provenance(frame: pd.DataFrame, runs_dir: Path) -> Table:
    """Each fact of the runs' provenance.json with its values; where they differ, how many runs had each."""
    facts, read = defaultdict(lambda: defaultdict(int)), 0
    for folder in frame.loc[frame["status"].isin(["finished", "diverged"]), "folder"]:
        try:
            content = json.loads((runs_dir / folder / "provenance.json").read_text(encoding="utf-8"))
            flat = {name: str(value) for name, value in pd.json_normalize(content).iloc[0].items()}
        except (OSError, ValueError, IndexError, NotImplementedError):
            flat = {"provenance.json": "cannot be read"}
        read += 1
        for name, value in flat.items():
            facts[name][value] += 1
    rows = []
    for name, values in facts.items():
        shown = sorted(values, key=values.get, reverse=True)
        text = shown[0] if len(shown) == 1 and values[shown[0]] == read else None
        text = text or "; ".join(f"{value} ({values[value]} runs)" for value in shown[:3])
        rows.append({"fact": name, "value": text + (f"; {len(shown) - 3} more" if len(shown) > 3 else "")})
    values = pd.DataFrame(rows, columns=["fact", "value"])
    return Table("provenance", f"Provenance of {read} runs", [], values, values)


def without_result(frame: pd.DataFrame, runs_dir: Path) -> str:
    """An HTML list of the runs that did not finish with a score, each with its reason and a link to its folder."""
    lost = frame[(frame["status"] != "finished") | frame["best"].isna()]
    items = []
    for run in lost.itertuples():
        reason = run.reason if isinstance(run.reason, str) else ""
        status = "finished without a score" if run.status == "finished" else run.status
        link = f'<a href="{(runs_dir / run.folder).as_uri()}">{html.escape(run.folder)}</a>'
        seed = DASH if pd.isna(run.seed) else run.seed
        what = html.escape(f"{run.task}, {run.model}, {run.method_label}, seed {seed}: {status}. {reason}")
        items.append(f"<li>{what} {link}</li>")
    return f"<ul>{''.join(items)}</ul>" if items else "<p>Every run finished with a score.</p>"


def published(frame: pd.DataFrame) -> Table:
    """The figures of results/reference for the tasks of these runs, each with its source."""
    files = sorted((ROOT / "results" / "reference").glob("*.csv"))
    values = pd.concat([pd.read_csv(path) for path in files], ignore_index=True)
    values = values[values["task"].isin(frame["task"].unique())]
    if values.empty:
        notes = ["There are none for these tasks."]
    else:
        notes = ["Other code and recipes, ×100; they compare only with runs on the official GLUE data."]
        notes += [
            f"{model}: {source}" for model, source in values.groupby("model", sort=False)["source"].first().items()
        ]
    text = values.drop(columns="source").assign(value=values["value"].map("{:.2f}".format))
    return Table("published", "Published figures on the GLUE development sets", notes, values, text)
