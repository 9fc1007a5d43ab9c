"""Closures as people write them: own losses, odd labels, autocast around, layers that a step does not reach."""

import functools
import types

import classifier
import encoders
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import BartConfig, BartForConditionalGeneration, BertConfig, BertForSequenceClassification

import dsam
from dsam import SAM, DeltaSAM, ExampleLosses, GroupSAM, PerInstance, Plain
from dsam.methods import WEIGHTINGS, smart

OUTPUT_METHODS = ("r3f", "rdrop", "freelb", "smart")


def network(outputs=2, dtype=torch.float64, **more):
    torch.manual_seed(0)
    shape = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = BertConfig(**shape, intermediate_size=32, max_position_embeddings=16, num_labels=outputs, **more)
    return BertForSequenceClassification(config).to(dtype).eval()


def ids(examples=4, tokens=6):
    return torch.randint(1, 50, (examples, tokens), generator=torch.Generator().manual_seed(1))


def flat(model):
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize("name", ["sam", *OUTPUT_METHODS])
def test_losses_of_another_shape_are_refused_by_every_method(name):
    """(B, 1) labels beside (B,) outputs would make (B, B) losses, and (B, C) ones a sum over classes."""

    class Several(ExampleLosses):
        def outputs(self, *given, **named):
            losses, logits = super().outputs(*given, **named)
            return losses[:, None].expand(-1, 2), logits

        def __call__(self):
            return self.outputs()[0]

    model = network(1)
    with pytest.raises(ValueError, match=r"labels have the shape \(4, 1\).*labels.flatten\(\)"):
        dsam.METHODS[name](model).backward(ExampleLosses(model, {"input_ids": ids(), "labels": torch.rand(4, 1)}))
    with pytest.raises(ValueError, match=r"per-example losses of shape \(B,\).*got shape \(4, 2\)"):
        dsam.METHODS[name](model).backward(Several(model, {"input_ids": ids(), "labels": torch.rand(4)}))
    assert all(p.grad is None for p in model.parameters())


def test_labels_that_are_no_classes_are_one_line_and_narrow_integers_are_classes():
    model = network()
    with pytest.raises(ValueError, match=r"2 outputs, classes, and the labels are torch.float32: pass labels.long\(\)"):
        Plain(model).backward(ExampleLosses(model, {"input_ids": ids(), "labels": torch.rand(4)}))
    labels = torch.tensor([0, 1, 1, 0])
    losses = [ExampleLosses(model, {"input_ids": ids(), "labels": labels.to(t)})() for t in (torch.int32, torch.bool)]
    for found in losses:
        assert torch.equal(found, ExampleLosses(model, {"input_ids": ids(), "labels": labels})())
    with pytest.raises(ValueError, match="the batch has no 'labels', only input_ids, label"):
        ExampleLosses(model, {"input_ids": ids(), "label": labels})
    with pytest.raises(TypeError, match="labels must be a tensor, got a list"):
        ExampleLosses(model, {"input_ids": ids(), "labels": labels.tolist()})


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_narrow_labels_weigh_as_wide_ones(weighting):
    model = network().eval()
    inputs, labels, found = ids(), torch.tensor([0, 1, 1, 0]), []
    for kind in (torch.int64, torch.int32):
        model.zero_grad()
        DeltaSAM(model, 0.1, weighting).backward(ExampleLosses(model, {"input_ids": inputs, "labels": labels.to(kind)}))
        found.append(flat(model))
    assert torch.equal(*found)


def test_what_of_a_batch_has_no_row_for_each_example_stays_in_its_parts():
    model = network()
    batch = {"input_ids": ids(), "labels": torch.tensor([0, 1, 1, 0]), "position_ids": torch.arange(6)[None]}
    batch["output_attentions"] = False
    for closure in (ExampleLosses(model, batch), ExampleLosses(model, batch).subset([0, 1, 2, 3])):
        GroupSAM(model, 0.1, m=2).backward(closure)
    found = flat(model)
    model.zero_grad()
    GroupSAM(model, 0.1, m=2).backward(ExampleLosses(model, {k: batch[k] for k in ("input_ids", "labels")}))
    torch.testing.assert_close(found, 2 * flat(model))


