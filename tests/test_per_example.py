"""Per-example norms, products and weighted sums equal those of a loop of single-example backward passes."""

from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
)

import dsam.methods.outer_products as outer_products
from dsam.methods import factors
from dsam.methods.factors import joined
from dsam.methods.per_example import PerExampleGradients

SMALL = dict(vocab_size=40, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48)
SMALL |= dict(max_position_embeddings=24, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
SMALL |= dict(initializer_range=0.2)  # large enough for attention to matter
LENGTHS = (9, 4, 6, 1)


def token_batch(lengths=LENGTHS, pad=0, seed=0):
    """Random tokens (B, T) padded to the longest, and their mask."""
    generator = torch.Generator().manual_seed(seed)
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    ids = torch.randint(3, 12, mask.shape, generator=generator)  # words repeat within an example
    return torch.where(mask.bool(), ids, pad), mask


def classifier_losses(model, ids, mask):
    logits = model(input_ids=ids, attention_mask=mask).logits
    if logits.shape[1] == 1:
        return (logits[:, 0] - ids[:, 0]).square()
    return F.cross_entropy(logits, ids[:, 0] % 2, reduction="none")


def bert(attention="eager", labels=2, **changes):
    torch.manual_seed(1)
    config = BertConfig(**SMALL | changes, num_labels=labels, attn_implementation=attention)
    return BertForSequenceClassification(config)


def single_gradients(params, losses_of, batch):
    """The oracle: one forward and one backward pass per example, as rows of a (B, N) matrix."""
    rows = []
    for i in range(len(batch[0])):
        loss = losses_of(*(x[i : i + 1] for x in batch))
        grads = torch.autograd.grad(loss.sum(), params, allow_unused=True)
        rows.append(flat([torch.zeros_like(p) if g is None else g for p, g in zip(params, grads, strict=True)]))
    return torch.stack(rows)


def at_moved_weights(params, losses_of, batch, i, step):
    """(loss, gradient) of example i alone at w + step."""
    steps = step.split([p.numel() for p in params])
    kept = [p.detach().clone() for p in params]
    with torch.no_grad():
        for p, s in zip(params, steps, strict=True):
            p += s.view_as(p)
    loss = losses_of(*(x[i : i + 1] for x in batch)).sum()
    grads = torch.autograd.grad(loss, params, allow_unused=True)
    with torch.no_grad():
        for p, w in zip(params, kept, strict=True):
            p.copy_(w)
    return loss.detach(), flat([torch.zeros_like(p) if g is None else g for p, g in zip(params, grads, strict=True)])


def flat(tensors):
    return torch.cat([x.flatten() for x in tensors])


def assert_near(got, expected, tolerance):
    assert got.shape == expected.shape
    assert (got - expected).norm() <= tolerance * expected.norm()


def assert_equals_single_passes(model, losses_of, batch, tolerance=1e-5, params=None, **record):
    """Compare everything in the model's own precision; the oracle is in float64."""
    gradients = PerExampleGradients(model, params)
    with gradients.record(**record):
        losses = losses_of(*batch)
    gradients.backward(losses)
    size = len(losses)
    weights = torch.linspace(-0.3, 1, size, dtype=losses.dtype)
    generator = torch.Generator().manual_seed(2)
    direction = [torch.randn(p.shape, generator=generator).to(p) for p in gradients.params]
    got = [
        gradients.squared_norms(),
        gradients.gram(),
        gradients.dots(direction),
        flat(gradients.weighted_gradient(weights)),
    ]
    assert all(p.grad is None for p in model.parameters())
    pieces = recorded_in_pieces(gradients, losses_of, batch, record)
    got_joined = [
        pieces.squared_norms(),
        pieces.gram(),
        pieces.dots(direction),
        flat(pieces.weighted_gradient(weights)),
    ]
    norms_and_dots = []
    for few_tokens in (False, True):
        with patch.object(outer_products.WeightGroup, "few_tokens", few_tokens):
            norms_and_dots += [gradients.squared_norms_and_mean_dots(), pieces.squared_norms_and_mean_dots()]

    scales = 0.02 / got[0].sqrt().clamp_min(1e-3) * torch.linspace(0.5, 1.5, size, dtype=losses.dtype)
    moved = PerExampleGradients(model, params)
    with gradients.perturbed(scales):
        with moved.record(**record):
            moved_losses = losses_of(*batch)
        moved.backward(moved_losses)
        total = torch.autograd.grad(losses_of(*batch).sum(), gradients.params, allow_unused=True)
    total = flat([torch.zeros_like(p) if g is None else g for p, g in zip(gradients.params, total, strict=True)])
    change = moved.minus(gradients)
    got_moved = [
        moved_losses.detach(),
        moved.squared_norms(),
        total,
        change.squared_norms(),
        change.gram(),
        change.dots(direction),
        flat(change.weighted_gradient(weights)),
    ]

    dtype = next(model.parameters()).dtype
    model.double()
    g = single_gradients(gradients.params, losses_of, batch)
    expected = [g.square().sum(1), g @ g.T, g @ flat(direction).double(), weights.double() @ g]
    there = [at_moved_weights(gradients.params, losses_of, batch, i, scales[i] * g[i]) for i in range(size)]
    g_there = torch.stack([gradient for _, gradient in there])
    d = g_there - g
    expected_moved = [
        torch.stack([loss for loss, _ in there]),
        g_there.square().sum(1),
        g_there.sum(0),
        d.square().sum(1),
        d @ d.T,
        d @ flat(direction).double(),
        weights.double() @ d,
    ]
    model.to(dtype)
    for mine, theirs in zip(got_moved[:3], expected_moved[:3], strict=True):
        assert_near(mine.double(), theirs, tolerance)
    assert (d.norm(dim=1) > 1e-3 * g.norm(dim=1)).any()  # there is something to compare
    for mine, theirs in zip(got_moved[3:], expected_moved[3:], strict=True):
        assert_near(mine.double(), theirs, 100 * tolerance)  # small differences of gradients
    assert (expected[0] > 0).any()
    assert ((got[0] - expected[0]).abs() <= tolerance * expected[0]).all()
    for found in (got, got_joined):
        for mine, theirs in zip(found, expected, strict=True):
            assert_near(mine.double(), theirs, tolerance)
    for squares, dots in norms_and_dots:
        assert_near(squares.double(), expected[0], tolerance)
        assert_near(dots.double(), expected[1].mean(1), tolerance)


def recorded_in_pieces(gradients, losses_of, batch, record):
    """The first example by itself, then the others."""
    pieces = []
    for part in (slice(0, 1), slice(1, None)):
        piece = gradients.like()
        size = len(batch[0][part])
        if size:
            with piece.record(**dict.fromkeys(record, size)):
                losses = losses_of(*(x[part] for x in batch))
            piece.backward(losses)
            pieces.append(piece)
    return joined(pieces)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.float64, 1e-10)])
