"""The relatives of SAM against closed forms on quadratics, against re-derivations, and against the family's traps."""

import copy
import re
from pathlib import Path

import pytest
import torch
import yaml
from pytorch_optimizer.optimizer.sam import FriendlySAM as ReferenceFSAM
from test_methods import batch, losses, network, quadratic, same, weights
from torch import nn

from dsam import (
    AESAM,
    ESAM,
    FSAM,
    GSAM,
    METHODS,
    SAM,
    SAMON,
    GroupSAM,
    LookSAM,
    MomentumSAM,
    PerInstance,
)
from dsam.config import check_method
from dsam.errors import UserError
from dsam.methods import OPTIMIZERS
from dsam.methods.perturbation import perturbed

# A low threshold makes AE-SAM ascend in every step: the trap tests mean its two passes.
FAMILY = {
    "ae_sam": lambda p, rho, **o: AESAM(p, rho, threshold=-1e9, **o),
    "esam": lambda p, rho, **o: ESAM(p, rho, **o),
    "fsam": lambda p, rho, **o: FSAM(p, rho, **o),
    "gsam": lambda p, rho, **o: GSAM(p, rho, **o),
    "looksam": lambda p, rho, **o: LookSAM(p, rho, k=2, **o),
    "m_sam": lambda p, rho, **o: GroupSAM(p, rho, m=5, **o),
    "msam": lambda p, rho, **o: MomentumSAM(p, rho, **o),
    "per_instance": lambda p, rho, **o: PerInstance(p, rho, **o),
    "sam_on": lambda p, rho, **o: SAMON(p, rho, **o),
}
GROUPED = ("m_sam", "per_instance")


class Losses:
    """Per-example losses that can be restricted, as `ExampleLosses` can."""

    def __init__(self, model, x, y):
        self.model, self.x, self.y = model, x, y

    def __call__(self):
        return losses(self.model, self.x, self.y)

    def __len__(self):
        return len(self.y)

    def subset(self, indices):
        return Losses(self.model, self.x[indices], self.y[indices])


class Quadratic:
    """ℓ_i(w) = ½ wᵀ A_i w + b_iᵀ w, restrictable."""

    def __init__(self, a, b, w):
        self.a, self.b, self.w = a, b, w

    def __call__(self):
        return 0.5 * torch.einsum("i,bij,j->b", self.w, self.a, self.w) + self.b @ self.w

    def __len__(self):
        return len(self.b)

    def subset(self, indices):
        return Quadratic(self.a[indices], self.b[indices], self.w)


def normed(dropout=0.0, dtype=torch.float64, seed=0):
    """`network` with a layer norm, so that SAM-ON has something to perturb."""
    torch.manual_seed(seed)
    layers = nn.Linear(5, 8), nn.LayerNorm(8), nn.Tanh(), nn.Dropout(dropout), nn.Linear(8, 3)
    return nn.Sequential(*layers).to(dtype)


def unit(x):
    return x / x.norm()


def step(method, w, closure):
    w.grad = None
    loss = method.backward(closure)
    return loss, w.grad.clone()


def close(a, b, rtol=1e-10):
    torch.testing.assert_close(a, b, rtol=rtol, atol=1e-12)


# Closed forms


@pytest.mark.parametrize("restrictable", [True, False])
@pytest.mark.parametrize("m", [1, 2, 3, 7, 100])
def test_m_sam_on_a_quadratic_is_the_closed_form(restrictable, m):
    a, b, w, plain = quadratic(batch_size=7)
    v = w.detach().clone()
    closure = Quadratic(a, b, w) if restrictable else plain
    expected = torch.zeros(3, dtype=torch.float64)
    for start in range(0, 7, m):
        group = slice(start, start + m)
        g = a[group].mean(0) @ v + b[group].mean(0)
        size = len(b[group])
        expected += size / 7 * (a[group].mean(0) @ (v + 0.3 * unit(g)) + b[group].mean(0))
    loss, gradient = step(GroupSAM([w], 0.3, m=m), w, closure)
    close(gradient, expected)
    close(loss, plain().mean().detach())
    if m == 100:
        close(step(SAM([w], 0.3), w, closure)[1], expected)


@pytest.mark.parametrize("mask", ["same", "fresh"])
def test_per_instance_in_two_batched_passes_is_m_sam_with_single_examples(mask):
    model, (x, y) = normed(), batch()
    losses, found = [], []
    for method in (PerInstance(model, 0.3, mask=mask), GroupSAM(model, 0.3, m=1, mask=mask)):
        model.zero_grad()
        losses.append(method.backward(Losses(model, x, y)))
        found.append([p.grad.clone() for p in model.parameters()])
    close(*losses)
    for ours, one_by_one in zip(*found, strict=True):
        close(ours, one_by_one, rtol=1e-9)


