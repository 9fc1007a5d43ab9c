"""The mean loss over a fixed set of examples as a function of the weights: value, gradient, Hessian-vector product."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from ..methods import Closure


class Objective:
    """L(w) = mean of the losses of all closures' examples.

    Args:
        closures: each returns the losses (B,) of some of the examples, the same at every call: no dropout.
            Double backward must work: Hugging Face models need `attn_implementation="eager"`.
        params: w; directions are lists of tensors of these shapes.
        on_pass: called after each closure with the pass's cost in forward passes (1 or 6): for progress.
    """

    def __init__(
        self,
        closures: Sequence[Closure],
        params: Sequence[nn.Parameter],
        on_pass: Callable[[int], None] = lambda _: None,
    ):
        self.closures, self.params, self.on_pass = list(closures), list(params), on_pass

    @torch.no_grad()
    def loss(self) -> float:
        losses = []
        for closure in self.closures:
            losses.append(closure().double())
            self.on_pass(1)
        return float(torch.cat(losses).mean())

    def gradient(self) -> list[Tensor]:
        total, count = [torch.zeros_like(p) for p in self.params], 0
        for closure in self.closures:
            losses = closure()
            count += len(losses)
            torch._foreach_add_(total, torch.autograd.grad(losses.sum(), self.params, materialize_grads=True))
            self.on_pass(3)
        return torch._foreach_div(total, count)

    def hessian_vector(self, vector: Sequence[Tensor]) -> list[Tensor]:
        """H v by double backward; about six forward passes."""
        total, count = [torch.zeros_like(p) for p in self.params], 0
        for closure in self.closures:
            losses = closure()
            count += len(losses)
            gradient = torch.autograd.grad(losses.sum(), self.params, create_graph=True, materialize_grads=True)
            slope = sum((g * v).sum() for g, v in zip(gradient, vector, strict=True))
            if slope.requires_grad:  # else the losses are linear in w
                torch._foreach_add_(total, torch.autograd.grad(slope, self.params, materialize_grads=True))
            self.on_pass(6)
        return torch._foreach_div(total, count)
