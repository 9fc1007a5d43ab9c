"""What was once taken for something else without a word: each against another way to the same number."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import BertConfig, BertForSequenceClassification

from dsam import SAM, DeltaSAM, ExampleLosses, PerInstance, Plain
from dsam.methods import FSAM, METHODS

X, Y = torch.randn(8, 4, generator=torch.Generator().manual_seed(0)).double(), torch.arange(8) % 2
GroupSAM = METHODS["m_sam"]


def gradients(net, method, losses):
    net.zero_grad()
    method.backward(losses)
    return [p.grad.clone() for p in net.parameters() if p.requires_grad]


class ScoringVector(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.tensor([[0.4, -0.3, 0.2, 0.6]]).double())

    def forward(self, x):
        return F.linear(x, self.w).squeeze(-1)


class Temperature(ScoringVector):
    def __init__(self):
        super().__init__()
        self.t = nn.Parameter(torch.ones(1, 1).double())

    def forward(self, x):
        assert self.t > 0.01  # of one number, and not of one for each example
        return super().forward(x) * self.t.squeeze()


class Unpacked(ScoringVector):
    def __init__(self):
        super().__init__()
        self.b = nn.Parameter(torch.full((1, 1), 0.1).double())

    def forward(self, x):
        (b,) = self.b
        return super().forward(x) + b


def normed_head():
    """Whose weight is made of two parameters outside of any layer that a hook sees."""
    torch.manual_seed(0)
    head = nn.Linear(6, 1, bias=False)
    net = nn.Sequential(nn.Linear(4, 6).requires_grad_(False), nn.Tanh(), head, nn.Flatten(0)).double()
    with pytest.warns(FutureWarning):
        nn.utils.weight_norm(head)
    return net


@pytest.mark.parametrize("make", [normed_head, ScoringVector, Temperature, Unpacked])
@pytest.mark.parametrize("loss", [F.mse_loss, F.binary_cross_entropy_with_logits])
def test_parameters_outside_of_layers_go_one_example_at_a_time(make, loss):
    net = make()

    def losses():
        return loss(net(X), Y.double(), reduction="none")

    method = PerInstance(net, 0.1)
    found = gradients(net, method, losses)
    for own, alone in zip(found, gradients(net, GroupSAM(net, 0.1, m=1), losses), strict=True):
        torch.testing.assert_close(own, alone)
    plain = gradients(net, Plain(net), losses)
    assert max(float((a - b).abs().max()) for a, b in zip(found, plain, strict=True)) > 1e-4


class Weighted(ExampleLosses):
    def __call__(self):
        logits = self.model(**self.inputs).logits
        self.logits = logits.detach()
        return F.cross_entropy(logits, self.labels, torch.tensor([1.0, 10.0]), reduction="none")


def tiny(seed=0):
    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return BertForSequenceClassification(BertConfig(vocab_size=40, max_position_embeddings=12, **sizes, **dropout))


IDS = torch.randint(1, 40, (8, 10), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("weighting", ["gauss_newton", "confidence"])
def test_weightings_that_are_of_cross_entropy_do_not_take_another_loss_for_it(weighting):
    net, batch = tiny(), {"input_ids": IDS, "labels": Y}
    DeltaSAM(net, 0.05, weighting=weighting).backward(ExampleLosses(net, batch))
    with pytest.raises(ValueError, match="is of cross-entropy .* and the closure's losses are others"):
        DeltaSAM(net, 0.05, weighting=weighting).backward(Weighted(net, batch))
    DeltaSAM(net, 0.05, weighting="gibbs").backward(Weighted(net, batch))


@pytest.mark.parametrize("name", ["r3f", "smart"])
def test_noise_below_half_precision_is_said(name):
    net, batch = tiny(), {"input_ids": IDS, "labels": Y}
    for autocast, options, said in ((None, {}, 0), (torch.bfloat16, {"sigma": 1e-2}, 0), (torch.bfloat16, {}, 1)):
        method = METHODS[name](net, **options)
        for _ in range(2):
            method.backward(ExampleLosses(net, batch, autocast))
        assert len(method.notes) == said and all("half precision" in note for note in method.notes)


class SecondText(ExampleLosses):
    """Only the words of a second text count."""

    def __call__(self):
        logits = self.model(input_ids=self.inputs["input_ids_2"]).logits
        self.logits = logits.detach()
        return F.cross_entropy(logits, self.labels, reduction="none")


def test_probes_reach_the_words_of_every_input():
    net = tiny()
    for name, p in net.named_parameters():
        p.requires_grad_("word_embeddings" in name)
    closure = SecondText(net, {"input_ids": torch.zeros_like(IDS), "input_ids_2": IDS, "labels": Y})
    method = DeltaSAM(net, 0.05, layers=None)
    method.backward(closure)
    assert method.report["effective_sample_size"] < 7.9  # 8 where no probe changes any loss


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(8, 8)

    def forward(self, hidden):
        return hidden + self.a(hidden).tanh()


class LastStates(nn.Module):
    """A head on the last four hidden states, of which a pass from the top two layers on has two."""

    def __init__(self, states, zero):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(Block() for _ in range(6))
        self.head, self.states = nn.Linear(8 * states, 2), states
        if zero:
            nn.init.zeros_(self.head.weight)

    def forward(self, x):
        found = [F.pad(x, (0, 4))]
        for layer in self.layers:
            found.append(layer(found[-1]))
        return self.head(torch.cat(found[-self.states :], -1))


@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize("states, fits", [(1, True), (2, True), (4, False)])
def test_top_layers_are_proven_also_below_a_head_that_starts_at_0(states, fits, zero):
    net = LastStates(states, zero)
    method, optimizer = DeltaSAM(net, 0.05, weighting="probe", layers=2), torch.optim.SGD(net.parameters(), lr=0.02)
    for _ in range(3):
        method.backward(lambda: F.cross_entropy(net(X.float()), Y, reduction="none"))
        optimizer.step()
        optimizer.zero_grad()
    assert (method._top is not None) == fits == (not method.notes)


class Island(nn.Module):
    """A layer that the model itself keeps in float32."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(64, 64), nn.Linear(64, 2)

    def forward(self, x):
        x = self.a(x).tanh()
        with torch.autocast("cpu", enabled=False):
            return self.b(x.float())


