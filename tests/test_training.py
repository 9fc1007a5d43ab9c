"""The training loop's parts against numbers derived by hand, and whole runs against each other."""

import hashlib
import json
import os
import re
import signal
import threading
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_config import config

from dsam.config import Train
from dsam.errors import Stopped, UserError
from dsam.runs.identity import identify
from dsam.runs.kept import lacks_weights
from dsam.runs.record import Record
from dsam.runs.run import prepare, run
from dsam.sweeps.sweep import plan
from dsam.task import get_task
from dsam.training import loop
from dsam.training.batches import epoch_order, evaluation_batches, pieces, training_subset
from dsam.training.checkpoint import Checkpoints, on_host
from dsam.training.loop import best, evaluate, learning_rate_factor, total_steps

TRAIN = Train(epochs=3, batch_size=32, lr=1.0)


def test_learning_rate_rises_over_the_warm_up_and_falls_to_zero():
    assert [learning_rate_factor(s, 2, 6) for s in range(7)] == [0, 0.5, 1, 0.75, 0.5, 0.25, 0]
    assert learning_rate_factor(0, 0, 4) == 1


def test_steps_and_evaluations_stretch_together():
    plain, twice = config(), config("optimizer=adamw_2x")
    assert total_steps(plain, 2000) == (8 * 63, 63)
    assert total_steps(twice, 2000) == (2 * 8 * 63, 2 * 63)
    assert total_steps(config("train.max_steps=5"), 2000) == (5, 63)
    assert total_steps(config("train.max_steps=5", "optimizer=adamw_2x"), 2000) == (10, 126)


@given(
    lengths=st.lists(st.integers(2, 128), min_size=1, max_size=40),
    most=st.one_of(st.none(), st.integers(1, 12)),
    overhead=st.one_of(st.none(), st.integers(0, 500)),
)
@settings(max_examples=200, deadline=None)
def test_pieces_are_the_batch_and_never_dearer_than_it(lengths, most, overhead):
    lengths = np.array(lengths)
    batch = np.random.default_rng(0).permutation(len(lengths))
    parts = pieces(batch, lengths, TRAIN.model_copy(update=dict(micro_batch_size=most, piece_overhead=overhead)))
    assert sorted(np.concatenate(parts)) == list(range(len(lengths)))
    assert all(1 <= len(p) <= (most or len(lengths)) for p in parts)
    if most is None and overhead is not None:
        cost = sum(len(p) * lengths[p].max() + overhead for p in parts)
        assert cost <= len(lengths) * lengths.max() + overhead
    if overhead is None:
        assert list(np.concatenate(parts)) == list(batch)


def test_pieces_by_hand():
    lengths = np.array([10, 100, 10, 100])
    cut = pieces(np.arange(4), lengths, TRAIN.model_copy(update=dict(piece_overhead=50)))
    assert [sorted(p) for p in cut] == [[0, 2], [1, 3]]  # 220 tokens + 2 × 50 against 400 + 50
    assert len(pieces(np.arange(4), lengths, TRAIN.model_copy(update=dict(piece_overhead=200)))) == 1
    # In bfloat16 a piece counts four times: 220 + 2 × 4 × 50 against 400 + 4 × 50.
    in_bfloat16 = TRAIN.model_copy(update=dict(piece_overhead=50, precision="bfloat16"))
    assert len(pieces(np.arange(4), lengths, in_bfloat16)) == 1


def test_orders_are_permutations_that_differ_by_epoch_and_seed():
    orders = [tuple(epoch_order(50, seed, epoch)) for seed in range(3) for epoch in range(3)]
    assert len(set(orders)) == 9
    assert all(sorted(o) == list(range(50)) for o in orders)
    assert list(training_subset(10, None, 0)) == list(range(10))
    assert len(set(training_subset(10, 4, 0))) == 4


