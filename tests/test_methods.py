"""Methods against closed forms, against `pytorch_optimizer`, and against each trap that SAM code falls into."""

import copy
import inspect
import random
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pytorch_optimizer import SAM as ReferenceSAM
from torch import nn
from transformers import BertConfig, BertForSequenceClassification

from dsam import ASAM, SAM, DeltaSAM, MomentumSAM, Plain
from dsam.methods import METHODS, ExampleLosses, example_losses
from dsam.methods import WEIGHTINGS as ALL_WEIGHTINGS
from dsam.methods.delta_sam import rademacher
from dsam.methods.gradients import tf32_products
from dsam.methods.perturbation import perturbed, total_norm

# Those that look inside the model or at the logits have their own tests in test_exact_weightings.py.
WEIGHTINGS = {n: w for n, w in ALL_WEIGHTINGS.items() if not w.exact and not w.needs_logits}

ALL = {
    "plain": lambda p, rho, **o: Plain(p, **o),
    "sam": lambda p, rho, **o: SAM(p, rho, **o),
    "asam": lambda p, rho, **o: ASAM(p, rho, biases=True, **o),
} | {f"dsam-{w}": (lambda p, rho, w=w, **o: DeltaSAM(p, rho, w, **o)) for w in WEIGHTINGS}
TWO_PASS = [name for name in ALL if name != "plain"]


def network(seed=0, dropout=0.0, dtype=torch.float64):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Dropout(dropout), nn.Linear(8, 3)).to(dtype)


def batch(n=12, seed=1, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 5, generator=generator, dtype=dtype), torch.randint(0, 3, (n,), generator=generator)


def losses(model, x, y):
    return nn.functional.cross_entropy(model(x), y, reduction="none")


def weights(model):
    return [p.detach().clone() for p in model.parameters()]


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def quadratic(batch_size=4, size=3, seed=0):
    """ℓ_i(w) = ½ wᵀ A_i w + b_iᵀ w with symmetric A_i."""
    g = torch.Generator().manual_seed(seed)
    a = torch.randn(batch_size, size, size, generator=g, dtype=torch.float64)
    a = (a + a.mT) / 2
    b = torch.randn(batch_size, size, generator=g, dtype=torch.float64)
    w = nn.Parameter(torch.randn(size, generator=g, dtype=torch.float64))

    def closure():
        return 0.5 * torch.einsum("i,bij,j->b", w, a, w) + b @ w

    return a, b, w, closure


