"""Hands a Hydra multirun to `dsam.sweeps.sweep`. Hydra looks for launchers only in `hydra_plugins`."""

from collections.abc import Sequence
from dataclasses import dataclass

from hydra.core.config_store import ConfigStore
from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher
from omegaconf import DictConfig


@dataclass
class DsamLauncherConf:
    _target_: str = "hydra_plugins.dsam_launcher.launcher.DsamLauncher"


ConfigStore.instance().store(group="hydra/launcher", name="dsam", node=DsamLauncherConf, provider="dsam")


class DsamLauncher(Launcher):
    """All jobs of a sweep are composed and checked first; then they run, each in its own process."""

    def setup(self, *, hydra_context, task_function, config: DictConfig) -> None:
        self.hydra_context, self.config = hydra_context, config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        from dsam.command_line import sweep

        loader = self.hydra_context.config_loader
        sweep([loader.load_sweep_config(self.config, list(overrides)) for overrides in job_overrides])
        return [JobReturn(overrides=list(o), status=JobStatus.COMPLETED) for o in job_overrides]
