"""Hands a Hydra multirun to `dsam.sweeps`. Hydra looks for launchers and sweepers only in `hydra_plugins`."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
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


store = ConfigStore.instance().store
store(group="hydra/launcher", name="dsam", node=DsamLauncherConf, provider="dsam")
store(group="hydra/sweeper", name="dsam", node=DsamSweeperConf, provider="dsam")


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
        parser = OverridesParser.create(config_loader=self.hydra_context.config_loader)
        values: dict[str, list[str]] = {}  # a later one of the same key takes the earlier one's place
        for override in parser.parse_overrides([*(f"{k}={v}" for k, v in self.params.items()), *arguments]):
            key = override.get_key_element()
            swept = override.is_sweep_override()
            each = override.sweep_string_iterator() if swept else [override.get_value_element_as_str()]
            values[key] = [f"{key}={value}" for value in each]
        return [self.launcher.launch([list(job) for job in itertools.product(*values.values())], 0)]


class DsamLauncher(Launcher):
    """All jobs of a sweep are composed and checked first; then they run, each in its own process."""

    def setup(self, *, hydra_context, task_function, config: DictConfig) -> None:
        self.hydra_context, self.config = hydra_context, config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        from dsam.command_line import sweep
        from dsam.sweeps.compose import composed

        sweep(composed(self.hydra_context.config_loader, self.config, job_overrides))
        return [JobReturn(overrides=list(o), status=JobStatus.COMPLETED) for o in job_overrides]
