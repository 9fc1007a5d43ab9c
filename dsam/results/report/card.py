"""What goes with an experiment's tables: README.md, how they came to be, and MODEL_CARD.md in Hugging Face's format."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import yaml

from dsam.errors import UserError
from dsam.results.report.facts import Facts, configurations, whole_numbers
from dsam.results.statistics import scored
from dsam.results.tables import rendering
from dsam.results.tables.build import Tables
from dsam.results.tables.settings import PREFIX, selection_note
from dsam.runs import manifest
from dsam.task import GLUE, HELD_OUT, Hub, shipped
from dsam.text import counted, published, split_command

HUB_METRICS = {"pearson": "pearsonr", "spearman": "spearmanr"}  # where the hub's name is another
FORMS = {".csv": "every number with all its digits", ".md": "Markdown", ".tex": "LaTeX, for booktabs", ".html": "HTML"}
RECONSTRUCTION = (
    "δ-SAM is a reconstruction: its paper (arXiv 2112.08772) has no official code, and only its abstracts and two "
    "summaries could be read. Its figures here say nothing certain about the paper's own method."
)


@dataclass(frozen=True)
class Origin:
    """Where the examples of a task come from: generated here, a data set of the hub's (or files of it), or neither."""

    name: str
    builtin: bool
    hub: Hub | None
    noise: float = 0.0
    ours: bool = True  # one of conf/task/, which are English

    @property
    def glue(self) -> bool:
        return self.hub is not None and self.hub.dataset == GLUE

    def dataset(self, label: str, split: str) -> dict:
        """The model index's entry for the split of the task that tables call `label`."""
        if self.hub is not None:
            title = f"GLUE {label}" if self.glue else label
            subset = self.hub.subset or "default"
            return {"name": title, "type": self.hub.dataset, "config": subset, "split": self.hub.split(split)}
        kind = "dsam built-in" if self.builtin else "own"
        return {"name": f"{kind} {label}", "type": kind.replace(" ", "-"), "config": self.name, "split": split}


def origins(frame: pd.DataFrame, configs: dict[tuple[str, str], dict]) -> dict[str, Origin]:
    """That of each task by its name in the tables, as its runs' configurations have it, or else this project's own."""
    found = {}
    for label, folder in frame.groupby("task", sort=False)["folder"].first().items():
        name = Path(folder).parts[0]
        config = next((config for (_, task), config in configs.items() if task == label), {})
        task, own = config.get("task") or {}, shipped().get(name)
        hub, builtin = (own.hub, own.builtin) if own else (None, False)
        if "metrics" in task:  # in full, as it has been since tasks can be a user's own
            hub, builtin = Hub.model_validate(task["hub"]) if task.get("hub") else None, bool(task.get("builtin"))
        found[label] = Origin(name, builtin, hub, (config.get("data") or {}).get("label_noise") or 0.0, own is not None)
    return found


def documents(
    built: Tables, frame: pd.DataFrame, experiment: str, runs_dir: Path, which: str, files: Iterable[Path]
) -> dict[str, str]:
    """File name -> text. Told by the runs alone, so that the same runs give the same bytes; `files`: the tables'."""
    facts, configs = Facts.read(frame, runs_dir), configurations(frame, runs_dir)
    return {
        "README.md": _readme(built, frame, experiment, runs_dir, which, files, facts),
        "MODEL_CARD.md": _model_card(built, frame, experiment, which, facts, configs),
    }


