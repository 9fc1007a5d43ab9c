"""What a GPU would meet, on a machine without one: tensors of two devices, waits of the host, memory, resumes."""

import contextlib
import functools
import os
import random
import re
import time
import warnings

import encoders
import joblib
import meta_device
import numpy as np
import pytest
import torch
from conftest import command
from joblib.externals import loky
from meta_device import GPU
from torch.utils._pytree import tree_leaves
from transformers import BartConfig, BartForSequenceClassification, BertConfig, BertForSequenceClassification

import dsam
from dsam.config import CONF, Config, Train
from dsam.cpus import cpus
from dsam.errors import OutOfMemory, UserError
from dsam.methods import METHODS
from dsam.methods.delta_sam import LIKELIHOOD
from dsam.methods.examples_apart import PROVEN
from dsam.methods.outer_products import Rows
from dsam.methods.weighting import WEIGHTINGS
from dsam.overrides import compose_config
from dsam.runs import run
from dsam.sweeps import sweep
from dsam.training import device as devices
from dsam.training import loop
from dsam.training.batches import pieces
from dsam.training.checkpoint import Checkpoints
from dsam.training.device import choose_device
from dsam.training.graphs import Graphs, host_state

CPU = torch.device("cpu")
CASES = {name: (name, {}) for name in METHODS if name != "delta_sam"}
CASES |= {f"{name} fresh": (name, {"mask": "fresh"}) for name in ("sam", "esam", "ae_sam", "freelb", "smart", "rdrop")}
CASES |= {f"delta_sam {w}": ("delta_sam", {"weighting": w}) for w in WEIGHTINGS}
CASES |= {
    "delta_sam probe layers=1": ("delta_sam", {"weighting": "probe", "layers": 1}),
    "delta_sam gibbs exact": ("delta_sam", {"weighting": "gibbs", "norms": "exact"}),
    "delta_sam probe recompute": ("delta_sam", {"weighting": "probe", "recompute": True}),
}
# What a step waits for besides the loss, which the loop reads a step later. These may only fall.
MAY_WAIT = {
    "ae_sam": (1, "whether to ascend"),
    "ae_sam fresh": (1, "whether to ascend"),
    "esam": (1, "which examples descend"),
    "esam fresh": (1, "which examples descend"),
    "delta_sam equalised": (2, "its solver is SciPy's: there and back"),
}


@functools.cache
def small(labels: str) -> BertConfig:
    sizes = dict(vocab_size=50, hidden_size=8, num_hidden_layers=2, num_attention_heads=1, intermediate_size=16)
    return BertConfig(**sizes, num_labels=1 if labels == "float" else 2)


def config(*given: str) -> Config:
    return Config.load(compose_config(["tracking=disabled", *given], CONF))


def batch(labels: str, tokens: int, B: int = 4) -> dict[str, torch.Tensor]:
    inputs = {
        name: torch.ones(B, tokens, dtype=torch.int64, device=GPU)
        for name in ("input_ids", "attention_mask", "token_type_ids")
    }
    dtype = torch.float32 if labels == "float" else torch.int64
    return inputs | {"labels": torch.zeros(B, dtype=dtype, device=GPU)}


