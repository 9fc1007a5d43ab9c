"""δ-SAM with exact per-example quantities, against gradients taken one example at a time."""

import math

import pytest
import torch
from scipy.optimize import minimize
from torch import nn
from transformers import BertConfig, BertForSequenceClassification

from dsam import DeltaSAM, ExampleLosses
from dsam.integrations.distributed import GlobalStep
from dsam.methods import WEIGHTINGS, Probe, make_weighting
from dsam.methods.per_example import PerExampleGradients
from dsam.methods.perturbation import perturbed
from dsam.methods.weighting import LossChange, RelativeGap

EXACT = ["gap", "relative_gap", "gauss_newton", "gibbs", "equalised", "exact_curvature"]
B, RHO = 6, 0.05


def bert(labels=2):
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=40,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=16,
        num_labels=labels,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return BertForSequenceClassification(config).double().train()


def batch(labels=2, n=B):
    g = torch.Generator().manual_seed(1)
    mask = (torch.arange(9)[None] < torch.randint(3, 10, (n, 1), generator=g)).long()
    target = torch.rand(n, generator=g).double() * 5 if labels == 1 else torch.randint(0, labels, (n,), generator=g)
    return {"input_ids": torch.randint(0, 40, (n, 9), generator=g), "attention_mask": mask, "labels": target}


def one_by_one(closure, params):
    """G (B, P): every example's gradient, from a backward pass of its own."""
    rows = []
    for i in range(B):
        gradient = torch.autograd.grad(closure.subset([i])().sum(), params, allow_unused=True)
        rows.append(
            torch.cat(
                [(torch.zeros_like(p) if g is None else g).flatten() for g, p in zip(gradient, params, strict=True)]
            )
        )
    return torch.stack(rows)


def curvature_one_by_one(closure, params):
    """‖H_i ĝ_i‖ by double backward."""
    found = []
    for i in range(B):
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            gradient = torch.autograd.grad(closure.subset([i])().sum(), params, create_graph=True, allow_unused=True)
            flat = torch.cat([g.flatten() for g in gradient if g is not None])
            unit = (flat / flat.norm()).detach()
            product = torch.autograd.grad(flat @ unit, params, allow_unused=True)
        found.append(torch.cat([g.flatten() for g in product if g is not None]).norm())
    return torch.stack(found)


def expected_scores(name, closure, params, labels):
    g = one_by_one(closure, params)
    norms, mean = g.norm(dim=1), g.mean(0)
    epsilon = RHO * mean / mean.norm()
    if name == "gap":
        return RHO * norms - g @ epsilon
    if name == "relative_gap":
        return 1 - (g @ epsilon) / (RHO * norms)
    if name == "gibbs":
        return torch.exp(norms - norms.max())
    if name == "exact_curvature":
        return curvature_one_by_one(closure, params) / norms
    if name == "gauss_newton":
        losses = closure().detach()
        if labels == 1:
            return norms / torch.maximum(2 * losses, 0.1 * (2 * losses).mean())
        p_y = torch.exp(-losses)
        assert labels == 2
        return norms * p_y / (1 - p_y)
    units = g / norms[:, None]
    gram = (units @ units.T).numpy()

    def shortfall(c):
        return ((gram @ c - 1) ** 2).sum() + (c**2).sum()

    best = minimize(shortfall, [0.1] * B, bounds=[(0, None)] * B, tol=1e-14, options={"maxiter": 10_000, "ftol": 1e-16})
    return torch.from_numpy(best.x) / norms


