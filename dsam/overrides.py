"""Finds mistakes on a Hydra command line before Hydra starts, so that each is one line with the nearest name."""

import contextlib
import functools
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Glob, IntervalSweep, Override, RangeSweep
from hydra.errors import HydraException
from omegaconf import DictConfig
from pydantic import BaseModel

from .config import Config, Settings
from .errors import UserError, did_you_mean
from .kinds import CONTROL
from .mistakes import alternatives
from .text import first_line

SWEEPERS = ("dsam", "optuna")
SEARCH_SETTINGS = tuple(f"hydra.sweeper.{name}" for name in ("n_trials", "n_jobs", "seed"))
HYDRAS_OWN = ("hydra.mode", "hydra.verbose", "hydra/sweeper", *SEARCH_SETTINGS)
"""What may be set of Hydra's own settings: the others would move, split or replace what the sweep relies on."""

MOST_RUNS = 100_000


def own_folder(given: str | None) -> Path | None:
    """The folder of --config-dir. UserError where it is none."""
    if given is None:
        return None
    folder = Path(os.path.expanduser(given))
    if not folder.is_dir():
        raise UserError(f"--config-dir {given} is not a folder")
    return folder


def check(overrides: list[str], conf: Path, more: Path | None = None, one_run: bool = False) -> list[str]:
    """The overrides as Hydra shall see them. Raises UserError for an unknown group, choice or key, or bad syntax.

    Options of an optimizer need not stand in its file (a weighting's do not), so `optimizer.radius=0.3` is passed on
    as `++optimizer.radius=0.3`; `dsam.config` checks it against the method itself. Text stays the text that was typed,
    whatever Hydra's grammar would make of it.

    Args:
        conf: the folder of configurations. more: one of the user's own, beside it.
        one_run: several values of one setting are a mistake.
    """
    if not conf.is_dir():
        raise UserError(
            f"{conf} is not there: the installed package is the library alone; sweeps run from a checkout of the "
            "repository, which has conf/ and experiments/"
        )
    groups: dict[str, list[str]] = {}
    for place in (conf, *([more] if more else [])):
        for folder in place.iterdir():
            if folder.is_dir():
                files = {f.stem: f for f in folder.glob("*.yaml")}
                if twice := sorted(files.keys() & groups.get(folder.name, ())):  # Hydra would take that of conf/
                    raise UserError(f"{files[twice[0]]}: conf/{folder.name}/ has one of that name; call it otherwise")
                groups[folder.name] = sorted({*groups.get(folder.name, ()), *files})
    passed, chosen, keys, first, between, runs = [], [], [], [], [], 1
    parser = OverridesParser.create()
    for text in overrides:
        typed, text = text, _as_typed(text, parser)
        try:
            override = parser.parse_override(text)
        except HydraException as error:
            raise UserError(f"cannot read '{text}': {first_line(error)}") from None
        name = override.key_or_group
        if re.split("[./@]", name)[0] == "hydra" and name not in HYDRAS_OWN:
            raise UserError(f"'{text}': {name} cannot be set; paths.runs=DIR says where runs lie")
        if name == "hydra/sweeper" and override.value() not in SWEEPERS:
            raise UserError(f"'{text}': the sweepers are {' and '.join(SWEEPERS)}")
        if name == "hydra/sweeper" and one_run:
            raise UserError(f"'{text}': add -m for a sweep")
        values = _values(override, text, groups.get(name, ()))
        if one_run and override.is_sweep_override():
            raw = typed.partition("=")[2]
            hint = f"; one value with a comma needs quotes: \"{name}='{raw}'\"" if name in text_settings() else ""
            what = "a search" if override.is_interval_sweep() else f"{len(values)} runs"
            raise UserError(f"'{typed}' is {what}: add -m for a sweep{hint}")
        if name in groups and override.is_add():
            raise UserError(f"'{text}': write {name}={values[0]}, without the +")
        if (name, values) == ("experiment", ["null"]):  # what is so without it, and what Hydra takes for a mistake
            continue
        between += [text] * override.is_interval_sweep()
        runs *= len(values)
        if runs > MOST_RUNS:
            raise UserError(f"'{text}': more than {MOST_RUNS} runs")
        first.append(f"{override.get_key_element()}={values[0]}" if override.is_sweep_override() else text)
        if name in groups and not override.is_delete():
            for choice in values:
                if choice not in groups[name]:
                    raise UserError(f"unknown {name} '{choice}'; {did_you_mean(choice, groups[name])}")
            if name == "experiment" and len(values) > 1:
                each = ", then ".join(f"experiment={value}" for value in values)
                raise UserError(f"'{text}': each experiment is a sweep of its own: start {each}")
            chosen.append(f"{name}={values[0]}")
        elif name.startswith("optimizer.") and text.startswith("optimizer."):
            text, first[-1] = f"++{text}", f"++{first[-1]}"
        elif re.split("[./]", name)[0] != "hydra" and not (
            override.is_add() or override.is_force_add() or override.is_delete()
        ):
            keys.append(name)
        passed.append(text)
    try:
        whole = compose_config(first, conf, with_hydra=True, more=more)  # what only shows when all is put together
    except UserError:
        if keys:
            _check_keys(keys, compose_config(chosen, conf, more=more), groups)
        for text in (text for text in first if text.startswith(SEARCH_SETTINGS)):
            compose_config([t for t in first if t != text], conf, more=more)  # what else is wrong
            raise UserError(f"'{text}' goes with hydra/sweeper=optuna") from None
        raise
    if between and not str(whole.hydra.sweeper._target_).endswith("OptunaSweeper"):
        raise UserError(
            f"'{between[0]}': a sweep needs single values, e.g. 1,2 or range(0,3); add hydra/sweeper=optuna to search"
        )
    return passed


