"""What a step costs in counts, which a busy machine cannot blur: forwards, backwards, padded tokens, weight passes."""

from collections import Counter

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import BertConfig, BertForSequenceClassification

from dsam.config import Train
from dsam.methods import METHODS, ExampleLosses, factors
from dsam.methods.casts import CastAtOnce
from dsam.training.batches import pieces

EXAMPLES, LAYERS = 8, 2
COUNTS = {  # method, options: (forwards, backwards) over the whole batch, (pieces = 1)
    ("plain", ()): (1, 1),
    ("sam", ()): (2, 2),
    ("asam", ()): (2, 2),
    ("per_instance", ()): (2, 2),
    ("m_sam", (("m", 1),)): (2, 2),
    ("gsam", ()): (2, 2),
    ("fsam", ()): (2, 2),
    ("msam", ()): (1, 1),
    ("sam_on", ()): (2, 2),
    ("rdrop", ()): (2, 2),
    ("r3f", ()): (2, 2),
    ("freelb", ()): (3, 3),
    ("delta_sam", (("weighting", "uniform"),)): (2, 2),
    ("delta_sam", (("weighting", "confidence"),)): (2, 2),
    ("delta_sam", (("weighting", "probe"),)): (3, 2),
    ("delta_sam", (("weighting", "probe"), ("probes", 2))): (4, 2),
    ("delta_sam", (("weighting", "curvature"),)): (4, 2),
    ("delta_sam", (("weighting", "gibbs"),)): (3, 2),
    ("delta_sam", (("weighting", "gap"),)): (2, 2),
    ("delta_sam", (("weighting", "relative_gap"),)): (2, 2),
    ("delta_sam", (("weighting", "gauss_newton"),)): (2, 2),
    ("delta_sam", (("weighting", "exact_curvature"),)): (4, 4),
}


class Seen(TorchDispatchMode):
    """Counts the numbers that `torch._foreach_*` calls go over."""

    def __init__(self):
        super().__init__()
        self.passes = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.__name__.startswith("_foreach") and isinstance(args[0], list | tuple):
            self.passes[func.__name__.split(".")[0]] += sum(t.numel() for t in args[0])
        return func(*args, **kwargs or {})


@pytest.fixture
def model():
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=30, hidden_size=16, num_hidden_layers=LAYERS, num_attention_heads=2, intermediate_size=16
    )
    return BertForSequenceClassification(config).train()


def batch(rows=EXAMPLES, length=6):
    ids = torch.arange(rows * length).view(rows, length) % 27 + 3
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids[:, 0] % 2}


def counted(model, method, closures):
    """(forwards, backwards) of one step, by the examples that pass through the encoder, over the batch's."""
    through = Counter()

    def forward(module, args, kwargs, output):
        hidden = output.last_hidden_state
        through["forwards"] += len(hidden)
        if hidden.requires_grad:
            hidden.register_hook(lambda grad: through.update(backwards=len(grad)))

    handle = model.bert.register_forward_hook(forward, with_kwargs=True)
    try:
        method.backward(closures)
    finally:
        handle.remove()
    examples = sum(len(closure) for closure in closures)
    return through["forwards"] / examples, through["backwards"] / examples


@pytest.mark.parametrize("cut", [1, 2])
@pytest.mark.parametrize(("name", "options"), COUNTS)
def test_a_step_runs_as_many_passes_as_the_table_says(model, name, options, cut):
    whole, rows = batch(), EXAMPLES // cut
    closures = [ExampleLosses(model, {k: v[i : i + rows] for k, v in whole.items()}) for i in range(0, EXAMPLES, rows)]
    method = METHODS[name](model, **dict(options))
    if method.by_example:
        method.backward(closures)  # in which exact per-example gradients are proven, by one pass more
    assert counted(model, method, closures) == pytest.approx(COUNTS[name, options], abs=1e-9)
    report = method.report
    assert (report["forwards"], report["backwards"]) == pytest.approx(COUNTS[name, options], abs=1e-9)


def test_probes_of_the_top_layers_run_only_those(model):
    """What is run: a lower layer is still called, and gives what it gave."""
    method = METHODS["delta_sam"](model, weighting="probe", layers=1)
    method.backward(ExampleLosses(model, batch()))  # in which it finds out which parameters are the top's
    ran = Counter()
    for k, layer in enumerate(model.bert.encoder.layer):
        layer.attention.register_forward_hook(lambda *_, k=k: ran.update([k]))
    method.backward(ExampleLosses(model, batch()))
    assert ran == {0: 2, 1: 3}


