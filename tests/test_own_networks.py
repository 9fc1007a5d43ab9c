"""Methods on networks of one's own that are no encoders: what their layers may do, beside loops by hand."""

import warnings

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from dsam import ASAM, FSAM, GSAM, SAM, DeltaSAM, GroupSAM, LookSAM, PerInstance, Plain
from dsam.errors import Note
from dsam.methods.per_example import PerExampleGradients, Unsupported
from dsam.methods.weighting import Curvature


@pytest.fixture
def data():
    torch.manual_seed(0)
    return torch.randn(6, 4, dtype=torch.double), torch.randint(0, 3, (6,))


def network(last=3):
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, last)).double()


def losses(model, x, y):
    return F.cross_entropy(model(x), y, reduction="none")


def gradients(model):
    return [None if p.grad is None else p.grad.clone() for p in model.parameters()]


def test_two_sparse_tables_that_are_added_are_unscaled_once_each():
    """Their gradients come with one set of values, which a scaler's division met twice."""
    torch.manual_seed(0)
    words, places, head = nn.Embedding(7, 4, sparse=True), nn.Embedding(5, 4, sparse=True), nn.Linear(4, 3)
    model = nn.ModuleList([words, places, head])
    ids, at, y = torch.randint(0, 7, (6, 5)), torch.arange(5).expand(6, 5), torch.randint(0, 3, (6,))

    def run():
        return F.cross_entropy(head((words(ids) + places(at)).mean(1)), y, reduction="none")

    Plain(model).backward(run)
    expected = [g.to_dense() for g in gradients(model)]
    model.zero_grad()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    Plain(model).backward(run, scaler=scaler)
    for g, e in zip(gradients(model), expected, strict=True):
        torch.testing.assert_close(g.to_dense() / 1024, e)


@pytest.mark.parametrize("change", ["a layer", "a parametrization"])
def test_a_network_with_other_parameters_than_before_is_refused(data, change):
    model = network()
    method = SAM(model)
    method.backward(lambda: losses(model, *data))
    if change == "a layer":
        model[2] = nn.Linear(5, 3).double()
    else:
        nn.utils.parametrizations.weight_norm(model[2])
    with pytest.raises(ValueError, match="other parameters than when the method was made.*make it anew"):
        method.backward(lambda: losses(model, *data))


class Clipped(nn.Module):
    def __init__(self):
        super().__init__()
        self.words, self.head = nn.Embedding(9, 4, max_norm=1.0).double(), nn.Linear(4, 3).double()

    def forward(self, ids):
        return self.head(self.words(ids).mean(1).tanh())


def test_rows_that_are_clipped_where_they_are_looked_up_are_perturbed_first():
    torch.manual_seed(0)
    model, ids, y = Clipped(), torch.randint(0, 9, (5, 3)), torch.randint(0, 3, (5,))
    model(torch.arange(9)[:, None])  # clips all rows once
    found = []
    for method in (PerInstance(model, rho=0.5), GroupSAM(model, rho=0.5, m=1)):
        model.zero_grad()
        method.backward(lambda subset=None: losses(model, ids if subset is None else ids[subset],
                                                   y if subset is None else y[subset]))  # fmt: skip
        found.append(gradients(model))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


def test_batch_norm_without_statistics_of_its_own_takes_the_batchs_in_evaluation_mode_too():
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5, track_running_stats=False), nn.Linear(5, 3)).eval()
    with pytest.raises(ValueError, match="'1'.*depend on the batch's others"):
        PerInstance(model)


