"""The name of a method in tables: its optimizer, and the hyperparameters that tell its variants apart."""

from collections import Counter, defaultdict
from collections.abc import Sequence


def method_labels(runs: Sequence[dict]) -> list[str]:
    """One label per run (a dict with task, model, optimizer and hyperparameters), such as 'sam (rho=0.1)'.

    A hyperparameter is named where it varies among the runs of an optimizer on one task and model. One that
    follows the task or the model (a learning rate per task) is part of the recipe and isn't named, nor is the
    seed. One that is recorded only where it is set is named where runs would else be called the same. A run whose
    hyperparameters are unknown shows '?'.
    """
    values = defaultdict(set)
    for run in runs:
        for name, value in run["hyperparameters"].items():
            values[run["optimizer"], name, run["task"], run["model"]].add(value_text(value))
    varying: dict[str, list[str]] = defaultdict(list)
    for (optimizer, name, _, _), seen in values.items():
        if len(seen) > 1 and name != "seed" and name not in varying[optimizer]:
            varying[optimizer].append(name)
    alike = defaultdict(list)
    for run in runs:
        if known := run["hyperparameters"]:
            label = _label(run, sorted(varying[run["optimizer"]]))
            alike[run["optimizer"], label, run["task"], run["model"]].append(known)
    for (optimizer, *_), several in alike.items():
        recorded = Counter(name for known in several for name in known)
        varying[optimizer] += [
            name for name, runs_with in recorded.items()
            if runs_with < len(several) and name != "seed" and name not in varying[optimizer]
        ]  # fmt: skip
    return [_label(run, sorted(varying[run["optimizer"]])) for run in runs]


def _label(run: dict, names: list[str]) -> str:
    known = run["hyperparameters"]
    if "lr" in known:
        known = known | {"lr": rate_used(known["lr"], known.get("lr_factor", 1))}
    shown = [f"{name}={value_text(known[name]) if known else '?'}" for name in names if not known or name in known]
    return f"{run['optimizer']} ({', '.join(shown)})" if shown else run["optimizer"]


def rate_used(rate: float, factor: float) -> float:
    """The learning rate that the optimizer had: the recipe's, times the method's `lr_factor`."""
    return rate if factor == 1 else float(f"{rate * factor:.6g}")  # a product of floats shows its rounding otherwise


def value_text(value) -> str:
    """The same text for the same value, however it was written: 1 and 1.0 are one learning rate."""
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "none"}[value]
    if isinstance(value, float) and value.is_integer() and abs(value) < 1e15:
        return str(int(value))
    return str(value)


def without(label: str, name: str) -> str:
    """The label with the hyperparameter `name` left out: what its variants in `name` have in common."""
    optimizer, _, shown = label.partition(" (")
    kept = [part for part in shown.removesuffix(")").split(", ") if part and not part.startswith(f"{name}=")]
    return f"{optimizer} ({', '.join(kept)})" if kept else optimizer


def data_set(task: str) -> str:
    """The task whose data the task of this label has: 'sst2' of 'sst2 noise 0.4' (`Config.task_label`)."""
    return task.partition(" noise ")[0]