class Smooth(ExampleLosses):
    """Losses of its own, in a `__call__` alone."""

    def __call__(self):
        logits = self.model(**self.inputs).logits
        return 5 * F.cross_entropy(logits, self.labels, reduction="none", label_smoothing=0.3)


def test_a_closure_s_own_losses_are_those_of_its_parts_and_of_its_probes():
    model = network()
    closure = Smooth(model, {"input_ids": ids(), "labels": torch.tensor([0, 1, 1, 0])})
    whole = closure().detach()
    assert torch.equal(closure.in_float32().detach(), whole)
    torch.testing.assert_close(closure.subset([1, 3])(), whole[[1, 3]], rtol=1e-12, atol=1e-12)
    alone = GroupSAM(model, 0.1, m=2)
    loss = alone.backward(closure)
    torch.testing.assert_close(loss, whole.mean())
    grouped = flat(model)
    model.zero_grad()
    for half in ([0, 1], [2, 3]):
        SAM(model, 0.1).backward(lambda half=half: Smooth(model, {n: v[half] for n, v in batch_of(closure)})() / 2)
    torch.testing.assert_close(grouped, flat(model), rtol=1e-9, atol=1e-12)
    for name in OUTPUT_METHODS:
        with pytest.raises(ValueError, match="Smooth has losses of its own in __call__"):
            dsam.METHODS[name](model).backward(closure)


def test_a_call_may_take_the_base_class_s_outputs():
    class Outer(ExampleLosses):
        def __call__(self):
            _, logits = self.outputs()
            return F.cross_entropy(logits, self.labels, reduction="none", label_smoothing=0.1)

    model = network()
    SAM(model, 0.1).backward(Outer(model, {"input_ids": ids(), "labels": torch.tensor([0, 1, 1, 0])}))


def test_a_closure_that_keeps_more_of_each_example_is_asked_for_its_parts():
    """One example's loss times all four weights would be four losses."""

    class Weighted(ExampleLosses):
        weights = torch.tensor([0.1, 8.0, 0.1, 0.1], dtype=torch.float64)

        def __call__(self):
            return super().__call__() * self.weights

    model = network()
    closure = Weighted(model, {"input_ids": ids(), "labels": torch.tensor([0, 1, 1, 0])})
    with pytest.raises(ValueError, match=r"len\(\) is 1 .* returned 4 losses.* a subset\(indices\) of its"):
        GroupSAM(model, 0.1, m=1).backward(closure)


def test_outputs_without_a_second_dimension_are_a_regression_s():
    logits, labels = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([1.0, 0.0, 3.0])
    assert dsam.methods.example_losses(logits, labels).tolist() == [0.0, 4.0, 0.0]


def batch_of(closure):
    return [*closure.inputs.items(), ("labels", closure.labels)]


