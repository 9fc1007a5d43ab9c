"""Every method beside every other one: whether a gain over the baseline is also one over the method next to it."""

import pandas as pd

from dsam.results.statistics import methods, paired_difference, scored
from dsam.results.tables.formatting import DASH, interval
from dsam.results.tables.rendering import Table
from dsam.results.tables.unlike import UNLIKE, unlike_pairs

LEAST = 3  # methods; of two the main table says it all
SEEDS = 2  # of one run each no spread is known, and a difference alone says nothing
MARK = "†"


def pairwise_table(frame: pd.DataFrame, which: str, baseline: str, notes: list[str]) -> Table | None:
    """A row per model and method, a column per method that it is compared with; `values` have a row per ordered pair.

    Methods with a run on several seeds of some task; None where no model has three such. `notes` go before its own.
    """
    runs = scored(frame, which)
    values, text, marked, cells_of = [], [], set(), set()
    order = methods(frame, baseline)
    for model, own in runs.groupby("model", sort=False):
        seeds = own.groupby(["method_label", "task"]).size().groupby("method_label").max()
        labels = [label for label in order if seeds.get(label, 0) >= SEEDS]
        if len(labels) < LEAST:
            continue
        scores = own.pivot(index=["task", "seed"], columns="method_label", values="score")
        found: dict[tuple[str, str], dict] = {}
        for method in labels:
            unlike = list(unlike_pairs(own, method))
            shown = {"model": model, "method": method}
            for other in labels:
                if method == other:
                    continue
                differ = {words for words, several, _ in unlike if other in several.index}
                if (other, method) in found:
                    row = _mirrored(found[other, method])
                else:
                    row = found[method, other] = paired_difference(scores[method], scores[other])
                    cells_of.add((model, frozenset(scores[[method, other]].dropna().index)))
                values.append({"model": model, "method": method, "other": other} | row | {"unlike": bool(differ)})
                shown[f"− {other}"] = interval(pd.Series(row)) + (f" {MARK}" if differ else "")
                marked |= differ
            text.append(shown)
    if not values:
        return None
    shown = pd.DataFrame(text, columns=["model", "method", *(f"− {label}" for label in order)], dtype=object)
    shown = shown.fillna(DASH)
    shown = shown.drop(columns=[column for column in shown.columns[2:] if (shown[column] == DASH).all()])
    pairs = len(values) // 2
    own_notes = [
        "A cell is the row's method minus the column's: the mean over tasks of the differences paired by seed, ×100, "
        f"with 95 % t-interval. The intervals of {pairs} pairs of methods are not corrected for their number: if no "
        "method differed, one in twenty would still leave out 0.",
        *(f"{MARK}: of some of these pairs the two runs ran {words}." for words in UNLIKE.values() if words in marked),
    ]
    if len(cells_of) > shown["model"].nunique():
        own_notes.append(
            "The cells are not all over the same tasks and seeds (the CSV has their numbers), so that they do not add "
            "up and do not order the methods."
        )
    if alone := [label for label in order if label not in set(shown["method"])]:
        own_notes.append(f"Left out, with fewer than {SEEDS} seeds on every task: {', '.join(alone)}.")
    caption = f"Every method minus every other one ({which} epoch)"
    table = Table("pairwise", caption, [*notes, *own_notes], pd.DataFrame(values), shown)
    return table.without_single_model()


def _mirrored(row: dict) -> dict:
    return row | {name: 0.0 - row[of] for name, of in (("difference", "difference"), ("low", "high"), ("high", "low"))}
