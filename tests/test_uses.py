"""Uses of a model and its layers that are easily taken for others: the result is the definition's all the same."""

import types

import encoders
import pytest
import torch
from by_definition import FORMULAS, Examples
from test_stacks import method_of
from torch import nn
from torch.nn import functional as F

from dsam import ExampleLosses, NonFiniteGradient
from dsam.methods import SAM, DeltaSAM, GroupSAM, PerInstance
from dsam.methods.examples_apart import PROVEN
from dsam.methods.layer_kinds import kind_of
from dsam.methods.per_example import PerExampleGradients
from dsam.methods.perturbation import total_norm
from dsam.methods.step import Step


class Alone:
    """A closure that can run some of its examples without the others; `dtype`: of autocast."""

    def __init__(self, model, x, y, dtype=None):
        self.model, self.x, self.y, self.dtype = model, x, y, dtype

    def __call__(self):
        with torch.autocast("cpu", self.dtype, enabled=self.dtype is not None):
            out = self.model(self.x)
        return F.cross_entropy(out.float() if self.dtype else out, self.y, reduction="none")

    def __len__(self):
        return len(self.y)

    def subset(self, indices):
        return Alone(self.model, self.x[indices], self.y[indices], self.dtype)


def data(*shape, dtype=torch.float64, classes=3):
    draw = torch.Generator().manual_seed(1)
    return torch.randn(shape, generator=draw, dtype=dtype), torch.randint(0, classes, shape[:1], generator=draw)


def gradient(method, closure):
    closure.model.zero_grad()
    method.backward(closure.__call__ if isinstance(method, PerInstance) else closure)
    return torch.cat([p.grad.flatten() for p in closure.model.parameters()])


class SequenceFirst(nn.Module):
    """Tokens in the first dimension inside, each of which sees the others."""

    def __init__(self):
        super().__init__()
        self.e, self.o = nn.Linear(4, 8), nn.Linear(8, 3)

    def forward(self, x):
        h = torch.tanh(self.e(x.transpose(0, 1)))
        return self.o((h + torch.tanh(h.mean(0, keepdim=True)))[0])


class Functional(nn.Module):
    """A layer that is called, and whose weight is used once more without calling it."""

    def __init__(self):
        super().__init__()
        self.a, self.o = nn.Linear(6, 6, bias=False), nn.Linear(6, 3)

    def forward(self, x):
        return self.o(torch.tanh(F.linear(torch.tanh(self.a(x)), self.a.weight)))


def one_slope():
    return nn.Sequential(nn.Linear(5, 7), nn.PReLU(), nn.Linear(7, 3))


@pytest.mark.filterwarnings("ignore:.* one example at a time")
@pytest.mark.parametrize(
    ("model", "shape", "dtype", "singly"),
    [
        (one_slope, (6, 5), None, True),  # one number for all elements is no scale by elements
        (SequenceFirst, (6, 6, 4), None, True),  # as many tokens as examples
        (SequenceFirst, (6, 5, 4), None, True),
        (Functional, (8, 6), None, True),
        (Functional, (8, 6), torch.bfloat16, True),  # whose one cast both uses share
        (lambda: nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Flatten(), nn.Linear(48, 3)), (6, 6, 4), None, False),
    ],
)
def test_per_instance_is_m_sam_of_one_whatever_the_layers_are_used_for(model, shape, dtype, singly):
    torch.manual_seed(0)
    model = model().to(torch.float32 if dtype else torch.float64)
    x, y = data(*shape, dtype=torch.float32 if dtype else torch.float64)
    closure = Alone(model, x, y, dtype)
    method = PerInstance(model, 0.5)
    found, expected = gradient(method, closure), gradient(GroupSAM(model, 0.5, m=1), closure)
    assert (found - expected).norm() < (1e-9 if dtype is None else 0.03) * expected.norm()
    assert bool(method.notes) == method.singly == singly


