"""Methods in other people's training stacks, each with the real package: beside their formulas or a plain loop."""

import copy
import functools
import logging
import pickle
import re
import types
from pathlib import Path

import by_definition
import encoders
import pytest
import torch
from by_definition import Examples
from classifier import Classifier, Losses, batch
from test_encoders import Seen

from dsam import METHODS, SAM, DeltaSAM, ExampleLosses, MomentumSAM
from dsam.errors import Note


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


def take_inputs_in_their_own_precision(*modules):
    for module in modules:
        module.register_forward_pre_hook(lambda module, args: (args[0].to(next(module.parameters()).dtype), *args[1:]))


def of_two_dtypes(body, head):
    """A small BERT whose words are in `body`, as its layers, and whose head is in `head`."""
    model = encoders.model("bert", body).eval()
    model.classifier.to(head)
    take_inputs_in_their_own_precision(model.classifier)
    return model


@pytest.mark.parametrize("name", by_definition.FORMULAS)
@pytest.mark.parametrize("body", [torch.float32, torch.bfloat16])
def test_weights_of_two_dtypes_get_each_methods_gradient_each_in_its_own(name, body):
    model, data = of_two_dtypes(body, torch.float64), encoders.batch(5, 9)
    before = copy.deepcopy(list(model.parameters()))
    expected = by_definition.FORMULAS[name](Examples(model, data))
    method, closure = method_of(name, model), ExampleLosses(model, data)
    # A bare call says no words, so that all of their table is probed and not only the batch's rows.
    method.backward(closure.__call__ if name == "delta_sam-probe" else closure)
    found, limit = gradient_of(model.parameters()), 1e-5 if body is torch.float32 else 0.03
    assert (found - expected).norm() < limit * expected.norm()
    assert all(p.dtype == q.dtype and torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    rounded = [note for note in method.notes if note.startswith("weights of bfloat16")]
    assert method.notes == rounded or name == "rdrop"
    assert not rounded or (body is torch.bfloat16 and name != "per_instance")


def test_probes_of_top_layers_go_on_in_the_precision_of_those_layers():
    """A probe of next to nothing gives the losses again, though the words are narrower."""
    model, data = encoders.model("bert", torch.float32).eval(), encoders.batch(5, 9)
    model.bert.embeddings.to(torch.bfloat16)
    take_inputs_in_their_own_precision(*model.bert.encoder.layer)
    weighting = Seen(layers=2, radius=1e-9)
    method = METHODS["delta_sam"](model, 0.3, weighting)
    method.backward(ExampleLosses(model, data))
    assert [note[:19] for note in method.notes] == ["weights of bfloat16"] * 2  # of ε, and of probes
    torch.testing.assert_close(weighting.probe.plus[0], weighting.losses, rtol=0, atol=1e-6)


@pytest.fixture(scope="module")
def compiled():
    """{how: (the model, what torch.compile made of it)}, each run once, so that its code is there."""
    found = {}
    for how in ("returned", "in place"):
        model = encoders.model("bert").eval()
        other = torch.compile(model, backend="eager") if how == "returned" else model
        if how == "in place":
            model.compile(backend="eager")
        ExampleLosses(other, encoders.batch(5, 9))().mean().backward()
        found[how] = model, other
    return found


LOOKING = ("per_instance", "freelb", "delta_sam-top", "delta_sam-gibbs", "delta_sam-relative_gap")
LOOKING += ("delta_sam-gauss_newton", "delta_sam-exact_curvature")
"""Methods that put hooks into layers, which compiled code would not see."""


@pytest.mark.filterwarnings("ignore:rdrop", "ignore:.* and so the compiled model runs uncompiled")
@pytest.mark.parametrize("name", [name for name in by_definition.FORMULAS if name != "m_sam"])  # compiles for seconds
@pytest.mark.parametrize("how", ["returned", "in place"])
def test_a_compiled_model_gets_each_methods_gradient(compiled, how, name):
    model, other = compiled[how]
    data, run, model_itself = encoders.batch(5, 9), [], encoders.model("bert").eval()
    expected = by_definition.FORMULAS[name](Examples(model_itself, data))
    clean = ExampleLosses(other, data)().detach()
    method = method_of(name, other)
    with model.bert.embeddings.word_embeddings.register_forward_hook(lambda *_: run.append(1)):
        model.zero_grad()
        method.backward(ExampleLosses(other, data))
    torch.testing.assert_close(gradient_of(model.parameters()), expected, rtol=1e-7, atol=1e-9)
    assert any("runs uncompiled" in line for line in method.notes) == (name in LOOKING)
    if name == "sam":
        assert not run  # compiled code does run, and does not see the hook
    assert torch.equal(ExampleLosses(other, data)().detach(), clean)


PAGE = (Path(__file__).parent.parent / "docs" / "integrations.md").read_text(encoding="utf-8")
BATCHES = 6


def shown(title):
    """The code of that part of the page."""
    (part,) = [part for part in PAGE.split("\n## ") if part.startswith(title)]
    return re.search(r"```python\n(.*?)```", part, re.DOTALL)[1]


def standing_in(name, closure=Losses):
    """For the page's method and closure: another method, and losses in the precision of the weights."""

    def method(model, rho):
        return STATEFUL[name](model)

    return {"DeltaSAM": method, "ExampleLosses": closure}


def small_classifier():
    return Classifier(dropout=0.2).train()


def by_hand(make, steps, clip):
    """Weights after these steps, each a list of the batches that it takes together."""
    model = small_classifier()
    method, optimizer = make(model), torch.optim.AdamW(model.parameters(), lr=0.01)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    torch.manual_seed(7)
    for seeds in steps:
        method.backward([Losses(model, batch(seed=seed)) for seed in seeds])
        torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    return list(model.parameters())


def assert_same(model, weights):
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), weights, strict=True))


