"""One run's configuration as dataclasses; every mistake in it is found here, before work starts."""

import dataclasses
import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from .errors import UserError, did_you_mean
from .text import first_line

CONF = Path(__file__).parent.parent / "conf"
CONTROL = re.compile(r"[\x00-\x1f\x7f\ud800-\udfff]")  # what no name or path needs and files break on
LARGEST = 3.4e38  # of float32
MOST_AT_ONCE = 1024  # threads, or runs: more is a slip of the keyboard


@dataclass
class Task:
    name: str


@dataclass
class Model:
    name: str
    id: str | None = None
    revision: str | None = None
    path: str | None = None
    architecture: dict[str, Any] | None = None
    # What follows are the model's usual recipe and habits, which `train`, `optimizer` and `device` take up.
    epochs: int = 3
    batch_size: int = 32
    lr: float = 2e-5
    weight_decay: float = 0.01
    rho: float = 0.05
    threads: int | None = None
    piece_overhead: int | None = None


@dataclass
class Optimizer:
    """A method of `dsam.methods.METHODS`, its options, and how many times the usual steps it takes."""

    name: str
    method: str
    steps_factor: int = 1
    options: dict[str, Any] = field(default_factory=dict)


@dataclass
class Data:
    source: str
    root: str | None = None
    revision: str | None = None


@dataclass
class Seeds:
    init: int
    data: int


@dataclass
class Train:
    epochs: int
    batch_size: int
    lr: float
    weight_decay: float = 0.01
    warmup_ratio: float = 0.06
    max_grad_norm: float | None = 1.0
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    dropout: float | None = None
    precision: str = "float32"
    max_length: int = 128
    micro_batch_size: int | None = None
    piece_overhead: int | None = None
    max_steps: int | None = None
    max_train_examples: int | None = None


@dataclass
class Tracking:
    mode: str = "offline"
    project: str = "dsam"
    entity: str | None = None


@dataclass
class Device:
    name: str = "auto"
    threads: int | None = None


@dataclass
class Checkpoint:
    every_seconds: float = 60
    keep_weights: bool = False
    keep_at: list[int] = field(default_factory=list)


@dataclass
class Paths:
    runs: str = "results/runs"
    cache: str = ".cache/dsam"
    tables: str = "results/tables"
    figures: str = "results/figures"
    records: str = "results/records"


@dataclass
class Launcher:
    name: str = "local"
    workers: int = 1
    devices: list[str] | None = None
    per_device: int = 1
    minutes: float | None = None
    memory_gb: float | None = None
    retries: int = 1
    # of Slurm's jobs
    pack: int = 1
    wait: bool = True
    partition: str | None = None
    account: str | None = None
    cpus: int | None = None
    gpus: int | None = None
    job_memory_gb: float | None = None
    job_minutes: int = 240
    warning_seconds: int = 90
    jobs_at_once: int = 256
    sbatch: list[str] = field(default_factory=list)
    setup: list[str] = field(default_factory=list)
    plan: bool = False
    measure: bool = False
    require_clean: bool = False

    @property
    def slots(self) -> list[str | None]:
        """One entry for each run that may go on at once: the device that it gets, None for whatever is there."""
        if self.devices:
            return [device for _ in range(self.per_device) for device in self.devices]
        return [None] * self.workers


@dataclass
class Config:
    """A frozen, checked configuration of one run. `Config.load` is the only way in."""

    task: Task
    model: Model
    optimizer: Optimizer
    data: Data
    seed: int
    seeds: Seeds
    train: Train
    tracking: Tracking = field(default_factory=Tracking)
    device: Device = field(default_factory=Device)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    paths: Paths = field(default_factory=Paths)
    launcher: Launcher = field(default_factory=Launcher)
    selection: str = "dev"
    fresh_seeds: list[int] = field(default_factory=list)
    initialise_from: str | None = None
    parent: dict[str, Any] | None = None  # the configuration that `initialise_from` comes to, filled in by `load`
    experiment: str | None = None

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
        for name in ("hydra", "recipe"):
            plain.pop(name, None)
        plain["experiment"] = experiment or plain.get("experiment")
        if plain.get("initialise_from") and not plain.get("parent"):
            keep = {"checkpoint": {"keep_weights": True}, "initialise_from": None, "fresh_seeds": []}
            other = {"task": {"name": str(plain["initialise_from"])}} | keep
            plain["parent"] = cls.load(OmegaConf.merge(OmegaConf.create(given), other), experiment).to_dict()
        config = _read(cls, plain, "")
        _check(config)
        return config

    def to_dict(self) -> dict:
        return dataclasses.asdict(self)


