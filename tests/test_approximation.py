"""The oracle against the per-instance method and double backward; the study as a user runs it."""

import shutil
from types import SimpleNamespace

import encoders
import numpy as np
import pandas as pd
import pytest
import torch
from conftest import ROOT, command
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import permutation_test, ttest_rel
from test_exact_weightings import B, batch, bert, curvature_one_by_one, one_by_one

from dsam import SAM, ExampleLosses, GroupSAM
from dsam.approximation.oracle import HINDSIGHT, Oracle, best_direction, best_step, flat, trimmed
from dsam.approximation.study import WEIGHTINGS, Cell, append, at_phase, batch_of, finished_cells, study
from dsam.approximation.summary import (
    MEASURES,
    OF_WRONG,
    as_markdown,
    compared,
    confirmation,
    figure,
    overview,
    summarise,
)
from dsam.config import CONF, Config, Train
from dsam.errors import UserError
from dsam.glue import Tokenised
from dsam.methods import make_weighting
from dsam.methods.taps import Unsupported
from dsam.overrides import compose_config
from dsam.runs.identity import identify

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


@pytest.mark.parametrize("pad_left", [False, True])
def test_parts_lose_padding_on_either_side_and_no_words(pad_left):
    """Llama's places are relative, so that the same words have the same losses whatever padding stands where."""
    made, given = encoders.model("llama").eval(), encoders.batch(6, 9)
    short = given["attention_mask"].clone()
    short[:3, 4:] = 0
    ids = torch.where(short == 1, given["input_ids"], 1)
    if pad_left:
        order = torch.argsort(short, dim=1, stable=True)  # padding first, the words in their order
        short, ids = short.gather(1, order), ids.gather(1, order)
    closure = ExampleLosses(made, {"input_ids": ids, "attention_mask": short, "labels": given["labels"]})
    parts = [[0, 2], [1], [3, 4, 5]]
    for part in parts:
        assert trimmed(closure, part).inputs["attention_mask"].sum() == short[part].sum()
    assert trimmed(closure, parts[0]).inputs["input_ids"].shape == (2, 4)
    weightings = {"uniform": make_weighting("uniform"), "gap": make_weighting("gap")}
    whole, cut = (Oracle(closure, [0.05], into).measure(weightings) for into in (None, parts))
    for a, b in zip(whole, cut, strict=True):
        assert {k: v for k, v in a.items() if k != "weighting"} == pytest.approx(
            {k: v for k, v in b.items() if k != "weighting"}, rel=1e-6
        )


def test_a_model_whose_outputs_depend_on_padding_is_not_cut():
    lengths = np.array([2, 3, 9, 9])
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    examples = Tokenised(np.arange(lengths.sum(), dtype=np.int32), offsets, None, np.array([0, 1, 0, 1]), 1, 0, False)
    train = Train(epochs=1, batch_size=4, lr=1e-3, piece_overhead=1)
    for whole in (False, True):
        ready = SimpleNamespace(network=None, device=torch.device("cpu"), whole=whole)
        parts = batch_of(Cell("t", 0, 0), ready, examples, 4, train)[1]
        assert (parts is None) == whole
    assert Oracle(ExampleLosses(bert(), batch()), RHOS, None).parts[0].inputs["input_ids"].shape[0] == B


def test_one_example_is_its_own_batch():
    alone = Oracle(ExampleLosses(bert(), batch(n=1)), [0.05])
    (row,) = alone.measure({"uniform": make_weighting("uniform")})
    assert row["cosine"] == pytest.approx(1, abs=1e-6)
    assert row["rise"] == pytest.approx(1, rel=1e-5)
    assert row["guardedness_min"] == pytest.approx(1, rel=1e-5)


