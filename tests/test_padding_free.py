"""Padding-free passes beside padded ones: the same losses and gradients, the same masks replayed, or none at all."""

import copy
import json

import encoders
import numpy as np
import pytest
import torch
from test_config import config

from dsam import ExampleLosses
from dsam.glue import Tokenised
from dsam.methods import METHODS
from dsam.runs.identity import identify
from dsam.runs.run import run
from dsam.training import padding_free as packed
from dsam.training.backward import Backward
from dsam.training.dropout import set_dropout, use_fast_dropout
from dsam.training.padding_free import Layout, PaddingFree, padding_free

FITTING = ["bert", "roberta", "xlm_roberta", "camembert", "electra", "distilbert", "albert", "modernbert", "mpnet"]
OWN = ["deberta", "deberta_v2", "xlnet", "fnet", "funnel", "xlm", "squeezebert"]
"""Families whose attention is code of their own, or none."""
OTHERS = sorted(set(encoders.FAMILIES) - {*FITTING, *OWN, "t5", "bart"})
LENGTHS = [9, 2, 5, 12, 5, 1, 12]
OPTIONS = {"m_sam": {"m": 1}, "delta_sam": {"layers": 2}}


def rows(lengths=LENGTHS, labels=2):
    """Rows of random tokens, which end in BART's token of the end."""
    lengths, generator = np.asarray(lengths), np.random.default_rng(0)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    ids = generator.integers(4, encoders.V, offsets[-1])
    ids[offsets[1:] - 1] = 2
    return Tokenised(ids.astype(np.int32), offsets, None, np.arange(len(lengths)) % labels, 1, 0, False)


def network(family, dropout=0.0, **others):
    model = copy.deepcopy(encoders.model(family, **others))  # which share their configuration
    set_dropout(model, dropout)
    use_fast_dropout(model)
    return model


def gradient(method, closure, packing=None):
    """(loss, gradient end to end) of one step from a fixed random state."""
    torch.manual_seed(5)
    method.module.zero_grad()
    if packing is None:
        loss = method.backward(closure)
    else:
        with packing:
            loss = method.backward(closure)
    return loss, torch.cat([p.grad.flatten() for p in method.params if p.grad is not None])


def assert_same_as_padded(model, name="plain", **options):
    data = rows()
    closure = ExampleLosses(model, data.batch(range(len(data))))
    padded = gradient(METHODS[name](model, seed=3, **options), closure)
    packing, notes = padding_free(model, data, METHODS["plain"](model))
    assert packing is not None, notes
    seen = widths(model)
    found = gradient(METHODS[name](model, seed=3, **options), closure, packing)
    assert (1, sum(LENGTHS)) in seen or name == "m_sam"
    torch.testing.assert_close(found, padded, rtol=1e-9, atol=1e-9 * float(padded[1].norm()))
    again = gradient(METHODS[name](model, seed=3, **options), closure)  # outside, all is as it was
    assert torch.equal(again[1], padded[1])


def widths(model):
    """Collects the shapes (examples, tokens) that go into the modules of its layers."""
    seen = set()

    def see(_, args):
        if args and isinstance(args[0], torch.Tensor) and args[0].ndim == 3:
            seen.add(tuple(args[0].shape[:2]))

    for layer in packed.stacks_of(model)[0]:
        for module in list(layer.modules())[1:]:
            module.register_forward_pre_hook(see)
    return seen


@pytest.mark.parametrize("family", FITTING)
@pytest.mark.parametrize("name", ["plain", "sam", "delta_sam"])
def test_each_familys_gradient_is_that_of_padded_passes(family, name):
    assert_same_as_padded(network(family), name, **OPTIONS.get(name, {}))


@pytest.mark.filterwarnings("ignore:rdrop")
@pytest.mark.parametrize("name", sorted(set(METHODS) - {"per_instance"}))
def test_each_methods_gradient_is_that_of_padded_passes(name):
    assert_same_as_padded(network("bert"), name, **OPTIONS.get(name, {}))


@pytest.mark.parametrize("window", [2, 4, 64])
def test_a_window_of_attention_is_kept(window):
    assert_same_as_padded(network("modernbert", local_attention=window), "sam")