def to_host(value):
    """What torch.load(map_location="cpu") gives back."""
    if isinstance(value, torch.Tensor):
        return torch.zeros(value.shape, dtype=value.dtype, device="cpu")
    return [to_host(x) for x in value] if isinstance(value, list) else value


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("lengths, labels, autocast", [((8,), "int", None), ((8, 9), "float", torch.bfloat16)])
def test_a_step_and_a_resume_on_another_device(monkeypatch, case, lengths, labels, autocast):
    name, options = CASES[case]
    host = meta_device.Host()
    meta_device.as_a_gpu(monkeypatch, host)
    with GPU:
        model = BertForSequenceClassification(small(labels)).train()
    devices.attend_without_wait(model)
    method = METHODS[name](model, **options)
    if name == "looksam":  # the step after a resume is one that reuses
        method.k = 3
    method.checked |= PROVEN | {LIKELIHOOD}  # in its first step, which waits for that; here nothing is computed
    params = list(model.parameters())
    optimizer = torch.optim.SGD(params, lr=1e-3, foreach=True)
    closures = [dsam.ExampleLosses(model, batch(labels, tokens), autocast) for tokens in lengths]
    if getattr(method, "_top", None) is not None:  # finds its parameters in its first step, and waits for that
        with host:
            method.backward(closures, wait=False)
            optimizer.zero_grad()
    for turn in range(2 if autocast is None else 1):  # a step, and one after a resume
        state = method.state_dict()
        if turn and not any(isinstance(t, torch.Tensor) and t.device == GPU for t in tree_leaves(state)):
            break  # it resumes as it began
        with host:
            if turn:
                method.load_state_dict({k: to_host(v) for k, v in state.items()})
            host.waits.clear()
            method.backward(closures, wait=False)
            assert method.report["finite"].device == GPU
            torch.nn.utils.clip_grads_with_norm_(params, 1.0, method.report["gradient_norm"])
            assert all(p.device == GPU and (p.grad is None or p.grad.device == GPU) for p in params)
            optimizer.step()
            optimizer.zero_grad()
        allowed = MAY_WAIT.get(case, (0, ""))[0] * len(lengths)
        assert sum(host.waits.values()) <= allowed, dict(host.waits)


def test_attention_that_does_not_look_into_its_mask_is_the_same():
    torch.manual_seed(0)
    model = BertForSequenceClassification(small("int")).eval()
    inputs = {"input_ids": torch.randint(50, (3, 7)), "attention_mask": torch.ones(3, 7, dtype=torch.int64)}
    inputs["attention_mask"][0, 4:] = 0
    expected = model(**inputs).logits
    devices.attend_without_wait(model)
    assert model.config._attn_implementation == devices.NAME
    torch.testing.assert_close(model(**inputs).logits, expected)


def test_a_batch_travels_without_a_mask_that_hides_nothing():
    ids, mask = torch.ones(2, 3, dtype=torch.int64), torch.tensor([[1, 1, 1], [1, 1, 0]])
    there = devices.to({"input_ids": ids, "attention_mask": mask}, GPU)
    assert set(there) == {"input_ids", "attention_mask"} and all(x.device == GPU for x in there.values())
    assert set(devices.to({"input_ids": ids, "attention_mask": mask[:1]}, GPU)) == {"input_ids"}


def test_rows_that_wait_for_nothing_are_the_same_rows():
    """Sums at the first of equal rows, against one row for each pair of example and word."""
    g = torch.Generator().manual_seed(0)
    B, S, words, n = 4, 6, 5, 3
    examples = torch.arange(B)[:, None].expand(B, S).flatten()
    made = []
    for make in (Rows.summed, Rows._summed_in_place):
        g.manual_seed(1)
        ids = torch.randint(words, (B * S,), generator=g)
        values = torch.randn(B * S, n, generator=g, dtype=torch.float64)
        rows = make(examples, ids, values, B, [S] * B)
        made.append((rows, rows.minus(make(examples, ids.flip(0), values, B, [S] * B))))
    weights, x = torch.rand(B, dtype=torch.float64), torch.randn(B, 2, n, dtype=torch.float64)
    wanted = torch.randint(words, (B, 7))
    for compact, in_place in zip(*made, strict=True):
        for ask in (
            lambda rows: rows.squared_norms(),
            lambda rows: rows.gram(),
            lambda rows: rows.weighted_sum(weights, words).to_dense(),
            lambda rows: rows.lookups(wanted, weights[:, None, None]),
            lambda rows: rows.outputs(x, words, weights[:, None, None]),
        ):
            torch.testing.assert_close(ask(in_place), ask(compact))


def train(**settings) -> Train:
    return Train(epochs=1, batch_size=32, lr=0.1, **settings)