def test_per_instance_keeps_an_examples_masks_in_both_passes():
    """With dropout, too, each example ascends along the gradient of the very network that it descends in."""
    model, (x, y) = normed(dropout=0.5), batch(dtype=torch.float64)
    torch.manual_seed(3)
    PerInstance(model, 0.3).backward(Losses(model, x, y))
    params, expected = list(model.parameters()), [torch.zeros_like(p) for p in model.parameters()]
    for i in range(len(y)):
        torch.manual_seed(3)
        g = torch.autograd.grad(losses(model, x, y)[i], params)  # the whole batch's masks, one example's loss
        length = torch.sqrt(sum(v.square().sum() for v in g))
        with perturbed(params, g, float(0.3 / length)):
            torch.manual_seed(3)
            there = torch.autograd.grad(losses(model, x, y)[i], params)
        torch._foreach_add_(expected, [v / len(y) for v in there])
    for p, e in zip(params, expected, strict=True):
        close(p.grad, e, rtol=1e-6)


def test_per_instance_names_what_it_cannot_look_into():
    with pytest.raises(ValueError, match=r"'1' \(BatchNorm1d\)"):
        PerInstance(nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4)))
    with pytest.raises(ValueError, match=r"GroupSAM\(params, m=1\)"):
        PerInstance(nn.Linear(5, 4).parameters())


def test_m_sams_groups_draw_their_own_masks_and_both_passes_of_a_group_the_same():
    seen = []

    class Noting(Losses):
        def __call__(self):
            seen.append(float(torch.rand(())))
            return super().__call__()

        def subset(self, indices):
            return Noting(self.model, self.x[indices], self.y[indices])

    closure = Noting(normed(), *batch())
    GroupSAM(closure.model, m=4).backward(closure)
    assert seen[::2] == seen[1::2]
    assert len(set(seen)) == 3
    seen.clear()
    GroupSAM(closure.model, m=4).backward(closure.__call__)
    assert len(seen) == 7
    assert len(set(seen)) == 1  # in full: the batch's own masks throughout


def test_m_sam_counts_a_restricted_forward_by_its_share_and_a_full_one_in_full():
    a, b, w, plain = quadratic(batch_size=7)
    method = GroupSAM([w], 0.3, m=3)
    method.backward(Quadratic(a, b, w))
    assert (method.report["forwards"], method.report["backwards"]) == pytest.approx((2, 2))
    method.backward(plain)
    assert (method.report["forwards"], method.report["backwards"]) == pytest.approx((1 + 2 * 3, 2 * 3))


def gradients(a, b, v, rho):
    """(g at w, SAM's gradient) of the mean quadratic."""
    g = a.mean(0) @ v + b.mean(0)
    return g, a.mean(0) @ (v + rho * unit(g)) + b.mean(0)


def test_gsam_on_a_quadratic_is_the_closed_form():
    a, b, w, closure = quadratic()
    g, perturbed = gradients(a, b, w.detach(), 0.3)
    orthogonal = g - (g @ perturbed) / (perturbed @ perturbed) * perturbed
    close(step(GSAM([w], 0.3, alpha=0.4), w, closure)[1], perturbed - 0.4 * orthogonal)
    assert float(orthogonal.norm()) > 0.01
    close(step(GSAM([w], 0.3, alpha=0.0), w, closure)[1], perturbed)


def test_looksam_on_a_quadratic_is_the_closed_form_in_each_kind_of_step():
    a, b, w, closure = quadratic()
    method = LookSAM([w], 0.3, k=3, alpha=0.7)
    for t in range(7):
        v = w.detach().clone()
        g, perturbed = gradients(a, b, v, 0.3)
        _, gradient = step(method, w, closure)
        if t % 3 == 0:
            expected = perturbed
            kept = perturbed - (perturbed @ unit(g)) * unit(g)
        else:
            expected = g + 0.7 * g.norm() / kept.norm() * kept
        close(gradient, expected)
        assert method.report["backwards"] == (2 if t % 3 == 0 else 1)
        with torch.no_grad():
            w -= 0.05 * gradient


def test_looksam_with_k_one_is_sam():
    _, _, w, closure = quadratic()
    method = LookSAM([w], 0.3, k=1)
    for _ in range(3):
        close(step(method, w, closure)[1], step(SAM([w], 0.3), w, closure)[1])


