"""Run folders to one table: a row per run, the expected ones that left no result included."""

import json
import math
import os
from pathlib import Path

import pandas as pd

from dsam.errors import UserError
from dsam.results.tables.labels import method_labels
from dsam.runs import manifest
from dsam.runs.record import seal

COLUMNS = ["id", "task", "model", "optimizer", "method_label", "seed", "status", "metric", "best", "best_epoch", "last",
           "majority", "evaluations", "memorised", "machine", "data", "weights", "noise", "padding", "notes", "reason",
           "folder"]  # fmt: skip
TRAIN = ["steps", "seconds", "seconds_per_step", "examples_per_second", "passes_per_step", "peak_memory_bytes"]
SEVERAL = "several machines"  # one after the other
GIVEN_UP = "train.padding=free: "  # how the note of a run begins whose batches were padded after all
NUMBERS = ["best", "best_epoch", "last", "majority"]


def collect(runs_dir: str | Path, experiment: str | None = None) -> pd.DataFrame:
    """The runs under `runs_dir`, or those that the sweep `experiment` planned: one row each.

    `status` is finished, diverged, failed (it left a failure.json), missing (expected, no result yet) or
    damaged (its result.json cannot be read; `reason` says why). Scores are the recorded fractions, NaN where
    none was recorded.
    `evaluations` holds [step, score, loss] of each, `memorised` [step, `dsam.training.memorised.memorised`] of
    each of a run with label noise, `machine` what it ran on ("several machines" where it went on elsewhere), `data`
    and `weights` the fingerprints of its examples and of what it started from, `noise` which labels were made wrong,
    `padding` whether its batches were padded, `notes` what it did otherwise than was asked, `folder` the path below
    `runs_dir`.
    Further columns: `train.<figure>`, `hyperparameters.<name>` and `best.<split>.<metric>`, `last.<split>.<metric>`.

    `attrs["chosen"]`: the variants that the experiment's settings were chosen from, as `dsam.sweeps.choose` gives them.

    Raises UserError where `runs_dir` or the experiment doesn't exist.
    """
    runs_dir = Path(runs_dir)
    if not runs_dir.is_dir():
        raise UserError(f"no runs at '{runs_dir}': run `make reproduce` first, or name the folder of the runs")
    planned = _planned(runs_dir, experiment)
    folders = list(planned) if experiment else sorted({*planned, *_run_folders(runs_dir)})
    frame = _frame([_described(runs_dir, folder, planned.get(folder)) for folder in folders])
    frame.attrs["chosen"] = Chosen(manifest.read(runs_dir, experiment).get("chosen", []) if experiment else [])
    return frame


class Chosen(list):
    """Shared by all that pandas makes of a frame, which copies `attrs` for each row and column that is taken out of it:
    half of the time that a report took."""

    def __deepcopy__(self, memo) -> "Chosen":
        return self


def _planned(runs_dir: Path, experiment: str | None) -> dict[str, dict]:
    """Folder -> planned run, in the order of the sweep's manifest; of every sweep if none is named."""
    planned: dict[str, dict] = {}
    for name in [experiment] if experiment else manifest.names(runs_dir):
        planned |= {run["folder"]: run for run in manifest.read(runs_dir, name)["runs"]}
    return planned


def _run_folders(runs_dir: Path) -> list[str]:
    """<task>/<model>/<optimizer>/<id> of every run folder on disk."""
    folders = [""]
    for _ in range(4):
        folders = [
            os.path.join(folder, entry.name)
            for folder in folders
            for entry in os.scandir(runs_dir / folder)
            if entry.is_dir() and not entry.name.startswith(".")
        ]
    return folders


def _row(runs_dir: Path, folder: str) -> dict:
    path = os.path.join(runs_dir, folder, "result.json")
    if not os.path.exists(path):
        return _unfinished(runs_dir / folder)
    return read(path) | _origin(os.path.join(runs_dir, folder, "provenance.json"))


