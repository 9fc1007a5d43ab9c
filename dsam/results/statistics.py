"""Comparisons that hold with few seeds: paired by seed, pooled over tasks, corrected over methods."""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from scipy.special import stdtr, stdtrit
from scipy.stats import rankdata
from statsmodels.stats.multitest import multipletests

from dsam.errors import UserError
from dsam.results.tables.labels import data_set

EXACT_CELLS = 16  # up to 2^16 sign patterns are enumerated
MINIMUM_PAIRS = 3  # fewer say nothing of the spread of a paired difference
ROUNDING = 1e-12  # of scores, which are fractions: a spread below it is none
STATUSES = ["diverged", "failed", "missing", "damaged"]
Cells = Mapping[str, Sequence[float]]  # task -> one value per seed; paired differences are a series by task and seed


def scored(frame: pd.DataFrame, which: str = "best") -> pd.DataFrame:
    """The runs that count in a mean, with their `score`: finished, and a score recorded at the `which` epoch.

    Raises UserError where two of them claim the same cell (model, task, method, seed), or a task has two metrics.
    """
    runs = frame.assign(score=frame[which])[(frame["status"] == "finished") & frame[which].notna()]
    cell = ["model", "task", "method_label", "seed"]
    twice = runs[runs.duplicated(cell, keep=False)]
    if len(twice):
        first = twice.iloc[0]
        same = twice[(twice[cell] == first[cell]).all(axis=1)]
        raise UserError(
            f"{len(same)} runs share {first.model}, {first.task}, {first.method_label}, seed {first.seed} "
            f"({', '.join(same['id'])}): collect one experiment, or move the older runs away; runs that differ in "
            "seeds.init or seeds.data need a seed of their own each"
        )
    for (model, task), measured in runs.groupby(["model", "task"])["metric"].unique().items():
        if len(measured) > 1:
            raise UserError(
                f"{model}, {task}: some runs were scored by {measured[0]}, others by {measured[1]}, which do not "
                "compare: collect one experiment, or move the older runs away"
            )
    return runs


def methods(frame: pd.DataFrame, baseline: str = "adamw") -> list[str]:
    """The method labels in the order of the runs, the baseline first."""
    labels = frame["method_label"].unique()
    return sorted(labels, key=lambda label: label != baseline_label(labels, baseline))


def baseline_label(labels: Sequence[str], baseline: str) -> str | None:
    """The label that `baseline` means: itself, or the only variant of that optimizer; None if there's no one such."""
    variants = [label for label in labels if label == baseline or label.startswith(f"{baseline} (")]
    return baseline if baseline in variants else variants[0] if len(variants) == 1 else None


def summarise(frame: pd.DataFrame, which: str = "best") -> pd.DataFrame:
    """Per model, task and method: mean, sd (ddof 1), median and range of the scores, and what became of the runs.

    `expected` runs split into `count` with a score, `no_score` (finished, none recorded), and one count for each
    other status; `degenerate` ones, whose score is no better than the majority answer, are among `count`.
    """
    key = ["model", "task", "method_label"]
    counted = scored(frame, which)
    scores = counted.groupby(key, sort=False)["score"]
    runs = frame.groupby(key, sort=False)
    summary = pd.DataFrame({"metric": runs["metric"].first(), "majority": runs["majority"].first()})
    summary["expected"] = runs.size()
    summary["count"] = scores.size()
    for name in ("mean", "std", "median", "min", "max"):
        summary[{"std": "sd"}.get(name, name)] = getattr(scores, name)()
    stuck = counted[counted["score"] <= counted["majority"] + ROUNDING]
    summary["degenerate"] = stuck.groupby(key).size()
    for status in STATUSES:
        summary[status] = (frame["status"] == status).groupby([frame[name] for name in key], sort=False).sum()
    summary["count"] = summary["count"].fillna(0).astype(int)
    summary["degenerate"] = summary["degenerate"].fillna(0).astype(int)
    summary["no_score"] = summary["expected"] - summary["count"] - summary[STATUSES].sum(axis=1)
    return summary.reset_index()


def mean_difference(differences: pd.Series) -> float:
    """The mean over tasks of the mean over seeds: every task weighs the same, however many seeds it has."""
    if differences.index.nlevels == 1:
        return float(differences.mean())
    return float(differences.groupby("task").mean().mean())


