"""What holds for every method and every weighting: a new entry of METHODS or WEIGHTINGS is in it at once."""

import copy
import pickle
from itertools import pairwise

import pytest
import torch
from classifier import Classifier, Losses, batch, part
from hypothesis import given, settings
from hypothesis import strategies as st

from dsam import METHODS, NonFiniteGradient, Plain
from dsam.methods import WEIGHTINGS
from dsam.methods.delta_sam import LIKELIHOOD
from dsam.methods.embedding_noise import OutputMethod
from dsam.methods.examples_apart import PROVEN

# Options under which a method does all that it can do on small batches: AE-SAM ascends, groups are cut, noise is seen.
OPTIONS = {
    "ae_sam": {"threshold": -1e9},
    "looksam": {"k": 2},
    "m_sam": {"m": 5},
    "r3f": {"sigma": 0.1},
    "smart": {"sigma": 0.1, "radius": 1.0, "step_size": 0.3},
}
CASES = {name: (name, OPTIONS.get(name, {})) for name in METHODS if name != "delta_sam"}
CASES |= {f"delta_sam-{w}": ("delta_sam", {"weighting": w}) for w in WEIGHTINGS}
CASES["delta_sam-recompute"] = ("delta_sam", {"recompute": True, "power": 0.5, "mix": 0.2})
WITH_OUTPUTS = [n for n, (kind, _) in CASES.items() if issubclass(METHODS[kind], OutputMethod)]
WITH_RHO = [n for n in CASES if n not in WITH_OUTPUTS and n != "plain"]
INSIDE = [n for n in CASES if n == "per_instance" or WEIGHTINGS.get(n.partition("-")[2], WEIGHTINGS["probe"]).exact]
LOGITS = ["delta_sam-gauss_newton"]
BARE = [n for n in CASES if n not in [*WITH_OUTPUTS, *LOGITS]]  # a closure that is only a call is enough


def make(name, model, **options):
    kind, own = CASES[name]
    return METHODS[kind](model, **own | options)


def strong(name, model, **options):
    """With a perturbation that shows."""
    return make(name, model, **({"rho": 0.3} if name in WITH_RHO else {}) | options)


def proven(method):
    """The method as it is after its first step, in which exact per-example gradients are looked at by one more pass."""
    method.checked |= PROVEN
    return method


def contents(model):
    return [p.detach().clone() for p in model.parameters()]


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def close(a, b, **tolerance):
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, **tolerance)


def gradients(model):
    return [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in model.parameters()]


class Spoilt(Losses):
    """Does `what` to what its n-th forward gives, restricted or not."""

    calls, n, what = None, 0, staticmethod(lambda losses: losses)

    @classmethod
    def of(cls, model, data, n, what):
        return type("Case", (cls,), {"calls": [0], "n": n, "what": staticmethod(what)})(model, data)

    def outputs(self, noise=None, **how):
        self.calls[0] += 1
        losses, logits = super().outputs(noise, **how)
        return (self.what(losses), self.what(logits)) if self.calls[0] == self.n else (losses, logits)


def forwards(name):
    model = Classifier()
    closure = Spoilt.of(model, batch(), 0, None)
    proven(strong(name, model)).backward(closure)
    return closure.calls[0]


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_come_back_bit_for_bit_in_the_same_memory(name, dtype):
    if dtype is torch.bfloat16 and name in INSIDE:
        dtype = torch.float64
    model = Classifier(dropout=0.2, dtype=dtype)
    before, pointers = contents(model), [p.data_ptr() for p in model.parameters()]
    method = strong(name, model)
    for _ in range(3):
        method.backward(Losses(model, batch()))
    assert same(before, contents(model))
    assert pointers == [p.data_ptr() for p in model.parameters()]


@pytest.mark.parametrize("name", CASES)
def test_what_goes_wrong_in_any_pass_leaves_weights_and_gradient_and_the_next_step_goes_well(name):
    def stop(losses):
        raise RuntimeError("out of memory")

    passes = forwards(name)
    for n in range(1, passes + 1):
        for what, error in ((stop, RuntimeError), (lambda x: x * float("nan"), NonFiniteGradient)):
            model = Classifier()
            held = torch.ones_like(model.last.bias)
            model.last.bias.grad = held.clone()
            before, method = contents(model), proven(strong(name, model))
            with pytest.raises(error):
                method.backward(Spoilt.of(model, batch(), n, what))
            assert same(before, contents(model))
            assert torch.equal(model.last.bias.grad, held) and model.first.weight.grad is None
            assert not model.words._forward_hooks and not model.words.sparse
            method.backward(Losses(model, batch()))
            assert all(torch.isfinite(g).all() for g in gradients(model))