@pytest.mark.parametrize("family", OTHERS)
def test_another_family_either_gives_the_same_or_stays_padded(family):
    model = network(family).to(torch.float64)
    found, notes = padding_free(model, rows(), METHODS["plain"](model))
    assert (found is None) == bool(notes)
    if found is not None:
        assert_same_as_padded(model, "sam")


@pytest.mark.parametrize("family", OWN)
def test_a_network_with_attention_of_its_own_stays_padded_and_says_so(family):
    model = network(family)
    before = model.config._attn_implementation
    packing, notes = padding_free(model, rows(), METHODS["plain"](model))
    assert packing is None and model.config._attn_implementation == before
    assert notes == [f"train.padding=free: {type(model).__name__}'s attention is code of its own: batches are padded"]


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_a_network_with_a_decoder_stays_padded_and_says_so(family):
    model = network(family)
    assert "has a decoder as well" in padding_free(model, rows(), METHODS["plain"](model))[1][0]


def test_a_network_that_mixes_places_outside_its_attention_is_found_by_the_trial(monkeypatch):
    model = network("bert")
    layer = model.bert.encoder.layer[1]
    layer.register_forward_hook(lambda _, __, output: output + output.mean(1, keepdim=True))
    packing, (note,) = padding_free(model, rows(), METHODS["plain"](model))
    assert packing is None and "BertForSequenceClassification gives other outputs without" in note
    assert model.config._attn_implementation == "dsam" and packed._layout is None
    layer.register_forward_hook(lambda _, __, output: output[:, :12])
    packing, (note,) = padding_free(model, rows(), METHODS["plain"](model))
    assert packing is None and packed._layout is None


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("per_instance", {}),
        ("delta_sam", {"weighting": "gibbs", "norms": "exact"}),
        ("delta_sam", {"weighting": "gap"}),
    ],
)
def test_methods_that_take_single_examples_gradients_in_the_layers_stay_padded(name, options):
    model = network("bert")
    packing, (note,) = padding_free(model, rows(), METHODS[name](model, **options))
    assert packing is None and "takes single examples' gradients inside the layers" in note


def test_rows_padded_on_the_left_and_outputs_that_depend_on_padding_stay_padded():
    from dataclasses import replace

    model = network("bert")
    method = METHODS["plain"](model)
    assert "on the left" in padding_free(model, replace(rows(), pad_left=True), method)[1][0]
    assert "depend on padding" in padding_free(model, rows(), method, whole=True)[1][0]


def test_a_layout_by_hand():
    layout = Layout(torch.tensor([[1, 1, 1], [1, 0, 0], [1, 1, 1]]))
    assert layout.index.tolist() == [3, 0, 1, 2, 6, 7, 8]
    assert [(group.tolist(), length) for group, length in layout.groups] == [([1], 1), ([0, 2], 3)]
    x = torch.arange(9.0).view(3, 3, 1)
    assert layout.pack(x).flatten().tolist() == [3, 0, 1, 2, 6, 7, 8]
    assert layout.pack(x[:1]).flatten().tolist() == [0, 0, 1, 2, 0, 1, 2]
    assert layout.unpack(layout.pack(x)).flatten().tolist() == [0, 1, 2, 3, 0, 0, 6, 7, 8]


def test_no_layer_sees_padding_and_the_batch_is_one_pass():
    chosen = config("train.piece_overhead=0")
    model, data = network("bert"), rows()
    method = METHODS["sam"](model)
    packing, _ = padding_free(model, data, method)
    seen = widths(model)
    Backward(chosen, data, model, method, torch.device("cpu"), packing=packing)(np.arange(len(data)))
    assert seen == {(1, sum(LENGTHS))}
    assert method.report["forwards"] == 2 and model.config._attn_implementation == packed.NAME


@pytest.mark.parametrize("family", ["bert", "modernbert", "mpnet"])
@pytest.mark.parametrize("name", ["sam", "delta_sam"])
def test_masks_are_replayed(family, name):
    """With dropout: at ρ = 0 all passes draw the plain step's masks, of which no two are alike."""
    model, data = network(family, dropout=0.3), rows()
    packing, _ = padding_free(model, data, METHODS["plain"](model))
    closure = ExampleLosses(model, data.batch(range(len(data))))
    plain = gradient(METHODS["plain"](model), closure, packing)
    options = OPTIONS.get(name, {})
    assert all(map(torch.equal, plain, gradient(METHODS[name](model, rho=0.0, **options), closure, packing)))
    losses = torch.stack([gradient(METHODS["plain"](model), closure, packing)[0] for _ in range(2)])
    assert losses[0] == losses[1] == plain[0]
    with packing:
        assert METHODS["plain"](model).backward(closure) != plain[0]


