"""A run's files as one W&B run, whatever became of wandb's own folders: what `make wandb-sync` uploads."""

import argparse
import hashlib
import json
import os
import shutil
import socket
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import yaml

from ..config import CONF
from ..errors import Parser, UserError
from ..files import write_atomically
from ..overrides import check, compose_config, own_folder
from ..text import counted, first_line
from . import manifest
from .record import Record
from .tracking import Mirror, Mode, connect

PATIENCE = 60.0  # seconds for W&B to answer, and for one run to be written or uploaded
SYNCED = "wandb-sync.json"  # in the run folder: what was uploaded, and where to


class Damaged(Exception):
    """A run folder that cannot be exported; one line."""


class Unreachable(Exception):
    """W&B does not answer, does not let us in, or does not take this run."""


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Raises UserError for what cannot be meant."""
    parser = Parser(
        prog="export_wandb.py",
        description=__doc__,
        epilog="Without experiment= and without folders: every run below paths.runs.",
    )
    parser.add_argument("chosen", nargs="*", help="run folders, experiment=NAME, paths.runs=DIR")
    parser.add_argument("--config-dir", metavar="DIR", help="a folder of your own configurations")
    parser.add_argument("--mode", choices=("offline", "online"), default="offline", help="online: upload [offline]")
    parser.add_argument(
        "--into", type=Path, help="where to write DIR/wandb/offline-run-* [the folder above paths.runs]"
    )
    return parser.parse_intermixed_args(list(arguments))


def main(arguments: Sequence[str]) -> None:
    """Exports the chosen runs, a line each. Leaves with status 1 where one failed or W&B cannot be reached."""
    options = parse(arguments)
    folders, runs = choose(options.chosen, own_folder(options.config_dir))
    into = options.into or (runs.parent if options.mode == "offline" else None)
    server = connect(options.mode)
    failed, done, same, refused = [], 0, 0, 0
    first: dict[str, Path] = {}
    for i, folder in enumerate(folders, 1):
        start = f"{i}/{len(folders)} {folder}:"
        if (before := first.setdefault(folder.name, folder)) is not folder:  # one id, and so one run at W&B
            print(f"{start} the same settings by other names as {before}, which stands for both", flush=True)
            same += 1
            continue
        try:
            run = read(folder)
            if options.mode == "online" and uploaded(run, server):
                print(f"{start} uploaded before, unchanged", flush=True)
                same += 1
                continue
            written = export(run, options.mode, into)
            if options.mode == "online":
                remember(run, server)
            print(f"{start} {len(run.lines)} lines {'to ' + str(written) if written else 'uploaded'}", flush=True)
            done, refused = done + 1, 0
        except Unreachable as error:
            refused += 1
            if refused > 1 or not answers(server):  # else it may be this run alone, as one that was deleted there
                print(
                    f"error: W&B at {server}: {error}; {counted(done, 'run')} uploaded, the same command goes on",
                    file=sys.stderr,
                )
                raise SystemExit(1) from None
            failed.append(f"failed: {folder}: W&B refuses it: {error}")
            print(f"{start} failed", flush=True)
        except Damaged as error:
            failed.append(f"failed: {folder}: {error}")
            print(f"{start} failed", flush=True)
    print(f"{counted(len(folders), 'run')}: {done} exported, {same} unchanged, {len(failed)} failed")
    for reason in failed:
        print(reason, file=sys.stderr)
    if failed:
        raise SystemExit(1)


def choose(given: Sequence[str], more: Path | None = None) -> tuple[list[Path], Path]:
    """The run folders that `given` names, and paths.runs. Raises UserError where there are none."""
    settings = [text for text in given if "=" in text and not Path(text).is_dir()]
    paths = [Path(text) for text in given if text not in settings]
    names = [s.split("=", 1)[1] for s in settings if s.startswith("experiment=")]
    wanted = check(manifest.configurations_of(settings), CONF, more)
    for setting in wanted:
        if not setting.startswith(("experiment=", "paths.")):
            raise UserError(
                f"{setting} has no effect on runs that are there: name them by experiment=NAME, paths.runs=DIR or "
                "their folders; WANDB_ENTITY is whose they become, where they name nobody"
            )
    places = compose_config(wanted, CONF, more=more).paths
    runs, records = (Path(os.path.expanduser(place)) for place in (places.runs, places.records))
    if paths:
        if names:
            raise UserError(f"give either run folders or experiment={names[-1]}, not both")
        for path in paths:
            if not (path / "config.yaml").is_file():
                raise UserError(f"'{path}' is no run folder: it has no config.yaml")
        return list({path.resolve(): path for path in paths}.values()), runs
    if names:
        manifest.require_unpacked(runs, records, names[-1])
        planned = [runs / run["folder"] for run in manifest.read(runs, names[-1])["runs"]]
        folders = [folder for folder in planned if (folder / "config.yaml").is_file()]
        if len(folders) < len(planned):
            print(f"{len(planned) - len(folders)} of {len(planned)} runs of {names[-1]} were never started")
    else:
        folders = sorted(path.parent for path in runs.glob("*/*/*/*/config.yaml"))
    if not folders:
        raise UserError(f"no runs at '{runs}': run `make reproduce` first, or name the folder of the runs")
    return folders, runs


@dataclass
class Run:
    """What the files of one run say."""

    folder: Path
    config: dict
    identity: dict
    lines: list[dict]
    result: dict | None  # None: not finished
    digest: str


def read(folder: Path) -> Run:
    """Raises Damaged where a file is not what a run writes; a last line cut short by a kill is none yet."""
    folder = folder.resolve()
    try:
        config = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
        [config[group]["name"] for group in ("task", "model", "optimizer")]
        config["seed"], config["experiment"], config["tracking"]["project"], config["tracking"]["entity"]
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError) as error:
        raise Damaged(f"config.yaml cannot be read ({type(error).__name__}: {first_line(error)})") from None
    try:
        identity = json.loads((folder / "provenance.json").read_text(encoding="utf-8"))["identity"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise Damaged(f"provenance.json cannot be read ({type(error).__name__}: {first_line(error)})") from None
    result = Record(folder).result(set_aside=False)
    if result is None and (folder / "result.json").exists():
        raise Damaged("result.json is damaged, edited or not this run's")
    try:  # after the result: where there is one, all lines are there
        text = (folder / "metrics.jsonl").read_bytes()
    except FileNotFoundError:
        text = b""
    lines = []
    for number, line in enumerate(text[: text.rfind(b"\n") + 1].splitlines(), 1):
        try:
            lines.append(dict(json.loads(line)))
        except (ValueError, TypeError):
            raise Damaged(f"line {number} of metrics.jsonl cannot be read") from None
    digest = hashlib.sha256(text + json.dumps(result, sort_keys=True).encode()).hexdigest()
    return Run(folder, config, identity, lines, result, digest)


def export(run: Run, mode: Mode, into: Path | None) -> Path | None:
    """Writes `run` as one W&B run, or uploads it. Returns its folder below `into`, which takes an older one's place.

    Raises Unreachable where W&B cannot be reached, Damaged where wandb fails at this run.
    """
    try:
        if into:
            (into / "wandb").mkdir(parents=True, exist_ok=True)
        # Aside first: a stop half way leaves no half of a run, and the notes that wandb writes beside it are dropped.
        with tempfile.TemporaryDirectory(prefix=".export-", dir=into) as scratch:
            try:
                mirror = Mirror(run.config, run.folder.name, run.identity, Path(scratch), mode, PATIENCE, False)
            except Exception as error:
                if mode == "offline":
                    raise
                raise Unreachable(first_line(error)) from None
            for number, line in enumerate(run.lines):
                mirror.log(number, line)
            if run.result:
                mirror.summary(run.result)
            mirror.finish(0 if run.result else 1)
            (written,) = Path(scratch).glob(f"wandb/*run-*-{mirror.run.id}")
            reason = refusal(written)
            if reason:
                raise Damaged(reason)
            if not into:
                return None
            for old in (into / "wandb").glob(f"*run-*-{mirror.run.id}"):
                shutil.rmtree(old)
            return Path(shutil.move(written, into / "wandb"))
    except (Damaged, Unreachable):
        raise
    except TimeoutError as error:
        raise Unreachable(first_line(error)) from None
    except OSError as error:
        raise UserError(f"cannot write below {into or tempfile.gettempdir()}: {error.strerror or error}") from None
    except Exception as error:  # whatever wandb raises at one run does not keep the others from W&B
        raise Damaged(f"{type(error).__name__}: {first_line(error)}") from None


def answers(server: str) -> bool:
    """Whether something listens where W&B should."""
    place = urlsplit(server)
    try:
        port = place.port or {"http": 80}.get(place.scheme, 443)
        socket.create_connection((place.hostname or "", port), timeout=PATIENCE).close()
    except (OSError, ValueError):
        return False
    return True


def refusal(written: Path) -> str | None:
    """Why W&B stopped taking a run's lines, if it did: wandb says so in its log alone, and ends as if all were well."""
    log = written / "logs" / "debug-internal.log"
    for line in log.read_text(encoding="utf-8").splitlines() if log.exists() else []:
        if "filestream: fatal error" in line:
            return json.loads(line)["msg"]
    return None


def upload(run: Run, server: str) -> dict:
    """What SYNCED holds after the upload."""
    tracking = run.config["tracking"]
    owner = tracking["entity"] or os.environ.get("WANDB_ENTITY")
    place = {"entity": tracking["entity"], "project": tracking["project"], "owner": owner}
    return {"digest": run.digest, "server": server, **place}


def uploaded(run: Run, server: str) -> bool:
    now = upload(run, server)
    before = {name: value for name, value in now.items() if name != "owner"}  # as earlier versions noted it
    try:
        return json.loads((run.folder / SYNCED).read_text(encoding="utf-8")) in (now, before)
    except (OSError, ValueError):
        return False


def remember(run: Run, server: str) -> None:
    try:
        write_atomically(run.folder / SYNCED, json.dumps(upload(run, server), indent=1) + "\n")
    except OSError as error:
        print(f"{run.folder / SYNCED} could not be written ({error.strerror}): the run will be uploaded again")
