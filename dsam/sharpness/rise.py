"""The worst-case rise of the loss within ρ, to first order: what SAM minimises besides the loss."""

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn

from ..methods import Closure
from ..methods.perturbation import perturbed, total_norm


def rises(
    closures: Iterable[Closure],
    params: Sequence[nn.Parameter],
    rho: float,
    on_pass: Callable[[int], None] = lambda _: None,
) -> Tensor:
    """ℓ(w + ρ g/‖g‖) − ℓ(w) for each closure by itself, ℓ the mean of its losses and g its gradient.

    With closures of one batch each this is SAM's sharpness (arXiv 2010.01412, m = the batch), with closures of one
    example each the per-instance one that δ-SAM is after. 0 where g is 0.
    """
    found = []
    for closure in closures:
        loss = closure().mean()
        gradient = torch.autograd.grad(loss, params, allow_unused=True)
        norm = float(total_norm(gradient))
        with torch.no_grad(), perturbed(params, gradient, rho / norm if norm > 0 else 0.0):
            found.append(closure().mean().double() - loss.detach().double())
        on_pass(4)
    return torch.stack(found).cpu()