class Averaging(nn.Module):
    """Counts its passes and averages what it sees, in buffers that it puts others in the place of."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 3).double()
        self.register_buffer("seen", torch.zeros(4, dtype=torch.double))
        self.register_buffer("passes", torch.zeros(()))

    def forward(self, x):
        self.seen = 0.9 * self.seen + 0.1 * (x + self.layer.weight.sum()).mean(0).detach()
        self.passes = self.passes + 1
        return self.layer(x)


@pytest.mark.parametrize("make", [SAM, DeltaSAM, lambda m: GroupSAM(m, m=2)], ids=["sam", "delta_sam", "m_sam"])
def test_buffers_that_are_replaced_are_those_of_one_clean_pass(data, make):
    plain, model = Averaging(), Averaging()
    model.load_state_dict(plain.state_dict())
    plain(data[0])
    method = make(model)
    method.backward(lambda: losses(model, *data))
    torch.testing.assert_close(model.passes, plain.passes)
    torch.testing.assert_close(model.seen, plain.seen)


def test_batch_norm_that_trains_in_a_model_that_does_not_is_moved_once(data):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 3)).double().eval()
    model[1].train()
    SAM(model).backward(lambda: losses(model, *data))
    assert model[1].num_batches_tracked == 1


def test_a_reused_part_is_there_with_bfloat16_weights():
    """100 eps of bfloat16 are 0.78 of the gradient's norm, which no component across it has."""
    model = network().to(torch.bfloat16)
    torch.manual_seed(0)
    x, y = torch.randn(6, 4, dtype=torch.bfloat16), torch.randint(0, 3, (6,))
    method = LookSAM(model, rho=0.5, k=2)
    method.backward(lambda: losses(model, x, y))
    assert any(g is not None and g.abs().sum() > 0 for g in method.reused)


class SetsItselfUp(nn.Module):
    """ActNorm: takes its scale from the first batch that it sees."""

    def __init__(self):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(4)), nn.Parameter(torch.zeros(4))
        self.done = False

    def forward(self, x):
        if not self.done:
            self.weight.data.copy_(1 / x.reshape(-1, 4).std(0))
            self.done = True
        return x * self.weight + self.bias


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x):
        return x + F.dropout(self.inner(x).tanh(), 0.1, self.training)


