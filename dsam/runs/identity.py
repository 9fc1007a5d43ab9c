"""A run is named by what it computes: the hash of everything that can change its numbers, and of nothing else."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import glue
from ..config import Config
from ..task import Task
from ..training.model_files import fingerprint as model_fingerprint

RECORD_VERSION = 6  # raised when the same configuration comes to mean other numbers


AS_SHIPPED = {
    "agreement": "3f033e0b3a2b0f5c",
    "ax": "3706608c53b064fb",
    "boolq": "80888bab61c4a999",
    "cb": "57a03e8bc8bac341",
    "cola": "6e3316e7c0fefb66",
    "entailment": "c70e65dd0ab0b702",
    "majority": "6c2a52f530309ef6",
    "mnli": "b2444eaa0f14ac03",
    "mrpc": "3128a7eff94c885d",
    "qnli": "7e03335f468bc9b8",
    "qqp": "424bc22a62c4c2ed",
    "rte": "c1eb8e07ac7a2af1",
    "similarity": "a07926f9743fd2c5",
    "sst2": "ccfea53f9aebbd1b",
    "stsb": "9dbb7efa441b83dc",
    "wic": "9c452e7b7a7252bf",
    "wnli": "0fe999dc3698a013",
}
"""Task -> the digest of its settings. They join a run's name where they are others: those of a user's own task, and
those of a file of `conf/task/` that was edited since."""


@dataclass(frozen=True)
class Identity:
    """Where a run lies and why: `contents` is what was hashed."""

    id: str
    folder: Path
    contents: dict


def identify(config: Config) -> Identity:
    """Never looks at paths, tracking, device, launcher or experiment; a model folder counts by its bytes.

    Raises UserError where the data or the model folder cannot be read.
    """
    contents: dict[str, Any] = {
        "record_version": RECORD_VERSION,
        "task": config.task.name,
        "data": data_fingerprint(config),
        "model": model_fingerprint(config.model),
        "method": config.optimizer.method,
        "steps_factor": config.optimizer.steps_factor,
        "options": config.optimizer.options,
        "train": config.train.named(),
        "seeds": config.seeds.model_dump(),
        "selection": config.selection,
        "parent": identify(Config.resolved(config.parent)).id if config.parent else None,
    }
    # Not there for what was there before these could be set, so that old runs keep their names.
    if config.data.noisy:
        contents["noise"] = [config.data.label_noise, config.data.heldout_noise, config.data.noise_seed]
    if config.train.dropout is not None:
        contents["dropout_reaches"] = "all"  # and no longer what BERT calls its dropouts alone
    if config.optimizer.lr_factor != 1:
        contents["lr_factor"] = config.optimizer.lr_factor
    own = _settings(config.task)
    if digest(own) != AS_SHIPPED.get(config.task.name):
        contents["task_settings"] = own
    name = digest(contents)
    folder = Path(config.paths.runs) / config.task.name / config.model.name / config.optimizer.name / name
    return Identity(name, folder, json.loads(json.dumps(contents)))


def digest(contents: dict) -> str:
    """The name of the run that has these contents."""
    canonical = json.dumps(contents, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]


def hyperparameters(config: Config) -> dict:
    """The flat settings by which tables tell methods apart."""
    train = {k: list(v) if isinstance(v, tuple) else v for k, v in config.train.named().items()}
    return {
        "method": config.optimizer.method,
        "steps_factor": config.optimizer.steps_factor,
        **config.optimizer.options,
        **train,
        "selection": config.selection,
        "initialise_from": config.initialise_from,
        # Only where they are set, so that records from before they could be are as they were.
        **({"lr_factor": config.optimizer.lr_factor} if config.optimizer.lr_factor != 1 else {}),
        **{name: getattr(config.data, name) for name in ("heldout_noise", "noise_seed") if config.data.noisy},
    }


def _settings(task: Task) -> dict:
    """What of a task can change numbers besides its examples' files, which count by their bytes."""
    settings = task.model_dump(exclude={"title", "rows", "files"})
    read = {split: [file.model_dump(exclude={"path"}) for file in task.files_of(split)] for split in task.files}
    return settings | {"files": read}


def data_fingerprint(config: Config) -> str:
    """What tells whether the data are still those that a run was made with. UserError where they cannot be read."""
    return _data_fingerprint(config.task, config.data.source, config.data.root, config.data.revision)


def _data_fingerprint(task: Task, source: str, root: str | None, revision: str | None) -> str:
    key = (task.model_dump_json(), source, root, revision)
    if key not in _fingerprints:
        _fingerprints[key] = glue.fingerprint(task, source, root=root, revision=revision)
    return _fingerprints[key]


_fingerprints: dict[tuple, str] = {}
