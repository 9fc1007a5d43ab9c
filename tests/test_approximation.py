"""The oracle against the per-instance method and double backward; the study as a user runs it."""

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import command
from hypothesis import given, settings
from hypothesis import strategies as st
from test_exact_weightings import B, batch, bert, curvature_one_by_one, one_by_one

from dsam import SAM, ExampleLosses, GroupSAM
from dsam.approximation.oracle import HINDSIGHT, Oracle, best_direction, best_step, flat
from dsam.approximation.summary import MEASURES, as_markdown, confirmation, interval, overview, summarise
from dsam.methods import make_weighting

RHOS = [1e-3, 0.05]


@pytest.fixture(scope="module")
def oracle():
    return Oracle(ExampleLosses(bert(), batch()), RHOS, parts=[[3, 0], [1, 2, 5], [4]])


def gradient(model):
    """As the oracle has it: of the words in use only."""
    words, used = model.get_input_embeddings().weight, batch()["input_ids"].unique()
    assert words.grad.norm() == words.grad[used].norm()
    parts = [
        (torch.zeros_like(p) if p.grad is None else p.grad)[used if p is words else ...] for p in model.parameters()
    ]
    return flat(parts)


@pytest.mark.parametrize("rho", RHOS)
def test_the_target_is_what_the_per_instance_method_leaves(oracle, rho):
    model = bert()
    GroupSAM(model, rho, m=1).backward(ExampleLosses(model, batch()))  # one example at a time
    torch.testing.assert_close(flat(oracle.target[rho]), gradient(model), rtol=1e-6, atol=1e-9)