class TimeFirst(nn.Module):
    """Its head starts at 0, so that nothing below it has a gradient in the first step; inside, examples come second."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.words, self.mix, self.head = nn.Embedding(20, 16), nn.Linear(16, 16), nn.Linear(16, 2)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, tokens):
        mixed = self.mix(self.words(tokens).transpose(0, 1)).tanh().transpose(0, 1)
        return self.head(mixed.mean(1))


@pytest.mark.filterwarnings("ignore:per_instance runs one example")
def test_steps_that_overflow_prove_nothing():
    """Three of them, as a scale that begins high may give, before a first step whose gradients are 0 below the head."""
    model, generator = TimeFirst(), torch.Generator().manual_seed(1)
    method, scaler = PerInstance(model, 0.5), torch.amp.GradScaler("cpu", init_scale=2.0)
    for step in range(6):
        tokens, labels = (torch.randint(0, n, s, generator=generator) for n, s in ((20, (8, 8)), (2, (8,))))
        factor = torch.inf if step < 3 else 1.0
        method.backward(lambda t=tokens, y=labels, f=factor: f * F.cross_entropy(model(t), y, reduction="none"), scaler)
        with torch.no_grad():
            for p in model.parameters():
                if step >= 3:
                    p -= p.grad / scaler.get_scale()
        model.zero_grad()
    assert method.singly


@pytest.mark.filterwarnings("ignore:per_instance runs one example")
def test_gradients_that_are_0_in_the_first_step_are_proven_in_the_next():
    """As many tokens as examples, where shapes do not tell the two apart."""
    model, generator = TimeFirst().double(), torch.Generator().manual_seed(1)
    method = PerInstance(model, 0.5)
    for _ in range(4):
        tokens, labels = (torch.randint(0, n, s, generator=generator) for n, s in ((20, (8, 8)), (2, (8,))))
        found = []
        for one in (method, GroupSAM(model, 0.5, m=1)):
            model.zero_grad()
            one.backward(lambda t=tokens, y=labels: F.cross_entropy(model(t), y, reduction="none"))
            found.append(flat(model))
        torch.testing.assert_close(*found, rtol=1e-9, atol=1e-12)
        with torch.no_grad():
            for p in model.parameters():
                p -= p.grad
    assert method.singly


def test_proving_ends_where_a_layer_never_has_a_gradient():
    """After four steps, each of which took a pass more."""
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)).double()
    nn.init.constant_(model[0].bias, -100.0)  # dead
    x, y = torch.randn(5, 4, dtype=torch.float64), torch.tensor([0, 1, 1, 0, 1])
    calls = []

    def closure():
        calls.append(1)
        return F.cross_entropy(model(x), y, reduction="none")

    method = PerInstance(model, 0.1)
    counts = []
    for _ in range(6):
        calls.clear()
        method.backward(closure)
        counts.append(len(calls))
    assert counts == [3, 3, 3, 3, 2, 2] and not method.singly


class Heads(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body, self.heads = nn.Linear(4, 8), nn.ModuleList([nn.Linear(8, 2), nn.Linear(8, 2)])
        self.double()

    def losses(self, task, seed):
        g = torch.Generator().manual_seed(seed)
        x, y = torch.randn(6, 4, generator=g, dtype=torch.float64), torch.randint(0, 2, (6,), generator=g)
        return F.cross_entropy(self.heads[task](self.body(x).tanh()), y, reduction="none")


@pytest.mark.parametrize("name", ["looksam", "fsam", "msam", "gsam"])
def test_a_step_gives_no_gradient_to_what_its_loss_does_not_reach(name):
    model = Heads()
    method = dsam.METHODS[name](model, 0.1)
    for seed, task in enumerate((0, 1, 1, 0)):
        model.zero_grad()
        method.backward(functools.partial(model.losses, task, seed))
        assert all(p.grad is None for p in model.heads[1 - task].parameters()), seed


def test_fsam_s_average_of_a_layer_begins_with_its_first_gradient():
    """And neither begins nor fades in the steps that do not reach it."""
    model = Heads()
    method = dsam.METHODS["fsam"](model, 0.1)
    gradients = {}
    for seed, task in enumerate((0, 1, 0)):
        head = model.heads[task].weight
        gradients[seed] = torch.autograd.grad(model.losses(task, seed).mean(), head)[0]
        method.backward(functools.partial(model.losses, task, seed))
        averages = dict(zip(map(id, method.params), method.average, strict=True))
        if seed == 1:
            torch.testing.assert_close(averages[id(head)], gradients[1])
            torch.testing.assert_close(averages[id(model.heads[0].weight)], gradients[0])
    torch.testing.assert_close(averages[id(head)], 0.9 * gradients[0] + 0.1 * gradients[2])


def test_a_decoder_s_words_that_are_made_of_labels_are_asked_for():
    """BART without labels would read the encoder's words, and train another model."""
    torch.manual_seed(0)
    shape = {"d_model": 8, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 8, "decoder_ffn_dim": 8}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    model = BartForConditionalGeneration(BartConfig(vocab_size=50, max_position_embeddings=16, **shape, **heads)).eval()
    batch = {"input_ids": ids(), "labels": 50 - ids()}

    class Tokens(ExampleLosses):
        def __call__(self):
            return F.cross_entropy(self.model(**self.inputs).logits.mT, self.labels, reduction="none").mean(1)

    with pytest.raises(ValueError, match="BartForConditionalGeneration is called without labels, from which it makes"):
        Tokens(model, batch)
    words = model.prepare_decoder_input_ids_from_labels(batch["labels"])
    own = model(**batch).loss.detach()
    torch.testing.assert_close(Tokens(model, batch | {"decoder_input_ids": words})().mean().detach(), own)


