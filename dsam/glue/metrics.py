"""The metrics of GLUE and SuperGLUE, the one figure that an average takes from each task, and the best constant."""

import math
import warnings
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from ..task import Task


def predictions(task: Task, logits: np.ndarray) -> np.ndarray:
    """Answers from a head's outputs, shape (N, num_labels): label numbers (N,), or scores (N,) as they are."""
    logits = np.asarray(logits)
    if logits.ndim != 2 or logits.shape[1] != task.num_labels:
        raise ValueError(f"{task.name}: logits must have shape (N, {task.num_labels}), got {logits.shape}")
    return logits[:, 0] if task.regression else logits.argmax(axis=1)


def compute(task: Task, predictions: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """The task's metrics in [-1, 1] for predictions and labels of shape (N,).

    NaN where a metric is undefined: no example, a constant or non-finite side of a correlation, F1 of a class that is
    in neither side. Matthews correlation of a constant answer is 0 by scikit-learn's, and so GLUE's, convention.
    """
    predictions, labels = np.asarray(predictions), np.asarray(labels)
    if predictions.shape != labels.shape or labels.ndim != 1:
        raise ValueError(f"predictions {predictions.shape} and labels {labels.shape} must both have shape (N,)")
    if len(labels) == 0:
        return {name: float("nan") for name in task.metrics}
    functions = _functions()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return {name: float(functions[name](predictions, labels)) for name in task.metrics}


def headline(
    task: Task, metrics_by_split: Mapping[str, Mapping[str, float]], splits: Sequence[str] | None = None
) -> float:
    """The task's score: the mean of the metrics that count, and over MNLI's two sets (or over `splits`)."""
    splits = task.evaluation if splits is None else splits
    return float(np.mean([[metrics_by_split[split][name] for name in task.scored_by] for split in splits]))


def headline_name(task: Task) -> str:
    """What `headline` is, in words for a table's head."""
    name = " and ".join(task.scored_by)
    name = name if len(task.scored_by) == 1 else f"mean of {name}"
    return name if len(task.evaluation) == 1 else f"{name}, mean of {' and '.join(task.evaluation)}"


def majority(task: Task, labels_by_split: Mapping[str, np.ndarray]) -> float:
    """The headline of the best constant answer on these evaluation labels, by split.

    0.0 for a regression by definition: a constant has no correlation, and one that is no better than chance has 0. An
    answer whose headline is undefined, as F1 of a class that is not there, is passed over; NaN where all are.
    """
    if task.regression:
        return 0.0
    scores = [
        headline(
            task,
            {
                split: compute(task, np.full_like(labels_by_split[split], answer), labels_by_split[split])
                for split in task.evaluation
            },
        )
        for answer in range(task.num_labels)
    ]
    return max((score for score in scores if not math.isnan(score)), default=math.nan)


def _correlation(function, predictions: np.ndarray, labels: np.ndarray) -> float:
    if len(labels) < 2 or not (np.isfinite(predictions).all() and np.isfinite(labels).all()):
        return float("nan")
    # float64: the sums of SciPy in float32 lose digits that a table shows.
    return function(predictions.astype(np.float64), labels.astype(np.float64)).statistic


def _functions() -> dict[str, Callable[[np.ndarray, np.ndarray], float]]:
    """Name -> its function of predictions and labels. Imported when called: a plan needs none, and pays a second."""
    from scipy import stats
    from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

    return {
        "accuracy": lambda predictions, labels: accuracy_score(labels, predictions),
        "f1": lambda predictions, labels: f1_score(labels, predictions, zero_division=np.nan),
        "f1_macro": lambda predictions, labels: f1_score(labels, predictions, average="macro", zero_division=np.nan),
        "matthews_correlation": lambda predictions, labels: matthews_corrcoef(labels, predictions),
        "pearson": lambda predictions, labels: _correlation(stats.pearsonr, predictions, labels),
        "spearman": lambda predictions, labels: _correlation(stats.spearmanr, predictions, labels),
    }
