"""The comparisons: hand-derived values, agreement with scipy, and honest error rates in simulation."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from dsam.errors import UserError
from dsam.results import statistics
from dsam.results.statistics import compare, sign_flip_test, summarise
from dsam.results.tables.labels import without


def runs(scores: dict, model="tiny", status="finished") -> pd.DataFrame:
    """A collected frame from {(method, task): [score per seed]}."""
    rows = [
        {"model": model, "task": task, "method_label": method, "optimizer": method.split(" ")[0], "seed": seed,
         "id": f"{method}{task}{seed}", "status": status, "metric": "accuracy", "best": score, "last": score,
         "majority": 0.5}
        for (method, task), values in scores.items()
        for seed, score in enumerate(values)
    ]  # fmt: skip
    return pd.DataFrame(rows).astype({"seed": "Int64", "best": float, "last": float})


def paired(cells: dict) -> pd.Series:
    """Paired differences from {task: [one per seed]}."""
    index = [(task, seed) for task, values in cells.items() for seed in range(len(values))]
    keys = pd.MultiIndex.from_tuples(index, names=["task", "seed"]) if index else pd.MultiIndex.from_arrays(
        [[], []], names=["task", "seed"]
    )  # fmt: skip
    return pd.Series([value for values in cells.values() for value in values], index=keys, dtype=float)


def test_five_seeds_on_one_task_cannot_give_less_than_a_sixteenth():
    assert sign_flip_test(paired({"rte": [0.01, 0.02, 0.03, 0.01, 0.02]})) == (2 / 32, 0.0625)


def test_sign_flip_counts_the_patterns_at_least_as_extreme():
    # Of the 8 signed sums of 1, 2, 3 the observed 1+2-3 = 0 is beaten or met by all.
    assert sign_flip_test(paired({"rte": [0.1, 0.2, -0.3]})) == (1.0, 0.25)
    # |3+2-1| = 4: met by +-4 and +-6.
    assert sign_flip_test(paired({"rte": [0.3, 0.2, -0.1]}))[0] == 4 / 8


def test_a_zero_difference_has_no_sign_and_cannot_lower_the_smallest_p():
    assert sign_flip_test(paired({"rte": [0.1, 0.0, 0.2]})) == (0.5, 0.5)
    assert sign_flip_test(paired({"rte": [0.0, 0.0]})) == (1.0, 1.0)
    assert np.isnan(sign_flip_test(paired({}))).all()


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(-50, 50), min_size=2, max_size=9))
def test_sign_flip_agrees_with_scipy(points):
    differences = np.array(points) / 1000
    expected = stats.permutation_test(
        (differences, np.zeros_like(differences)),
        lambda x, y, axis: np.mean(x - y, axis=axis),
        permutation_type="samples", vectorized=True, n_resamples=np.inf,
    ).pvalue  # fmt: skip
    assert sign_flip_test(paired({"rte": differences}))[0] == pytest.approx(min(expected, 1))


def test_sampled_sign_flips_agree_with_enumerated_ones(monkeypatch):
    differences = {"rte": np.random.default_rng(3).normal(0.4, 1, size=14)}
    exact, _ = sign_flip_test(paired(differences))
    monkeypatch.setattr(statistics, "EXACT_CELLS", 13)
    sampled, smallest = sign_flip_test(paired(differences))
    assert sampled == pytest.approx(exact, abs=4 * np.sqrt(exact * (1 - exact) / 20_000))
    assert smallest == 2 / 2**14
    assert sign_flip_test(paired({"rte": np.ones(40)})) == (
        1 / 20_001,
        1 / 20_001,
    )  # the observed pattern counts itself


def simulated_p(effect: float, trials: int) -> np.ndarray:
    """p values for 3 tasks x 4 seeds, with differences of unit sd around `effect`."""
    generator = np.random.default_rng(0)
    draws = generator.normal(effect, 1, size=(trials, 3, 4))
    index = paired(dict(zip("abc", draws[0], strict=True))).index
    return np.array([sign_flip_test(pd.Series(cells.ravel(), index))[0] for cells in draws])


def test_without_an_effect_one_in_twenty_is_called_significant():
    assert np.mean(simulated_p(0, 4000) <= 0.05) == pytest.approx(0.05, abs=0.011)  # 3 standard errors


def test_power_is_near_that_of_the_t_test():
    noncentrality, critical = 0.8 * np.sqrt(12), stats.t.ppf(0.975, 11)
    expected = stats.nct.sf(critical, 11, noncentrality) + stats.nct.cdf(-critical, 11, noncentrality)
    assert np.mean(simulated_p(0.8, 1500) <= 0.05) == pytest.approx(expected, abs=0.06)


def test_every_task_weighs_the_same():
    assert statistics.mean_difference(paired({"rte": [0.02, 0.04], "mrpc": [0.01] * 8})) == pytest.approx(0.02)
    assert np.isnan(statistics.mean_difference(paired({})))


def test_the_interval_of_one_task_is_that_of_the_paired_t_test():
    values = [0.013, 0.002, 0.021, -0.004, 0.015]
    expected = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert statistics.t_interval(paired({"rte": values})) == pytest.approx(tuple(expected))
    low, high = statistics.t_interval(paired({"rte": [0.0, 0.1]}))  # sd 0.0707, standard error 0.05, t(1) = 12.706
    assert (low, high) == pytest.approx((0.05 - 0.6353, 0.05 + 0.6353), abs=1e-4)


def test_over_tasks_the_interval_is_that_of_welch():
    """The mean of two tasks' means is half the difference of one and the other's opposite, which is Welch's problem."""
    rte, mrpc = [0.02, 0.05, 0.01, 0.04], [0.004, 0.0, 0.003, 0.006, 0.001, 0.002]
    welch = stats.ttest_ind(rte, [-value for value in mrpc], equal_var=False).confidence_interval(0.95)
    assert statistics.t_interval(paired({"rte": rte, "mrpc": mrpc})) == pytest.approx((welch.low / 2, welch.high / 2))


