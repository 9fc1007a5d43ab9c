"""Models of images: convolutions, GroupNorm and bare parameters against passes over single examples, in float64."""

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from test_per_example import assert_equals_single_passes, assert_near, flat, single_gradients
from torch import nn
from torch.nn import functional as F
from transformers import ViTConfig, ViTForImageClassification

from dsam import DeltaSAM
from dsam.methods import PerInstance, per_example
from dsam.methods.factors import joined
from dsam.methods.per_example import PerExampleGradients, Unsupported

RHO = 0.3
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")


class Block(nn.Module):
    """Two 3 × 3 convolutions beside a shortcut, in-place as in torchvision's ResNet."""

    def __init__(self, before, after, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(before, after, 3, stride, padding=1, bias=False)
        self.norm1 = nn.GroupNorm(2, after)
        self.conv2 = nn.Conv2d(after, after, 3, padding=1, bias=False)
        self.norm2 = nn.GroupNorm(2, after)
        self.shortcut = nn.Identity()
        if stride > 1:
            self.shortcut = nn.Sequential(nn.Conv2d(before, after, 1, stride, bias=False), nn.GroupNorm(2, after))

    def forward(self, x):
        out = F.relu_(self.norm1(self.conv1(x)))
        out = self.norm2(self.conv2(out))
        out += self.shortcut(x)
        return F.relu_(out)


def resnet(width=6):
    """Two stages, the second at half the size."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, width, 3, padding=1),
        nn.GroupNorm(3, width),
        nn.ReLU(inplace=True),
        Block(width, width, 1),
        Block(width, 2 * width, 2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(2 * width, 3),
    )
    return shaken(model)


def shaken(model):
    """In float64, and no vector of weights is constant."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for p in model.double().parameters():
            if p.dim() == 1:
                p += 0.3 * torch.randn(p.shape, generator=generator, dtype=p.dtype)
    return model


def vit(**changes):
    torch.manual_seed(0)
    small = dict(image_size=8, patch_size=4, hidden_size=8, num_hidden_layers=2, num_attention_heads=2)
    small |= dict(intermediate_size=12, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    return shaken(ViTForImageClassification(ViTConfig(**small | changes, initializer_range=0.3, num_labels=3)))


def images(size=8, batch=4, channels=3):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch, channels, size, size, generator=generator, dtype=torch.float64)
    return x, torch.arange(batch) % 3


def losses_of(model):
    def run(x, labels):
        out = model(x)
        return F.cross_entropy(getattr(out, "logits", out), labels, reduction="none")

    return run


MODELS = {"resnet": resnet, "vit": vit}


@pytest.fixture(params=["few", "many", "as it is"])
def positions(request, monkeypatch):
    """Few: convolutions are linear layers over patches. Many: each example's gradient is formed."""
    if request.param != "as it is":
        kinds = (nn.Linear, nn.Conv1d, nn.Conv2d) if request.param == "few" else nn.Linear
        choice = lambda module, grad: isinstance(module, kinds) and getattr(module, "groups", 1) == 1  # noqa: E731
        monkeypatch.setattr(per_example, "few_tokens", choice)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("batch", [1, 4])
def test_every_quantity(name, batch, positions):
    model = MODELS[name]()
    assert_equals_single_passes(model, losses_of(model), images(batch=batch), 1e-9)


def test_checkpointing_without_reentry():
    model = vit().train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert_equals_single_passes(model, losses_of(model), images(), 1e-9)


@pytest.mark.parametrize("name", MODELS)
def test_channels_last_and_only_some_parameters(name, positions):
    model = MODELS[name]().to(memory_format=torch.channels_last)
    x, labels = images()
    params = [p for i, p in enumerate(model.parameters()) if i % 3]
    batch = x.contiguous(memory_format=torch.channels_last), labels
    assert_equals_single_passes(model, losses_of(model), batch, 1e-9, params)


def single_sam_gradients(model, batch):
    """The mean of ∇ℓ_i(w + ρ g_i/‖g_i‖), by autograd, one example after the other."""
    params, run = list(model.parameters()), losses_of(model)
    total = [torch.zeros_like(p) for p in params]
    for i in range(len(batch[1])):
        one = [part[i : i + 1] for part in batch]
        own = torch.autograd.grad(run(*one).sum(), params)
        norm = flat(own).norm()
        with torch.no_grad():
            for p, g in zip(params, own, strict=True):
                p += RHO * g / norm
        there = torch.autograd.grad(run(*one).sum(), params)
        with torch.no_grad():
            for p, g in zip(params, own, strict=True):
                p -= RHO * g / norm
        total = [t + g / len(batch[1]) for t, g in zip(total, there, strict=True)]
    return flat(total)


@pytest.mark.parametrize("name", MODELS)
def test_per_instance_is_the_mean_of_single_sam_gradients(name, positions):
    model, batch = MODELS[name](), images()
    method = PerInstance(model, RHO)
    method.backward(lambda: losses_of(model)(*batch))
    assert not method.notes
    assert_near(flat([p.grad for p in model.parameters()]), single_sam_gradients(model, batch), 1e-9)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("weighting", ["gap", "gauss_newton", "equalised", "exact_curvature"])
def test_exact_weightings_look_at_the_batch_at_once(name, weighting, positions):
    """The same as one example at a time."""
    found = []
    for singly in (False, True):
        model = MODELS[name]()
        x, labels = images()
        closure = Labelled(model, x, labels)
        method = DeltaSAM(model, RHO, weighting)
        assert not method.singly
        method.singly = singly
        method.backward(closure)
        found.append(flat([p.grad for p in model.parameters()]))
    assert_near(*found, 1e-6 if weighting == "exact_curvature" else 1e-9)


class Labelled:
    """A closure that keeps its logits, as `ExampleLosses` does."""

    def __init__(self, model, x, labels):
        self.model, self.x, self.labels = model, x, labels

    def __call__(self):
        out = self.model(self.x)
        logits = getattr(out, "logits", out)
        self.logits = logits.detach()
        return F.cross_entropy(logits, self.labels, reduction="none")

    def subset(self, indices):
        return Labelled(self.model, self.x[indices], self.labels[indices])

    def __len__(self):
        return len(self.labels)


def head(*layers, channels):
    """Layers, and a class for what their outputs come to."""
    torch.manual_seed(0)
    return shaken(nn.Sequential(*layers, nn.Tanh(), Mean(), nn.Linear(channels, 3)))


class Mean(nn.Module):
    def forward(self, x):
        return x.flatten(2).square().mean(2)


LAYERS = {
    "depthwise": lambda: nn.Conv2d(4, 4, 3, padding=1, groups=4),
    "depthwise of two each": lambda: nn.Conv2d(4, 8, 3, groups=4),
    "grouped": lambda: nn.Conv2d(4, 6, 3, stride=2, groups=2, bias=False),
    "dilated": lambda: nn.Conv2d(4, 3, (3, 2), padding=(2, 1), dilation=(2, 3)),
    "same": lambda: nn.Conv2d(4, 3, (3, 4), padding="same", dilation=(2, 1)),
    "valid": lambda: nn.Conv2d(4, 3, 2, padding="valid"),
    "reflected": lambda: nn.Conv2d(4, 3, 3, padding=1, padding_mode="reflect"),
    "circular": lambda: nn.Conv2d(4, 4, 3, padding=(1, 2), padding_mode="circular", groups=2),
    "one group": lambda: nn.GroupNorm(1, 4),
    "each its group": lambda: nn.GroupNorm(4, 4),
}


@pytest.mark.parametrize("name", LAYERS)
def test_one_layer(name, positions):
    layer = LAYERS[name]()
    model = head(layer, channels=layer.weight.shape[0])
    assert_equals_single_passes(model, losses_of(model), images(7, channels=4), 1e-9)


@pytest.mark.parametrize("groups", [1, 2])
def test_one_axis(groups, positions):
    conv = nn.Conv1d(4, 6, 3, stride=2, padding=2, dilation=2, groups=groups)
    model = head(conv, nn.GroupNorm(3, 6), channels=6)
    x, labels = images(7, channels=4)
    assert_equals_single_passes(model, losses_of(model), (x.flatten(2), labels), 1e-9)


def test_a_layer_used_twice_and_group_norm_without_positions(positions):
    """With 25 positions and with 4, of which 25 are many: 25 (4 + 36) > 4 · 36."""
    conv = nn.Conv2d(4, 4, 3, padding=1)
    model = head(conv, nn.GroupNorm(2, 4), nn.Tanh(), nn.MaxPool2d(2), conv, channels=4)
    model.insert(7, shaken(nn.GroupNorm(2, 4)))
    assert_equals_single_passes(model, losses_of(model), images(5, channels=4), 1e-9)


@pytest.mark.parametrize("sizes", [(2, 7), (7, 2)])
def test_pieces_of_two_sizes(sizes):
    """Of 4 positions the outer products are kept, of 49 the gradient is formed."""
    model = head(nn.Conv2d(4, 6, 3, padding=1), channels=6)
    pieces, rows = [], []
    for size in sizes:
        batch = images(size, 2, channels=4)
        pieces.append(PerExampleGradients(model))
        with pieces[-1].record():
            losses = losses_of(model)(*batch)
        pieces[-1].backward(losses)
        rows.append(single_gradients(list(model.parameters()), losses_of(model), batch))
    assert {len(piece._products) for piece in pieces} == {1, 2}
    both, g = joined(pieces), torch.cat(rows)
    assert_near(both.gram(), g @ g.T, 1e-9)
    assert_near(both.squared_norms_and_mean_dots()[1], g @ g.mean(0), 1e-9)
    assert_near(flat(both.weighted_gradient(torch.ones(4).double())), g.sum(0), 1e-9)
    assert_near(pieces[0].squared_norms(), rows[0].square().sum(1), 1e-9)  # left as they were


@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    kernel=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    stride=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    padding=st.one_of(st.sampled_from(["same", "valid"]), st.tuples(st.integers(0, 3), st.integers(0, 3))),
    dilation=st.tuples(st.integers(1, 2), st.integers(1, 3)),
    groups=st.sampled_from([1, 2, 4]),
    size=st.integers(4, 9),
)
def test_any_convolution(positions, kernel, stride, padding, dilation, groups, size):
    """Norms, a weighted sum, and the gradient where each example has moved by its own."""
    assume(padding != "same" or stride == (1, 1))
    around = (0, 0) if isinstance(padding, str) else padding
    fits = [size + 2 * p > d * (k - 1) for k, d, p in zip(kernel, dilation, around, strict=True)]
    assume(padding == "same" or all(fits))
    torch.manual_seed(0)
    conv = nn.Conv2d(4, 4, kernel, stride, padding, dilation, groups)
    model = head(conv, channels=4)
    batch, params = images(size, 3, channels=4), list(model.parameters())
    gradients = PerExampleGradients(model)
    with gradients.record():
        losses = losses_of(model)(*batch)
    gradients.backward(losses)
    weights = torch.tensor([0.2, -1.0, 0.7]).double()
    expected = single_gradients(params, losses_of(model), batch)
    assert_near(gradients.squared_norms(), expected.square().sum(1), 1e-9)
    assert_near(flat(gradients.weighted_gradient(weights)), weights @ expected, 1e-9)
    model.zero_grad()
    PerInstance(model, RHO).backward(lambda: losses_of(model)(*batch))
    assert_near(flat([p.grad for p in params]), single_sam_gradients(model, batch), 1e-9)


