"""The best variant of each method by the rule `selection`, to be run again with seeds that it was not chosen by."""

import json
from collections.abc import Sequence

import numpy as np

from ..config import Config
from ..errors import UserError
from ..runs.identity import hyperparameters
from .planned import Planned

ABSENT = ["no such setting"]  # what no setting's value is


def choose(runs: Sequence[Planned]) -> tuple[list[Config], list[dict]]:
    """For each task, model and optimizer the variant with the highest mean score, over its seeds, to choose by.

    Variants are what differs in hyperparameters. The score is that of the best epoch on the held-out part of the
    training set, or with `selection=dev` the one reported, on the development set. A variant that lacks a finished run
    is not chosen; of equals, the first is.

    Returns one configuration of each chosen variant, and one row for each variant: task, model, optimizer, settings
    (those that differ), selection, mean, sd, runs, chosen.
    """
    groups: dict[tuple, dict[str, list[Planned]]] = {}
    for r in runs:
        group = groups.setdefault(_cell(r.config), {})
        group.setdefault(json.dumps(hyperparameters(r.config), sort_keys=True), []).append(r)
    configs: list[Config] = []
    rows: list[dict] = []
    for (task, model, optimizer), variants in groups.items():
        known = [hyperparameters(members[0].config) for members in variants.values()]
        names = dict.fromkeys(name for values in known for name in values)  # some are there only where they are set
        differ = [name for name in names if len({json.dumps(values.get(name, ABSENT)) for values in known}) > 1]
        tried: list[dict] = []
        for members, values in zip(variants.values(), known, strict=True):
            scores = [s for s in map(score, members) if s is not None]
            whole = len(scores) == len(members)
            tried.append(
                {"task": task, "model": model, "optimizer": optimizer}
                | {"settings": {name: values[name] for name in differ if name in values}}
                | {"selection": members[0].config.selection, "runs": len(scores), "expected": len(members)}
                | {"mean": round(float(np.mean(scores)), 12) if scores else None}  # else rounding would break ties
                | {"sd": float(np.std(scores, ddof=1)) if len(scores) > 1 else None}
                | {"chosen": False, "whole": whole, "config": members[0].config}
            )
        candidates = [row for row in tried if row["whole"]]
        if candidates:
            winner = max(candidates, key=lambda row: row["mean"])
            winner["chosen"] = True
            configs.append(winner["config"])
        rows += [{k: v for k, v in row.items() if k not in ("whole", "config")} for row in tried]
    return configs, rows


def lacking(rows: Sequence[dict]) -> list[str]:
    """The cells ('task model optimizer') of which `choose` could choose no variant."""
    cells = dict.fromkeys((row["task"], row["model"], row["optimizer"]) for row in rows)
    chosen = {(row["task"], row["model"], row["optimizer"]) for row in rows if row["chosen"]}
    return [" ".join(cell) for cell in cells if cell not in chosen]


def _cell(config: Config) -> tuple[str, str, str]:
    return config.task_label, config.model.name, config.optimizer.name


def check_comparable(configs: Sequence[Config]) -> None:
    """UserError where a choice would compare scores on other examples, or on other labels of them."""
    first: dict[tuple, Config] = {}
    for config in configs:
        one = first.setdefault(_cell(config), config)
        for name, value, other in (
            ("selection", one.selection, config.selection),
            ("data.heldout_noise", one.data.heldout_noise, config.data.heldout_noise),
            ("data.noise_seed", one.data.noise_seed, config.data.noise_seed),
        ):
            if value != other:
                raise UserError(
                    f"{name} is {value} for some variants of {' '.join(_cell(config))} and {other} for others, so that "
                    "their scores do not compare and none can be chosen: give it one value"
                )


def score(run: Planned) -> float | None:
    """The score to choose by of a finished run's best epoch."""
    result = run.record.result(set_aside=False)
    if result is None or result["status"] != "finished" or not result["best"]:
        return None
    return result["best"].get("heldout_score", result["best"]["score"])


def reseeded(configs: Sequence[Config], seeds: Sequence[int]) -> list[Config]:
    """Each configuration with each seed, and the runs that they start from likewise."""

    def again(given: dict, seed: int) -> dict:
        parent = given["parent"] and again(given["parent"], seed)
        return given | {"seed": seed, "seeds": {"init": seed, "data": seed}, "parent": parent, "fresh_seeds": []}

    return [Config.resolved(again(config.to_dict(), seed)) for config in configs for seed in seeds]


def check_fresh(configs: Sequence[Config]) -> list[int]:
    """The fresh seeds of a sweep. UserError where one of them had a part in the choice, or where a part of the seeds
    was set apart, which they would set anew."""
    fresh = configs[0].fresh_seeds
    for config in configs if fresh else ():
        for name, value in vars(config.seeds).items():
            if value != config.seed:
                raise UserError(
                    f"fresh_seeds={fresh} set seeds.{name} as well, which is {value} beside seed={config.seed} here: "
                    "leave one of the two out"
                )
    used = {seed for c in configs for seed in (c.seed, c.seeds.init, c.seeds.data)}
    if both := sorted(used & set(fresh)):
        raise UserError(f"fresh_seeds={fresh}: seed {both[0]} is among those of the sweep, {sorted(used)}: name others")
    return fresh


def described(rows: Sequence[dict]) -> str:
    """A line for each variant: its score to choose by, and a mark at the chosen one."""
    lines = []
    for row in rows:
        settings = ", ".join(f"{name}={value}" for name, value in row["settings"].items()) or "as it is"
        shown = "no whole set of runs" if row["mean"] is None else f"{100 * row['mean']:.2f} on {row['selection']}"
        mark = "*" if row["chosen"] else " "
        lines.append(
            f"{mark} {row['task']} {row['optimizer']} {settings}: {shown} ({row['runs']}/{row['expected']} runs)"
        )
    return "\n".join(lines)
