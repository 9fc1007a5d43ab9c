"""Metrics against values derived by hand and against NumPy's own formulas."""

import math
import warnings

import numpy as np
import pytest

from dsam.glue import compute, headline, headline_name, majority, predictions
from dsam.task import get_task

# 3 true positives, 1 false positive, 2 false negatives, 4 true negatives
LABELS = np.array([1, 1, 1, 0, 1, 1, 0, 0, 0, 0])
ANSWERS = np.array([1, 1, 1, 1, 0, 0, 0, 0, 0, 0])


def test_classification_metrics_equal_their_definitions():
    matthews = (3 * 4 - 1 * 2) / math.sqrt((3 + 1) * (3 + 2) * (4 + 1) * (4 + 2))
    assert compute(get_task("cola"), ANSWERS, LABELS) == {"matthews_correlation": pytest.approx(matthews, abs=1e-12)}
    assert compute(get_task("rte"), ANSWERS, LABELS) == {"accuracy": pytest.approx(0.7)}
    expected = {"accuracy": pytest.approx(0.7), "f1": pytest.approx(2 * 3 / (2 * 3 + 1 + 2))}
    assert compute(get_task("mrpc"), ANSWERS, LABELS) == expected
    assert compute(get_task("qqp"), ANSWERS, LABELS) == expected


def test_three_class_matthews_correlation_equals_the_covariance_formula():
    random = np.random.default_rng(0)
    labels, answers = random.integers(0, 3, 200), random.integers(0, 3, 200)
    answers[:90] = labels[:90]
    one_hot = np.eye(3)

    def covariance(a, b):
        return ((one_hot[a] - one_hot[a].mean(0)) * (one_hot[b] - one_hot[b].mean(0))).sum()

    expected = covariance(labels, answers) / math.sqrt(covariance(labels, labels) * covariance(answers, answers))
    assert compute(get_task("ax"), answers, labels)["matthews_correlation"] == pytest.approx(expected, abs=1e-12)


def test_correlations_equal_their_definitions_with_ties():
    scores = np.array([0.0, 1.0, 2.0, 2.0, 5.0], dtype=np.float32)
    answers = np.array([0.5, 0.5, 3.0, 1.0, 4.0], dtype=np.float32)
    got = compute(get_task("stsb"), answers, scores)
    assert got["pearson"] == pytest.approx(np.corrcoef(answers, scores)[0, 1], abs=1e-12)
    # ranks by hand, ties share their mean rank
    assert got["spearman"] == pytest.approx(np.corrcoef([1.5, 1.5, 4, 3, 5], [1, 2, 3.5, 3.5, 5])[0, 1], abs=1e-12)


@pytest.mark.parametrize(
    ("name", "answers", "labels", "undefined"),
    [
        ("stsb", [1.0, 1.0, 1.0], [1.0, 2.0, 3.0], {"pearson", "spearman"}),
        ("stsb", [1.0, 2.0, 3.0], [2.0, 2.0, 2.0], {"pearson", "spearman"}),
        ("stsb", [1.0, np.nan, 3.0], [1.0, 2.0, 3.0], {"pearson", "spearman"}),
        ("stsb", [1.0, np.inf, 3.0], [1.0, 2.0, 3.0], {"pearson", "spearman"}),
        ("stsb", [1.0], [1.0], {"pearson", "spearman"}),
        ("mrpc", [0, 0], [0, 0], {"f1"}),
        ("mrpc", [0, 0], [0, 1], set()),
        ("cola", [], [], {"matthews_correlation"}),
        ("cola", [1, 1], [0, 1], set()),
        ("cola", [1, 1], [1, 1], set()),
    ],
)
def test_undefined_metrics_are_nan_and_nothing_warns(name, answers, labels, undefined):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        got = compute(get_task(name), np.array(answers), np.array(labels))
    assert {metric for metric, value in got.items() if math.isnan(value)} == undefined
    assert all(
        value == 0
        for metric, value in got.items()
        if metric in ("f1", "matthews_correlation") and metric not in undefined
    )


def test_shapes_that_would_broadcast_are_refused():
    with pytest.raises(ValueError, match=r"\(N,\)"):
        compute(get_task("stsb"), np.zeros((3, 1)), np.zeros(3))
    with pytest.raises(ValueError, match=r"shape \(N, 3\), got \(4, 2\)"):
        predictions(get_task("mnli"), np.zeros((4, 2)))


def test_predictions_are_the_largest_logit_or_the_raw_score():
    assert predictions(get_task("mnli"), np.array([[0.1, 2.0, 1.0], [3.0, -1.0, 0.0]])).tolist() == [1, 0]
    assert predictions(get_task("stsb"), np.array([[7.5], [-1.0]])).tolist() == [7.5, -1.0]


def test_headline_is_the_mean_of_metrics_and_of_both_mnli_sets():
    assert headline(get_task("mrpc"), {"dev": {"accuracy": 0.8, "f1": 0.9}}) == pytest.approx(0.85)
    both = {"dev_matched": {"accuracy": 0.8}, "dev_mismatched": {"accuracy": 0.9}}
    assert headline(get_task("mnli"), both) == pytest.approx(0.85)
    assert math.isnan(headline(get_task("stsb"), {"dev": {"pearson": math.nan, "spearman": 0.5}}))
    with pytest.raises(KeyError):
        headline(get_task("mnli"), {"dev_matched": {"accuracy": 0.8}})


def test_headline_names():
    assert headline_name(get_task("cola")) == "matthews_correlation"
    assert headline_name(get_task("stsb")) == "mean of pearson and spearman"
    assert headline_name(get_task("mnli")) == "accuracy, mean of dev_matched and dev_mismatched"


def test_majority_is_the_best_constant_answer():
    assert majority(get_task("cola"), {"dev": np.array([1, 1, 0])}) == 0.0
    assert majority(get_task("rte"), {"dev": np.array([1, 1, 0, 1])}) == 0.75
    # answering 1: accuracy 0.4, F1 = 2*2/(2*2+3) = 4/7; answering 0: accuracy 0.6, F1 = 0, mean 0.3
    assert majority(get_task("mrpc"), {"dev": np.array([1, 1, 0, 0, 0])}) == pytest.approx((0.4 + 4 / 7) / 2)
    # one answer for both sets: 0 gives (2/3 + 0) / 2, 2 gives (1/3 + 1) / 2
    mnli = {"dev_matched": np.array([0, 0, 2]), "dev_mismatched": np.array([2])}
    assert majority(get_task("mnli"), mnli) == pytest.approx(2 / 3)
    assert majority(get_task("stsb"), {"dev": np.array([1.0, 5.0])}) == 0.0
    # answering 0 has no F1, since no 1 is on either side; answering 1 is never right
    assert majority(get_task("mrpc"), {"dev": np.array([0, 0])}) == 0.0