def test_one_number_is_no_scale_by_elements():
    assert kind_of(nn.PReLU()) is None
    with pytest.raises(TypeError, match="none of the layers"):
        PerExampleGradients(one_slope())


def test_the_proof_is_no_part_of_the_step():
    """It is made once, and once more where there are as many tokens as examples; masks and counts are as without it."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 3), nn.Flatten(1), nn.LazyLinear(3))
    x, y = data(6, 5, 4, dtype=torch.float32)
    model(x)
    calls, found = [], []
    model[0].register_forward_hook(lambda *_: calls.append(1))
    for proven in (set(), PROVEN):
        method = PerInstance(model, 0.5)
        method.checked |= proven
        torch.manual_seed(3)
        found.append(gradient(method, Alone(model, x, y)))
        assert method.report["forwards"] == method.report["backwards"] == 2
    assert torch.equal(*found)
    assert len(calls) == 3 + 2
    other = nn.Sequential(nn.Linear(4, 8), nn.Flatten(), nn.Linear(48, 3))
    other[0].register_forward_hook(lambda *_: calls.append(1))
    method = PerInstance(other, 0.5)
    calls.clear()
    for _ in range(2):
        gradient(method, Alone(other, *data(6, 6, 4, dtype=torch.float32)))
    assert len(calls) == 3 + 2


@pytest.mark.parametrize("make", [lambda m: PerInstance(m, 0.05), lambda m: DeltaSAM(m, 0.05, "gap")])
def test_batch_norm_is_refused_whenever_it_is_put_into_training_mode(make):
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3)).double()
    closure = Alone(model, *data(8, 1, 6, 6))
    method = make(model.eval())
    method.backward(closure)
    model.train()
    with pytest.raises(ValueError, match="BatchNorm2d.*depend on the batch's others"):
        method.backward(closure)


@pytest.mark.parametrize("what", ["zero", "not finite", "raises"])
def test_a_proof_that_shows_nothing_is_made_again(what):
    model = nn.Linear(4, 3).double()
    closure, calls = Alone(model, *data(8, 4)), []

    def losses():
        calls.append(1)
        if len(calls) == 2:  # the proof's pass
            if what == "raises":
                raise RuntimeError("out of memory")
            return closure() * (0 if what == "zero" else float("nan"))
        return closure() * (0 if what == "zero" else 1)

    before, method = model.weight.detach().clone(), PerInstance(model, 0.05)
    if what == "raises":
        with pytest.raises(RuntimeError, match="out of memory"):
            method.backward(losses)
        assert model.weight.grad is None
    else:
        method.backward(losses)
    assert torch.equal(model.weight, before) and not method.checked & PROVEN
    method.backward(closure)
    assert method.checked & PROVEN and not method.singly


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, hidden_states):
        return hidden_states + torch.tanh(self.linear(hidden_states))


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.ModuleList([Layer() for _ in range(3)])
        self.o = nn.Linear(4, 3)

    def forward(self, x):
        for layer in self.layer:
            x = layer(x)
        return self.o(x)


def test_a_layers_own_forward_is_there_after_probes_of_the_layers_above():
    model = Encoder().double()
    patched = types.MethodType(lambda self, h: h + 2 * torch.tanh(self.linear(h)), model.layer[0])
    model.layer[0].forward = patched
    closure = Alone(model, *data(8, 4))
    before = closure().detach()
    method = DeltaSAM(model, 0.05, "probe", layers=1)
    for _ in range(2):
        method.backward(closure)
    assert not method.notes and vars(model.layer[0])["forward"] is patched
    assert torch.equal(closure().detach(), before) and "forward" not in vars(model.layer[1])


@pytest.mark.filterwarnings("ignore:.* and so the compiled model runs uncompiled")
@pytest.mark.parametrize("name", ["sam", "per_instance", "delta_sam-top"])
def test_a_model_whose_layers_were_compiled_one_by_one_gets_each_methods_gradient(name):
    model, itself, rows = encoders.model("bert").eval(), encoders.model("bert").eval(), encoders.batch(5, 9)
    stack = model.bert.encoder.layer
    for k, layer in enumerate(stack):
        stack[k] = torch.compile(layer, backend="eager")
    expected = FORMULAS[name](Examples(itself, rows))
    clean = ExampleLosses(model, rows)().detach()
    method = method_of(name, model)
    method.backward(ExampleLosses(model, rows))
    found = torch.cat(
        [torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in model.parameters()]
    )
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-9)
    assert torch.equal(ExampleLosses(model, rows)().detach(), clean)


def test_a_scaler_that_is_not_enabled_leaves_the_check_for_finite_numbers_on():
    model = nn.Linear(3, 2)
    x, y = data(4, 3, dtype=torch.float32, classes=2)
    x[0] = float("inf")
    with pytest.raises(NonFiniteGradient):
        SAM(model, 0.05).backward(Alone(model, x, y), scaler=torch.amp.GradScaler("cpu", enabled=False))
    assert model.weight.grad is None
    method = SAM(model, 0.05)
    method.backward(
        Alone(model, *data(4, 3, dtype=torch.float32, classes=2)), scaler=torch.amp.GradScaler("cpu", enabled=False)
    )
    assert "gradient_norm" in method.report


class Pooled(nn.Module):
    """The mean over 128 tokens, whose gradients in float16 soon are nothing."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.o = nn.Linear(16, 64), nn.Linear(64, 64), nn.Linear(64, 2)

    def forward(self, x):
        return 1e-3 * self.o(F.gelu(self.b(F.gelu(self.a(x)))).mean(1))