STATEFUL = {
    "sam": lambda model: SAM(model, 0.3),
    "delta_sam": lambda model: DeltaSAM(model, 0.3, seed=3),
    "msam": lambda model: MomentumSAM(model, 0.3),
}


@pytest.mark.parametrize("name", STATEFUL)
def test_lightning_with_manual_optimization_is_a_plain_loop(name, tmp_path):
    """Gradients of two batches together, clipping, a scheduler; and it goes on from Lightning's checkpoint."""
    lightning = pytest.importorskip("pytorch_lightning")
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)

    names = {"pytorch_lightning": lightning, "torch": torch, **standing_in(name)}
    exec(shown("Lightning"), names)

    class WithItsMasks(names["SharpnessAware"]):
        masks = torch.Generator().manual_seed(7).get_state()

        def on_save_checkpoint(self, checkpoint):
            super().on_save_checkpoint(checkpoint)
            checkpoint["masks"] = torch.get_rng_state()

        def on_load_checkpoint(self, checkpoint):
            super().on_load_checkpoint(checkpoint)
            self.masks = checkpoint["masks"]

        def on_train_epoch_start(self):  # the loader has drawn a seed of its own
            if self.masks is not None:
                torch.set_rng_state(self.masks)
            self.masks = None

    steps = [[seed, seed + 1] for seed in range(0, BATCHES, 2)]
    data = [[batch(seed=seed) for seed in seeds] for seeds in steps]
    quiet = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}

    def fit(epochs, **resume):
        module = WithItsMasks(small_classifier())
        trainer = lightning.Trainer(max_epochs=epochs, enable_checkpointing=False, **quiet)
        trainer.fit(module, torch.utils.data.DataLoader(data, batch_size=None), **resume)
        assert module.saved is None  # a second fit goes on from where it is
        trainer.save_checkpoint(tmp_path / "kept.ckpt")
        return module.model

    assert_same(fit(1), by_hand(STATEFUL[name], steps, clip=0.5))
    assert_same(fit(2, ckpt_path=tmp_path / "kept.ckpt"), by_hand(STATEFUL[name], 2 * steps, clip=0.5))


@pytest.mark.parametrize("name", STATEFUL)
def test_accelerate_with_gradient_accumulation_is_a_plain_loop(name):
    """Four batches and then two that an epoch leaves, clipped, with a scheduler, each step as the undivided batch."""
    accelerate, model, begun = pytest.importorskip("accelerate"), small_classifier(), []

    class Batches(Losses):
        def __init__(self, *given):
            super().__init__(*given)
            if not begun:  # the loader has drawn a seed of its own
                begun.append(torch.manual_seed(7))

    loader = torch.utils.data.DataLoader([batch(seed=seed) for seed in range(BATCHES)], batch_size=None)
    names = {"model": model, "loader": loader, "torch": torch, "Accelerator": accelerate.Accelerator}
    exec(shown("Accelerate with gradient accumulation"), names | standing_in(name, Batches))
    assert_same(model, by_hand(STATEFUL[name], [[0, 1, 2, 3], [4, 5]], clip=0.5))