def test_noise_levels_of_one_data_set_are_one_cell_a_seed():
    """Their mean by seed is what is compared, so that the same runs told twice are no more evidence than once."""
    clean, noisy = np.array([0.01, 0.03, 0.02, 0.05, 0.015]), np.array([0.04, 0.02, 0.05, 0.07, 0.06])
    levels = paired({"sst2": clean, "sst2 noise 0.4": noisy})
    by_seed = paired({"sst2": (clean + noisy) / 2})
    assert statistics.t_interval(levels) == pytest.approx(statistics.t_interval(by_seed))
    assert sign_flip_test(levels) == sign_flip_test(by_seed) == (2 / 32, 2 / 32)
    twice = paired({"sst2": clean, "sst2 noise 0.2": clean})
    assert statistics.t_interval(twice) == pytest.approx(statistics.t_interval(paired({"sst2": clean})))
    assert sign_flip_test(paired({"sst2": clean, "rte": noisy}))[1] == 2 / 2**10  # other data: other cells


def test_levels_with_other_seeds_keep_the_mean_and_have_an_interval():
    ragged = paired({"sst2": [0.01, 0.03, 0.02], "sst2 noise 0.4": [0.05, 0.01]})
    low, high = statistics.t_interval(ragged)
    assert (low + high) / 2 == pytest.approx(statistics.mean_difference(ragged)) == pytest.approx((0.02 + 0.03) / 2)
    # By hand: each level's deviations times √(n/(n-1)), over n and the two levels. Seed 0 adds 0.02 √2/4 - 0.01 √1.5/6,
    # seed 1 the same with the other sign, seed 2 nothing; the second level, with two seeds, has one degree of freedom.
    reach = stats.t.ppf(0.975, 1) * np.sqrt(2) * (0.02 * np.sqrt(2) / 4 - 0.01 * np.sqrt(1.5) / 6)
    assert high - low == pytest.approx(2 * reach)


@pytest.mark.parametrize("fewer", [2, 3])
def test_the_interval_covers_what_it_says_where_a_level_has_fewer_seeds(fewer):
    """As a sweep that is still running has it. The seeds' levels are correlated, 0.5."""
    generator = np.random.default_rng(1)
    both = generator.normal(size=(800, 5, 1)) + generator.normal(size=(800, 5, 2))
    index = paired({"sst2": both[0, :, 0], "sst2 noise 0.4": both[0, :fewer, 1]}).index
    values = [np.concatenate([draw[:, 0], draw[:fewer, 1]]) for draw in both]
    ends = np.array([statistics.t_interval(pd.Series(value, index)) for value in values])
    assert np.mean((ends[:, 0] < 0) & (ends[:, 1] > 0)) > 0.95 - 0.023  # 3 standard errors


