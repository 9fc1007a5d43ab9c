"""Whether tables are what the runs say: made again from the runs, the runs' seals and names checked, some run again."""

import csv
import io
import json
import random
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd
import yaml

from dsam.config import AUTO_OVERHEAD, Config
from dsam.errors import UserError
from dsam.results.collect import COLUMNS, TRAIN, collect
from dsam.results.report import make as report
from dsam.results.report.facts import DONE
from dsam.results.tables import build as tables
from dsam.results.tables.rendering import Table
from dsam.runs import archive, manifest
from dsam.runs.identity import digest, identify
from dsam.runs.record import seal
from dsam.sweeps import sweep
from dsam.text import first_line

Finding = tuple[bool, str]  # whether it is as it should be, and the line that says so
ROW = ("model", "task", "method", "other", "metric", "seed")  # the columns that say which row of a table one is
MACHINE = ("versions", "device", "device_type", "threads", "platform", "host")
NOT_IN_CELLS = ("degenerate", "unlike")  # columns of tables that follow from more than cells.csv has
TOLERANCE = 0.02  # of a score on another machine: rounding differs there, and training lets it grow


@dataclass(frozen=True)
class Again:
    """Which runs are trained again: so many, as `seed` chooses."""

    runs: int
    seed: int
    cache: str
    places: Mapping[str, str] = field(default_factory=dict)
    """data.root and model.path where they are not where the runs found them."""


def check(
    experiment: str, runs_dir: Path, tables_dir: Path, again: Again, records_dir: Path = Path("results/records")
) -> Iterator[Finding]:
    """Every finding about <tables_dir>/<experiment> and the runs behind it.

    Without run folders, those that <records_dir>/<experiment>.zip holds.

    Raises UserError where there is nothing to check.
    """
    folder = tables_dir / experiment
    if not (folder / "cells.csv").is_file():
        raise UserError(f"no tables at '{folder}': run `make paper EXPERIMENT={experiment}` first")
    packed = records_dir / f"{experiment}.zip"
    if not manifest.path_in(runs_dir, experiment).is_file() and packed.is_file():
        with tempfile.TemporaryDirectory() as scratch:
            written = archive.unpack(packed, Path(scratch)).written
            if not manifest.path_in(Path(scratch), experiment).is_file():
                of = ", ".join(manifest.names(Path(scratch))) or "no experiment"
                raise UserError(f"{packed} has the runs of {of}, and not of '{experiment}'")
            yield True, f"no runs of '{experiment}' under '{runs_dir}': the {written} of {packed} are checked"
            yield from check(experiment, Path(scratch), tables_dir, again, records_dir)
        return
    if not manifest.path_in(runs_dir, experiment).is_file():
        yield True, f"no runs of '{experiment}' under '{runs_dir}': only what follows from cells.csv can be checked"
        yield from _from_cells(folder)
        return
    frame = collect(runs_dir, experiment)
    yield from _records(frame, runs_dir)
    yield from _tables(frame, experiment, runs_dir, folder)
    yield from _again(frame, runs_dir, again)


def _records(frame: pd.DataFrame, runs_dir: Path) -> Iterator[Finding]:
    done = frame[frame["status"].isin([*DONE, "damaged"])]
    wrong = 0
    for run in done.itertuples():
        reason = run.reason if run.status == "damaged" else _flaw(runs_dir / run.folder)
        if reason:
            wrong += 1
            yield False, f"{run.folder}: {reason}"
    if not wrong:
        yield True, f"{len(done)} results: none was edited, and each run is named by the hash of its configuration"


