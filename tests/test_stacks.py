"""Methods in other people's training stacks, each with the real package: beside the methods' formulas or a plain loop."""

import copy
import pickle
import warnings

import by_definition
import encoders
import pytest
import torch
from by_definition import Examples

from dsam import METHODS, ExampleLosses


def method_of(name, model):
    return METHODS[name.partition("-")[0]](model, **by_definition.options(name))


def gradient_of(params):
    """End to end, zeros where none came."""
    return torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten().double() for p in params])


def lora(**options):
    """A small BERT, its adapters in the queries and values at random and its head trained, all else frozen."""
    peft = pytest.importorskip("peft")
    options = {"target_modules": ["query", "value"], "r": 2} | options
    torch.manual_seed(4)
    config = peft.LoraConfig(task_type="SEQ_CLS", init_lora_weights=False, **options)
    return peft.get_peft_model(encoders.model("bert"), config).double().eval()


@pytest.mark.parametrize("name", by_definition.FORMULAS)
def test_lora_gives_each_methods_gradient_in_the_adapters_and_the_head_and_leaves_the_base(name):
    model, data = lora(), encoders.batch(5, 9)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    trained = [p for p in model.parameters() if p.requires_grad]
    assert 0 < len(trained) < len(list(model.parameters()))
    expected = by_definition.FORMULAS[name](Examples(model, data))
    method = method_of(name, model)
    with warnings.catch_warnings(action="ignore" if name == "rdrop" else "error"):  # fast, not one example at a time
        method.backward(ExampleLosses(model, data))
    torch.testing.assert_close(gradient_of(trained), expected, rtol=1e-7, atol=1e-9)
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