def _readme(built, frame, experiment, runs_dir, which, files, facts) -> str:
    literal = rendering.escape_markdown
    rows = {
        "command": f"`{_command(runs_dir, experiment)}`",
        "runs": f"{len(frame)} ({_counts(frame)})",
        "tasks": ", ".join(frame["task"].unique()),
        "models": ", ".join(frame["model"].unique()),
        "methods": ", ".join(frame["method_label"].unique()),
        "seeds": whole_numbers(frame["seed"].dropna().unique()),
        "selection": selection_note(frame, which),
        "code": f"commit {facts.text('git.commit')}; files changed since it: {facts.text('git.dirty')}",
        "versions": ", ".join(f"{n} {facts.text(f'versions.{n}')}" for n in ("python", "torch", "transformers")),
        "machine": f"{facts.text('device')}, {facts.text('platform')}, threads: {facts.text('threads')}",
        "started": facts.span("started"),
        "data": "; ".join(sorted(facts.values.get("identity.data", ()))) or "not recorded",
        "weights at the start": "; ".join(sorted(facts.values.get("identity.model", ()))) or "not recorded",
    }
    what = "\n".join(f"| {name} | {text if name == 'command' else literal(text)} |" for name, text in rows.items())
    captions = {table.name: table.caption for table in built.each()}
    listed = [f"| `{table}.csv` `.md` `.tex` `.html` | {literal(text)} |" for table, text in captions.items()]
    others = [
        f"| `{path.name}` | {FORMS.get(path.suffix, '')} |" for path in files if path.stem not in (*captions, "cells")
    ]
    forms = ", ".join(f"`{suffix}` {text}" for suffix, text in FORMS.items())
    return f"""# {experiment}

Made from run folders by `make paper EXPERIMENT={experiment}`; not to be edited.

## What was run

| | |
|:--|:--|
{what}

## Main table

{rendering.as_markdown(built.main)}
## Files

| file | what it is |
|:--|:--|
{chr(10).join([*listed, *others])}
| `cells.csv` | every run: which cell it stands in, its folder, what became of it, and its score where that counts |
| `MODEL_CARD.md` | the run set as a Hugging Face model card |

Forms: {forms}.

A cell of a table leads to its runs: in `cells.csv`, those of its task, method and model. `folder` is the run's below \
`paths.runs`: `config.yaml` is what it ran with, `metrics.jsonl` every logged line, `provenance.json` code, versions \
and machine, `result.json` its scores and the sha256 of its final weights.

## To verify

    make verify EXPERIMENT={experiment}

makes the tables again from the runs and compares every byte, checks that no result was edited and that each run is \
named by the hash of its configuration, and trains one run again, which must give the same weights. Without run \
folders it makes again what follows from `cells.csv`.
"""


def _model_card(built, frame, experiment, which, facts, configs) -> str:
    runs = scored(frame, which)
    tasks = origins(frame, configs)
    bases = {model: config.get("model") or {} for (model, _), config in configs.items()}
    columns = [
        name
        for name in frame.columns
        # The held-out part is none of the data set's splits, and its labels may be spoilt.
        if name.startswith(f"{which}.") and name.split(".")[1] != HELD_OUT and runs[name].notna().any()
    ]
    of = "English " if all(task.ours for task in tasks.values()) else ""
    head = {
        "language": "en" if of else "",
        "library_name": "transformers",
        "pipeline_tag": "text-classification",
        "tags": [
            *(["glue"] if any(t.glue for t in tasks.values()) else []),
            "sharpness-aware-minimization",
            *sorted(frame["optimizer"].unique()),
        ],
        "base_model": sorted({base["id"] for base in bases.values() if base.get("id")}),
        "datasets": sorted({task.hub.dataset for task in tasks.values() if task.hub}),
        "metrics": sorted({_hub_metric(name.split(".")[-1]) for name in columns}),
        "model-index": [
            {"name": f"{experiment}: {model}, {method}", "results": _results(own, columns, which, tasks)}
            for (model, method), own in runs.groupby(["model", "method_label"], sort=False)
        ],
    }
    head = {name: value for name, value in head.items() if value}
    header = yaml.safe_dump(head, sort_keys=False, allow_unicode=True, width=120)
    return f"""---
{header}---

# {experiment}: {len(frame)} fine-tuning runs

A set of runs, not one model: {", ".join(frame["model"].unique())} fine-tuned with \
{counted(frame["method_label"].nunique(), "method")} on {", ".join(frame["task"].unique())}, with \
{whole_numbers(frame["seed"].dropna().unique())} as seeds. A result in the header is the mean over a method's finished \
runs. `README.md` says how the numbers came to be and how to verify them.

{rendering.as_markdown(built.main)}
## Models

{chr(10).join(_base(model, base) for model, base in bases.items()) or "- Not recorded."}

No weights lie here. A run with `checkpoint.keep_weights=true` keeps its own in its folder; `result.json` has the \
sha256 of every run's last weights. Weights that are published come under the licence of the model that they start from.

## Training

Method by method, in `hyperparameters.md`. {facts.runs} runs took {frame["train.seconds"].sum() / 3600:.2f} hours of \
training in all, on: {rendering.escape_markdown(facts.text("device"))}.

## Limits

{chr(10).join(f"- {line}" for line in _limits(frame, which, tasks))}

## Use

To compare training methods. The models are trained on single {of}tasks, and nobody looked at how they treat \
people: they are not for decisions about anyone.
"""