@pytest.mark.parametrize("labels", [1, 2])
def test_bert_with_padding(attention, dtype, tolerance, labels):
    model = bert(attention, labels).to(dtype)
    assert_equals_single_passes(model, lambda *b: classifier_losses(model, *b), token_batch(), tolerance)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.float64, 1e-10)])
def test_roberta_with_padding(dtype, tolerance):
    torch.manual_seed(1)
    config = RobertaConfig(**SMALL, num_labels=3, pad_token_id=1)
    model = RobertaForSequenceClassification(config).to(dtype)
    batch = token_batch(pad=1)
    assert_equals_single_passes(model, lambda *b: classifier_losses(model, *b), batch, tolerance)


@pytest.mark.parametrize("ghost_block, block", [(1, 1), (4, 200), (64, 2**22)])
@pytest.mark.parametrize("length", [5, 21])
@pytest.mark.parametrize("layers", [None, 1, 2**26])
def test_both_ways_to_a_norm_and_their_blocks(monkeypatch, ghost_block, block, length, layers):
    """At 5 tokens ghost products are cheaper, at 21 the gradient itself is: 21 · (32 + 32) > 32 · 32. As on a GPU, too:
    layer by layer, or all that are alike at once."""
    if layers:
        monkeypatch.setattr(factors, "launches_cost", lambda device: True)
        monkeypatch.setattr(outer_products, "LAYERS", layers)
    monkeypatch.setattr(outer_products, "GHOST_BLOCK", ghost_block)
    monkeypatch.setattr(outer_products, "GRAM_BLOCK", ghost_block)
    monkeypatch.setattr(outer_products, "BLOCK", block)
    model = bert().double()
    batch = token_batch((length, 3))
    assert_equals_single_passes(model, lambda *b: classifier_losses(model, *b), batch, 1e-10)


