"""How far a training has learnt its wrong labels (`data.label_noise`): what it fits of them, and what they pull."""

import numpy as np
import torch
from torch import Tensor, nn

from ..glue import Tokenised
from ..methods import ExampleLosses
from ..methods.losses import example_losses
from ..methods.per_example import PerExampleGradients, Unsupported
from .batches import evaluation_batches
from .device import to

EXAMPLES = 2000
"""Of the training set, its first ones: a share of them has a standard error of about a hundredth."""
PULLING = 256
"""Of these, those whose gradients are looked at; the tables' note says so."""


def memorised(examples: Tokenised, model: nn.Module, device: torch.device, autocast: torch.dtype | None = None) -> dict:
    """What `model` makes, without dropout, of the training examples, those with a wrong label apart.

    "examples": how many; "wrong": the share of wrong labels among them. "clean", "flipped" and "true": {"loss",
    "accuracy"} of the examples with a right label, of the others by the wrong one that is trained on, and of these by
    their true one; without "accuracy" for scores, and empty where there are no such examples. "pull": the share that
    the flipped ones have in Σ‖g_i‖ over the first `PULLING` examples, and "pulling" their share in the number; neither
    is there for a model that `PerExampleGradients` has no formulas for.
    """
    assert examples.clean_labels is not None
    examples = examples.take(np.arange(min(len(examples), EXAMPLES)))
    assert examples.labels is not None and examples.clean_labels is not None
    flipped = torch.from_numpy(examples.labels != examples.clean_labels)
    was_training = model.training
    model.eval()
    try:
        logits = _logits(examples, model, device, autocast)
        given, true = torch.from_numpy(examples.labels), torch.from_numpy(examples.clean_labels)
        found: dict = {"examples": len(examples), "wrong": float(flipped.double().mean())}
        for name, labels, which in (("clean", given, ~flipped), ("flipped", given, flipped), ("true", true, flipped)):
            found[name] = _fit(logits[which], labels[which])
        some = examples.take(np.arange(min(len(examples), PULLING)))
        wrong = flipped[: len(some)]
        norms = _gradient_norms(some, model, device)
        if norms is not None and norms.sum() > 0:
            found |= {"pull": float(norms[wrong].sum() / norms.sum()), "pulling": float(wrong.double().mean())}
    finally:
        model.train(was_training)
    return found


@torch.no_grad()
def _logits(examples: Tokenised, model: nn.Module, device: torch.device, autocast: torch.dtype | None) -> Tensor:
    found: dict[int, Tensor] = {}
    for indices in evaluation_batches(examples.lengths):
        batch = to(examples.batch(indices), device)
        batch.pop("labels")
        with torch.autocast(device.type, autocast, enabled=autocast is not None):
            found |= zip(indices.tolist(), model(**batch).logits.float().cpu(), strict=True)
    return torch.stack([found[i] for i in range(len(examples))])


def _fit(logits: Tensor, labels: Tensor) -> dict:
    if not len(labels):
        return {}
    fit = {"loss": float(example_losses(logits, labels).mean())}
    if not labels.is_floating_point():
        fit["accuracy"] = float((logits.argmax(1) == labels).double().mean())
    return fit


def _gradient_norms(examples: Tokenised, model: nn.Module, device: torch.device) -> Tensor | None:
    """‖∇ℓ_i‖, shape (N,); None where there are no formulas for them."""
    norms = torch.zeros(len(examples))
    try:
        gradients = PerExampleGradients(model)
        for indices in evaluation_batches(examples.lengths, tokens=2048):
            losses = ExampleLosses(model, to(examples.batch(indices), device))
            with torch.enable_grad(), gradients.record():
                found = losses()
            gradients.backward(found)
            norms[torch.from_numpy(indices)] = gradients.squared_norms().sqrt().float().cpu()
            gradients.clear()
    except Unsupported:
        return None
    return norms