def test_perturbing_and_restoring_take_two_passes_over_the_weights_that_the_batch_uses(model):
    weights = sum(p.numel() for p in model.parameters())
    words, used = model.get_input_embeddings().weight, 4  # of its rows
    closure = ExampleLosses(model, batch() | {"input_ids": batch()["input_ids"] % used + 1})
    passes = {}
    for name in ("plain", "sam", "asam"):
        with Seen() as seen:
            METHODS[name](model, **({"biases": True} if name == "asam" else {})).backward(closure)
        passes[name] = seen.passes
        model.zero_grad()
    # Clipping's norm of the final gradient is in each: SAM has one norm and one sum more, and nothing is copied back.
    table, rows = words.numel(), used * words.shape[1]
    more = passes["sam"] - passes["plain"]
    assert more == {"_foreach_norm": weights - table + rows, "_foreach_add": weights - table}  # the rows by themselves
    scaled = passes["asam"] - passes["plain"]  # by tensors as large as the weights, so by all of them
    assert scaled["_foreach_norm"] == 2 * weights and scaled["_foreach_mul"] == weights


NOT_LAUNCHED = ("empty", "_unsafe_view", "promote_types", "_local_scalar_dense")
OPERATORS = {"plain": 1140, "sam": 2280, "per_instance": 2940}
"""Of a step of 12 layers in bfloat16, as on a GPU, where a step is bound by their number. These may only fall. (Of
attention, a CPU's plain operators are counted.)"""


class Operators(TorchDispatchMode):
    """Counts the operators that compute something: no views, no allocations."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        view = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
        self.count += not view and not any(name in str(func) for name in NOT_LAUNCHED)
        return func(*args, **kwargs or {})


def operators(name, monkeypatch, cast):
    monkeypatch.setattr(factors, "launches_cost", lambda device: True)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=30, hidden_size=16, num_hidden_layers=12, num_attention_heads=2, intermediate_size=16
    )
    network = BertForSequenceClassification(config).train()
    if cast:
        CastAtOnce(network)
    method = METHODS[name](network)
    method.backward(ExampleLosses(network, batch(), torch.bfloat16))  # once, for what is looked at only then
    network.zero_grad()
    with Operators() as seen:
        method.backward(ExampleLosses(network, batch(), torch.bfloat16))
    return seen.count


@pytest.mark.parametrize("name", OPERATORS)
def test_a_step_on_a_gpu_launches_no_more_operators_than_before(monkeypatch, name):
    found = operators(name, monkeypatch, cast=True)
    assert 0.9 * OPERATORS[name] < found <= OPERATORS[name]
    passes = 1 if name == "plain" else 2
    weights = 12 * 12 + 4
    backwards = 1 if name == "per_instance" else passes  # its first one stops at the layers' outputs
    each_by_itself = operators(name, monkeypatch, cast=False)
    assert each_by_itself - found == (weights - 13) * (passes + backwards)  # 12 layers and what is in none


@pytest.mark.parametrize(
    ("lengths", "overhead", "tokens"),
    [
        ([10] * 32, 64, 320),
        ([5] * 16 + [50] * 16, 64, 5 * 16 + 50 * 16),  # one cut: 880 + 2 · 64 against 1600 + 64
        ([5] * 16 + [8] * 16, 64, 8 * 32),  # a cut would save 48 tokens and cost 64
        ([5] * 16 + [8] * 16, 47, 5 * 16 + 8 * 16),  # 48 saved, 47 paid
        ([1, 2, 3, 100], None, 400),
        ([1, 1, 50, 100], 1, 1 + 1 + 50 + 100),
    ],
)
def test_tokens_padded_are_as_few_as_they_can_be(lengths, overhead, tokens):
    lengths = np.array(lengths)
    train = Train(epochs=1, batch_size=32, lr=0.1, piece_overhead=overhead)
    parts = pieces(np.arange(len(lengths)), lengths, train)
    assert sorted(np.concatenate(parts)) == list(range(len(lengths)))
    paid = sum(len(part) * lengths[part].max() for part in parts)
    assert paid == tokens