@pytest.mark.parametrize(
    "device, precision, as_if",
    [
        (CPU, "float32", 64),
        (CPU, "bfloat16", 256),
        (GPU, "float32", None),
        (GPU, "bfloat16", None),
        (GPU, "tf32", None),
    ],
)
def test_how_finely_batches_are_cut_is_the_devices_affair_and_not_the_runs_name(device, precision, as_if):
    lengths = np.random.default_rng(0).integers(5, 120, size=32)
    found = pieces(np.arange(32), lengths, train(precision=precision, piece_overhead="auto"), device)
    expected = pieces(np.arange(32), lengths, train(piece_overhead=as_if), CPU)
    assert [piece.tolist() for piece in found] == [piece.tolist() for piece in expected]
    assert train(piece_overhead="auto").named() == train(piece_overhead=64).named()


@pytest.mark.parametrize("diverges", [None, 7, 12])
@pytest.mark.parametrize("name", ["plain", "sam", "looksam", "fsam", "msam"])
def test_outcomes_read_a_step_later_are_the_same_run(monkeypatch, tmp_path, name, diverges):
    """Losses, log, evaluations, weights; where a loss is not finite: the step, the message and the weights before."""

    def fine_tuned(later: bool):
        monkeypatch.setattr(devices.Outcomes, "__init__", functools.partialmethod(outcomes, later=later))
        c = config(f"paths.runs={tmp_path}", "train.max_steps=14", f"optimizer={conf.get(name, name)}")
        ready = run.prepare(c)
        method, log, calls = run.make_method(c, ready.network), [], 0
        checkpoints = Checkpoints(tmp_path / f"later-{later}")
        backward = method.backward

        def spoilt(closures, **options):
            nonlocal calls
            calls += 1
            if calls == diverges:
                closures = [lambda f=f: f() * float("nan") for f in closures]
            return backward(closures, **options)

        method.backward = spoilt
        state = loop.fine_tune(
            c,
            ready.task,
            ready.data,
            ready.network,
            method,
            CPU,
            checkpoints,
            log=log.append,
            resume=lambda state: None,
        )
        state.seconds = 0.0
        for line in log:
            line.pop("seconds", None)
        if diverges:
            log = [line for line in log if line["step"] < diverges]
        return vars(state), log, run.weights_digest(ready.network)

    outcomes = devices.Outcomes.__init__
    conf = {"plain": "adamw"}
    at_once, later = fine_tuned(False), fine_tuned(True)
    if diverges:
        assert at_once[0]["diverged"] == f"step {diverges}: gradient norm nan at loss nan: the step was not taken"
    assert later == at_once


def test_a_gpu_that_is_not_there_is_refused_before_the_start(paths):
    done = command("-m", "seed=0,1", "train.max_steps=2", "launcher.devices=[9]", "tracking=disabled", *paths)
    assert done.returncode == 2 and "launcher.devices=9: this machine has no such GPU" in done.stderr, done.stderr
    done = command("train.max_steps=2", "device.name=cuda", "tracking=disabled", *paths)
    assert done.returncode == 2 and re.search(r"error: device.name=cuda: this machine shows 0 CUDA", done.stderr)
    done = command("train.max_steps=2", "train.precision=tf32", "device.name=cpu", "tracking=disabled", *paths)
    assert done.returncode == 2 and "train.precision=tf32 is NVIDIA GPUs' own" in done.stderr