@pytest.mark.parametrize("batches", [8, 30])
def test_a_setting_has_the_paired_t_test_s_interval_and_the_sign_flip_test_s_p(batches):
    two = np.random.default_rng(batches).normal([0.3, 0.0], 1.0, (batches, 2))
    found = compared(pd.Series(two[:, 0] - two[:, 1]))
    expected = ttest_rel(two[:, 0], two[:, 1]).confidence_interval()
    assert (found["low"], found["high"]) == pytest.approx((expected.low, expected.high))
    swapped = permutation_test(
        tuple(two.T), lambda a, b, axis: np.mean(a - b, axis), vectorized=True, permutation_type="samples", rng=0
    )
    assert found["p"] == pytest.approx(swapped.pvalue, abs=1e-9 if batches < 10 else 0.03)  # else both are drawn


def test_a_weighting_is_nearer_where_cosine_and_error_are_both_told_from_chance():
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
    assert not [line for line in lines if line.endswith("of the labels are wrong")]
    ends = [line.split("|")[-2].strip() for line in lines if line.startswith(("| gap ", "| hindsight "))]
    assert [end for end in ends if "%" in end or end == "–"] == ["+25%", "–", "-1%", "–"]


def test_the_share_of_wrong_labels_is_that_of_all_batches():
    """By hand: 1/2 and 0 of them, where what is found in hindsight has the first batch alone."""
    rows = [
        {"task": "t", "phase": 25, "rho": 0.1, "batch": b, "weighting": w, **dict.fromkeys((*MEASURES, *OF_WRONG), 0.5)}
        | {"wrong": 0.5 - 0.5 * b}
        for w, batches in (("uniform", 2), ("gap", 2), ("hindsight", 1))
        for b in range(batches)
    ]
    (title,) = [line for line in as_markdown(summarise(pd.DataFrame(rows))).splitlines() if line.startswith("### ")]
    assert title == "### t at 25 % of the fine-tuning, ρ = 0.1; 25.0% of the labels are wrong"


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


def study_of(tmp_path, *settings):
    common = ["task=agreement", "tracking=disabled", f"paths.runs={tmp_path}/runs", f"paths.cache={tmp_path}/cache"]
    return [Config.load(compose_config([*common, *settings], CONF))]


def test_a_file_is_gone_on_with_only_as_it_was_begun(tmp_path):
    """Nothing is handed back as measured that was measured with other weights, radii or batches."""
    path, configs = tmp_path / "measurements.csv", study_of(tmp_path)
    made = {"task": "agreement", "phase": 25, "run": identify(configs[0]).id, "seed": 0, "batch_size": 4}
    for number in range(2):
        names = [*WEIGHTINGS, *(HINDSIGHT if number < 1 else [])]
        append(path, [made | {"batch": number, "rho": r, "weighting": n} for n in names for r in (0.01, 1 / 3)])
    found = finished_cells(path, configs, [1 / 3, 0.01], 4, 1)
    assert found == {Cell("agreement", 25, 0), Cell("agreement", 25, 1)}
    assert finished_cells(path, configs, [1 / 3, 0.01], 4, 0) == found  # has more than is asked
    assert finished_cells(tmp_path / "none.csv", configs, [0.01], 4, 1) == set()
    for asked, message in (
        ((configs, [0.01], 4, 1), r"agreement measured with rho 0\.01, 0\.333333, and this is 0\.01: set --out DIR"),
        ((configs, [1 / 3, 0.01], 8, 1), "batch_size 4, and this is 8"),
        ((configs, [1 / 3, 0.01], 4, 2), r"batch 1, without hindsight \(direction\)"),
        ((study_of(tmp_path, "seed=7"), [1 / 3, 0.01], 4, 1), f"run {made['run']}, and this is "),
        ((study_of(tmp_path, "train.lr=2e-3"), [1 / 3, 0.01], 4, 1), "measured with run"),
        ((study_of(tmp_path, "data.label_noise=0.4"), [1 / 3, 0.01], 4, 1), "without label noise"),
    ):
        with pytest.raises(UserError, match=message) as error:
            finished_cells(path, *asked)
        assert "\n" not in str(error.value)
    assert finished_cells(path, study_of(tmp_path, "task=entailment"), [0.5], 8, 1) == set()  # a task more
    committed = ROOT / "results" / "approximation" / "measurements.csv"
    with pytest.raises(UserError, match="does not say whose weights"):
        finished_cells(committed, configs, [0.01], 4, 1)