def test_sam_on_a_quadratic_is_the_closed_form():
    a, b, w, closure = quadratic()
    mean_a, mean_b = a.mean(0), b.mean(0)
    gradient = mean_a @ w.detach() + mean_b
    expected = mean_a @ (w.detach() + 0.3 * gradient / gradient.norm()) + mean_b
    loss = SAM([w], rho=0.3).backward(closure)
    torch.testing.assert_close(w.grad, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(loss, closure().mean().detach())


def test_asam_on_a_quadratic_is_the_closed_form():
    a, b, w, closure = quadratic()
    mean_a, mean_b, v = a.mean(0), b.mean(0), w.detach()
    gradient = mean_a @ v + mean_b
    t = v.abs() + 0.01
    expected = mean_a @ (v + 0.3 * t**2 * gradient / (t * gradient).norm()) + mean_b
    ASAM([w], rho=0.3, biases=True).backward(closure)
    torch.testing.assert_close(w.grad, expected, rtol=1e-12, atol=1e-12)


def test_asam_leaves_biases_as_the_authors_code_does():
    """A step of that code in our own words, by names; a model whose normalisation layer has a weight and a bias."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.LayerNorm(5), torch.nn.Linear(5, 3)).double()
    for p in model.parameters():
        torch.nn.init.normal_(p)
    x, y = torch.randn(6, 4).double(), torch.randint(0, 3, (6,))

    def run():
        return nn.functional.cross_entropy(model(x), y, reduction="none")

    names, params = zip(*model.named_parameters(), strict=True)
    grads = torch.autograd.grad(run().mean(), params)
    t = [p.abs() + 0.01 if "weight" in name else torch.ones_like(p) for name, p in zip(names, params, strict=True)]
    size = torch.cat([(a * g).flatten() for a, g in zip(t, grads, strict=True)]).norm()
    moves = [(0.3 / size * a**2 * g).detach() for a, g in zip(t, grads, strict=True)]
    for p, move in zip(params, moves, strict=True):
        p.data.add_(move)
    expected = torch.autograd.grad(run().mean(), params)
    for p, move in zip(params, moves, strict=True):
        p.data.sub_(move)
    ASAM(model, rho=0.3).backward(run)
    for p, g in zip(params, expected, strict=True):
        torch.testing.assert_close(p.grad, g, rtol=1e-9, atol=1e-12)

    whole, listed = ASAM(model, rho=0.3, biases=True), ASAM(list(model.parameters()), rho=0.3)
    assert not whole.notes and "biases too" in listed.notes[0]
    found = []
    for method in (whole, listed):
        model.zero_grad()
        method.backward(run)
        found.append([p.grad.clone() for p in params])
    assert all(map(torch.equal, *found)) and not torch.allclose(found[0][1], expected[1])


def direction_of(method, size):
    """The random direction that the method's next probe takes, unscaled."""
    generator = torch.Generator()
    generator.set_state(method.generator.get_state())
    if method.weighting.noise == "rademacher":
        return rademacher((size,), torch.zeros((), dtype=torch.float64), generator)
    return torch.randn(size, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("weighting", sorted(WEIGHTINGS))
@pytest.mark.parametrize(("power", "mix"), [(1.0, 0.0), (0.5, 0.25)])
def test_delta_sam_on_a_quadratic_is_the_closed_form(weighting, power, mix):
    a, b, w, closure = quadratic(batch_size=5)
    v0 = w.detach().clone()
    method = DeltaSAM([w], 0.2, weighting, power=power, mix=mix, radius=0.7, seed=3)
    g = torch.einsum("bij,j->bi", a, v0) + b
    noise = direction_of(method, 3)
    v = 0.7 * noise / noise.norm()
    first, second = g @ v, 0.5 * torch.einsum("i,bij,j->b", v, a, v)  # ℓ(w ± v) − ℓ(w) = ±first + second, exactly
    if weighting == "uniform":
        score = torch.ones(5, dtype=torch.float64)
    elif weighting == "probe":
        score = (first + second).abs()
    elif weighting == "confidence":
        score = torch.exp(-closure().detach())
    elif weighting == "curvature":
        slope = first.abs() / 0.7
        score = (2 * second).abs() / 0.49 / torch.maximum(slope, 0.3 * slope.mean())
    else:
        score = torch.exp(3**0.5 / 0.7 * (first + second).abs())
    p = score**power / (score**power).sum()
    p = (1 - mix) * p + mix / 5
    ascent = p @ g
    mean_a = a.mean(0)
    expected = mean_a @ (v0 + 0.2 * ascent / ascent.norm()) + b.mean(0)
    method.backward(closure)
    torch.testing.assert_close(w.grad, expected, rtol=1e-5, atol=1e-6)  # weights are float32
    assert float(method.report["effective_sample_size"]) == pytest.approx(float(1 / (p**2).sum()), rel=1e-4)


@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.AdamW])
def test_equals_pytorch_optimizer_over_steps(adaptive, base):
    ours, theirs = network(), network()
    options = {"lr": 0.05} | ({"momentum": 0.9} if base is torch.optim.SGD else {"weight_decay": 0.1})
    reference = ReferenceSAM(theirs.parameters(), base, rho=0.1, adaptive=adaptive, **options)
    optimizer = base(ours.parameters(), **options)
    method = ASAM(ours.parameters(), 0.1, eta=0.0, biases=True) if adaptive else SAM(ours.parameters(), 0.1)
    for step in range(8):
        x, y = batch(seed=step)
        method.backward(lambda x=x, y=y: losses(ours, x, y))
        optimizer.step()
        optimizer.zero_grad()
        losses(theirs, x, y).mean().backward()
        reference.first_step(zero_grad=True)
        losses(theirs, x, y).mean().backward()
        reference.second_step(zero_grad=True)
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-8)  # theirs sums the norm in float32