def _origin(path: str) -> dict:
    """The processor or GPU that the run ran on, and what its data and weights were, where it is known."""
    try:
        with open(path, encoding="utf-8") as file:
            known = json.load(file)
        machines = {attempt["device"] for attempt in (known, *known.get("earlier", []))}
        identity = known.get("identity", {})
        return {
            "machine": SEVERAL if len(machines) > 1 else known["device"],
            "data": identity.get("data"),
            "weights": identity.get("model"),
            "own_task": "task_settings" in identity,
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def _unfinished(folder: Path) -> dict:
    try:
        failure = json.loads((folder / "failure.json").read_text(encoding="utf-8"))
        return {"status": "failed", "reason": f"{failure['reason']} (log: {failure.get('log')})"}
    except (FileNotFoundError, NotADirectoryError):
        return {"status": "missing", "reason": "not started" if not folder.is_dir() else "no result.json"}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return {"status": "failed", "reason": f"failure.json cannot be read: {error!r}"}


def read(path: str | Path) -> dict:
    """What one result.json says, as the values of a row; status 'damaged' and the reason if it cannot be read."""
    try:
        with open(path, encoding="utf-8") as file:
            result = json.load(file)
        if result.get("result_sha256", seal(result)) != seal(result):
            return {"status": "damaged", "reason": "result.json was edited"}
        row = {name: result[name] for name in ("id", "task", "model", "optimizer", "seed", "status", "metric")}
        row["task"] = result.get("task_label", result["task"])
        row["hyperparameters"] = dict(result["hyperparameters"])
        row["noise"] = str([row["hyperparameters"].get(name) for name in ("noise_seed", "heldout_noise")])
        row["notes"] = [str(note) for note in result.get("notes", [])]
        free = row["hyperparameters"].get("padding") == "free"
        row["padding"] = "none" if free and not any(n.startswith(GIVEN_UP) for n in row["notes"]) else "padded"
        row["majority"] = _number(result.get("majority"))
        row["evaluations"] = [
            [point["step"], _number(point["score"]), _number(point.get("loss"))] for point in result["evaluations"]
        ]
        row["memorised"] = [
            [point["step"], point["memorised"]] for point in result["evaluations"] if "memorised" in point
        ]
        row |= {f"train.{name}": _number(value) for name, value in result["train"].items()}
        for which in ("best", "last"):
            point = result[which] or {}
            row[which] = _number(point.get("score"))
            for split, metrics in point.get("metrics", {}).items():
                row |= {f"{which}.{split}.{name}": _number(value) for name, value in metrics.items()}
        row["best_epoch"] = _number((result["best"] or {}).get("epoch"))
        return row
    except KeyError as error:
        return {"status": "damaged", "reason": f"result.json has no {error}"}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        return {"status": "damaged", "reason": f"result.json cannot be read: {error}"}


def _number(value) -> float | None:
    """A finite number, or None: nothing recorded is never a zero."""
    return value if isinstance(value, (int, float)) and math.isfinite(value) else None


def _described(runs_dir: Path, folder: str, planned: dict | None) -> dict:
    """A run's row. A run that was first made under another seed's name, with the same `seeds`, is the sweep's."""
    own = {"seed": planned["seed"]} if planned and "seed" in planned else {}
    return _expected(folder, planned) | _row(runs_dir, folder) | own


def _expected(folder: str, planned: dict | None) -> dict:
    """What is known of a run before its result: its place, and its line in the sweep's manifest."""
    place = dict(zip(("task", "model", "optimizer", "id"), Path(folder).parts, strict=False))
    plan = {name: value for name, value in (planned or {}).items() if name in (*place, "seed", "hyperparameters")}
    label = {"task": planned["task_label"]} if planned and "task_label" in planned else {}
    empty: dict = {"hyperparameters": {}, "evaluations": [], "memorised": [], "notes": []}
    return empty | {"folder": folder} | place | plan | label


def _frame(rows: list[dict]) -> pd.DataFrame:
    for row, label in zip(rows, method_labels(rows), strict=True):
        row["method_label"] = label
        row |= {f"hyperparameters.{name}": value for name, value in row.pop("hyperparameters").items()}
    frame = pd.DataFrame(rows)
    columns = COLUMNS + [f"train.{name}" for name in TRAIN]
    further = [name for name in frame.columns if name not in columns]
    frame = frame.reindex(columns=columns + sorted(further))
    measured = [name for name in frame.columns if name.startswith(("train.", "best.", "last."))]
    frame[NUMBERS + measured] = frame[NUMBERS + measured].astype("float64")
    frame["seed"] = frame["seed"].astype("Int64")
    return frame