@pytest.mark.parametrize("family", ["bert", "mpnet", "modernbert"])
def test_without_padding_the_packed_pass_draws_what_the_padded_one_does(family):
    """Rows of one length: the same masks, in the attention too."""
    model = network(family, dropout=0.3)
    closure = ExampleLosses(model, rows([6, 6, 6]).batch(range(3)))
    packing = PaddingFree(model)
    one, other = gradient(METHODS["plain"](model), closure), gradient(METHODS["plain"](model), closure, packing)
    torch.testing.assert_close(other, one, rtol=1e-9, atol=1e-12)


def test_bfloat16_is_near_the_padded_pass():
    model = network("bert").float()
    data = rows()
    batch = data.batch(range(len(data)))
    method = METHODS["sam"](model)
    packing = PaddingFree(model)
    found = gradient(method, ExampleLosses(model, batch, torch.bfloat16), packing)[1]
    expected = gradient(method, ExampleLosses(model, batch))[1]
    assert torch.nn.functional.cosine_similarity(found, expected, dim=0) > 0.99


def test_an_error_inside_leaves_the_network_as_it_was():
    model = network("bert")
    packing = PaddingFree(model)
    closure = ExampleLosses(model, rows().batch(range(7)))
    expected = closure()
    handle = model.bert.encoder.layer[1].register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError), packing:
        closure()
    handle.remove()
    assert torch.equal(closure(), expected) and not model._forward_pre_hooks


def short(tmp_path, *given):
    return config(
        "model=tiny", "train.padding=free", "train.batch_size=8", "train.max_steps=12", "train.max_train_examples=96",
        "tracking=disabled", "device.threads=1", f"paths.runs={tmp_path}/runs", f"paths.cache={tmp_path}/cache", *given,
    )  # fmt: skip


def test_a_run_is_another_run_and_one_with_the_default_is_what_it_was(tmp_path):
    free, default = identify(short(tmp_path)), identify(short(tmp_path, "train.padding=pieces"))
    assert free.contents["train"] == default.contents["train"] | {"padding": "free"}
    assert "padding" not in default.contents["train"]
    result = run(short(tmp_path, "optimizer=dsam"))
    assert result["status"] == "finished" and "notes" not in result
    assert result["hyperparameters"]["padding"] == "free"


def test_without_dropout_a_run_ends_where_a_padded_one_does(tmp_path):
    one, other = (
        run(short(tmp_path, "optimizer=sam", "train.dropout=0", *more)) for more in ([], ["train.padding=pieces"])
    )
    assert one["last"]["loss"] == pytest.approx(other["last"]["loss"], rel=1e-4)


def test_a_run_that_stays_padded_says_so(tmp_path):
    chosen = short(tmp_path, "optimizer=per_instance")
    result = run(chosen)
    (note,) = result["notes"]
    assert (
        note == "train.padding=free: PerInstance takes single examples' gradients inside the layers: batches are padded"
    )
    assert note in json.loads((identify(chosen).folder / "provenance.json").read_text())["notes"]


@pytest.mark.parametrize("optimizer", ["sam", "dsam"])
def test_a_run_goes_on_bit_for_bit(tmp_path, monkeypatch, optimizer):
    whole = run(short(tmp_path / "a", f"optimizer={optimizer}"))
    stopped = short(tmp_path / "b", f"optimizer={optimizer}", "checkpoint.every_seconds=0")
    step, taken = torch.optim.AdamW.step, 0

    def killed(self, *arguments):
        nonlocal taken
        taken += 1
        if taken == 8:
            raise KeyboardInterrupt
        return step(self, *arguments)

    with monkeypatch.context() as during, pytest.raises(KeyboardInterrupt):
        during.setattr(torch.optim.AdamW, "step", killed)
        run(stopped)
    assert list((identify(stopped).folder / "checkpoint").iterdir())
    again = run(stopped)
    assert again["weights_sha256"] == whole["weights_sha256"] and again["evaluations"] == whole["evaluations"]
