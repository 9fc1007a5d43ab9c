"""One run's configuration: typed settings, what each may be beside it; mistakes are found before work starts."""

import math
import re
import types
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError, model_validator
from pydantic_core import ErrorDetails, PydanticCustomError

from .errors import UserError, did_you_mean
from .task import Task, get_task
from .text import first_line

CONF = Path(__file__).parent.parent / "conf"
CONTROL = re.compile(r"[\x00-\x1f\x7f\ud800-\udfff]")  # what no name or path needs and files break on
LARGEST = 3.4e38  # of float32
MOST_AT_ONCE = 1024  # threads, or runs: more is a slip of the keyboard


# Kinds of settings: coerced, so that 1 and 1.0 (or "1e-5" and 0.00001) are one configuration.


def _whole(value: Any) -> Any:
    if isinstance(value, bool) or not (isinstance(value, int) or (isinstance(value, float) and value.is_integer())):
        raise PydanticCustomError("kind", "a whole number")
    if abs(value) >= 2**63:
        raise PydanticCustomError("said", "{path}={value} must be below 2^63")
    return int(value)


def _number(value: Any) -> Any:
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if math.isfinite(number) and abs(number) > LARGEST:
        raise PydanticCustomError("said", f"{{path}}={number} must be within float32, ±{LARGEST}")
    if not math.isfinite(number):
        raise PydanticCustomError("kind", "a finite number")
    return number


def _text(value: Any) -> Any:
    if isinstance(value, float):  # of a file: what it was written as is lost (86e12345 is infinite)
        raise PydanticCustomError("said", "'{path}' must be text, not the number {value}: put it in quotes")
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise PydanticCustomError("kind", "text")
    if CONTROL.search(str(value)):
        raise PydanticCustomError("said", "'{path}' holds a control character or broken UTF-8: {value_repr}")
    return str(value)


def _home(path: str) -> str:
    """A shell leaves the ~ of data.root=~/glue as it is. A user that there is not stays as typed, to be named."""
    try:
        return str(Path(path).expanduser()) if path.startswith("~") else path
    except RuntimeError:
        return path


def _yes(value: Any) -> Any:
    if not isinstance(value, bool):
        raise PydanticCustomError("kind", "true or false")
    return value


def _group(value: Any) -> Any:
    if not isinstance(value, dict):
        raise PydanticCustomError("kind", "a group of settings")
    for key in value:
        if not isinstance(key, str):
            raise PydanticCustomError("said", f"'{{path}}': the name {key!r} must be text")
    return value


def _list(value: Any) -> Any:
    if not isinstance(value, list | tuple):
        raise PydanticCustomError("kind", "a list")
    return value


def _pair(value: Any) -> Any:
    if not isinstance(value, list | tuple) or len(value) != 2:
        raise PydanticCustomError("kind", "a list of two")
    return tuple(value)


Whole = Annotated[int, BeforeValidator(_whole)]
Number = Annotated[float, BeforeValidator(_number)]
Text = Annotated[str, BeforeValidator(_text)]
Folder = Annotated[str, BeforeValidator(lambda value: _home(_text(value)))]
Yes = Annotated[bool, BeforeValidator(_yes)]
Group = Annotated[dict[str, Any], BeforeValidator(_group)]
AUTO_OVERHEAD = 64  # what train.piece_overhead=auto comes to on a CPU, and so what it is called
AtLeast0 = Annotated[Whole, Field(ge=0)]
AtLeast1 = Annotated[Whole, Field(ge=1)]
AtOnce = Annotated[Whole, Field(ge=1, le=MOST_AT_ONCE)]
NotNegative = Annotated[Number, Field(ge=0)]
Positive = Annotated[Number, Field(gt=0)]
Share = Annotated[Number, Field(ge=0, lt=1)]
Proportion = Annotated[Number, Field(ge=0, le=1)]


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
    piece_overhead: Whole | Literal["auto"] | None = None


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
            options |= coerced(given["options"], Group, "optimizer.options")
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
    init: AtLeast0
    data: AtLeast0


class Train(Settings):
    epochs: AtLeast1
    batch_size: AtLeast1
    lr: NotNegative
    weight_decay: NotNegative = 0.01
    warmup_ratio: Share = 0.06
    max_grad_norm: Positive | None = 1.0
    betas: Annotated[tuple[Share, Share], BeforeValidator(_pair)] = (0.9, 0.999)
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
    keep_at: Annotated[list[Whole], BeforeValidator(_list)] = []

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
    devices: Annotated[list[Text], BeforeValidator(_list)] | None = None
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
    sbatch: Annotated[list[Text], BeforeValidator(_list)] = []
    setup: Annotated[list[Text], BeforeValidator(_list)] = []
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
        if self.warning_seconds >= 60 * self.job_minutes:
            raise UserError(f"launcher.warning_seconds={self.warning_seconds} is all of launcher.job_minutes")
        return self

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
    fresh_seeds: Annotated[list[AtLeast0], BeforeValidator(_list)] = []
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
        plain["experiment"] = experiment or plain.get("experiment")
        if plain.get("initialise_from") and not plain.get("parent"):
            keep: dict[str, Any] = {"checkpoint": {"keep_weights": True}, "initialise_from": None, "fresh_seeds": []}
            other = OmegaConf.merge(OmegaConf.create(given), keep)
            other.task = {"name": str(plain["initialise_from"])}
            assert isinstance(other, DictConfig)
            plain["parent"] = cls.load(other, experiment).to_dict()
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
            raise UserError(f"task '{task.name}' has no training set; it is evaluated with a model trained on mnli")
        if not (model.path or model.id or model.architecture):
            raise UserError(f"model={model.name} needs model.path=DIR or model.id=NAME with model.revision=HASH")
        if model.id and not model.path and not model.revision:
            raise UserError(f"model.id={model.id} needs model.revision=HASH: without it, numbers may change unseen")
        if data.heldout_noise and self.selection != "heldout":
            raise UserError(f"data.heldout_noise={data.heldout_noise:g} needs selection=heldout: nothing is held out")
        if data.source == "hub" and not data.revision and not (task.hub and task.hub.revision):
            raise UserError("data=hub needs data.revision=HASH: without it, numbers may change unseen")
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