@pytest.mark.parametrize("labels", [1, 2])
@pytest.mark.parametrize("name", EXACT)
def test_equals_weights_from_single_example_gradients(name, labels):
    model = bert(labels)
    closure = ExampleLosses(model, batch(labels))
    params = list(model.parameters())
    g = one_by_one(closure, params)
    score = expected_scores(name, closure, params, labels)
    p = score / score.sum()
    options = {"norms": "exact"} if name == "gibbs" else {}
    method = DeltaSAM(model, RHO, name, **options)
    method.backward(closure)
    tolerance = 2e-2 if name == "exact_curvature" else 1e-4  # there: differences along a step of 0.01
    assert float(method.report["effective_sample_size"]) == pytest.approx(float(1 / p.square().sum()), rel=tolerance)

    ascent = p @ g
    at = [param.detach().clone() for param in params]
    with torch.no_grad():
        for param, part in zip(params, ascent.split([q.numel() for q in params]), strict=True):
            param += RHO * part.view_as(param) / ascent.norm()
    wanted = torch.autograd.grad(closure().mean(), params, allow_unused=True)
    for param, value in zip(params, at, strict=True):
        param.data = value
    ours = torch.cat([q.grad.flatten() for q, w in zip(params, wanted, strict=True) if w is not None])
    theirs = torch.cat([w.flatten() for w in wanted if w is not None])
    assert float((ours - theirs).norm() / theirs.norm()) < tolerance


@pytest.mark.parametrize("name", EXACT)
def test_micro_batches_equal_the_undivided_batch(name):
    options = {"norms": "exact"} if name == "gibbs" else {}
    gradients = []
    for cut in ([range(B)], [range(2), range(2, 3), range(3, B)]):
        model = bert()
        whole = ExampleLosses(model, batch())
        DeltaSAM(model, RHO, name, **options).backward([whole.subset(list(part)) for part in cut])
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", EXACT)
def test_weights_restored_gradient_only_in_grad_and_rho_zero_is_plain(name):
    model = bert()
    closure = ExampleLosses(model, batch())
    before = [p.detach().clone() for p in model.parameters()]
    plain = torch.autograd.grad(closure().mean(), list(model.parameters()), allow_unused=True)
    DeltaSAM(model, 0.0, name).backward(closure)
    for p, w, g in zip(model.parameters(), before, plain, strict=True):
        assert torch.equal(p, w)
        assert (p.grad is None) == (g is None)
        assert g is None or torch.equal(p.grad, g)


def test_three_classes_follow_the_documented_formula():
    """‖g‖ ‖D r‖/‖r‖³ with r = p − e_y and D = diag p − p pᵀ, by hand for one example."""
    p = torch.tensor([0.7, 0.2, 0.1])
    r = p - torch.tensor([0.0, 1.0, 0.0])
    d = torch.diag(p) - torch.outer(p, p)
    expected = 3.0 * (d @ r).norm() / r.norm() ** 3
    probe = Probe(norms=torch.tensor([3.0]), logits=p.log()[None], labels=torch.tensor([1]))
    score = WEIGHTINGS["gauss_newton"]().scores(torch.tensor([-math.log(0.2)]), probe)
    torch.testing.assert_close(score, expected[None])


def test_gap_is_zero_for_the_example_that_the_mean_gradient_already_serves():
    probe = Probe(rho=0.1, norms=torch.tensor([2.0, 1.0, 1.0]), cosines=torch.tensor([1.0, 0.0, -1.0]))
    losses = torch.ones(3)
    torch.testing.assert_close(make_weighting("gap")(losses, probe), torch.tensor([0.0, 1 / 3, 2 / 3]))
    torch.testing.assert_close(
        make_weighting("gap", mix=0.3)(losses, probe), torch.tensor([0.1, 0.7 / 3 + 0.1, 1.4 / 3 + 0.1])
    )


@pytest.mark.parametrize("seed", range(8))
def test_cosines_with_a_mean_gradient_that_cancels_are_cosines(seed):
    """Σ_i g_i = 0 but for rounding: they mean nothing then, and must still lie within ±1."""
    generator = torch.Generator().manual_seed(seed)
    model = nn.Linear(64, 64, bias=False)
    x, along = torch.randn(15, 64, generator=generator), torch.randn(64, generator=generator)
    x = torch.cat([x, -x.sum(0, keepdim=True)])

    class Cosines(RelativeGap):
        def scores(self, losses, probe):
            self.seen = probe.cosines
            return super().scores(losses, probe)

    weighting = Cosines()
    DeltaSAM(model, RHO, weighting).backward(lambda: model(x) @ along)
    assert (weighting.seen.abs() <= 1).all()


