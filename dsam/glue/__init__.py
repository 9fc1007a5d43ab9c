"""GLUE as data: the table of tasks, readers for three sources, token ids in a cache, and the metrics."""

from .metrics import compute, headline, headline_name, majority, predictions
from .readers import SOURCES, Splits, fingerprint, load
from .split import Split
from .tasks import TASKS, Task, get_task
from .tokenising import Tokenised, tokenise

__all__ = [
    "SOURCES",
    "TASKS",
    "Split",
    "Splits",
    "Task",
    "Tokenised",
    "compute",
    "fingerprint",
    "get_task",
    "headline",
    "headline_name",
    "load",
    "majority",
    "predictions",
    "tokenise",
]