def test_no_interval_where_nothing_is_known_of_the_spread():
    for cells in ({}, {"rte": [0.1]}, {"rte": [0.1], "mrpc": [0.1, 0.2]}, {"rte": [0.1, 0.1, 0.1]},
                  {"sst2": [0.1, 0.2], "sst2 noise 0.4": [0.3]}):  # fmt: skip
        assert np.isnan(statistics.t_interval(paired(cells))).all()


@pytest.mark.parametrize("tasks, seeds", [(1, 2), (1, 5), (3, 3)])
def test_the_interval_covers_what_it_says(tasks, seeds):
    draws = np.random.default_rng(0).normal(size=(1500, tasks, seeds)) * np.arange(1, tasks + 1)[:, None]
    index = paired(dict(zip("abc", draws[0], strict=False))).index
    ends = np.array([statistics.t_interval(pd.Series(draw.ravel(), index)) for draw in draws])
    covered = np.mean((ends[:, 0] < 0) & (ends[:, 1] > 0))
    assert covered > 0.95 - 0.017  # 3 standard errors; with tasks of unequal spread it may cover more
    assert tasks > 1 or covered < 0.95 + 0.017


def test_worse_than_the_best_is_a_paired_one_sided_t_test_corrected_over_the_others():
    # Below a by 2, 3, 4, 3: t = 3 / (0.816 / 2) = 7.35 with 3 degrees of freedom; p = 0.0026.
    scores = pd.DataFrame({"a": [10, 20, 30, 40.0], "b": [8, 17, 26, 37.0], "c": [9, 25, 25, 38.0], "none": np.nan})
    assert statistics.worse_than_best(scores).to_dict() == {"a": False, "b": True, "c": False, "none": False}
    p = stats.ttest_rel(scores["b"], scores["a"], alternative="less").pvalue
    assert statistics.worse_than_best(scores, level=2 * p * 1.01)["b"]
    assert not statistics.worse_than_best(scores, level=2 * p * 0.99)["b"]


def test_fewer_than_three_pairs_with_the_best_show_nothing():
    scores = pd.DataFrame({"a": [0.9, 0.9, 0.9, np.nan], "b": [0.1, 0.1, np.nan, np.nan], "c": [0.1, 0.1, 0.1, 0.1]})
    assert statistics.worse_than_best(scores).to_dict() == {"a": False, "b": False, "c": True}
    assert not statistics.worse_than_best(pd.DataFrame({"a": [np.nan], "b": [np.nan]})).any()


@pytest.mark.parametrize("seeds", [3, 5])
def test_a_best_method_is_called_worse_in_at_most_one_table_of_twenty(seeds):
    # All five are equal, so each is a best one; the first stands for them. 3 standard errors above 5 %.
    draws = np.random.default_rng(0).normal(size=(600, seeds, 5))
    assert np.mean([statistics.worse_than_best(pd.DataFrame(draw))[0] for draw in draws]) < 0.05 + 0.027


def test_effect_size_and_probability_of_improvement_by_hand():
    assert statistics.effect_size(paired({"rte": [1, 2], "mrpc": [3]})) == 2  # mean 2, sd 1
    assert np.isnan(statistics.effect_size(paired({"rte": [1, 1]})))
    # rte: of 4 pairs 2 win, 1 ties; mrpc: all win.
    share = statistics.probability_of_improvement({"rte": [2, 3], "mrpc": [9]}, {"rte": [1, 3], "mrpc": [1]})
    assert share == pytest.approx(((1 + 1 + 0.5 + 0) / 4 + 1) / 2)


def test_equal_differences_have_no_effect_size_however_they_round():
    """Two answers of 872 more in each of three seeds, at other levels."""
    differences = np.array([(k + 2) / 872 - k / 872 for k in (301, 560, 790)])
    assert np.ptp(differences) > 0  # by rounding alone
    assert np.isnan(statistics.effect_size(paired({"sst2": differences})))


