"""R-Drop, R3F, FreeLB and SMART on a small BERT, each against a derivation that calls the model by itself."""

import pytest
import torch
from test_methods import weights
from torch.nn.functional import cross_entropy, kl_div, log_softmax
from transformers import BertConfig, BertForSequenceClassification

from dsam import METHODS, R3F, SMART, ExampleLosses, FreeLB, Plain, RDrop

BASELINES = {
    "freelb": lambda p, **o: FreeLB(p, **{"step_size": 0.5, "init": 0.3, "max_norm": 0.6} | o),
    "r3f": lambda p, **o: R3F(p, **{"sigma": 0.1} | o),
    "rdrop": lambda p, **o: RDrop(p, **o),
    "smart": lambda p, **o: SMART(p, **{"sigma": 0.05, "radius": 0.1, "step_size": 0.02} | o),
}
OFF = {
    "freelb": {"step_size": 0, "init": 0},
    "r3f": {"weight": 0},
    "rdrop": {"alpha": 0, "average": True},
    "smart": {"weight": 0},
}


def bert(dropout=0.0, labels=3, seed=0, dtype=torch.float64):
    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = BertConfig(
        vocab_size=20, max_position_embeddings=12, num_labels=labels, initializer_range=0.3,
        hidden_dropout_prob=dropout, attention_probs_dropout_prob=0.0, **sizes,
    )  # fmt: skip
    return BertForSequenceClassification(config).to(dtype).train()


def batch(n=6, seed=1, labels=3, tokens=7):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(3, tokens + 1, (n,), generator=generator)
    mask = (torch.arange(tokens) < lengths[:, None]).long()
    ids = torch.randint(1, 20, (n, tokens), generator=generator) * mask
    if labels == 1:
        y = torch.randn(n, generator=generator, dtype=torch.float64)
    else:
        y = torch.randint(0, labels, (n,), generator=generator)
    return {"input_ids": ids, "attention_mask": mask, "labels": y}


def logits(model, data, noise=None, detached=False):
    """By `inputs_embeds`, not by a hook: the model's own way in."""
    embeddings = model.get_input_embeddings()(data["input_ids"])
    embeddings = embeddings.detach() if detached else embeddings
    if noise is not None:
        embeddings = embeddings + (noise * data["attention_mask"][..., None]).to(embeddings.dtype)
    return model(inputs_embeds=embeddings, attention_mask=data["attention_mask"]).logits


def task_loss(out, data):
    if out.shape[1] == 1:
        return (out.squeeze(1) - data["labels"].to(out.dtype)).square().mean()
    return cross_entropy(out, data["labels"])


def apart(a, b):
    """Mean symmetric KL by PyTorch's own, or squared difference."""
    if a.shape[1] == 1:
        return (a - b).square().mean()
    p, q = log_softmax(a, -1), log_softmax(b, -1)
    return kl_div(p, q, reduction="batchmean", log_target=True) + kl_div(q, p, reduction="batchmean", log_target=True)


def gradient_of(model, loss):
    return torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)


def check(model, expected, rtol=1e-5):
    """The logits are float32, and so is the agreement."""
    for p, g in zip(model.parameters(), expected, strict=True):
        assert (p.grad is None) == (g is None)
        if g is not None:
            torch.testing.assert_close(p.grad, g, rtol=rtol, atol=2e-7)


def noise_of(method, data, kind):
    """The noise that the method draws next, unscaled; each example from a seed of its own."""
    generator = torch.Generator()
    generator.set_state(method.generator.get_state())
    n, tokens = data["input_ids"].shape
    rows = []
    for seed in torch.randint(2**62, (n,), generator=generator).tolist():
        own = torch.Generator().manual_seed(seed)
        draw = torch.randn if kind == "normal" else torch.rand
        rows.append(draw(tokens, 16, generator=own))
    noise = torch.stack(rows)
    return (noise if kind == "normal" else 2 * noise - 1) * data["attention_mask"][..., None]