def _limits(frame, which, tasks: dict[str, Origin]) -> list[str]:
    lines = [selection_note(frame, which)]
    if made_up := ", ".join(label for label, task in tasks.items() if task.builtin):
        lines.append(f"{made_up}: generated by the project to try its pipeline; scores say nothing about language.")
    if any(task.glue for task in tasks.values()):
        lines.append("Scores are on the development sets of GLUE, not on its test sets.")
    if others := ", ".join(label for label, task in tasks.items() if not task.builtin and not task.glue):
        lines.append(f"{others}: scores are on the splits that these tasks name for evaluation, not on test sets.")
    for label, task in tasks.items():
        if task.noise:
            lines.append(f"{label}: {100 * task.noise:g} % of the training labels were spoilt on purpose, and none of "
                         "those that are scored.")  # fmt: skip
    for limit in ("max_steps", "max_train_examples"):
        wanted = pd.to_numeric(frame.get(PREFIX + limit, pd.Series(index=frame.index, dtype=object)))
        had = frame.get(f"train.{limit.split('_')[-1]}", pd.Series(index=frame.index, dtype=float))
        if short := int((had >= wanted).sum()):
            lines.append(f"{counted(short, 'run')} cut short by train.{limit}.")
    seeds = int(frame.groupby(["model", "task", "method_label"])["seed"].nunique().max())
    lines.append(f"{counted(seeds, 'seed')} a cell at most: small differences may be chance.")
    if frame.get(f"{PREFIX}method", pd.Series(dtype=object)).eq("delta_sam").any():
        lines.append(RECONSTRUCTION)
    if (lost := frame[~frame.index.isin(scored(frame, which).index)]).size:
        lines.append(f"Not in any mean: {_counts(lost)} of {len(frame)} runs.")
    return lines


def _results(runs: pd.DataFrame, columns: list[str], which: str, tasks: dict[str, Origin]) -> list[dict]:
    """The model-index entries of one model and method: by task and split each metric's mean over runs."""
    epoch = {"best": "best epoch", "last": "last epoch"}[which]
    results: dict = {}
    for task, own in runs.groupby("task", sort=False):
        for column in columns:
            _, split, metric = column.split(".", 2)
            if not (values := own[column].dropna()).empty:
                entry = results.setdefault(
                    (task, split),
                    {"task": {"type": "text-classification", "name": task},
                     "dataset": tasks[task].dataset(task, split), "metrics": []},
                )  # fmt: skip
                told = f"{metric}, {epoch}, mean of {counted(len(values), 'run')}"
                entry["metrics"].append({"type": _hub_metric(metric), "value": float(values.mean()), "name": told})
    return list(results.values())


def _hub_metric(name: str) -> str:
    return HUB_METRICS.get(name, name)


def _base(model: str, base: dict) -> str:
    if not base.get("id"):
        return f"- {model}: " + (
            "a local folder; README.md has its fingerprint." if base.get("path") else "trained from random weights."
        )
    copy = " A local folder was read in its place; README.md has its fingerprint." if base.get("path") else ""
    return f"- {model}: [{base['id']}](https://huggingface.co/{base['id']}) at revision {base.get('revision')}.{copy}"


def _command(runs_dir: Path, experiment: str) -> str:
    try:
        return published(split_command(manifest.read(runs_dir, experiment)["command"]))
    except (UserError, KeyError):
        return "not recorded"


def _counts(frame: pd.DataFrame) -> str:
    return ", ".join(f"{count} {status}" for status, count in Counter(frame["status"]).items())