def test_a_model_without_exact_per_example_gradients_is_one_line(tmp_path, monkeypatch):
    def oracle(*_, **__):
        raise Unsupported("no formula for its convolution")

    monkeypatch.setattr("dsam.approximation.study.Oracle", oracle)
    with pytest.raises(
        UserError, match=r"^tiny has no exact per-example gradients .*: no formula for its convolution$"
    ):
        study(study_of(tmp_path), [0], [0.1], 1, 4, 0, tmp_path / "measurements.csv")
    assert not (tmp_path / "measurements.csv").exists()


def test_every_phase_has_its_mark():
    rows = [
        {"task": "t", "phase": p, "rho": 0.1, "batch": b, "weighting": w, **dict.fromkeys(MEASURES, 0.5 + b)}
        for p in range(0, 100, 12)
        for b in range(2)
        for w in ("uniform", "gap")
    ]
    assert len(figure(summarise(pd.DataFrame(rows))).axes[0].containers) == 9


def test_a_phase_has_one_mark_in_all_panels_and_a_name_in_the_legend():
    rows = [
        {"task": t, "phase": p, "rho": 0.1, "batch": b, "weighting": w, **dict.fromkeys(MEASURES, 0.5 + b)}
        for t, phases in (("one", (100,)), ("two", (25, 100)))
        for p in phases
        for b in range(2)
        for w in ("uniform", "gap")
    ]
    drawn = figure(summarise(pd.DataFrame(rows)))
    first, second = ({c.get_label(): c.lines[0].get_color() for c in ax.containers} for ax in drawn.axes)
    assert set(second) == {"25 %", "100 %"} and first == {"100 %": second["100 %"]}
    legend = drawn.axes[0].get_legend()
    assert [text.get_text() for text in legend.get_texts()] == ["25 %", "100 %"]


def test_before_the_first_step_a_study_measures_what_a_run_starts_from(tmp_path):
    """With `initialise_from` that is the other run's encoder."""
    (config,) = study_of(tmp_path, "train.max_steps=2", "checkpoint.keep_at=[1]", "initialise_from=entailment")
    config = config.model_copy(update={"train": config.train.model_copy(update={"lr": 0.0})})
    config = Config.load(config.to_dict())  # whose parent trains at its own rate
    at_start, trained = (at_phase(config, phase)[0].network.base_model.state_dict() for phase in (0, 1))
    assert all(torch.equal(value, trained[name]) for name, value in at_start.items())


def test_a_table_that_scales_what_it_looks_up_is_measured_as_it_is():
    """Its losses and gradients are the model's; a plain table's copy would leave the scale out."""
    from transformers import BioGptConfig, BioGptForSequenceClassification

    torch.manual_seed(0)
    model = BioGptForSequenceClassification(BioGptConfig(
        vocab_size=60, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24,
        max_position_embeddings=40, pad_token_id=1, scale_embedding=True,
    )).double().eval()  # fmt: skip
    closure = ExampleLosses(model, encoders.batch(B))
    params = [p for p in model.parameters() if p.requires_grad]
    g = one_by_one(closure, params)
    found = Oracle(ExampleLosses(model, encoders.batch(B)), [0.01])
    torch.testing.assert_close(found.losses, closure().detach(), rtol=1e-12, atol=0)
    torch.testing.assert_close(found.norms, g.norm(dim=1), rtol=1e-7, atol=0)


def test_a_fine_tuning_that_diverged_is_said_to_have(tmp_path, capsys):
    (config,) = study_of(tmp_path, "train.max_steps=4", "checkpoint.keep_at=[25,100]", "train.lr=1e30")
    with pytest.raises(UserError, match=r" diverged \(step \d+: .*\) before 100 % of its steps: take a lower train.lr"):
        at_phase(config, 100)


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 100), scale=st.sampled_from([1e-8, 1e-4, 1e4]))
def test_the_best_step_does_not_depend_on_the_scale_of_the_losses(seed, scale):
    rows = np.random.default_rng(seed).normal(size=(5, 8))
    each, unit, sam = rows @ rows.T, np.eye(5), np.ones(5)
    right = rows @ np.random.default_rng(seed + 1).normal(size=8)
    one, other = best_step(each, right, unit, sam), best_step(scale * each, scale * right, unit, sam)
    np.testing.assert_allclose(one / np.linalg.norm(one), other / np.linalg.norm(other), rtol=1e-6, atol=1e-8)