@pytest.mark.parametrize("labels", [1, 3])
@pytest.mark.parametrize("average", [False, True])
def test_rdrop_is_its_formula_with_two_masks(labels, average):
    model, data = bert(dropout=0.3, labels=labels), batch(labels=labels)
    method = RDrop(model, alpha=0.7, average=average, seed=4)
    seed = int(torch.randint(2**62, (), generator=torch.Generator().manual_seed(4)))
    state = torch.get_rng_state()
    first = logits(model, data)
    plain_stream = torch.get_rng_state()
    torch.manual_seed(seed)
    second = logits(model, data)
    assert not torch.allclose(first, second)
    half = 1.0 if labels == 1 else 0.5
    both = task_loss(first, data) + task_loss(second, data)
    loss = both / (2 if average else 1) + 0.7 * half * apart(first, second)
    expected = gradient_of(model, loss)
    torch.set_rng_state(state)
    returned = method.backward(ExampleLosses(model, data))
    check(model, expected)
    torch.testing.assert_close(returned, task_loss(first, data).detach())
    assert torch.equal(torch.get_rng_state(), plain_stream)


def test_rdrop_is_the_authors_code_for_glue_at_half_the_batch_size():
    """Of that code, in our own words: means of the cross-entropies, a quarter of the *sums* of the KLs."""
    model, data = bert(dropout=0.3), batch()
    method = RDrop(model, alpha=len(data["labels"]) / 2, seed=4)
    seed = int(torch.randint(2**62, (), generator=torch.Generator().manual_seed(4)))
    state = torch.get_rng_state()
    first = logits(model, data)
    torch.manual_seed(seed)
    second = logits(model, data)
    p, q = first.log_softmax(-1), second.log_softmax(-1)
    kls = kl_div(p, q.exp(), reduction="none").sum() + kl_div(q, p.exp(), reduction="none").sum()
    expected = gradient_of(model, task_loss(first, data) + task_loss(second, data) + 0.5 * kls / 2)
    torch.set_rng_state(state)
    method.backward(ExampleLosses(model, data))
    check(model, expected)


@pytest.mark.parametrize("labels", [1, 3])
@pytest.mark.parametrize("kind", ["normal", "uniform"])
@pytest.mark.parametrize("through", [False, True])
def test_r3f_is_its_formula(labels, kind, through):
    model, data = bert(labels=labels), batch(labels=labels)
    method = R3F(model, weight=0.8, sigma=0.2, noise=kind, through_embeddings=through, regression=True)
    clean, noisy = logits(model, data), logits(model, data, 0.2 * noise_of(method, data, kind), detached=not through)
    expected = gradient_of(model, task_loss(clean, data) + 0.8 * apart(clean, noisy))
    assert float(apart(clean, noisy).detach()) > 1e-3
    returned = method.backward(ExampleLosses(model, data))
    check(model, expected)
    torch.testing.assert_close(returned, task_loss(clean, data).detach())
    torch.testing.assert_close(method.report["divergence"], apart(clean, noisy).detach())


def test_r3f_of_a_regression_is_plain_as_in_the_authors_code_and_says_so():
    model, data = bert(labels=1), batch(labels=1)
    method = R3F(model, sigma=0.2)
    with pytest.warns(UserWarning, match="a regression has no such term"):
        method.backward(ExampleLosses(model, data))
    check(model, gradient_of(model, task_loss(logits(model, data), data)))
    assert method.report["forwards"] == 1 and "this is plain" in method.notes[0]


@pytest.mark.parametrize("max_norm", [0.0, 0.6])
def test_freelb_is_its_algorithm(max_norm):
    model, data = bert(), batch()
    method = FreeLB(model, steps=3, step_size=0.5, init=0.3, max_norm=max_norm)
    numbers = data["attention_mask"].sum(1) * 16
    noise = noise_of(method, data, "uniform").double() * 0.3 / numbers.sqrt()[:, None, None]
    expected = None
    for t in range(3):
        noise = noise.detach().requires_grad_()
        loss = task_loss(logits(model, data, noise), data)
        *gradient, ascent = torch.autograd.grad(loss, [*model.parameters(), noise], allow_unused=True)
        expected = [g / 3 for g in gradient] if t == 0 else [e + g / 3 for e, g in zip(expected, gradient, strict=True)]
        if t == 0:
            first = loss.detach()
        if t < 2:
            noise = noise + 0.5 * ascent / ascent.flatten(1).norm(dim=1)[:, None, None]
            norm = noise.detach().flatten(1).norm(dim=1)[:, None, None]
            if max_norm:
                noise = torch.where(norm > max_norm, noise * max_norm / norm, noise)
    returned = method.backward(ExampleLosses(model, data))
    check(model, expected)
    torch.testing.assert_close(returned, first)
    norm = noise.detach().flatten(1).norm(dim=1)
    torch.testing.assert_close(method.report["noise_norm"], norm.mean())
    assert (float(norm.max()) <= 0.6 * 1.001) == bool(max_norm)  # the bound was reached, where there is one


