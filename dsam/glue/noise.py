"""Wrong labels on purpose: the same ones for every method."""

import random
from dataclasses import replace

import numpy as np

from ..task import Task
from .tokenising import Tokenised


def noisy(task: Task, examples: Tokenised, share: float, seed: int) -> Tokenised:
    """`examples` with `share` of their labels wrong; `clean_labels` keeps the true ones.

    A chosen example gets another label, each of them equally likely; in a regression the scores of the chosen ones go
    round among them in a random order. More noise with the same seed chooses the same examples and further ones. It
    draws from `random.random()` alone, whose sequence Python guarantees.

    Args:
        share: in [0, 1]; round(share * N) examples are chosen.
    """
    if examples.labels is None:
        raise ValueError(f"{task.name}: these examples have no labels that could be made wrong")
    chosen, labels = _order(len(examples), seed)[: round(share * len(examples))], examples.labels.copy()
    if task.regression:
        labels[chosen] = np.roll(labels[chosen], 1)
    else:
        draw = random.Random(f"{seed} labels").random
        apart = np.array([1 + int(draw() * (task.num_labels - 1)) for _ in chosen], dtype=labels.dtype)
        labels[chosen] = (labels[chosen] + apart) % task.num_labels
    return replace(examples, labels=labels, clean_labels=examples.labels)


def _order(examples: int, seed: int) -> np.ndarray:
    draw = random.Random(f"{seed} examples").random
    return np.argsort(np.array([draw() for _ in range(examples)]), kind="stable")