def test_a_device_that_is_kept_from_this_process_is_not_taken_all_the_same(monkeypatch):
    """Another's, on a machine that several share."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3, GPU-1f")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(UserError, match="launcher.devices=0: CUDA_VISIBLE_DEVICES=3, GPU-1f shows this process others"):
        devices.check_devices(["3", "0"])
    devices.check_devices(["3", "GPU-1f"])
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")  # fails if it was not put back


def test_a_pytorch_for_gpus_that_finds_none_says_so_once(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    (note,) = devices.notes(config())
    assert note.endswith("finds no GPU: on the CPU")
    assert devices.notes(config("device.name=cpu")) == []


def test_a_cpu_that_is_slow_in_bfloat16_says_so(monkeypatch, capsys):
    short = ["device.name=cpu", "train.max_steps=2", "tracking=disabled"]
    slow = [config(*short, "train.precision=bfloat16", f"seed={seed}") for seed in (0, 1)]
    for times, said in ((1.6, 0), (62.4, 1)):
        monkeypatch.setattr(devices, "times_of_bfloat16", lambda times=times: times)
        found = [note for note in run.prepare(slow[0]).notes if note.startswith("train.precision=bfloat16")]
        assert len(found) == said and all("about 62 times as long" in note for note in found)
        assert devices.notes(config(*short)) == []
        sweep._survey([*slow, config(*short)])
        assert capsys.readouterr().out.count("train.precision=bfloat16: this CPU") == said


@pytest.mark.parametrize("workers, given, threads, said", [
    (1, "null", 4, None),
    (4, "null", 1, None),
    (2, "2", 2, None),
    (6, "null", 1, "6 runs at once: that is 6 threads on 4 CPUs"),
    (1, "64", 64, "device.threads=64: that is 64 threads on 4 CPUs"),
    (2, "3", 3, "2 runs at once of device.threads=3: that is 6 threads on 4 CPUs"),
])  # fmt: skip
def test_more_threads_than_cpus_are_said(monkeypatch, workers, given, threads, said):
    monkeypatch.setattr(loky, "cpu_count", lambda: 4)
    asked = config("device.name=cpu", f"launcher.workers={workers}", f"device.threads={given}")
    before = torch.get_num_threads()
    try:
        choose_device(asked)
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    found = devices.notes(asked, workers)
    assert [note.split(",")[0] for note in found] == ([said] if said else [])


def test_the_time_of_bfloat16_is_measured_by_one_thread_s_own_time(monkeypatch):
    def repeat(product, timer, number, repeat):
        assert (torch.get_num_threads(), timer, number) == (1, time.thread_time, 1)
        return {torch.bfloat16: [9.0, 6.0, 7.0], torch.float32: [3.0, 2.0, 2.5]}[product().dtype]

    monkeypatch.setattr(devices.timeit, "repeat", repeat)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert devices.times_of_bfloat16.__wrapped__() == 3
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    monkeypatch.undo()
    assert devices.times_of_bfloat16.__wrapped__() > 0
    with monkeypatch.context() as coarse:  # where a thread's clock does not move meanwhile
        coarse.setattr(devices.time, "thread_time", lambda: 0.01)
        assert devices.times_of_bfloat16.__wrapped__() == 1


def test_cpus_are_counted_without_semaphores_and_up_to_a_limit_of_the_user(monkeypatch):
    monkeypatch.setattr(joblib.parallel, "mp", None)
    monkeypatch.delenv("LOKY_MAX_CPU_COUNT")
    assert cpus() == loky.cpu_count() == min(len(os.sched_getaffinity(0)), os.cpu_count())
    monkeypatch.setenv("LOKY_MAX_CPU_COUNT", "1")
    assert cpus() == 1
    monkeypatch.setenv("LOKY_MAX_CPU_COUNT", "all")
    with pytest.raises(UserError, match="^LOKY_MAX_CPU_COUNT=all is no number of CPUs: name one, or unset it$"):
        cpus()


def test_memory_that_ends_is_one_line():
    line = r"^cuda is out of memory: take train.micro_batch_size=8"
    with pytest.raises(OutOfMemory, match=line), devices.memory_said(torch.device("cuda")):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
    with pytest.raises(RuntimeError, match="another"), devices.memory_said(torch.device("cuda")):
        raise RuntimeError("another mistake")


def test_a_run_says_what_of_its_device_was_in_use(monkeypatch):
    assert devices.memory_in_use(torch.device("cpu")) is None
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (60, 80))
    assert devices.memory_in_use(torch.device("cuda")) == {"in_use": 20, "total": 80}


def test_a_run_that_lacked_memory_beside_others_is_tried_alone(tmp_path, paths):
    arguments = ["-m", "task=agreement", "train.max_steps=4", "tracking=disabled", *paths, "seed=0,1,2"]
    for beside in (["launcher.devices=[0]", "launcher.per_device=2", "device.name=cpu"], ["launcher.workers=2"]):
        runs = f"paths.runs={tmp_path}/{beside[0]}"
        done = command(*arguments, runs, *beside, before="faults:memory_for_one")
        assert done.returncode == 0, done.stderr
        assert "is tried once more, alone on its device" in done.stderr and "3 finished" in done.stdout
    alone = command(*arguments, "paths.runs=" + str(tmp_path / "alone"), before="faults:memory_for_one")
    assert alone.returncode == 0 and "tried once more" not in alone.stderr


def test_a_checkpoint_of_another_kind_of_device_is_not_gone_on_from(tmp_path, capsys):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(3, {"device": "cuda", "x": torch.ones(1)})
    checkpoints.wait()
    assert checkpoints.load("cpu") is None
    said = capsys.readouterr().err
    assert "is of cuda, and this is cpu: starting afresh" in said and said.count("\n") == 1
    checkpoints.save(4, {"device": "cpu", "x": torch.ones(1)})
    checkpoints.wait()
    assert checkpoints.load("cpu")["device"] == "cpu"


@pytest.mark.parametrize("family", ["mpnet", "xlnet", "convbert", "modernbert", "fnet"])
def test_a_family_is_not_waited_for(monkeypatch, family):
    host = meta_device.Host()
    meta_device.as_a_gpu(monkeypatch, host)
    model = encoders.model(family, torch.float32).to(GPU)
    devices.attend_without_wait(model)
    padded = {name: value.to(GPU) for name, value in encoders.batch().items()}
    with host:
        METHODS["sam"](model).backward([dsam.ExampleLosses(model, padded)], wait=False)
    assert not host.waits, dict(host.waits)


def test_an_eager_mask_that_is_not_looked_into_is_the_same():
    model = encoders.model("mpnet", torch.float32).eval()
    inputs = {name: value for name, value in encoders.batch().items() if name != "labels"}
    assert not inputs["attention_mask"].all()
    before = model(**inputs).logits, model(input_ids=inputs["input_ids"]).logits
    devices.attend_without_wait(model)
    assert torch.equal(model(**inputs).logits, before[0])
    assert torch.equal(model(input_ids=inputs["input_ids"]).logits, before[1])


class _Graph:
    """In a CUDA graph's place: what was captured is done again."""

    capturing = None

    def register_generator_state(self, generator):
        pass

    def replay(self):
        self.replays = getattr(self, "replays", 0) + 1