@pytest.mark.slow
def test_the_committed_summary_is_that_of_the_committed_measurements(tmp_path):
    noisy = ROOT / "results" / "approximation_noise"
    (tmp_path / "noise").mkdir()
    shutil.copy(noisy / "measurements.csv", tmp_path / "noise")
    done = command("--summary-only", "--out", str(tmp_path / "noise"), script="approximation.py")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "noise/summary.md").read_bytes() == (noisy / "summary.md").read_bytes()
    there = ROOT / "results" / "approximation"
    for name in ("measurements.csv", "times.csv"):
        shutil.copy(there / name, tmp_path)
    looked = ["--looked-at", "cola=10", "rte=17", "mrpc=10"]
    done = command("--summary-only", "--out", str(tmp_path), *looked, script="approximation.py")
    assert done.returncode == 0, done.stderr
    for name in ("summary.md", "summary.csv"):
        assert (tmp_path / name).read_bytes() == (there / name).read_bytes()
    for typed, why in (("rte=999", "leaves no batch"), ("qnli=3", "--looked-at qnli:"), ("cola=-1", "is 0 or more")):
        all_of = [f"{task}=999" for task in ("cola", "mrpc", "sst2")] if typed == "rte=999" else []
        refused = command(
            "--summary-only", "--out", str(tmp_path), "--looked-at", typed, *all_of, script="approximation.py"
        )
        assert refused.returncode == 2 and why in refused.stderr and refused.stderr.count("\n") == 1, refused.stderr
    # What would be refused once all is measured is refused before.
    for typed, why in (("qnli=3", "--looked-at qnli: "), ("agreement=30", "leaves no batch")):
        refused = command("--out", str(tmp_path / "new"), "--looked-at", typed, script="approximation.py")
        assert refused.returncode == 2 and why in refused.stderr and refused.stderr.count("\n") == 1, refused.stderr
    assert not (tmp_path / "new").exists()
    wrong = command("--summary-only", "--out", str(tmp_path), "--looked-at", "colaa=10", script="approximation.py")
    assert (wrong.returncode, wrong.stderr) == (2, "error: --summary-only measures nothing: colaa=10 has no effect\n")
    wrong = command("--summary-only", "--out", str(tmp_path), "--rho", "0.3", script="approximation.py")
    assert (wrong.returncode, wrong.stderr) == (2, "error: --summary-only measures nothing: --rho has no effect\n")


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
    (tmp_path / "out" / "summary.md").unlink()
    (tmp_path / "out" / "summary.md").mkdir()
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cannot write .*/file/a.csv: .*; set --out DIR"):
        append(tmp_path / "file" / "a.csv", [{"task": "cola"}])
    wrong = command("--summary-only", "--out", str(tmp_path / "out"), script="approximation.py")
    assert (wrong.returncode, wrong.stderr) == (
        2,
        f"error: cannot write {tmp_path}/out/summary.md: Is a directory; set --out DIR\n",
    )
    # A setting behind --looked-at is a setting: another seed is another fine-tuning, and not what the file holds.
    other = command(*arguments, "--batches", "2", "--looked-at", "agreement=1", "seed=1", *settings,
                    script="approximation.py")  # fmt: skip
    assert (other.returncode, len(other.stderr.strip().splitlines())) == (2, 1) and "measured with run" in other.stderr
    assert (tmp_path / "out" / "measurements.csv").read_text() == after
    twice = command(*arguments, "--rho", "0.1", "0.1000000001", script="approximation.py")
    assert (twice.returncode, twice.stderr) == (2, "error: --rho 0.1 0.1: give each once\n")
    wrong = command(*arguments, "--batches", "0", script="approximation.py")
    assert wrong.returncode == 2
    assert len(wrong.stderr.strip().splitlines()) == 1