FAMILY = ("gsam", "looksam", "fsam", "ae_sam", "esam", "sam_on", "m_sam", "per_instance")


class DenseWords(ExampleLosses):
    words = None


def classifier():
    torch.manual_seed(3)
    sizes = dict(vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24)
    config = BertConfig(**sizes, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, initializer_range=0.2)
    return BertForSequenceClassification(config).double()


@pytest.mark.parametrize(
    ("name", "options"),
    [(name, {}) for name in ALL]
    + [(name, {"recompute": True}) for name in ALL if name.startswith("dsam")]
    + [(name, {}) for name in FAMILY],
)
def test_pieces_whose_word_gradients_are_summed_by_rows_equal_the_undivided_batch(name, options):
    """Words repeat within and across pieces, padding is among them, and there is a gradient from before."""
    ids = torch.randint(0, 12, (9, 5), generator=torch.Generator().manual_seed(0))
    whole = {"input_ids": ids, "labels": ids[:, 0] % 2}
    gradients, kinds = [], []
    for kind, cuts in ((DenseWords, [9]), (ExampleLosses, [9]), (ExampleLosses, [4, 2, 3])):
        model = classifier()
        words = model.get_input_embeddings()
        words.register_forward_hook(lambda table, _, __: kinds.append((kind, len(cuts), table.sparse)))  # noqa: B023
        words.weight.grad = torch.ones_like(words.weight)
        model.train()
        pieces = zip(*(value.split(cuts) for value in whole.values()), strict=True)
        closures = [kind(model, dict(zip(whole, piece, strict=True))) for piece in pieces]
        before = copy.deepcopy(model.state_dict())
        method = ALL[name](model, 0.1, **options) if name in ALL else METHODS[name](model, 0.1)
        method.backward(closures)
        assert not words.sparse
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
        gradients.append([p.grad for p in model.parameters()])
    assert (DenseWords, 1, True) not in kinds and (ExampleLosses, 3, True) in kinds
    assert ((ExampleLosses, 1, True) in kinds) == (name == "sam" or name.startswith("dsam"))
    for dense, one, divided in zip(*gradients, strict=True):
        assert dense.layout == one.layout == divided.layout == torch.strided
        torch.testing.assert_close(one, divided, rtol=1e-6, atol=1e-7)  # the losses are float32
        if name not in ("dsam-probe", "dsam-curvature", "dsam-gibbs"):  # these draw noise for the rows in use alone
            torch.testing.assert_close(dense, one, rtol=1e-6, atol=1e-7)


def test_rademacher_signs_are_even_and_independent():
    """Of the 64 signs of a draw each is +1 half of the time, and each pair agrees half of the time."""
    draws = 40_000
    like, generator = torch.zeros((), dtype=torch.float64), torch.Generator().manual_seed(5)
    signs = rademacher((draws, 64), like, generator)
    assert set(signs.unique().tolist()) == {-1.0, 1.0}
    assert float(signs.mean(0).abs().max()) < 5 / draws**0.5
    products = signs.T @ signs / draws - torch.eye(64)
    assert float(products.abs().max()) < 5 / draws**0.5
    assert [rademacher((n,), like, generator).shape for n in (1, 63, 65)] == [(1,), (63,), (65,)]


@pytest.mark.parametrize("scale", [0.3, torch.tensor(0.3)])
def test_a_sparse_direction_moves_its_rows_alone_and_they_come_back_whatever_happens(scale):
    torch.manual_seed(0)
    table, bias = nn.Parameter(torch.randn(7, 3)), nn.Parameter(torch.randn(3))
    step = torch.sparse_coo_tensor([[5, 1, 5]], torch.randn(3, 3), (7, 3), check_invariants=True).coalesce()
    other = torch.randn(3)
    before = table.detach().clone(), bias.detach().clone()
    with perturbed([table, bias], [step.to_dense(), other], scale):
        expected = table.detach().clone(), bias.detach().clone()
    with pytest.raises(KeyboardInterrupt), perturbed([table, bias], [step, other], scale):
        torch.testing.assert_close((table.data, bias.data), expected)
        assert torch.equal(table[[0, 2, 3, 4, 6]], before[0][[0, 2, 3, 4, 6]])
        raise KeyboardInterrupt
    assert torch.equal(table, before[0]) and torch.equal(bias, before[1])
    torch.testing.assert_close(total_norm([step, other]), total_norm([step.to_dense(), other]))