def _read(schema: type, given: Any, where: str) -> Any:
    """`given` as an instance of the dataclass `schema`; unknown keys and wrong types are named with their path."""
    if not isinstance(given, dict):
        raise UserError(f"{where or 'configuration'} must be a group of settings, not {given!r}")
    fields = {f.name: f for f in dataclasses.fields(schema)}
    if schema is Optimizer:
        options = {k: v for k, v in given.items() if k not in fields}
        if given.get("options") is not None:
            options |= coerce(given["options"], dict[str, Any], f"{where}.options")
        given = {k: v for k, v in given.items() if k in fields} | {"options": options}
    values = {}
    for key, value in given.items():
        path = f"{where}.{key}" if where else str(key)
        if key not in fields:
            raise UserError(f"unknown key '{path}'; {did_you_mean(key, fields)}")
        values[key] = coerce(value, fields[key].type, path)
    required = [f.name for f in fields.values() if f.default is f.default_factory is dataclasses.MISSING]
    for name in required:
        if name not in values:
            raise UserError(f"'{where + '.' if where else ''}{name}' is not set")
    return schema(**values)


def coerce(value: Any, kind: Any, path: str) -> Any:
    """`value` as the annotated type `kind`, so that 1 and 1.0 (or "1e-5" and 0.00001) are one configuration."""
    if dataclasses.is_dataclass(kind):
        return _read(kind, value, path)
    alternatives = getattr(kind, "__args__", ()) if "|" in str(kind) else (kind,)
    if value is None:
        if type(None) in alternatives:
            return None
        raise UserError(f"'{path}' must be {_describe(alternatives)}, not null")
    for alternative in alternatives:
        if alternative is bool and isinstance(value, bool):
            return value
        if isinstance(value, bool):
            continue
        if alternative is int and (isinstance(value, int) or (isinstance(value, float) and value.is_integer())):
            if abs(value) >= 2**63:
                raise UserError(f"{path}={value} must be below 2^63")
            return int(value)
        if alternative is float and isinstance(value, int | float | str):
            try:
                number = float(value)
            except (ValueError, OverflowError):
                continue
            if abs(number) <= LARGEST:
                return number
            if math.isfinite(number):
                raise UserError(f"{path}={number} must be within float32, ±{LARGEST}")
        if alternative is str and isinstance(value, str | int | float):
            if CONTROL.search(str(value)):
                raise UserError(f"'{path}' holds a control character or broken UTF-8: {value!r}")
            return str(value)
        if getattr(alternative, "__origin__", None) is dict and isinstance(value, dict):
            for key in value:
                if not isinstance(key, str):
                    raise UserError(f"'{path}': the name {key!r} must be text")
            return value
        if getattr(alternative, "__origin__", None) is list and isinstance(value, list | tuple):
            (part,) = alternative.__args__
            return [coerce(v, part, f"{path}[{i}]") for i, v in enumerate(value)]
        if getattr(alternative, "__origin__", None) is tuple and isinstance(value, list | tuple):
            parts = alternative.__args__
            if len(parts) == len(value):
                return tuple(coerce(v, k, f"{path}[{i}]") for i, (v, k) in enumerate(zip(value, parts, strict=True)))
    raise UserError(f"'{path}' must be {_describe(alternatives)}, not {value!r}")


def _describe(alternatives) -> str:
    words = {int: "a whole number", float: "a finite number", str: "text", bool: "true or false", type(None): "null"}
    words |= {list: "a list", tuple: "a list of two", dict: "a group of settings"}
    return " or ".join(words.get(getattr(a, "__origin__", a), str(a)) for a in alternatives)


