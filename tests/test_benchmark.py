"""The benchmark's own arithmetic, on the tiny model: figures are there, add up, and count what they say."""

import contextlib
import json
import os
import signal
import sys
import time
from collections import Counter
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import warm
from conftest import command
from torch.autograd import DeviceType
from transformers import BertConfig, BertForSequenceClassification

from dsam import SAM
from dsam.benchmark import norms, packing, padding, scaling, shares, steps, table, throughput
from dsam.config import CONF, Config
from dsam.methods import ExampleLosses
from dsam.methods.per_example import PerExampleGradients
from dsam.overrides import compose_config
from dsam.runs.run import prepare
from dsam.training.backward import Backward
from dsam.training.batches import epoch_order

pytestmark = pytest.mark.slow


@pytest.fixture
def config(tmp_path):
    given = ["task=agreement", "model=tiny", "train.batch_size=8", f"paths.cache={tmp_path}", "device.threads=1"]
    return Config.load(compose_config([*given, f"paths.runs={tmp_path}/runs"], CONF))


def figures(what, config, *arguments):
    """What `what`.measure returns, beside whose process those that it starts come at once."""
    found, said = warm.call("test_benchmark:measured", what, config.to_dict(), *arguments)
    return [SimpleNamespace(**row) for row in found], said


def measured(what, config, *arguments):
    """In that process."""
    return [asdict(row) for row in sys.modules[f"dsam.benchmark.{what}"].measure(Config.load(config), *arguments)]


def test_methods_are_timed_beside_adamw_and_sam(tmp_path):
    out = tmp_path / "bench.json"
    arguments = ["task=agreement", "--methods", "adamw", "sam", "--batches", "2", "--rounds", "2", "--out", str(out)]
    done = command(*arguments, f"paths.cache={tmp_path}/cache", script="benchmark.py")
    assert done.returncode == 0, done.stderr
    found = {row["name"]: row for row in json.loads(out.read_text())["measured"]["agreement"]}
    assert (found["adamw"]["passes"], found["sam"]["passes"]) == (1, 2)
    ratio = found["sam"]["seconds"] / found["adamw"]["seconds"]
    assert f"{ratio:.3f}" in next(line for line in out.with_suffix(".md").read_text().splitlines() if "| sam" in line)
    assert all(row["peak_memory_bytes"] > 1e8 for row in found.values())
    wrong = command("--methods", "samm", script="benchmark.py")
    assert (wrong.returncode, wrong.stderr.strip()) == (2, "error: unknown method 'samm'; did you mean 'sam'?")


def test_trainer_sees_the_same_examples_and_its_padding_is_counted(config, monkeypatch):
    seen = []
    forward = throughput.PreTrainedModel.__call__

    def watched(model, *args, **inputs):
        if "ForSequenceClassification" in type(model).__name__:  # not the encoder inside it
            seen.append(inputs["attention_mask"])
        return forward(model, *args, **inputs)

    monkeypatch.setattr(throughput.PreTrainedModel, "__call__", watched, raising=False)
    found = {f.name: f for f in throughput.measure(config, steps=2, rounds=1)}
    assert set(found) == set(throughput.CONTENDERS)
    assert all(f.examples_per_second > 0 for f in found.values())
    padded, dynamic, ours = (
        found[name].padded_tokens for name in ("Trainer, padded to the limit", "Trainer, dynamic padding", "dsam")
    )
    assert padded == 16 * config.train.max_length > dynamic >= ours > found["dsam, padding-free"].padded_tokens
    masks = [m for m in seen if m.shape == (8, config.train.max_length)]
    assert len(masks) == 2 * 2  # two steps, a round to warm up and one that counts
    dynamic_masks = [m for m in seen if m.shape[0] == 8 and m.shape[1] < config.train.max_length]
    assert sum(m.numel() for m in dynamic_masks) >= dynamic
    assert {int(m.sum()) for m in masks} <= {int(m.sum()) for m in dynamic_masks}  # the same rows


def test_what_is_a_contender_already_is_none_twice(config):
    half = config.model_copy(update={"train": config.train.model_copy(update={"precision": "bfloat16"})})
    names = [found.name for found in throughput.measure(half, 1, 1)]
    assert names == [name for name in throughput.CONTENDERS if name != "dsam, bfloat16"]


def test_an_epoch_is_that_of_the_run(config):
    few = config.model_copy(update={"train": config.train.model_copy(update={"max_train_examples": 20})})
    assert shares._Run(few, 1).steps_per_epoch == 3  # of 8, 8 and 4