def test_what_cannot_be_looked_into_is_said():
    model = nn.Linear(3, 2)
    x, y = torch.randn(4, 3), torch.tensor([0, 1, 0, 1])
    with pytest.raises(ValueError, match="DeltaSAM\\(model"):
        DeltaSAM(model.parameters(), 0.1, "gap").backward(
            lambda: nn.functional.cross_entropy(model(x), y, reduction="none")
        )
    with pytest.raises(ValueError, match="ExampleLosses"):
        DeltaSAM(model, 0.1, "gauss_newton").backward(
            lambda: nn.functional.cross_entropy(model(x), y, reduction="none")
        )


class Seen(LossChange):
    """Keeps what the probe saw."""

    def scores(self, losses, probe):
        self.losses, self.probe = losses, probe
        return super().scores(losses, probe)


@pytest.mark.parametrize("pieces", [1, 2])
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("layers", [1, 2])
def test_probes_of_the_top_layers_are_those_of_a_whole_pass(pieces, recompute, layers):
    """The lower layers' hidden states are used again; the dropout masks above them are drawn as before."""
    model = bert()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.3
    whole = ExampleLosses(model, batch())
    parts = [whole.subset(list(range(4))), whole.subset(list(range(4, B)))] if pieces == 2 else [whole]
    weighting = Seen(layers=layers, radius=0.7)
    method = DeltaSAM(model, RHO, weighting, recompute=recompute, seed=3)
    torch.manual_seed(9)
    method.backward(parts)

    start = 2 - layers
    above = [p for n, p in model.named_parameters() if "embeddings" not in n and f"layer.{start - 1}." not in n]
    generator = torch.Generator().manual_seed(3)
    noise = [torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in above]
    length = torch.sqrt(sum(v.square().sum() for v in noise))

    def losses():
        torch.manual_seed(9)
        with torch.no_grad():
            return torch.cat([part() for part in parts])

    torch.testing.assert_close(weighting.losses, losses())
    with perturbed(above, noise, float(0.7 / length)):
        torch.testing.assert_close(weighting.probe.plus[0], losses(), rtol=1e-6, atol=1e-7)
    assert (weighting.probe.plus[0] - weighting.losses).abs().min() > 1e-5
    assert weighting.probe.dimension == sum(p.numel() for p in above)
    share = layers / 2
    assert method.report["forwards"] == pytest.approx(2 + share + recompute * (pieces > 1))


@pytest.mark.parametrize("pieces", [1, 2])
def test_a_probe_of_the_whole_model_moves_the_words_of_the_batch_alone(pieces):
    model = bert()
    whole = ExampleLosses(model, batch())
    parts = [whole.subset(list(range(4))), whole.subset(list(range(4, B)))] if pieces == 2 else [whole]
    weighting = Seen(radius=0.7)
    DeltaSAM(model, RHO, weighting, seed=3).backward(parts)

    words, used = model.get_input_embeddings().weight, whole.inputs["input_ids"].unique()
    generator = torch.Generator().manual_seed(3)
    noise = []
    for p in model.parameters():
        noise.append(torch.zeros_like(p) if p is words else torch.randn(p.shape, generator=generator, dtype=p.dtype))
        if p is words:
            noise[-1][used] = torch.randn((len(used), p.shape[1]), generator=generator, dtype=p.dtype)
    unused = words.numel() - len(used) * words.shape[1]
    assert unused > 0
    length = torch.sqrt(sum(v.square().sum() for v in noise) + unused)  # each counts 1, its expected square
    with perturbed(list(model.parameters()), noise, float(0.7 / length)), torch.no_grad():
        torch.testing.assert_close(weighting.probe.plus[0], torch.cat([part() for part in parts]), rtol=1e-5, atol=1e-6)
    assert weighting.probe.dimension == sum(p.numel() for p in model.parameters())