def _check(config: Config) -> None:
    """Values that have the right type and cannot be meant."""
    from .task import get_task

    task = get_task(config.task.name)
    train = config.train

    def at_least(path: str, value, smallest, strictly=False):
        if value is not None and (value <= smallest if strictly else value < smallest):
            raise UserError(f"{path}={value} must be {'above' if strictly else 'at least'} {smallest}")

    def at_most(path: str, value, largest):
        if value is not None and value > largest:
            raise UserError(f"{path}={value} must be at most {largest}")

    def one_of(path: str, value: str, known):
        if value not in known:
            raise UserError(f"unknown {path} '{value}'; {did_you_mean(value, known)}")

    for name in ("epochs", "batch_size", "micro_batch_size", "max_steps", "max_train_examples"):
        at_least(f"train.{name}", getattr(train, name), 1)
    for name in ("lr", "weight_decay", "piece_overhead", "warmup_ratio", "dropout"):
        at_least(f"train.{name}", getattr(train, name), 0)
    for name in ("max_grad_norm", "eps"):
        at_least(f"train.{name}", getattr(train, name), 0, strictly=True)
    at_least("train.max_length", train.max_length, 8)
    for name in ("warmup_ratio", "dropout"):
        if (getattr(train, name) or 0) >= 1:
            raise UserError(f"train.{name}={getattr(train, name)} must be below 1")
    for i, beta in enumerate(train.betas):
        if not 0 <= beta < 1:
            raise UserError(f"train.betas[{i}]={beta} must be at least 0 and below 1")
    for name in ("init", "data"):
        at_least(f"seeds.{name}", getattr(config.seeds, name), 0)
    at_least("optimizer.steps_factor", config.optimizer.steps_factor, 1)
    at_least("device.threads", config.device.threads, 1)
    at_most("device.threads", config.device.threads, MOST_AT_ONCE)
    for name in ("workers", "per_device"):
        at_least(f"launcher.{name}", getattr(config.launcher, name), 1)
        at_most(f"launcher.{name}", getattr(config.launcher, name), MOST_AT_ONCE)
    devices = config.launcher.devices
    if devices is not None and (not devices or len(set(devices)) < len(devices) or not all(map(_is_device, devices))):
        raise UserError(f"launcher.devices={devices} must name different GPUs by number or UUID, e.g. [0,1]")
    one_of("launcher.name", config.launcher.name, ("local", "slurm"))
    for name in ("pack", "cpus", "gpus", "job_minutes", "jobs_at_once"):
        at_least(f"launcher.{name}", getattr(config.launcher, name), 1)
    at_least("launcher.job_memory_gb", config.launcher.job_memory_gb, 0, strictly=True)
    at_least("launcher.warning_seconds", config.launcher.warning_seconds, 0)
    for option in config.launcher.sbatch:
        if not re.match(r"--[a-z]", option):
            raise UserError(f"launcher.sbatch: '{option}' must be an option like --qos=low")
    if config.launcher.warning_seconds >= 60 * config.launcher.job_minutes:
        raise UserError(f"launcher.warning_seconds={config.launcher.warning_seconds} is all of launcher.job_minutes")
    at_least("launcher.retries", config.launcher.retries, 0)
    at_least("launcher.minutes", config.launcher.minutes, 0, strictly=True)
    at_least("launcher.memory_gb", config.launcher.memory_gb, 0, strictly=True)
    at_least("checkpoint.every_seconds", config.checkpoint.every_seconds, 0)
    for percent in config.checkpoint.keep_at:
        if not 0 < percent <= 100:
            raise UserError(f"checkpoint.keep_at: {percent} must be above 0 and at most 100 (per cent of the steps)")
    one_of("train.precision", train.precision, ("float32", "bfloat16"))
    one_of("selection", config.selection, ("dev", "heldout"))
    one_of("data.source", config.data.source, ("builtin", "local", "hub"))
    one_of("tracking.mode", config.tracking.mode, ("offline", "online", "disabled"))
    if config.initialise_from == task.name:
        raise UserError(f"initialise_from={task.name} is the task itself; name another one, or null")
    for seed in config.fresh_seeds:
        at_least("fresh_seeds", seed, 0)
    if config.data.source == "local" and not config.data.root:
        raise UserError("data=local needs data.root=DIR, the folder that holds RTE/train.tsv and so on")
    if not task.train:
        raise UserError(f"task '{task.name}' has no training set; it is evaluated with a model trained on mnli")
    if not (config.model.path or config.model.id or config.model.architecture):
        raise UserError(f"model={config.model.name} needs model.path=DIR or model.id=NAME with model.revision=HASH")
    if config.model.id and not config.model.path and not config.model.revision:
        raise UserError(f"model.id={config.model.id} needs model.revision=HASH: without it, numbers may change unseen")
    if config.data.source == "hub" and not config.data.revision:
        raise UserError("data=hub needs data.revision=HASH: without it, numbers may change unseen")
    if not re.fullmatch(r"auto|cpu|cuda(:\d{1,2})?", config.device.name):
        raise UserError(f"unknown device.name '{config.device.name}'; use auto, cpu, cuda or cuda:0")
    if not config.tracking.project or set(config.tracking.project) & set("/\\#?%:"):
        raise UserError(f"tracking.project='{config.tracking.project}' must be a name without any of / \\ # ? % :")
    _check_places(config)
    config.optimizer.options = check_method(config.optimizer.method, config.optimizer.options)