@given(cuts=st.lists(st.integers(1, 11), max_size=4), bare=st.booleans(), data=st.data())
@settings(max_examples=80, deadline=None)
def test_pieces_of_any_sizes_equal_the_undivided_batch(cuts, bare, data):
    name = data.draw(st.sampled_from(BARE if bare else list(CASES)))
    edges, results = [0, *sorted(set(cuts)), 12], []
    for slices in ([slice(0, 12)], [slice(*ends) for ends in pairwise(edges)]):
        model, found = Classifier(), []
        method = strong(name, model, seed=3)
        for t in range(2):
            model.zero_grad()
            pieces = [Losses(model, part(batch(seed=t), s)) for s in slices]
            loss = method.backward([piece.__call__ for piece in pieces] if bare else pieces)
            found += [loss, *gradients(model), method.report["gradient_norm"]]
        results.append(found)
    # weights are float32; probes of a batch whose words are not known draw alike
    tolerance = {"rtol": 1e-4, "atol": 1e-6} if name.startswith("delta_sam") else {"rtol": 1e-8, "atol": 1e-10}
    close(*results, **tolerance)


@pytest.mark.parametrize("name", CASES)
def test_adds_to_a_gradient_that_is_there(name):
    model = Classifier()
    strong(name, model, seed=1).backward(Losses(model, batch()))
    once = gradients(model)
    pieces = [Losses(model, part(batch(), s)) for s in (slice(0, 5), slice(5, 12))]
    strong(name, model, seed=1).backward(pieces)
    tolerance = {"rtol": 1e-4, "atol": 1e-6} if name.startswith("delta_sam") else {"rtol": 1e-8, "atol": 1e-10}
    close(gradients(model), [2 * g for g in once], **tolerance)


@pytest.mark.parametrize("name", WITH_RHO)
@pytest.mark.parametrize("mask", ["same", "fresh"])
def test_rho_zero_is_plain_training_with_its_masks(name, mask):
    """Bit for bit, but for what sums examples apart (groups, single examples) or leaves some out (ESAM)."""
    trained = []
    for method_of in (Plain, lambda model, **o: make(name, model, rho=0.0, **o)):
        model = Classifier(dropout=0.3, dtype=torch.float32)
        if name in (*INSIDE, "m_sam", "esam"):
            model = Classifier()
        options = {"gamma": 1.0, "beta": 1.0} if name == "esam" and method_of is not Plain else {}
        method, optimizer = method_of(model, mask=mask, **options), torch.optim.AdamW(model.parameters(), lr=0.01)
        torch.manual_seed(5)
        for t in range(4):
            method.backward(Losses(model, batch(seed=t)))
            optimizer.step()
            optimizer.zero_grad()
        trained.append([*contents(model), torch.get_rng_state()])
    assert torch.equal(trained[0][-1], trained[1][-1])
    if name in (*INSIDE, "m_sam", "esam"):
        close(*trained, rtol=1e-8, atol=1e-10)
    elif (name, mask) != ("ae_sam", "fresh"):  # whose first pass may be the only one
        assert same(*trained)


@pytest.mark.parametrize("name", CASES)
def test_a_zero_gradient_is_finite_and_changes_nothing(name):
    model = Classifier()
    method = strong(name, model)
    for _ in range(3):
        method.checked.add(LIKELIHOOD)  # of which 0 is none
        method.backward(Spoilt.of(model, batch(), 0, None) if name in WITH_OUTPUTS else _nothing(model))
    if name not in WITH_OUTPUTS:
        assert all(torch.equal(g, torch.zeros_like(g)) for g in gradients(model))
    assert all(torch.isfinite(g).all() for g in gradients(model))


class _Nothing(Losses):
    def outputs(self, noise=None, **how):
        losses, logits = super().outputs(noise, **how)
        return 0 * losses, logits


def _nothing(model):
    return _Nothing(model, batch())


