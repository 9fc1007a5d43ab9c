"""Per-instance SAM, exactly, in two batched passes."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from .per_example import PerExampleGradients
from .perturbation import Gradients
from .sam import SAM
from .step import Step


class PerInstance(SAM):
    """The mean of the SAM gradients of single examples: mean_i ∇ℓ_i(w + ρ g_i/‖g_i‖). Exact; what δ-SAM approximates.

    In the words of δ-SAM's abstract (Zhou et al. 2022, arXiv 2112.08772); m-SAM with m = 1, and with `GroupSAM(m=1)`
    that is 2B small passes. Here it is two batched ones: the first keeps each layer's inputs and output gradients, of
    which g_i consists, and in the second they move the layer's outputs as ε_i would (`PerExampleGradients.perturbed`).

    The model must consist of Linear, LayerNorm and Embedding modules as far as it is trained; TypeError names one that
    is not. For others there is `GroupSAM(m=1)`.
    """

    stateless = True

    def __init__(self, params: nn.Module, rho: float = 0.05, **options):
        super().__init__(params, rho, **options)
        if self.module is None:
            raise ValueError("PerInstance looks inside the model: PerInstance(model, …), or GroupSAM(params, m=1)")
        PerExampleGradients(self.module, self.params)  # says what it cannot look into before the first step

    def compute(self, step: Step) -> tuple[Tensor, Gradients]:
        assert self.module is not None
        gradients = PerExampleGradients(self.module, self.params)
        losses: list[Tensor] = []
        norms: list[Tensor] = []

        @contextmanager
        def at_its_worst(k: int) -> Iterator[None]:
            """Inside, each example of piece k is at its own w + ρ g_i/‖g_i‖."""
            with gradients.record():
                found = step.losses(k, ascent=True)
            gradients.backward(found)
            step.report["backwards"] += step.costs[k]
            losses.append(found.detach())
            norms.append(gradients.squared_norms().sqrt())
            try:
                # 0 where the gradient is 0; a norm that is not finite goes on into the gradient and is found there.
                with gradients.perturbed(torch.where(norms[k] == 0, 0, self.rho / norms[k])):
                    yield
            finally:
                gradients.clear()

        _, gradient = step.gradient(around=at_its_worst)
        own = torch.cat(norms)
        step.report["example_gradient_norm"] = own.mean()
        return torch.cat(losses), gradient