@pytest.mark.parametrize("labels", [1, 3])
def test_smart_is_its_algorithm(labels):
    model, data = bert(labels=labels), batch(labels=labels)
    method = SMART(model, weight=0.9, steps=2, step_size=0.2, radius=0.25, sigma=0.1)
    clean = logits(model, data)
    noise = 0.1 * noise_of(method, data, "normal")
    for _ in range(2):
        noise = noise.detach().requires_grad_()
        (ascent,) = torch.autograd.grad(apart(clean.detach(), logits(model, data, noise)), noise)
        largest = ascent.abs().flatten(1).max(1).values[:, None, None]
        noise = (noise + 0.2 * ascent / largest).clamp(-0.25, 0.25)
    noisy = logits(model, data, noise.detach())
    expected = gradient_of(model, task_loss(clean, data) + 0.9 * apart(clean, noisy))
    returned = method.backward(ExampleLosses(model, data))
    check(model, expected, rtol=1e-4)
    torch.testing.assert_close(returned, task_loss(clean, data).detach())
    assert float(noise.detach().abs().max()) == 0.25


@pytest.mark.parametrize("labels", [1, 3])
def test_smart_can_ascend_as_the_authors_code_does(labels):
    """That code in our own words: perturbation.py's inner loop and loss.py's stable_kl and SymKlCriterion."""
    model, data = bert(labels=labels), batch(labels=labels)
    method = SMART(model, weight=0.9, steps=2, step_size=0.05, sigma=0.1, ascent="code")
    clean = logits(model, data)
    noise = 0.1 * noise_of(method, data, "normal").double()

    def stable(a, b):
        p, y = a.softmax(1), b.softmax(1)
        rp, ry = (-(1 / (x + 1e-6) - 1 + 1e-6).detach().log() for x in (p, y))
        return (p * (rp - ry) * 2).sum()

    for _ in range(2):
        noise = noise.detach().requires_grad_()
        out = logits(model, data, noise)
        far = (out - clean.detach()).square().sum() if labels == 1 else stable(out, clean.detach())
        (found,) = torch.autograd.grad(far, noise)
        ahead = (noise + 0.05 * found).detach()
        noise = ahead / (ahead.abs().max(-1, keepdim=True).values + 1e-6)
    noisy = logits(model, data, noise)
    if labels == 1:
        penalty = (clean - noisy).square().mean()
    else:
        p, q = clean.log_softmax(-1), noisy.log_softmax(-1)
        penalty = kl_div(p, q.detach().exp(), reduction="batchmean") + kl_div(
            q, p.detach().exp(), reduction="batchmean"
        )
    expected = gradient_of(model, task_loss(clean, data) + 0.9 * penalty)
    method.backward(ExampleLosses(model, data))
    check(model, expected, rtol=1e-4)
    with pytest.raises(ValueError, match="ascent must be 'paper' or 'code', got 'both'"):
        SMART(model, ascent="both")


def test_smarts_ascent_raises_the_divergence():
    model, data = bert(), batch()
    found = []
    for step_size in (0.0, 0.1):
        method = SMART(model, steps=3, step_size=step_size, radius=0.3, sigma=0.1)
        method.backward(ExampleLosses(model, data))
        found.append(float(method.report["divergence"]))
    assert found[1] > 1.5 * found[0]