def test_a_subclass_of_sam_gets_dense_gradients():
    class Tilted(SAM):
        def direction(self, gradient):
            self.layouts = {g.layout for g in gradient}
            return super().direction(gradient)

    ids = torch.ones(2, 3, dtype=torch.long)
    closure = ExampleLosses(model := classifier(), {"input_ids": ids, "labels": ids[:, 0]})
    method = Tilted(model, 0.1)
    method.backward(closure)
    assert method.layouts == {torch.strided}


def test_a_wrapped_models_word_gradients_stay_dense(tmp_path):
    """DistributedDataParallel and torch.compile expect the kind of gradient that they saw first."""
    ids = torch.ones(2, 3, dtype=torch.long)
    batch = {"input_ids": ids, "labels": ids[:, 0]}
    inner = classifier()
    assert ExampleLosses(inner, batch).words is inner.get_input_embeddings()
    assert ExampleLosses(torch.compile(inner, backend="eager"), batch).words is None
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(inner)
        closures = [ExampleLosses(wrapped, batch), ExampleLosses(wrapped, batch)]
        assert closures[0].words is None
        SAM(inner, 0.1).backward(closures)  # its reducer raises where the kind changes
    finally:
        torch.distributed.destroy_process_group()
    inner.bert.encoder.compile(backend="eager")
    assert ExampleLosses(inner, batch).words is None


def draws(method, recorded, draw):
    """A closure that notes the random number each of its forwards begins with."""
    w = method.params[0]

    def closure():
        recorded.append(float(draw()))
        return (w * torch.tensor([1.0, 2.0])).square()

    return closure


STREAMS = pytest.mark.parametrize(
    ("draw", "seed"),
    [(lambda: torch.rand(()), torch.manual_seed), (random.random, random.seed), (np.random.rand, np.random.seed)],
    ids=["torch", "python", "numpy"],
)


@STREAMS
def test_mask_same_draws_one_mask_for_every_pass_of_the_step(draw, seed):
    method, seen = DeltaSAM([nn.Parameter(torch.ones(2))], 0.1, "curvature", mask="same"), []
    seed(9)
    expected = [float(draw()), float(draw())]
    seed(9)
    method.backward(draws(method, seen, draw))
    assert len(seen) == 4
    assert set(seen) == {expected[0]} and float(draw()) == expected[1]  # as in plain training, whose pass draws once


@STREAMS
def test_mask_fresh_draws_another_for_the_descent_and_shares_the_ascents_with_its_probes(draw, seed):
    method, seen = DeltaSAM([nn.Parameter(torch.ones(2))], 0.1, "curvature", mask="fresh"), []
    seed(9)
    expected = float(draw())
    seed(9)
    method.backward(draws(method, seen, draw))
    clean, plus, minus, descent = seen
    assert clean == plus == minus != descent
    assert descent == expected  # plain training's own mask


def test_a_model_on_several_devices_is_refused_in_one_line():
    parts = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2, device="meta"))
    with pytest.raises(ValueError, match=r"the parameters are on several devices \(cpu, meta\)"):
        SAM(parts).backward(lambda: parts(torch.randn(5, 3)).sum(1))
    model = nn.DataParallel(network(dtype=torch.float32))
    for method in (SAM(model), SAM(model.parameters())):
        with pytest.raises(ValueError, match="^DataParallel over several GPUs is not supported: start one process"):
            method.backward(ExampleLosses(model, {"input": torch.ones(2, 3), "labels": torch.tensor([0, 1])}))


def calls_of(name):
    return {"plain": 1, "dsam-probe": 3, "dsam-gibbs": 3, "dsam-curvature": 4}.get(name, 2)


