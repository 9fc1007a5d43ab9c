"""Finds mistakes on a Hydra command line before Hydra starts, so that each is one line with the nearest name."""

from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from .config import first_line
from .errors import UserError, did_you_mean


def check(overrides: list[str], conf: Path) -> list[str]:
    """The overrides as Hydra shall see them. Raises UserError for an unknown group, choice or key, or bad syntax.

    Options of an optimizer need not stand in its file (a weighting's do not), so `optimizer.radius=0.3` is passed on
    as `++optimizer.radius=0.3`; `dsam.config` checks it against the method itself.
    """
    groups = {
        folder.name: sorted(f.stem for f in folder.glob("*.yaml")) for folder in conf.iterdir() if folder.is_dir()
    }
    passed, chosen, keys = [], [], []
    parser = OverridesParser.create()
    for text in overrides:
        try:
            override = parser.parse_override(text)
        except HydraException as error:
            raise UserError(f"cannot read '{text}': {first_line(error)}") from None
        name = override.key_or_group
        if name in groups and not override.is_delete():
            choices = list(override.sweep_string_iterator()) if override.is_sweep_override() else [override.value()]
            for choice in choices:
                if choice is not None and str(choice) not in groups[name]:
                    raise UserError(f"unknown {name} '{choice}'; {did_you_mean(str(choice), groups[name])}")
            chosen.append(f"{name}={choices[0] if choices[0] is not None else 'null'}")
        elif name.startswith("optimizer.") and text.startswith("optimizer."):
            text = f"++{text}"
        elif name.split(".")[0] != "hydra" and not (
            override.is_add() or override.is_force_add() or override.is_delete()
        ):
            keys.append(name)
        passed.append(text)
    if keys:
        _check_keys(keys, compose_config(chosen, conf), groups)
    return passed


def compose_config(overrides: list[str], conf: Path, with_hydra: bool = False) -> DictConfig:
    """The configuration that Hydra composes, as it does for one run; `with_hydra`: with Hydra's own settings."""
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(conf.resolve()), version_base="1.3"):
            return compose("config", overrides, return_hydra_config=with_hydra)
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(f"configuration: {first_line(error)}") from None


def _check_keys(keys: list[str], config: DictConfig, groups: dict) -> None:
    for key in keys:
        node = config
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