@pytest.mark.parametrize("name", CASES)
def test_a_scaler_changes_nothing_and_skips_what_overflows(name):
    trained = []
    for scaler in (None, torch.amp.GradScaler("cpu", init_scale=2.0**4, growth_factor=8.0, growth_interval=1)):
        model = Classifier(dtype=torch.float32)
        method, optimizer = strong(name, model), torch.optim.SGD(model.parameters(), lr=0.1)
        for t in range(3):
            method.backward(Losses(model, batch(seed=t)), scaler=scaler)
            if scaler is None:
                optimizer.step()
            else:
                scaler.step(optimizer)
                scaler.update()
            optimizer.zero_grad()
        trained.append(contents(model))
    close(*trained, rtol=1e-5, atol=1e-7)
    method.backward(Spoilt.of(model, batch(), 1, lambda x: x * float("inf")), scaler=scaler)
    scaler.step(optimizer)
    scaler.update()
    assert same(trained[1], contents(model))
    assert scaler.get_scale() == 2.0**12  # three steps that let it grow, and one that halved it
    optimizer.zero_grad()
    method.backward(Losses(model, batch()), scaler=scaler)  # and the method's own state is not spoilt
    assert all(torch.isfinite(g).all() for g in gradients(model))


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("mask", ["same", "fresh"])
def test_the_gradient_that_the_step_leaves_went_through_the_scaler(name, mask):
    """The last backward pass over the losses is scaled, else small gradients vanish in half precision."""
    seen = []

    class Watched(Losses):
        def outputs(self, noise=None, **how):
            losses, logits = super().outputs(noise, **how)
            if losses.requires_grad:
                losses.register_hook(lambda g: seen.append(float(g.abs().max())))
            return losses, logits

    model = Classifier()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    strong(name, model, mask=mask).backward(Watched(model, batch()), scaler=scaler)
    assert seen[-1] > 2.0**16 / 100  # 1/12 of it for each example; 1/4 or so of that by ESAM's, FreeLB's shares


