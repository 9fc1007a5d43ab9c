"""Pairs of runs that differ in more than the method: in the machine, the data, the weights that they began with, the
labels that were made wrong or the padding."""

from collections.abc import Iterator

import pandas as pd

from dsam.results.collect import SEVERAL
from dsam.results.statistics import baseline_label

UNLIKE = {
    "machine": "on two machines, which round otherwise and, where one is a GPU, draw other dropout masks",
    "data": "with two versions of the data",
    "weights": "from two versions of the model's weights",
    "noise": "with other wrong labels, or more of them in the held-out part",
    "padding": "with padding and without it, and so with other dropout masks",
}


def unlike_pairs(own: pd.DataFrame, reference: str | None) -> Iterator[tuple[str, pd.Series, pd.Series]]:
    """What one model's pairs with the method `reference` differ in: its words, and per method how many do, of how many.

    `own`: scored runs of one model, a row each, with the columns of `UNLIKE`.
    """
    theirs = own[own["method_label"] == reference].set_index(["task", "seed"])[list(UNLIKE)]
    pairs = own[own["method_label"] != reference].join(theirs.add_suffix(" there"), on=["task", "seed"])
    for what, words in UNLIKE.items():
        here, there = pairs[what], pairs[f"{what} there"]
        other = here.notna() & there.notna() & ((here != there) | (here == SEVERAL))
        yield (
            words,
            pairs[other].groupby("method_label", sort=False).size(),
            pairs[there.notna()].groupby("method_label").size(),
        )


def unlike_notes(runs: pd.DataFrame, baseline: str) -> list[str]:
    """A note on each model of whose pairs with `baseline` the two runs differ in more than the method."""
    notes = []
    for model, own in runs.groupby("model", sort=False):
        for words, unlike, counts in unlike_pairs(own, baseline_label(own["method_label"].unique(), baseline)):
            if len(unlike):
                told = ", ".join(f"{method} {count} of {counts[method]}" for method, count in unlike.items())
                notes.append(f"{model}: of these pairs with {baseline} the two runs ran {words}: {told}.")
    return notes