def test_what_would_be_padded_after_all_is_not_called_padding_free(config, monkeypatch):
    monkeypatch.setattr(steps, "packing_of", lambda *given: (None, ["train.padding=free does not go here"]))
    assert set(throughput.CONTENDERS) - {f.name for f in throughput.measure(config, 1, 1)} == {"dsam, padding-free"}
    ways = {(way.method, way.name) for way in padding.measure(config, 1, 1)}
    assert ways == {("adamw", "pieces"), ("adamw", "undivided"), ("adamw", "of one length"), ("sam", "pieces")}
    assert len(table.ways(padding.measure(config, 1, 1))) == 4


def counted(patch, *of):
    """The names of these functions, (holder, name) each, as they are called from here on."""
    calls = []
    for holder, name in of:
        inner = getattr(holder, name)
        patch.setattr(holder, name, lambda *a, name=name, inner=inner, **k: calls.append(name) or inner(*a, **k))
    return calls


NORMS = [(PerExampleGradients, "squared_norms"), (PerExampleGradients, "weighted_gradient")]


def norms_and_calls(config):
    """In a process of its own: what norms.measure finds, and what it called."""
    with pytest.MonkeyPatch.context() as patch:
        calls = counted(patch, *NORMS)
        return [measured("norms", config, 8, 1), calls]


def test_the_cost_of_norms_is_relative_to_a_backward_pass(config):
    (found, calls), _ = warm.call("test_benchmark:norms_and_calls", config.to_dict())
    assert calls == ["squared_norms", "squared_norms", "weighted_gradient"] * 2  # of the round that counts and another
    found = [norms.Cost(**row) for row in found]
    rows = table.costs(found)
    assert list(rows["one pass"]) == list(norms.WAYS)
    assert rows["/ backward"][0] == 1 and (rows["/ backward"] > 0).all()
    assert (rows["memory / backward"] < 3).all()


def test_norms_take_a_regression_too(config, monkeypatch):
    score = Config.load(compose_config(["task=similarity", "model=tiny", "train.batch_size=4",
                                        f"paths.cache={config.paths.cache}"], CONF))  # fmt: skip
    model, batch = norms._setting(score, 8)
    calls = counted(monkeypatch, *NORMS)
    for way, expected in zip(norms.WAYS, ([], ["squared_norms"], ["squared_norms", "weighted_gradient"]), strict=True):
        calls.clear()
        norms._once(model, batch, way, None)
        assert calls == expected
    assert batch["labels"].is_floating_point()
    seen = []
    model.register_forward_hook(lambda module, given, output: seen.append(output.logits.dtype))
    norms._once(model, batch, "exact norms", norms._autocast(score))
    half = score.model_copy(update={"train": score.train.model_copy(update={"precision": "bfloat16"})})
    norms._once(model, batch, "exact norms", norms._autocast(half))
    assert seen == [torch.float32, torch.bfloat16]


def test_batches_are_cut_as_a_run_on_that_device_cuts_them(config, monkeypatch):
    ready = prepare(config)
    examples = ready.data["train"]
    order = np.argsort(examples.lengths)[[0, 1, 2, 3, -4, -3, -2, -1]]  # half short, half long
    train = config.train.model_copy(update={"piece_overhead": 1})
    on_cpu = config.model_copy(update={"train": train})
    assert len(next(steps.batches(ready, on_cpu, order, None))) > 1
    (one,) = next(steps.batches(replace(ready, whole=True), on_cpu, order, None))
    assert len(one) == 8
    auto = config.model_copy(update={"train": train.model_copy(update={"piece_overhead": "auto"})})
    monkeypatch.setattr(steps, "to", lambda batch, device: batch)
    for device in ("cpu", "cuda"):
        there = torch.device(device)
        (found,) = steps.batches(replace(ready, device=there), auto, order, None)
        made = Backward(auto, examples, ready.network, SAM(ready.network), torch.device("cpu"))
        made.device = there
        assert [len(closure) for closure in found] == [len(part) for part in made.parts(order)]