class Dropping(nn.Module):
    """LayerDrop: each layer is left out of a pass by a draw of PyTorch's generator."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.layers = nn.ModuleList([Block() for _ in range(6)]).double()
        self.head = nn.Linear(4, 3).double()

    def forward(self, x):
        for layer in self.layers:
            if not self.training or torch.rand(()) > 0.15:
                x = layer(x)
        return self.head(x)


@pytest.mark.parametrize("seed", range(8))
def test_probes_of_top_layers_see_the_layers_that_the_pass_has(data, seed):
    """At a radius of 1e-6 a probe moves a loss by about as much, another choice of layers by a thousand times that."""
    model, moved = Dropping(), []
    method = DeltaSAM(model, layers=2, radius=1e-6)

    class Watching(type(method.weighting)):
        def __call__(self, losses, probe):
            moved.append(float((probe.plus - losses).abs().max()))
            return super().__call__(losses, probe)

    method.weighting.__class__ = Watching
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Note)
        for _ in range(16):
            method.backward(lambda: losses(model, *data))
    assert len(moved) >= 16 and max(moved) < 1e-4


def test_making_a_method_shows_a_layer_no_batch():
    model = nn.Sequential(SetsItselfUp(), nn.Linear(4, 3))
    PerInstance(model)
    assert not model[0].done and (model[0].weight == 1).all()


def test_options_beside_a_weighting_that_is_made_are_refused():
    with pytest.raises(TypeError, match="probes, flor: a weighting that is made already"):
        DeltaSAM(network(), weighting=Curvature(), probes=5, flor=3)


def test_options_of_a_probe_that_a_weighting_does_not_make_are_said():
    with pytest.warns(UserWarning, match="weighting Confidence probes nothing: probes=3, layers=2 has no effect"):
        DeltaSAM(network(), weighting="confidence", probes=3, layers=2, power=0.5)
    assert DeltaSAM(network(), weighting="confidence", power=0.5).notes == []
    assert not any("probes nothing" in note for note in DeltaSAM(network(), probes=3, radius=0.3).notes)


def test_a_matrix_of_one_row_that_a_weight_is_made_of_is_no_bare_parameter(data):
    x, y = data[0], torch.rand(6, dtype=torch.double)
    model = network(last=1)
    nn.utils.parametrizations.weight_norm(model[2])

    def each(subset=slice(None)):
        return (model(x[subset]).squeeze(-1) - y[subset]).square()

    found = []
    for method in (PerInstance(model, rho=0.1), GroupSAM(model, rho=0.1, m=1)):
        model.zero_grad()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Note)
            method.backward(lambda subset=slice(None): each(subset))
        found.append(gradients(model))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


def test_asam_without_a_weight_to_scale_is_sam():
    class Biases(nn.Module):
        def __init__(self):
            super().__init__()
            self.shift = nn.Parameter(torch.tensor([0.3, -0.2, 0.5], dtype=torch.double))

        def forward(self, x):
            return x[:, :3] + self.shift

    torch.manual_seed(0)
    x, y, found = torch.randn(6, 4, dtype=torch.double), torch.randint(0, 3, (6,)), []
    for kind in (SAM, ASAM):
        model = Biases()
        kind(model, rho=0.1).backward(lambda model=model: losses(model, x, y))
        found.append(model.shift.grad)
    torch.testing.assert_close(*found)


def test_complex_weights_of_gsam_are_those_of_their_real_and_imaginary_parts():
    """The same network written with pairs of real numbers has the same step."""
    torch.manual_seed(0)
    start, x, y = torch.randn(3, 2, dtype=torch.double), torch.randn(8, 3, dtype=torch.double), torch.rand(8).double()
    whole = nn.ParameterList([nn.Parameter(torch.view_as_complex(start.clone()))])
    parts = nn.ParameterList([nn.Parameter(start.clone())])

    def of_whole():
        return ((x.to(torch.cdouble) @ whole[0]).abs() - y).square()

    def of_parts():
        return ((x @ parts[0]).square().sum(1).sqrt() - y).square()

    GSAM(whole, rho=0.1, alpha=0.4).backward(of_whole)
    GSAM(parts, rho=0.1, alpha=0.4).backward(of_parts)
    torch.testing.assert_close(torch.view_as_real(whole[0].grad), parts[0].grad)


def test_tables_that_share_a_weight_and_not_its_padding():
    torch.manual_seed(0)
    first, second, head = nn.Embedding(7, 4, padding_idx=0), nn.Embedding(7, 4), nn.Linear(4, 3)
    second.weight = first.weight
    nn.init.normal_(first.weight)  # padding_idx makes a row of zeros, which nothing would tell from its absence
    model = nn.ModuleList([first, second, head]).double()
    ids, y = torch.tensor([[0, 2, 3], [4, 0, 1], [5, 6, 0]]), torch.tensor([0, 2, 1])

    def each(subset=slice(None)):
        hidden = first(ids[subset]).mean(1) + second(ids[subset]).square().mean(1)
        return F.cross_entropy(head(hidden.tanh()), y[subset], reduction="none")

    found = []
    for method in (PerInstance(model, rho=0.2), GroupSAM(model, rho=0.2, m=1)):
        model.zero_grad()
        method.checked.update({"gradients", "square"})  # as after a first step that had no padding
        method.backward(lambda subset=slice(None): each(subset))
        found.append(gradients(model))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


def test_closures_that_run_no_model_are_named(data):
    model = network()

    def without_graph():
        with torch.no_grad():
            return losses(model, *data)

    for method in (SAM(model), GroupSAM(model, m=2)):
        with pytest.raises(ValueError, match="losses have no graph.*no_grad"):
            method.backward(without_graph)
    once = losses(model, *data)
    with pytest.raises(ValueError, match="a graph that an earlier pass has used.*run the model itself"):
        SAM(model).backward(lambda: once)
    features = model[:2](data[0])
    with pytest.raises(ValueError, match="take no losses or features from outside"):
        SAM(model).backward(lambda: F.cross_entropy(model[2](features), data[1], reduction="none"))
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("change", ["a hook", "a forward of its own"])
def test_what_a_user_puts_onto_a_layer_is_no_part_of_it(data, change):
    """A tap behind a hook that halves the output would halve what the formulas take for the layer's gradient."""
    model = network()
    if change == "a hook":
        model[0].register_forward_hook(lambda module, args, output: output * 0.5)
    else:
        kept = torch.rand(5, 4, generator=torch.Generator().manual_seed(0)) > 0.5
        model[0].forward = lambda x: F.linear(x, model[0].weight * kept, model[0].bias)
    x, y = data
    each = [torch.autograd.grad(losses(model, x[[k]], y[[k]]).sum(), model.parameters()) for k in range(len(x))]
    expected = torch.stack([torch.cat([g.flatten() for g in of]).norm() for of in each])
    method = PerInstance(model, 0.3)
    assert method.singly == bool(method.notes) == (change != "a hook")
    if change == "a hook":
        found = PerExampleGradients(model)
        with found.record():
            there = losses(model, x, y)
        found.backward(there)
        torch.testing.assert_close(found.squared_norms().sqrt(), expected)
    else:
        with pytest.raises(Unsupported, match="'0'"):
            PerExampleGradients(model)

    def run(subset=slice(None)):
        return losses(model, x[subset], y[subset])

    found = []
    for one in (method, GroupSAM(model, 0.3, m=1)):
        model.zero_grad()
        one.backward(run)
        found.append(gradients(model))
    assert method.singly == (change != "a hook")
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x):
        return x + torch.tanh(self.inner(x))


