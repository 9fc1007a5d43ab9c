"""Whether the examples of a batch stay apart in a model, without which there is no gradient of one example."""

import math

import torch
from torch import nn

from .per_example import PerExampleGradients
from .perturbation import total_norm
from .step import Step
from .taps import Unsupported

PROVEN = frozenset({"gradients", "square"})
MOST = 4
NEAR = 0.05
"""Share of the gradients' norm that two ways to them may differ by: rounding in half precision takes less."""
TINY = torch.finfo(torch.float32).tiny ** 0.5
"""Gradients whose squares are 0 in float32."""


def batch_norms(model: nn.Module) -> list[tuple[str, nn.Module]]:
    return [(name, one) for name, one in model.named_modules() if isinstance(one, nn.modules.batchnorm._BatchNorm)]


def require_examples_apart(norms: list[tuple[str, nn.Module]]) -> None:
    """ValueError where one of a model's `batch_norms` makes an example's loss depend on the others of its batch."""
    for name, module in norms:
        if module.training or module.running_mean is None:  # without statistics of its own it takes the batch's
            raise ValueError(
                f"'{name}' ({type(module).__name__}) makes an example's loss depend on the batch's others: there is no "
                "gradient of one example; use GroupNorm or LayerNorm, or evaluation mode with statistics of its own"
            )


def require_own_gradients(step: Step, k: int, found: PerExampleGradients) -> None:
    """Raises Unsupported where the gradients g_i that were `found` for piece k are not its examples': where Σ_i c_i g_i
    is not what autograd gives for Σ_i c_i losses[i], in a pass at w that is no part of the step.

    Looked at in a method's first step and at the first piece with as many tokens as examples, where shapes do not tell
    the two apart: `PROVEN` is what `Method.checked` then has. Layers are called in ways that hooks do not see, and then
    no formula is to be trusted. A gradient of 0 proves nothing, as all below a head that starts at 0 have in the first
    step: then the next steps are looked at as well, `MOST` in all.
    """
    what = PROVEN if found.square else PROVEN - {"square"}
    if what <= step.checked:
        return
    params = [p for p in found.params if p.requires_grad]
    with torch.enable_grad():
        losses = step.aside(k, precise=False)
        weights = torch.linspace(-1, 1, len(losses), device=losses.device, dtype=losses.dtype)
        expected = torch.autograd.grad(losses @ weights * found.scale, params, allow_unused=True)
    sums = {id(p): value for p, value in zip(found.params, found.weighted_gradient(weights), strict=True)}
    rest = [
        sums[id(p)] - (0 if g is None else g.to_dense() / found.scale) for p, g in zip(params, expected, strict=True)
    ]
    apart, norm = total_norm(rest), (weights.square() @ found.squared_norms().to(weights.dtype)).sqrt()
    apart, norm = torch.stack([apart.to(norm), norm]).tolist()
    # Where both are 0, or one is not finite, that shows nothing; a norm alone that is 0 shows that none was seen.
    if not math.isfinite(apart + norm) or max(apart, norm) < TINY:
        return
    if apart > NEAR * norm:
        told = f"their sum is {100 * apart / norm:.0f} % of their norm away from the batch's" if norm else (
            "they are 0, unlike the batch's")  # fmt: skip
        raise Unsupported(
            f"per-example gradients: {told} "
            "gradient: the model does not keep its examples in the first dimension, or uses a layer's weight without "
            "calling the layer"
        )
    values = [g._values() if g.is_sparse else g for g in expected if g is not None]
    kind = "square" if found.square else "other"
    if kind not in step.looked:
        step.looked.add(kind)
        step.checked.add(f"{kind} look {sum(one.startswith(f'{kind} look') for one in step.checked)}")
    if torch.stack([value.any() for value in values]).all() or f"{kind} look {MOST - 1}" in step.checked:
        step.checked.update(what)


def require_sound(step: Step, why: Unsupported) -> None:
    """Raises what the closures raise by themselves, where a pass that looked into the layers ended with an error: then
    it was a mistake of theirs, and none of looking."""
    if why.__cause__ is not None:
        with torch.no_grad():
            for k in range(len(step)):
                step.aside(k, precise=False)