@pytest.mark.parametrize("name", [name for name in CASES if name not in INSIDE])  # these refuse batch norm
def test_batch_statistics_move_as_in_one_clean_pass(name):
    model, clean = Classifier(batch_norm=True), Classifier(batch_norm=True)
    for rows in [slice(0, 5), slice(5, 10), slice(10, 12)] if name == "m_sam" else [slice(0, 12)]:
        clean(**{k: v for k, v in part(batch(), rows).items() if k != "labels"})
    noise = {"sigma": 0.0} if name in ("r3f", "smart") else {"init": 0.0} if name == "freelb" else {}
    strong(name, model, **noise).backward(Losses(model, batch()))
    close(list(model.buffers()), list(clean.buffers()), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("mask", ["same", "fresh"])
def test_a_resumed_method_goes_on_as_if_never_stopped_also_after_a_copy_and_a_pickle(name, mask):
    def train(model, method, optimizer, steps):
        for t in steps:
            method.backward(Losses(model, batch(seed=t)))
            optimizer.step()
            optimizer.zero_grad()

    model = Classifier(dropout=0.2)
    method, optimizer = strong(name, model, mask=mask), torch.optim.AdamW(model.parameters(), lr=0.01)
    torch.manual_seed(0)
    train(model, method, optimizer, range(3))
    saved = copy.deepcopy([model.state_dict(), method.state_dict(), optimizer.state_dict(), torch.get_rng_state()])
    both = copy.deepcopy((model, method)), pickle.loads(pickle.dumps((model, method)))
    train(model, method, optimizer, range(3, 5))

    resumed = Classifier(dropout=0.2, seed=7)
    resumed.load_state_dict(saved[0])
    other = strong(name, resumed, mask=mask, seed=9)
    other.load_state_dict(saved[1])
    for network, continued in ((resumed, other), *both):
        optimizer = torch.optim.AdamW(network.parameters(), lr=0.01)
        optimizer.load_state_dict(copy.deepcopy(saved[2]))
        torch.set_rng_state(saved[3])
        train(network, continued, optimizer, range(3, 5))
        assert same(contents(model), contents(network))


@pytest.mark.parametrize("name", CASES)
def test_its_own_draws_leave_the_default_generator_alone_and_the_same_seed_repeats_them(name):
    found = []
    for _ in range(2):
        model, before = Classifier(), torch.get_rng_state()
        strong(name, model, mask="fresh", seed=4).backward(Losses(model, batch()))
        torch.manual_seed(0)
        found.append(gradients(model))
        torch.set_rng_state(before)
    assert same(*found)
    model = Classifier()
    before = torch.get_rng_state()
    strong(name, model, mask="fresh").backward(Losses(model, batch()))
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("name", CASES)
def test_it_reports_what_it_did_in_finite_numbers(name):
    model = Classifier(dropout=0.1)
    method = strong(name, model)
    method.backward(Losses(model, batch()))
    assert {"forwards", "backwards", "gradient_norm"} <= set(method.report)
    assert all(torch.isfinite(torch.as_tensor(v)).all() for v in method.report.values())
    norm = torch.cat([g.flatten() for g in gradients(model)]).norm()
    assert float(method.report["gradient_norm"]) == pytest.approx(float(norm), rel=1e-6)


@pytest.mark.parametrize("name", [name for name in CASES if name != "delta_sam-exact_curvature"])  # it refuses this
def test_a_layer_that_some_passes_skip_stays_where_it_is(name):
    class Skipping(Losses):
        def outputs(self, noise=None, **how):
            self.model.skip = not self.model.skip
            return super().outputs(noise, **how)

    class Sometimes(Classifier):
        skip = False

        def __init__(self):
            super().__init__()
            self.extra = torch.nn.Linear(6, 6).double()

        def forward(self, input_ids, attention_mask):
            hook = None if self.skip else self.words.register_forward_hook(lambda _, __, out: self.extra(out))
            try:
                return super().forward(input_ids, attention_mask)
            finally:
                if hook is not None:
                    hook.remove()

    model = Sometimes()
    before, method = contents(model), strong(name, model)
    for _ in range(2):
        method.backward(Skipping(model, batch()))
    assert same(before, contents(model))


@pytest.mark.parametrize("name", CASES)
def test_a_closure_that_touches_the_gradient_is_refused_and_zero_grad_before_any_does_no_harm(name):
    model = Classifier()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    class ZeroGrad(Losses):
        def outputs(self, noise=None, **how):
            optimizer.zero_grad()
            return super().outputs(noise, **how)

    class Backward(Losses):
        def outputs(self, noise=None, **how):
            losses, logits = super().outputs(noise, **how)
            if torch.is_grad_enabled():
                losses.mean().backward(retain_graph=True)
            return losses, logits

    strong(name, model, seed=1).backward(Losses(model, batch()))
    expected = gradients(model)
    with pytest.raises(ValueError, match=r"changed \.grad.*without backward\(\) or zero_grad\(\)"):
        strong(name, model, seed=1).backward(ZeroGrad(model, batch()))
    optimizer.zero_grad()
    strong(name, model, seed=1).backward(ZeroGrad(model, batch()))  # there was nothing to clear
    assert same(expected, gradients(model))
    optimizer.zero_grad()
    with pytest.raises(ValueError, match=r"changed \.grad"):
        strong(name, model).backward(Backward(model, batch()))


@pytest.mark.parametrize("name", CASES)
def test_losses_without_a_graph_are_named_by_every_method(name):
    model = Classifier()
    with torch.no_grad(), pytest.raises(ValueError, match="have no graph.*no_grad"):
        strong(name, model).backward(Losses(model, batch()))


@pytest.mark.parametrize("name", CASES)
def test_a_method_of_another_model_is_refused(name):
    model, other = Classifier(), Classifier()
    with pytest.raises(ValueError):
        strong(name, other).backward(Losses(model, batch()))


@pytest.mark.parametrize("name", CASES)
def test_parameters_unfrozen_later_are_refused_and_duplicates_count_once(name):
    model = Classifier()
    model.words.requires_grad_(False)
    method = strong(name, model)
    model.words.requires_grad_(True)
    with pytest.raises(ValueError, match="make it anew"):
        method.backward(Losses(model, batch()))
    if name in BARE and name not in (*INSIDE, "sam_on"):
        found = []
        for params in (list(model.parameters()), [*model.parameters(), *model.parameters()]):
            model.zero_grad()
            strong(name, params, seed=2).backward(Losses(model, batch()))
            found.append(gradients(model))
        assert same(*found)