def test_evaluation_sees_every_example_once():
    lengths = np.random.default_rng(0).integers(3, 128, 333)
    batches = list(evaluation_batches(lengths, tokens=1000))
    assert sorted(np.concatenate(batches)) == list(range(333))
    assert all(len(b) * lengths[b].max() <= 1000 for b in batches)


def test_best_is_the_earliest_of_equals_and_never_nan():
    scores = [float("nan"), 0.5, 0.7, 0.7, float("nan")]
    evaluations = [{"score": s, "step": i} for i, s in enumerate(scores)]
    assert best(evaluations)["step"] == 2
    assert best(evaluations[:1]) is None


def test_a_damaged_checkpoint_gives_way_to_the_one_before(tmp_path, capsys):
    checkpoints = Checkpoints(tmp_path / "checkpoint")
    assert checkpoints.load() is None
    for step in (1, 2, 3):
        checkpoints.save(step, {"step": step, "tensor": torch.arange(1000)})
    checkpoints.wait()
    files = sorted((tmp_path / "checkpoint").glob("*.pt"))
    assert len(files) == 2
    files[-1].write_bytes(files[-1].read_bytes()[:-100])
    assert checkpoints.load()["step"] == 2
    assert "damaged" in capsys.readouterr().err
    checkpoints.clear()
    assert not (tmp_path / "checkpoint").exists()


@pytest.fixture
def held(monkeypatch):
    """Writing a checkpoint stops half-way until this event is set; `begun` of it tells that one is there."""
    save, event = torch.save, threading.Event()
    event.begun = threading.Event()

    def saves(state, stream):
        stream.write(b"")
        event.begun.set()
        assert event.wait(60)
        save(state, stream)

    monkeypatch.setattr(torch, "save", saves)
    yield event
    event.set()


def test_a_checkpoint_holds_what_was_there_when_it_was_begun(tmp_path, held):
    checkpoints, weights = Checkpoints(tmp_path), torch.arange(4.0)
    state = {"step": 1, "model": {"w": weights}, "window": [0.5]}
    checkpoints.save(1, state)
    assert held.begun.wait(60) and checkpoints.writing()
    assert [f.name.split(".")[1] for f in tmp_path.iterdir()] == ["writing"]
    weights += 1
    state["window"].append(0.25)
    held.set()
    checkpoints.wait()
    assert not checkpoints.writing()
    (file,) = tmp_path.iterdir()
    assert file.name == f"000000001-{hashlib.sha256(file.read_bytes()).hexdigest()[:16]}.pt"
    saved = checkpoints.load()
    assert saved["model"]["w"].tolist() == [0, 1, 2, 3] and saved["window"] == [0.5]


def test_the_copy_shares_what_the_state_shares_and_nothing_with_it():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2), torch.nn.Linear(2, 2))
    model[2].weight = model[0].weight
    state = {"model": model.state_dict(), "moments": [torch.ones(2), None], "rows": model[0].weight[:1]}
    copied = on_host(state)
    assert copied["model"]._metadata == state["model"]._metadata
    assert copied["model"]["2.weight"] is copied["model"]["0.weight"]
    assert torch.equal(copied["rows"], state["rows"]) and not copied["rows"].requires_grad
    before = {name: value.clone() for name, value in copied["model"].items()}
    with torch.no_grad():
        for value in state["model"].values():
            value += 1
    assert all(torch.equal(copied["model"][name], value) for name, value in before.items())


