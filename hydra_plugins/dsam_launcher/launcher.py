"""Hands a Hydra multirun to `dsam.sweeps`. Hydra looks for launchers and sweepers only in `hydra_plugins`."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper
from omegaconf import DictConfig


@dataclass
class DsamLauncherConf:
    _target_: str = "hydra_plugins.dsam_launcher.launcher.DsamLauncher"


@dataclass
class DsamSweeperConf:
    _target_: str = "hydra_plugins.dsam_launcher.launcher.DsamSweeper"
    params: dict[str, Any] | None = None


@dataclass
class OptunaSweeperConf:
    _target_: str = "hydra_plugins.dsam_launcher.launcher.OptunaSweeper"
    params: dict[str, Any] | None = None
    n_trials: Any = 20
    n_jobs: Any = 4
    seed: Any = 0


store = ConfigStore.instance().store
store(group="hydra/launcher", name="dsam", node=DsamLauncherConf, provider="dsam")
store(group="hydra/sweeper", name="dsam", node=DsamSweeperConf, provider="dsam")
store(group="hydra/sweeper", name="optuna", node=OptunaSweeperConf, provider="dsam")


class DsamSweeper(Sweeper):
    """Every combination of the swept values, as Hydra's own sweeper has them, which composes each of them twice."""

    def __init__(self, params: dict[str, Any] | None):
        self.params = params or {}

    def setup(self, *, hydra_context, task_function, config: DictConfig) -> None:
        self.hydra_context = hydra_context
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> list[Sequence[JobReturn]]:
        return [self.launcher.launch(combined(values_of(self.overrides(arguments))), 0)]

    def overrides(self, arguments: list[str]) -> list[Override]:
        """Those of the configuration and of the command line; a later one of the same key takes the earlier's place."""
        parser = OverridesParser.create(config_loader=self.hydra_context.config_loader)
        configured = [f"{k}={'null' if v is None else v}" for k, v in self.params.items()]
        parsed = parser.parse_overrides([*configured, *arguments])
        found: dict[tuple[str, str | None], Override] = {}
        for override in parsed:
            key = override.key_or_group, override.package  # with + or without
            found.pop(key, None)
            found[key] = override
        return list(found.values())


def values_of(overrides: Sequence[Override]) -> list[list[str]]:
    """For each override the settings that it sweeps over, or its one."""
    from dsam.overrides import swept

    return [
        [f"{o.get_key_element()}={value}" for value in swept(o)]
        if o.is_sweep_override()
        else [f"{o.get_key_element()}={o.get_value_element_as_str()}"]
        for o in overrides
    ]


def combined(values: Sequence[Sequence[str]]) -> list[list[str]]:
    return list(map(list, itertools.product(*values)))


class OptunaSweeper(DsamSweeper):
    """Searches what is `interval(…)` or `choice(…)`, in every combination of the other swept values."""

    def __init__(self, params: dict[str, Any] | None, n_trials: Any, n_jobs: Any, seed: Any):
        super().__init__(params)
        self.how = {"trials": n_trials, "at_once": n_jobs, "seed": seed}

    def sweep(self, arguments: list[str]) -> list[Sequence[JobReturn]]:
        from dsam.command_line import one_line_errors, search
        from dsam.sweeps.search import Search, is_searched

        overrides = self.overrides(arguments)
        space = [o for o in overrides if is_searched(o)]
        seeds = [o for o in overrides if o.key_or_group == "seed" and o not in space]
        others = [o for o in overrides if o not in space and o not in seeds]
        with one_line_errors():
            made = Search(
                self.launcher.composed, space, combined(values_of(others)), combined(values_of(seeds)), **self.how
            )
        search(made)
        return []


class DsamLauncher(Launcher):
    """All jobs of a sweep are composed and checked first; then they run, each in its own process."""

    def setup(self, *, hydra_context, task_function, config: DictConfig) -> None:
        self.hydra_context, self.config = hydra_context, config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        from dsam.command_line import sweep

        sweep(self.composed(job_overrides))
        return [JobReturn(overrides=list(o), status=JobStatus.COMPLETED) for o in job_overrides]

    def composed(self, job_overrides: Sequence[Sequence[str]]) -> Iterator[tuple[dict, str | None]]:
        """The configuration of each job, and the name of its experiment."""
        from dsam.sweeps.compose import composed

        return composed(self.hydra_context.config_loader, self.config, job_overrides)
