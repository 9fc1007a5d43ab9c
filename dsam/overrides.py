"""Finds mistakes on a Hydra command line before Hydra starts, so that each is one line with the nearest name."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Glob, Override, RangeSweep
from hydra.errors import HydraException
from omegaconf import DictConfig

from .errors import UserError, did_you_mean
from .text import first_line

HYDRAS_OWN = ("hydra.mode", "hydra.verbose")
"""What may be set of Hydra's own settings: the others would move, split or replace what the sweep relies on."""

MOST_RUNS = 100_000


def check(overrides: list[str], conf: Path) -> list[str]:
    """The overrides as Hydra shall see them. Raises UserError for an unknown group, choice or key, or bad syntax.

    Options of an optimizer need not stand in its file (a weighting's do not), so `optimizer.radius=0.3` is passed on
    as `++optimizer.radius=0.3`; `dsam.config` checks it against the method itself.
    """
    groups = {
        folder.name: sorted(f.stem for f in folder.glob("*.yaml")) for folder in conf.iterdir() if folder.is_dir()
    }
    passed, chosen, keys, first, runs = [], [], [], [], 1
    parser = OverridesParser.create()
    for text in overrides:
        try:
            override = parser.parse_override(text)
        except HydraException as error:
            raise UserError(f"cannot read '{text}': {first_line(error)}") from None
        name = override.key_or_group
        if re.split("[./@]", name)[0] == "hydra" and name not in HYDRAS_OWN:
            raise UserError(f"'{text}': {name} cannot be set; paths.runs=DIR says where runs lie")
        values = _values(override, text, groups.get(name, ()))
        runs *= len(values)
        if runs > MOST_RUNS:
            raise UserError(f"'{text}': more than {MOST_RUNS} runs")
        first.append(f"{override.get_key_element()}={values[0]}" if override.is_sweep_override() else text)
        if name in groups and not override.is_delete():
            for choice in values:
                if choice not in groups[name]:
                    raise UserError(f"unknown {name} '{choice}'; {did_you_mean(choice, groups[name])}")
            chosen.append(f"{name}={values[0]}")
        elif name.startswith("optimizer.") and text.startswith("optimizer."):
            text, first[-1] = f"++{text}", f"++{first[-1]}"
        elif name.split(".")[0] != "hydra" and not (
            override.is_add() or override.is_force_add() or override.is_delete()
        ):
            keys.append(name)
        passed.append(text)
    try:
        compose_config(first, conf)  # what only shows when all is put together, for the first run
    except UserError:
        if keys:
            _check_keys(keys, compose_config(chosen, conf), groups)
        raise
    return passed


def _values(override: Override, text: str, choices: Sequence[str]) -> list[str]:
    """The values that an override sweeps over, or its one. `choices`: what a glob chooses from."""
    if not override.is_sweep_override():
        value = override.value()
        return ["null" if value is None else str(value)]
    if not override.is_discrete_sweep():
        raise UserError(f"'{text}': a sweep needs single values, e.g. {override.key_or_group}=1,2 or range(0,3)")
    sweep = override.value()
    if isinstance(sweep, RangeSweep) and not _ends(sweep):
        raise UserError(f"'{text}': more than {MOST_RUNS} runs")
    values = sweep.filter(list(choices)) if isinstance(sweep, Glob) else list(override.sweep_string_iterator())
    if not values:
        raise UserError(f"'{text}' is a sweep over nothing")
    return values


def _ends(sweep: RangeSweep) -> bool:
    start, stop = sweep.start or 0, sweep.stop or 0
    return abs(stop - start) <= MOST_RUNS * abs(sweep.step)


def compose_config(overrides: list[str], conf: Path, with_hydra: bool = False) -> DictConfig:
    """The configuration that Hydra composes, as it does for one run; `with_hydra`: with Hydra's own settings."""
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(conf.resolve()), version_base="1.3"):
            return compose("config", overrides, return_hydra_config=with_hydra)
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
