"""The CPU's dropout: the same random variable as PyTorch's, in a network that is otherwise what it was."""

import copy
import json
import random

import encoders
import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from test_config import config
from torch import nn
from transformers import BertConfig, BertForSequenceClassification

from dsam import ExampleLosses
from dsam.methods import METHODS
from dsam.runs.run import prepare
from dsam.training.dropout import Dropout, attention, configure_dropout, dropout, set_dropout, use_fast_dropout

N = 4_000_000


def within_chance(share, p, draws):
    return abs(share - p) < 5 * (p * (1 - p) / draws) ** 0.5


@pytest.mark.parametrize("p", [0.1, 0.5, 0.03])
def test_each_element_is_zeroed_with_probability_p_and_the_others_scaled(p):
    torch.manual_seed(0)
    out = dropout(torch.ones(N), p)
    rounded = round(p * 65536) / 65536
    assert abs(rounded - p) < 2**-17
    assert within_chance(float((out == 0).double().mean()), rounded, N)
    torch.testing.assert_close(out[out != 0].unique(), torch.tensor([1 / (1 - rounded)]), rtol=1e-6, atol=0)


def test_the_four_elements_of_one_draw_are_alike_and_independent():
    """A draw of less than 64 bits would show in its last quarter; one that is used twice, in a pair."""
    torch.manual_seed(1)
    zero = (dropout(torch.ones(N), 0.1) == 0).double().view(-1, 4)
    for lane in range(4):
        assert within_chance(float(zero[:, lane].mean()), 0.1, N // 4)
        for other in range(lane):
            assert within_chance(float((zero[:, lane] * zero[:, other]).mean()), 0.01, N // 4)
    after = (zero[1:] * zero[:-1]).mean()
    assert within_chance(float(after), 0.01, N)


@given(size=st.integers(0, 70), p=st.sampled_from([0.0, 0.1, 0.9, 1.0]), half=st.booleans())
@settings(max_examples=60, deadline=None)
def test_shape_type_and_gradient(size, p, half):
    x = torch.full((size,), 3.0, dtype=torch.bfloat16 if half else torch.float32, requires_grad=True)
    out = dropout(x, p)
    assert out.shape == x.shape and out.dtype == x.dtype
    out.sum().backward()
    torch.testing.assert_close(out, x.grad * 3, rtol=1e-2, atol=0)
    if p in (0.0, 1.0):
        assert (out == (3 if p == 0 else 0)).all()


def test_a_tensor_that_is_not_contiguous_keeps_its_layout_of_elements():
    x = torch.arange(1.0, 25).view(4, 6).t()
    out = dropout(x, 0.5)
    assert set((out / x).unique().tolist()) == {0.0, 2.0}


def test_masks_replay_from_the_generators_state_whatever_the_threads():
    x, state = torch.ones(100_003), torch.get_rng_state()
    threads = torch.get_num_threads()
    masks = []
    try:
        for count in (1, 2, 1):
            torch.set_num_threads(count)
            torch.set_rng_state(state)
            masks.append(dropout(x, 0.1))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(masks[0], masks[1]) and torch.equal(masks[0], masks[2])
    assert not torch.equal(masks[0], dropout(x, 0.1))


@pytest.fixture
def networks():
    """(in transformers' plain attention, the same weights with our dropout)"""
    torch.manual_seed(0)
    settings = BertConfig(vocab_size=50, hidden_size=24, num_hidden_layers=2, num_attention_heads=3, num_labels=3)
    settings.attention_probs_dropout_prob, settings.hidden_dropout_prob = 0.3, 0.1
    theirs = BertForSequenceClassification(settings)
    ours = copy.deepcopy(theirs)
    theirs.set_attn_implementation("eager")
    use_fast_dropout(ours)
    return theirs, ours


def batch():
    ids = torch.randint(1, 50, (5, 9), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[2, 4:] = mask[4, 1:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def test_without_dropout_the_network_is_what_it_was(networks):
    theirs, ours = (network.eval() for network in networks)
    torch.testing.assert_close(ours(**batch()).logits, theirs(**batch()).logits, rtol=1e-5, atol=1e-7)


def test_in_training_it_is_transformers_own_attention_with_these_masks(networks, monkeypatch):
    theirs, ours = (network.train() for network in networks)
    torch.manual_seed(3)
    one = ours(**batch()).logits
    gradient = torch.autograd.grad(one.square().sum(), list(ours.parameters()), allow_unused=True)
    monkeypatch.setattr(nn.functional, "dropout", lambda x, p, training, inplace=False: dropout(x, p))
    torch.manual_seed(3)
    two = theirs(**batch()).logits
    torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-6)
    expected = torch.autograd.grad(two.square().sum(), list(theirs.parameters()), allow_unused=True)
    for a, b in zip(gradient, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    torch.manual_seed(4)
    assert not torch.allclose(ours(**batch()).logits, one, atol=1e-3)


IDS = torch.randint(3, 50, (5, 9), generator=torch.Generator().manual_seed(2))
SIZES = {"vocab_size": 50, "num_labels": 2, "pad_token_id": 0}
OTHERS = {
    "T5": SIZES | {"d_model": 24, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 3, "decoder_start_token_id": 0},
    "Llama": SIZES
    | {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2}
    | {"num_attention_heads": 4, "num_key_value_heads": 2},
    "GPT2": SIZES | {"n_embd": 24, "n_layer": 2, "n_head": 3},
    "DebertaV2": SIZES | {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 3},
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_another_kind_of_model_adds_to_its_attention_stays(name):
    """Relative positions, shared keys, causal masks, an attention of its own."""
    torch.manual_seed(0)
    settings = getattr(transformers, f"{name}Config")(**OTHERS[name])
    ids = IDS.clone()
    if name == "T5":
        settings.eos_token_id = 1
        ids[:, -1] = 1
    theirs = getattr(transformers, f"{name}ForSequenceClassification")(settings).eval()
    ours = copy.deepcopy(theirs)
    use_fast_dropout(ours)
    logits = ours(input_ids=ids).logits
    torch.testing.assert_close(logits, theirs(input_ids=ids).logits, rtol=1e-4, atol=1e-5)
    logits.sum().backward()
    theirs(input_ids=ids).logits.sum().backward()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None)


def test_attention_drops_whole_shares_only_in_training():
    module = nn.Module()
    query, key = torch.zeros(1, 2, 4, 8), torch.zeros(1, 2, 4, 8)
    value = torch.ones(1, 2, 4, 8)
    out, shares = attention(module.train(), query, key, value, None, dropout=0.5)
    assert set(shares.flatten().tolist()) == {0.0, 0.5}  # a quarter each, kept ones twice that
    torch.testing.assert_close(out, shares.sum(-1).transpose(1, 2)[..., None].expand(1, 4, 2, 8))
    assert (attention(module.eval(), query, key, value, None, dropout=0.5)[1] == 0.25).all()


def test_a_run_on_a_cpu_uses_it_and_keeps_nothing_of_it_in_a_models_folder(tmp_path):
    network = prepare(config(f"paths.cache={tmp_path}")).network
    assert not any(type(m) is nn.Dropout for m in network.modules())
    assert any(isinstance(m, Dropout) for m in network.modules())
    assert network.config._attn_implementation == "dsam"
    network.save_pretrained(tmp_path / "kept")
    assert "dsam" not in json.dumps(json.loads((tmp_path / "kept" / "config.json").read_text()))


def family(name, p):
    """As a run with train.dropout=p builds it, in training mode."""
    kind, sizes = encoders.FAMILIES[name]
    settings = getattr(transformers, f"{kind}Config")(**sizes, num_labels=2)
    torch.manual_seed(0)
    configure_dropout(settings, p)
    network = getattr(transformers, f"{kind}ForSequenceClassification")(settings).train()
    set_dropout(network, p)
    return network


@pytest.fixture
def rates(monkeypatch):
    """The probabilities that PyTorch's own functions are given in training."""
    seen = []
    functional, attend = nn.functional.dropout, nn.functional.scaled_dot_product_attention

    def dropped(x, p=0.5, training=True, inplace=False):
        if training:
            seen.append(p)
        return functional(x, p, training, inplace)

    def attended(query, key, value, attn_mask=None, dropout_p=0.0, **options):
        seen.append(dropout_p)
        return attend(query, key, value, attn_mask, dropout_p, **options)

    monkeypatch.setattr(nn.functional, "dropout", dropped)
    monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", attended)
    return seen


INPUTS = {name: value for name, value in encoders.batch().items() if name != "labels"}


@pytest.mark.parametrize("name", encoders.FAMILIES)
def test_train_dropout_sets_every_dropout_of_a_family(name, rates):
    """Modules, functions with a number of their own, and attention; those that the family itself leaves out, too."""
    network = family(name, 0.375)
    network(**INPUTS)
    assert set(rates) == {0.375}
    per_layer = 1 if name in ("qwen2", "llama", "fnet") else 2
    assert len(rates) >= 3 * per_layer
    kept = {k: v for k, v in network.config.to_dict().items() if "drop" in k and "layerdrop" not in k}
    assert set(kept.values()) == {0.375}  # as a kept model's folder says
    modules = [m.p for m in network.modules() if isinstance(m, nn.modules.dropout._DropoutNd)]
    assert set(modules) <= {0.375}


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("name", encoders.FAMILIES)
def test_without_dropout_no_family_draws_anything(name, fast):
    network = family(name, 0.0)
    if fast:
        use_fast_dropout(network)
    state = torch.get_rng_state()
    assert torch.equal(network(**INPUTS).logits, network(**INPUTS).logits)
    assert torch.equal(torch.get_rng_state(), state)


def test_layers_are_left_out_as_the_model_says_unless_nothing_may_be_random():
    settings = transformers.BartConfig(encoder_layerdrop=0.5)
    configure_dropout(settings, 0.2)
    assert (settings.encoder_layerdrop, settings.attention_dropout) == (0.5, 0.2)
    configure_dropout(settings, 0.0)
    assert settings.encoder_layerdrop == 0


@pytest.mark.parametrize(("p", "said"), [(0.0, True), (0.1, False)])
def test_rdrop_says_that_it_is_plain_training_where_nothing_is_dropped(p, said, recwarn):
    network = family("bert", p)
    method = METHODS["rdrop"](network)
    for _ in range(2):
        method.backward(ExampleLosses(network, encoders.batch()))
    assert [note.startswith("rdrop: the model draws no dropout") for note in method.notes] == [True] * said
    assert len(recwarn) == said


@pytest.mark.parametrize("draw", [np.random.rand, random.random])
def test_rdrop_knows_what_a_model_draws_from_numpy_and_python(draw):
    network = family("bert", 0.0)
    network.classifier.register_forward_hook(lambda module, _, out: out * (1 + 9 * draw()))
    method = METHODS["rdrop"](network)
    method.backward(ExampleLosses(network, encoders.batch()))
    assert method.notes == [] and float(method.report["divergence"]) > 0


def test_rates_that_a_configuration_takes_as_whole_numbers_alone_reach_the_network():
    """MPT's `attn_pdrop`."""
    config = transformers.MptConfig(vocab_size=60, d_model=16, n_layers=2, n_heads=2, max_seq_len=40)
    configure_dropout(config, 0.25)
    network = transformers.MptForSequenceClassification(config)
    set_dropout(network, 0.25)
    assert {block.attn.attn_dropout_p for block in network.transformer.blocks} == {0.25}