@pytest.mark.parametrize("name", ALL)
def test_counts_its_passes(name):
    model, (x, y) = network(), batch()
    method = ALL[name](model.parameters(), 0.1)
    for pieces in (1, 4):
        method.backward([lambda s=s: losses(model, x[s], y[s]) for s in torch.arange(12).chunk(pieces)])
        assert method.report["forwards"] == pytest.approx(calls_of(name))
        assert method.report["backwards"] == pytest.approx(1 if name == "plain" else 2)


def seen_perturbation(method, model, x, y):
    """ε as the last forward of the step saw it."""
    before, seen = weights(model), []

    def closure():
        seen.append(weights(model))
        return losses(model, x, y)

    method.backward(closure)
    return torch.cat([(a - b).flatten() for a, b in zip(seen[-1], before, strict=True)])


@given(scale=st.floats(1e-3, 1e3), rho=st.floats(1e-3, 1.0))
@settings(max_examples=30, deadline=None)
def test_perturbation_is_rho_along_the_gradient_whatever_its_scale(scale, rho):
    """Hence clipping before the ascent cannot matter."""
    model, (x, y) = network(), batch()
    gradient = torch.cat([g.flatten() for g in torch.autograd.grad(losses(model, x, y).mean(), model.parameters())])
    before, seen = weights(model), []

    def closure():
        seen.append(weights(model))
        return scale * losses(model, x, y)

    SAM(model.parameters(), rho).backward(closure)
    epsilon = torch.cat([(a - b).flatten() for a, b in zip(seen[1], before, strict=True)])
    assert float(epsilon.norm()) == pytest.approx(rho, rel=1e-9)
    assert float(torch.cosine_similarity(epsilon, gradient, dim=0)) == pytest.approx(1, abs=1e-9)


def test_tied_weights_move_once_and_frozen_ones_never():
    torch.manual_seed(0)
    first, second = nn.Linear(5, 5).double(), nn.Linear(5, 5).double()
    second.weight = first.weight
    frozen = nn.Linear(5, 3).double().requires_grad_(False)
    model = nn.Sequential(first, nn.Tanh(), second, nn.Tanh(), frozen)
    x, y = batch()
    epsilon = seen_perturbation(SAM(model, 0.1), model, x, y)
    assert float(epsilon.norm()) == pytest.approx(0.1, rel=1e-9)
    assert all(p.grad is None for p in frozen.parameters())


@pytest.mark.parametrize("outside", [False, True])
def test_autocast_around_the_closure_or_the_call_sees_the_perturbed_weights(outside):
    """autocast caches casts of the weights: a stale cache would run the descent at w."""
    model, (x, y) = network(dtype=torch.float32), batch(dtype=torch.float32)

    def inside():
        with torch.autocast("cpu", torch.bfloat16):
            return losses(model, x, y).float()

    plain = Plain(model.parameters())
    plain.backward(inside)
    at_w = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    SAM(model.parameters(), 1.0).backward(inside)
    expected = [p.grad.clone() for p in model.parameters()]
    assert not same(at_w, expected)
    assert all(g.dtype == torch.float32 for g in expected)
    if outside:
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            SAM(model.parameters(), 1.0).backward(lambda: losses(model, x, y).float())
        for p, g in zip(model.parameters(), expected, strict=True):
            torch.testing.assert_close(p.grad, g)


def test_gradient_checkpointing_gives_the_same_gradient():
    from torch.utils.checkpoint import checkpoint

    x, y = batch()
    gradients = []
    for layers in (lambda model, x: model(x), lambda model, x: checkpoint(model, x, use_reentrant=False)):
        model = network(dropout=0.5)
        torch.manual_seed(4)
        DeltaSAM(model.parameters(), 0.1).backward(
            lambda model=model, layers=layers: nn.functional.cross_entropy(layers(model, x), y, reduction="none")
        )
        gradients.append([p.grad for p in model.parameters()])
    assert same(*gradients)