def test_average_ranks_use_the_tasks_that_all_have():
    means = pd.DataFrame(
        {"adamw": [0.6, 0.8, 0.7], "sam": [0.7, 0.8, None], "never": [None] * 3}, index=["rte", "mrpc", "cola"]
    ).astype(float)
    ranks = statistics.average_ranks(means)
    assert ranks["adamw"] == (2 + 1.5) / 2 and ranks["sam"] == (1 + 1.5) / 2 and np.isnan(ranks["never"])


def test_summary_by_hand():
    frame = runs({("sam", "rte"): [0.6, 0.7, 0.5, 0.9, np.nan]})
    frame.loc[3, "status"] = "diverged"
    row = summarise(frame).iloc[0]
    assert row["mean"] == pytest.approx(0.6) and row["sd"] == pytest.approx(0.1) and row["median"] == 0.6
    assert (row["expected"], row["count"], row["diverged"], row["no_score"], row["degenerate"]) == (5, 3, 1, 1, 1)
    assert summarise(frame.assign(last=0.9), "last").iloc[0]["degenerate"] == 0  # of the epoch that is shown


def test_compare_pairs_by_seed_and_names_what_has_no_pair():
    frame = runs({("adamw", "rte"): [0.6, 0.5, 0.7], ("sam", "rte"): [0.7, 0.8, 0.71, 0.9]})
    frame.loc[frame["id"] == "samrte1", "status"] = "failed"
    row = compare(frame).set_index("method").loc["sam"]
    assert row["difference"] == pytest.approx((0.1 + 0.01) / 2) and row["pairs"] == 2
    assert row["missing_pairs"] == "rte seed 1: sam failed; rte seed 3: adamw not planned"
    assert row["p"] == row["smallest_p"] == 0.5


def test_holm_corrects_over_the_methods_of_a_model():
    up = [0.61, 0.62, 0.63, 0.64, 0.65, 0.66]
    base = [0.60] * 6
    frame = runs({("adamw", "rte"): base, ("sam", "rte"): up, ("asam", "rte"): [0.61, 0.59, 0.62, 0.58, 0.6, 0.6]})
    rows = compare(frame).set_index("method")
    assert rows.loc["sam", "p"] == 2 / 64 and rows.loc["sam", "p_holm"] == 4 / 64
    assert rows.loc["asam", "p_holm"] == rows.loc["asam", "p"] == 1
    assert np.isnan(rows.loc["adamw", "p_holm"]) and rows.loc["sam", "average_rank"] == 1


def test_an_ambiguous_baseline_compares_nothing():
    frame = runs({("adamw (lr=1)", "rte"): [0.6], ("adamw (lr=2)", "rte"): [0.6], ("sam", "rte"): [0.7]})
    assert compare(frame)["difference"].isna().all()
    named = compare(frame, baseline="adamw (lr=2)").set_index("method")
    assert named.loc["sam", "difference"] == pytest.approx(0.1)


def test_a_label_without_a_hyperparameter():
    assert without("sam (rho=0.1)", "rho") == without("sam", "rho") == "sam"
    assert without("dsam (betas=[0.9, 0.99], rho=0.1, weighting=probe)", "rho") == (
        "dsam (betas=[0.9, 0.99], weighting=probe)"
    )


def test_adamw_2x_is_no_variant_of_adamw():
    assert statistics.baseline_label(["adamw_2x", "adamw (lr=1)"], "adamw") == "adamw (lr=1)"


def test_no_score_at_all_compares_nothing():
    rows = compare(runs({("adamw", "rte"): [0.6, 0.7], ("sam", "rte"): [0.6, 0.7]}, status="failed"))
    assert rows["difference"].isna().all() and rows["average_rank"].isna().all()


def test_two_runs_in_one_cell_are_an_error_that_names_them():
    frame = pd.concat([runs({("sam", "rte"): [0.6]}), runs({("sam", "rte"): [0.7]})], ignore_index=True)
    with pytest.raises(UserError, match="2 runs share tiny, rte, sam, seed 0"):
        summarise(frame)


def test_scores_by_different_metrics_are_not_compared():
    frame = runs({("adamw", "rte"): [0.6, 0.7], ("sam", "rte"): [0.7, 0.8]})
    frame.loc[frame["method_label"] == "sam", "metric"] = "f1"
    with pytest.raises(UserError, match="tiny, rte: some runs were scored by accuracy, others by f1"):
        compare(frame)
