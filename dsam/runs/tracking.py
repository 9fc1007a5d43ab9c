"""Weights & Biases mirrors metrics.jsonl; it can neither stop, slow nor fail a run."""

import functools
import os
import queue
import re
import sys
import threading
from pathlib import Path
from typing import Literal

from ..config import Config
from ..errors import UserError
from ..files import for_json
from ..text import first_line

Mode = Literal["online", "offline", "disabled"]

# Seconds that a run gives W&B to answer, and again at its end to take what is left. Offline nothing can hang: only a
# busy machine makes wandb slow.
PATIENCE = {"online": 8.0, "offline": 60.0}


# What the environment says of who one is and where the server stands. All else that wandb reads there would change what
# a run is called or where its files lie (WANDB_SWEEP_ID, WANDB_RUN_ID, WANDB_PROJECT, WANDB_DIR, …), which is ours.
THEIRS = re.compile(
    "WANDB_(API_KEY|BASE_URL|APP_URL|ENTITY|IDENTITY_TOKEN_FILE|CREDENTIALS_FILE|CACHE_DIR|CONFIG_DIR|DATA_DIR|"
    "ERROR_REPORTING|HTTP_TIMEOUT|X_EXTRA_HTTP_HEADERS|_EXTRA_HTTP_HEADERS|INSECURE_DISABLE_SSL|HTTPS?_PROXY|DEBUG)"
)


@functools.cache
def forget_others() -> None:
    """Takes the variables that are not `THEIRS` out of this process's environment, and says so; once, since wandb sets
    some of its own there."""
    others = sorted(name for name in os.environ if name.startswith("WANDB_") and not THEIRS.fullmatch(name))
    for name in others:
        del os.environ[name]
    if others:
        print(f"W&B: not used, since a run's id, name and place are its own: {', '.join(others)}", file=sys.stderr)


def connect(mode: Mode) -> str:
    """Sets wandb up and returns its server's address; asks nothing. UserError where mode=online has no login."""
    forget_others()
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # to an unreachable server it delays the exit
    import wandb

    settings = wandb.setup(wandb.Settings(silent=True, mode=mode)).settings
    if mode == "online" and not wandb.login(prompt=False, verify=False):  # wandb.init would ask, and wait
        raise UserError("no login to W&B: run `wandb login` or set WANDB_API_KEY")
    return settings.base_url


class Mirror:
    """One W&B run with a run's own id: how the lines and the result of a run look to W&B.

    W&B's own step is the number of the line in metrics.jsonl.

    Args:
        goes_on: W&B has lines of this run that are not logged again: it keeps them, and drops a step that it has, so
            that each is there once. Otherwise the lines begin with number 0, and take the place of what an earlier
            attempt under the same id left there.

    Raises UserError without a login, wandb's own errors where W&B cannot be reached, TimeoutError from `finish`.
    """

    def __init__(self, config: dict, run_id: str, identity: dict, folder: Path, mode: Mode, patience: float,
                 goes_on: bool):  # fmt: skip
        import wandb

        connect(mode)
        tracking = config["tracking"]
        names = [config[group]["name"] for group in ("task", "model", "optimizer")]
        self.run = wandb.init(
            project=tracking["project"],
            entity=tracking["entity"],
            id=run_id,
            name="-".join([*names, str(config["seed"])]),
            group=config["experiment"],
            job_type=config["optimizer"]["name"],
            config=for_json(config) | {"identity": identity},
            dir=str(folder),
            mode=mode,
            resume="allow" if goes_on else None,
            reinit="create_new",
            settings=wandb.Settings(
                silent=True,
                console="off",
                disable_git=True,
                save_code=False,
                x_disable_stats=True,
                init_timeout=min(patience, 20) if mode == "online" else patience,
                finish_timeout=patience,
                finish_timeout_raises=True,
                x_graphql_retry_max=2,  # by default it tries for minutes
                x_graphql_retry_wait_min_seconds=0.2,
                x_graphql_retry_wait_max_seconds=1,
            ),
        )
        self.run.define_metric("step")
        self.run.define_metric("*", step_metric="step")

    def log(self, number: int, line: dict) -> None:
        """Line `number`, from 0, of metrics.jsonl: nested metrics become names with slashes, and an evaluation's loss
        evaluation/loss, since `loss` is the training's."""
        names = {"loss": "evaluation/loss"} if line.get("event") == "evaluation" else {}
        values = {names.get(k, k): v for k, v in flat(for_json(line)).items() if k != "event"}
        self.run.log(values, step=number, commit=True)

    def summary(self, result: dict) -> None:
        self.run.summary.update(flat(for_json(result)))

    def finish(self, exit_code: int) -> None:
        self.run.finish(exit_code=exit_code)


class Tracker:
    """Mirrors a run while it runs; a context manager that finishes on every way out.

    All of W&B is in a thread of its own, so that the run never waits for it, but for PATIENCE at its end. With
    tracking=disabled, and after the first error, it does nothing.
    """

    def __init__(self, config: Config, run_id: str, folder: Path, identity: dict):
        self.config, self.id, self.folder, self.identity = config, run_id, Path(folder), identity
        self.calls: queue.SimpleQueue = queue.SimpleQueue()
        self.thread = threading.Thread(target=self._work, name="W&B", daemon=True)
        self.number: int | None = None

    def __enter__(self) -> "Tracker":
        if self.config.tracking.mode != "disabled":
            self.thread.start()
        return self

    def __exit__(self, kind, error, trace) -> None:
        self._call("finish", 1 if kind is not None else 0)
        if self.thread.is_alive():
            self.thread.join(PATIENCE[self.config.tracking.mode] + 1)
            if self.thread.is_alive():
                self._without("no answer")

    def log(self, line: dict) -> None:
        """A line that is the last of metrics.jsonl."""
        if self.thread.is_alive():
            # Counted once: a resumed run goes on after the lines that it has kept.
            self.number = self._last_line() if self.number is None else self.number + 1
            self._call("log", self.number, line)

    def summary(self, result: dict) -> None:
        self._call("summary", result)

    def _call(self, name: str, *arguments) -> None:
        if self.thread.is_alive():
            self.calls.put((name, arguments))

    def _last_line(self) -> int:
        try:
            return max(0, (self.folder / "metrics.jsonl").read_bytes().count(b"\n") - 1)
        except OSError:
            return 0

    def _work(self) -> None:
        try:
            mode = self.config.tracking.mode
            name, arguments = self.calls.get()  # begun with its first line, whose number says whether it goes on
            goes_on = not (name == "log" and arguments[0] == 0)
            mirror = Mirror(self.config.to_dict(), self.id, self.identity, self.folder, mode, PATIENCE[mode], goes_on)
            getattr(mirror, name)(*arguments)
            while name != "finish":
                name, arguments = self.calls.get()
                getattr(mirror, name)(*arguments)
        except UserError as error:
            self._without(str(error))
        except Exception as error:  # whatever wandb raises: the run's own record is complete without it
            self._without(f"{type(error).__name__}: {first_line(error)}")

    def _without(self, reason: str) -> None:
        print(f"W&B: {reason}; the run goes on without it (`make wandb-sync` uploads it later)", file=sys.stderr)


def flat(values: dict, prefix: str = "") -> dict:
    """Nested dictionaries as one, with slashes in the names; lists are left out."""
    found: dict = {}
    for key, value in values.items():
        if isinstance(value, dict):
            found |= flat(value, f"{prefix}{key}/")
        elif not isinstance(value, list | tuple):
            found[f"{prefix}{key}"] = value
    return found
