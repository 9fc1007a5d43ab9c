"""Which run answers a task: the one with the best development score, of equals the one with the lowest seed."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from ..config import Config
from ..errors import UserError, did_you_mean
from ..results.collect import collect
from ..runs.kept import read_run
from .formats import FILES

WEIGHTS = "best"
TASKS = tuple(dict.fromkeys(file.trained_on for file in FILES))


@dataclass(frozen=True)
class Run:
    """A finished run with its best weights."""

    folder: Path
    config: Config
    result: dict

    @property
    def task(self) -> str:
        return self.result["task"]

    @property
    def score(self) -> float:
        return self.result["best"]["score"]


def read(folder: Path) -> Run:
    """Raises UserError where the run cannot answer a test set."""
    run = Run(folder, *read_run(folder, WEIGHTS))
    if run.task not in TASKS:
        raise UserError(f"{folder}: task '{run.task}' is none of GLUE's: {', '.join(TASKS)}")
    if run.result["status"] != "finished":
        raise UserError(f"{folder} {run.result['status']} ({run.result['diverged']}): give a run that went to its end")
    if run.result["best"] is None:
        raise UserError(f"{folder} has no development score to be chosen by: give another run")
    return run


def rank(score: float, seed: int, run_id: str) -> tuple:
    """Sorts the best run to the front."""
    return -score, seed, run_id


def best(runs: Iterable[Run]) -> dict[str, Run]:
    """The run of each task."""
    found = {}
    for run in sorted(runs, key=lambda run: rank(run.score, run.result["seed"], run.result["id"])):
        found.setdefault(run.task, run)
    return found


def find(runs_dir: Path, model: str | None, optimizer: str | None) -> tuple[dict[str, Run], list[str]]:
    """The run of each task among the finished ones under `runs_dir` that kept their weights, of this model and
    optimizer where they are given; and a line for each better one that kept none.

    Raises:
        UserError: there is no folder, model or optimizer of that name.
    """
    frame = collect(runs_dir)
    for column, wanted in (("model", model), ("optimizer", optimizer)):
        if wanted is not None:
            known = set(frame[column])
            if wanted not in known:
                hint = did_you_mean(wanted, known) if known else "there are none"
                raise UserError(f"no runs of {column} '{wanted}' under {runs_dir}: {hint}")
            frame = frame[frame[column] == wanted]
    frame = frame[frame["task"].isin(TASKS) & (frame["status"] == "finished") & frame["best"].notna()]
    found, notes = {}, []
    for row in sorted(frame.to_dict("records"), key=lambda row: rank(row["best"], row["seed"], row["id"])):
        folder = runs_dir / row["folder"]
        if row["task"] not in found:
            if (folder / WEIGHTS / "config.json").is_file():
                found[row["task"]] = read(folder)
            else:
                notes.append(f"{folder} has the better score, {row['best']:.4f}, but kept no weights")
    return found, notes