def test_buffers_beside_the_method_s_module_are_one_pass_s_where_the_closure_says_what_it_runs():
    """A method of the head, batch norm in the body."""
    model, batch = classifier.Classifier(batch_norm=True).train(), classifier.batch()
    SAM(model.last, 0.5).backward(ExampleLosses(model, batch))
    assert model.statistics.num_batches_tracked == 1


def test_buffers_that_a_backward_pass_writes_stay_written():
    """As scales that follow the gradients' size do; only a forward that runs again there is undone."""

    class Scaled(nn.Linear):
        def __init__(self):
            super().__init__(4, 2)
            self.register_buffer("largest", torch.zeros(()))

        def forward(self, x):
            out = super().forward(x)
            out.register_hook(lambda g: (self.largest.copy_(g.abs().max()), None)[1])
            return out

    torch.manual_seed(0)
    model, x = Scaled(), torch.randn(6, 4)
    y = torch.tensor([0, 1, 1, 0, 1, 0])
    F.cross_entropy(model(x), y).backward()
    once = model.largest.clone()
    for name in ("plain", "sam"):
        model.zero_grad()
        nn.init.zeros_(model.largest)
        dsam.METHODS[name](model, *([1e-6] if name == "sam" else [])).backward(
            lambda: F.cross_entropy(model(x), y, reduction="none")
        )
        torch.testing.assert_close(model.largest, once)


@pytest.mark.parametrize("name", ["plain", "sam", "gsam", "delta_sam"])
def test_statistics_inside_a_checkpointed_layer_move_once_a_step_and_at_w(name):
    """Though that layer runs once more in each backward pass."""
    torch.manual_seed(0)
    inner, head = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)), nn.Linear(4, 2)
    model = nn.ModuleList([inner, head]).double()
    x, y = torch.randn(6, 4, dtype=torch.float64), torch.tensor([0, 1, 1, 0, 1, 0])
    mean = inner[0](x).mean(0).detach()
    dsam.METHODS[name](model).backward(
        lambda: F.cross_entropy(head(checkpoint(inner, x, use_reentrant=False)), y, reduction="none")
    )
    assert inner[1].num_batches_tracked == 1
    torch.testing.assert_close(inner[1].running_mean, 0.1 * mean)


@pytest.mark.parametrize("weighting", ["probe", "curvature"])
def test_probes_under_a_caller_s_autocast_are_in_float32(weighting):
    """As Lightning's bf16-mixed has it around a whole training step."""
    model = network(dtype=torch.float32)
    seen, labels = [], torch.tensor([0, 1, 1, 0])

    def closure():
        logits = model(input_ids=ids()).logits
        seen.append(logits.dtype)
        return F.cross_entropy(logits.float(), labels, reduction="none")

    sizes = []
    for autocast in (False, True):
        model.zero_grad()
        method = DeltaSAM(model, 0.05, weighting, seed=2)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            method.backward(closure)
        sizes.append(method.report["effective_sample_size"])
    torch.testing.assert_close(*sizes, rtol=1e-6, atol=0)  # the weights come from the probes alone
    assert torch.bfloat16 in seen  # the ascent's and the descent's own passes stay as they were asked for