@pytest.mark.parametrize("name", sorted(WEIGHTINGS))
def test_weights_are_a_distribution_and_equal_for_equal_examples(name):
    model, (x, y) = network(), batch(1)
    x, y = x.expand(6, 5), y.expand(6)
    method = DeltaSAM(model.parameters(), 0.1, name)
    method.backward(lambda: losses(model, x, y))
    assert float(method.report["effective_sample_size"]) == pytest.approx(6, rel=1e-4)


@pytest.mark.parametrize(
    ("call", "word"),
    [
        (lambda: SAM([nn.Parameter(torch.ones(1))], rho=-1), "rho"),
        (lambda: DeltaSAM([nn.Parameter(torch.ones(1))], weighting="prob"), "prob"),
        (lambda: DeltaSAM([nn.Parameter(torch.ones(1))], radius=0), "radius"),
        (lambda: SAM([nn.Parameter(torch.ones(1))], mask="other"), "mask"),
        (lambda: SAM([torch.ones(1)]), "gradient"),
        (lambda: Plain([nn.Parameter(torch.ones(1))]).backward([]), "closure"),
    ],
)
def test_mistakes_are_named(call, word):
    with pytest.raises(ValueError, match=word):
        call()


PARAMETER = nn.Parameter(torch.ones(2))
GOOD = lambda: PARAMETER.square()  # noqa: E731
SGD = torch.optim.SGD
NO_OPTIMIZER = r": a method is not an optimizer and takes none; it stands in for loss\.backward\(\), .* beside it"
ADAPTIVE = r"; ASAM\(model, rho=0\.5\) is the adaptive SAM$"


@pytest.mark.parametrize(
    ("call", "error", "said"),
    [
        (lambda: SAM([PARAMETER], SGD, rho=0.05, lr=0.1, momentum=0.9), TypeError, f"^SAM got SGD{NO_OPTIMIZER}$"),
        (lambda: SAM([PARAMETER], SGD, lr=0.1), TypeError, f"^SAM got SGD{NO_OPTIMIZER}$"),
        (lambda: SAM([PARAMETER], SGD), TypeError, f"^SAM got SGD{NO_OPTIMIZER}$"),
        (lambda: SAM(SGD([PARAMETER], lr=0.1)), TypeError, f"^SAM got SGD{NO_OPTIMIZER}$"),
        (lambda: SAM([PARAMETER], base_optimizer=SGD), TypeError, f"^SAM got base_optimizer=SGD{NO_OPTIMIZER}$"),
        (lambda: SAM([PARAMETER], lr=0.1), TypeError, f"^SAM got lr=0.1{NO_OPTIMIZER}$"),
        (lambda: SAM([PARAMETER], "SGD"), TypeError, f"^rho must be a number, got 'SGD'{NO_OPTIMIZER}$"),
        (lambda: Plain([PARAMETER], SGD), TypeError, f"^Plain got SGD{NO_OPTIMIZER}$"),
        (lambda: MomentumSAM([PARAMETER], SGD, momentum=0.9), TypeError, f"^MomentumSAM got SGD{NO_OPTIMIZER}$"),
        (lambda: SAM([PARAMETER], SGD, adaptive=True, lr=0.1), TypeError, f"^SAM got SGD{NO_OPTIMIZER}{ADAPTIVE}"),
        (lambda: SAM([PARAMETER], adaptive=True), TypeError, f"^unknown option 'adaptive' of SAM{ADAPTIVE}"),
        (lambda: SAM([PARAMETER], rh=1), TypeError, r"^unknown option 'rh' of SAM; did you mean 'rho'\?$"),
        (lambda: SAM([PARAMETER], xyz=1), TypeError, "^unknown option 'xyz' of SAM; known: mask, rho, seed$"),
        (lambda: DeltaSAM([PARAMETER], recomput=True), TypeError, r"of DeltaSAM; did you mean 'recompute'\?$"),
        (lambda: DeltaSAM([PARAMETER], 0.1, "curvature", flor=1), TypeError, r"of DeltaSAM; did you mean 'floor'\?$"),
        (lambda: SAM([{"params": [PARAMETER], "lr": 0.1}]), TypeError, "not groups of them"),
        (lambda: SAM(nn.Linear(2, 2).named_parameters()), TypeError, "not pairs with names: model.parameters()"),
        (lambda: SAM(PARAMETER), TypeError, r"got one tensor: \[parameter\]"),
        (lambda: SAM(["w"]), TypeError, "got a str in it"),
        (lambda: SAM([PARAMETER]).backward(None), TypeError, "must be callable.*got None"),
        (lambda: SAM([PARAMETER]).backward(PARAMETER), TypeError, r"got a tensor of shape \(2,\)"),
        (lambda: SAM([PARAMETER]).backward((PARAMETER, GOOD)), TypeError, "must be callable"),
        (lambda: SAM([PARAMETER]).backward([]), ValueError, "at least one closure"),
        (lambda: SAM([PARAMETER]).backward(lambda: None), TypeError, "return a tensor.*got None"),
        (lambda: SAM([PARAMETER]).backward(lambda: (GOOD(), 1)), TypeError, "got a tuple"),
        (lambda: SAM([PARAMETER]).backward(lambda: GOOD()[:0]), ValueError, "empty batch"),
        (lambda: example_losses(torch.zeros(2, 1), torch.tensor([0, 0])), ValueError, "one output, a regression"),
        (lambda: example_losses(torch.zeros(0, 2), torch.zeros(0, dtype=torch.int64)), ValueError, "empty"),
    ],
)
def test_what_other_sam_code_takes_is_refused_in_one_sentence(call, error, said):
    with pytest.raises(error, match=said):
        call()
    assert PARAMETER.grad is None