def test_a_checkpoint_that_cannot_be_written_says_so_once_and_costs_no_earlier_one(tmp_path, monkeypatch):
    def refuses(state, stream):
        raise RuntimeError("unexpected pos 64 vs 0")

    line = "checkpoint at step 2 could not be written: unexpected pos"
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, {"step": 1})
    checkpoints.wait()
    monkeypatch.setattr(torch, "save", refuses)
    for asks in (checkpoints.wait, checkpoints.clear, lambda: checkpoints.save(3, {}), lambda: until(checkpoints)):
        checkpoints.save(2, {"step": 2})
        with pytest.raises(OSError, match=line):
            asks()
        assert not checkpoints.writing()
        assert [f.name[:9] for f in tmp_path.iterdir()] == ["000000001"]
    with pytest.raises(OSError, match=line), checkpoints:
        checkpoints.save(2, {"step": 2})
    with pytest.raises(KeyError), checkpoints:
        checkpoints.save(2, {"step": 2})
        raise KeyError("what was wrong before")
    assert checkpoints.load()["step"] == 1


def until(checkpoints):
    while checkpoints.writing():
        time.sleep(0.001)


def short(tmp_path, *more):
    return config(
        "train.max_steps=12", "tracking=disabled", f"paths.runs={tmp_path}/runs", f"paths.cache={tmp_path}/cache", *more
    )


def lines(folder):
    """metrics.jsonl without what a clock wrote."""
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "seconds"} for line in found]


@pytest.mark.parametrize(
    ("optimizer", "task"),
    [("adamw", "agreement"), ("sam", "entailment"), ("asam", "similarity"), ("dsam", "agreement")],
)
def test_one_configuration_gives_one_set_of_numbers(tmp_path, optimizer, task):
    configs = [short(tmp_path / place, f"optimizer={optimizer}", f"task={task}") for place in "ab"]
    one, other = (run(c) for c in configs)
    assert one["weights_sha256"] == other["weights_sha256"]
    assert one["evaluations"] == other["evaluations"]
    assert lines(identify(configs[0]).folder) == lines(identify(configs[1]).folder)


@pytest.fixture
def often(monkeypatch):
    """A setting: a checkpoint after each step that finds none being written, whatever it costs."""
    monkeypatch.setattr(loop, "SAVING", float("inf"))
    return "checkpoint.every_seconds=1e-9"


def stepping(monkeypatch, at_step, act):
    """Has AdamW's step call `act(n)` at its n-th, where n is `at_step` or later."""
    step, taken = torch.optim.AdamW.step, 0

    def steps(self, *arguments):
        nonlocal taken
        taken += 1
        if taken >= at_step:
            act(taken)
        return step(self, *arguments)

    monkeypatch.setattr(torch.optim.AdamW, "step", steps)


@pytest.mark.parametrize("optimizer", ["msam", "dsam"])
def test_training_goes_on_while_a_checkpoint_is_written_and_gives_the_same_numbers(
    tmp_path, monkeypatch, held, often, optimizer
):
    begun = []
    save = Checkpoints.save
    monkeypatch.setattr(Checkpoints, "save", lambda self, step, state: [begun.append(step), save(self, step, state)])
    with monkeypatch.context() as during:
        stepping(during, 6, lambda n: held.set())
        one = run(short(tmp_path / "a", f"optimizer={optimizer}", often))
    assert begun[0] == 1 and begun[1] >= 6  # none is begun beside another, and no step waits
    other = run(short(tmp_path / "b", f"optimizer={optimizer}", "checkpoint.every_seconds=1000"))
    assert one["weights_sha256"] == other["weights_sha256"] and one["evaluations"] == other["evaluations"]


def test_who_is_asked_to_stop_waits_for_the_checkpoint_of_that_step(tmp_path, monkeypatch, held, often):
    chosen = short(tmp_path, often)

    def stop(n):
        os.kill(os.getpid(), signal.SIGTERM)
        threading.Timer(0.2, held.set).start()

    stepping(monkeypatch, 5, stop)
    with pytest.raises(Stopped):
        run(chosen)
    newest = sorted((identify(chosen).folder / "checkpoint").iterdir())[-1]
    assert re.fullmatch(r"000000005-\w{16}\.pt", newest.name)


