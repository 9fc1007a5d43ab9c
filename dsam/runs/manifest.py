"""The list of a sweep's runs, `<runs>/.sweeps/<name>.json`: it tells tables what is missing and where each run lies."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..config import Config
from ..errors import UserError, did_you_mean
from ..files import write_atomically
from .identity import Identity, hyperparameters

FOLDER = ".sweeps"
CHOSEN = "_chosen"  # what follows the name of a sweep in that of its runs with fresh seeds
UNNAMED = "sweep"  # of no experiment


def path_in(runs_dir: Path, name: str) -> Path:
    return runs_dir / FOLDER / f"{name}.json"


def configurations_of(arguments: Sequence[str]) -> list[str]:
    """The arguments with the experiment, if any, whose file the sweep that they name came from."""
    own = [a.removesuffix(CHOSEN) if a.startswith("experiment=") else a for a in arguments]
    return [a for a in own if a not in (f"experiment={UNNAMED}", "experiment=null")]


def names(runs_dir: Path) -> list[str]:
    """The sweeps that were started under `runs_dir`."""
    return sorted(path.stem for path in (runs_dir / FOLDER).glob("*.json"))


def read(runs_dir: Path, name: str) -> dict[str, Any]:
    """The manifest: experiment, command, chosen, and `runs` with id, task, model, optimizer, seed, folder,
    hyperparameters of each. UserError where there is no such sweep, or its manifest cannot be read."""
    path = path_in(runs_dir, name)
    try:
        return parsed(path.read_bytes())
    except FileNotFoundError:
        known = names(runs_dir)
        hint = did_you_mean(name, known) if known else "no sweep was started here"
        raise UserError(f"no sweep '{name}' under '{runs_dir}': {hint}") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} cannot be read ({error!r}): start the sweep again") from None


def require_unpacked(runs_dir: Path, records_dir: Path, name: str) -> None:
    """UserError where the sweep is not here, but its runs are in a file of records."""
    packed = records_dir / f"{name}.zip"
    if packed.is_file() and not path_in(runs_dir, name).exists():
        raise UserError(
            f"the runs of {name} are not under '{runs_dir}', but packed in {packed}: "
            f"records.py unpack experiment={name} (or make unpack EXPERIMENT={name}) makes them run folders"
        )


def chosen_from(runs_dir: Path, name: str) -> str | None:
    """The name of the sweep with fresh seeds that came of this one, as it is there now; None where there is none, or
    it came of other runs, as of an earlier sweep of that name."""
    again = f"{name}{CHOSEN}"
    if not path_in(runs_dir, again).exists():
        return None
    grid = read(runs_dir, again).get("chosen_of")  # of no manifest from before there was one
    there = {run["id"] for run in read(runs_dir, name)["runs"]} if grid else set()
    return again if not grid or set(grid) == there else None


def forget(runs_dir: Path, name: str) -> bool:
    """Takes the sweep's manifest away, and says whether there was one; its runs stay."""
    path = path_in(runs_dir, name)
    there = path.is_file()
    path.unlink(missing_ok=True)
    return there


def parsed(contents: bytes) -> dict[str, Any]:
    """Raises ValueError, KeyError or TypeError where `contents` is no manifest."""
    manifest = json.loads(contents)
    for run in manifest["runs"]:
        run["folder"]
    return manifest


def write(
    configs: Sequence[Config],
    identities: Sequence[Identity],
    name: str,
    command: str,
    chosen: Sequence[dict] = (),
    chosen_of: Sequence[str] = (),
) -> Path:
    """Writes the manifest of these runs.

    Args:
        chosen: the rows of `dsam.sweeps.choose`, where the runs' settings were chosen by another sweep.
        chosen_of: the ids of that sweep's runs.
    """
    root = Path(configs[0].paths.runs)
    contents = {
        "experiment": name,
        "command": command,
        "chosen": list(chosen),
        "chosen_of": sorted(chosen_of),
        "runs": [
            {
                "id": identity.id,
                "task": config.task.name,
                "task_label": config.task_label,
                "model": config.model.name,
                "optimizer": config.optimizer.name,
                "seed": config.seed,
                "folder": str(identity.folder.relative_to(root)),
                "hyperparameters": hyperparameters(config),
            }
            for config, identity in zip(configs, identities, strict=True)
        ],
    }
    path = path_in(root, name)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps(contents, indent=1))
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}; set paths.runs=DIR") from None
    return path