def test_scaling_rows_are_what_they_say(config, monkeypatch):
    d = 16
    monkeypatch.setitem(
        scaling.SHAPES,
        "MiniLM-L6",
        dict(hidden_size=d, num_hidden_layers=1, num_attention_heads=2, intermediate_size=d),
    )
    found = [scaling.at(config, "MiniLM-L6", batch, 4, rounds=1) for batch in (2, 4)]
    scaling._steppers.cache_clear()
    rows = table.points(found)
    assert list(rows["batch"]) == [2, 4]
    assert rows["tokens a second"][1] == pytest.approx(16 / found[1].adamw_seconds)
    # By hand: forward and twice that backward; of a layer 4 d × d and 2 d × d products a token, attention's scores and
    # sums 2 · length · d a token, pooler and head once a row. No gradient goes on to what is below the embeddings.
    b, n = 4, 4
    forward = 2 * (b * n * 6 * d * d + 2 * b * n * n * d + b * (d * d + 2 * d))
    assert found[1].adamw_flops == 3 * forward
    assert rows["% of peak"][1] == pytest.approx(
        100 * 3 * forward / found[1].adamw_seconds / found[1].peak_flops_per_second
    )


def test_scaling_keeps_each_point_and_draws_them(tmp_path):
    out = tmp_path / "scaling.json"
    arguments = ["--what", "scaling", "--shapes", "MiniLM-L6", "--points", "1x8", "2x8", "--rounds", "1"]
    settings = ["train.precision=bfloat16", "device.threads=1"]
    done = command(*arguments, "--out", str(out), *settings, script="benchmark.py", before="test_benchmark:all_small")
    assert done.returncode == 0, done.stderr
    written = json.loads(out.read_text())
    (points,) = written["measured"].values()
    assert [(p["batch"], p["length"]) for p in points] == [(1, 8), (2, 8)]
    assert written["settings"] == {"threads": 1, "rounds": 1, "precision": "bfloat16"}
    assert out.with_suffix(".png").stat().st_size > 1e4 and out.with_suffix(".pdf").read_bytes()[:4] == b"%PDF"
    for given, said in (
        (["--what", "norms", "--batches", "2"], "--batches has no effect on --what norms"),
        (["--what", "shares", "--methods", "sam"], "--methods has no effect on --what shares"),
        (["optimizer=sam"], "optimizer=sam has no effect on --what steps: --methods says which are timed"),
        (["--what", "shares", "+optimizer.rho=1"], "+optimizer.rho=1 has no effect on --what shares"),
        (["train.lr=7"], "train.lr=7 has no effect on --what steps: leave it out"),
        (["train.epochs=7"], "train.epochs=7 has no effect on --what steps: leave it out"),
        (
            ["--what", "scaling", "train.batch_size=4"],
            "train.batch_size=4 has no effect on --what scaling: leave it out",
        ),
        (
            ["--what", "packing", "launcher.workers=2"],
            "launcher.workers=2 has no effect on --what packing: leave it out",
        ),
        (
            ["--what", "throughput", "train.padding=free"],
            "train.padding=free: --what throughput times both ways: leave it out",
        ),
        (
            ["--what", "padding", "train.padding=free"],
            "train.padding=free: --what padding times both ways: leave it out",
        ),
        (["--out", str(tmp_path)], f"--out {tmp_path} must name a .json file, beside which a .md is written"),
        (["--out", f"{out}/x.json"], f"cannot write {out}/x.json: File exists; set --out FILE.json"),
    ):
        wrong = command(*given, script="benchmark.py")
        assert (wrong.returncode, wrong.stderr) == (2, f"error: {said}\n")
    wrong = command("--what", "scaling", "--points", "2x", script="benchmark.py")
    assert wrong.returncode == 2 and "--points" in wrong.stderr and wrong.stderr.count("\n") == 1


def all_small():
    scaling.SHAPES["MiniLM-L6"].update(hidden_size=24, num_hidden_layers=1, intermediate_size=24)
    scaling.PEAK_SIZE["cpu"] = 256


def test_packed_runs_share_the_device(config):
    steps_of_a_run = 50
    config = config.model_copy(update={"train": config.train.model_copy(update={"max_steps": steps_of_a_run})})
    (one, two), _ = figures("packing", config, [1, 2], 2, 2)
    assert (one.at_once, two.at_once) == (1, 2)
    assert one.runs_per_hour == pytest.approx(3600 / (one.seconds * steps_of_a_run))
    assert two.runs_per_hour == pytest.approx(2 * 3600 / (two.seconds * steps_of_a_run))
    assert 1.8 < two.peak_memory_bytes / one.peak_memory_bytes < 2.2


def test_packed_runs_are_of_the_method_that_the_settings_describe(config):
    given = ["task=agreement", "optimizer=sam", "optimizer.rho=0.3", "train.batch_size=8"]
    packing._start(Config.load(compose_config([*given, f"paths.cache={config.paths.cache}"], CONF)), 1)
    method = packing._run[0].backward.method
    packing._run.clear()
    assert type(method) is SAM and method.rho == 0.3


