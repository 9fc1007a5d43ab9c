"""Collecting run folders: every run visible with its fate, labels, and what cannot be read said."""

import json
import math
import time
from pathlib import Path

import many_runs
import pytest

from dsam.errors import UserError
from dsam.results.collect import collect
from dsam.results.statistics import summarise
from dsam.results.tables.labels import method_labels


def plan(task="rte", model="tiny", optimizer="sam", seed=0, id=None, **hyperparameters) -> dict:
    """One run of a sweep's manifest."""
    shown = "".join(f"-{value}" for value in hyperparameters.values())
    id = id or f"{optimizer}{shown}-{seed}"
    return {
        "id": id, "task": task, "model": model, "optimizer": optimizer, "seed": seed,
        "folder": f"{task}/{model}/{optimizer}/{id}", "hyperparameters": {"method": optimizer, **hyperparameters},
    }  # fmt: skip


def finish(runs_dir: Path, planned: dict, best=0.66, last=None, status="finished", changes=None, **more) -> Path:
    """Write the run's result.json as the pipeline does, `changes` and `more` replacing entries; returns its path."""
    folder = runs_dir / planned["folder"]
    folder.mkdir(parents=True, exist_ok=True)
    last = best if last is None else last

    def point(epoch, score):
        metrics = {"dev": {"accuracy": score}}
        return {"epoch": epoch, "step": 78 * epoch, "score": score, "loss": 0.6, "metrics": metrics}

    result = {name: planned[name] for name in ("id", "task", "model", "optimizer", "seed", "hyperparameters")} | {
        "record_version": 1, "status": status, "metric": "accuracy", "best": point(2, best), "last": point(3, last),
        "evaluations": [point(1, 0.5), point(2, best), point(3, last)], "majority": 0.527,
        "train": {"steps": 234, "seconds": 100.0, "seconds_per_step": 0.4, "examples_per_second": 71.0,
                  "passes_per_step": 2.0, "peak_memory_bytes": 1e9},
        "weights_sha256": "0",
    } | (changes or {}) | more  # fmt: skip
    path = folder / "result.json"
    path.write_text(json.dumps(result))
    (folder / "provenance.json").write_text(json.dumps({"git": {"commit": "abc"}, "device": "cpu"}))
    return path


def fail(runs_dir: Path, planned: dict) -> None:
    folder = runs_dir / planned["folder"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "failure.json").write_text(json.dumps({"reason": "killed by signal 9", "log": "log.txt"}))


def sweep(runs_dir: Path, experiment: str, planned: list[dict]) -> None:
    (runs_dir / ".sweeps").mkdir(parents=True, exist_ok=True)
    manifest = {"experiment": experiment, "command": "make", "runs": planned}
    (runs_dir / ".sweeps" / f"{experiment}.json").write_text(json.dumps(manifest))


def test_a_finished_run_has_its_figures(tmp_path):
    finish(tmp_path, plan(rho=0.05, seed=3), best=0.66, last=0.64)
    row = collect(tmp_path).iloc[0]
    assert (row["task"], row["model"], row["optimizer"], row["method_label"]) == ("rte", "tiny", "sam", "sam")
    assert (row["seed"], row["status"], row["best"], row["last"], row["best_epoch"]) == (3, "finished", 0.66, 0.64, 2)
    assert row["train.seconds_per_step"] == 0.4 and row["hyperparameters.rho"] == 0.05
    assert row["best.dev.accuracy"] == 0.66 and row["last.dev.accuracy"] == 0.64
    assert row["evaluations"] == [[78, 0.5, 0.6], [156, 0.66, 0.6], [234, 0.64, 0.6]]
    assert row["folder"] == "rte/tiny/sam/sam-0.05-3"


def test_each_expected_run_is_there_with_its_fate(tmp_path):
    runs = [plan(seed=seed) for seed in range(5)]
    sweep(tmp_path, "smoke", runs)
    finish(tmp_path, runs[0])
    finish(tmp_path, runs[1], status="diverged", best=None, last=None)
    fail(tmp_path, runs[2])
    (tmp_path / runs[3]["folder"]).mkdir(parents=True)  # started, not finished
    frame = collect(tmp_path, "smoke")
    assert list(frame["status"]) == ["finished", "diverged", "failed", "missing", "missing"]
    assert list(frame["seed"]) == [0, 1, 2, 3, 4]
    assert "signal 9" in frame["reason"][2] and frame["reason"][4] == "not started"


def test_a_result_counts_even_if_an_earlier_attempt_failed(tmp_path):
    fail(tmp_path, plan())
    finish(tmp_path, plan())
    assert collect(tmp_path)["status"].tolist() == ["finished"]


@pytest.mark.parametrize(
    ("content", "reason"),
    [('{"id": "a', "cannot be read"), ("", "cannot be read"), ("[1]", "cannot be read"), ("{}", "has no 'id'"),
     ("\xff\x00", "cannot be read")],
)  # fmt: skip
def test_a_damaged_result_is_named(tmp_path, content, reason):
    finish(tmp_path, plan()).write_text(content, encoding="latin-1")
    finish(tmp_path, plan(seed=1))
    frame = collect(tmp_path).set_index("id")
    assert frame.loc["sam-0", "status"] == "damaged" and reason in frame.loc["sam-0", "reason"]
    assert frame.loc["sam-1", "status"] == "finished" and frame.loc["sam-0", "task"] == "rte"