def _values(override: Override, text: str, choices: Sequence[str]) -> list[str]:
    """The values that an override sweeps over, or its one. `choices`: what a glob chooses from."""
    if not override.is_sweep_override():
        value = override.value()
        return ["null" if value is None else str(value)]
    sweep = override.value()
    if isinstance(sweep, IntervalSweep):
        return [str(sweep.start)]
    if isinstance(sweep, RangeSweep) and not _ends(sweep):
        raise UserError(f"'{text}': more than {MOST_RUNS} runs")
    values = sweep.filter(list(choices)) if isinstance(sweep, Glob) else swept(override)
    if not values:
        raise UserError(f"'{text}' is a sweep over nothing")
    return values


def swept(override: Override) -> list[str]:
    """The values that an override sweeps over, a range's as one would type them. Hydra adds up binary fractions: its
    range(0.1,0.5,0.1) has 0.30000000000000004, another run than 0.3, and its range(0.01,0.05,0.01) has the end too."""
    values, sweep = list(override.sweep_string_iterator()), override.value()
    if not isinstance(sweep, RangeSweep) or all(value.lstrip("-").isdigit() for value in values):
        return values
    end = sweep.stop or 0
    rounded = [float(f"{float(value):.12g}") for value in values]
    return [repr(x) for x in rounded if (x < end if sweep.step > 0 else x > end)]


def _ends(sweep: RangeSweep) -> bool:
    start, stop = sweep.start or 0, sweep.stop or 0
    return abs(stop - start) <= MOST_RUNS * abs(sweep.step)


@functools.cache
def text_settings() -> frozenset[str]:
    """The settings that are text, e.g. model.revision: what looks like a number in them is not one."""

    def of(schema: type[BaseModel], prefix: str) -> Iterator[str]:
        for name, field in schema.model_fields.items():
            kinds = [getattr(kind, "__origin__", kind) for kind in alternatives(field.annotation)]
            if str in kinds:
                yield prefix + name
            for kind in kinds:
                if isinstance(kind, type) and issubclass(kind, Settings):
                    yield from of(kind, f"{prefix}{name}.")

    return frozenset(of(Config, "")) - {"experiment"}  # which chooses a file


def _as_typed(text: str, parser: OverridesParser) -> str:
    """`text` with quotes where its setting is text and Hydra would read something else, or nothing, in its place."""
    key, found, raw = text.partition("=")
    if not found or key.lstrip("+") not in text_settings() or CONTROL.search(raw):
        return text
    try:
        override = parser.parse_override(text)
    except HydraException:
        quoted = f"{key}={_quoted(raw)}"
        with contextlib.suppress(HydraException):
            parser.parse_override(quoted)
            return quoted
        return text
    if override.is_choice_sweep():
        parts = raw.split(",")
        return (
            text if re.search(r"['\"\[\](){}\\]", raw) else f"{key}={','.join(_quoted(part.strip()) for part in parts)}"
        )
    if not override.is_sweep_override() and isinstance(override.value(), int | float):
        return f"{key}={_quoted(raw)}"
    return text


def _quoted(raw: str) -> str:
    """As Hydra reads it back: it takes a backslash for an escape only in front of a quote, the last one too."""
    if raw in ("", "null"):
        return raw
    escaped = re.sub(r"(\\*)('|$)", lambda found: 2 * found[1] + ("\\'" if found[2] else ""), raw)
    return f"'{escaped}'"


def compose_config(overrides: list[str], conf: Path, with_hydra: bool = False, more: Path | None = None) -> DictConfig:
    """The configuration that Hydra composes, as it does for one run.

    Args:
        with_hydra: with Hydra's own settings.
        more: a user's own folder of configurations, beside `conf`.
    """
    GlobalHydra.instance().clear()
    beside = [f"hydra.searchpath=[{_quoted(f'file://{more.resolve()}')}]"] if more else []
    try:
        with initialize_config_dir(str(conf.resolve()), version_base="1.3"):
            return compose("config", [*overrides, *beside], return_hydra_config=with_hydra)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{mark.name}:{mark.line + 1}" if mark else "configuration"
        raise UserError(f"{where}: {error.problem or error.context}") from None
    except Exception as error:  # whatever Hydra and OmegaConf make of it: not only errors of their own kinds
        raise UserError(f"configuration: {first_line(error)}") from None


def _check_keys(keys: list[str], config: DictConfig, groups: dict) -> None:
    for key in keys:
        node: Any = config
        for i, part in enumerate(key.split(".")):
            if not isinstance(node, DictConfig) or part not in node:
                where = ".".join(key.split(".")[:i])
                known = list(node) if isinstance(node, DictConfig) else []
                if i == 0:
                    known += list(groups)
                raise UserError(
                    f"unknown key '{key}'"
                    + (f" ({where} has no '{part}')" if where else "")
                    + f"; {did_you_mean(part, known)}"
                )
            node = node._get_node(part)  # not node[part]: that would resolve interpolations
