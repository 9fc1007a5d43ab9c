"""Weights & Biases mirrors metrics.jsonl; it can neither stop nor fail a run."""

import functools
import sys
from pathlib import Path

from ..config import Config, first_line


class Tracker:
    """One W&B run with the run's own id; a context manager that finishes it on every way out.

    With tracking=disabled, and after the first error of wandb, it does nothing.
    """

    def __init__(self, config: Config, run_id: str, folder: Path, identity: dict):
        self.config, self.id, self.folder, self.identity = config, run_id, folder, identity
        self.run = None

    def __enter__(self) -> "Tracker":
        if self.config.tracking.mode != "disabled":
            self._start()
        return self

    def __exit__(self, kind, error, trace) -> None:
        if self.run is not None:
            self._finish(1 if kind is not None else 0)

    def log(self, record: dict) -> None:
        """One line of metrics.jsonl: nested metrics become names with slashes."""
        if self.run is not None:
            self._log({k: v for k, v in flat(record).items() if k != "event"})

    def summary(self, values: dict) -> None:
        if self.run is not None:
            self._summary(flat(values))

    def _guarded(method):
        @functools.wraps(method)
        def call(self, *arguments):
            try:
                return method(self, *arguments)
            except Exception as error:  # whatever wandb raises: the run's own record is complete without it
                self.run = None
                print(f"W&B: {type(error).__name__}: {first_line(error)}; the run goes on without it", file=sys.stderr)

        return call

    @_guarded
    def _start(self) -> None:
        import wandb

        tracking = self.config.tracking
        self.run = wandb.init(
            project=tracking.project,
            entity=tracking.entity,
            id=self.id,
            name=f"{self.config.task.name}-{self.config.model.name}-{self.config.optimizer.name}-{self.config.seed}",
            group=self.config.experiment,
            job_type=self.config.optimizer.name,
            config=self.config.to_dict() | {"identity": self.identity},
            dir=str(self.folder),
            mode=tracking.mode,
            resume="allow",
            settings=wandb.Settings(
                silent=True, console="off", disable_git=True, save_code=False, x_disable_stats=True, init_timeout=30
            ),
        )
        self.run.define_metric("step")
        self.run.define_metric("*", step_metric="step")

    @_guarded
    def _log(self, values: dict) -> None:
        self.run.log(values)

    @_guarded
    def _summary(self, values: dict) -> None:
        self.run.summary.update(values)

    @_guarded
    def _finish(self, exit_code: int) -> None:
        self.run.finish(exit_code=exit_code)


def flat(values: dict, prefix: str = "") -> dict:
    """Nested dictionaries as one, with slashes in the names; lists are left out."""
    found = {}
    for key, value in values.items():
        if isinstance(value, dict):
            found |= flat(value, f"{prefix}{key}/")
        elif not isinstance(value, list | tuple):
            found[f"{prefix}{key}"] = value
    return found