@pytest.fixture
def graphs(monkeypatch):
    """A Graphs whose captures go to `_Graph`, with the model's own method, on the CPU."""
    for name, stand_in in {
        "graph_pool_handle": lambda: None,
        "CUDAGraph": _Graph,
        "graph": lambda graph, pool: contextlib.nullcontext(),
        "get_sync_debug_mode": lambda: 0,
        "set_sync_debug_mode": lambda mode: None,
        "default_generators": [torch.default_generator],
    }.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
    monkeypatch.setattr("dsam.training.graphs.host_state", lambda: b"")  # here the host draws the dropout masks, too
    model = BertForSequenceClassification(small("int")).train()
    return Graphs(METHODS["sam"](model), model, None, 1.0)


def host_batch(tokens=8):
    ids = torch.arange(4 * tokens).view(4, tokens) % 50
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids[:, 0] % 2}


def test_a_shape_is_run_watched_captured_and_replayed(graphs):
    for turn, captured in enumerate((0, 0, 1, 1)):
        graphs.backward(host_batch())
        assert len(graphs.captured) == captured, turn
    ((graph, *_),) = graphs.captured.values()
    assert graph.replays == 2 and not graphs.failed
    graphs.backward(host_batch(9))  # another shape is run once, and need not be watched
    graphs.backward(host_batch(9))
    assert len(graphs.captured) == 2