def _is_device(name: str) -> bool:
    """As CUDA_VISIBLE_DEVICES takes it."""
    return re.fullmatch(r"\d{1,3}|(GPU|MIG)-[\w/-]+", name) is not None


def _check_places(config: Config) -> None:
    """Folders: that each can be there, whether it is or not."""
    for path, name in (("model.name", config.model.name), ("optimizer.name", config.optimizer.name)):
        if not name or "/" in name or name in (".", "..") or len(name.encode()) > 200:
            raise UserError(f"{path}='{name}' cannot name a folder, which a run's record needs")
    for path, value in (("data.root", config.data.root), ("model.path", config.model.path)):
        if value:
            _exists(path, Path(value))
    for name, value in vars(config.paths).items():
        if not value:
            raise UserError(f"paths.{name} is empty: give a folder")
        folder = Path(value).absolute()
        there = next(p for p in (folder, *folder.parents) if _exists(f"paths.{name}", p))
        if not there.is_dir():
            raise UserError(f"paths.{name}={value}: {there} is not a folder")


def _exists(path: str, place: Path) -> bool:
    """Whether there is something in that place. UserError where nothing can be."""
    try:
        return place.expanduser().exists()
    except (OSError, RuntimeError) as error:  # a name too long, no permission; a user that there is not
        raise UserError(f"{path}={place} cannot be used: {getattr(error, 'strerror', None) or error}") from None


def check_method(name: str, options: dict[str, Any]) -> dict[str, Any]:
    """All options of the method, defaults filled in, coerced and tried; UserError names what is wrong."""
    import torch

    from .methods import METHODS, WEIGHTINGS, option_types

    if name not in METHODS:
        raise UserError(f"unknown method '{name}'; {did_you_mean(name, METHODS)}")
    weighting = options.get("weighting")
    if weighting is not None and weighting not in tuple(WEIGHTINGS):  # a list has no hash
        raise UserError(f"unknown weighting '{weighting}'; {did_you_mean(weighting, WEIGHTINGS)}")
    known = option_types(name, weighting)
    for key in options:
        if key not in known:
            raise UserError(f"unknown key 'optimizer.{key}' for method '{name}'; {did_you_mean(key, known)}")
    values = {k: default for k, (_, default) in known.items()} | options
    values = {k: coerce(v, known[k][0], f"optimizer.{k}") for k, v in values.items()}
    try:
        # Stands for any encoder: what its depth or modules do not allow is found once the model is known.
        METHODS[name](
            torch.nn.ModuleDict({"layers": torch.nn.ModuleList(torch.nn.LayerNorm(1) for _ in range(99))}), **values
        )
    except ValueError as error:
        raise UserError(f"optimizer: {error}") from None
    return dict(sorted(values.items()))