def test_outputs_equal_the_call_and_noise_stays_off_padding_and_leaves_no_hook():
    model, data = bert(), batch()
    closure = ExampleLosses(model, data)
    found, out = closure.outputs()
    torch.testing.assert_close(found, closure())
    assert torch.equal(closure.logits, out.detach())
    noise = torch.randn(closure.embedding_shape).requires_grad_()
    gradient = torch.autograd.grad(closure.outputs(noise)[0].sum(), noise)[0]
    at_tokens = data["attention_mask"].bool()
    assert (gradient[~at_tokens] == 0).all()
    assert (gradient[at_tokens] != 0).any(-1).all()
    seen = []
    hook = model.bert.embeddings.register_forward_hook(lambda _, __, out: seen.append(out.detach()))
    closure.outputs(noise)
    closure()
    hook.remove()
    assert ((seen[0] == seen[1]).all(-1) == ~at_tokens).all()
    with pytest.raises(RuntimeError):
        closure.outputs(torch.zeros(1, 2, 3))
    assert torch.equal(found, closure())
    assert not model.get_input_embeddings()._forward_hooks


def test_subset_is_the_examples_losses():
    model, data = bert(), batch()
    closure = ExampleLosses(model, data)
    for indices in ([1, 2, 3], [5, 0, 2]):
        part = closure.subset(indices)
        assert len(part) == 3
        torch.testing.assert_close(part(), closure()[indices])


@pytest.mark.parametrize("name", BASELINES)
def test_with_nothing_to_add_it_is_plain_training(name):
    model, data = bert(), batch()
    Plain(model).backward(ExampleLosses(model, data))
    plain = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    METHODS[name](model, **OFF[name]).backward(ExampleLosses(model, data))
    check(model, plain, rtol=1e-6)


@pytest.mark.parametrize("name", ["r3f", "smart"])
@pytest.mark.parametrize("mask", ["same", "fresh"])
def test_weight_zero_trains_as_plain_with_its_masks(name, mask):
    trained = []
    for make in (lambda p: Plain(p), lambda p: METHODS[name](p, weight=0.0, mask=mask)):
        model = bert(dropout=0.3)
        method, optimizer = make(model), torch.optim.SGD(model.parameters(), lr=0.1)
        torch.manual_seed(5)
        for t in range(3):
            method.backward(ExampleLosses(model, batch(seed=t)))
            optimizer.step()
            optimizer.zero_grad()
        trained.append([*weights(model), torch.get_rng_state()])
    assert torch.equal(trained[0][-1], trained[1][-1])
    for p, q in zip(*trained, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("name", ["freelb", "r3f", "smart"])
def test_mask_same_compares_under_one_mask_and_fresh_under_others(name):
    model, data = bert(), batch()

    class Noting(ExampleLosses):
        def outputs(self, noise=None, **how):
            seen.append(float(torch.rand(())))
            return super().outputs(noise, **how)

    for mask in ("same", "fresh"):
        seen = []
        BASELINES[name](model, mask=mask).backward(Noting(model, data))
        assert len(set(seen)) == (1 if mask == "same" else len(seen))
        assert len(seen) == {"freelb": 3, "r3f": 2, "smart": 3}[name]


def test_trimming_an_examples_padding_does_not_change_its_noise():
    model, data = bert(), batch()
    longest = int(data["attention_mask"].sum(1).max())
    shorter = {k: v if k == "labels" else v[:, : longest - 1] for k, v in data.items()}
    a = R3F(model, seed=2)._noise(ExampleLosses(model, data), "normal")
    b = R3F(model, seed=2)._noise(ExampleLosses(model, shorter), "normal")
    fits = data["attention_mask"].sum(1) < longest
    assert fits.any()
    assert torch.equal(a[fits, : longest - 1], b[fits])


@pytest.mark.parametrize("name", BASELINES)
def test_passes_are_true(name):
    model, data = bert(), batch()
    pieces = [ExampleLosses(model, {k: v[a:b] for k, v in data.items()}) for a, b in ((0, 2), (2, 6))]
    for options in ({}, {"steps": 2} if name in ("freelb", "smart") else {}):
        method = METHODS[name](model, **options)
        method.backward(pieces)
        spent = (method.report["forwards"] + 2 * method.report["backwards"]) / 3
        assert spent == pytest.approx(method.passes)
        assert options or method.passes == METHODS[name].passes


@pytest.mark.parametrize("name", BASELINES)
def test_a_closure_without_outputs_is_refused_by_name(name):
    model, data = bert(), batch()
    with pytest.raises(ValueError, match=rf"{METHODS[name].__name__}.*dsam.ExampleLosses\(model, batch\)"):
        METHODS[name](model).backward(lambda: ExampleLosses(model, data)())