@pytest.mark.filterwarnings("ignore:.* one example at a time")
@pytest.mark.parametrize(
    "name", ["sam", "probe", "gap", "exact_curvature", "per_instance", "per_instance, singly", "per_instance, body"]
)
def test_an_ascent_in_float16_does_not_underflow_where_there_is_a_scaler(name):
    """Beside the same method in float32, whose descent is taken where the ascent points."""
    torch.manual_seed(0)
    model = Pooled()
    model.o.requires_grad_(not name.endswith("body"))  # whose gradients do not underflow
    x, y = data(32, 128, 16, dtype=torch.float32, classes=2)

    def found(dtype, scaler):
        torch.manual_seed(0)
        if name.startswith("per_instance"):
            method = PerInstance(model, 2.0)
            method.singly = name.endswith("singly")
        else:
            method = SAM(model, 2.0) if name == "sam" else DeltaSAM(model, 2.0, name)
        model.zero_grad()
        method.backward(Alone(model, x, y, dtype), scaler=scaler)
        assert not method.notes  # the fast way was proven, where that is taken
        scale = 1 if scaler is None else scaler.get_scale()
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad]) / scale, method.report

    exact, report = found(None, None)
    scaled, other = found(torch.float16, torch.amp.GradScaler("cpu", init_scale=2.0**13))
    assert (scaled - exact).norm() < 0.03 * exact.norm()
    for key in ("gradient_norm", "example_gradient_norm", "effective_sample_size"):
        if key in report and key in other:
            assert float(other[key]) == pytest.approx(float(report[key]), rel=0.03)
    if name == "sam":  # and without one it does
        _, ascent = Step(SAM(model, 2.0), Alone(model, x, y, torch.float16)).gradient(ascent=True)
        assert not ascent[0].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_norm_of_half_precision_gradients_is_not_rounded_or_infinite(dtype):
    many = [torch.ones(1000, dtype=dtype), torch.full((3,), 6e4, dtype=dtype)]
    expected = torch.cat(many).double().norm()
    assert float(total_norm(many)) == pytest.approx(float(expected), rel=1e-6)
    assert float(total_norm(many[:1])) == pytest.approx(1000**0.5, rel=1e-6)
