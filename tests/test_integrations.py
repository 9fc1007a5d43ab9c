"""Methods under the real Hugging Face `Trainer`, against the stock Trainer and loops written by hand."""

import os
import re
import shutil
import socket
import subprocess
import sys
import warnings
from itertools import chain
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.multiprocessing as mp
import warm
from torch import nn
from torch.nn.utils import clip_grad_norm_
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainerCallback, TrainingArguments
from transformers.modeling_outputs import SequenceClassifierOutput

from dsam import METHODS, SAM, DeltaSAM, ExampleLosses, NonFiniteGradient, Plain
from dsam.integrations.transformers import SharpnessAwareTrainer, classifier_losses

LR = 1e-2


def network(dropout=0.0, num_labels=3, seed=0):
    torch.manual_seed(seed)
    return BertForSequenceClassification(
        BertConfig(
            vocab_size=40,
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=32,
            max_position_embeddings=12,
            hidden_dropout_prob=dropout,
            attention_probs_dropout_prob=dropout,
            num_labels=num_labels,
        )
    )


def examples(n=64, num_labels=3):
    g = torch.Generator().manual_seed(1)
    ids = torch.randint(1, 40, (n, 10), generator=g)
    labels = torch.randn(n, generator=g) if num_labels == 1 else torch.randint(0, num_labels, (n,), generator=g)
    return [
        {"input_ids": i, "attention_mask": torch.ones(10, dtype=torch.long), "labels": y}
        for i, y in zip(ids, labels, strict=True)
    ]


def arguments(folder, steps=4, **options):
    options = (
        {"per_device_train_batch_size": 32, "max_grad_norm": 0.0, "optim": "sgd", "seed": 5}
        | {"learning_rate": LR}
        | options
    )
    return TrainingArguments(
        str(folder),
        max_steps=steps,
        lr_scheduler_type="constant",
        weight_decay=0.0,
        logging_steps=1,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        **{"save_strategy": "no"} | options,
    )


class InOrder:
    """Batches in the data's own order, so that another loop can take the same ones."""

    def _get_train_sampler(self, *args):
        return torch.utils.data.SequentialSampler(self.train_dataset)


class Stock(InOrder, Trainer):
    pass


class Ours(InOrder, SharpnessAwareTrainer):
    pass


def losses_logged(trainer):
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