def test_packed_runs_work_at_a_time(config, monkeypatch):
    """All that a number says have begun before one of them is waited for."""
    did = []

    class Apart:
        def __init__(self, *_):
            pass

        def __enter__(self):
            return self

        def __exit__(self, *_):
            return None

        def submit(self, *_):
            did.append("begin")
            return self

        def result(self):
            did.append("wait")
            return 1.0, 100

    monkeypatch.setattr(packing, "process", Apart)
    one, two = packing.measure(config, [1, 2], 2, 1)
    assert did == ["begin", "wait", "begin", "begin", "wait", "wait"] * 2  # of the round that counts and another
    assert (one.peak_memory_bytes, two.peak_memory_bytes) == (100, 200)


def test_what_does_not_fit_the_memory_costs_its_own_point(config):
    found, said = warm.call("test_benchmark:points", config.to_dict())
    assert found == ["BERT-base 1", "BERT-base 3"]
    assert "BERT-base: 2 × 8 tokens do not fit the memory" in said


def points(config):
    scaling.at = _killed_at_two
    return list(scaling.measure(Config.load(config), ["BERT-base"], [(1, 8), (2, 8), (3, 8)], 1))


def _killed_at_two(config, shape, batch, length, rounds):
    if batch == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return f"{shape} {batch}"


def test_shares_add_up_to_a_step(config, monkeypatch):
    imports = []
    monkeypatch.setattr(shares.subprocess, "run", lambda *given, **_: (imports.append(given), time.sleep(0.05)))
    calls = counted(monkeypatch, *((shares, name) for name in ("perturbed", "total_norm", "clip_grads_with_norm_")))
    found = {s.name: s for s in shares.measure(config, count=2, rounds=3)}
    # Three rounds that count and another; the first norm is that by which is clipped.
    assert Counter(calls) == {"perturbed": 4, "total_norm": 1 + 4, "clip_grads_with_norm_": 4}
    assert all(s.seconds > 0 for s in found.values())
    beside = ("operator", "making a batch")
    step = [s for s in found.values() if s.whole == "a SAM step" and not s.name.startswith(beside)]
    operators = [s for s in found.values() if s.name.startswith("operator")]
    assert "operator aten::mm" in found and 0.3 < sum(s.seconds for s in operators) / step[0].whole_seconds < 1
    assert sum(s.seconds for s in step) == pytest.approx(step[0].whole_seconds)
    assert found["SAM's two passes (the rest)"].seconds > 0.5 * step[0].whole_seconds
    rows = table.parts(list(found.values())).set_index("part")
    epoch = found["evaluation"]
    assert rows.loc["evaluation", "%"] == pytest.approx(100 * epoch.seconds / epoch.whole_seconds)
    assert epoch.whole_seconds > 0.1 and found["importing the libraries, once a sweep"].seconds >= 0.05
    assert imports == [([sys.executable, "-c", "import dsam.runs.run"],)] * 4


def test_what_interrupts_a_round_is_no_operator_s_share(monkeypatch):
    """By hand: medians of three rounds, 6 + 3 + 1, in the second of which something else took 50 of `view`'s."""
    rounds = iter([{"mm": 6.0, "add": 3.0, "view": 1.0}, {"mm": 5.0, "add": 4.0, "view": 51.0},
                   {"mm": 8.0, "view": 0.5, "add": 2.0, "once": 40.0}])  # fmt: skip
    monkeypatch.setattr(shares, "_own_times", lambda run: next(rounds))
    found = shares._operators(None, 2.0, 3)
    assert [(s.name, s.seconds) for s in found[:3]] == [
        ("operator mm", 1.2),
        ("operator add", 0.6),
        ("operator view", 0.2),
    ]
    assert all(s.seconds == 0 for s in found[3:])


def test_a_kernel_s_time_is_its_operator_s_and_counts_once(monkeypatch):
    """The profiler has a GPU's kernels, and annotations on it, as rows beside the operators that started them."""
    on, off = DeviceType.CUDA, DeviceType.CPU
    rows = [("aten::mm", off, 6.0), ("gemm_kernel", on, 6.0), ("aten::add", off, 3.0), ("Optimizer.step", on, 9.0)]
    seen = SimpleNamespace(
        key_averages=lambda: [SimpleNamespace(key=k, device_type=d, self_device_time_total=t) for k, d, t in rows]
    )
    monkeypatch.setattr(shares, "profile", lambda activities: contextlib.nullcontext(seen))
    ready = SimpleNamespace(device=torch.device("cuda"))
    assert shares._own_times(SimpleNamespace(ready=ready, sam_steps=lambda: None)) == {
        "aten::mm": 6.0,
        "aten::add": 3.0,
    }