@pytest.mark.parametrize("name", ["sam", "msam"])
def test_a_gradient_scaler_skips_what_overflows_and_changes_nothing_else(name):
    """In float32, where scaling by powers of two is exact; beside a loop without the scaler and the second batch."""

    class Overflowing(Losses):
        def __init__(self, model, data, autocast):
            super().__init__(model, data)
            self.times = torch.inf if data is loader[1] else 1

        def outputs(self, noise=None, **how):
            losses, logits = super().outputs(noise)
            return self.times * losses, logits

    loader = [batch(seed=seed) for seed in range(3)]
    model, expected = Classifier(dtype=torch.float32), Classifier(dtype=torch.float32)
    model.device = torch.device("cpu")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    names = {"torch": torch, "model": model, "loader": loader, "optimizer": optimizer, "ExampleLosses": Overflowing}
    exec(shown("A gradient scaler"), names | {"method": STATEFUL[name](model)})
    method, optimizer = STATEFUL[name](expected), torch.optim.SGD(expected.parameters(), lr=0.1)
    for one in (loader[0], loader[2]):
        method.backward(Losses(expected, one))
        torch.nn.utils.clip_grad_norm_(expected.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    assert_same(model, list(expected.parameters()))


def test_the_pages_short_examples_run():
    peft = pytest.importorskip("peft")
    names = {"DeltaSAM": DeltaSAM, "ExampleLosses": ExampleLosses, "SAM": SAM, "batch": encoders.batch(5, 9)}
    model = encoders.model("bert").eval()
    expected = ExampleLosses(model, names["batch"])().mean().detach()
    eager = types.SimpleNamespace(compile=functools.partial(torch.compile, backend="eager"))
    exec(shown("torch.compile"), names := names | {"model": model, "torch": eager})
    torch.testing.assert_close(names["loss"], expected)
    exec(shown("LoRA"), names := names | {"get_peft_model": peft.get_peft_model, "LoraConfig": peft.LoraConfig})
    torch.testing.assert_close(names["loss"], expected)  # adapters begin as nothing


def test_a_term_that_peft_adds_to_the_loss_is_said_to_be_none_of_its():
    peft = pytest.importorskip("peft")
    config = peft.AdaLoraConfig(task_type="SEQ_CLS", target_modules=["query"], total_step=10, init_r=2, target_r=1)
    model = peft.get_peft_model(encoders.model("bert"), config)
    with pytest.warns(Note, match="peft adds to the loss of PeftModelForSequenceClassification what is no part of"):
        losses = ExampleLosses(model, encoders.batch(5, 9))
    torch.manual_seed(1)
    own = model(**encoders.batch(5, 9)).loss
    torch.manual_seed(1)
    assert own > losses().mean() + 0.1  # what the note is about


NAMES = [*by_definition.FORMULAS, "msam"]


def made(name, model):
    """A method that has something to keep from step to step where it can have."""
    options = {"looksam": {"k": 2}}.get(name, {})
    return METHODS[name](model, rho=0.3, **options) if name in ("looksam", "fsam", "msam") else method_of(name, model)


def train(method, model, seeds):
    """Steps of SGD on batches of these seeds; the gradient of the last."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for seed in seeds:
        optimizer.zero_grad()
        method.backward(ExampleLosses(model, encoders.batch(5, 9, seed)))
        optimizer.step()
    return gradient_of(model.parameters())


@pytest.mark.filterwarnings("ignore:rdrop")
@pytest.mark.parametrize("name", NAMES)
def test_a_model_may_change_its_precision_after_the_method_was_made(name):
    """Then the method is as one made anew, with what it knew."""
    model, then = encoders.model("bert").eval(), torch.float32
    method = made(name, model)
    train(method, model, [1])
    other = copy.deepcopy(model).to(then)
    anew = made(name, other)
    anew.load_state_dict(copy.deepcopy(method.state_dict()))
    model.to(then)
    assert torch.equal(train(method, model, [2, 3]), train(anew, other, [2, 3]))
    assert all(p.dtype == then for p in model.parameters())


@pytest.mark.filterwarnings("ignore:rdrop")
@pytest.mark.parametrize("name", NAMES)
def test_a_copied_or_pickled_method_goes_on_with_its_own_model(name):
    """Copied with its model or for itself, when its model is `method.module`."""
    model = adapted()
    method = made(name, model)
    train(method, model, [1])
    pairs = [copy.deepcopy((method, model)), pickle.loads(pickle.dumps((method, model)))]
    pairs += [(alone, alone.module) for alone in (copy.deepcopy(method), pickle.loads(pickle.dumps(method)))]
    expected = train(method, model, [2, 3])
    for copied, network in pairs:
        assert torch.equal(train(copied, network, [2, 3]), expected)
    with pytest.raises(ValueError, match="was the method made of another model, or of a copy"):
        copy.deepcopy(method).backward(ExampleLosses(model, encoders.batch(5, 9)))