def trained(kind, folder, model=None, data=None, steps=4, callbacks=None, resume=None, args=None, **options):
    trainer = kind(
        model or network(),
        arguments(folder, steps, **args or {}),
        train_dataset=data or examples(),
        callbacks=callbacks,
        **options,
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def assert_same(a, b, **tolerance):
    for (name, p), q in zip(a.named_parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(p, q, msg=lambda text, name=name: f"{name}: {text}", **tolerance)


def distance(a, b):
    pairs = zip(a.parameters(), b.parameters(), strict=True)
    return sum(float((p - q).detach().square().sum()) for p, q in pairs) ** 0.5


def moved(model):
    return distance(model, network())


EXACT = {"rtol": 0, "atol": 0}
CLOSE = {"rtol": 0, "atol": 1e-6}


def by_hand(method, size=32, steps=4, clip=None, num_labels=3):
    """`steps` SGD steps in order over the data; the per-example losses are written out here."""
    model, data = network(num_labels=num_labels), examples(num_labels=num_labels)
    model.train()
    method = method(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    seen, norms = [], []
    for step in range(steps):
        batch = [data[(step * size + i) % len(data)] for i in range(size)]
        ids, mask, labels = (torch.stack([e[k] for e in batch]) for k in ("input_ids", "attention_mask", "labels"))

        def losses(ids=ids, mask=mask, labels=labels):
            logits = model(input_ids=ids, attention_mask=mask).logits
            if labels.is_floating_point():
                return (logits[:, 0] - labels) ** 2
            return -logits.log_softmax(1)[torch.arange(len(labels)), labels]

        seen.append(float(method.backward(losses)))
        if clip:
            norms.append(float(clip_grad_norm_(model.parameters(), clip)))
        optimizer.step()
        optimizer.zero_grad()
    return model, seen, norms


@pytest.mark.parametrize("num_labels", [3, 1])
def test_plain_equals_the_stock_trainer(tmp_path, num_labels):
    data = examples(num_labels=num_labels)
    stock = trained(Stock, tmp_path, network(num_labels=num_labels), data)
    ours = trained(Ours, tmp_path, network(num_labels=num_labels), data, method="plain")
    assert losses_logged(ours) == pytest.approx(losses_logged(stock), abs=1e-6)
    assert_same(ours.model, stock.model, **CLOSE)


@pytest.mark.parametrize("make", [lambda m: SAM(m, 0.1), lambda m: DeltaSAM(m, 0.1, seed=5)])
def test_a_method_equals_a_loop_by_hand(tmp_path, make):
    reference, losses, _ = by_hand(make)
    ours = trained(Ours, tmp_path, method=make)
    assert losses_logged(ours) == pytest.approx(losses, abs=1e-6)
    assert_same(ours.model, reference, **CLOSE)
    plain, _, _ = by_hand(Plain)
    with pytest.raises(AssertionError):  # ρ = 0.1 can be told from 0
        assert_same(ours.model, plain, **CLOSE)
    assert ours.state.log_history[0]["perturbation_norm"] == pytest.approx(0.1, rel=1e-5)


def test_a_method_by_name_takes_options_and_the_seed_of_the_arguments(tmp_path):
    named = trained(Ours, tmp_path, method="delta_sam", method_options={"rho": 0.1})
    reference, _, _ = by_hand(lambda m: DeltaSAM(m, 0.1, seed=5))
    assert_same(named.model, reference, **CLOSE)


def test_the_trainer_of_the_page_trains(tmp_path):
    page = (Path(__file__).parent.parent / "docs" / "integrations.md").read_text(encoding="utf-8")
    (code,) = re.findall(
        r"```python\n(.*?)```", page.split("## Hugging Face's Trainer")[1].split("\n## ")[0], re.DOTALL
    )
    names = {"model": network(), "args": arguments(tmp_path), "data": examples()}
    exec(code, names)
    reference = trained(
        SharpnessAwareTrainer, tmp_path, method=lambda m: DeltaSAM(m, 0.05, weighting="probe", layers=2, seed=5)
    )
    assert_same(names["model"], reference.model)
    assert distance(names["model"], network()) > 1e-3  # it moved


@pytest.mark.parametrize("method", ["plain", "sam", "delta_sam"])
@pytest.mark.parametrize("num_labels", [3, 1])
def test_accumulated_micro_batches_equal_the_undivided_batch(tmp_path, method, num_labels):
    data = examples(num_labels=num_labels)
    whole = trained(Ours, tmp_path, network(num_labels=num_labels), data, method=method)
    cut = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 4}
    pieces = trained(Ours, tmp_path, network(num_labels=num_labels), data, method=method, args=cut)
    assert pieces.state.global_step == 4
    assert losses_logged(pieces) == pytest.approx(losses_logged(whole), abs=1e-6)
    assert_same(pieces.model, whole.model, **CLOSE)


def test_a_smaller_last_micro_batch_counts_by_its_size(tmp_path):
    data = examples(29)  # an epoch: 12, 12, 5
    pieces = trained(
        Ours,
        tmp_path,
        data=data,
        steps=1,
        method=lambda m: SAM(m, 0.1),
        args={"per_device_train_batch_size": 12, "gradient_accumulation_steps": 4},
    )
    whole = trained(Ours, tmp_path, data=data, steps=1, method=lambda m: SAM(m, 0.1))
    assert moved(whole.model) > 1e-3
    assert_same(pieces.model, whole.model, **CLOSE)


def test_the_gradient_is_clipped_to_max_grad_norm(tmp_path):
    clip = 0.05
    reference, _, norms = by_hand(lambda m: SAM(m, 0.1), clip=clip)
    assert min(norms) > clip
    ours = trained(Ours, tmp_path, method=lambda m: SAM(m, 0.1), args={"max_grad_norm": clip})
    assert [line["grad_norm"] for line in ours.state.log_history if "grad_norm" in line] == pytest.approx(
        norms, rel=1e-4
    )
    assert_same(ours.model, reference, **CLOSE)
    one = trained(Ours, tmp_path, steps=1, method=lambda m: SAM(m, 0.1), args={"max_grad_norm": clip})
    assert moved(one.model) == pytest.approx(LR * clip, rel=1e-3)


@pytest.mark.parametrize("mask", ["same", "fresh"])
@pytest.mark.parametrize("saved_at", [3, 4])  # in the middle and at the end of an epoch of four steps
def test_resumed_training_is_bit_for_bit_that_which_was_not_interrupted(tmp_path, mask, saved_at):
    args = {
        "per_device_train_batch_size": 8,
        "gradient_accumulation_steps": 2,
        "optim": "adamw_torch",
        "save_strategy": "steps",
        "save_steps": saved_at,
    }

    def run(folder, **options):
        make = {"method": "delta_sam", "method_options": {"rho": 0.1, "mask": mask}}
        return trained(SharpnessAwareTrainer, folder, network(dropout=0.1), steps=6, args=args, **make, **options)

    uninterrupted = run(tmp_path / "a")
    resumed = run(tmp_path / "b", resume=str(tmp_path / "a" / f"checkpoint-{saved_at}"))
    assert resumed.state.global_step == 6
    assert_same(resumed.model, uninterrupted.model, **EXACT)
    assert torch.equal(resumed.method.generator.get_state(), uninterrupted.method.generator.get_state())
    # The state that the test is about matters: without it the probes (and fresh masks) are others.
    (tmp_path / "a" / f"checkpoint-{saved_at}" / "dsam_method.pt").unlink()
    without = run(tmp_path / "c", resume=str(tmp_path / "a" / f"checkpoint-{saved_at}"))
    with pytest.raises(AssertionError):
        assert_same(without.model, uninterrupted.model, **EXACT)


def test_bfloat16_autocast_reaches_the_passes_but_not_the_probes(tmp_path):
    seen = []

    class Watch(TrainerCallback):
        def on_train_begin(self, args, state, control, model, **kwargs):
            model.bert.encoder.layer[0].intermediate.dense.register_forward_hook(
                lambda module, inputs, output: seen.append((output.dtype, torch.is_grad_enabled()))
            )

    ours = trained(
        Ours, tmp_path, steps=2, callbacks=[Watch()], method=lambda m: DeltaSAM(m, 0.1, seed=5), args={"bf16": True}
    )
    passes, probes = (torch.bfloat16, True), (torch.float32, False)
    own = (torch.bfloat16, False)  # the model's own loss, which is compared
    assert seen == 2 * [own, passes, probes, probes, passes]  # ascent; w and w + v in float32; descent
    reference, losses, _ = by_hand(lambda m: DeltaSAM(m, 0.1, seed=5), steps=2)
    assert losses_logged(ours) == pytest.approx(losses, abs=2e-2)
    assert distance(ours.model, reference) < 0.05 * moved(reference)


def test_own_losses_per_example(tmp_path):
    def doubled(outputs, labels):
        return 2 * nn.functional.cross_entropy(outputs.logits, labels, reduction="none")

    one, two = (trained(Ours, tmp_path, steps=1, method="plain", losses=f) for f in (None, doubled))
    assert losses_logged(two) == pytest.approx([2 * x for x in losses_logged(one)], rel=1e-5)
    assert moved(two.model) == pytest.approx(2 * moved(one.model), rel=1e-3)


def test_evaluation_and_prediction_are_the_stock_ones(tmp_path):
    ours = trained(Ours, tmp_path, steps=1, method="sam")
    stock = Stock(ours.model, arguments(tmp_path), train_dataset=examples())
    assert ours.evaluate(examples())["eval_loss"] == pytest.approx(stock.evaluate(examples())["eval_loss"], rel=1e-6)


def test_a_gradient_that_is_not_finite_ends_training_with_the_weights_as_they_were(tmp_path):
    with pytest.raises(NonFiniteGradient):
        trained(Ours, tmp_path, model := network(), method="sam", losses=lambda o, y: o.logits.sum(1) * torch.inf)
    assert_same(model, network(), **EXACT)


class Dense(ExampleLosses):
    """As the Trainer's, which δ-SAM draws probes for in the rows of words that do not occur too."""

    words = None


@pytest.mark.parametrize("name", sorted(METHODS))
def test_every_method_goes_and_equals_a_loop_by_hand(tmp_path, name):
    ours = trained(Ours, tmp_path, steps=2, method=name)
    model, data = network(), examples()
    method, optimizer = METHODS[name](model, seed=5), torch.optim.SGD(model.train().parameters(), lr=LR)
    seen = []
    for step in range(2):
        batch = [data[32 * step + i] for i in range(32)]
        seen.append(float(method.backward(Dense(model, {k: torch.stack([e[k] for e in batch]) for k in batch[0]}))))
        optimizer.step()
        optimizer.zero_grad()
    assert losses_logged(ours) == pytest.approx(seen, abs=1e-6)
    assert_same(ours.model, model, **CLOSE)
    assert moved(ours.model) > 1e-3


def test_own_losses_go_with_methods_that_compare_outputs(tmp_path):
    def doubled(outputs, labels):
        return 2 * nn.functional.cross_entropy(outputs.logits, labels, reduction="none")

    options = {"method": "rdrop", "method_options": {"alpha": 0.0}}
    one, two = (trained(Ours, tmp_path, steps=1, losses=f, **options) for f in (None, doubled))
    assert losses_logged(two) == pytest.approx([2 * x for x in losses_logged(one)], rel=1e-5)


def test_an_example_without_a_label_is_no_loss_of_zero(tmp_path):
    data = [example | {"labels": torch.tensor(-100 if i % 2 else 1)} for i, example in enumerate(examples())]
    with pytest.raises(IndexError, match="Target -100 is out of bounds"):
        trained(Ours, tmp_path, data=data, steps=1, method="sam")


def test_a_checkpoint_of_another_method_or_of_more_processes_is_not_gone_on_with(tmp_path):
    def run(method, resume=None, steps=3):
        args = {"save_strategy": "steps", "save_steps": 2}
        return trained(Ours, tmp_path / "run", steps=steps, method=method, args=args, resume=resume)

    run("fsam")
    there = tmp_path / "run" / "checkpoint-2"
    for other in ("plain", "msam"):
        with pytest.raises(
            ValueError, match=r"is the state of FSAM and this training's method is \w+: resume with FSAM"
        ):
            run(other, str(there))
    old = torch.load(there / "dsam_method.pt", weights_only=True)
    assert (old.pop("method"), old.pop("processes")) == ("FSAM", 1)
    torch.save(old, there / "dsam_method.pt")  # as it was written before
    assert run("fsam", str(there)).state.global_step == 3
    (there / "dsam_method.pt").rename(there / "dsam_method_0.pt")
    with pytest.raises(ValueError, match=r"of another number of processes \(dsam_method_0.pt\)"):
        run("fsam", str(there))
    for rank in (1, 2, 3):
        shutil.copy(there / "dsam_method_0.pt", there / f"dsam_method_{rank}.pt")
    trainer = Ours(network(), arguments(tmp_path), train_dataset=examples(), method="fsam")
    trainer.method = METHODS["fsam"](trainer.model)
    for processes, rank in ((2, 0), (2, 1), (8, 0), (8, 7), (4, 3)):  # all ranks alike: one that waits waits for ever
        trainer.args = SimpleNamespace(world_size=processes, process_index=rank)
        if processes == 4:
            trainer._resume_method(str(there))
            continue
        with pytest.raises(ValueError, match=r"of another number of processes \(dsam_method_0.pt, .*_3.pt\)"):
            trainer._resume_method(str(there))


def test_a_node_with_a_disk_of_its_own_goes_on_with_its_own_ranks_files(tmp_path):
    trainer = Ours(network(), arguments(tmp_path), train_dataset=examples(), method="fsam")
    trainer.method = METHODS["fsam"](trainer.model)
    for rank in (2, 3):  # the second node's of two
        trainer.args = SimpleNamespace(world_size=4, process_index=rank)
        Trainer._save_rng_state, kept = lambda *_: None, Trainer._save_rng_state
        try:
            trainer._save_rng_state(str(tmp_path))
        finally:
            Trainer._save_rng_state = kept
    trainer._resume_method(str(tmp_path))
    trainer.args = SimpleNamespace(world_size=8, process_index=3)
    with pytest.raises(ValueError, match=r"of another number of processes \(dsam_method_2.pt, dsam_method_3.pt\)"):
        trainer._resume_method(str(tmp_path))


def test_evaluation_has_the_losses_that_are_trained(tmp_path):
    """`load_best_model_at_end` and early stopping choose by them."""
    data = examples()

    def tenfold(outputs, labels):
        return 10 * nn.functional.cross_entropy(outputs.logits, labels, reduction="none")

    trainer = Ours(network(), arguments(tmp_path, steps=1), train_dataset=data, losses=tenfold, method="sam")
    plain = Ours(network(), arguments(tmp_path, steps=1), train_dataset=data, method="sam")
    assert trainer.evaluate(data)["eval_loss"] == pytest.approx(10 * plain.evaluate(data)["eval_loss"], rel=1e-5)
    trainer.train()
    torch.testing.assert_close(
        trainer.model.classifier.weight, trained_by_hand(tenfold, data), msg="and training takes no other for it"
    )


def test_a_checkpoint_without_the_method_s_state_is_said(tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 1, "save_only_model": True}
    trained(Ours, tmp_path, steps=1, args=saving, method="looksam")
    with pytest.warns(UserWarning, match="has no state of the method, which begins anew"):
        trained(Ours, tmp_path, steps=2, method="looksam", resume=str(tmp_path / "checkpoint-1"))


class WithClassWeights(BertForSequenceClassification):
    def forward(self, input_ids=None, attention_mask=None, labels=None):
        outputs = super().forward(input_ids, attention_mask)
        if labels is not None:
            outputs.loss = nn.functional.cross_entropy(outputs.logits, labels, torch.tensor([1.0, 1.0, 20.0]))
        return outputs


class WithARegulariser(BertForSequenceClassification):
    def forward(self, input_ids=None, attention_mask=None, labels=None):
        outputs = super().forward(input_ids, attention_mask, labels=labels)
        if labels is not None and self.training:
            outputs.loss = outputs.loss + 1000 * outputs.logits.square().mean()
        return outputs


def test_a_model_s_own_loss_is_not_trained_as_another(tmp_path):
    model = WithClassWeights(network().config)
    with pytest.raises(ValueError, match=r"WithClassWeights's own loss is \d\.\d{4} .*: pass losses="):
        trained(Ours, tmp_path, model, steps=1, method="sam")
    assert model.training and all(module.training for module in model.modules())
    silent = WithClassWeights(network().config)  # every loss is ln 3, weighted or not, until the first step
    nn.init.zeros_(silent.classifier.weight), nn.init.zeros_(silent.classifier.bias)
    with pytest.raises(ValueError, match="WithClassWeights's own loss is"):
        more = {"gradient_accumulation_steps": 16, "learning_rate": 1.0}
        trained(Ours, tmp_path, silent, steps=9, method="sam", args=more)
    with pytest.raises(ValueError, match="WithARegulariser's own loss is"):
        trained(Ours, tmp_path, WithARegulariser(network().config), steps=1, method="sam")

    def weighted(outputs, labels):
        weights = torch.tensor([1.0, 1.0, 20.0])
        return nn.functional.cross_entropy(outputs.logits, labels, weights, reduction="none")

    trained(Ours, tmp_path, model, steps=1, method="sam", losses=weighted)
    drawing = network(dropout=0.1)  # comparing draws no random number
    once = trained(Ours, tmp_path, drawing, steps=3, method="sam", losses=classifier_losses).model
    assert_same(once, trained(Ours, tmp_path, network(dropout=0.1), steps=3, method="sam").model, **EXACT)


def test_other_options_than_the_checkpoint_s_are_said(tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 1}
    trained(Ours, tmp_path, steps=1, args=saving, method="looksam", method_options={"k": 2})
    resume = {"steps": 2, "method": "looksam", "resume": str(tmp_path / "checkpoint-1")}
    with pytest.warns(UserWarning, match=r"with method_options \{'k': 2\}, and goes on with \{'k': 5\}"):
        trained(Ours, tmp_path, method_options={"k": 5}, **resume)
    with warnings.catch_warnings(action="error", category=UserWarning):
        trained(Ours, tmp_path, method_options={"k": 2}, **resume)


def trained_by_hand(losses, data):
    """The head after one step of SAM on the Trainer's first batch."""
    model = network()
    trainer = Ours(model, arguments(".", steps=1), train_dataset=data, method="sam")
    batch = next(iter(trainer.get_train_dataloader()))
    labels = batch.pop("labels")
    SAM(model, 0.05).backward(lambda: losses(model(**batch), labels))
    return model.classifier.weight.detach() - LR * model.classifier.weight.grad


class Stream(torch.utils.data.IterableDataset):
    """Data whose length nobody knows."""

    def __init__(self, data):
        self.data = data

    def __iter__(self):
        return iter(self.data)


def test_what_an_epoch_of_a_stream_leaves_over_goes_into_the_next_step(tmp_path, monkeypatch):
    """Five micro-batches, two a step: the fifth comes with the next epoch's first."""
    seen, backward = [], SAM.backward

    def noted(self, closures, **more):
        seen.append([int(closure.labels) for closure in closures])
        return backward(self, closures, **more)

    monkeypatch.setattr(SAM, "backward", noted)
    data = [example | {"labels": torch.tensor(i)} for i, example in enumerate(examples(5, 5))]
    options = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}
    Ours(network(num_labels=5), arguments(tmp_path, 5, **options), train_dataset=Stream(data), method="sam").train()
    taken = list(chain.from_iterable(seen))
    assert len(seen) == 5 and taken == [i % 5 for i in range(len(taken))] and 4 in taken


def test_a_trainer_that_only_evaluates_needs_nothing_to_train(tmp_path):
    frozen = network().requires_grad_(False)
    trainer = Ours(frozen, arguments(tmp_path), train_dataset=examples(), method="per_instance")
    assert trainer.evaluate(examples(8))["eval_loss"] > 0
    with pytest.raises(ValueError, match="no parameter requires a gradient"):
        trainer.train()


class Wrapped(nn.Module):
    """A model that is none of Hugging Face's, and knows of no words."""

    def __init__(self):
        super().__init__()
        self.inner = network(dropout=0.1)

    def forward(self, input_ids, attention_mask, labels=None):
        return self.inner(input_ids=input_ids, attention_mask=attention_mask)


def test_only_noise_on_words_needs_words(tmp_path):
    assert trained(Ours, tmp_path, model=Wrapped(), steps=1, method="rdrop").state.global_step == 1
    with pytest.raises(ValueError, match=r"Wrapped has no get_input_embeddings\(\): methods with noise"):
        trained(Ours, tmp_path, model=Wrapped(), steps=1, method="r3f")


def test_outputs_of_a_shape_that_cannot_be_compared_are_refused(tmp_path):
    """FreeLB compares none."""

    class EveryToken(Wrapped):
        def get_input_embeddings(self):
            return self.inner.get_input_embeddings()

        def forward(self, input_ids, attention_mask, labels=None):
            hidden = self.inner.bert(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
            return SequenceClassifierOutput(logits=self.inner.classifier(hidden))

    def losses(outputs, labels):
        return nn.functional.cross_entropy(outputs.logits.mean(1), labels, reduction="none")

    made = {"losses": losses, "steps": 1}
    assert trained(Ours, tmp_path, model=EveryToken(), method="freelb", **made).state.global_step == 1
    for method in ("rdrop", "smart", "r3f"):
        with pytest.raises(ValueError, match=r"the logits have the shape \(32, 10, 3\)"):
            trained(Ours, tmp_path, model=EveryToken(), method=method, **made)


def test_settings_that_would_not_do_what_they_say_are_refused(tmp_path):
    for options, args, message in (
        ({"method": "dsam"}, {}, r"^unknown method 'dsam'; did you mean 'delta_sam'\?$"),
        ({"method": "rw_sam"}, {}, r"; did you mean 'delta_sam' with weighting=gibbs\?$"),
        ({"method": "sam", "ascent": "both"}, {}, "ascent must be 'global' or 'local'"),
        ({"method": lambda m: SAM(m), "method_options": {"rho": 1.0}}, {}, "method_options"),
        ({"method": SAM(network())}, {}, "method is a SAM that was made already: pass its class, or a function"),
        ({"method": "sam", "method_options": {"rh": 1.0}}, {}, "_options of SAM: unknown option 'rh' of SAM; .* 'rho'"),
        ({"compute_loss_func": lambda *a, **k: None}, {}, "pass losses="),
        ({}, {"label_smoothing_factor": 0.1}, "label_smoothing_factor"),
        ({}, {"optim": "adalomo"}, "steps inside the backward pass"),
        ({}, {"optim": "galore_adamw_layerwise"}, "steps inside the backward pass"),
    ):
        with pytest.raises(ValueError, match=message):
            Ours(network(), arguments(tmp_path, **args), train_dataset=examples(), **options)

    class Weighted(Ours):
        def compute_loss(self, model, inputs, **options):
            return super().compute_loss(model, inputs, **options)

    with pytest.raises(ValueError, match="Weighted.compute_loss would not be called: pass losses="):
        Weighted(network(), arguments(tmp_path), train_dataset=examples())


def test_import_dsam_does_not_import_the_integrations():
    unwanted = ("dsam.integrations", "transformers", "accelerate")
    code = f"import sys, dsam; print([m for m in sys.modules if m.startswith({unwanted})])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"


def a_rank(rank, port, folder):
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    found = {}
    cut = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 2, "ddp_backend": "gloo"}
    for name, options in TWO_PROCESSES.items():
        trainer = trained(Ours, folder, steps=2, args=cut, method=lambda m: DeltaSAM(m, 0.1, seed=5), **options)
        assert trainer.accelerator.num_processes == 2
        found[name] = losses_logged(trainer), trainer.model.state_dict()
    own = trained(Ours, folder, steps=1, args=cut, losses=classifier_losses, method="sam")
    found["evaluated"] = [own.evaluate(examples())["eval_loss"]]
    saving = cut | {"save_strategy": "steps", "save_steps": 1}
    options = {"method": lambda m: DeltaSAM(m, 0.1, seed=5), "args": saving}
    trained(Ours, folder / "saved", steps=2, **options)
    resumed = trained(Ours, folder / "saved", steps=2, resume=str(folder / "saved" / "checkpoint-1"), **options)
    found["resumed"] = [], resumed.model.state_dict()
    torch.save(found, folder / f"{rank}.pt")
    warm.leave_group()


def both_ranks(port, folder):
    mp.spawn(a_rank, (port, Path(folder)), nprocs=2)


TWO_PROCESSES = {"global": {"ascent": "global"}, "local": {"ascent": "local"}}


@pytest.mark.slow
def test_two_processes_equal_one_with_the_joint_batch_and_resume_exactly(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    warm.call("test_integrations:both_ranks", port, str(tmp_path))
    one = trained(Ours, tmp_path, steps=2, method=lambda m: DeltaSAM(m, 0.1, seed=5))
    for rank in (0, 1):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        losses, weights = found["global"]
        if rank == 0:  # only the first process logs
            assert losses == pytest.approx(losses_logged(one), abs=1e-6)
        for name, value in one.model.state_dict().items():
            torch.testing.assert_close(weights[name], value, **CLOSE)
            assert torch.equal(found["resumed"][1][name], weights[name])
        (evaluated,), once = found["evaluated"], trained(Ours, tmp_path, steps=1, method="sam")
        assert evaluated == pytest.approx(once.evaluate(examples())["eval_loss"], abs=1e-5)
        _, local = found["local"]
        assert max(float((weights[k] - local[k]).abs().max()) for k in weights) > 1e-5