def test_a_full_disk_ends_a_run_while_it_trains(tmp_path, monkeypatch, often):
    def refuses(state, stream):
        raise OSError(28, "No space left on device")

    steps = []
    monkeypatch.setattr(torch, "save", refuses)
    stepping(monkeypatch, 1, lambda n: [steps.append(n), time.sleep(0.05)])
    with pytest.raises(OSError, match="No space left on device"):
        run(short(tmp_path, often))
    assert len(steps) < 12
    assert not list((identify(short(tmp_path)).folder / "checkpoint").iterdir())


def test_rho_zero_is_adamw_through_the_whole_pipeline(tmp_path):
    digests = {
        run(short(tmp_path, *given))["weights_sha256"]
        for given in (["optimizer=adamw"], ["optimizer=sam", "optimizer.rho=0"], ["optimizer=dsam", "optimizer.rho=0"])
    }
    assert len(digests) == 1


def test_the_record_says_what_was_done(tmp_path):
    chosen = short(tmp_path, "optimizer=dsam", "train.max_train_examples=96", "train.epochs=3")
    result = run(chosen)
    folder = identify(chosen).folder
    assert {p.name for p in folder.iterdir()} == {"config.yaml", "metrics.jsonl", "provenance.json", "result.json"}
    assert result == json.loads((folder / "result.json").read_text())
    assert result["status"] == "finished"
    assert result["train"]["steps"] == 9
    assert result["train"]["examples_per_second"] == pytest.approx(3 * 96 / result["train"]["seconds"])
    assert result["train"]["forwards_per_step"] == pytest.approx(3)
    assert result["train"]["backwards_per_step"] == pytest.approx(2)
    assert [e["epoch"] for e in result["evaluations"]] == [1, 2, 3]
    assert result["best"] in result["evaluations"]
    assert result["last"] == result["evaluations"][-1]
    provenance = json.loads((folder / "provenance.json").read_text())
    assert provenance["versions"]["torch"] == torch.__version__
    assert provenance["identity"]["data"].startswith("builtin")


@pytest.mark.parametrize("steps, taken", [(3, 80), (4, 112)])  # of two epochs of 32, 32 and 16
def test_a_smaller_last_batch_counts_by_its_size(tmp_path, steps, taken):
    found = run(short(tmp_path, "train.max_train_examples=80", f"train.max_steps={steps}"))["train"]
    assert found["examples_per_second"] == pytest.approx(taken / found["seconds"])


def test_a_result_that_the_disk_does_not_give_is_not_done_again(tmp_path):
    chosen = short(tmp_path)
    run(chosen)
    path = identify(chosen).folder / "result.json"
    path.unlink()
    path.symlink_to("/proc/self/mem")  # which opens, and fails with an input/output error where it is read
    with pytest.raises(UserError, match="result.json cannot be read: Input/output error"):
        run(chosen)
    (path.parent / "failure.json").symlink_to("/proc/self/mem")
    assert Record(path.parent).failure() is None


def test_a_finished_run_is_returned_without_work(tmp_path, monkeypatch):
    chosen = short(tmp_path)
    first = run(chosen)
    monkeypatch.setattr("dsam.runs.run.prepare", lambda config: pytest.fail("worked again"))
    assert run(chosen) == first


@pytest.mark.parametrize("contents", ["", '{"status": "fin', "[]", '{"status": "finished", "id": "another"}'])
def test_a_broken_result_is_set_aside_and_done_again(tmp_path, contents):
    chosen = short(tmp_path)
    first = run(chosen)
    path = identify(chosen).folder / "result.json"
    path.write_text(contents)
    again = run(chosen)
    assert again["weights_sha256"] == first["weights_sha256"]
    assert path.with_name("result.json.damaged").read_text() == contents


@pytest.mark.parametrize("optimizer", ["adamw", "dsam"])
def test_divergence_is_recorded_as_such(tmp_path, optimizer):
    # A learning rate at which float32 overflows within a few steps.
    chosen = short(tmp_path, f"optimizer={optimizer}", "train.lr=1e30", "train.warmup_ratio=0", "train.max_steps=30")
    result = run(chosen)
    assert result["status"] == "diverged"
    assert "step" in result["diverged"]
    assert result["train"]["steps"] < 30
    assert "NaN" not in (identify(chosen).folder / "result.json").read_text()