def test_a_best_that_is_null_is_missing_not_zero(tmp_path):
    finish(tmp_path, plan(), best=None)
    finish(tmp_path, plan(seed=1), status="diverged", changes={"best": None, "last": None}, majority=None)
    frame = collect(tmp_path)
    assert frame["best"].isna().all()
    assert math.isnan(frame["majority"][1])


def test_a_run_that_another_seed_s_name_was_first_made_under_is_the_sweep_s(tmp_path):
    """`seed=1 seeds.init=5 seeds.data=5` computes what seed=5 does, and so is the same run."""
    one = plan(seed=5)
    finish(tmp_path, one, changes={"seed": 1})
    (tmp_path / ".sweeps").mkdir()
    (tmp_path / ".sweeps" / "study.json").write_text(json.dumps({"runs": [one]}))
    assert collect(tmp_path, "study")["seed"].tolist() == [5]
    assert collect(tmp_path)["seed"].tolist() == [5]


def test_degenerate_is_at_or_below_the_majority_answer(tmp_path):
    for seed, score in enumerate((0.52, 0.527, 0.528)):
        finish(tmp_path, plan(seed=seed), best=score)
    assert summarise(collect(tmp_path))["degenerate"].tolist() == [2]


def test_labels_name_what_varies_within_a_task(tmp_path):
    runs = [plan(task, rho=rho, lr=lr) for task, lr in (("rte", 2e-5), ("mrpc", 1e-5)) for rho in (0.05, 0.1)]
    runs += [plan(task, optimizer="adamw", lr=lr) for task, lr in (("rte", 2e-5), ("mrpc", 1e-5))]
    labels = dict(zip((run["id"] for run in runs), method_labels(runs), strict=True))
    assert labels["sam-0.05-2e-05-0"] == "sam (rho=0.05)" and labels["adamw-2e-05-0"] == "adamw"


def test_labels_take_equal_values_as_equal_and_unknown_ones_as_unknown():
    assert method_labels([plan(rho=1), plan(rho=1.0)]) == ["sam", "sam"]
    assert method_labels([plan(seed=0, rho=1), plan(seed=1, rho=1)]) == ["sam", "sam"]
    unknown = plan() | {"hyperparameters": {}}
    labels = method_labels([plan(rho=1, clip=None), plan(rho=2.5, clip=True), unknown])
    assert labels == ["sam (clip=none, rho=1)", "sam (clip=true, rho=2.5)", "sam (clip=?, rho=?)"]


def test_a_setting_that_is_recorded_only_where_it_is_set_tells_runs_apart():
    """And only those that would be called the same: what goes with another value needs no name."""
    assert method_labels([plan(rho=1), plan(rho=1, lr_factor=0.5)]) == ["sam", "sam (lr_factor=0.5)"]
    assert method_labels([plan("rte", rho=1), plan("mrpc", rho=1, lr_factor=0.5)]) == ["sam", "sam"]
    rates = [plan(lr=lr, lr_factor=0.25) for lr in (1e-4, 4e-4)]
    assert method_labels(rates) == ["sam (lr=2.5e-05)", "sam (lr=0.0001)"]  # those that it had
    forms = [plan(optimizer="dsam", weighting="gauss_newton"), plan(optimizer="dsam", weighting="probe", floor=0.1)]
    assert method_labels(forms) == ["dsam (weighting=gauss_newton)", "dsam (weighting=probe)"]


def count(folder):
    """In a process of its own."""
    print(len(collect(folder)))


def test_an_unknown_experiment_or_folder_says_what_to_do(tmp_path):
    sweep(tmp_path, "smoke", [plan()])
    with pytest.raises(UserError, match="did you mean 'smoke'"):
        collect(tmp_path, "smok")
    with pytest.raises(UserError, match="make reproduce"):
        collect(tmp_path / "nowhere")
    (tmp_path / ".sweeps" / "smoke.json").write_text("{")
    with pytest.raises(UserError, match=r"smoke\.json cannot be read"):
        collect(tmp_path, "smoke")


def test_no_runs_at_all_is_an_empty_table(tmp_path):
    assert len(collect(tmp_path)) == 0


def test_a_thousand_runs_are_collected_in_seconds(tmp_path):
    for seed in range(1000):
        finish(tmp_path, plan(seed=seed))
    start = time.perf_counter()
    cold = collect(tmp_path)
    middle = time.perf_counter()
    warm = collect(tmp_path)
    assert len(cold) == len(warm) == 1000
    assert middle - start < 10 and time.perf_counter() - middle < 10


def test_the_runs_made_up_for_timing_are_whole(tmp_path):
    many_runs.write(tmp_path, 80)
    frame = collect(tmp_path, "glue_bert_base")
    assert len(frame) == len(collect(tmp_path)) == 80
    assert set(frame["status"]) == {"finished"}
    assert (frame.groupby(["task", "method_label"]).size() == 2).all() and len(frame["method_label"].unique()) == 5