# What a mistake is called


def described(error: ValidationError, schema: type[BaseModel]) -> str:
    """The first mistake that pydantic found, as one line with its path, value and the nearest name."""
    first = error.errors()[0]
    return _line(first, schema, [part for part in first["loc"] if not _is_branch(part)])


def _is_branch(part: int | str) -> bool:
    """Whether a part of an error's place is not a setting but pydantic's name for one side of a union."""
    return isinstance(part, str) and (part in ("str", "File") or "[" in part or part.startswith("function-"))


def _line(error: ErrorDetails, schema: type[BaseModel], place: list[int | str]) -> str:
    path = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in place).lstrip(".")
    value, kind, context = error["input"], error["type"], error.get("ctx", {})
    if kind == "missing":
        return f"'{path}' is not set"
    if kind == "extra_forbidden":
        return f"unknown key '{path}'; {did_you_mean(str(place[-1]), _fields(schema, place[:-1]))}"
    if kind in ("model_type", "model_attributes_type"):
        return f"{path or 'configuration'} must be a group of settings, not {value!r}"
    if kind == "kind":
        also = "".join(f" or {word}" for word in _words(schema, place))
        return f"'{path}' must be {error['msg']}{also}, not {'null' if value is None else repr(value)}"
    if kind == "said":
        return error["msg"].format(path=path, value=value, value_repr=repr(value))
    if kind == "literal_error":
        known = re.findall(r"'([^']*)'", context["expected"])
        return f"unknown {path} '{value}'; {did_you_mean(str(value), known)}"
    if kind in ("tuple_type", "list_type"):
        return f"'{path}' must be a list, e.g. [{value}], not {value!r}"
    if kind == "string_type":
        return f"'{path}' must be text, not {value!r}: put it in quotes"
    if kind == "string_pattern_mismatch":
        return f"{path}='{value}' must be letters, digits and _ . + -, since folders are named after it"
    limits = {
        "greater_than_equal": ("at least", "ge"),
        "greater_than": ("above", "gt"),
        "less_than_equal": ("at most", "le"),
        "less_than": ("below", "lt"),
    }
    if kind in limits:
        words, name = limits[kind]
        limit = context[name]
        return f"{path}={_shown(value)} must be {words} {limit:g}"
    return f"{path}: {error['msg'].removeprefix('Value error, ')}"


def _shown(value: Any) -> Any:
    """A number as the setting holds it: 1e-5 is 1e-05, whether it was text or not."""
    return float(value) if isinstance(value, str) else value


def _annotation(schema: type[BaseModel], place: list[int | str]) -> Any:
    found: Any = schema
    for part in place:
        found = next((a for a in alternatives(found) if isinstance(a, type) and issubclass(a, BaseModel)), found)
        if isinstance(part, int) or not (isinstance(found, type) and issubclass(found, BaseModel)):
            return None
        if part not in found.model_fields:
            return None
        found = found.model_fields[part].annotation
    return found


def alternatives(annotation: Any) -> tuple:
    union = get_origin(annotation) in (types.UnionType, Union)
    return get_args(annotation) if union else (annotation,)


def _fields(schema: type[BaseModel], place: list[int | str]) -> list[str]:
    kinds = alternatives(_annotation(schema, place))
    return [
        name for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel) for name in kind.model_fields
    ]


def _words(schema: type[BaseModel], place: list[int | str]) -> list[str]:
    """What a setting may be beside its kind, e.g. auto or null."""
    kinds = alternatives(_annotation(schema, place))
    words = [word for kind in kinds if get_origin(kind) is Literal for word in get_args(kind)]
    return words + (["null"] if type(None) in kinds else [])


def coerced(value: Any, kind: Any, path: str) -> Any:
    """`value` as a setting of this kind. UserError names the path."""
    try:
        return _adapter(kind).validate_python(value)
    except ValidationError as error:
        first = error.errors()[0]
        if first["type"] == "kind":
            null = " or null" if type(None) in alternatives(kind) else ""
            shown = "null" if value is None else repr(value)
            raise UserError(f"'{path}' must be {first['msg']}{null}, not {shown}") from None
        raise UserError(_line(first, BaseModel, [path])) from None


@cache
def _adapter(kind: Any) -> TypeAdapter:
    return TypeAdapter(kind)


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
    from .methods import METHODS, WEIGHTINGS, option_types  # with torch: `import dsam.config` stays light

    if name not in METHODS:
        raise UserError(f"unknown method '{name}'; {did_you_mean(name, METHODS)}")
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
