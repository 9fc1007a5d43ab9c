"""What a command asks for that it would not get: refused in one line before anything runs, or said."""

import json
import re
import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from .config import Config, Launcher
from .errors import UserError
from .task import GLUE_REVISION

if TYPE_CHECKING:
    from .sweeps.planned import Planned


def require_no_sweep(config: Config, swept: Any) -> None:
    """UserError where a file says what to sweep over (`swept`), and neither it nor the command that it is a sweep."""
    asked = any(argument.startswith("hydra.mode=") for argument in sys.argv[1:])
    if swept and not asked:
        raise UserError(
            f"experiment={config.experiment} is a sweep, by its hydra.sweeper.params: add -m, or hydra: "
            "{mode: MULTIRUN} in its file"
        )


def require_of_one(config: Config) -> None:
    """UserError where a run without -m asks for what a sweep alone does: nothing of it is ignored in silence."""
    from .sweeps.sweep import require_clean

    launcher, fresh = config.launcher, config.fresh_seeds
    if launcher.name == "slurm":
        raise UserError("launcher=slurm takes sweeps: add -m")
    for name in ("workers", "devices", "per_device", "minutes", "memory_gb", "retries"):
        if (value := getattr(launcher, name)) != Launcher.model_fields[name].default:
            raise UserError(f"launcher.{name}={str(value).replace(' ', '')} is for sweeps: add -m, also for one run")
    if fresh:
        raise UserError(
            f"fresh_seeds={fresh} come after a sweep: add -m, or say seed=N".replace(", ", ",", len(fresh) - 1)
        )
    if not launcher.plan:
        require_clean([config])


def require_read(configs: list[Config]) -> None:
    """UserError where a setting is given that none of the runs reads, nor those that they start from."""
    from .sweeps.sweep import parents

    first = configs[0]
    for name, source in (("root", "local"), ("revision", "hub")):
        if all(getattr(c.data, name) and c.data.source != source for c in configs):
            raise UserError(
                f"data.{name}={getattr(first.data, name)} is of data={source}, and this is data={first.data.source}: "
                f"add data={source}, or leave it out"
            )
    if (given := first.data.revision) not in (None, GLUE_REVISION):
        hubs = [c.task.hub for c in (*configs, *parents(configs))]
        if all(hub is not None and hub.revision not in (None, given) for hub in hubs):
            raise UserError(
                f"data.revision={given} has no effect: the file of task '{first.task.name}' says its own, under hub:"
            )
    if first.launcher.devices and any(a.lstrip("+").startswith("launcher.workers=") for a in sys.argv[1:]):
        raise UserError(
            f"launcher.workers={first.launcher.workers} is for runs without launcher.devices: on these, "
            "launcher.per_device=N says how many at once on each"
        )
    given = {a.lstrip("+").partition("=")[0] for a in sys.argv[1:]}
    for name in ("id", "revision"):
        value = getattr(first.model, name)
        if value and f"model.{name}" in given and all(c.model.path or c.model.architecture for c in configs):
            instead = f"model.path={first.model.path}" if first.model.path else f"model={first.model.name}"
            raise UserError(
                f"model.{name}={value} is of the hub, and {instead} reads nothing there: leave one of them out"
            )
    if "data.noise_seed" in given and not any(c.data.label_noise or c.data.heldout_noise for c in configs):
        raise UserError("data.noise_seed is of label noise, and there is none: add data.label_noise=, or leave it out")
    if first.launcher.name == "slurm":
        _require_read_in_job(first.launcher, given)
    if first.launcher.measure and not first.launcher.plan:
        raise UserError("launcher.measure=true is of plans: add launcher.plan=true")


def _require_read_in_job(launcher: Launcher, given: set[str]) -> None:
    """The same of what says how many runs go on at once in a job of a cluster."""
    from .sweeps.slurm import asks_for_gpu

    on_gpus = asks_for_gpu(launcher)
    if on_gpus and "launcher.workers" in given:
        raise UserError(
            f"launcher.workers={launcher.workers} is for jobs without GPUs: in this one launcher.per_device=N says how "
            "many runs at once on each"
        )
    if not on_gpus and launcher.per_device != 1:
        raise UserError(
            f"launcher.per_device={launcher.per_device} is a number of runs on each GPU of a job, which has none here: "
            "add launcher.gpus=N, or take launcher.workers=N"
        )


def require_name(config: Config) -> None:
    """UserError where the name of an experiment is one that the lists of sweeps have another use for."""
    from .runs.manifest import CHOSEN, UNNAMED

    name = config.experiment or ""
    if name == UNNAMED:
        raise UserError(f"experiment={name} is what a sweep without a name is called: give the file another name")
    if name.endswith(CHOSEN):
        grid = name.removesuffix(CHOSEN)
        raise UserError(
            f"experiment={name} is what {grid}'s runs with fresh seeds are called: give the file another name"
        )


def say_untaken(jobs: Iterable[dict]) -> None:
    """A note on each default of the model that the command gives and no job takes up: experiments have their own."""
    defaults = ("epochs", "batch_size", "lr", "weight_decay", "rho", "threads", "piece_overhead")
    given = [name for name in defaults if any(a.lstrip("+").startswith(f"model.{name}=") for a in sys.argv[1:])]
    texts = [json.dumps(job, default=str) for job in jobs] if given else []
    for name in given:
        if not any(re.search(rf"\$\{{[^\"]*\bmodel\.{name}\b", text) for text in texts):
            print(f"note: model.{name}= changes nothing here: no setting takes it up, as another says it in its place")


def require_apart(runs: list["Planned"]) -> None:
    """UserError where two runs are one cell of the tables, which would refuse them once all are done."""
    from .runs.identity import hyperparameters

    known: dict[str, Planned] = {}
    for r in runs:
        c = r.config
        cell = [c.task_label, c.model.name, c.optimizer.name, hyperparameters(c), c.seed]
        one = known.setdefault(json.dumps(cell, sort_keys=True), r)
        if one is not r:
            for name, value in vars(c.seeds).items():
                if value != (other := vars(one.config.seeds)[name]):
                    raise UserError(
                        f"seeds.{name} is {other} and {value} for runs of one seed={c.seed}, by which tables tell runs "
                        "apart: sweep over seed, with what shall stay beside it, as seed=1,2,3 seeds.init=0"
                    )
            raise UserError(
                f"{one.title} and {r.identity.id} differ in model or data only, and tables could not tell them apart: "
                "give each a model.name or task.name of its own, in a file or command of its own"
            )


def require_one_sweep(configs: list[Config]) -> None:
    """UserError where what the whole sweep has once is another for some of its runs."""
    first = configs[0]
    for config in configs:
        pairs = [
            ("paths.runs", first.paths.runs, config.paths.runs),
            ("fresh_seeds", first.fresh_seeds, config.fresh_seeds),
        ]
        if config.launcher != first.launcher:
            of_this = config.launcher.model_dump()
            pairs += [(f"launcher.{name}", value, of_this[name]) for name, value in first.launcher.model_dump().items()]
        for name, one, other in pairs:
            if one != other:
                raise UserError(
                    f"{name} is the whole sweep's, and here it is {one} for some runs and {other} for others"
                )
