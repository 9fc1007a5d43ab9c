"""Tasks as data: readers for three sources, label noise, token ids in a cache, and the metrics."""

from .metrics import compute, headline, headline_name, majority, predictions
from .noise import noisy
from .readers import SOURCES, Splits, fingerprint, load
from .split import Split
from .tokenising import Tokenised, tokenise

__all__ = [
    "SOURCES",
    "Split",
    "Splits",
    "Tokenised",
    "compute",
    "fingerprint",
    "headline",
    "headline_name",
    "load",
    "majority",
    "noisy",
    "predictions",
    "tokenise",
]