def test_smart_s_ascent_moves_no_statistics_of_a_checkpointed_layer():
    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.words, self.norm, self.head = nn.Embedding(50, 8), nn.BatchNorm1d(8), nn.Linear(8, 2)

        def get_input_embeddings(self):
            return self.words

        def forward(self, input_ids):
            pooled = checkpoint(lambda h: self.norm(h.mean(1)), self.words(input_ids), use_reentrant=False)
            return types.SimpleNamespace(logits=self.head(pooled))

    model = Checkpointed()
    closure = ExampleLosses(model, {"input_ids": ids(), "labels": torch.tensor([0, 1, 1, 0])})
    dsam.METHODS["smart"](model).backward(closure)
    assert model.norm.num_batches_tracked == 1


@pytest.mark.parametrize("weighting", ["probe", "curvature", "gibbs"])
@pytest.mark.filterwarnings("ignore:probes run under the autocast")
def test_a_closure_that_needs_the_autocast_around_it_has_its_probes_there(weighting):
    """With half-precision features, which float32 layers take under autocast alone. It is said once."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2)), torch.randn(6, 4).bfloat16()
    y = torch.tensor([0, 1, 1, 0, 1, 0])
    method = DeltaSAM(model, 0.05, weighting)
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16):
            method.backward(lambda: F.cross_entropy(model(x).float(), y, reduction="none"))
        forwards = method.report["forwards"]
    assert [note for note in method.notes if "autocast around the step" in note] == method.notes != []
    with torch.autocast("cpu", torch.bfloat16):
        DeltaSAM(model, 0.05, weighting).backward(lambda: F.cross_entropy(model(x).float(), y, reduction="none"))
    plain = DeltaSAM(model, 0.05, weighting)
    plain.backward(lambda: F.cross_entropy(model(x.float()), y, reduction="none"))
    assert forwards == plain.report["forwards"]


def test_smart_s_ascent_does_not_underflow_under_a_scaler(monkeypatch):
    model, slopes = network(dtype=torch.float32), []
    inner = torch.autograd.grad

    def seen(loss, of, *given, **named):
        found = inner(loss, of, *given, **named)
        slopes.append(found[0])
        return found

    closure = ExampleLosses(model, {"input_ids": ids(), "labels": torch.tensor([0, 1, 1, 0])}, torch.float16)
    method = dsam.METHODS["smart"](model, sigma=1e-2, radius=1e-2, step_size=1e-2)
    with monkeypatch.context() as during:
        during.setattr(smart.torch.autograd, "grad", seen)
        method.backward(closure, torch.amp.GradScaler("cpu", init_scale=2.0**16))
    slope = next(g for g in slopes if g.shape == (4, 6, 16))
    assert (slope == 0).double().mean() < 0.02


def test_pieces_need_not_be_of_one_kind():
    """δ-SAM draws for the rows of a table of words only where every piece says which it reads."""
    model = encoders.model("bert")
    one = ExampleLosses(model, encoders.batch(3, 5))
    other = ExampleLosses(model, encoders.batch(3, 5, seed=2))
    for pieces in ([one, lambda: other()], [lambda: one(), other]):
        DeltaSAM(model, 0.05, seed=1).backward(pieces)


def test_an_earlier_sparse_gradient_is_added_to():
    torch.manual_seed(0)
    words, head = nn.Embedding(10, 4, sparse=True), nn.Linear(4, 2)
    model = nn.ModuleList([words, head])

    def losses():
        return F.cross_entropy(
            head(words(torch.tensor([[1, 2], [3, 1]])).mean(1)), torch.tensor([0, 1]), reduction="none"
        )

    losses().mean().backward()
    once = [p.grad.to_dense().clone() for p in model.parameters()]
    Plain(model).backward(losses)
    for p, g in zip(model.parameters(), once, strict=True):
        torch.testing.assert_close(p.grad.to_dense(), 2 * g)