def test_a_method_of_ones_own_takes_what_its_constructor_takes():
    class Own(SAM):
        def __init__(self, params, optimizer, **options):
            self.taken = optimizer, options.pop("lr"), options.pop("adaptive")
            super().__init__(params, **options)

    class Inheriting(SAM):
        pass

    optimizer = SGD([PARAMETER], lr=0.1)
    own = Own([PARAMETER], optimizer, lr=0.1, adaptive=True, rho=0.3)
    assert own.taken == (optimizer, 0.1, True) and own.rho == 0.3
    with pytest.raises(TypeError, match=r"^unknown option 'rh' of Inheriting; did you mean 'rho'\?$"):
        Inheriting([PARAMETER], rh=1)


@pytest.mark.parametrize("name", METHODS)
def test_a_methods_signature_is_its_constructors(name):
    kind, constructor = METHODS[name], inspect.signature(METHODS[name].__init__)
    assert list(inspect.signature(kind).parameters.values()) == list(constructor.parameters.values())[1:]


@pytest.mark.parametrize("name", ["plain", "sam", "dsam-probe"])
def test_re_entrant_checkpointing_is_refused(name):
    """Autograd.grad sees no parameter of the layers in it: they would stay as they are, without a word."""
    from torch.utils.checkpoint import checkpoint

    model, (x, y) = network(), batch()

    def closure():
        hidden = checkpoint(model[2], model[:2](x), use_reentrant=True)
        return nn.functional.cross_entropy(checkpoint(model[3], hidden, use_reentrant=True), y, reduction="none")

    with pytest.raises(ValueError, match="use_reentrant=False"):
        ALL[name](model.parameters(), 0.1).backward(closure)


def test_a_gradient_that_two_parameters_share_is_each_ones_own():
    """autograd.grad gives both the same tensor; clipping in place would scale it twice."""
    a, b = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    pieces = [lambda: (a + b) * 2.0, lambda: (a + b) * 4.0]
    Plain([a, b]).backward(pieces)
    assert a.grad.data_ptr() != b.grad.data_ptr()
    assert torch.equal(a.grad, torch.ones(3)) and torch.equal(b.grad, torch.ones(3))  # (2 + 4) / 6 losses


def test_state_of_another_kind_of_device_is_refused():
    with pytest.raises(ValueError, match="another kind of device"):
        DeltaSAM(network(), 0.1).load_state_dict({"generator": torch.zeros(16, dtype=torch.uint8)})