def _tasks(differences: pd.Series) -> tuple[np.ndarray, np.ndarray]:
    """The number of each difference's task, and that of each task's data set; one task where it has seeds alone."""
    if differences.index.nlevels == 1:
        return np.zeros(len(differences), dtype=int), np.zeros(1, dtype=int)
    task, names = pd.factorize(differences.index.get_level_values("task"))
    return task, pd.factorize(np.array([data_set(name) for name in names], dtype=object))[0]


def _blocks(differences: pd.Series) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What each independent block of paired runs adds to `mean_difference`; how far that is from what its tasks add on
    average, widened so that its squares estimate a variance; and the number of its data set. A block each.

    A block is a seed on one data set: on another level of label noise the same seed has the same order of examples, new
    head and dropout, so that its differences there tell the same thing again.
    """
    task, sets_of_tasks = _tasks(differences)
    sets = sets_of_tasks[task]
    seed, seeds = pd.factorize(differences.index.get_level_values("seed" if differences.index.nlevels > 1 else 0))
    values, runs = differences.to_numpy(dtype=float), np.bincount(task)
    share = runs[task] * len(sets_of_tasks)
    widening = np.sqrt(runs / np.maximum(runs - 1, 1))[task]
    deviation = (values - (np.bincount(task, values) / runs)[task]) * widening / share
    blocks, block = np.unique(sets * len(seeds) + seed, return_inverse=True)
    return np.bincount(block, values / share), np.bincount(block, deviation), blocks // len(seeds)


def t_interval(differences: pd.Series, level: float = 0.95) -> tuple[float, float]:
    """Student's interval of `mean_difference`, seeds being what is drawn; data sets are independent of each other.

    On one task it is that of the paired t-test. Over tasks the variances of their means add up, with the degrees of
    freedom of Welch (1947) and Satterthwaite (1946); noise levels of one data set have theirs by seed (see `_blocks`),
    and where they have unequally many, the degrees of freedom of the level with the fewest.
    It covers what it says with few seeds, where differences are about normal. A percentile bootstrap would not: with
    5 seeds of one task its 95 % interval covers about 84 %, and with 2 about half.

    NaN where some task has a single pair, or no pair differs from another: nothing is known of the spread then.
    """
    if not len(differences):
        return np.nan, np.nan
    task, sets_of_tasks = _tasks(differences)
    runs = np.bincount(task)
    free = np.array([runs[sets_of_tasks == number].min() - 1 for number in range(sets_of_tasks.max() + 1)])
    if free.min() < 1:
        return np.nan, np.nan
    _, deviations, sets = _blocks(differences)
    variances = np.bincount(sets, np.square(deviations))
    total = variances.sum()
    if total < ROUNDING**2:
        return np.nan, np.nan
    freedom = total**2 / (variances**2 / free).sum()
    reach = float(stdtrit(freedom, (1 + level) / 2) * np.sqrt(total))
    middle = mean_difference(differences)
    return middle - reach, middle + reach


def sign_flip_test(differences: pd.Series, resamples: int = 20_000, seed: int = 0) -> tuple[float, float]:
    """Two-sided p that `mean_difference` is 0, and the smallest p that these cells could have given.

    If the method did nothing, each paired difference could as well have had the other sign; those of one seed on
    several noise levels of a data set change theirs together (see `_blocks`). All 2^n sign patterns are enumerated for
    up to 16 cells that are not zero (a zero has no sign); beyond, `resamples` are drawn and the observed pattern is
    counted among them: p = (1 + extreme) / (1 + resamples).
    """
    if not len(differences):
        return np.nan, np.nan
    cells, _, _ = _blocks(differences)
    cells = cells[cells != 0]
    if not len(cells):
        return 1.0, 1.0
    # A pattern that ties with the observed one must count, though its sum may differ in the last bits.
    threshold = abs(cells.sum()) - 1e-10 * np.abs(cells).sum()
    smallest = 2.0 ** (1 - len(cells))
    if len(cells) <= EXACT_CELLS:
        patterns = (np.arange(2 ** len(cells))[:, None] >> np.arange(len(cells))) & 1
        return float(np.mean(np.abs((2 * patterns - 1) @ cells) >= threshold)), smallest
    generator = np.random.default_rng(seed)
    extreme = 0
    for drawn in [1000] * (resamples // 1000) + [resamples % 1000]:
        patterns = generator.integers(2, size=(drawn, len(cells)), dtype=np.int8)
        extreme += int(np.count_nonzero(np.abs((2.0 * patterns - 1) @ cells) >= threshold))
    return (1 + extreme) / (1 + resamples), max(smallest, 1 / (1 + resamples))


def worse_than_best(scores: pd.DataFrame, level: float = 0.05) -> pd.Series:
    """Which methods are significantly worse than the one with the best mean; scores are seeds x methods, NaN: no run.

    One-sided paired t-test over the seeds that a method shares with the best, Bonferroni-corrected over the others.
    So the method with the best expected score is among the rest with probability 1 - level, although the best of the
    table was picked by these scores (multiple comparisons with the best, Hsu 1981), if differences are about normal.
    With fewer than 3 pairs nothing is called worse. What assumes less cannot serve on one task: a sign-flip test needs
    6 pairs to reach p < 0.05.
    """
    means = scores.mean().dropna()
    worse = pd.Series(False, index=scores.columns)
    for method in means.index.drop(means.idxmax()) if len(means) else []:
        paired = (scores[method] - scores[means.idxmax()]).dropna().to_numpy()
        if len(paired) < MINIMUM_PAIRS:
            continue
        if np.ptp(paired) < ROUNDING:  # every seed says the same
            worse[method] = paired[0] < -ROUNDING
        else:
            t = paired.mean() / (paired.std(ddof=1) / np.sqrt(len(paired)))
            p = stdtr(len(paired) - 1, t)  # P(T <= t)
            worse[method] = p * (len(means) - 1) <= level
    return worse


def effect_size(differences: pd.Series) -> float:
    """Cohen's d of the pooled paired differences: their mean over their standard deviation (ddof 1).

    NaN where they have no spread but that of rounding.
    """
    spread = differences.std(ddof=1) if len(differences) > 1 else 0
    return float(differences.mean() / spread) if spread > ROUNDING else np.nan


def probability_of_improvement(method: Cells, baseline: Cells) -> float:
    """P(a run of the method beats a run of the baseline on the same task), ties half, averaged over tasks.

    Agarwal et al. 2021, "Deep Reinforcement Learning at the Edge of the Statistical Precipice" (rliable).
    """
    shares = []
    for task in [task for task in method if task in baseline]:
        difference = np.subtract.outer(np.asarray(method[task]), np.asarray(baseline[task]))
        shares.append(np.mean((difference > 0) + 0.5 * (difference == 0)))
    return float(np.mean(shares)) if shares else np.nan


def average_ranks(means: pd.DataFrame) -> pd.Series:
    """Mean over tasks of each method's rank (1 is best, ties share) by its mean score; tasks x methods.

    Only tasks that every method with any score has: a rank among fewer methods is another quantity.
    """
    complete = means.dropna(axis=1, how="all").dropna(axis=0)
    if not len(complete):
        return pd.Series(np.nan, index=means.columns)
    ranks = rankdata(-complete.to_numpy().round(12), axis=1).mean(axis=0)  # what differs by rounding alone is a tie
    return pd.Series(ranks, index=complete.columns).reindex(means.columns)


def compare(frame: pd.DataFrame, baseline: str = "adamw", which: str = "best") -> pd.DataFrame:
    """Each method against the baseline of the same model, paired by task and seed; one row per model and method.

    Columns: difference, low, high (95 %), p, p_holm (over the model's methods), smallest_p, tasks, pairs,
    effect_size, probability_of_improvement, average_rank, missing_pairs (which cells are left out, and why).
    The baseline's own row has only its rank; if a model has no one baseline, that is all its methods have.
    """
    rows = []
    for model, runs in frame.groupby("model", sort=False):
        labels = methods(runs, baseline)
        reference = baseline_label(labels, baseline)
        scores = scored(runs, which).pivot(index=["task", "seed"], columns="method_label", values="score")
        scores = scores.reindex(columns=labels)
        ranks = average_ranks(scores.groupby("task").mean())
        group = [
            {"model": model, "method": label, "average_rank": ranks[label]}
            | ({} if reference in (None, label) else _comparison(runs, scores, label, reference))
            for label in labels
        ]
        tested = [row for row in group if not np.isnan(row.get("p", np.nan))]
        if tested:
            corrected = multipletests([row["p"] for row in tested], method="holm")[1]
            for row, p in zip(tested, corrected, strict=True):
                row["p_holm"] = float(p)
        rows += group
    columns = ["model", "method", "difference", "low", "high", "p", "p_holm", "smallest_p", "tasks", "pairs",
               "effect_size", "probability_of_improvement", "average_rank", "missing_pairs"]  # fmt: skip
    return pd.DataFrame(rows, columns=columns).astype({"tasks": "Int64", "pairs": "Int64"})


def compare_by_task(runs: pd.DataFrame, baseline: str = "adamw", which: str = "best") -> dict[str, pd.DataFrame]:
    """`compare` on each task by itself, of one model's runs: {task: its rows that have a difference}.

    p_holm is corrected over the methods of one task. Tasks without a spread (one pair of each method) are left out.
    """
    found = {task: compare(own, baseline, which) for task, own in runs.groupby("task", sort=False)}
    found = {task: comparison.dropna(subset="difference") for task, comparison in found.items()}
    return {task: comparison for task, comparison in found.items() if comparison["low"].notna().any()}


def pairs_left_out(comparison: pd.DataFrame) -> list[str]:
    """Each cell that has no pair with the baseline in one model's rows of `compare`, with what became of the run that
    it lacks: "rte seed 1: sam diverged"."""
    lists = comparison["missing_pairs"].dropna()
    return list(dict.fromkeys(pair for pairs in lists for pair in pairs.split("; ") if pair))


def not_compared(runs: pd.DataFrame, baseline: str = "adamw", which: str = "best") -> dict[str, str]:
    """The tasks of one model's runs that `compare_by_task` leaves out: {task: why}."""
    compared, reasons = compare_by_task(runs, baseline, which), {}
    for task, own in runs.groupby("task", sort=False):
        if task not in compared:
            pairs = compare(own, baseline, which)["pairs"].fillna(0).max()
            alike = f"no two of its {pairs} pairs differ" if pairs > 1 else "a single pair"
            reasons[str(task)] = alike if pairs else f"no pair with {baseline}"
    return reasons


def paired_difference(scores: pd.Series, others: pd.Series) -> dict:
    """What two methods' scores by task and seed say of their difference, over the cells that both have."""
    found = (scores - others).dropna()
    low, high = t_interval(found)
    tasks = found.index.get_level_values("task").nunique()
    return {"difference": mean_difference(found), "low": low, "high": high, "tasks": tasks, "pairs": len(found)}


def _comparison(runs: pd.DataFrame, scores: pd.DataFrame, label: str, reference: str) -> dict:
    paired = (scores[label] - scores[reference]).dropna()
    p, smallest = sign_flip_test(paired)
    by_task = [
        {task: values.to_numpy() for task, values in scores[name].dropna().groupby("task")}
        for name in (label, reference)
    ]
    return {
        **paired_difference(scores[label], scores[reference]),
        "p": p,
        "smallest_p": smallest,
        "effect_size": effect_size(paired),
        "probability_of_improvement": probability_of_improvement(*by_task),
        "missing_pairs": "; ".join(_missing_pairs(runs, scores, label, reference)),
    }


def _missing_pairs(runs: pd.DataFrame, scores: pd.DataFrame, label: str, reference: str) -> list[str]:
    """Every cell that was meant for either method and has no pair, with what became of the run that it lacks."""
    fates = {(run.method_label, run.task, run.seed): run.status for run in runs.itertuples()}
    has_score = scores.stack().dropna()
    missing = []
    for task, seed in dict.fromkeys(cell[1:] for cell in fates if cell[0] in (label, reference)):
        for name in (label, reference):
            if (task, seed, name) not in has_score.index:
                fate = fates.get((name, task, seed), "not planned").replace("finished", "without score")
                missing.append(f"{task} seed {seed}: {name} {fate}")
    return missing