@pytest.mark.parametrize("task", ["entailment", "similarity"])
def test_a_model_that_the_last_step_broke_has_diverged_and_no_score(tmp_path, task):
    chosen = short(tmp_path, f"task={task}", "train.lr=1e18", "train.warmup_ratio=0", "train.max_steps=1")
    result = run(chosen)
    assert (result["status"], result["best"], result["last"]["score"]) == ("diverged", None, None)
    assert result["diverged"].startswith("step 1: the evaluation's loss is ")
    assert set(result["last"]["metrics"]["dev"].values()) == {None}


def test_bfloat16_keeps_weights_in_float32_and_probes_exact(tmp_path):
    chosen = short(tmp_path, "optimizer=dsam", "train.precision=bfloat16", "checkpoint.keep_weights=true")
    result = run(chosen)
    assert result["status"] == "finished"
    # one forward more than in float32: the losses that the float32 probes are compared with
    assert result["train"]["forwards_per_step"] == pytest.approx(4)
    from safetensors.torch import load_file

    weights = load_file(identify(chosen).folder / "last" / "model.safetensors")
    assert {t.dtype for t in weights.values()} == {torch.float32}


def test_micro_batches_train_as_the_whole_batch_does(tmp_path, monkeypatch):
    """Without dropout, whose masks fall on other examples."""
    monkeypatch.setattr(loop, "LOG_EVERY", 1)
    few = ["train.max_steps=3", "train.max_train_examples=96", "train.dropout=0"]
    results, norms = [], []
    for more in (
        [],
        ["train.micro_batch_size=5"],
        ["train.piece_overhead=10"],
        ["train.micro_batch_size=7", "optimizer.recompute=true"],
    ):
        chosen = short(tmp_path, "optimizer=dsam", *few, *more)
        results.append(run(chosen))
        norms.append([line["gradient_norm"] for line in lines(identify(chosen).folder) if "gradient_norm" in line])
    for other, norm in zip(results[1:], norms[1:], strict=True):
        assert other["last"]["loss"] == pytest.approx(results[0]["last"]["loss"], rel=1e-5)
        assert norm == pytest.approx(norms[0], rel=1e-5) and len(norm) == 3
    assert len({r["id"] for r in results}) == 4


def test_kept_weights_give_the_recorded_scores_again(tmp_path):
    chosen = short(tmp_path, "checkpoint.keep_weights=true", "task=similarity")
    result = run(chosen)
    kept = identify(chosen).folder / "best"
    ready = prepare(
        config(
            "task=similarity",
            "model=encoder",
            f"model.path={kept}",
            "device.threads=1",
            f"paths.cache={tmp_path}/cache",
        )
    )
    again = evaluate(get_task("similarity"), ready.data, ready.network.eval(), ready.device)
    assert again["score"] == result["best"]["score"]


def test_a_finished_run_that_kept_no_weights_is_trained_again_for_them(tmp_path, capsys):
    """Its record stays to the byte; the weights are those of a run that kept its own; a sweep does it as well."""
    first, wanted = short(tmp_path), short(tmp_path, "checkpoint.keep_weights=true", "checkpoint.keep_at=[50]")
    result, folder = run(first), identify(first).folder
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    (planned,) = plan([wanted])
    assert planned.status == "missing" and plan([first])[0].done
    assert run(wanted) == result
    assert "has no at-50/, best/: it is trained again for them" in capsys.readouterr().out
    assert {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()} == before
    assert sorted(place.name for place in folder.iterdir() if place.is_dir()) == ["at-50", "best", "last"]
    assert plan([wanted])[0].done
    other = short(tmp_path / "other", "checkpoint.keep_weights=true")
    run(other)
    for name in ("best", "last"):
        weights = (folder / name / "model.safetensors").read_bytes()
        assert weights == (identify(other).folder / name / "model.safetensors").read_bytes()
    assert run(wanted) == result
    assert not capsys.readouterr().out.count("trained again")
    later = short(tmp_path, "checkpoint.keep_at=[25]")
    assert run(later) == result and "has no at-25/: it is trained" in capsys.readouterr().out
    assert (folder / "at-25" / "config.json").is_file() and not (folder / "again").exists()