def test_looksam_does_not_blow_up_rounding_where_nothing_is_orthogonal():
    """Parallel gradients leave g_v = 0 up to rounding, which ‖g‖/‖g_v‖ would scale to the size of g."""
    g = torch.randn(1000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    w, factors = nn.Parameter(torch.zeros_like(g)), iter([1.0, 0.1, 0.7])
    method = LookSAM([w], 0.3, k=2)
    closure = lambda: next(factors) * (g @ w).expand(3)  # noqa: E731
    close(step(method, w, closure)[1], 0.1 * g)
    close(step(method, w, closure)[1], 0.7 * g)


def test_fsam_on_a_quadratic_is_the_closed_form():
    a, b, w, closure = quadratic()
    method = FSAM([w], 0.3, sigma=0.8, decay=0.6)
    average = None
    for _ in range(4):
        v = w.detach().clone()
        g, _ = gradients(a, b, v, 0.3)
        direction = g if average is None else g - 0.8 * average
        average = g if average is None else 0.6 * average + 0.4 * g
        _, gradient = step(method, w, closure)
        close(gradient, a.mean(0) @ (v + 0.3 * unit(direction)) + b.mean(0))
        with torch.no_grad():
            w -= 0.05 * gradient


def test_fsam_equals_pytorch_optimizer_over_steps():
    ours, theirs = network(), network()
    reference = ReferenceFSAM(theirs.parameters(), torch.optim.SGD, rho=0.1, sigma=1.0, lmbda=0.9, lr=0.05)
    optimizer = torch.optim.SGD(ours.parameters(), lr=0.05)
    method = FSAM(ours.parameters(), 0.1, sigma=1.0, decay=0.9)
    for t in range(6):
        x, y = batch(seed=t)
        method.backward(lambda x=x, y=y: losses(ours, x, y))
        optimizer.step()
        optimizer.zero_grad()
        losses(theirs, x, y).mean().backward()
        reference.first_step(zero_grad=True)
        losses(theirs, x, y).mean().backward()
        reference.second_step(zero_grad=True)
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-8)  # theirs sums the norm in float32


def test_momentum_sam_on_a_quadratic_is_the_papers_algorithm():
    """w̃ = w − ρ v/‖v‖ with v ← μ v + ∇L(w̃): the direction of SGD's momentum buffer."""
    a, b, w, closure = quadratic()
    method = MomentumSAM([w], 0.3, momentum=0.9)
    v = torch.zeros(3, dtype=torch.float64)
    for t in range(4):
        point = w.detach() - (0.3 * unit(v) if t else 0)
        expected = a.mean(0) @ point + b.mean(0)
        v = 0.9 * v + expected
        _, gradient = step(method, w, closure)
        close(gradient, expected)
        assert method.report["backwards"] == 1
        with torch.no_grad():
            w -= 0.05 * gradient


def test_momentum_sam_with_adamw_is_the_authors_adamw_msam():
    """adamW_msam.py of MarlonBecker/MSAM keeps the weights at w̃ = w − ρ m/‖m‖, with m AdamW's first moment.

    Without weight decay, which the authors take after the step and torch.optim before it.
    """
    a, b, w, closure = quadratic()
    method = MomentumSAM([w], 0.3, momentum=0.9)
    optimizer = torch.optim.AdamW([w], lr=0.05, betas=(0.9, 0.999), eps=1e-8, weight_decay=0)
    moved, m, v, factor = w.detach().clone(), torch.zeros(3).double(), torch.zeros(3).double(), 0.0
    for t in range(1, 6):
        step(method, w, closure)
        optimizer.step()
        gradient = a.mean(0) @ moved + b.mean(0)
        moved += factor * m  # back to w
        m, v = 0.9 * m + 0.1 * gradient, 0.999 * v + 0.001 * gradient**2
        moved -= 0.05 / (1 - 0.9**t) * m / ((v / (1 - 0.999**t)).sqrt() + 1e-8)
        factor = 0.3 / m.norm()
        close(w, moved)
        moved -= factor * m


def test_sam_on_moves_the_normalisation_layers_only_by_rho_along_their_gradient():
    model, (x, y) = normed(), batch()
    norm = model[1]
    g = torch.autograd.grad(losses(model, x, y).mean(), [norm.weight, norm.bias])
    size = torch.cat(g).norm()
    moved = copy.deepcopy(model)
    for p, d in zip([moved[1].weight, moved[1].bias], g, strict=True):
        p.data += 0.3 * d / size
    losses(moved, x, y).mean().backward()
    SAMON(model, 0.3).backward(lambda: losses(model, x, y))
    for p, q in zip(model.parameters(), moved.parameters(), strict=True):
        close(p.grad, q.grad)


