"""Methods in other people's training stacks, each with the real package: beside the methods' formulas or a plain loop."""

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


def adapted(kind="lora"):
    """A small BERT with adapters of peft at random, and its head trained, all else frozen."""
    peft = pytest.importorskip("peft")
    targets = {"lora": ["query", "value"], "words": ["query", "word_embeddings"]}
    torch.manual_seed(4)
    if kind == "prompts":
        config = peft.PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=3)
    else:
        config = peft.LoraConfig(task_type="SEQ_CLS", init_lora_weights=False, r=2, target_modules=targets[kind])
    return peft.get_peft_model(encoders.model("bert"), config).double().eval()


def assert_adapters_by_formula(model, name):
    """And all else as it was, bit for bit."""
    before = {key: value.clone() for key, value in model.state_dict().items()}
    data, trained = encoders.batch(5, 9), [p for p in model.parameters() if p.requires_grad]
    assert 0 < len(trained) < len(list(model.parameters()))
    expected = by_definition.FORMULAS[name](Examples(model, data))
    method = method_of(name, model)
    method.backward(ExampleLosses(model, data))
    torch.testing.assert_close(gradient_of(trained), expected, rtol=1e-7, atol=1e-9)
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    return method


@pytest.mark.parametrize("name", by_definition.FORMULAS)
def test_lora_gets_each_methods_gradient_and_leaves_the_base_as_it_was(name):
    method = assert_adapters_by_formula(adapted(), name)
    assert not method.notes or name == "rdrop"  # as fast as without adapters


@pytest.mark.filterwarnings("ignore:.* one example at a time")
@pytest.mark.parametrize("name", ["per_instance", "delta_sam-relative_gap", "freelb"])
@pytest.mark.parametrize("kind", ["words", "prompts"])
def test_other_adapters_are_run_one_example_at_a_time_where_there_is_no_formula(kind, name):
    method = assert_adapters_by_formula(adapted(kind), name)
    assert bool(method.notes) == (name != "freelb")