def test_phases_of_few_steps_share_one_and_a_diverged_run_has_those_that_it_came_to(tmp_path):
    """Of 2 steps 25 and 50 per cent are the first: both folders are there, and the run is done."""
    both = short(tmp_path, "train.max_steps=2", "checkpoint.keep_at=[25,50,100]")
    run(both)
    folder = identify(both).folder
    weights = {name: (folder / name / "model.safetensors").read_bytes() for name in ("at-25", "at-50", "at-100")}
    assert weights["at-25"] == weights["at-50"] != weights["at-100"]
    assert plan([both])[0].done
    result = {"best": {"step": 2}, "train": {"steps": 2, "examples": 1200}}
    longer = short(tmp_path, "train.max_steps=8", "checkpoint.keep_at=[25,50,100]")
    assert lacks_weights(longer, folder.parent / "none", result) == ["at-25"]


def test_a_run_that_goes_on_with_other_threads_or_code_says_so(tmp_path, monkeypatch, often):
    chosen = short(tmp_path, often)
    with monkeypatch.context() as during:
        stepping(during, 5, lambda n: os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(Stopped):
            run(chosen)
    path = identify(chosen).folder / "provenance.json"
    before = json.loads(path.read_text())
    assert "earlier" not in before
    path.write_text(json.dumps(before | {"threads": 64, "source_sha256": "other"}))
    note = "went on from a checkpoint that was made with another source_sha256, threads"
    with monkeypatch.context() as during:  # and is stopped once more: the third attempt is on what the second was on
        stepping(during, 5, lambda n: os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(Stopped):
            run(chosen)
    assert note in run(chosen)["notes"]
    (then,) = json.loads(path.read_text())["earlier"]
    assert (then["threads"], then["source_sha256"], then["git"]) == (64, "other", before["git"])


def test_a_run_of_whose_checkpoints_none_can_be_used_began_afresh(tmp_path, monkeypatch, often):
    """And does not say of its numbers that they came from elsewhere."""
    chosen = short(tmp_path, often)
    with monkeypatch.context() as during:
        stepping(during, 5, lambda n: os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(Stopped):
            run(chosen)
    folder = identify(chosen).folder
    provenance = json.loads((folder / "provenance.json").read_text())
    (folder / "provenance.json").write_text(json.dumps(provenance | {"threads": 64}))
    for path in (folder / "checkpoint").glob("*.pt"):
        path.write_bytes(b"damaged")
    assert "notes" not in run(chosen)
    assert "earlier" not in json.loads((folder / "provenance.json").read_text())


def test_a_run_that_went_on_from_after_where_weights_are_asked_for_has_them(tmp_path, monkeypatch, often):
    first, wanted = short(tmp_path, often), short(tmp_path, "checkpoint.keep_at=[10,100]")
    with monkeypatch.context() as during:
        stepping(during, 5, lambda n: os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(Stopped):
            run(first)
    assert run(wanted)["status"] == "finished" and plan([wanted])[0].done
    folder, other = identify(wanted).folder, short(tmp_path / "other", "checkpoint.keep_at=[10,100]")
    run(other)
    for name in ("at-10", "at-100"):
        weights = (folder / name / "model.safetensors").read_bytes()
        assert weights == (identify(other).folder / name / "model.safetensors").read_bytes()
    assert not (folder / "again").exists()


@pytest.fixture
def scored(monkeypatch):
    """Gives evaluations these scores, one after the other."""

    def give(*scores):
        left = iter(scores)
        monkeypatch.setattr(loop, "evaluate", lambda *arguments: evaluate(*arguments) | {"score": next(left)})

    return give


def kept_best(folder):
    return (folder / "best" / "model.safetensors").read_bytes()


def test_weights_of_an_earlier_best_epoch_are_not_left_by_a_run_that_goes_on_without_keeping(
    tmp_path, monkeypatch, scored
):
    sizes = "train.max_train_examples=64", "train.epochs=3"  # two steps an epoch
    wanted, without = short(tmp_path, *sizes, "checkpoint.keep_weights=true"), short(tmp_path, *sizes)
    folder = identify(wanted).folder
    scored(0.1, 0.2, 0.3)
    with monkeypatch.context() as during:
        stepping(during, 3, lambda n: os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(Stopped):
            run(wanted)
    first = kept_best(folder)
    assert run(without)["best"]["epoch"] == 3 and not (folder / "best").exists()
    scored(0.1, 0.2, 0.3)
    run(wanted)
    assert kept_best(folder) == (folder / "last" / "model.safetensors").read_bytes() != first


def test_weights_of_a_best_epoch_that_was_lost_are_not_those_of_another(tmp_path, monkeypatch, scored):
    """What comes after the checkpoint may be rounded otherwise on a GPU: the lost second epoch was the best."""
    sizes = "train.max_train_examples=64", "train.epochs=3", "checkpoint.keep_weights=true"
    wanted = short(tmp_path, *sizes, "checkpoint.every_seconds=0")
    folder, save = identify(wanted).folder, Checkpoints.save

    def lost(checkpoints, step, state):
        if step == 4:
            raise RuntimeError("killed")
        save(checkpoints, step, state)

    scored(0.5, 0.9)
    with monkeypatch.context() as during:
        during.setattr(Checkpoints, "save", lost)
        with pytest.raises(RuntimeError, match="killed"):
            run(wanted)
    second = kept_best(folder)
    scored(0.4, 0.3, *(0.5, 0.4, 0.3))  # those that remain; and all again, beside it, for the first epoch's weights
    assert run(wanted)["best"]["epoch"] == 1
    alone = short(tmp_path / "alone", *sizes)
    scored(0.5, 0.4, 0.3)
    run(alone)
    assert kept_best(folder) == kept_best(identify(alone).folder) != second


def test_a_line_of_the_log_has_the_rate_of_its_step(tmp_path):
    chosen = short(tmp_path, "train.warmup_ratio=0", "train.lr=1e-3")
    run(chosen)
    train = [line for line in lines(identify(chosen).folder) if line["event"] == "train"]
    assert train[-1]["step"] == 12 and train[-1]["lr"] == pytest.approx(1e-3 / 12)


def test_weights_that_are_not_the_recorded_ones_are_kept_beside_the_run(tmp_path):
    first, wanted = short(tmp_path), short(tmp_path, "checkpoint.keep_weights=true")
    run(first)
    record = Record(identify(first).folder)
    record.finish(record.result() | {"weights_sha256": "other"})  # as from a GPU
    for _ in range(2):
        with pytest.raises(UserError, match="other weights, as may be on a GPU.* they are\\s+kept in .*/again"):
            run(wanted)
    assert list(record.folder.glob("again/**/best/model.safetensors"))
    assert not (record.folder / "best").exists() and run(first)["weights_sha256"] == "other"


def test_the_head_follows_seeds_init_and_the_data_order_seeds_data(tmp_path):
    head = [
        prepare(short(tmp_path, *g)).network.classifier.weight
        for g in (["seed=3"], ["seed=4", "seeds.init=3"], ["seed=4"])
    ]
    assert torch.equal(head[0], head[1])
    assert not torch.equal(head[0], head[2])