@pytest.mark.parametrize("method", [Plain, lambda net: SAM(net, 0.0)])
def test_the_caller_s_autocast_is_not_that_of_the_backward_passes(method):
    net, x = Island(), torch.randn(8, 64, generator=torch.Generator().manual_seed(2))

    def losses():
        return F.cross_entropy(net(x), Y, reduction="none")

    with torch.autocast("cpu", torch.bfloat16):
        own = losses().mean()
    own.backward()  # as PyTorch asks for
    expected = [p.grad.clone() for p in net.parameters()]
    with torch.autocast("cpu", torch.bfloat16):
        found = gradients(net, method(net), losses)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("weighting", ["gap", "relative_gap", "equalised"])
def test_products_of_single_examples_gradients_are_in_their_own_precision(weighting):
    net = ScoringVector().float()
    x = X.float()

    def losses():
        with torch.autocast("cpu", enabled=False):
            return F.mse_loss(net(x), Y.float(), reduction="none")

    expected = gradients(net, DeltaSAM(net, 0.5, weighting=weighting), losses)
    with torch.autocast("cpu", torch.bfloat16):
        method = DeltaSAM(net, 0.5, weighting=weighting)
        found = gradients(net, method, losses)
    assert method.notes  # one at a time
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)


def test_f_sam_does_not_climb_along_rounding():
    """Where the batch's gradient is the average of those before there is nothing left to leave in."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2)).double()
    method = FSAM(net, 0.1)

    def losses(part=slice(None)):
        return F.cross_entropy(net(X[part]), Y[part], reduction="none")

    plain = gradients(net, Plain(net), losses)
    sam = gradients(net, SAM(net, 0.1), losses)
    torch.testing.assert_close(gradients(net, method, losses), sam)
    cut = [lambda: losses(slice(0, 3)), lambda: losses(slice(3, 8))]
    torch.testing.assert_close(gradients(net, method, cut), plain)


def test_a_hook_that_waits_for_an_accumulated_gradient_is_refused():
    net = nn.Linear(4, 2).double()
    hook = net.weight.register_post_accumulate_grad_hook(lambda p: None)
    method = SAM(net, 0.1)
    with pytest.raises(ValueError, match="register_post_accumulate_grad_hook"):
        method.backward(lambda: F.cross_entropy(net(X), Y, reduction="none"))
    hook.remove()
    method.backward(lambda: F.cross_entropy(net(X), Y, reduction="none"))