def test_batch_norm_in_training_mode_is_refused():
    model = resnet()
    model[1] = nn.BatchNorm2d(6).double()
    with pytest.raises(ValueError, match=r"'1' \(BatchNorm2d\) makes an example's loss depend on the batch's others"):
        PerInstance(model, RHO)
    model.eval()
    with pytest.warns(UserWarning, match=r"'1' \(BatchNorm2d\)"):
        assert PerInstance(model, RHO).singly  # there are no formulas for it, but there is a gradient of one example


class Scaled(nn.Module):
    """ConvNeXt's layer scale: which axis its parameter goes along cannot be told from its shape."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor([0.5, 1.5, -1.0]))

    def forward(self, x):
        return x * self.scale[:, None, None]


def test_other_bare_parameters_are_taken_one_example_at_a_time():
    model, batch = head(nn.Conv2d(3, 3, 3), Scaled(), channels=3), images()
    with pytest.warns(UserWarning, match="one example at a time"):
        method = PerInstance(model, RHO)
    assert "'1' (Scaled) owns parameters (scale)" in method.notes[0]
    method.backward(lambda: losses_of(model)(*batch))
    assert_near(flat([p.grad for p in model.parameters()]), single_sam_gradients(model, batch), 1e-9)


class Positions(nn.Module):
    """A bare parameter of leading dimension 1, used as `how` says."""

    def __init__(self, how, *shape):
        super().__init__()
        torch.manual_seed(0)
        self.positions, self.how = nn.Parameter(torch.randn(1, *shape)), how

    def forward(self, x):
        return self.how(x, self.positions)


APART = {
    "added": lambda x, p: x + p,
    "expanded": lambda x, p: torch.cat([p.expand(len(x), -1, -1), x], 2),
    "multiplied": lambda x, p: x * p.exp(),
    "cut": lambda x, p: x + p[:, :, :1] * p[:, :, 1:2],
    "squeezed": lambda x, p: x + p.squeeze(0),
}
TOGETHER = {
    "its first": (lambda x, p: x + p[0], (3, 5)),
    "its sum": (lambda x, p: x + p.sum(0), (3, 5)),
    "along channels": (lambda x, p: x + p, (5,)),  # as many channels as examples
    "reshaped": (lambda x, p: x + p.reshape(1, 3, 5), (3, 5)),
}


def of_positions(how, *shape):
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv1d(3, 3, 1), Positions(how, *shape), Mean(), nn.Linear(3, 3)).double()


@pytest.mark.parametrize("name", APART)
def test_a_bare_parameter_that_each_example_meets(name):
    model, (x, labels) = of_positions(APART[name], 3, 5), images(5, 3)
    assert_equals_single_passes(model, losses_of(model), (x[..., 0], labels), 1e-9)
    assert type(model[1].positions) is nn.Parameter


@pytest.mark.parametrize("name", TOGETHER)
def test_a_bare_parameter_that_examples_would_share_is_taken_one_example_at_a_time(name):
    model, (x, labels) = of_positions(TOGETHER[name][0], *TOGETHER[name][1]), images(5, 3)
    batch = x[..., 0], labels
    gradients = PerExampleGradients(model)
    with pytest.raises(Unsupported), gradients.record():
        gradients.backward(losses_of(model)(*batch))
    method = PerInstance(model, RHO)
    with pytest.warns(UserWarning, match="positions"):
        method.backward(lambda: losses_of(model)(*batch))
    assert type(model[1].positions) is nn.Parameter
    assert_near(flat([p.grad for p in model.parameters()]), single_sam_gradients(model, batch), 1e-9)


def test_bare_parameters_are_themselves_again_if_the_forward_raises():
    model = vit()
    with pytest.raises(Unsupported, match="doesn't match"), PerExampleGradients(model).record():
        model(images(size=12)[0])
    assert type(model.vit.embeddings.position_embeddings) is nn.Parameter
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    method = PerInstance(model, 0.05)  # which tells a mistake of the closure's from what it cannot look into
    with pytest.raises(ValueError, match="^Input image size"):
        method.backward(lambda: model(images(size=12)[0]).logits.square().sum(-1))
    assert not method.singly and not method.notes
