"""A finished run that kept its weights: read back from its folder, or found by its configuration."""

import json
from pathlib import Path

import yaml

from ..config import Config
from ..errors import UserError
from ..text import first_line
from .identity import identify
from .record import Record, seal


def read_run(folder: Path, weights: str) -> tuple[Config, dict]:
    """The configuration and result of the run in `folder`. `config.model` is its kept model.

    Args:
        weights: which: "best" or "last".

    Raises:
        UserError: it is not finished, kept no weights or was edited.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder")
    if not (folder / "config.yaml").is_file():
        raise UserError(f"{folder} is not a run's folder: it has no config.yaml")
    if not (folder / "result.json").is_file():
        raise UserError(f"{folder} is not finished: it has no result.json; the command that started it goes on with it")
    if not (folder / weights / "config.json").is_file():
        raise UserError(f"{folder} has no {weights}/: its weights are kept only with checkpoint.keep_weights=true")
    try:
        given = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
        config = Config.resolved({name: value for name, value in given.items() if name != "launcher"})  # that is done
        result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError) as error:
        raise UserError(f"{folder} cannot be read: {first_line(error)}") from None
    if not isinstance(result, dict) or result.get("result_sha256") != seal(result):
        raise UserError(f"{folder / 'result.json'} was edited: the command that made the run makes it again")
    path = str(folder / weights)
    kept = {"path": path, "id": None, "revision": None, "architecture": None}
    return config.model_copy(update={"model": config.model.model_copy(update=kept)}), result


def lacks_weights(config: Config, folder: Path, result: dict) -> list[str]:
    """The folders of weights that are asked of a finished run and that it has not kept: it was made when they were
    not. One that diverged has none of where it did not come to."""
    asked = [name for name, step in phases(config, result["train"]["examples"]).items()
             if step <= result["train"]["steps"]]  # fmt: skip
    if config.checkpoint.keep_weights:
        asked.append("best")
    return [name for name in asked if result["best"] and not (folder / name).is_dir()]


def phases(config: Config, examples: int) -> dict[str, int]:
    """The folder of each of `checkpoint.keep_at` -> the step after which it is written; few steps may share one."""
    if not config.checkpoint.keep_at:
        return {}
    from ..training.loop import total_steps  # PyTorch, where it is needed

    total = total_steps(config, examples)[0]
    return {f"at-{percent}": max(1, round(percent / 100 * total)) for percent in config.checkpoint.keep_at}


def kept_weights(config: Config) -> Path:
    """The folder of a finished run's weights at its best epoch. UserError where it kept none."""
    folder = identify(config).folder / "best"
    if not folder.is_dir():
        result = Record(folder.parent).result()
        if result and result["status"] == "diverged":
            raise UserError(f"{folder} is not there: that run diverged ({result['diverged']}): take a lower train.lr")
        raise UserError(
            f"{folder} is not there: that run kept no weights: its command with checkpoint.keep_weights=true has them"
        )
    return folder
