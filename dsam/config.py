"""One run's configuration: typed settings, what each may be beside it; mistakes are found before work starts."""

import re
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, Union

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from .errors import UserError, did_you_mean
from .kinds import (
    AtLeast0,
    AtLeast1,
    AtOnce,
    Folder,
    Group,
    NotNegative,
    Number,
    Positive,
    Proportion,
    Seed,
    Share,
    Text,
    Whole,
    Yes,
    listed,
    pair,
)
from .mistakes import alternatives, coerced, described
from .task import GLUE, GLUE_REVISION, Task, get_task, shipped
from .text import first_line

CONF = Path(__file__).parent.parent / "conf"
AUTO_OVERHEAD = 64  # what train.piece_overhead=auto comes to on a CPU, and so what it is called

OF_JOBS = {"cpus-per-task": "launcher.cpus", "gpus-per-node": "launcher.gpus", "array": "launcher.jobs_at_once"}
OF_JOBS |= dict.fromkeys(("job-name", "output", "error", "open-mode", "requeue", "no-requeue"), "")
"""What a Slurm job's script sets itself, and would not take from launcher.sbatch -> the setting that says it."""


class Settings(BaseModel):
    """A group of settings: frozen, and without any that is not named here."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class Model(Settings):
    name: Text
    id: Text | None = None
    revision: Text | None = None
    path: Folder | None = None
    architecture: Group | None = None
    # What follows are the model's usual recipe and habits, which `train`, `optimizer` and `device` take up.
    epochs: Whole = 3
    batch_size: Whole = 32
    lr: Number = 2e-5
    weight_decay: Number = 0.01
    rho: Number = 0.05
    threads: Whole | None = None
    piece_overhead: Whole | Literal["auto"] | None = "auto"


class Optimizer(Settings):
    """A method of `dsam.methods.METHODS`, its options, and how many times the usual steps and which share of the usual
    learning rate it takes."""

    name: Text
    method: Text
    steps_factor: AtLeast1 = 1
    lr_factor: Positive = 1.0
    options: Group = {}

    @model_validator(mode="before")
    @classmethod
    def _options(cls, given: Any) -> Any:
        """What is no setting of every method is an option of this one."""
        if not isinstance(given, dict):
            return given
        options = {k: v for k, v in given.items() if k not in cls.model_fields}
        if given.get("options") is not None:
            nested = coerced(given["options"], Group, "optimizer.options")
            for name in options.keys() & nested.keys():
                if options[name] != nested[name]:
                    raise UserError(
                        f"optimizer.{name}={options[name]} and optimizer.options.{name}={nested[name]} contradict each "
                        "other: leave one of the two out"
                    )
            options |= nested
        given = {k: v for k, v in given.items() if k in cls.model_fields} | {"options": options}
        if "method" in given:
            given["options"] = check_method(coerced(given["method"], Text, "optimizer.method"), options)
        return given


class Data(Settings):
    source: Literal["builtin", "local", "hub"]
    root: Folder | None = None
    revision: Text | None = None
    label_noise: Proportion = 0.0
    heldout_noise: Proportion = 0.0
    noise_seed: AtLeast0 = 0

    @property
    def noisy(self) -> bool:
        return self.label_noise > 0 or self.heldout_noise > 0


class Seeds(Settings):
    init: Seed
    data: Seed


class Train(Settings):
    epochs: AtLeast1
    batch_size: AtLeast1
    lr: NotNegative
    weight_decay: NotNegative = 0.01
    warmup_ratio: Share = 0.06
    max_grad_norm: Positive | None = 1.0
    betas: Annotated[tuple[Share, Share], BeforeValidator(pair)] = (0.9, 0.999)
    eps: Positive = 1e-8
    dropout: Share | None = None
    precision: Literal["float32", "bfloat16", "tf32"] = "float32"
    max_length: Annotated[Whole, Field(ge=8)] = 128
    micro_batch_size: AtLeast1 | None = None
    piece_overhead: AtLeast0 | Literal["auto"] | None = None
    padding: Literal["pieces", "free"] = "pieces"
    max_steps: AtLeast1 | None = None
    max_train_examples: AtLeast1 | None = None

    def named(self) -> dict:
        """The settings as they name a run: how a device cuts its batches changes no gradient. `padding` only where it
        is set, so that runs from before it could be keep their names."""
        given = self.model_dump(exclude={"padding"} if self.padding == "pieces" else None)
        return given | ({"piece_overhead": AUTO_OVERHEAD} if self.piece_overhead == "auto" else {})


class Tracking(Settings):
    mode: Literal["offline", "online", "disabled"] = "offline"
    project: Text = "dsam"
    entity: Text | None = None

    @model_validator(mode="after")
    def _project(self) -> "Tracking":
        if not self.project or set(self.project) & set("/\\#?%:"):
            raise UserError(f"tracking.project='{self.project}' must be a name without any of / \\ # ? % :")
        return self


class Device(Settings):
    name: Text = "auto"
    threads: AtOnce | None = None
    deterministic: Yes = False
    graphs: Yes = True

    @model_validator(mode="after")
    def _name(self) -> "Device":
        if not re.fullmatch(r"auto|cpu|cuda(:\d{1,2})?", self.name):
            raise UserError(f"unknown device.name '{self.name}'; use auto, cpu, cuda or cuda:0")
        return self


class Checkpoint(Settings):
    every_seconds: NotNegative = 60
    keep_weights: Yes = False
    keep_at: Annotated[list[Whole], BeforeValidator(listed)] = []

    @model_validator(mode="after")
    def _percents(self) -> "Checkpoint":
        for percent in self.keep_at:
            if not 0 < percent <= 100:
                raise UserError(
                    f"checkpoint.keep_at: {percent} must be above 0 and at most 100 (per cent of the steps)"
                )
        return self


class Paths(Settings):
    runs: Folder = "results/runs"
    cache: Folder = ".cache/dsam"
    tables: Folder = "results/tables"
    figures: Folder = "results/figures"
    records: Folder = "results/records"


class Launcher(Settings):
    name: Literal["local", "slurm"] = "local"
    workers: AtOnce = 1
    devices: Annotated[list[Text], BeforeValidator(listed)] | None = None
    per_device: AtOnce | Literal["auto"] = 1
    minutes: Positive | None = None
    memory_gb: Positive | None = None
    retries: AtLeast0 = 1
    # of Slurm's jobs
    pack: AtLeast1 = 1
    wait: Yes = True
    partition: Text | None = None
    account: Text | None = None
    cpus: AtLeast1 | None = None
    gpus: AtLeast1 | None = None
    job_memory_gb: Positive | None = None
    job_minutes: AtLeast1 = 240
    warning_seconds: AtLeast0 = 90
    jobs_at_once: AtLeast1 = 256
    sbatch: Annotated[list[Text], BeforeValidator(listed)] = []
    setup: Annotated[list[Text], BeforeValidator(listed)] = []
    plan: Yes = False
    measure: Yes = False
    require_clean: Yes = False

    @model_validator(mode="after")
    def _possible(self) -> "Launcher":
        devices = self.devices
        if devices is not None and (
            not devices or len(set(devices)) < len(devices) or not all(map(_is_device, devices))
        ):
            raise UserError(f"launcher.devices={devices} must name different GPUs by number or UUID, e.g. [0,1]")
        if self.per_device == "auto" and self.name == "slurm":
            raise UserError(
                "launcher.per_device=auto is for launcher=local, where all runs are one sweep: say a number"
            )
        for option in self.sbatch:
            if not re.match(r"--[a-z]", option):
                raise UserError(f"launcher.sbatch: '{option}' must be an option like --qos=low")
            if (name := option[2:].partition("=")[0]) in OF_JOBS:
                instead = f"take {OF_JOBS[name]}" if OF_JOBS[name] else "leave it out"
                raise UserError(f"launcher.sbatch: '{option}': the job's script sets --{name} itself: {instead}")
        if self.warning_seconds >= 60 * self.job_minutes:
            raise UserError(f"launcher.warning_seconds={self.warning_seconds} is all of launcher.job_minutes")
        if self.gpus and self.pack < self.in_job:
            raise UserError(
                f"launcher.gpus={self.gpus} and launcher.per_device={self.per_device} have room for {self.in_job} runs "
                f"at once in each job, and launcher.pack={self.pack} gives it fewer: say launcher.pack={self.in_job} "
                "or more"
            )
        return self

    @property
    def in_job(self) -> int:
        """Runs at once in one job of a cluster."""
        return self.gpus * int(self.per_device) if self.gpus else self.workers

    def at_once(self, runs: int) -> int:
        """How many of a sweep's runs go on at once, at most."""
        if self.name != "slurm":
            return len(self.slots)
        return min(self.in_job, self.pack) * min(self.jobs_at_once, -(-runs // self.pack))

    @property
    def slots(self) -> list[str | None]:
        """One entry for each run that may go on at once, to begin with: the device that it gets, None for whatever is
        there."""
        if self.devices:
            each = 1 if self.per_device == "auto" else self.per_device
            return [device for _ in range(each) for device in self.devices]
        return [None] * self.workers


class Config(Settings):
    """A frozen, checked configuration of one run. `Config.load` is the only way in."""

    task: Task
    model: Model
    optimizer: Optimizer
    data: Data
    seed: Whole
    seeds: Seeds
    train: Train
    tracking: Tracking = Tracking()
    device: Device = Device()
    checkpoint: Checkpoint = Checkpoint()
    paths: Paths = Paths()
    launcher: Launcher = Launcher()
    selection: Literal["dev", "heldout"] = "dev"
    fresh_seeds: Annotated[list[Seed], BeforeValidator(listed)] = []
    initialise_from: Text | None = None
    parent: Group | None = None  # the configuration that `initialise_from` comes to, filled in by `load`
    experiment: Text | None = None

    @classmethod
    def load(cls, given: DictConfig | dict, experiment: str | None = None) -> "Config":
        """Resolves, coerces to the declared types and checks a composed configuration.

        With `initialise_from`, the parent is this same configuration with the other task, whose own recipe (an
        interpolation over `task.name`) it takes up. Raises UserError, one line, for anything that cannot be run.
        """
        try:
            plain = OmegaConf.to_container(OmegaConf.create(given), resolve=True, throw_on_missing=True)
        except OmegaConfBaseException as error:
            raise UserError(f"configuration: {first_line(error)}") from None
        assert isinstance(plain, dict)
        for name in ("hydra", "recipe"):
            plain.pop(name, None)
        if isinstance(plain.get("experiment"), dict):
            raise UserError(
                f"experiment={experiment} sets nothing: its file must begin with the line '# @package _global_', "
                "without which its settings are those of a key called experiment"
            )
        plain["experiment"] = experiment or plain.get("experiment")
        if plain.get("initialise_from") and not plain.get("parent"):
            name = str(plain["initialise_from"])
            if name not in shipped():
                raise UserError(
                    f"initialise_from={name}: only the tasks of conf/task/ can be started from; "
                    f"{did_you_mean(name, shipped())}"
                )
            keep: dict[str, Any] = {"checkpoint": {"keep_weights": True}, "initialise_from": None, "fresh_seeds": []}
            other = OmegaConf.merge(OmegaConf.create(given), keep)
            other.task = {"name": name}
            assert isinstance(other, DictConfig)
            plain["parent"] = cls.load(other, experiment).to_dict()
        return cls.resolved(plain)

    @classmethod
    def resolved(cls, plain: dict) -> "Config":
        """The checked configuration of plain values, as `to_dict` gives them: a `${…}` in them is text, which a first
        resolution left as it should. Raises UserError, one line."""
        try:
            return cls.model_validate(plain)
        except ValidationError as error:
            raise UserError(described(error, cls)) from None

    @model_validator(mode="before")
    @classmethod
    def _shipped_task(cls, given: Any) -> Any:
        """A task of which only the name is said, as in records before tasks were configurations, is our own."""
        task = given.get("task") if isinstance(given, dict) else None
        if isinstance(task, dict) and set(task) == {"name"} and isinstance(task["name"], str):
            return given | {"task": get_task(task["name"])}
        return given

    @model_validator(mode="after")
    def _goes_together(self) -> "Config":
        task, model, data = self.task, self.model, self.data
        if self.initialise_from == task.name:
            raise UserError(f"initialise_from={task.name} is the task itself; name another one, or null")
        if not task.train:
            how = "it is evaluated with a model trained on mnli" if task.name == "ax" else "name its split under train:"
            raise UserError(f"task '{task.name}' has no training set: {how}")
        if not (model.path or model.id or model.architecture):
            raise UserError(f"model={model.name} needs model.path=DIR or model.id=NAME with model.revision=HASH")
        if model.architecture and (weights := [f"model.{n}={v}" for n in ("path", "id") if (v := getattr(model, n))]):
            raise UserError(
                f"{weights[0]}: model={model.name} is made from scratch, by model.architecture, and reads no weights: "
                "take model=encoder"
            )
        if model.id and not model.path and not model.revision:
            raise UserError(f"model.id={model.id} needs model.revision=HASH: without it, numbers may change unseen")
        if data.heldout_noise and self.selection != "heldout":
            raise UserError(f"data.heldout_noise={data.heldout_noise:g} needs selection=heldout: nothing is held out")
        if (self.launcher.devices or self.launcher.gpus) and re.fullmatch(r"cuda:0*[1-9]\d*", self.device.name):
            raise UserError(
                f"device.name={self.device.name} with launcher.{'devices' if self.launcher.devices else 'gpus'}: each "
                "run sees one GPU alone, which is cuda:0 there; take device.name=cuda"
            )
        hub = task.hub if data.source == "hub" else None
        # The one that conf/data/hub.yaml names is GLUE's.
        theirs = data.revision if data.revision != GLUE_REVISION or (hub and hub.dataset == GLUE) else None
        if hub and not (hub.revision or theirs):
            raise UserError(
                f"data=hub needs the commit of {hub.dataset}: data.revision=HASH, or revision: HASH under hub: in the "
                f"file of the task '{task.name}'; without it, numbers may change unseen"
            )
        return self

    @model_validator(mode="after")
    def _places(self) -> "Config":
        """Folders: that each can be there, whether it is or not."""
        if self.data.source == "local" and not self.data.root and not self.task.has_own_places:
            raise UserError("data=local needs data.root=DIR, the folder that holds RTE/train.tsv and so on")
        for path, name in (("model.name", self.model.name), ("optimizer.name", self.optimizer.name)):
            if not name or "/" in name or name in (".", "..") or len(name.encode()) > 200:
                raise UserError(f"{path}='{name}' cannot name a folder, which a run's record needs")
        for path, value in (("data.root", self.data.root), ("model.path", self.model.path)):
            if value:
                _exists(path, Path(value))
        for name, value in vars(self.paths).items():
            if not value:
                raise UserError(f"paths.{name} is empty: give a folder")
            folder = Path(value).absolute()
            there = next(p for p in (folder, *folder.parents) if _exists(f"paths.{name}", p))
            if not there.is_dir():
                raise UserError(f"paths.{name}={value}: {there} is not a folder")
        return self

    @property
    def task_label(self) -> str:
        """The task as tables name it: each level of label noise is one of its own."""
        return f"{self.task.name} noise {self.data.label_noise}" if self.data.label_noise else self.task.name

    def to_dict(self) -> dict:
        return self.model_dump()


def on_device(config: Config, name: str) -> Config:
    """The configuration with another `device.name`. UserError for none such."""
    device = config.device.model_dump() | {"name": name}
    return config.model_copy(update={"device": Device(**device)})


def without_tf32(config: Config) -> Config:
    """The configuration in float32 where it asks for TF32: to measure by, not to train, and on any device."""
    if config.train.precision != "tf32":
        return config
    return config.model_copy(update={"train": config.train.model_copy(update={"precision": "float32"})})


# Checks of single settings that need more than their type


def _is_device(name: str) -> bool:
    """As CUDA_VISIBLE_DEVICES takes it."""
    return re.fullmatch(r"\d{1,3}|(GPU|MIG)-[\w/-]+", name) is not None


def _exists(path: str, place: Path) -> bool:
    """Whether there is something in that place. UserError where nothing can be."""
    try:
        return place.expanduser().exists()
    except (OSError, RuntimeError) as error:  # a name too long, no permission; a user that there is not
        raise UserError(f"{path}={place} cannot be used: {getattr(error, 'strerror', None) or error}") from None


KINDS = {int: Whole, float: Number, str: Text, bool: Yes}


def check_method(name: str, options: dict[str, Any]) -> dict[str, Any]:
    """All options of the method, defaults filled in, coerced and tried; UserError names what is wrong."""
    from .methods import METHODS, WEIGHTINGS, option_types, unknown_method  # with torch: `import dsam.config` is light

    if name not in METHODS:
        raise UserError(unknown_method(name))
    weighting = options.get("weighting")
    if weighting is not None and weighting not in tuple(WEIGHTINGS):  # a list has no hash
        raise UserError(f"unknown weighting '{weighting}'; {did_you_mean(weighting, WEIGHTINGS)}")
    known = option_types(name, weighting)
    for key in options:
        if key not in known:
            all_of = "; model.rho= sets it for each method that has one" if key == "rho" else ""
            raise UserError(f"unknown key 'optimizer.{key}' for method '{name}'; {did_you_mean(key, known)}{all_of}")
    values = {k: default for k, (_, default) in known.items()} | options
    values = {k: coerced(v, _kind(known[k][0]), f"optimizer.{k}") for k, v in values.items()}
    try:
        made(name, tuple(sorted(values.items())))
    except ValueError as error:
        raise UserError(f"optimizer: {error}") from None
    return dict(sorted(values.items()))


def _kind(annotation: Any) -> Any:
    """The setting's kind of an option that a constructor annotates, e.g. `int | None`."""
    kinds = [KINDS.get(a, a) for a in alternatives(annotation)]
    return kinds[0] if len(kinds) == 1 else Union[tuple(kinds)]  # noqa: UP007


@cache
def made(name: str, options: tuple[tuple[str, Any], ...]) -> Any:
    """The method with these options, made for a stand-in of any encoder: what its depth or modules do not allow is
    found once the model is known. ValueError for what no model allows."""
    import torch

    from .methods import METHODS

    layers = torch.nn.ModuleList(torch.nn.LayerNorm(1) for _ in range(99))
    return METHODS[name](torch.nn.ModuleDict({"layers": layers}), **dict(options))