@pytest.mark.parametrize("layerdrop, captures", [(0.0, True), (0.5, False)])
def test_a_model_that_draws_on_the_host_is_not_captured(graphs, monkeypatch, capsys, layerdrop, captures):
    """BART's LayerDrop: a graph would have the layers of one draw for good."""
    monkeypatch.setattr("dsam.training.graphs.host_state", host_state)
    config = BartConfig(vocab_size=60, d_model=16, encoder_layers=4, decoder_layers=1, encoder_attention_heads=2,
                        decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16, dropout=0.0,
                        encoder_layerdrop=layerdrop, max_position_embeddings=40, num_labels=2)  # fmt: skip
    graphs.model = BartForSequenceClassification(config).train()
    graphs.method = METHODS["sam"](graphs.model)
    batch = host_batch()
    batch["input_ids"] = batch["input_ids"].clamp(min=3)
    batch["input_ids"][:, -1] = 2
    for _ in range(3):
        graphs.backward(batch)
    assert len(graphs.captured) == captures and graphs.failed != captures
    assert ("without CUDA graphs: the model draws random numbers" in capsys.readouterr().err) != captures


@pytest.mark.parametrize("draw", [random.random, np.random.rand, lambda: torch.rand(())])
def test_every_draw_on_the_host_is_seen(draw):
    before = host_state()
    assert host_state() == before
    draw()
    assert host_state() != before


def test_a_run_makes_its_gpu_the_current_one(monkeypatch):
    """Events, graphs and torch.cuda.synchronize() take the streams of the current device."""
    taken = []
    for name, stand_in in {"is_available": lambda: True, "device_count": lambda: 2, "set_device": taken.append}.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    monkeypatch.setattr(torch, "use_deterministic_algorithms", lambda wanted: None)
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    try:
        assert choose_device(config("device.name=cuda:1")) == torch.device("cuda:1")
        assert taken == [torch.device("cuda:1")]
        choose_device(config("device.name=cuda"))
        assert len(taken) == 1
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def test_a_model_that_waits_is_not_captured(graphs, monkeypatch, capsys):
    step = graphs._step

    def waits(inputs):
        warnings.warn("called a synchronizing CUDA operation", stacklevel=1)
        warnings.warn("something else", stacklevel=1)
        return step(inputs)

    monkeypatch.setattr(graphs, "_step", waits)
    graphs.backward(host_batch())
    with pytest.warns(UserWarning, match="something else"):
        graphs.backward(host_batch())
    assert (
        graphs.failed
        and "a step waits for the device 1 times, first at tests/test_device.py" in capsys.readouterr().err
    )
    graphs.backward(host_batch())
    assert not graphs.captured and capsys.readouterr().err == ""


def test_a_capture_that_fails_leaves_the_generators_as_they_were(graphs, monkeypatch, capsys):
    before = torch.get_rng_state(), graphs.method.generator.get_state()
    kept = {}

    class Stuck:
        """A generator that a spoilt capture left; its state is replaced as a whole."""

        device = CPU

        def __init__(self, name, state):
            self.name, self.state = name, state

        def get_state(self):
            return self.state

        def graphsafe_set_state(self, state):
            kept[self.name] = state

    class Fresh:
        def __init__(self, device):
            pass

        def set_state(self, state):
            self.state = state
            return self

        def graphsafe_get_state(self):
            return self.state

    graphs.backward(host_batch())
    graphs.backward(host_batch())
    step = graphs._step
    monkeypatch.setattr(torch.cuda, "default_generators", [Stuck("default", before[0])])
    graphs.method._generator = Stuck("own", before[1])
    monkeypatch.setattr(torch, "Generator", Fresh)
    monkeypatch.setattr(graphs, "_step", lambda inputs: (_ for _ in ()).throw(RuntimeError("spoilt")))
    with pytest.raises(RuntimeError, match="spoilt"):  # the capture's is caught, that of the step without is not
        graphs.backward(host_batch())
    assert "without CUDA graphs: spoilt" in capsys.readouterr().err
    assert torch.equal(kept["default"], before[0]) and torch.equal(kept["own"], before[1])
    monkeypatch.setattr(graphs, "_step", step)
    graphs.method._generator = None
    monkeypatch.undo()
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
    assert graphs.backward(host_batch()).isfinite() and not graphs.captured