class Dropped(nn.Module):
    """A stack of which a pass may leave a layer out, as LayerDrop does."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList([Residual() for _ in range(4)])
        self.head, self.without = nn.Linear(4, 3), None
        self.double()

    def forward(self, x):
        for k, layer in enumerate(self.layers):
            if k != self.without:
                x = layer(x)
        return self.head(x)


def test_what_was_given_up_stays_so_after_a_restart(data):
    found, notes = [], []
    for resumed in (False, True):
        model = Dropped()
        method, optimizer = DeltaSAM(model, 0.5, layers=2), torch.optim.SGD(model.parameters(), 0.5)
        for step in range(4):
            model.without = 2 if step == 1 else None
            if step == 2 and resumed:
                state, method = method.state_dict(), DeltaSAM(model, 0.5, layers=2)
                method.load_state_dict(state)
            method.backward(lambda model=model: losses(model, *data))
            optimizer.step()
            optimizer.zero_grad()
        found.append([p.detach().clone() for p in model.parameters()])
        notes.append(method.notes)
    assert "leave layers out" in notes[0][0] and notes[1] == notes[0]
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_a_hook_on_a_layer_below_the_top_is_run_once_on_the_way_to_it(data):
    model = Dropped()
    model.layers[1].register_forward_hook(lambda module, args, output: output * 0.5)
    method = DeltaSAM(model, 0.5, layers=2)
    for _ in range(2):
        method.backward(lambda: losses(model, *data))
    assert not method.notes


def test_several_processes_without_distributed_are_told(data, monkeypatch):
    """`autograd.grad` calls none of DistributedDataParallel's hooks: ranks would part in silence."""
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda group=None: 2)
    model = network()
    with pytest.warns(Note, match="2 processes train, and this gradient is of this one's batch alone: Distributed"):
        SAM(model).backward(lambda: losses(model, *data))
    wrapped = nn.Sequential(model)
    wrapped[0].__class__ = type("Wrapped", (DistributedDataParallel,), {"forward": nn.Sequential.forward})
    with pytest.raises(ValueError, match="reduces nothing: give the method the network within"):
        FSAM(wrapped).backward(lambda: losses(wrapped, *data))