def test_ranks_draw_the_same_probe_whatever_their_words():
    found = []
    for ids in (batch()["input_ids"], batch()["input_ids"].flip(1) // 2):
        method = DeltaSAM(model := bert(), RHO, "probe", seed=3)
        step = GlobalStep(method, ExampleLosses(model, batch() | {"input_ids": ids}), None)
        found.append((*method._noise(method.params, step)[0], method.generator.get_state()))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("weighting", ["probe", "gap"])
def test_embeddings_in_place_of_ids_have_no_words(weighting):
    model = bert()
    given = batch()
    embedded = model.get_input_embeddings()(given.pop("input_ids")).detach()
    closure = ExampleLosses(model, given | {"inputs_embeds": embedded})
    assert closure.words is None
    DeltaSAM(model, RHO, weighting).backward(closure)


@pytest.mark.parametrize("order", [[0, 1], [1, 0]])
def test_a_table_that_one_piece_does_not_use(order):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.words, self.kinds, self.head = nn.Embedding(9, 4), nn.Embedding(3, 4), nn.Linear(4, 2)

        def forward(self, ids, kinds=None):
            return self.head(self.words(ids).mean(1) + (0 if kinds is None else self.kinds(kinds)))

    ids, labels, kinds = torch.arange(12).view(4, 3) % 9, torch.tensor([0, 1, 1, 0]), torch.tensor([1, 2])
    gradients = []
    for by_rows in (True, False):
        model = Model()
        pieces = [
            lambda m=model: nn.functional.cross_entropy(m(ids[:2]), labels[:2], reduction="none"),
            lambda m=model: nn.functional.cross_entropy(m(ids[2:], kinds), labels[2:], reduction="none"),
        ]
        # Without rows: a subclass, which gets dense gradients.
        method = (DeltaSAM if by_rows else type("Sub", (DeltaSAM,), {}))(model, RHO, "gap")
        method.backward([pieces[k] for k in order])
        gradients.append([p.grad for p in model.parameters()])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


def test_half_precision_rows_are_summed_before_they_are_rounded():
    torch.manual_seed(0)
    table = nn.Embedding(3, 8).bfloat16()
    ids = torch.zeros(200, 1, dtype=torch.long)
    gradients = PerExampleGradients(table)
    with gradients.record(batch_size=200):
        losses = (table(ids).float() * torch.randn(200, 1, 8)).sum((1, 2))
    gradients.backward(losses)
    weights = torch.full((200,), 1 / 200)
    by_rows = gradients.weighted_gradient(weights, by_rows=True)[0]
    torch.testing.assert_close(by_rows.to_dense(), gradients.weighted_gradient(weights)[0], rtol=8e-3, atol=0)


def test_words_that_another_layer_is_tied_to_are_all_probed():
    model = bert()
    closure = ExampleLosses(model, batch())
    assert closure.words is model.get_input_embeddings()
    model.decoder = nn.Linear(2, 2)
    model.decoder.weight = model.get_input_embeddings().weight
    assert closure.words is None


def test_where_there_are_no_such_layers():
    with pytest.raises(ValueError, match="layers=3: BertForSequenceClassification has 2"):
        DeltaSAM(bert(), RHO, "probe", layers=3)
    with pytest.warns(UserWarning, match="no stack of layers: probes of the whole model"):
        DeltaSAM(nn.Linear(2, 2), RHO, "probe", layers=1)
    with pytest.raises(ValueError, match="looks inside the model"):
        DeltaSAM(bert().parameters(), RHO, "probe", layers=1)
    with pytest.raises(ValueError, match="layers cannot be 0"):
        DeltaSAM(bert(), RHO, "probe", layers=0)
