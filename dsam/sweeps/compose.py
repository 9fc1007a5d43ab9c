"""The configurations of a sweep's jobs, as Hydra composes each, without reading the same files for each again."""

import copy
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, OmegaConf

from ..config import Config, Seeds
from ..kinds import SEEDS

PLAIN = (bool, int, float, str, type(None))
OF_A_SEED = re.compile(r'\$\{[^"]*\bseeds?\b')  # in JSON's text: within one value


def composed(loader, master: DictConfig, jobs: Sequence[Sequence[str]]) -> Iterator[tuple[dict, str | None]]:
    """For each job its configuration, not resolved, and the name of its experiment.

    Hydra composes the chosen files, and then sets values one by one. So jobs that choose the same files are composed
    once, and get their values here, as long as these are plain ones of keys that there are; any other job is Hydra's.

    Args:
        loader: Hydra's. master: what the command line alone comes to. jobs: each a list of overrides.
    """
    parser = OverridesParser.create(config_loader=loader)
    if not isinstance(loader.repository, _ReadOnce):
        loader.repository = _ReadOnce(loader.repository)
    known: dict[tuple[str, ...], tuple[dict, str | None]] = {}
    read: dict[str, tuple[Override, bool]] = {}

    def parsed(text: str) -> tuple[Override, bool]:
        if text not in read:
            override = parser.parse_override(text)
            read[text] = override, loader.repository.group_exists(override.key_or_group)
        return read[text]

    def whole(overrides: Sequence[str]) -> tuple[dict, str | None]:
        config = loader.load_sweep_config(master, list(overrides))
        experiment = config.hydra.runtime.choices.get("experiment")
        plain = OmegaConf.to_container(config, resolve=False)
        assert isinstance(plain, dict)
        plain.pop("hydra")
        return plain, experiment

    for job in jobs:
        values = [override for override, chooses in map(parsed, job) if not chooses]
        choices = tuple(text for text in job if parsed(text)[1])
        if not all(map(_plain, values)):
            yield whole(job)
            continue
        if choices not in known:
            known[choices] = whole(choices)
        config, experiment = known[choices]
        config = copy.deepcopy(config)
        if all(_set(config, override) for override in values):
            yield config, experiment
        else:
            yield whole(job)


class _ReadOnce:
    """Hydra's files, each read and parsed once; Hydra takes a new copy of what it reads them with for each job."""

    def __init__(self, repository):
        self._repository, self._read = repository, {}

    def __getattr__(self, name: str):
        return getattr(self._repository, name)

    def __deepcopy__(self, memo) -> "_ReadOnce":
        return self

    def load_config(self, config_path: str):
        if config_path not in self._read:
            self._read[config_path] = self._repository.load_config(config_path)
        return copy.deepcopy(self._read[config_path])  # which Hydra writes on


def _plain(override: Override) -> bool:
    """Whether it sets one plain value: nothing added or deleted, and nothing in it that OmegaConf would look into."""
    value = override.value()
    looked_into = override.is_delete() or override.is_add() or override.package is not None
    return not looked_into and type(value) in PLAIN and not (isinstance(value, str) and "${" in value)


def _set(config: dict[str, Any], override: Override) -> bool:
    """Sets the value; False where Hydra would do more than that, or refuse it."""
    *way, last = override.key_or_group.split(".")
    place: Any = config
    for name in way:
        place = place.get(name) if isinstance(place, dict) else None
    if not isinstance(place, dict) or isinstance(place.get(last), dict | list):
        return False
    if last not in place and not override.is_force_add():
        return False
    place[last] = override.value()
    return True


def configurations(jobs: Iterable[tuple[dict, str | None]]) -> list[Config]:
    """Each job's checked configuration. Those that differ in the seed alone are resolved and checked once, where the
    seed is what it is in conf/config.yaml: a number that `seeds` takes up and no other setting refers to."""
    known: dict[str, Config] = {}
    found = []
    for plain, experiment in jobs:
        seed, others = plain.get("seed"), plain | {"seed": None, "seeds": None}
        alone = plain.get("seeds") == {"init": "${seed}", "data": "${seed}"} and type(seed) is int and 0 <= seed < SEEDS
        text = json.dumps([others, experiment], default=str)
        if not alone or OF_A_SEED.search(text) or plain.get("initialise_from") or seed is None:
            found.append(Config.load(plain, experiment))
        elif text not in known:
            known[text] = Config.load(plain, experiment)
            found.append(known[text])
        else:
            found.append(known[text].model_copy(update={"seed": seed, "seeds": Seeds(init=seed, data=seed)}))
    return found
