"""Casting all weights at once (as on a GPU) beside autocast's own casts, on a CPU: the same bits by fewer operators."""

from collections import Counter

import encoders
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from dsam.methods import METHODS, ExampleLosses
from dsam.methods.casts import CastAtOnce

REFUSED = {"deberta"}  # its own code does not run in bfloat16
CASES = [
    ("plain", {}),
    ("sam", {}),
    ("sam_on", {}),
    ("delta_sam", {"weighting": "probe", "layers": 2}),
    ("delta_sam", {"weighting": "gap"}),
    ("per_instance", {}),
    ("freelb", {}),
]


class Operators(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.found[str(func).split(".")[1]] += 1
        return func(*args, **(kwargs or {}))


def network(family, cast, **others):
    model = encoders.model(family, torch.float32, **others)
    if cast:
        CastAtOnce(model)
    return model


def gradient(model, name, options, pieces=1):
    method = METHODS[name](model, **options)
    method.generator.manual_seed(3)
    torch.manual_seed(5)
    parts = [encoders.batch(5, 9)] if pieces == 1 else [encoders.batch(3, 9), encoders.batch(2, 12, seed=4)]
    method.backward([ExampleLosses(model, part, torch.bfloat16) for part in parts])
    return [p.grad for p in model.parameters()], method


def assert_same(model, other):
    for a, b in zip(model, other, strict=True):
        assert (a is None) == (b is None)
        assert a is None or torch.equal(a, b)


@pytest.mark.parametrize("family", sorted(encoders.FAMILIES.keys() - REFUSED))
def test_every_familys_gradient_is_autocasts_own(family):
    """With dropout, so that the random numbers are the same ones too."""
    for name, options in (("sam", {}), ("per_instance", {})):
        expected, usual = gradient(network(family, False), name, options)
        found, method = gradient(network(family, True), name, options)
        assert_same(found, expected)
        assert getattr(method, "singly", None) == getattr(usual, "singly", None)  # what looks into layers sees the same


@pytest.mark.parametrize("pieces", [1, 2])
@pytest.mark.parametrize(("name", "options"), CASES)
def test_every_kind_of_methods_gradient_is_autocasts_own(name, options, pieces):
    assert_same(
        gradient(network("bert", True), name, options, pieces)[0],
        gradient(network("bert", False), name, options, pieces)[0],
    )


def test_checkpointed_layers_and_frozen_ones_are_autocasts_own():
    def made(cast):
        model = network("bert", cast)
        model.bert.encoder.layer[0].requires_grad_(False)
        model.gradient_checkpointing_enable({"use_reentrant": False})
        return model

    assert_same(gradient(made(True), "sam", {})[0], gradient(made(False), "sam", {})[0])


def test_a_layer_that_is_there_and_never_called_does_not_count():
    def made(cast):
        model = encoders.model("bert", torch.float32)
        torch.manual_seed(1)
        model.bert.encoder.layer[1].spare = nn.Linear(16, 3)
        if cast:
            CastAtOnce(model)
        return model

    expected, _ = gradient(made(False), "per_instance", {})
    found, method = gradient(made(True), "per_instance", {})
    assert not method.singly
    assert_same(found, expected)


def test_a_weight_that_is_also_used_otherwise_is_still_found_out():
    """What per-instance perturbation must refuse (it runs such a model one example at a time)."""

    class Twice(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, labels=None, **inputs):
            found = self.inner(**inputs)
            weight = self.inner.classifier.weight
            found.logits = found.logits + (found.logits.float() @ weight.float()) @ weight.float().T
            return found

    for cast in (False, True):
        model = Twice(encoders.model("bert", torch.float32))
        if cast:
            CastAtOnce(model)
        method = METHODS["per_instance"](model)
        method.backward(ExampleLosses(model, encoders.batch(), torch.bfloat16))
        assert method.singly and "classifier.weight" in method.notes[0]


def test_without_autocast_and_outside_the_model_nothing_changes():
    model, plain = network("bert", True).eval(), network("bert", False).eval()
    inputs = {k: v for k, v in encoders.batch().items() if k != "labels"}
    assert torch.equal(model(**inputs).logits, plain(**inputs).logits)
    x = torch.randn(2, encoders.H)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model.bert.pooler.dense(x), plain.bert.pooler.dense(x))
        with pytest.raises(ValueError):
            model(input_ids=None)
        assert torch.equal(model.bert.pooler.dense(x), plain.bert.pooler.dense(x))
        with torch.no_grad():  # the weights of now, not those that were cast before
            for either in (model, plain):
                either.classifier.weight.zero_()
        assert torch.equal(model(**inputs).logits, plain(**inputs).logits)


def test_a_pass_and_its_backward_cast_weights_in_two_operators_a_layer():
    """Three layers, their embeddings' pooler and classifier: four groups; SAM has two passes."""
    counts = []
    for cast in (False, True):
        model = network("bert", cast)
        gradient(model, "sam", {})  # once, for what is looked at only the first time
        with Operators() as operators:
            gradient(model, "sam", {})
        counts.append(operators.found)
    weights = sum(len(list(m.parameters())) for m in network("bert", False).modules() if isinstance(m, nn.Linear))
    assert weights == 3 * 12 + 4
    assert counts[0]["_to_copy"] - counts[1]["_to_copy"] == 2 * 2 * weights
    assert counts[0]["_foreach_copy_"] == 0 and counts[1]["_foreach_copy_"] == 2 * 2 * 4