def test_closures_of_a_loop_that_all_see_its_last_values_are_refused():
    """[lambda: loss(x) for x in parts] is the last part as often as there are parts."""
    model, (x, y) = network(), batch(6)
    parts = [(x[:4], y[:4]), (x[4:], y[4:])]
    method = Plain(model)
    with pytest.raises(ValueError, match=r"one function over the same variables.*: bind them, lambda x=x, y=y: …"):
        method.backward([lambda: losses(model, a, b) for a, b in parts])  # noqa: B023
    whole = torch.autograd.grad(losses(model, x, y).mean(), list(model.parameters()))

    def over(a, b):
        return lambda: losses(model, a, b)

    bound = [lambda a=a, b=b: losses(model, a, b) for a, b in parts]
    method.backward([bound[0]] * 2)  # the same one twice, as is said
    for closures in (bound, [over(a, b) for a, b in parts], [partial(losses, model, a, b) for a, b in parts]):
        model.zero_grad()
        method.backward(closures)
        for p, expected in zip(model.parameters(), whole, strict=True):
            torch.testing.assert_close(p.grad, expected)


def test_state_of_another_method_or_network_is_refused():
    taken = MomentumSAM(network(), 0.1)
    with pytest.raises(ValueError, match=r"^the state of MomentumSAM has \['average', 'generator'\], and this"):
        taken.load_state_dict(SAM(network(), 0.1).state_dict())
    with pytest.raises(ValueError, match=r"^the state of SAM has \['generator'\], and this one \['average', "):
        SAM(network(), 0.1).load_state_dict(taken.state_dict())
    for other in (nn.Linear(2, 2), nn.Sequential(network(), network())):
        with pytest.raises(ValueError, match=r"^the state of MomentumSAM is of other parameters"):
            taken.load_state_dict(MomentumSAM(other, 0.1).state_dict())


def test_a_method_of_ones_own_may_keep_something_only_once_it_has_it():
    class Own(SAM):
        extra = None

        def state_dict(self):
            return super().state_dict() | ({} if self.extra is None else {"extra": self.extra})

        def load_state_dict(self, state):
            super().load_state_dict(state)
            self.extra = state.get("extra")

    before, after = Own(network(), 0.1), Own(network(), 0.1)
    before.extra = 3
    after.load_state_dict(before.state_dict())
    assert after.extra == 3


def test_pytorch_s_own_readers_work_where_products_take_tf32():
    """They raise where its old and its new name for it differ; torch.compile reads the old one."""
    products = torch.backends.cuda.matmul
    found = products.allow_tf32
    try:
        products.allow_tf32 = False  # as a run sets it
        before = torch.get_float32_matmul_precision(), getattr(products, "fp32_precision", None)
        with tf32_products():
            assert torch.get_float32_matmul_precision() == "high" and products.allow_tf32
            with tf32_products(), tf32_products(False):
                pass
            assert products.allow_tf32
        assert (torch.get_float32_matmul_precision(), getattr(products, "fp32_precision", None)) == before
    finally:
        products.allow_tf32 = found


def test_weights_of_16_bits_are_said_to_round_a_perturbation():
    for dtype, said in ((torch.bfloat16, 1), (torch.float16, 1), (torch.float32, 0), (torch.float64, 0)):
        assert [note.startswith("weights of ") for note in SAM(network(dtype=dtype), 0.1).notes] == [True] * said
    for weighting, probes in (("probe", 1), ("gap", 0)):
        notes = DeltaSAM(network(dtype=torch.bfloat16), 0.1, weighting).notes
        assert ["a probe's losses are rounded" in note for note in notes] == [False] + [True] * probes
    assert SAM(network(dtype=torch.bfloat16), 0.0).notes == Plain(network(dtype=torch.bfloat16)).notes == []


def test_a_mean_loss_instead_of_per_example_losses_is_refused():
    w = nn.Parameter(torch.ones(3))
    with pytest.raises(ValueError, match="per-example"):
        Plain([w]).backward(lambda: w.mean())


def test_the_library_imports_neither_hydra_nor_wandb():
    import subprocess
    import sys

    code = "import dsam, sys; print(sorted({'hydra', 'wandb', 'datasets', 'transformers'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"