def test_their_sam_takes_the_same_step():
    """The contender is timed at the same work: it ends at the weights that ours ends at."""
    pytest.importorskip("pytorch_optimizer")
    batch = {"input_ids": torch.arange(24).view(4, 6) + 3, "labels": torch.tensor([0, 1, 1, 0])}
    closures = [slice(0, 3), slice(3, 4)]
    ends = []
    for name in ("sam", steps.THEIRS):
        torch.manual_seed(0)
        shape = dict(vocab_size=40, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
        none = dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
        model = BertForSequenceClassification(BertConfig(**shape, **none)).train()
        step = steps.stepper(model, name)
        for _ in range(3):
            step([ExampleLosses(model, {k: v[part] for k, v in batch.items()}) for part in closures])
        ends.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert (ends[0] - ends[1]).abs().max() < 1e-8  # three steps of lr 1e-6 move a weight by 3e-6


def test_what_tasks_have_in_common_stands_once_and_what_not_beside_each(tmp_path):
    both = {"cola": {"rounds": 1, "batch_size": 16}, "sst2": {"rounds": 1, "batch_size": 32}}
    timed = {task: [steps.Timed("adamw", 1.0, 1.0, None)] for task in both}
    table.write(timed, table.rows, torch.device("cpu"), both, tmp_path / "b.json")
    written = json.loads((tmp_path / "b.json").read_text())
    assert written["settings"] == {"rounds": 1}
    assert written["settings_by_task"] == {"cola": {"batch_size": 16}, "sst2": {"batch_size": 32}}
    cola, sst2 = (tmp_path / "b.md").read_text().split("\n## ")[1:]
    assert "- batch_size: 16\n" in cola and "- batch_size: 32\n" in sst2


def test_a_method_whose_memory_does_not_suffice_keeps_its_time(config, monkeypatch, capsys):
    class Died:
        def __enter__(self):
            return self

        def __exit__(self, *_):
            return None

        def submit(self, *_):
            return self

        def result(self):
            raise BrokenProcessPool

    monkeypatch.setattr(steps, "process", Died)
    (timed,) = steps.measure(config, ["adamw"], 1, 1)
    assert timed.seconds > 0 and timed.peak_memory_bytes is None
    assert "adamw's memory is not known" in capsys.readouterr().err
    assert table.rows([timed])["peak memory, GB"].isna().all()


def test_ways_to_pad_are_timed_on_the_same_tokens(config):
    found, _ = figures("padding", config, 2, 1)
    rows = table.ways([padding.Way(**vars(row)) for row in found]).set_index(["method", "batches"])
    assert set(rows.index) == {(method, way) for method, (_, ways) in padding.CONTENDERS.items() for way in ways}
    assert (rows["seconds a step"] > 0).all() and (rows["faster than pieces by"].loc[:, "pieces"] == 1).all()
    tokens = rows["tokens a step, padding included"]["adamw"]
    ready = prepare(config)
    examples = ready.data[ready.task.train[0]]
    order = epoch_order(len(examples), config.seeds.data, 0)[:16]
    assert tokens["padding-free"] == examples.lengths[order].sum() / 2
    assert tokens["undivided"] == sum(8 * examples.lengths[order[k : k + 8]].max() for k in (0, 8)) / 2
    assert tokens["padding-free"] <= tokens["pieces"] <= tokens["undivided"]
    even = padding.of_one_length(examples, order, 8)
    assert all(len(set(even.lengths[k : k + 8])) == 1 for k in (0, 8))
    assert abs(tokens["of one length"] - tokens["padding-free"]) <= 4  # a half for each of 8 rows
    assert (even.input_ids[:8] == examples.take(order).input_ids[:8]).all() and len(even.labels) == 16


def test_a_checkpoint_is_timed_beside_steps_and_alone(config):
    (found,), said = figures("checkpoints", config, 2, 2)
    assert "checkpoints, round 2/2" in said
    weights_and_moments = 3 * 4 * 93_954
    assert 0 < found.bytes - weights_and_moments < 100_000
    assert 0 < found.waited < found.written and found.at_once > found.waited and found.step > 0