def _flaw(folder: Path) -> str | None:
    """What is wrong with a run's record that can be read, or None."""
    try:
        result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
        identity = json.loads((folder / "provenance.json").read_text(encoding="utf-8"))["identity"]
        config = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
        if result.get("result_sha256") != seal(result):
            return "result.json has no seal"
        if not digest(identity) == folder.name == result["id"]:
            return f"is named {folder.name}, and its configuration is that of {digest(identity)}"
        told = {
            "task": config["task"]["name"],
            "method": config["optimizer"]["method"],
            "options": config["optimizer"]["options"],
            **{name: config[name] for name in ("train", "seeds", "selection") if name in config},
        }
        if told["train"].get("piece_overhead") == "auto":
            told["train"] = told["train"] | {"piece_overhead": AUTO_OVERHEAD}  # as it names the run
        if told["train"].get("padding") == "pieces":
            told["train"] = {name: value for name, value in told["train"].items() if name != "padding"}  # likewise
        if config["model"]["id"] and not config["model"]["path"]:
            told["model"] = f"{config['model']['id']}@{config['model']['revision']}"
        told |= {
            name: config["optimizer"][name] for name in ("steps_factor", "lr_factor") if name in config["optimizer"]
        }
        data = config.get("data", {})
        noise = [data.get("label_noise", 0), data.get("heldout_noise", 0), data.get("noise_seed", 0)]
        told["noise"] = noise if any(noise[:2]) else None
        absent = {"lr_factor": 1, "noise": None}  # what a name leaves out
        if bool(config.get("parent")) != bool(identity.get("parent")):
            return f"config.yaml has {'a' if config.get('parent') else 'no'} run that it starts from, unlike its name"
        if data.get("source", identity["data"].split()[0]) != identity["data"].split()[0]:
            return f"config.yaml has data.source {data['source']}, and the run was made with {identity['data']}"
        for name, value in told.items():
            then = identity[name] if name not in absent else identity.get(name, absent[name])
            if value != then:
                return f"config.yaml has {name} {value}, and the run was made with {then}"
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError) as error:
        return f"its record cannot be read: {error!r}"
    return None


def _tables(frame: pd.DataFrame, experiment: str, runs_dir: Path, folder: Path) -> Iterator[Finding]:
    with tempfile.TemporaryDirectory() as scratch:
        made = report.write_tables(tables.build(frame), frame, experiment, runs_dir, Path(scratch))
        names = {path.name: path for path in made}
        wrong = [f"{path.name} does not come from these runs" for path in folder.iterdir() if path.name not in names]
        for name, path in names.items():
            if not (folder / name).is_file():
                wrong.append(f"{name} is missing")
            elif (folder / name).read_bytes() != path.read_bytes():
                wrong.append(first_difference(name, _text(folder / name), _text(path)) or name)
    yield from ((False, f"{folder}: {line}") for line in wrong)
    if not wrong:
        yield True, f"{len(names)} files of {folder} come out again, byte for byte"


def _text(path: Path) -> str:
    return path.read_bytes().decode("utf-8", errors="replace")


def first_difference(name: str, there: str, made: str, columns: list[str] | None = None) -> str | None:
    """A line on where two texts of one file first differ, of a CSV the cell; None where they don't.

    `columns`: look at these of a CSV alone.
    """
    if name.endswith(".csv"):
        old, new = (list(csv.DictReader(io.StringIO(text, newline=""))) for text in (there, made))
        for a, b in zip(old, new, strict=False):
            row = ", ".join(b[key] for key in ROW if b.get(key))
            for column in columns or dict.fromkeys([*b, *a]):
                if a.get(column) != b.get(column):
                    values = [repr(c.get(column)) if column in c else "no such column" for c in (a, b)]
                    return f"{name}, {row}, {column}: {values[0]} there, {values[1]} from the runs"
        if len(old) != len(new):
            return f"{name}: {len(old)} rows there, {len(new)} from the runs"
    else:
        lines = zip([*there.splitlines(), ""], [*made.splitlines(), ""], strict=False)
        for number, (line, again) in enumerate(lines, 1):
            if line != again:
                return f"{name}, line {number}: {line[:200]!r} there, {again[:200]!r} from the runs"
    return None if there == made or columns else f"{name}: not the same bytes"


def _from_cells(folder: Path) -> Iterator[Finding]:
    """The numbers of the tables that follow from the runs' scores: means, spreads, counts, and every comparison."""
    try:
        built = _built_from(folder / "cells.csv")
    except (ValueError, TypeError, KeyError, UserError) as error:
        yield False, f"{folder / 'cells.csv'} cannot be read: {first_line(error)}"
        return
    for table in filter(None, (built.main, built.per_task, built.statistics, built.by_task, built.pairwise)):
        there, made = folder / f"{table.name}.csv", _csv(table)
        # Columns that cells.csv knows nothing of are empty when made from it.
        known = [c for c in table.values if table.values[c].notna().any() and c not in NOT_IN_CELLS]
        if not there.is_file():
            yield False, f"{there} is missing"
        elif line := first_difference(there.name, _text(there), made, known):
            yield False, f"{folder}: {line}"
        else:
            yield True, f"{there}: {len(table.values)} rows × {len(known)} columns come out again from cells.csv"