def test_exact_quantities_are_those_of_single_examples(oracle):
    closure = ExampleLosses(bert(), batch())
    params = list(closure.model.parameters())
    g = one_by_one(closure, params)
    torch.testing.assert_close(oracle.norms, g.norm(dim=1), rtol=1e-7, atol=0)
    torch.testing.assert_close(oracle.gram, g @ g.T, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(oracle.curvature, curvature_one_by_one(closure, params), rtol=2e-2, atol=0)


def test_uniform_is_measured_as_sam_and_the_best_in_hindsight_is_a_distribution(oracle):
    rows = {
        (r["rho"], r["weighting"]): r for r in oracle.measure({"uniform": make_weighting("uniform")}, headroom=True)
    }
    for rho in RHOS:
        model = bert()
        SAM(model, rho).backward(ExampleLosses(model, batch()))
        sam, target = gradient(model), flat(oracle.target[rho])
        assert rows[rho, "uniform"]["cosine"] == pytest.approx(
            float(torch.cosine_similarity(sam, target, dim=0)), abs=1e-9
        )
        assert rows[rho, "uniform"]["error"] == pytest.approx(float((sam - target).norm() / target.norm()), rel=1e-5)
        assert rows[rho, "uniform"]["ess"] == pytest.approx(B, rel=1e-5)
        assert all(1 <= rows[rho, name]["ess"] <= B + 1e-6 for name in HINDSIGHT)
    # To first order the fits minimise over all weights, uniform among them, what they are named for.
    small = {name: rows[RHOS[0], name] for name in (*HINDSIGHT, "uniform")}
    assert small["hindsight (direction)"]["correction_cosine"] >= small["uniform"]["correction_cosine"] - 1e-3
    assert small["hindsight (step)"]["correction_error"] <= small["uniform"]["correction_error"] + 1e-3
    assert small["hindsight (step)"]["correction_error"] <= small["hindsight (direction)"]["correction_error"] + 1e-3


@given(seed=st.integers(0, 10_000), size=st.integers(1, 6))
@settings(max_examples=40, deadline=None)
def test_no_weights_beat_those_in_hindsight_at_what_they_fit(seed, size):
    rng = np.random.default_rng(seed)
    g = rng.normal(size=(size, 8))
    g /= np.linalg.norm(g, axis=1, keepdims=True)
    h = rng.normal(size=(8, 8))
    h, wanted, sam = (h + h.T) @ g.T, rng.normal(size=8), rng.uniform(0.1, 3, size)
    given_to_fits = (h.T @ h, h.T @ wanted, g @ g.T, sam)

    def cosine(c):
        return h @ c @ wanted / (np.linalg.norm(h @ c) * np.linalg.norm(wanted)) if (h @ c).any() else 0.0

    def error(c):
        return np.linalg.norm(h @ c / np.linalg.norm(c @ g) - wanted)

    others = [sam, *np.eye(size), *rng.exponential(size=(300, size)) * (rng.random((300, size)) < 0.6)]
    others = [c for c in others if c.any()]
    direction, step = best_direction(*given_to_fits), best_step(*given_to_fits)
    assert min(direction.min(), step.min()) >= 0
    assert cosine(direction) >= max(0, *map(cosine, others)) - 1e-6
    assert error(step) <= min(map(error, others)) + 1e-6


def test_one_example_is_its_own_batch():
    alone = Oracle(ExampleLosses(bert(), batch(n=1)), [0.05])
    (row,) = alone.measure({"uniform": make_weighting("uniform")})
    assert row["cosine"] == pytest.approx(1, abs=1e-6)
    assert row["rise"] == pytest.approx(1, rel=1e-5)
    assert row["guardedness_min"] == pytest.approx(1, rel=1e-5)


def test_intervals_are_paired_and_cover():
    rng = np.random.default_rng(0)
    covered = [low <= 0.3 <= high for low, high in (interval(rng.normal(0.3, 1, 30)) for _ in range(200))]
    assert 0.88 <= np.mean(covered) <= 0.99
    rows = [
        {"task": "t", "phase": 25, "rho": 0.1, "batch": b, "weighting": w, **dict.fromkeys(MEASURES, b + shift)}
        for b in range(8)
        for w, shift in (("uniform", 0.0), ("gap", 0.5 + 0.01 * b))
    ]
    summary = summarise(pd.DataFrame(rows)).set_index(["weighting", "measure"])
    (row,) = overview(summary.reset_index()).to_dict("records")  # higher error too: neither nearer nor farther
    assert (row["weighting"], row["settings"], row["nearer"], row["farther"]) == ("gap", 1, 0, 0)
    flipped = pd.DataFrame([r | {"error": -r["error"]} for r in rows])
    (row,) = overview(summarise(flipped)).to_dict("records")
    assert (row["nearer"], row["tasks where nearer"], row["farther"]) == (1, "t", 0)
    row = summary.loc[("gap", "cosine")]
    assert row["difference"] == pytest.approx(0.535)
    assert 0.5 < row["low"] < 0.535 < row["high"] < 0.58


def test_each_weighting_has_its_tasks_extra_time():
    rows = [
        {"task": task, "phase": 25, "rho": 0.1, "batch": b, "weighting": w, **dict.fromkeys(MEASURES, 0.5)}
        for task in ("a", "b")
        for b in range(2)
        for w in ("uniform", "gap", "hindsight")
    ]
    times = pd.DataFrame({"task": ["a", "b"], "weighting": "gap", "extra": [0.254, -0.01]})
    lines = as_markdown(summarise(pd.DataFrame(rows)), times=times).splitlines()
    ends = [line.split("|")[-2].strip() for line in lines if line.startswith(("| gap ", "| hindsight "))]
    assert [end for end in ends if "%" in end or end == "–"] == ["+25%", "–", "-1%", "–"]


def test_the_confirmation_leaves_out_what_was_looked_at():
    nearer_later = [
        {"task": task, "phase": 25, "rho": 0.1, "batch": b, "weighting": w, **dict.fromkeys(MEASURES, 0.0)}
        | {"cosine": gain, "error": -gain}
        for task in ("seen", "fresh")
        for b in range(20)
        for w, gain in (("uniform", 0.0), ("gap", (1.0 if b >= 10 else -1.0) + 0.01 * b))
    ]
    rows = pd.DataFrame(nearer_later)
    (row,) = confirmation(rows, {"seen": 10}).to_dict("records")
    assert (row["nearer"], row["tasks where nearer"], row["settings"]) == (1, "seen", 2)
    (row,) = confirmation(rows, {"seen": 10, "fresh": 10}).to_dict("records")
    assert row["nearer"] == 2


@pytest.mark.slow
def test_the_study_measures_once_and_goes_on(tmp_path):
    arguments = [
        "--tasks",
        "agreement",
        "--phases",
        "50",
        "--batch-size",
        "4",
        "--headroom",
        "1",
        "--rho",
        "0.01",
        "--out",
        f"{tmp_path}/out",
    ]
    settings = ["train.max_steps=4", f"paths.cache={tmp_path}/cache"]
    first = command(*arguments, "--batches", "1", *settings, script="approximation.py")
    assert first.returncode == 0, first.stderr
    before = (tmp_path / "out" / "measurements.csv").read_text()
    timed = (tmp_path / "out" / "times.csv").read_text()
    extra = pd.read_csv(tmp_path / "out" / "times.csv").set_index("weighting")["extra"]
    assert extra["uniform"] == 0
    assert extra["exact_curvature"] > extra["confidence^0.5"]  # two passes more against none
    again = command(*arguments, "--batches", "2", *settings, script="approximation.py")
    assert again.returncode == 0, again.stderr
    assert "2 batches: 1 measured already" in again.stdout
    after = (tmp_path / "out" / "measurements.csv").read_text()
    assert after.startswith(before)
    assert (tmp_path / "out" / "times.csv").read_text() == timed
    table = pd.read_csv(tmp_path / "out" / "measurements.csv")
    assert set(table["batch"]) == {0, 1}
    assert (table.groupby("batch")["weighting"].nunique() >= 12).all()
    assert "| uniform" in (tmp_path / "out" / "summary.md").read_text()
    wrong = command(*arguments, "--batches", "0", script="approximation.py")
    assert wrong.returncode == 2
    assert len(wrong.stderr.strip().splitlines()) == 1