def test_sam_on_says_what_it_needs():
    model, (x, y) = normed(), batch()
    with pytest.raises(ValueError, match="pass the module"):
        SAMON(model.parameters()).backward(lambda: losses(model, x, y))
    with pytest.raises(ValueError, match="has none"):
        SAMON(network())


def test_ae_sam_ascends_exactly_where_the_squared_norm_is_large():
    """ℓ = s·w, so that ‖g‖² = s² is chosen at will."""
    w = nn.Parameter(torch.ones(1, dtype=torch.float64))
    method = AESAM([w], 0.3, threshold=0.5, decay=0.8)
    scales = torch.rand(40, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 0.1
    mean, variance, ascents = float(scales[0]) ** 2, 0.0, 0
    for s in scales.tolist():
        mean = 0.8 * mean + 0.2 * s**2
        variance = 0.8 * variance + 0.2 * (s**2 - mean) ** 2
        expected = s**2 >= mean + 0.5 * variance**0.5
        step(method, w, lambda s=s: s * w)
        assert method.report["ascended"] == expected
        assert method.report["backwards"] == 1 + expected
        ascents += expected
    assert 5 < ascents < 35


def test_ae_sam_gives_sams_gradient_or_the_plain_one():
    a, b, w, closure = quadratic()
    g, perturbed = gradients(a, b, w.detach(), 0.3)
    close(step(AESAM([w], 0.3, threshold=-1e9), w, closure)[1], perturbed)
    never = AESAM([w], 0.3, threshold=1e9)
    never.variance = 1.0
    close(step(never, w, closure)[1], g)


@pytest.mark.parametrize(
    ("gamma", "strict", "descend"), [(0.5, False, 3), (0.5, True, 2), (1, True, 5), (0.1, True, 1)]
)
@pytest.mark.parametrize("restrictable", [True, False])
def test_esam_on_a_quadratic_is_the_closed_form(restrictable, gamma, strict, descend):
    """Two parameters u, v; with this seed β = ½ draws one of them."""
    a, b, _, _ = quadratic(batch_size=6, size=4)
    u, v = (nn.Parameter(torch.tensor(t, dtype=torch.float64)) for t in ([0.5, -1.0], [2.0, 0.3]))

    class Both(Quadratic):
        def __call__(self):
            self.w = torch.cat([u, v])
            return super().__call__()

        def subset(self, indices):
            return Both(self.a[indices], self.b[indices], None)

    closure = Both(a, b, None) if restrictable else Both(a, b, None).__call__
    method = ESAM([u, v], 0.3, beta=0.5, gamma=gamma, strict=strict, seed=5)
    generator = torch.Generator().manual_seed(5)
    kept = (torch.rand(2, generator=generator) < 0.5).tolist()
    assert kept.count(True) == 1
    w = torch.cat([u, v]).detach()
    per_example = lambda w: 0.5 * torch.einsum("i,bij,j->b", w, a, w) + b @ w  # noqa: E731
    g = (a.mean(0) @ w + b.mean(0)) * torch.tensor([kept[0]] * 2 + [kept[1]] * 2)
    moved = w + 0.3 / 0.5 * unit(g)
    worst = (per_example(moved) - per_example(w)).topk(descend).indices
    expected = a[worst].mean(0) @ moved + b[worst].mean(0)
    loss = method.backward(closure)
    close(torch.cat([u.grad, v.grad]), expected)
    close(loss, per_example(w).mean())
    assert method.report["selected"] == descend
    passes = (method.report["forwards"] + 2 * method.report["backwards"]) / 3
    assert passes == pytest.approx((4 + descend / 2) / 3 if restrictable else 7 / 3)


def test_esam_with_everything_drawn_is_sam():
    x, y = batch()
    found = []
    for make in (lambda p: SAM(p, 0.3), lambda p: ESAM(p, 0.3, beta=1.0, gamma=1.0)):
        model = network()
        make(model.parameters()).backward(Losses(model, x, y))
        found.append([p.grad for p in model.parameters()])
    assert same(*found)


# The traps, for each


def test_a_scaler_works_with_ae_sams_plain_steps():
    model, (x, y) = normed(dtype=torch.float32), batch(dtype=torch.float32)
    method, scaler = AESAM(model, 0.1, threshold=1e9), torch.amp.GradScaler("cpu", init_scale=2.0**10)
    method.variance = 1.0
    before, optimizer = weights(model), torch.optim.SGD(model.parameters(), lr=0.1)
    expected = torch.autograd.grad(losses(model, x, y).mean(), list(model.parameters()))
    method.backward(Losses(model, x, y), scaler=scaler)
    scaler.step(optimizer)
    scaler.update()
    for p, old, g in zip(model.parameters(), before, expected, strict=True):
        torch.testing.assert_close(p.detach(), old - 0.1 * g)


@pytest.mark.parametrize("name", ["fsam", "looksam", "msam", "ae_sam"])
def test_the_state_matters(name):
    """Else the resume test could not fail."""
    model, (x, y) = normed(), batch()
    method = AESAM(model, 0.1, threshold=0.0) if name == "ae_sam" else FAMILY[name](model, 0.1)
    fresh = copy.deepcopy(method.state_dict())
    method.backward(Losses(model, x, y))
    assert str(fresh) != str(method.state_dict())


@pytest.mark.parametrize(("name", "steps"), [(name, 20) for name in FAMILY if name != "ae_sam"])
def test_passes_are_true_at_the_default_options(name, steps):
    """In units of a training pass: a forward is a third of one, a backward two thirds."""
    model, (x, y) = normed(), batch()
    method = METHODS[name](model)
    spent = 0.0
    for _ in range(steps):
        method.backward([Losses(model, x[:4], y[:4]), Losses(model, x[4:], y[4:])])
        spent += (method.report["forwards"] + 2 * method.report["backwards"]) / 3
    assert spent / steps == pytest.approx(method.passes)
    assert METHODS[name].passes == pytest.approx(method.passes)


def test_ae_sams_passes_are_one_and_a_half_where_the_norm_is_symmetric():
    w, seen = nn.Parameter(torch.ones(1, dtype=torch.float64)), []
    method = AESAM([w])
    for square in (1 + 0.5 * (2 * torch.rand(600, generator=torch.Generator().manual_seed(1)) - 1)).tolist():
        method.backward(lambda s=square**0.5: s * w)
        seen.append((method.report["forwards"] + 2 * method.report["backwards"]) / 3)
    assert sum(seen) / len(seen) == pytest.approx(AESAM.passes, abs=0.06)


@pytest.mark.parametrize(
    ("name", "option", "value"),
    [
        ("m_sam", "m", 0),
        ("gsam", "alpha", -1),
        ("looksam", "k", 0),
        ("looksam", "alpha", -1),
        ("fsam", "sigma", -1),
        ("fsam", "decay", 1),
        ("msam", "momentum", 1),
        ("ae_sam", "decay", -0.1),
        ("esam", "beta", 0),
        ("esam", "gamma", 1.5),
        ("sam_on", "rho", -1),
        ("r3f", "noise", "cauchy"),
        ("r3f", "sigma", -1),
        ("rdrop", "alpha", -1),
        ("freelb", "steps", 0),
        ("freelb", "max_norm", -1),
        ("smart", "steps", 0),
        ("smart", "radius", -1),
    ],
)
def test_a_bad_option_is_named_before_work_starts(name, option, value):
    with pytest.raises(UserError, match=rf"\b{option} must be"):
        check_method(name, {option: value})


def test_the_name_of_an_optimizer_is_answered_with_its_method():
    shipped = [yaml.safe_load(path.read_text()) for path in Path(__file__).parents[1].glob("conf/optimizer/*.yaml")]
    others = {o["name"]: o for o in shipped if o["name"] not in METHODS}
    assert set(OPTIMIZERS) == set(others)
    for name, optimizer in others.items():
        weighting = optimizer.get("weighting", "probe")
        option = "" if weighting == "probe" else f" with weighting={weighting}"
        with pytest.raises(UserError) as error:
            check_method(name, {})
        assert str(error.value) == f"unknown method '{name}'; did you mean '{optimizer['method']}'{option}?"


def test_per_instance_offers_no_m():
    with pytest.raises(UserError, match=r"unknown key 'optimizer[.]m'"):
        check_method("per_instance", {"m": 4})


def test_the_table_of_methods_has_a_row_for_each_with_its_passes():
    text = (Path(__file__).parent.parent / "docs" / "methods.md").read_text(encoding="utf-8")
    rows = {row[0]: row[1] for row in re.findall(r"^\| `(\w+)` \|[^|]*(?:\\\|[^|]*)*\| ([\d.]+)", text, re.MULTILINE)}
    assert set(METHODS) <= set(rows)
    for name, cls in METHODS.items():
        assert float(rows[name]) == pytest.approx(cls.passes, abs=0.005), name
