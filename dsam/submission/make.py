"""GLUE's submission from finished runs: eleven files of test-set answers, their zip, and which run gave which."""

import argparse
import hashlib
import json
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from ..config import Data, on_device
from ..errors import Parser, UserError, did_you_mean
from ..files import for_json, write_atomically
from ..progress import Stages
from ..task import get_task
from . import choose, formats
from .choose import Run
from .formats import FILES
from .predict import Answered, Prepared, answer, prepare, recognise, score_on_ax


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Raises UserError for what cannot be meant."""
    parser = Parser(prog="submission.py", description=__doc__)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--runs", nargs="+", type=Path, metavar="RUN", help="folders of finished runs; the best per task")
    what.add_argument("--runs-dir", type=Path, metavar="DIR", help="the same, of all runs below this folder")
    what.add_argument("--ax", type=Path, metavar="RUN", help="only score a finished MNLI run on AX, into RUN/ax.json")
    what.add_argument("--check", type=Path, metavar="ZIP", help="only check a zip or a folder")
    told = "for the files, submission.zip and runs.json; with --ax for ax.json [RUN]"
    parser.add_argument("--out", type=Path, metavar="DIR", help=told)
    parser.add_argument("--model", help="with --runs-dir: only runs of this model")
    parser.add_argument("--optimizer", help="with --runs-dir: only runs of this optimizer")
    parser.add_argument(
        "--fill-majority",
        nargs="*",
        metavar="TASK",
        help="answer these tasks with their most frequent label; none named: those that have no run",
    )
    parser.add_argument("--data-root", metavar="DIR", help="GLUE's official files [where the run had its data from]")
    parser.add_argument("--device", help="cpu, cuda, cuda:0 [the run's]")
    options = parser.parse_args(list(arguments))
    if (options.runs or options.runs_dir) and options.out is None:
        raise UserError("--out is not set: give the folder for the files")
    if (options.model or options.optimizer) and not options.runs_dir:
        raise UserError("--model and --optimizer go with --runs-dir")
    if options.fill_majority is not None and not (options.runs or options.runs_dir):
        raise UserError("--fill-majority goes with --runs or --runs-dir")
    if options.check and (idle := [n for n in ("out", "device", "data_root") if getattr(options, n)]):
        raise UserError(f"--{idle[0].replace('_', '-')} has no effect on --check, which only reads the answers")
    for task in options.fill_majority or ():
        if task not in choose.TASKS:
            raise UserError(f"--fill-majority {task}: {did_you_mean(task, choose.TASKS)}")
    return options


def main(arguments: Sequence[str]) -> None:
    """Makes, scores or checks, and says what came of it."""
    options = parse(arguments)
    if options.check:
        print(table(formats.validate(options.check)))
        print(f"{options.check}: as the GLUE server takes it")
    elif options.ax:
        ax(options)
    else:
        make(options)


def make(options: argparse.Namespace) -> None:
    runs, filled = chosen(options)
    runs = {task: place(run, options) for task, run in runs.items()}
    try:
        options.out.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=options.out).close()
    except OSError as error:
        raise UserError(f"cannot write {options.out}: {error.strerror or error}; set --out DIR") from None
    prepared = {task: prepare(run, test_sets(task)) for task, run in runs.items()}
    answered: dict[str, Answered] = {}
    with Stages("test sets", sum(p.examples for p in prepared.values())) as stages:
        # All weights are known to be those of their runs before the first of the long test sets.
        recognised: dict[str, Answered] = {}
        for task, what in prepared.items():
            stages.enter(f"{task}, development")
            recognised[task] = recognise(what, stages.passed)
        for task, what in prepared.items():
            stages.enter(task)
            answered[task] = answer(what, recognised[task], stages.passed)

    contents, sources, origins = {}, {}, {}
    for file in FILES:
        task = file.trained_on
        if task in filled:
            contents[file.name] = [file.constant] * file.rows
            sources[file.name] = {"task": file.task, "rows": file.rows, "constant": file.constant}
            origins[file.name] = f"no run: the constant {file.constant}"
        else:
            predictions = answered[task].predictions[file.task, file.split]
            contents[file.name] = formats.answers(get_task(file.task), predictions)
            sources[file.name] = source(file, prepared[task], answered[task])
            run = runs[task]
            origins[file.name] = f"{run.folder} (seed {run.result['seed']}, development {run.score:.4f})"
    if "mnli" in runs:
        print(ax_line(score_on_ax(prepared["mnli"], answered["mnli"])))
    try:
        archive = formats.write(options.out, contents)
        digest = hashlib.sha256(archive.read_bytes()).hexdigest()
        write_atomically(
            options.out / "runs.json", json.dumps(for_json({"zip_sha256": digest, "files": sources}), indent=1) + "\n"
        )
    except OSError as error:
        raise UserError(f"cannot write {options.out}: {error.strerror or error}; set --out DIR") from None
    print(table(formats.validate(archive), origins))
    if filled:
        print(f"constant answers, which no run gave: {', '.join(filled)}")
    print(archive)


def chosen(options: argparse.Namespace) -> tuple[dict[str, Run], list[str]]:
    """The run of each task, and the tasks that get a constant answer."""
    if options.runs:
        runs = choose.best(choose.read(folder) for folder in options.runs)
    else:
        runs, notes = choose.find(options.runs_dir, options.model, options.optimizer)
        for note in notes:
            print(note)
    if not runs:
        raise UserError(f"no finished GLUE run with kept weights (checkpoint.keep_weights=true) in {options.runs_dir}")
    named = options.fill_majority or []
    runs = {task: runs[task] for task in choose.TASKS if task in runs and task not in named}
    filled = [task for task in choose.TASKS if task not in runs]
    unexpected = [] if options.fill_majority == [] else [task for task in filled if task not in named]
    if unexpected:
        raise UserError(
            f"no finished run with kept weights (checkpoint.keep_weights=true) for {', '.join(unexpected)}: "
            f"give one, or a constant answer by --fill-majority {' '.join(filled)}"
        )
    return runs, filled


def place(run: Run, options: argparse.Namespace) -> Run:
    """The run with data and device of this machine instead of its own, where they are given."""
    config = run.config
    if options.data_root:
        config = config.model_copy(update={"data": Data(source="local", root=options.data_root)})
    return replace(run, config=on_device(config, options.device) if options.device else config)


def test_sets(task: str) -> dict[str, tuple[str, ...]]:
    """What a run of this task answers: splits by task."""
    tasks = {file.task for file in FILES if file.trained_on == task}
    return {name: get_task(name).test for name in sorted(tasks)}


def source(file: formats.File, prepared: Prepared, answered: Answered) -> dict:
    """What runs.json says of a file."""
    run = prepared.run
    found = {
        "task": file.task,
        "rows": file.rows,
        "run": str(run.folder),
        **{name: run.result[name] for name in ("id", "model", "optimizer", "seed", "metric")},
        "development": {"recorded": run.score, "again": answered.development},
        "data": prepared.fingerprints[file.task],
    }
    return found | ({"matthews_correlation": score_on_ax(prepared, answered)} if file.task == "ax" else {})


def ax(options: argparse.Namespace) -> None:
    """Scores one MNLI run on AX."""
    run = place(choose.read(options.ax), options)
    if run.task != "mnli":
        raise UserError(f"{run.folder} is a run of {run.task}: AX takes one of mnli")
    prepared = prepare(run, {"ax": get_task("ax").test})
    if prepared.data["ax"]["test"].labels is None:
        raise UserError("AX's labels are only in diagnostic-full.tsv: put it into diagnostic/ of --data-root DIR")
    with Stages("AX", prepared.examples) as stages:
        answered = answer(prepared, recognise(prepared, stages.passed), stages.passed)
    print(ax_line(score_on_ax(prepared, answered)))
    said = source(next(file for file in FILES if file.task == "ax"), prepared, answered)
    path = (options.out or run.folder) / "ax.json"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps(for_json(said), indent=1) + "\n")
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}; set --out DIR") from None
    print(path)


def ax_line(score: float | None) -> str:
    return "AX: " + ("no labels in the data, no score" if score is None else f"Matthews correlation {score:.4f}")


def table(contents: Mapping[str, Sequence[str]], origins: Mapping[str, str] | None = None) -> str:
    """One line per file: rows, shares of the answers, and where they come from."""
    lines = [("file", "rows", "answers", "from" if origins else "")]
    for file in FILES:
        given = contents[file.name]
        if get_task(file.task).regression:
            scores = [float(score) for score in given]
            shares = f"{min(scores):.3f} to {max(scores):.3f}, mean {sum(scores) / len(scores):.3f}"
        else:
            counts = Counter(given)
            shares = ", ".join(f"{a}: {100 * counts[a] / len(given):.1f} %" for a in get_task(file.task).as_written)
        lines.append((file.name, str(len(given)), shares, (origins or {}).get(file.name, "")))
    widths = [max(len(line[i]) for line in lines) for i in range(3)]
    return "\n".join(
        f"{name:{widths[0]}}  {rows:>{widths[1]}}  {shares:{widths[2]}}  {origin}".rstrip()
        for name, rows, shares, origin in lines
    )