def test_tied_embedding_and_decoder():
    torch.manual_seed(1)
    model = BertForMaskedLM(BertConfig(**SMALL)).double()
    assert model.cls.predictions.decoder.weight is model.bert.embeddings.word_embeddings.weight

    def losses_of(ids, mask):
        logits = model(input_ids=ids, attention_mask=mask).logits
        return (F.cross_entropy(logits.mT, ids, reduction="none") * mask).sum(1)

    assert_equals_single_passes(model, losses_of, token_batch(), 1e-10)


class Toy(nn.Module):
    """A Linear and an Embedding used twice, in-place ReLU, no bias, no affine; tokens (B, ...)."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.embed = nn.Embedding(12, 6, padding_idx=4)
        self.shared = nn.Linear(6, 6)
        self.plain_norm = nn.LayerNorm(6, elementwise_affine=False)
        self.norm = nn.LayerNorm(6)
        self.unused = nn.Linear(6, 2)
        self.out = nn.Linear(6, 2, bias=False)

    def forward(self, ids):
        x = F.relu_(self.shared(self.embed(ids))) + self.embed((ids + 1) % 12)
        x = self.norm(x + self.plain_norm(self.shared(x)))
        self.unused(x)
        return self.out(x)


def toy_losses(model, ids):
    return model(ids).square().reshape(len(ids), -1).sum(1)


@pytest.mark.parametrize("shape", [(5, 7), (5,), (5, 2, 3), (1, 4)])
def test_shared_modules_and_any_number_of_token_axes(shape):
    model = Toy().double()
    ids = torch.randint(0, 12, shape, generator=torch.Generator().manual_seed(0))
    assert_equals_single_passes(model, lambda ids: toy_losses(model, ids), (ids,), 1e-10)


def test_norm_by_hand():
    """g = (y − 1) 2x for the loss (w·x − 1)² at w = 0: −2x, so ‖g‖² = 4 ‖x‖²."""
    model = nn.Linear(2, 1, bias=False)
    nn.init.zeros_(model.weight)
    gradients = PerExampleGradients(model)
    with gradients.record():
        losses = (model(torch.tensor([[3.0, 4.0], [0.0, 1.0]])) - 1).square().flatten()
    gradients.backward(losses)
    assert gradients.squared_norms().tolist() == [100, 4]
    assert gradients.gram().tolist() == [[100, 16], [16, 4]]
    assert gradients.weighted_gradient(torch.tensor([0.5, 0.5]))[0].tolist() == [[-3, -5]]
    assert gradients.dots([torch.tensor([[1.0, 0.0]])]).tolist() == [-6, 0]
    assert gradients.dots([None]).tolist() == [0, 0]


def test_frozen_parameters_do_not_count():
    model = bert().double()
    for p in [*model.bert.embeddings.parameters(), *model.bert.encoder.layer[0].parameters()]:
        p.requires_grad_(False)
    model.bert.encoder.layer[1].output.dense.bias.requires_grad_(False)
    model.bert.encoder.layer[1].output.LayerNorm.weight.requires_grad_(False)
    assert_equals_single_passes(model, lambda *b: classifier_losses(model, *b), token_batch(), 1e-10)


def test_a_parameter_frozen_later_contributes_nothing():
    model = nn.Linear(2, 1)
    gradients = PerExampleGradients(model)
    model.weight.requires_grad_(False)
    with gradients.record():
        losses = model(torch.ones(3, 2)).flatten()
    gradients.backward(losses)
    assert gradients.squared_norms().tolist() == [1, 1, 1]  # of the bias alone
    assert gradients.weighted_gradient(torch.ones(3))[0].tolist() == [[0, 0]]


def test_only_the_given_parameters_count_in_their_order():
    model = bert().double()
    params = [model.classifier.weight, model.bert.embeddings.word_embeddings.weight]
    assert_equals_single_passes(model, lambda *b: classifier_losses(model, *b), token_batch(), 1e-10, params)


def test_uniform_weights_give_the_mean_gradient_with_dropout_on():
    model = bert(hidden_dropout_prob=0.1).double().train()
    batch = token_batch()
    gradients = PerExampleGradients(model)
    torch.manual_seed(5)
    with gradients.record():
        losses = classifier_losses(model, *batch)
    gradients.backward(losses)
    torch.manual_seed(5)
    expected = torch.autograd.grad(classifier_losses(model, *batch).mean(), gradients.params)
    assert_near(flat(gradients.weighted_gradient(torch.full((4,), 0.25))), flat(expected), 1e-12)


@settings(deadline=None, max_examples=25)
@given(
    lengths=st.lists(st.integers(1, 20), min_size=1, max_size=5),
    weights=st.lists(st.floats(-2, 2), min_size=5, max_size=5),
    seed=st.integers(0, 99),
)
def test_products_agree_with_each_other(lengths, weights, seed):
    """The Gram matrix has the squared norms on its diagonal; times the weights it is a dot product."""
    model = bert().double()
    weights = torch.tensor(weights, dtype=torch.float64)[: len(lengths)]
    gradients = PerExampleGradients(model)
    with gradients.record():
        losses = classifier_losses(model, *token_batch(lengths, seed=seed))
    gradients.backward(losses)
    gram, direction = gradients.gram(), gradients.weighted_gradient(weights)
    ids, mask = token_batch(lengths, seed=seed)
    pieces = []
    for i, length in enumerate(lengths):  # each without padding
        pieces.append(gradients.like())
        with pieces[i].record():
            losses = classifier_losses(model, ids[i : i + 1, :length], mask[i : i + 1, :length])
        pieces[i].backward(losses)
    whole = joined([joined(pieces[:2]), *pieces[2:]])
    torch.testing.assert_close(whole.gram(), gram, rtol=1e-9, atol=1e-9)
    squares, dots = whole.squared_norms_and_mean_dots()
    torch.testing.assert_close(squares, gram.diagonal(), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(dots, gram.mean(1), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(flat(whole.weighted_gradient(weights)), flat(direction), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(gram.diagonal(), gradients.squared_norms(), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(gram @ weights, gradients.dots(direction), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(weights @ gram @ weights, flat(direction).square().sum(), rtol=1e-9, atol=1e-9)


def test_bfloat16_autocast_keeps_norms_in_float32():
    model = bert()
    batch = token_batch()
    gradients = PerExampleGradients(model)
    with torch.autocast("cpu", torch.bfloat16), gradients.record():
        losses = classifier_losses(model, *batch)
        gradients.backward(losses)
        norms, gram = gradients.squared_norms(), gradients.gram()
        weighted = flat(gradients.weighted_gradient(torch.full((4,), 0.25)))
    assert norms.dtype == gram.dtype == weighted.dtype == torch.float32
    torch.testing.assert_close(gram.diagonal(), norms, rtol=1e-5, atol=0)  # no bf16 rounding
    exact = single_gradients(gradients.params, lambda *b: classifier_losses(model, *b), batch)
    torch.testing.assert_close(norms, exact.square().sum(1), rtol=0.1, atol=0)  # bf16 activations
    assert_near(weighted, exact.mean(0), 0.05)


def test_bfloat16_is_the_same_by_fewer_operators(monkeypatch):
    """What a GPU does, beside what a CPU does with the same recorded numbers."""
    model, batch = bert(), token_batch()
    gradients = PerExampleGradients(model)
    with torch.autocast("cpu", torch.bfloat16), gradients.record():
        losses = classifier_losses(model, *batch)
    gradients.backward(losses)
    norms = gradients.squared_norms()

    def moved():
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16), gradients.perturbed(0.1 / norms.sqrt()):
            return classifier_losses(model, *batch)

    expected = moved()
    monkeypatch.setattr(factors, "launches_cost", lambda device: True)
    torch.testing.assert_close(gradients.squared_norms(), norms, rtol=1e-5, atol=0)
    assert (moved() - expected).norm() < 0.1 * (expected - losses.detach()).norm()


def test_checkpointing_without_reentry():
    model = bert().double().train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert_equals_single_passes(model, lambda *b: classifier_losses(model, *b), token_batch(), 1e-10)


def test_checkpointing_with_reentry_is_refused():
    model = bert().train()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    gradients = PerExampleGradients(model)
    with gradients.record():
        losses = classifier_losses(model, *token_batch())
    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        gradients.backward(losses)


class OwnForward(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


@pytest.mark.parametrize(
    "module",
    [
        nn.ConvTranspose1d(2, 2, 1),
        nn.MultiheadAttention(2, 1),
        nn.Embedding(2, 2, scale_grad_by_freq=True),
        OwnForward(2, 2),
    ],
)
def test_unsupported_module_is_named(module):
    model = nn.ModuleDict({"body": nn.Linear(2, 2), "odd": module})
    with pytest.raises(TypeError, match=rf"'odd' \({type(module).__name__}\)"):
        PerExampleGradients(model)
    module.requires_grad_(False)
    PerExampleGradients(model)  # it owns nothing that counts


def test_foreign_parameter_is_refused():
    with pytest.raises(ValueError, match="not the model's"):
        PerExampleGradients(nn.Linear(2, 2), [nn.Parameter(torch.zeros(2))])


def test_use_of_a_weight_outside_its_module_is_found():
    model = Toy()
    gradients = PerExampleGradients(model)
    with gradients.record():
        losses = F.linear(model(torch.tensor([[1, 2]])), model.out.weight.T).square().sum((1, 2))
    with pytest.raises(RuntimeError, match="'out.weight' is also used without calling"):
        gradients.backward(losses)


def test_lost_example_axis_is_found_or_mended():
    """Without the model's own call the batch size is unknown: position indices (1, T) stay as they are."""
    model = bert().double()
    ids, mask = token_batch()

    def losses_of(ids, mask):
        return model.classifier(model.bert(ids, mask).pooler_output).square().sum(1)

    gradients = PerExampleGradients(model)
    with gradients.record():
        losses = losses_of(ids, mask)
    with pytest.raises(RuntimeError, match="'bert.embeddings.position_embeddings' has leading dimension 1"):
        gradients.backward(losses)
    assert_equals_single_passes(model, losses_of, (ids, mask), 1e-10, batch_size=4)


def test_hooks_are_gone_after_the_context_even_if_the_forward_raises():
    model = Toy()
    gradients = PerExampleGradients(model)
    with pytest.raises(IndexError), gradients.record():
        model(torch.tensor([[99]]))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    with pytest.raises(RuntimeError, match="call record"):
        gradients.squared_norms()


def test_clear_frees_and_record_starts_afresh():
    model = Toy().double()
    gradients = PerExampleGradients(model)
    norms = []
    for _ in range(2):
        with gradients.record():
            losses = toy_losses(model, torch.tensor([[1, 2], [3, 4]]))
        gradients.backward(losses)
        norms.append(gradients.squared_norms())
    assert torch.equal(*norms)
    gradients.clear()
    with pytest.raises(RuntimeError, match="call record"):
        gradients.squared_norms()


def test_losses_must_be_one_per_example():
    model = Toy()
    gradients = PerExampleGradients(model)
    with gradients.record():
        losses = toy_losses(model, torch.tensor([[1, 2]]))
    with pytest.raises(ValueError, match=r"shape \(B,\)"):
        gradients.backward(losses.sum())