def _built_from(path: Path) -> tables.Tables:
    text = dict.fromkeys(("model", "task", "method", "id", "folder", "status"), str)  # a task may be called NA, or 1
    empty = {"seed": [""], "score": [""]}
    cells = pd.read_csv(path, dtype=text | {"seed": "Int64"}, keep_default_na=False, na_values=empty)
    frame = cells.rename(columns={"method": "method_label"}).reindex(columns=COLUMNS)
    frame["best"] = frame["last"] = cells["score"]
    frame["optimizer"] = frame["method_label"]
    frame["evaluations"] = [[] for _ in range(len(frame))]
    frame = frame.assign(**{f"train.{name}": float("nan") for name in TRAIN})
    return tables.build(frame)


def _csv(table: Table) -> str:
    return table.values.to_csv(index=False, lineterminator="\n")


def _again(frame: pd.DataFrame, runs_dir: Path, again: Again) -> Iterator[Finding]:
    """Trains some of the finished runs again, in a folder that is thrown away."""
    finished = sorted(frame.loc[frame["status"] == "finished", "folder"])
    chosen = random.Random(again.seed).sample(finished, min(again.runs, len(finished)))
    with tempfile.TemporaryDirectory() as scratch:
        for folder in chosen:
            try:
                config = _same(runs_dir / folder, scratch, again)
                original = json.loads((runs_dir / folder / "provenance.json").read_text(encoding="utf-8"))
                new = identify(config)
            except (UserError, OSError, ValueError, KeyError, TypeError) as error:
                ways = "data.root=DIR and model.path=DIR say where they are here, --rerun 0 leaves that out"
                yield False, f"{folder}: cannot be run again: {error}; {ways}"
                continue
            if new.id != Path(folder).name:
                then, now = original["identity"], new.contents
                other = [f"{n} {then.get(n)}, now {now.get(n)}" for n in now if then.get(n) != now.get(n)]
                yield False, f"{folder}: with this code and data it is another run: {'; '.join(other)[:500]}"
                continue
            failed = sweep.run_all(sweep.plan([config]), config.launcher)
            if failed:
                yield False, f"{folder}: run again, it failed: {failed[0].reason}"
                continue
            yield _compared(runs_dir / folder, new.folder)


def _same(folder: Path, scratch: str, again: Again) -> Config:
    """The configuration of a run, to be run again below `scratch` with as many threads."""
    threads = json.loads((folder / "provenance.json").read_text(encoding="utf-8"))["threads"]

    def moved(given: dict) -> dict:
        for ours in ("launcher", "checkpoint", "experiment"):
            given.pop(ours, None)
        given["tracking"] = {"mode": "disabled"}
        given["device"] = given["device"] | {"threads": threads}
        given["paths"] = {"runs": scratch, "cache": again.cache}
        for place, there in again.places.items():
            group, name = place.split(".")
            if given[group].get(name):
                given[group] = given[group] | {name: there}
        if given.get("parent"):
            given["parent"] = moved(given["parent"]) | {"checkpoint": {"keep_weights": True}}
        return given

    return Config.resolved(moved(yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))))


def _compared(old: Path, new: Path) -> Finding:
    """A finished run and the same run made again."""
    then, now = (json.loads((run / "result.json").read_text(encoding="utf-8")) for run in (old, new))
    made, remade = (json.loads((run / "provenance.json").read_text(encoding="utf-8")) for run in (old, new))
    other = [name for name in MACHINE if made.get(name) != remade.get(name)]
    what = "/".join(old.parts[-4:])
    score, again = (result["best"]["score"] if result["best"] else None for result in (then, now))
    if not other and made["device_type"] == "cpu":
        known = [set(point) for point in then["evaluations"]]  # later code may measure more
        if len(known) == len(now["evaluations"]):
            points = zip(now["evaluations"], known, strict=True)
            now["evaluations"] = [{k: v for k, v in point.items() if k in names} for point, names in points]
        for name in ("weights_sha256", "evaluations"):
            if then[name] != now[name]:
                return False, f"{what}: run again, it has other {name}: score {again}, recorded {score}"
        shown = "none" if again is None else f"{again:.4f}"
        return True, f"{what}: run again, it has the same weights and scores ({shown})"
    why = f"made with another {', '.join(other)}" if other else "made on a GPU"
    fine = score == again or (score is not None and again is not None and abs(score - again) <= TOLERANCE)
    same = "the same bits" if then["weights_sha256"] == now["weights_sha256"] else "other bits, as may be"
    return fine, f"{what}: {why}; run again, {same}: score {again}, recorded {score} (allowed: {TOLERANCE})"
